"""Gradients that are bitwise the same in every run: always for CARAFE, for DLU where PyTorch is asked for it.

In the interpreter programs run one after the other; there each run takes them in another order, and so does each
emulated launch, which also adds to one place in any order.
"""

import contextlib
import math
import random

import pytest
import torch
from conftest import EMULATED, INTERPRETED, ON_CPU
from selection import long

import dlu_triton
from dlu_triton import _verify, reference
from dlu_triton._verify import Case

RUNS = 10
CASE = Case("", channels=4, height=6, width=6, kernel_size=3, reach=2.0)


@contextlib.contextmanager
def deterministic(wanted=True, *, warn_only=False):
    torch.use_deterministic_algorithms(wanted, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def reordered(monkeypatch):
    """Every launch runs its programs in an order of its own, as a GPU may."""
    if EMULATED:
        import emulator

        monkeypatch.setattr(emulator.state.options, "shuffle", 0)
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    start, number = builder.set_grid_dim, builder.set_grid_idx
    generator, order = random.Random(0), []

    def set_grid_dim(x, *others):
        order[:] = generator.sample(range(x), x)
        start(x, *others)

    monkeypatch.setattr(builder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, *others: number(order[x], *others))


def arguments_of(operator, dtype, device, case=CASE):
    arguments = _verify.inputs(operator, case, dtype, device)
    # Values of many magnitudes, so that a sum in another order is another number.
    scales = torch.logspace(-3, 3, arguments["grad_output"].numel(), device=device)
    generator = torch.Generator().manual_seed(1)
    scales = scales[torch.randperm(scales.numel(), generator=generator).to(device)]
    arguments["grad_output"] = arguments["grad_output"] * scales.view(arguments["grad_output"].shape).to(dtype)
    return arguments


def gradients(operator, arguments, case=CASE, eager=False):
    return _verify.results(_verify.function(operator, case, eager=eager), arguments)


def same_in_all_runs(operator, arguments, case=CASE):
    first = gradients(operator, arguments, case)
    return all(
        torch.equal(one, other)
        for _ in range(RUNS - 1)
        for one, other in zip(first.values(), gradients(operator, arguments, case).values(), strict=True)
    )


@pytest.mark.parametrize("operator", ["carafe", "carafe_upsample"])
def test_carafe_always_repeats_itself(operator, device, reordered):
    assert same_in_all_runs(operator, arguments_of(operator, torch.float32, device))


@pytest.mark.parametrize("operator", ["dlu_upsample", *long("expand_kernels")])
@pytest.mark.parametrize("points", ["spread", "one", "two"])
def test_dlu_repeats_itself_on_request(operator, points, device, reordered):
    """Also where every output samples the same kernel, or one of two."""
    arguments = arguments_of(operator, torch.float32, device)
    if points == "one":
        arguments["offsets"] = torch.full_like(arguments["offsets"], -100.0)
    elif points == "two":
        arguments["offsets"] = 100 * arguments["offsets"].mean(dim=1, keepdim=True).sign().expand_as(
            arguments["offsets"]
        )
    with deterministic():
        assert same_in_all_runs(operator, arguments)


@pytest.mark.skipif(not ON_CPU, reason="a GPU may happen to repeat its order")
def test_additions_in_any_order_do_not_repeat_themselves(device, reordered):
    """Without the request; else the tests above would not show anything."""
    arguments = arguments_of("dlu_upsample", torch.float32, device)
    arguments["offsets"] = torch.full_like(arguments["offsets"], -100.0)
    assert not same_in_all_runs("dlu_upsample", arguments)


@pytest.mark.parametrize("dtype", _verify.DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("groups", batch=2, channels=6, kernel_size=3, groups=2),
        Case("scale 3, far", channels=3, height=4, width=5, scale_factor=3, reach=6.0),
        Case("float32 kernels", channels=5, height=3, width=4, kernel_dtype=torch.float32),
        # Wide enough for sums to be kept where the features' gradient is written last.
        Case("wide", channels=64, height=3, width=4, kernel_size=3),
        Case("channels_last, scale 4", channels=8, height=3, width=2, scale_factor=4, channels_last=True),
    ],
    ids=lambda case: case.name,
)
def test_as_exact_as_by_default(case, dtype, device):
    for operator in ("dlu_upsample", "expand_kernels"):
        if _verify.applies(case, operator, dtype):
            with deterministic(warn_only=True):  # eager on a GPU has operators that cannot
                errors = _verify.compare(operator, case, dtype, device)
            assert all(error.passed for error in errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [-120, -100, -40, 0, 40, 90])
def test_gradients_of_any_magnitude(power, dtype, device):
    """Their unit follows from the largest of them, and nothing overflows where all meet in one kernel."""
    arguments = _verify.inputs("expand_kernels", CASE, dtype, device)
    arguments["offsets"] = torch.full_like(arguments["offsets"], -100.0)
    arguments["grad_output"] = (arguments["grad_output"].abs() + 0.5) * 2.0**power
    with deterministic():
        found = gradients("expand_kernels", arguments)["kernel_space"].double()
    exact = {name: value.double() for name, value in arguments.items()}
    expected = gradients("expand_kernels", exact, eager=True)["kernel_space"]
    torch.testing.assert_close(found * 2.0**-power, expected * 2.0**-power, rtol=1e-5, atol=1e-6)
    if dtype == torch.float64:
        torch.testing.assert_close(found * 2.0**-power, expected * 2.0**-power, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_small_gradients_beside_a_large_one(dtype, bound, device):
    """A gradient 2^-18 of the largest still keeps what its type holds of it; float64 needs two integers for that."""
    arguments = _verify.inputs("expand_kernels", CASE, dtype, device)
    arguments["offsets"] *= 0
    arguments["grad_output"][:, :, 6:] *= 2.0**-18
    with deterministic():
        found = gradients("expand_kernels", arguments)["kernel_space"]
    exact = {name: value.double() for name, value in arguments.items()}
    expected = gradients("expand_kernels", exact, eager=True)["kernel_space"]
    error = (found.double() - expected)[:, :, 3:].abs().max() / expected[:, :, 3:].abs().max()
    assert error < bound


def test_as_many_terms_as_there_are_outputs(device):
    """All of the largest magnitude, in one kernel: the outputs of all source pixels, not just as many as these."""
    case = Case("", height=2, width=2, scale_factor=4, kernel_size=3)
    arguments = _verify.inputs("expand_kernels", case, torch.float32, device)
    arguments["offsets"] = torch.full_like(arguments["offsets"], -100.0)
    arguments["grad_output"] = torch.zeros_like(arguments["grad_output"])
    arguments["grad_output"][:, 0] = 1.99
    expected = gradients("expand_kernels", arguments, case, eager=True)["kernel_space"]
    with deterministic():
        torch.testing.assert_close(gradients("expand_kernels", arguments, case)["kernel_space"], expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["grad_output", "offsets"])
def test_what_is_not_finite_is_seen(name, value, device):
    """A gradient, or a NaN offset, makes the kernel space's gradient NaN in its image and group, and in no other."""
    case = Case("", batch=2, channels=4, height=4, width=4, kernel_size=3, groups=2)
    arguments = _verify.inputs("dlu_upsample", case, torch.float32, device)
    clean = dict(arguments)
    arguments[name] = arguments[name].clone()
    arguments[name][1, 3 if name == "grad_output" else 8, 1, 2] = value  # of the second group
    with deterministic():
        found = gradients("dlu_upsample", arguments, case)["kernel_space"]
    if name == "offsets" and not math.isnan(value):  # held to the border
        assert found.isfinite().all()
        return
    expected = gradients("dlu_upsample", clean, case, eager=True)["kernel_space"]
    expected[1, 9:] = math.nan
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_no_gradient_gives_zeros(device):
    arguments = _verify.inputs("dlu_upsample", CASE, torch.float32, device)
    arguments["grad_output"] *= 0
    with deterministic():
        assert not gradients("dlu_upsample", arguments)["kernel_space"].any()


def test_empty_batch(device):
    tensors = [torch.ones(0, c, 3, 4, device=device, requires_grad=True) for c in (2, 9, 8)]
    with deterministic():
        dlu_triton.dlu_upsample(*tensors, 2, 3).sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in tensors)


def test_reference_agrees_that_it_is_the_same_operator(device):
    """The request changes how sums are taken, not what is summed."""
    arguments = _verify.inputs("dlu_upsample", CASE, torch.float64, device)
    with deterministic():
        found = gradients("dlu_upsample", arguments)
    tensors = [arguments[name].clone().requires_grad_() for name in ("features", "kernel_space", "offsets")]
    output = reference.dlu_upsample(*tensors, CASE.scale_factor, CASE.kernel_size)
    expected = torch.autograd.grad(output, tensors, arguments["grad_output"])
    for name, value in zip(("features", "kernel_space", "offsets"), expected, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
