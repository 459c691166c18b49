"""Upsamplers on random cases: against float64, and what holds whatever the values."""

import contextlib
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import channel_slice, channels_last, cropped, expanded, scalar, sliced, transposed
from test_deterministic import deterministic

from dlu_triton import _launch, _verify
from dlu_triton._verify import Case

INPUTS = {
    "dlu_upsample": ("features", "kernel_space", "offsets"),
    "expand_kernels": ("kernel_space", "offsets"),
    "carafe": ("features", "masks"),
    "carafe_upsample": ("features", "logits"),
}
NARROW = (torch.float32, torch.float16, torch.bfloat16)  # which go together; float64 goes alone
LAYOUTS = (torch.clone, channels_last, sliced, cropped, channel_slice, transposed, expanded, scalar)
LONG = settings.default.max_examples > 10
PROGRAMS = 12 if LONG else 2  # about so many of a kernel; each takes long, interpreted


@st.composite
def cases(draw, least_batch=0, modest=False):
    """Few outputs: maps of odd sizes, of one row or column, of one pixel. Modest ones are of the usual scales too."""
    k = draw(st.sampled_from((3, 1, 5) if modest else (3, 1, 5, 7, 9)))
    g = draw(st.sampled_from([g for g in (1, 2, 3) if g <= PROGRAMS]))
    batches = [n for n in (1, 2, 3, 0) if n * g <= PROGRAMS]
    n = draw(st.sampled_from([n for n in batches if n >= least_batch] or [least_batch]))
    outputs = PROGRAMS // (max(n, 1) * g) * min(64, 1024 // k**2)
    scales = (2, 3, 1) if modest else (2, 3, 4, 1) * 6 + tuple(range(5, 17))
    scales = [s for s in scales if s**2 <= outputs]
    s = draw(st.sampled_from(scales or [1, 2]))
    long = draw(st.integers(1, max(1, min(40, outputs // s**2))))
    short = draw(st.integers(1, max(1, outputs // s**2 // long)))
    h, w = draw(st.sampled_from(((short, long), (long, short))))
    return Case(
        "",
        batch=n,
        channels=g * draw(st.integers(1, 40 // g)),
        height=h,
        width=w,
        scale_factor=s,
        kernel_size=k,
        groups=g,
        reach=draw(st.sampled_from((0.0, 1e-7, 0.3, 1.0, 4.0, 100.0, 1e6))),
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass(frozen=True)
class Trial:
    """A case, and how its arguments come. Offsets are rounded to multiples of `step`, unless it is 0."""

    case: Case
    dtypes: dict[str, torch.dtype]
    layouts: dict[str, object]
    wanted: tuple[str, ...]
    step: float
    deterministic: bool


@st.composite
def trials(draw, operator, dtype):
    names, case = INPUTS[operator], draw(cases())
    whole = (case.scale_factor * case.height, case.scale_factor * case.width)
    cut = st.tuples(*(st.integers(1, side) | st.integers(max(1, side - case.scale_factor), side) for side in whole))
    others = st.just(dtype) if dtype == torch.float64 else st.just(dtype) | st.sampled_from(NARROW)
    return Trial(
        replace(case, output_size=draw(st.none() | cut)),
        {names[0]: dtype, **{name: draw(others) for name in names[1:]}},
        {name: draw(st.sampled_from(LAYOUTS)) for name in (*names, "grad_output")},
        tuple(name for name in names if draw(st.booleans())) if draw(st.booleans()) else names,
        draw(st.sampled_from((0.0, 0.0, 1.0, 0.5))),
        draw(st.booleans()),
    )


def arguments_of(operator, trial, device):
    arguments = _verify.inputs(operator, trial.case, torch.float64, device)
    if trial.step and "offsets" in arguments:
        arguments["offsets"] = (arguments["offsets"] / trial.step).round() * trial.step
    first = next(iter(trial.dtypes.values()))
    return {name: trial.layouts[name](value.to(trial.dtypes.get(name, first))) for name, value in arguments.items()}


def held_coordinates(offsets, case):
    """Offsets in float64 that lead where those given lead in float32, in which coordinates are computed.

    Beside a pixel that may be on the pixel, or at its other side, where the derivative is another.
    """
    if offsets.dtype == torch.float64:
        return offsets
    y, x = torch.meshgrid(*(torch.arange(size, device=offsets.device) for size in offsets.shape[2:]), indexing="ij")
    pixels = torch.stack([x, y]).unsqueeze(1)  # (2, 1, H, W)
    positions = offsets.float().unflatten(1, (case.groups, 2, case.scale_factor**2)) + pixels
    return (positions.double() - pixels).flatten(1, 3)


def terms_of(operator, case, arguments):
    """The results if none of the terms that they sum up were negative, by name; bounds of them, up to small factors."""
    positive = {name: v.abs() if name in ("features", "masks", "grad_output") else v for name, v in arguments.items()}
    with pytest.MonkeyPatch.context() as patch:  # the adjoint of the softmax subtracts, but for a constant denominator
        patch.setattr(torch.Tensor, "softmax", lambda x, dim: (x - x.logsumexp(dim, keepdim=True).detach()).exp())
        terms = _verify.results(_verify.function(operator, case, eager=True), positive)
    products = terms["output"] * positive["grad_output"]
    return {**terms, "offsets": products.unflatten(1, (case.groups, -1)).sum(2)}


@pytest.mark.parametrize("dtype", _verify.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("operator", _verify.OPERATORS)
@given(data=st.data())
def test_error_against_float64(operator, dtype, data, device):
    trial = data.draw(trials(operator, dtype))
    case = trial.case
    arguments = arguments_of(operator, trial, device)
    plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in arguments.items()}
    exact = {name: value.double() for name, value in plain.items()}
    if "offsets" in exact:
        exact["offsets"] = held_coordinates(plain["offsets"], case)
    kernels, twin = (_verify.function(operator, case, eager=eager) for eager in (False, True))
    truth, eager = (_verify.results(twin, values, trial.wanted) for values in (exact, plain))
    with deterministic() if trial.deterministic else contextlib.nullcontext():
        found = _verify.results(kernels, arguments, trial.wanted)
    terms = {name: _verify.largest_of(value) for name, value in terms_of(operator, case, exact).items()}
    # Where terms cancel each other, as those of kernels whose taps all have the same gradient, truth is zero, and so
    # may be what eager finds by chance; what is left are roundings of the terms.
    least = {name: terms[name] for name, value in truth.items() if _verify.largest_of(value) < 1e-3 * terms[name]}
    rounding, finer = (torch.finfo(trial.dtypes[name]).eps for name in INPUTS[operator][:2])
    if operator != "expand_kernels" and finer < rounding:
        # Products take the taps in the type of the features, those of eager are not rounded.
        least |= {name: terms[name] for name in ("output", "features") if name in found}
    for name, comparison in _verify.comparisons(truth, eager, found, least).items():
        assert comparison.passed, f"{name}: {comparison}"


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")  # of the interpreter
@pytest.mark.parametrize("operator", _verify.OPERATORS)
@given(data=st.data())
def test_bad_values_stay_in_their_image_and_group(operator, data, path):
    """Of any types, layouts and settings."""
    trial = data.draw(trials(operator, data.draw(st.sampled_from(_verify.DTYPES))))
    assume(trial.case.batch)
    own = {name: torch.clone if each in (expanded, scalar) else each for name, each in trial.layouts.items()}
    trial = replace(trial, layouts=own)
    groups, image = trial.case.groups, data.draw(st.integers(0, trial.case.batch - 1))
    group = data.draw(st.integers(0, groups - 1))
    call = _verify.function(operator, trial.case, eager=False)
    arguments = arguments_of(operator, trial, path)
    with deterministic() if trial.deterministic else contextlib.nullcontext():
        clean = _verify.results(call, arguments, trial.wanted)
        part = arguments[data.draw(st.sampled_from(list(arguments)))][image].tensor_split(groups)[group]
        share = data.draw(st.sampled_from((0.02, 0.5, 1.0)))
        bad = torch.rand(part.shape, generator=torch.Generator().manual_seed(trial.case.seed)) < share
        value = data.draw(st.sampled_from((math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-40)))
        part[bad.to(path)] = torch.tensor(value, dtype=torch.float64).to(part.dtype)  # infinite if past the type
        found = _verify.results(call, arguments, trial.wanted)
    others = torch.ones(trial.case.batch, groups, dtype=torch.bool, device=path)
    others[image, group] = False
    for name, value in found.items():
        torch.testing.assert_close(*(each.unflatten(1, (groups, -1))[others] for each in (value, clean[name])))


# ---------------------------------------------------------------------------------------------------------------
# Properties, of kernels and eager twins, in float64 where nothing else is said
# ---------------------------------------------------------------------------------------------------------------


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def called(operator, case, *tensors):
    return _verify.function(operator, case, eager=False)(*tensors)


def drawn(operator, case, path, dtype=torch.float64):
    """Inputs in their order, and an upstream gradient."""
    return tuple(_verify.inputs(operator, case, dtype, path).values())


def more(*tensors):
    """Other values of the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors)


def repeated(x, case):
    """Every pixel scale_factor^2 times."""
    return x.repeat_interleave(case.scale_factor, 2).repeat_interleave(case.scale_factor, 3)


def normalized(logits, case):
    """Softmax over the taps of each group, which come first among the channels: (N, G*k*k*..., H, W)."""
    return logits.unflatten(1, (case.groups, case.kernel_size**2, -1)).softmax(2).flatten(1, 3)


def shuffled(x, case):
    """(N, C*s*s, H, W) -> (N, C, s*H, s*W)."""
    n, _, h, w = x.shape
    s = case.scale_factor
    return x.reshape(n, -1, s, s, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, -1, s * h, s * w)


FEATURE_OPERATORS = pytest.mark.parametrize("operator", ("dlu_upsample", "carafe", "carafe_upsample"))
EVERY_OPERATOR = pytest.mark.parametrize("operator", _verify.OPERATORS)
SOME = cases(least_batch=1, modest=not LONG)


@pytest.mark.parametrize("operator", ("dlu_upsample", "carafe_upsample"))
@given(case=SOME, radius=st.integers(0, 2), inner=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_constant_image_stays_constant_away_from_its_border(operator, case, radius, inner, path):
    s, h, w = min(case.scale_factor, 2), inner[0] + 2 * radius, inner[1] + 2 * radius
    case = replace(case, batch=1, height=h, width=w, scale_factor=s, kernel_size=2 * radius + 1)
    features, *kernels, _ = drawn(operator, case, path)
    features = features[:, :, :1, :1].expand_as(features)
    output = called(operator, case, features, *kernels)
    inside = output[:, :, s * radius : s * (h - radius), s * radius : s * (w - radius)]
    assert inside.shape[2:] == (s * inner[0], s * inner[1])
    assert_same(inside, features[:, :, :1, :1].expand_as(inside))


@given(case=SOME, dtype=st.sampled_from(_verify.DTYPES))
def test_sampled_masks_sum_to_one(case, dtype, path):
    space, offsets, _ = drawn("expand_kernels", case, path, dtype)
    masks = called("expand_kernels", case, space, offsets)
    assert masks.min() >= 0
    sums = masks.double().unflatten(1, (case.groups, case.kernel_size**2)).sum(2)
    # Two roundings of numbers whose sum is one: of the normalised kernels and of the masks.
    assert (sums - 1).abs().max() <= 2 * _verify.SLACK[dtype] * torch.finfo(dtype).eps


@given(case=SOME)
def test_zero_offsets_repeat_the_normalised_kernels(case, path):
    features, space, offsets, _ = drawn("dlu_upsample", replace(case, reach=0.0), path)
    masks = repeated(normalized(space, case), case)
    assert_same(called("expand_kernels", case, space, offsets), masks)
    assert_same(called("dlu_upsample", case, features, space, offsets), called("carafe", case, features, masks))


@given(case=SOME)
def test_dlu_is_carafe_with_sampled_masks(case, path):
    features, space, offsets, _ = drawn("dlu_upsample", case, path)
    masks = called("expand_kernels", case, space, offsets)
    assert_same(called("dlu_upsample", case, features, space, offsets), called("carafe", case, features, masks))


@given(case=SOME)
def test_whole_offsets_shift_the_normalised_kernels(case, path):
    """Held to the border."""
    space, offsets, _ = drawn("expand_kernels", case, path)
    offsets = offsets.round()
    n, g, s = case.batch, case.groups, case.scale_factor
    dx, dy = shuffled(offsets, case).long().unflatten(1, (g, 2)).unbind(2)  # (N, G, s*H, s*W)
    x = (torch.arange(s * case.width, device=path) // s + dx).clamp(0, case.width - 1)
    y = (torch.arange(s * case.height, device=path)[:, None] // s + dy).clamp(0, case.height - 1)
    taps = normalized(space, case).unflatten(1, (g, -1)).permute(0, 1, 3, 4, 2)  # (N, G, H, W, k*k)
    image, group = torch.arange(n, device=path).view(n, 1, 1, 1), torch.arange(g, device=path).view(1, g, 1, 1)
    expected = taps[image, group, y, x].permute(0, 1, 4, 2, 3).flatten(1, 2)
    assert_same(called("expand_kernels", case, space, offsets), expected)


@FEATURE_OPERATORS
@given(case=SOME)
def test_linear_in_the_features(operator, case, path):
    features, *kernels, _ = drawn(operator, case, path)
    (others,) = more(features)
    both = called(operator, case, 2 * features - 3 * others, *kernels)
    first, second = (called(operator, case, each, *kernels) for each in (features, others))
    assert_same(both, 2 * first - 3 * second)


@given(case=SOME)
def test_carafe_is_linear_in_the_masks(case, path):
    features, masks, _ = drawn("carafe", case, path)
    (others,) = more(masks)
    both = called("carafe", case, features, 2 * masks - 3 * others)
    assert_same(both, 2 * called("carafe", case, features, masks) - 3 * called("carafe", case, features, others))


@EVERY_OPERATOR
@given(case=SOME, requested=st.booleans())
def test_gradients_are_linear_in_the_upstream_gradient(operator, case, requested, path):
    *tensors, upstream = drawn(operator, case, path)
    (other,) = more(upstream)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    output = called(operator, case, *tensors)
    with deterministic(warn_only=True) if requested else contextlib.nullcontext():
        found = [
            torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
            for grad_output in (upstream, other, 2 * upstream - 3 * other)
        ]
    for first, second, both in zip(*found, strict=True):
        assert_same(both, 2 * first - 3 * second)


@EVERY_OPERATOR
@given(case=cases(least_batch=2, modest=not LONG), order=st.permutations(range(3)), count=st.integers(1, 3))
def test_images_of_a_batch_do_not_meet(operator, case, order, count, path):
    """In any order, and some without the others; the output is then bitwise the same, whatever else there is to do."""
    arguments = _verify.inputs(operator, case, torch.float32, path)
    order = [image for image in order if image < case.batch][:count]
    call = _verify.function(operator, case, eager=False)
    found = _verify.results(call, arguments)
    some = _verify.results(call, {name: value[order] for name, value in arguments.items()})
    for name in found:
        bitwise = name == "output" and _launch.runs_kernels(arguments["grad_output"])
        tolerance = {"rtol": 0, "atol": 0} if bitwise else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(some[name], found[name][order], **tolerance)


@given(case=SOME)
def test_without_enlargement_dlu_is_carafe(case, path):
    case = replace(case, scale_factor=1, reach=0.0)
    features, space, offsets, _ = drawn("dlu_upsample", case, path)
    output = called("dlu_upsample", case, features, space, offsets)
    assert_same(output, called("carafe", case, features, normalized(space, case)))
    assert_same(output, called("carafe_upsample", case, features, space))


@given(case=SOME, dtype=st.sampled_from(_verify.DTYPES), data=st.data())
def test_one_tap_shifts_the_image(case, dtype, data, path):
    """Bitwise, with zeros beyond the image; but for the last bit that three products of TF32 have not."""
    k, r = case.kernel_size, case.kernel_size // 2
    u, v = data.draw(st.integers(0, k - 1)), data.draw(st.integers(0, k - 1))
    features, masks, _ = drawn("carafe", case, path, dtype)
    masks = torch.zeros_like(masks)
    masks.unflatten(1, (case.groups, k * k))[:, :, u * k + v] = 1
    shifted = F.pad(features, [r] * 4)[:, :, u : u + case.height, v : v + case.width]
    tolerance = 2**-22 if dtype == torch.float32 and path.type != "cpu" else 0
    output = called("carafe", case, features, masks)
    torch.testing.assert_close(output, repeated(shifted, case), rtol=tolerance, atol=0)


@given(case=SOME)
def test_carafe_upsample_is_carafe_with_shuffled_and_normalised_logits(case, path):
    features, logits, _ = drawn("carafe_upsample", case, path)
    masks = shuffled(normalized(logits, case), case)
    assert_same(called("carafe_upsample", case, features, logits), called("carafe", case, features, masks))


@pytest.mark.parametrize("operator", ("dlu_upsample", "carafe_upsample"))
@given(case=SOME, constant=st.sampled_from((-700.0, 1.0, 1e3)))
def test_a_constant_added_to_all_taps_changes_nothing(operator, case, constant, path):
    """And the gradient of the taps of a kernel sums to zero."""
    features, logits, *offsets, upstream = drawn(operator, case, path)
    arguments = dict(zip((*INPUTS[operator], "grad_output"), (features, logits, *offsets, upstream), strict=True))
    results = _verify.results(_verify.function(operator, case, eager=False), arguments)
    assert_same(called(operator, case, features, logits + constant, *offsets), results["output"])
    gradient = results[INPUTS[operator][1]].unflatten(1, (case.groups, case.kernel_size**2, -1)).sum(2)
    assert_same(gradient, torch.zeros_like(gradient))


@EVERY_OPERATOR
@given(case=SOME)
def test_groups_are_calls_of_their_own(operator, case, path):
    arguments = _verify.inputs(operator, case, torch.float64, path)
    found = _verify.results(_verify.function(operator, case, eager=False), arguments)
    call = _verify.function(operator, replace(case, groups=1), eager=False)
    parts = {name: value.chunk(case.groups, 1) for name, value in arguments.items()}
    each = [_verify.results(call, {name: part[g] for name, part in parts.items()}) for g in range(case.groups)]
    for name in found:
        assert_same(found[name], torch.cat([results[name] for results in each], 1))


@FEATURE_OPERATORS
@given(case=SOME, data=st.data())
def test_channels_of_a_group_do_not_meet(operator, case, data, path):
    features, *kernels, _ = drawn(operator, case, path)
    size = case.channels // case.groups
    order = torch.tensor(
        [g * size + c for g in range(case.groups) for c in data.draw(st.permutations(range(size)))], device=path
    )
    output = called(operator, case, features, *kernels)
    assert_same(called(operator, case, features[:, order], *kernels), output[:, order])


def turned(name, x, case):
    """An argument of an operator for the transposed image."""
    x = x.transpose(2, 3)
    g, k, s = case.groups, case.kernel_size, case.scale_factor
    if name == "offsets":  # dx becomes dy, and the place of an output beside its pixel is transposed, too
        return x.unflatten(1, (g, 2, s, s)).flip(2).transpose(3, 4).flatten(1, 4)
    if name in ("kernel_space", "masks"):
        return x.unflatten(1, (g, k, k)).transpose(2, 3).flatten(1, 3)
    if name == "logits":
        return x.unflatten(1, (g, k, k, s, s)).transpose(2, 3).transpose(4, 5).flatten(1, 5)
    return x


@EVERY_OPERATOR
@given(case=SOME)
def test_transposed_image_gives_transposed_results(operator, case, path):
    arguments = _verify.inputs(operator, case, torch.float64, path)
    output_name = "masks" if operator == "expand_kernels" else "features"
    names = {name: output_name if name in ("grad_output", "output") else name for name in (*arguments, "output")}
    found = _verify.results(_verify.function(operator, case, eager=False), arguments)
    other = replace(case, height=case.width, width=case.height)
    arguments = {name: turned(names[name], value, case) for name, value in arguments.items()}
    results = _verify.results(_verify.function(operator, other, eager=False), arguments)
    for name in found:
        assert_same(results[name], turned(names[name], found[name], case))


@EVERY_OPERATOR
@given(case=SOME)
def test_backward_is_the_adjoint_of_the_derivative(operator, case, path):
    """<J u, v> = <u, J^T v>; J is that of the eager twin."""
    arguments = _verify.inputs(operator, case, torch.float64, path)
    gradients = _verify.results(_verify.function(operator, case, eager=False), arguments)
    del gradients["output"]
    upstream = arguments.pop("grad_output")
    directions = more(*arguments.values())
    _, moved = torch.func.jvp(_verify.function(operator, case, eager=True), tuple(arguments.values()), directions)
    products = [(u * gradients[name]).sum() for name, u in zip(arguments, directions, strict=True)]
    assert_same(sum(products), (moved * upstream).sum())
