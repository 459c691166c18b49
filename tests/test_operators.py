"""Operators against float64 over dtypes, layouts and sizes, with random upstream gradients."""

import ast
import inspect
import math
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from layouts import (
    aligned_channels,
    apart,
    channel_slice,
    channels_last,
    cropped,
    expanded,
    framed,
    scalar,
    sliced,
    transposed,
)
from selection import long
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import dlu_triton
from dlu_triton import _launch, _verify, reference
from dlu_triton._verify import Case
from dlu_triton.ops import _cam_kernels, _kernels, _reassembly
from dlu_triton.ops import carafe as carafe_ops
from dlu_triton.ops import dlu as dlu_ops

DTYPES = _verify.DTYPES
WITHOUT_FLOAT16 = (torch.float64, torch.float32, torch.bfloat16)
by_name = {
    "ids": lambda value: (
        getattr(value, "name", None) or getattr(value, "__name__", None) or str(value).removeprefix("torch.")
    )
}


def assert_within_bounds(operator, case, dtype, device):
    for name, found in _verify.compare(operator, case, dtype, device).items():
        assert found.passed, f"{name}: kernel {found.kernel:.2e}, eager {found.eager:.2e}, bound {found.bound:.2e}"


@pytest.mark.parametrize("dtype", (*WITHOUT_FLOAT16, *long(torch.float16)), **by_name)
@pytest.mark.parametrize("case", _verify.CASES, **by_name)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_error_against_float64(operator, case, dtype, device):
    if case.gpu_only and device.type == "cpu":
        pytest.skip("too large for a CPU")
    if not _verify.applies(case, operator, dtype):
        pytest.skip("not a mixture of types")
    assert_within_bounds(operator, case, dtype, device)


# Gradients sum over channels, over the scale_factor^2 outputs of a source pixel, and over the taps: here over many.
# With float32 kernels their gradients show the sums themselves, which the last rounding to half precision else hides.
LONG_SUMS = (
    Case("scale 16", channels=8, height=2, width=3, scale_factor=16, reach=0.7),
    Case("scale 16, float32 kernels", channels=8, height=2, width=3, scale_factor=16, kernel_dtype=torch.float32),
    Case("1024 channels", channels=1024, height=3, width=4),
    Case("1024 channels, float32 kernels", channels=1024, height=3, width=4, kernel_dtype=torch.float32),
    Case("1024 channels, kernel 9", channels=1024, height=2, width=3, kernel_size=9, groups=2, channels_last=True),
    Case("256 channels, scale 8", channels=256, height=2, width=2, scale_factor=8, kernel_size=3),
    Case("1024 channels of a map", batch=2, channels=1024, height=26, width=42, gpu_only=True),
    Case("scale 16 of a map", channels=64, height=25, width=42, scale_factor=16, gpu_only=True),
    Case("float32 kernels of a map", channels=1024, height=26, width=42, kernel_dtype=torch.float32, gpu_only=True),
)


@pytest.mark.parametrize("dtype", (torch.float16, *long(torch.bfloat16)), **by_name)
@pytest.mark.parametrize("case", LONG_SUMS, **by_name)
@pytest.mark.parametrize("operator", ("dlu_upsample", "carafe", "carafe_upsample"))
def test_long_sums_in_half_precision(operator, case, dtype, device):
    if case.gpu_only and device.type == "cpu":
        pytest.skip("too large for a CPU")
    assert_within_bounds(operator, case, dtype, device)


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
def test_gradients_of_features_are_rounded_once(last, device):
    """Sums of two thousand positive terms, in many parts."""
    case = Case("", channels=4, height=3, width=4, scale_factor=16, kernel_size=3, channels_last=last)
    arguments = _verify.inputs("carafe", case, torch.float16, device)
    arguments["masks"], arguments["grad_output"] = arguments["masks"].abs(), arguments["grad_output"].abs()
    exact = {name: value.double() for name, value in arguments.items()}
    truth = _verify.results(_verify.function("carafe", case, eager=True), exact)["features"]
    found = _verify.results(_verify.function("carafe", case, eager=False), arguments)["features"]
    assert ((found.double() - truth).abs() <= 0.51 * torch.finfo(torch.float16).eps * truth).all()


@pytest.mark.parametrize("kernel_size", (1, 3, 5, 7, 9))
@pytest.mark.parametrize("scale_factor", (1, 2, 3, 8, *long(5, 11)))
def test_every_kernel_size_at_many_scales(scale_factor, kernel_size, device):
    case = Case("", channels=2, height=3, width=4, scale_factor=scale_factor, kernel_size=kernel_size)
    assert_within_bounds("dlu_upsample", case, torch.float32, device)


@pytest.mark.parametrize("scale_factor", (1, 3, 5, 6, 7, 12, 16, *long(2, 4, 8, 9, 10, 11, 13, 14, 15)))
def test_every_scale(scale_factor, device):
    case = Case("", channels=1, height=2, width=3, scale_factor=scale_factor, kernel_size=3)
    assert_within_bounds("dlu_upsample", case, torch.float64, device)
    assert_within_bounds("carafe", case, torch.float64, device)


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (3, 1), (33, 1), (33, 3), (11, 11), (80, 5), (130, 1), (130, 2)]
)
def test_channels_that_fit_no_block(channels, groups, device):
    case = Case("", channels=channels, groups=groups, height=3, width=3, kernel_size=3)
    assert_within_bounds("dlu_upsample", case, torch.float32, device)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 1), (17, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, **by_name)
def test_degenerate_maps(dtype, size, device):
    case = Case("", channels=3, height=size[0], width=size[1], reach=0.5)
    for operator in _verify.OPERATORS:
        assert_within_bounds(operator, case, dtype, device)


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_channels_shared_between_programs(operator, device, monkeypatch):
    """Small maps split the channels of a tile over programs, large maps do not; both must be right."""
    case = Case("", channels=200, height=3, width=3, kernel_size=3)
    for enough in (1, 4, 10**6):  # of four blocks all, two, or one to a program
        monkeypatch.setattr(_launch, "ENOUGH_PROGRAMS", enough)
        _launch.forget_launches()
        assert_within_bounds(operator, case, torch.float32, device)
    _launch.forget_launches()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), **by_name)
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize(
    ("scale_factor", "width", "channels"),
    [(2, 20, 64), (2, 18, 66), (2, 19, 24), (4, 10, 40), (4, 9, 3), (8, 6, 64), (16, 3, 17), (3, 8, 80), (1, 40, 16)],
)
def test_forward_at_tiles_and_widths(scale_factor, width, channels, channels_last, dtype, device):
    """Rows that can be read in pairs and written 16 bytes at a time, those that cannot, and channels in runs."""
    case = Case(
        "", batch=2, channels=channels, height=3, width=width, scale_factor=scale_factor, channels_last=channels_last
    )
    arguments = _verify.inputs("dlu_upsample", case, dtype, device)
    del arguments["grad_output"]
    truth, eager = (
        reference.dlu_upsample(*tensors, scale_factor)
        for tensors in ([value.double() for value in arguments.values()], arguments.values())
    )
    output = dlu_triton.dlu_upsample(*arguments.values(), scale_factor)
    bound = 2 * (eager - truth).abs().max() + _verify.SLACK[dtype] * torch.finfo(dtype).eps * truth.abs().max()
    assert (output - truth).abs().max() <= bound
    assert output.stride() == eager.stride()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), **by_name)
def test_which_maps_are_read_in_pairs(dtype):
    """What no value shows: those of even width and strides, where columns are innermost."""

    def aligned(x):
        n, c, h, w = x.shape
        output = x.new_empty(n, c, 2 * h, 2 * w)
        launch = _reassembly._forward_launch((x, x.new_empty(n, 25, 2 * h, 2 * w), output), 5, 1, 2, False, "ieee")
        return launch.arguments[-1]

    def meta(h, w):
        return torch.empty(2, 3, h, w, dtype=dtype, device="meta")

    for size in ((104, 168), (26, 40), (3, 4)):
        assert aligned(meta(*size)) == 2
    for size in ((26, 42), (14, 14), (3, 2)):  # rows of 8 bytes in half precision
        assert aligned(meta(*size)) == (1 if dtype == torch.bfloat16 else 2)
    for x in (meta(100, 167), meta(13, 21), meta(8, 8).contiguous(memory_format=torch.channels_last)):
        assert aligned(x) == 0
    assert aligned(meta(8, 10)[..., :8]) == 2
    assert aligned(meta(8, 11)[..., :8]) == 0
    assert aligned(meta(8, 12)[..., :7]) == 0


# ---------------------------------------------------------------------------------------------------------------
# Memory layouts
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", (sliced, channels_last, expanded, *long(cropped, channel_slice, transposed, scalar)), **by_name
)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_layout_changes_no_value(operator, layout, device):
    """Each argument in turn, the upstream gradient included, and all of them."""
    case = Case("", batch=2, channels=6, height=3, width=4, groups=2)
    call = _verify.function(operator, case, eager=False)
    reference_call = _verify.function(operator, case, eager=True)
    arguments = _verify.inputs(operator, case, torch.float32, device)
    for changed in [*([name] for name in arguments), list(arguments)]:
        views = {name: layout(value) if name in changed else value for name, value in arguments.items()}
        plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in views.items()}
        expected, found = _verify.results(reference_call, plain), _verify.results(call, views)
        for name in expected:
            close = torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
            assert close, f"{name} is wrong with {changed} {layout.__name__}"


@pytest.mark.parametrize("layout", (framed, apart), ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("operator", ("carafe", "dlu_upsample"))
def test_runs_of_views(operator, layout, device):
    """Odd widths in rows of even strides, images an odd number of elements apart: runs along them end in between."""
    case = Case("", batch=2, channels=8, height=3, width=7, kernel_size=3)
    arguments = _verify.inputs(operator, case, torch.float32, device)
    expected = _verify.results(_verify.function(operator, case, eager=True), arguments)
    views = {name: layout(value) for name, value in arguments.items()}
    found = _verify.results(_verify.function(operator, case, eager=False), views)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(7, 1), (6, 2)])
def test_runs_of_odd_numbers_of_channels(channels, groups, device):
    """Aligned pixels, whose channels fill no run, or of whose second group they begin in one."""
    case = Case("", channels=channels, groups=groups, height=3, width=4, kernel_size=3)
    arguments = _verify.inputs("carafe", case, torch.float32, device)
    expected = _verify.results(_verify.function("carafe", case, eager=True), arguments)
    views = {name: aligned_channels(value) for name, value in arguments.items()}
    found = _verify.results(_verify.function("carafe", case, eager=False), views)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ("carafe", *long("dlu_upsample", "carafe_upsample", "expand_kernels")))
def test_views_of_one_shape_that_begin_elsewhere(operator, device):
    """A launch is repeated for tensors that are as aligned, for no others."""
    case = Case("", channels=8, height=3, width=8, kernel_size=3, channels_last=True)
    arguments = _verify.inputs(operator, case, torch.float32, device)
    call = _verify.function(operator, case, eager=False)
    expected = _verify.results(call, arguments)
    for start in (0, 1):
        views = {name: beginning_at(start, value) for name, value in arguments.items()}
        torch.testing.assert_close(_verify.results(call, views), expected)


def beginning_at(start, x):
    """In a storage of its own, so many elements after its beginning."""
    return x.new_empty(x.numel() + start).as_strided(x.shape, x.stride(), start).copy_(x)


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), **by_name)
def test_output_keeps_the_memory_format(layout, device):
    case = Case("", batch=2, channels=6, height=3, width=4)
    for operator in _verify.OPERATORS:
        arguments = _verify.inputs(operator, case, torch.float32, device)
        arguments = {name: value.contiguous(memory_format=layout) for name, value in arguments.items()}
        for name, value in _verify.results(_verify.function(operator, case, eager=False), arguments).items():
            assert value.is_contiguous(memory_format=layout), f"{operator} {name}"


def beside_others(output):
    return torch.cat([output.new_ones(output.shape), output, output.detach()], 1)


def beside_in_width(output):
    return torch.cat([output.detach(), output], 3)


def turned(output):
    return output.transpose(2, 3)


def summed(output):
    return output.sum()


def summed_over_the_map(output):
    return output.sum((2, 3))


def cropped_and_flipped(output):
    return output[:, :, 1:-1, 2:].flip(3)


def in_channels_last(output):
    return output.permute(0, 2, 3, 1)


def one_of_several(output):
    return torch.stack([output.detach(), output], 4)


# What comes after an operator, and whether the gradient that it sends back is contiguous.
CONSUMERS = {
    beside_others: False,
    beside_in_width: False,
    turned: False,
    summed: False,
    summed_over_the_map: False,
    cropped_and_flipped: True,  # zeros around it
    in_channels_last: False,
    one_of_several: False,
}


@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda consumer: consumer.__name__)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_gradient_as_autograd_sends_it(operator, consumer, device):
    case = Case("", batch=2, channels=6, height=3, width=4, kernel_size=3, groups=2)
    arguments = _verify.inputs(operator, case, torch.float64, device)
    del arguments["grad_output"]
    found = []
    for eager in (True, False):
        tensors = [value.detach().requires_grad_() for value in arguments.values()]
        output = _verify.function(operator, case, eager=eager)(*tensors)
        sent = []
        output.register_hook(lambda gradient, sent=sent: sent.append(gradient))
        after = consumer(output)
        weights = torch.randn(after.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (after if consumer == summed else (after * weights.to(device)).sum()).backward()
        found.append([tensor.grad for tensor in tensors])
    assert sent[0].is_contiguous() == CONSUMERS[consumer]
    torch.testing.assert_close(found[1], found[0])


# ---------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", (True, False), ids=("reference", "kernels"))
@pytest.mark.parametrize("operator", _verify.OPERATORS)
@pytest.mark.parametrize(
    "case",
    [
        Case("", channels=2, height=2, width=3, kernel_size=3, reach=0.6),
        Case("", channels=2, height=3, width=2, scale_factor=1, kernel_size=1, groups=2),
        Case("", channels=1, height=1, width=2, scale_factor=3, kernel_size=5),
    ],
    ids=("k3", "groups", "row"),
)
def test_gradcheck(operator, case, eager, device):
    arguments = _verify.inputs(operator, case, torch.float64, device)
    del arguments["grad_output"]
    tensors = [value.requires_grad_() for value in arguments.values()]
    # Atomic additions may come in another order each time. The kernels, slow when interpreted and held against the
    # reference everywhere else, take the fast mode: random projections of the Jacobian instead of all of it.
    torch.autograd.gradcheck(
        _verify.function(operator, case, eager=eager), tensors, nondet_tol=1e-12, fast_mode=not eager
    )


@pytest.mark.parametrize("at_a_time", (1, 132))
@pytest.mark.parametrize(
    "case",
    [
        Case("k5", channels=3, height=14, width=28),
        Case("k3, channels_last", channels=5, height=13, width=19, kernel_size=3, channels_last=True),
    ],
    **by_name,
)
def test_features_gradient_of_wide_maps(case, at_a_time, device, monkeypatch):
    """With strips of several steps, and steps whose outputs are all inside the map, which take no masks."""
    monkeypatch.setattr(_launch, "PROGRAMS_AT_A_TIME", at_a_time)
    _launch.strip_steps.cache_clear()
    _launch.forget_launches()
    arguments = _verify.inputs("carafe", case, torch.float32, device)
    features, masks, grad_output = arguments.values()
    found = torch.full_like(features, float("nan"))
    _reassembly.backward_features(grad_output, found, masks, None, case.kernel_size, 1, 2)
    _launch.strip_steps.cache_clear()
    _launch.forget_launches()
    features.requires_grad_()
    output = reference.carafe(features, masks, case.kernel_size, 1, 2)
    (expected,) = torch.autograd.grad(output, features, grad_output)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_samples_around_the_window_of_cells(device):
    """Those near a tile are summed by a product, those beyond one by one; none is lost in between."""
    case = Case("", height=8, width=12, kernel_size=3, reach=3.0)
    assert_within_bounds("expand_kernels", case, torch.float32, device)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched from here on."""
    names = []
    launcher, method = (interpreter.GridExecutor, "__call__") if _launch.INTERPRETED else (triton.JITFunction, "run")
    launch = getattr(launcher, method)

    def record(self, *args, **kwargs):
        names.append((self.fn if _launch.INTERPRETED else self).__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(launcher, method, record)
    monkeypatch.setattr(_launch, "_repeats", _Forgetful())  # whose launches would not come by here
    return names


class _Forgetful(dict):
    def __setitem__(self, key, value):
        pass


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_only_wanted_gradients(operator, device, launched, monkeypatch):
    """Every combination of inputs that require a gradient gives float64's values, and others cost nothing."""
    case = Case("", channels=4, height=3, width=4, kernel_size=3, groups=2)
    call = _verify.function(operator, case, eager=False)
    arguments = _verify.inputs(operator, case, torch.float64, device)
    expected = _verify.results(_verify.function(operator, case, eager=True), arguments)
    grad_output = arguments.pop("grad_output")
    launches, allocated = {}, []
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, make=make, **kwargs: (allocated.append(make(*args, **kwargs)), allocated[-1])[1]
        )
    for wanted in product((True, False), repeat=len(arguments)):
        if not any(wanted):
            continue
        tensors = [value.detach().requires_grad_(want) for value, want in zip(arguments.values(), wanted, strict=True)]
        output = call(*tensors)
        launched.clear()
        allocated.clear()
        output.backward(grad_output)
        launches[wanted] = list(launched)
        for name, tensor, want in zip(arguments, tensors, wanted, strict=True):
            assert (tensor.grad is not None) == want
            assert any(new.shape == tensor.shape for new in allocated) == want, f"{name}, {wanted}"
            if want:
                torch.testing.assert_close(tensor.grad, expected[name])
    # Features and kernels have launches of their own; so has the softmax of a kernel space, and offsets have none.
    every = launches[(True,) * len(arguments)]
    for wanted, found in launches.items():
        assert set(found) <= set(every)
        asked = {name for name, want in zip(arguments, wanted, strict=True) if want}
        if {"features", "kernel_space"} & (arguments.keys() - asked) or asked == {"features"}:
            assert len(found) < len(every), f"{asked} launch {found}"


# ---------------------------------------------------------------------------------------------------------------
# Edges
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
def test_empty_batch(library, device):
    def empty(*shape):
        return torch.ones(0, *shape, device=device, requires_grad=True)

    features, space, offsets, masks = empty(4, 3, 5), empty(18, 3, 5), empty(16, 3, 5), empty(18, 6, 10)
    logits = empty(72, 3, 5)
    outputs = (
        library.dlu_upsample(features, space, offsets, 2, 3, 2),
        library.carafe(features, masks, 3, 2, 2),
        library.carafe_upsample(features, logits, 2, 3, 2),
        library.expand_kernels(space, offsets, 2, 3, 2),
    )
    assert [tuple(output.shape) for output in outputs] == [*[(0, 4, 6, 10)] * 3, (0, 18, 6, 10)]
    sum(output.sum() for output in outputs).backward()
    for tensor in (features, space, offsets, masks, logits):
        assert tensor.grad.shape == tensor.shape


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
def test_sizes_beside_those_that_are_allowed(library, device):
    """Every dimension but the batch that is empty, and the smallest even kernel."""
    masks = torch.zeros(1, 9, 2, 2, device=device)
    for shape in ((1, 0, 2, 2), (1, 2, 0, 2), (1, 2, 2, 0)):
        with pytest.raises(ValueError, match="features must have no empty dimension but the batch, got shape"):
            library.carafe(torch.zeros(shape, device=device), masks, 3, 1, 1)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 2"):
        library.carafe(torch.zeros(1, 2, 2, 2, device=device), masks[:, :4], 2, 1, 1)


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf"), 1e30, -1e30))
def test_hostile_offset(value, library, device):
    """Infinite and huge offsets hold to the border; NaN makes its own output pixel NaN and no other."""
    case = Case("", channels=3, height=4, width=5, kernel_size=3)
    arguments = _verify.inputs("dlu_upsample", case, torch.float32, device)
    del arguments["grad_output"]
    arguments["offsets"][0, 0, 1, 2] = value  # dx of output pixel (2, 4)
    offsets = arguments["offsets"].requires_grad_()
    output = library.dlu_upsample(*arguments.values(), 2, 3)
    held = arguments["offsets"].detach().nan_to_num(0, 99, -99).clamp(-99, 99)
    expected = reference.dlu_upsample(arguments["features"], arguments["kernel_space"], held, 2, 3)
    if value != value:
        expected[0, :, 2, 4] = float("nan")
    torch.testing.assert_close(output, expected, equal_nan=True)
    (grad_offsets,) = torch.autograd.grad(output, offsets, torch.randn_like(output))
    assert grad_offsets[0, 0, 1, 2] == 0


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
def test_nan_offset_reaches_only_the_features_it_weighs(library, device):
    """The 3 x 3 pixels around that of the output, not the whole tile."""
    case = Case("", channels=3, height=6, width=8, kernel_size=3)
    arguments = _verify.inputs("dlu_upsample", case, torch.float32, device)
    grad_output = arguments.pop("grad_output")
    arguments["offsets"][0, 0, 2, 4] = float("nan")  # dx of output pixel (4, 8)
    features = arguments["features"].requires_grad_()
    (gradient,) = torch.autograd.grad(library.dlu_upsample(*arguments.values(), 2, 3), features, grad_output)
    expected = torch.zeros(1, 3, 6, 8, dtype=torch.bool, device=device)
    expected[:, :, 1:4, 3:6] = True
    assert torch.equal(gradient.isnan(), expected)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", ("offsets", "grad_output"))
def test_what_is_not_finite_reaches_only_what_it_weighs(name, value, device):
    """In the gradients of expand_kernels: its own sample, as in the reference, not the cells around the tile."""
    case = Case("", height=4, width=5, kernel_size=3, reach=0.4)
    arguments = _verify.inputs("expand_kernels", case, torch.float32, device)
    arguments[name][0, 3, 1, 2] = value
    expected, found = (
        _verify.results(_verify.function("expand_kernels", case, eager=eager), arguments) for eager in (True, False)
    )
    assert not all(gradient.isfinite().all() for gradient in expected.values()) or (name, value) == ("offsets", value)
    for each in ("kernel_space", "offsets"):
        assert torch.equal(found[each].isfinite(), expected[each].isfinite()), each
        torch.testing.assert_close(found[each].nan_to_num(0, 0, 0), expected[each].nan_to_num(0, 0, 0))


@pytest.mark.parametrize("shift", (-1000.0, 1000.0))
@pytest.mark.parametrize("operator", ("dlu_upsample", "expand_kernels", "carafe_upsample"))
def test_softmax_of_large_logits(operator, shift, device):
    """Far past what `exp` can take, on either side."""
    case = Case("", channels=2, height=2, width=3, kernel_size=3)
    arguments = _verify.inputs(operator, case, torch.float64, device)
    name = "logits" if operator == "carafe_upsample" else "kernel_space"
    expected = _verify.results(_verify.function(operator, case, eager=True), arguments)
    found = _verify.results(_verify.function(operator, case, eager=False), arguments | {name: arguments[name] + shift})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
def test_nan_kernel_that_nothing_samples_reaches_nothing(library, device):
    """Outputs beyond the border of the map, which tiles hang over, do not sample it either."""
    case = Case("", channels=3, height=4, width=5, kernel_size=3)
    arguments = _verify.inputs("dlu_upsample", case, torch.float32, device)
    grad_output = arguments.pop("grad_output")
    arguments["kernel_space"][:, :, 0, 0] = float("nan")
    arguments["offsets"] = torch.full_like(arguments["offsets"], 2.5)
    features = arguments["features"].requires_grad_()
    (gradient,) = torch.autograd.grad(library.dlu_upsample(*arguments.values(), 2, 3), features, grad_output)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
def test_far_coordinates_keep_their_fraction_in_half_precision(library, device):
    """In bfloat16 a coordinate near 336 would be off by more than a pixel."""
    width = 340
    space = torch.randn(1, 1 * 9, 1, width, dtype=torch.float32).bfloat16().to(device)
    offsets = torch.full((1, 2, 1, width), 0.375, dtype=torch.bfloat16, device=device)
    masks = library.expand_kernels(space, offsets, 1, 3).double()
    exact = reference.expand_kernels(space.double(), offsets.double(), 1, 3)
    torch.testing.assert_close(masks, exact, atol=4e-3, rtol=0)


def test_float16_sums_beyond_its_range(device):
    """Sums run in float32: 80000 and -80000 cancel although neither fits float16."""
    features = torch.full((1, 1, 3, 3), 20000.0, dtype=torch.float16, device=device)
    masks = torch.tensor([1.0, 1, 1, 1, 0, -1, -1, -1, -1], dtype=torch.float16, device=device)
    masks = masks[None, :, None, None].expand(1, 9, 3, 3)
    for library in (reference, dlu_triton):
        assert library.carafe(features, masks, 3, 1, 1)[0, 0, 1, 1].item() == 0


@pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
def test_gradients_of_float16_beyond_its_range(library, device):
    """What outputs above send to a pixel, those below take back, and so do the first channels and the last."""
    features = torch.full((1, 128, 2, 3), 200.0, dtype=torch.float16, device=device)
    features[:, 64:] *= -1
    masks = torch.ones(1, 9, 4, 6, dtype=torch.float16, device=device)
    grad_output = torch.full((1, 128, 4, 6), 20000.0, dtype=torch.float16, device=device)
    grad_output[:, :, 2:] *= -1
    tensors = (features.requires_grad_(), masks.requires_grad_())
    gradients = torch.autograd.grad(library.carafe(*tensors, 3, 1, 2), tensors, grad_output)
    assert [gradient.abs().max().item() for gradient in gradients] == [0, 0]


def test_sampled_bfloat16_kernels_are_rounded_once(device):
    """The normalised kernel space is kept finer than the kernels sampled from it."""
    case = Case("", height=6, width=8, kernel_size=3)
    space, offsets, _ = _verify.inputs("expand_kernels", case, torch.bfloat16, device).values()
    exact = reference.expand_kernels(space.double(), offsets.double(), 2, 3)
    masks = dlu_triton.expand_kernels(space, offsets, 2, 3).double()
    steps = (masks - exact).abs() / (exact.log2().floor() - 7).exp2()  # between numbers of eight bits
    rounding = 1.0 if _launch.INTERPRETED else 0.5  # the interpreter truncates
    assert steps[exact > 2**-8].max() <= rounding + 0.2


@pytest.mark.parametrize(
    ("offset_dtype", "error"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-5)], **by_name
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], **by_name)
@pytest.mark.parametrize("operator", ["dlu_upsample", "expand_kernels"])
def test_gradients_of_offsets_between_similar_kernels(operator, dtype, offset_dtype, error, device):
    """They are differences of normalised kernels, which backward passes therefore do not round."""
    logit = 2.0**-6  # of the tap in the middle, on the right
    space = torch.zeros(1, 9, 1, 2, dtype=dtype, device=device)
    space[:, 4, :, 1] = logit
    offsets = torch.zeros(1, 2, 1, 2, dtype=offset_dtype, device=device)
    offsets[0, 0, 0, 0] = 0.25
    features = torch.tensor([1.0, 0.0], dtype=dtype, device=device).reshape(1, 1, 1, 2)
    offsets.requires_grad_()
    if operator == "dlu_upsample":
        result = dlu_triton.dlu_upsample(features, space, offsets, 1, 3)
    else:
        result = dlu_triton.expand_kernels(space, offsets, 1, 3)[:, 4:5]
    (gradient,) = torch.autograd.grad(result, offsets, features)
    expected = math.exp(logit) / (8 + math.exp(logit)) - 1 / 9
    assert gradient[0, 0, 0, 0].item() == pytest.approx(expected, rel=error)
    assert gradient.count_nonzero() == 1


# ---------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------


def memory_of(*tensors):
    """All bytes of their storages, since NaN differs from itself."""
    sizes = (x.untyped_storage().nbytes() // x.element_size() for x in tensors)
    return torch.cat([x.as_strided((n,), (1,), 0).view(torch.uint8) for n, x in zip(sizes, tensors, strict=True)])


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (Case("groups", channels=9, height=3, width=5, kernel_size=3, groups=3), sliced),
        (Case("pairs", channels=18, height=3, width=10), framed),
        (Case("channels_last", batch=2, channels=24, height=3, width=6, channels_last=True), channels_last),
    ],
    ids=("groups", "pairs", "channels_last"),
)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_nothing_outside_is_touched(operator, case, layout, device, checked_addresses, guarded_allocations):
    """Every address of every load, store and addition is that of an element, also where its value would be dropped. On
    a GPU, which shows no addresses, nothing beside results and arguments changes."""
    arguments = {name: layout(x) for name, x in _verify.inputs(operator, case, torch.float32, device).items()}
    before = memory_of(*arguments.values())
    _verify.results(_verify.function(operator, case, eager=False), arguments)
    assert torch.equal(memory_of(*arguments.values()), before)
    assert checked_addresses != set()  # what was stored to; None on a GPU


@pytest.mark.parametrize("module", (_kernels, _cam_kernels), ids=("upsamplers", "maps"))
def test_masked_loads_say_what_is_there_instead(module):
    """The interpreter takes zero; a GPU what happens to be in the register."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
    loads = [{each.arg for each in call.keywords} for call in calls if ast.unparse(call.func) == "tl.load"]
    masked = [names for names in loads if "mask" in names]
    assert len(masked) >= 4
    assert all("other" in names for names in masked)


@pytest.mark.parametrize("operator", ["dlu_upsample", "carafe", "carafe_upsample"])
def test_fused_forward_allocates_neither_masks_nor_grid(operator, device, monkeypatch):
    """Only the output and, for DLU, the normalised kernel space at low resolution."""
    case = Case("", channels=8, height=4, width=4, scale_factor=3)
    arguments = _verify.inputs(operator, case, torch.float32, device)
    del arguments["grad_output"]
    allocated = []
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, make=make, **kwargs: (allocated.append(make(*args, **kwargs)), allocated[-1])[1]
        )
    _verify.function(operator, case, eager=False)(*arguments.values())
    space = [1, 1, 4, 4, 32]  # 25 taps, padded
    expected = [space, [1, 8, 12, 12]] if operator == "dlu_upsample" else [[1, 8, 12, 12]]
    assert [list(tensor.shape) for tensor in allocated] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_backward_allocates_only_the_normalised_kernels(dtype, channels_last, device, monkeypatch):
    """Beside the gradients: sums of the kernels' gradients lie where the features' gradient is written last."""
    case = Case("", channels=64, height=4, width=4, kernel_size=5, channels_last=channels_last)
    arguments = _verify.inputs("dlu_upsample", case, dtype, device)
    grad_output = arguments.pop("grad_output")
    allocated = []
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, make=make, **kwargs: (allocated.append(make(*args, **kwargs)), allocated[-1])[1]
        )
    gradients = dlu_ops.dlu_upsample_op.gradients(grad_output, *arguments.values(), 2, 5, 1, None, True, True, True)
    returned = {gradient.data_ptr() for gradient in gradients}
    extra = [tensor for tensor in allocated if tensor.data_ptr() not in returned]
    assert [(list(tensor.shape), tensor.dtype) for tensor in extra] == [([1, 1, 4, 4, 32], torch.float32)]


def test_reference_never_builds_the_unfolded_tensor():
    """Every tensor it makes is about as large as the output or the masks; unfolding takes 25 times as much."""
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = result if isinstance(result, tuple | list) else [result]
            sizes.extend(x.untyped_storage().nbytes() // 4 for x in tensors if isinstance(x, torch.Tensor))
            return result

    features = torch.randn(1, 64, 20, 20, requires_grad=True)
    space, offsets = torch.randn(1, 25, 20, 20, requires_grad=True), torch.randn(1, 8, 20, 20, requires_grad=True)
    with Record():
        output = reference.dlu_upsample(features, space, offsets, 2)
        output.backward(torch.randn_like(output))
    assert output.numel() <= max(sizes) <= 1.5 * output.numel()  # the padding, upsampled with the features


# ---------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), **by_name)
def test_opcheck(layout, device):
    """Schema, autograd registration, fake kernels and AOT dispatch of the registered operators."""
    case = Case("", channels=4, height=2, width=3, kernel_size=3, groups=2)
    tensors = _verify.inputs("dlu_upsample", case, torch.float32, device)
    tensors = {name: value.contiguous(memory_format=layout) for name, value in tensors.items()}
    masks = _verify.inputs("carafe", case, torch.float32, device)["masks"].contiguous(memory_format=layout)
    logits = _verify.inputs("carafe_upsample", case, torch.float32, device)["logits"].contiguous(memory_format=layout)
    grad_output = tensors.pop("grad_output")
    features, space, offsets = (value.requires_grad_() for value in tensors.values())
    torch.library.opcheck(dlu_ops.dlu_upsample_op.op, (features, space, offsets, 2, 3, 2, None))
    torch.library.opcheck(dlu_ops.expand_kernels_op.op, (space, offsets, 2, 3, 2, None))
    torch.library.opcheck(carafe_ops.carafe_op.op, (features, masks.requires_grad_(), 3, 2, 2, None))
    torch.library.opcheck(carafe_ops.carafe_upsample_op.op, (features, logits.requires_grad_(), 2, 3, 2, None))
    tensors = (features, space, offsets, masks, logits)
    features, space, offsets, masks, logits = (tensor.detach() for tensor in tensors)
    torch.library.opcheck(
        dlu_ops.dlu_upsample_op.gradients.op, (grad_output, features, space, offsets, 2, 3, 2, None, True, True, True)
    )
    torch.library.opcheck(dlu_ops.expand_kernels_op.gradients.op, (masks, space, offsets, 2, 3, 2, None, False, True))
    torch.library.opcheck(carafe_ops.carafe_op.gradients.op, (grad_output, features, masks, 3, 2, 2, None, True, True))
    torch.library.opcheck(
        carafe_ops.carafe_upsample_op.gradients.op, (grad_output, features, logits, 2, 3, 2, None, True, True)
    )


def test_meta_tensors_give_the_shape():
    features = torch.zeros(2, 6, 4, 5, device="meta")
    space, offsets = torch.zeros(2, 25, 4, 5, device="meta"), torch.zeros(2, 18, 4, 5, device="meta")
    output = dlu_triton.dlu_upsample(features, space, offsets, 3)
    assert output.shape == (2, 6, 12, 15)
    assert output.is_meta


# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------


def test_tf32_only_where_the_user_allows_it(monkeypatch):
    """Float32 is three TF32 products, or one where torch's own products may be; the setting is read at each call."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        found = []
        for setting in ("ieee", "tf32", "ieee"):
            matmul.fp32_precision = setting
            found.append([_launch.precision(dtype) for dtype in DTYPES])
            assert _launch.sum_precision(torch.float32) == "tf32x3"
    finally:
        matmul.fp32_precision = before
    others = dict.fromkeys(DTYPES, "ieee")
    for precisions, expected in zip(found, ("tf32x3", "tf32", "tf32x3"), strict=True):
        assert dict(zip(DTYPES, precisions, strict=True)) == {**others, torch.float32: expected}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _launch.precision(torch.float32) == "ieee"


@pytest.mark.parametrize("repeats", (False, True), ids=("", "deterministic"))
@pytest.mark.parametrize(
    ("operator", "name"),
    [("carafe", "features"), ("carafe", "masks"), ("carafe_upsample", "grad_output"), ("dlu_upsample", "features"),
     ("dlu_upsample", "grad_output"), ("expand_kernels", "grad_output")],
)  # fmt: skip
def test_float32_of_small_magnitude(operator, name, repeats, device):
    """As exact as others down to what docs/promises.md says; below, TF32 does not hold the low parts."""
    for seed in range(3):
        case = Case("", channels=16, height=4, width=4, kernel_size=3, seed=seed)
        arguments = _verify.inputs(operator, case, torch.float32, device)
        arguments[name] *= 2.0**-112 / arguments[name].abs().max()
        exact = {each: value.double() for each, value in arguments.items()}
        eager, kernels = (_verify.function(operator, case, eager=eager) for eager in (True, False))
        truth, twin = _verify.results(eager, exact), _verify.results(eager, arguments)
        torch.use_deterministic_algorithms(repeats)
        try:
            found = _verify.results(kernels, arguments)
        finally:
            torch.use_deterministic_algorithms(False)
        for result, comparison in _verify.comparisons(truth, twin, found).items():
            assert comparison.passed, f"{result}: {comparison}"


@triton.jit
def split(x_ptr, parts_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    high, low = _kernels._tf32_parts(tl.load(x_ptr + index))
    tl.store(parts_ptr + index, high)
    tl.store(parts_ptr + BLOCK + index, low)


def test_tf32_parts(device):
    """Nothing is lost, and rounding is to the nearest, so that what the product of two small parts drops is small."""
    x, parts = torch.randn(2**14, device=device), torch.empty(2, 2**14, device=device)
    split[(1,)](x, parts, BLOCK=2**14)
    high, low = parts
    assert not (high.view(torch.int32) & 0x1FFF).any()  # ten bits of mantissa
    assert torch.equal(high + low, x)
    assert (low.abs() <= 2**-11 * x.abs().log2().floor().exp2()).all()
