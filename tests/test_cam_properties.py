"""Class activation maps on random cases: against float64, and what holds whatever the values."""

from dataclasses import dataclass, replace

import pytest
import torch
from conftest import INTERPRETED
from hypothesis import assume, given
from hypothesis import strategies as st
from layouts import channel_slice, channels_last, cropped, expanded, scalar, sliced, tokens, transposed

import dlu_triton
from dlu_triton import _checks, _verify, reference
from dlu_triton._verify import CAMCase

NARROW = (torch.float32, torch.float16, torch.bfloat16)  # which go together; float64 goes alone
LAYOUTS = (torch.clone, channels_last, sliced, cropped, channel_slice, transposed, tokens)
if not INTERPRETED:  # which adds up one after the other, so that roundings of terms that are all alike do, too
    LAYOUTS += (expanded, scalar)
METHOD = st.sampled_from(_checks.CAM_METHODS)
WEIGHING = pytest.mark.parametrize("method", _checks.WEIGHING_METHODS)
EVERY_METHOD = pytest.mark.parametrize("method", _checks.CAM_METHODS)


@st.composite
def cases(draw, method=METHOD, batches=(1, 2, 3, 0)):
    """Planes that fit a program and planes that do not, of one row, one column and one pixel."""
    large = draw(st.sampled_from((False, False, False, True)))  # more than 4096 pixels
    long = draw(st.integers(70, 75) if large else st.integers(1, 40))
    short = draw(st.integers(60, 65) if large else st.integers(1, max(1, 200 // long)))
    h, w = draw(st.sampled_from(((short, long), (long, short))))
    return CAMCase(
        "",
        draw(method),
        batch=draw(st.sampled_from(batches)),
        channels=draw(st.integers(1, 5 if large else 90)),
        height=h,
        width=w,
        classes=draw(st.sampled_from((None, 1, 2, 3))),
        size=draw(st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40))),
        relu=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@dataclass(frozen=True)
class Trial:
    """A case, and how its arguments come."""

    case: CAMCase
    dtypes: tuple[torch.dtype, torch.dtype]
    layouts: tuple[object, object]
    normalize: bool
    eps: float
    wanted: tuple[bool, bool]
    signed: bool  # activations; those of methods that divide by their sums are positive, or any error is possible


@st.composite
def trials(draw, dtype):
    layout, flag = st.sampled_from(LAYOUTS), st.booleans()
    other = st.just(dtype) if dtype == torch.float64 else st.just(dtype) | st.sampled_from(NARROW)
    wanted = draw(st.sampled_from([(True, True), (True, False), (False, True), (False, False)]))
    eps = draw(st.sampled_from((1e-6, 0.0, 1e-2)))
    case = draw(cases())
    signed = case.method not in ("xgradcam", "gradcam++") and draw(flag)
    return Trial(case, (dtype, draw(other)), (draw(layout), draw(layout)), draw(flag), eps, wanted, signed)


def laid_out(x, layout):
    """(N, C, h, w) in a layout, or (N, K, C, h, w) with the classes first in memory and each of them in it."""
    if x.dim() == 4:
        return layout(x)
    return layout(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


def derivatives(call, tensors, wanted):
    """Results by name, and the gradients of the wanted inputs from random ones of the results."""
    tensors = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
    found = {name: value for name, value in call(*tensors).items() if value is not None}
    generator = torch.Generator().manual_seed(1)
    upstream = {name: torch.randn(v.shape, generator=generator, dtype=torch.float64) for name, v in found.items()}
    moving = [name for name, value in found.items() if value.requires_grad]
    if moving:
        asked = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = torch.autograd.grad(
            [found[name] for name in moving], asked, [upstream[name].to(found[name]) for name in moving]
        )
        names = [name for name, want in zip(("first", "second"), wanted, strict=True) if want]
        found |= dict(zip(names, gradients, strict=True))
    return {name: value.detach() for name, value in found.items()}


def assert_within_bounds(calls, tensors, wanted):
    """Kernels and twin, whose calls return results by name, held against the twin in float64."""
    kernels, twin = calls
    exact = [tensor.to(torch.float64, memory_format=torch.contiguous_format, copy=True) for tensor in tensors]
    truth, eager = (derivatives(twin, values, wanted) for values in (exact, tensors))
    found = derivatives(kernels, tensors, wanted)
    for name, comparison in _verify.comparisons(truth, eager, found).items():
        assert comparison.passed, f"{name}: {comparison}"


def determined(maps):
    """Whether they are: of a map that is constant, or nearly so, normalisation shows its roundings."""
    low, high = maps.flatten(-2).aminmax(dim=-1)
    return bool((high - low >= 1e-2 * maps.flatten(-2).abs().amax(-1)).all() and (high > low).all())


def smooth(raw, relu):
    """Whether normalisation is: of two extremes that are alike, roundings choose the one that has the derivative."""
    values = raw.flatten(-2).sort(-1).values
    apart = values.diff() > 1e-9 * (values[..., -1:] - values[..., :1])
    return bool(apart[..., -1:].all() and (apart[..., :1] | (relu and values[..., :1] < 0)).all())


@pytest.mark.parametrize("dtype", _verify.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@given(data=st.data())
def test_error_against_float64(dtype, data, device):
    """All parts, and their derivatives."""
    trial = data.draw(trials(dtype))
    case = trial.case
    arguments = _verify.inputs(_verify.CAM, case, torch.float64, device)
    if trial.signed:
        arguments["activations"] -= 0.5
    tensors = [
        laid_out(arguments[name].to(of), layout)
        for name, of, layout in zip(("activations", "gradients"), trial.dtypes, trial.layouts, strict=True)
    ]
    settings = {"method": case.method, "eps": trial.eps, "relu": case.relu, "size": case.size}
    if trial.normalize:
        parts = reference.class_activation_parts(*(x.double() for x in tensors), **settings)
        assume(determined(parts.map) and smooth(parts.raw, case.relu))
    calls = [
        lambda a, g, parts=library.class_activation_parts: parts(a, g, normalize=trial.normalize, **settings)._asdict()
        for library in (dlu_triton, reference)
    ]
    assert_within_bounds(calls, tensors, trial.wanted)


@pytest.mark.parametrize("dtype", _verify.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@given(data=st.data())
def test_error_of_given_weights_against_float64(dtype, data, device):
    trial = data.draw(trials(dtype))
    case = trial.case
    arguments = _verify.inputs(_verify.CAM, case, torch.float64, device)
    activations = laid_out(arguments["activations"].to(trial.dtypes[0]), trial.layouts[0])
    weights = laid_out(arguments["gradients"].to(trial.dtypes[1]), trial.layouts[1])[..., 0, 0]
    settings = {"relu": case.relu, "size": case.size}
    if trial.normalize:
        exact = activations.double(), weights.double()
        assume(determined(reference.weighted_activation_map(*exact, **settings)))
        assume(smooth(reference.weighted_activation_map(*exact, relu=False), case.relu))
    calls = [
        lambda a, w, cam=library.weighted_activation_map: {"map": cam(a, w, normalize=trial.normalize, **settings)}
        for library in (dlu_triton, reference)
    ]
    assert_within_bounds(calls, (activations, weights), trial.wanted)


# ---------------------------------------------------------------------------------------------------------------
# Properties, of kernels and eager twins, in float64
# ---------------------------------------------------------------------------------------------------------------


SOME = cases(batches=(1, 2, 3))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def drawn(case, path):
    arguments = _verify.inputs(_verify.CAM, case, torch.float64, path)
    return arguments["activations"], arguments["gradients"]


def parts_of(case, activations, gradients, **settings):
    settings = {"method": case.method, "relu": case.relu, "size": case.size, **settings}
    return dlu_triton.class_activation_parts(activations, gradients, **settings)


def assert_same_parts(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same(one, other)


@pytest.mark.parametrize("method", ("xgradcam", "gradcam", "hirescam"))
@given(case=SOME)
def test_raw_maps_are_linear_in_the_gradients(method, case, path):
    case = replace(case, method=method)
    a, g = drawn(case, path)
    _, other = drawn(replace(case, seed=case.seed + 1), path)
    first, second, both = (parts_of(case, a, each) for each in (g, other, 2 * g - 3 * other))
    assert_same(both.raw, 2 * first.raw - 3 * second.raw)
    assert_same(both.contributions, 2 * first.contributions - 3 * second.contributions)


@EVERY_METHOD
@given(case=SOME)
def test_contributions_sum_up_to_the_raw_map(method, case, path):
    parts = parts_of(replace(case, method=method), *drawn(case, path))
    assert_same(parts.contributions.sum(-1), parts.raw.sum((-2, -1)))


@given(case=SOME)
def test_xgrad_cam_and_hirescam_conserve_the_same_total(case, path):
    """sum(G * A), the score less its bias terms."""
    a, g = drawn(case, path)
    total = (g * (a if g.dim() == 4 else a.unsqueeze(1))).sum((-3, -2, -1))
    for method in ("xgradcam", "hirescam"):
        assert_same(parts_of(case, a, g, method=method, eps=0.0).contributions.sum(-1), total)


@given(case=SOME, factor=st.sampled_from((0.01, 3.0, 1e4)))
def test_a_scale_of_the_activations_leaves_the_weights_of_xgrad_cam(case, factor, path):
    a, g = drawn(case, path)
    weights, scaled = (parts_of(case, each, g, method="xgradcam", eps=0.0).weights for each in (a, factor * a))
    assert_same(scaled, weights)


@pytest.mark.parametrize("method", [name for name in _checks.CAM_METHODS if name != "gradcam++"])
@given(case=SOME, factor=st.sampled_from((2.0**-20, 8.0, 3.0)))
def test_a_scale_of_the_gradients_leaves_the_normalised_map(method, case, factor, path):
    case = replace(case, method=method)
    a, g = drawn(case, path)
    found, scaled = (parts_of(case, a, each, normalize=True) for each in (g, factor * g))
    assert_same(scaled.raw, factor * found.raw)
    assume(determined(parts_of(case, a, g).map))
    assert_same(scaled.map, found.map)


@given(case=SOME)
def test_normalised_maps_lie_between_zero_and_one(case, path):
    cam = parts_of(case, *drawn(case, path), normalize=True).map
    assert cam.min() >= 0
    assert cam.max() <= 1
    constant = cam.flatten(-2).amax(-1) == 0
    assert torch.equal(cam.flatten(-2).amax(-1)[~constant], torch.ones_like(cam.flatten(-2).amax(-1)[~constant]))
    assert not cam.flatten(-2).amin(-1).any()


@given(case=SOME, data=st.data())
def test_channels_come_in_any_order(case, data, path):
    a, g = drawn(case, path)
    order = torch.tensor(data.draw(st.permutations(range(case.channels))), device=path)
    found, permuted = parts_of(case, a, g), parts_of(case, a[:, order], g[..., order, :, :])
    weights = None if found.weights is None else found.weights[..., order]
    expected = found._replace(
        weights=weights, contributions=found.contributions[..., order], cancellation=found.cancellation[:, order]
    )
    assert_same_parts(permuted, expected)


@EVERY_METHOD
@given(case=SOME)
def test_classes_are_calls_of_their_own(method, case, path):
    case = replace(case, method=method, classes=case.classes or 2)
    a, g = drawn(case, path)
    found = parts_of(case, a, g)
    for k in range(case.classes):
        *per_map, cancellation = found
        expected = [None if part is None else part[:, k] for part in per_map]
        assert_same_parts(parts_of(case, a, g[:, k]), (*expected, cancellation))


@EVERY_METHOD
@given(case=cases(batches=(2, 3)), order=st.permutations(range(3)), count=st.integers(1, 3))
def test_images_of_a_batch_do_not_meet(method, case, order, count, path):
    case = replace(case, method=method)
    a, g = drawn(case, path)
    order = [image for image in order if image < case.batch][:count]
    expected = [None if part is None else part[order] for part in parts_of(case, a, g)]
    assert_same_parts(parts_of(case, a[order], g[order]), expected)


@EVERY_METHOD
@given(case=SOME, data=st.data())
def test_dead_channels_change_nothing(method, case, data, path):
    """And weigh nothing where the weights follow from their activations."""
    case = replace(case, method=method)
    a, g = drawn(case, path)
    alive = torch.tensor(data.draw(st.lists(st.booleans(), min_size=case.channels, max_size=case.channels)))
    a[:, ~alive] = 0
    parts = parts_of(case, a, g, eps=0.0)
    assert not parts.contributions[..., ~alive].any()
    assert parts.cancellation[:, ~alive].eq(1).all()
    if method == "xgradcam":
        assert not parts.weights[..., ~alive].any()
    if alive.any():
        assert_same(parts.raw, parts_of(case, a[:, alive], g[..., alive, :, :], eps=0.0).raw)


@given(case=SOME)
def test_maps_without_positive_values_are_zero(case, path):
    a, g = drawn(case, path)
    for normalize in (False, True):
        assert not parts_of(case, a, -g.abs(), relu=True, normalize=normalize).map.any()
        assert not parts_of(case, torch.zeros_like(a), g, normalize=normalize).map.any()


@WEIGHING
@given(case=SOME, eps=st.sampled_from((0.0, 1e-6)), normalize=st.booleans())
def test_returned_weights_make_the_map(method, case, eps, normalize, path):
    a, g = drawn(case, path)
    settings = {"relu": case.relu, "size": case.size, "normalize": normalize}
    cam, weights = dlu_triton.class_activation_map(a, g, method, eps, **settings, return_weights=True)
    assert torch.equal(dlu_triton.class_activation_map(a, g, method, eps, **settings), cam)
    parts = parts_of(replace(case, method=method), a, g, eps=eps, normalize=normalize)
    assert torch.equal(parts.map, cam)
    assert torch.equal(parts.weights, weights)
    if method == "xgradcam":
        for found, expected in zip(
            dlu_triton.xgrad_cam(a, g, eps, **settings, return_weights=True), (cam, weights), strict=True
        ):
            assert torch.equal(found, expected)
    assume(not normalize or determined(parts_of(replace(case, method=method), a, g, eps=eps).map))
    assert_same(dlu_triton.weighted_activation_map(a, weights, **settings), cam)


@given(case=SOME)
def test_transposed_planes_give_transposed_maps(case, path):
    a, g = drawn(case, path)
    found = parts_of(case, a, g)
    size = None if case.size is None else case.size[::-1]
    turned = parts_of(case, a.transpose(-2, -1), g.transpose(-2, -1), size=size)
    assert_same_parts(turned, found._replace(map=found.map.transpose(-2, -1), raw=found.raw.transpose(-2, -1)))
