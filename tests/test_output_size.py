"""`output_size`: the first rows and columns of what the operators compute, by every way that leads to them."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED
from selection import long
from torch.utils.flop_counter import FlopCounterMode

import dlu_triton
from dlu_triton import CARAFE, CARAFEPack, DLUPack, _launch, _verify, reference
from dlu_triton._verify import Case
from dlu_triton.ops import _reassembly

WHOLE = Case("", batch=2, channels=6, height=4, width=6, kernel_size=3, groups=2)
CUTS = {  # odd as in pyramids, whole blocks cut off, one side, nothing, almost everything
    "odd": (WHOLE, (7, 11)),
    "small": (replace(WHOLE, height=6, width=20, channels=2), (3, 5)),
    "rows": (replace(WHOLE, channels_last=True), (5, 12)),
    "none": (WHOLE, (8, 12)),
    "one pixel": (replace(WHOLE, height=2, width=2), (1, 1)),
    "scale 3": (replace(WHOLE, scale_factor=3, kernel_size=5, groups=1), (10, 17)),
    "scale 8, channels_last": (replace(WHOLE, scale_factor=8, width=3, channels_last=True), (25, 23)),
}
OFTEN = ("odd", "small", "scale 8, channels_last")
every_operator = pytest.mark.parametrize("operator", _verify.OPERATORS)


def cut(tensor, size):
    return tensor[..., : size[0], : size[1]]


def arguments(operator, case, size, dtype, device):
    """Of the operator with and without the size, and a gradient of the output that is cut off, also of the whole."""
    given = _verify.inputs(operator, case, dtype, device)
    grad_output = cut(given.pop("grad_output"), size)
    if operator == "carafe":
        return {**given, "masks": cut(given["masks"], size)}, given, grad_output
    return given, given, grad_output


def expected(operator, case, size, given, grad_output):
    """By cutting the result of the eager twin; gradients of masks are cut as well."""
    call = _verify.function(operator, case, eager=True)
    found = _verify.results(lambda *tensors: cut(call(*tensors), size), {**given, "grad_output": grad_output})
    return {**found, "masks": cut(found["masks"], size)} if operator == "carafe" else found


@pytest.mark.parametrize("name", (*OFTEN, *long(*(name for name in CUTS if name not in OFTEN))))
@every_operator
@pytest.mark.parametrize("way", ("kernels", "twin"))
def test_is_the_first_part_of_all(way, operator, name, device):
    """And so are its gradients: zero, not what was in memory, where what is cut off would have had one."""
    case, size = CUTS[name]
    given, whole, grad_output = arguments(operator, case, size, torch.float64, device)
    call = _verify.function(operator, replace(case, output_size=size), eager=way == "twin")
    found = _verify.results(call, {**given, "grad_output": grad_output})
    assert found["output"].shape[2:] == size
    for key, value in expected(operator, case, size, whole, grad_output).items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("operator", ("dlu_upsample", *long("carafe", "carafe_upsample", "expand_kernels")))
def test_several_tiles(operator, dtype, channels_last, device):
    """Of the sizes that real maps take, with kernels of 5 x 5."""
    case = Case("", channels=20, height=9, width=24, output_size=(17, 47), channels_last=channels_last)
    for name, comparison in _verify.compare(operator, case, dtype, device).items():
        assert comparison.passed, f"{name}: {comparison}"


@pytest.mark.parametrize("at_a_time", (1, 132))
@pytest.mark.parametrize("size", [(27, 55), (24, 46), (13, 29)], ids=str)
@pytest.mark.parametrize("channels_last", (False, True))
def test_gradient_of_wide_features(size, channels_last, at_a_time, device, monkeypatch):
    """With strips of several steps, and steps whose outputs are all there, which take no masks."""
    monkeypatch.setattr(_launch, "PROGRAMS_AT_A_TIME", at_a_time)
    _launch.strip_steps.cache_clear()
    _launch.forget_launches()
    case = Case("", channels=3, height=14, width=28, output_size=size, channels_last=channels_last)
    features, masks, grad_output = _verify.inputs("carafe", case, torch.float32, device).values()
    found = torch.full_like(features, float("nan"))
    _reassembly.backward_features(grad_output, found, masks, None, 5, 1, 2)
    _launch.strip_steps.cache_clear()
    _launch.forget_launches()
    features.requires_grad_()
    (value,) = torch.autograd.grad(reference.carafe(features, masks, 5, 1, 2, size), features, grad_output)
    torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-4)


@every_operator
@pytest.mark.parametrize("way", ("kernels", "twin"))
def test_nothing_comes_of_what_is_cut_off(way, operator, device):
    """What alone reaches the outputs that are cut off may hold anything; its gradient is zero."""
    case = replace(WHOLE, height=12, width=12, batch=1, output_size=(3, 3), reach=0.4)
    given = _verify.inputs(operator, case, torch.float32, device)
    clean = _verify.results(_verify.function(operator, case, eager=way == "twin"), given)
    beyond = {"features": 11, "kernel_space": 11, "offsets": 2, "logits": 2}
    for name, start in beyond.items():
        if name in given:
            given[name][..., start:, :] = float("nan")
            given[name][..., start:] = float("nan")
    found = _verify.results(_verify.function(operator, case, eager=way == "twin"), given)
    assert torch.equal(found["output"], clean["output"])
    for name, start in beyond.items():
        # The softmax of a kernel that is not finite multiplies a gradient of zero by it.
        if name in found and name not in ("kernel_space",):
            assert not found[name][..., start:, :].any(), name
            assert not found[name][..., start:].any(), name
    for name in set(found) - {"output"}:
        start = beyond.get(name, 3)
        torch.testing.assert_close(found[name][..., :start, :start], clean[name][..., :start, :start])


@pytest.mark.parametrize("operator", ("dlu_upsample", "expand_kernels"))
def test_deterministic(operator, device):
    case = replace(WHOLE, output_size=(7, 11))
    torch.use_deterministic_algorithms(True)
    try:
        for name, comparison in _verify.compare(operator, case, torch.float32, device).items():
            assert comparison.passed, f"{name}: {comparison}"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("operator", ("dlu_upsample", "carafe", "carafe_upsample", "expand_kernels"))
def test_nothing_is_made_in_full_size(operator, device, monkeypatch):
    """The crop is not done after: forward and backward, no tensor has the size of the whole output."""
    case = replace(WHOLE, height=8, width=10, output_size=(7, 9), channels=8)
    given = _verify.inputs(operator, case, torch.float32, device)
    made = []
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, make=make, **kwargs: (made.append(make(*args, **kwargs)), made[-1])[1]
        )
    _verify.results(_verify.function(operator, case, eager=False), given)
    inputs = {tuple(value.shape) for name, value in given.items() if name != "grad_output"}
    channels = given["grad_output"].shape[1]
    assert (2, channels, 7, 9) in {tuple(tensor.shape) for tensor in made}
    others = [tensor for tensor in made if tuple(tensor.shape) not in {*inputs, (2, channels, 7, 9)}]
    assert [list(tensor.shape) for tensor in others if tensor.numel() >= 2 * 16 * 20] == (
        [[2, 2, 8, 10, 16]] * (operator in ("dlu_upsample", "expand_kernels")) * len(others)
    )


@every_operator
def test_offsets_of_64_bits(operator, device, monkeypatch):
    monkeypatch.setattr(_launch, "MOST_32_BIT_OFFSETS", 1)
    for name, comparison in _verify.compare(
        operator, replace(WHOLE, output_size=(7, 11)), torch.float32, device
    ).items():
        assert comparison.passed, f"{name}: {comparison}"


def test_what_is_cut_off_is_numbered_too():
    """A kernel numbers the rows whose gradients are zero."""
    features = torch.empty(1, 1, 2**30, 1, dtype=torch.float16, device="meta")
    logits = features.expand(-1, 4, -1, -1)
    message = r"at most 2147479552 rows and columns, .* got scale_factor\*\(H, W\) = \(2147483648, 2\)"
    with pytest.raises(ValueError, match=message):
        dlu_triton.carafe_upsample(features, logits, 2, 1, 1, (2, 2))
    with pytest.raises(ValueError, match=message):
        dlu_triton.expand_kernels(features, features.expand(-1, 8, -1, -1), 2, 1, 1, (2, 2))


def test_tiles_that_are_cut_off_take_no_products(device, monkeypatch):
    """What they store is zero."""
    if not INTERPRETED:
        pytest.skip("counts what the interpreter multiplies")
    from triton.runtime import interpreter

    counted = []
    create = interpreter.interpreter_builder.create_dot
    monkeypatch.setattr(
        interpreter.interpreter_builder, "create_dot", lambda *arguments: (counted.append(1), create(*arguments))[1]
    )
    products = []
    for size in ((4, 4), (24, 24)):
        case = Case("", channels=8, height=12, width=12, kernel_size=3, output_size=size)
        given = _verify.inputs("carafe_upsample", case, torch.float32, device)
        counted.clear()
        _verify.results(_verify.function("carafe_upsample", case, eager=False), given, ["logits"])
        products.append(len(counted))
    assert 0 < 4 * products[0] < products[1]


@pytest.mark.parametrize("path", ("kernels", "eager path"), indirect=True)
@pytest.mark.parametrize("pack", (DLUPack, CARAFEPack))
def test_modules(pack, path):
    """`torch.Size`, as pyramids have it, and lists; the parts that are cut off have no gradient."""
    torch.manual_seed(0)
    upsampler = pack(6, 2, up_kernel=3, up_group=2, compressed_channels=4).to(path).double()
    for parameter in upsampler.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 6, 3, 4, device=path, dtype=torch.float64)
    fine = torch.randn(2, 6, 5, 7, device=path, dtype=torch.float64)
    gradients = []
    for output in (upsampler(x, fine.shape[-2:]), upsampler(x, output_size=[5, 7]), upsampler(x)[..., :5, :7]):
        upsampler.zero_grad()
        (output * fine).sum().backward()
        gradients.append([output.detach(), *(parameter.grad.clone() for parameter in upsampler.parameters())])
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


def test_carafe_module(device):
    features, masks = torch.randn(1, 4, 3, 4, device=device), torch.randn(1, 9, 5, 8, device=device)
    found = CARAFE(3, 1, 2)(features, masks, output_size=(5, 8))
    assert torch.equal(found, dlu_triton.carafe(features, masks, 3, 1, 2, (5, 8)))


@pytest.mark.parametrize("pack", (DLUPack, *long(CARAFEPack)))
def test_one_graph_for_all_sizes(pack, device):
    """torch.compile of a pyramid's step, in training, for even and odd sizes alike."""
    torch.manual_seed(0)
    upsampler = pack(6, 2, up_kernel=3, compressed_channels=4).to(device)

    def merge(coarse, fine):
        return fine + upsampler(coarse, output_size=fine.shape[-2:])

    torch.compiler.reset()
    compiled = torch.compile(merge, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for h, w, rows, cols in ((5, 7, 9, 13), (4, 9, 8, 17), (8, 3, 16, 6)):
            coarse = torch.randn(2, 6, h, w, device=device, requires_grad=True)
            fine = torch.randn(2, 6, rows, cols, device=device)
            grad_output = torch.randn_like(fine)
            (found,) = torch.autograd.grad(compiled(coarse, fine), coarse, grad_output)
            (value,) = torch.autograd.grad(merge(coarse, fine), coarse, grad_output)
            torch.testing.assert_close(found, value)
    torch.compiler.reset()


ON_A_CPU = """
import pytest
import torch
from dataclasses import replace
import dlu_triton
from dlu_triton import _launch, _verify
assert not _launch.INTERPRETED
case = _verify.Case("", batch=2, channels=6, height=5, width=7, kernel_size=3, groups=2, output_size=(9, 13))
for operator in _verify.OPERATORS:
    given, call = _verify.inputs(operator, case, torch.float32, "cpu"), _verify.function(operator, case, eager=False)
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = (_verify.results(each, given) for each in (compiled, call))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    # What alone reaches the outputs that are cut off is not read.
    small = replace(case, height=12, width=12, output_size=(3, 3), reach=0.0)
    given, call = _verify.inputs(operator, small, torch.float32, "cpu"), _verify.function(operator, small, eager=False)
    for name in ("features", "offsets", "logits"):
        if name in given:
            given[name][..., 4:, :] = given[name][..., 4:] = float("nan")
    torch.compiler.reset()
    found = _verify.results(torch.compile(call, fullgraph=True, backend="aot_eager"), given)
    for name, value in found.items():
        assert value.isfinite().all(), (operator, name)

class Merge(torch.nn.Module):
    def forward(self, coarse, logits, fine):
        return fine + dlu_triton.carafe_upsample(coarse, logits, 2, 3, output_size=fine.shape[-2:])

sizes = {axis: torch.export.Dim.DYNAMIC for axis in (2, 3)}
inputs = torch.randn(2, 4, 5, 6), torch.randn(2, 36, 5, 6)
for strict in (False, True):
    exported = torch.export.export(
        Merge(), (*inputs, torch.randn(2, 4, 9, 11)), dynamic_shapes=(sizes,) * 3, strict=strict
    ).module()
    for rows, cols in ((9, 11), (10, 12), (7, 5)):
        fine = torch.randn(2, 4, rows, cols)
        torch.testing.assert_close(exported(*inputs, fine), Merge()(*inputs, fine), rtol=1e-4, atol=1e-4)
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        exported(*inputs, torch.randn(2, 4, 11, 12))
"""


def test_compiled_on_a_cpu():
    """In the operators that compilers get there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ON_A_CPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strict", (False, *long(True)))
def test_exported_programs_refuse_what_does_not_fit(strict, device):
    """Exported with dynamic sizes, a size that is too large is an error when the program runs, not zeros."""

    class Merge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.upsampler = CARAFEPack(4, 2, up_kernel=3, compressed_channels=4)

        def forward(self, coarse, fine):
            return fine + self.upsampler(coarse, output_size=fine.shape[-2:])

    sizes = {axis: torch.export.Dim.DYNAMIC for axis in (2, 3)}
    inputs = torch.randn(2, 4, 5, 6, device=device), torch.randn(2, 4, 9, 11, device=device)
    net = Merge().to(device)
    run = torch.export.export(net, inputs, dynamic_shapes=(sizes, sizes), strict=strict).module()
    for rows, cols in ((9, 11), (10, 12), (7, 5)):
        other = inputs[0], torch.randn(2, 4, rows, cols, device=device)
        torch.testing.assert_close(run(*other), net(*other))
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        run(inputs[0], torch.randn(2, 4, 11, 12, device=device))


@every_operator
def test_transforms(operator, device):
    """vmap as one call; forward mode beside a difference in float64; second derivatives."""
    case = replace(WHOLE, height=3, width=3, output_size=(5, 4), reach=0.4)
    *tensors, grad_output = _verify.inputs(operator, case, torch.float64, device).values()
    call = _verify.function(operator, case, eager=False)
    twin = _verify.function(operator, case, eager=True)
    found = torch.func.vmap(call)(*(torch.stack([x, -x]) for x in tensors))
    torch.testing.assert_close(found, torch.stack([twin(*tensors), twin(*(-x for x in tensors))]))
    torch.testing.assert_close(
        torch.func.jvp(call, tuple(tensors), tuple(tensors))[1], torch.func.jvp(twin, tuple(tensors), tuple(tensors))[1]
    )
    pulled, (output, pull) = (torch.func.vjp(each, *tensors) for each in (call, twin))
    torch.testing.assert_close(pulled[0], output)
    torch.testing.assert_close(pulled[1](grad_output), pull(grad_output))
    second = []
    for each in (call, twin):
        leaves = [x.clone().requires_grad_() for x in tensors]
        first = torch.autograd.grad(each(*leaves), leaves, grad_output, create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    torch.testing.assert_close(*second)


@every_operator
def test_registered_operators(operator, device):
    """`torch.library.opcheck`, and the sizes that their fakes promise."""
    case = replace(WHOLE, height=2, width=3, output_size=(3, 5))
    *tensors, _ = _verify.inputs(operator, case, torch.float32, device).values()
    sizes = (3, 2, 2) if operator == "carafe" else (2, 3, 2)
    op = getattr(torch.ops.dlu_triton, operator).default
    torch.library.opcheck(op, (*(x.requires_grad_() for x in tensors), *sizes, [3, 5]))
    meta = op(*(x.detach().to("meta") for x in tensors), *sizes, [3, 5])
    assert meta.shape[2:] == (3, 5)


@every_operator
def test_flops_are_those_of_what_is_computed(operator, device):
    def count(size):
        case = replace(WHOLE, output_size=size)
        given = _verify.inputs(operator, case, torch.float32, device)
        with FlopCounterMode(display=False) as counter:
            _verify.results(_verify.function(operator, case, eager=False), given)
        return counter.get_total_flops()

    assert count((7, 11)) * 96 == count(None) * 77
    assert count((8, 12)) == count(None) > 0


@pytest.mark.parametrize("region", (torch.float16, torch.bfloat16), ids=str)
def test_autocast(region, device):
    case = replace(WHOLE, output_size=(7, 11))
    given = _verify.inputs("dlu_upsample", case, torch.float32, device)
    del given["grad_output"]
    with torch.autocast(device.type, region):
        found = dlu_triton.dlu_upsample(*given.values(), 2, 3, 2, (7, 11))
    assert (found.shape, found.dtype) == ((2, 6, 7, 11), region)
    whole = reference.dlu_upsample(*given.values(), 2, 3, 2)
    torch.testing.assert_close(found.float(), cut(whole, (7, 11)), rtol=2e-2, atol=5e-2)


def test_empty_batch(device):
    features, logits = torch.randn(0, 4, 3, 4, device=device), torch.randn(0, 36, 3, 4, device=device)
    output = dlu_triton.carafe_upsample(features.requires_grad_(), logits, 2, 3, 1, (5, 7))
    output.backward(torch.empty_like(output))
    assert output.shape == (0, 4, 5, 7)
    assert features.grad.shape == features.shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("module", (DLUPack, CARAFEPack))
def test_traces_fix_it(module, device):
    """As the page on what works with what says; other sizes of the input alone are followed."""

    class Like(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pack = module(2, 2, up_kernel=3, compressed_channels=4)

        def forward(self, coarse, fine):
            return self.pack(coarse, output_size=fine.shape[-2:])

    torch.manual_seed(0)
    like = Like().to(device)
    small = torch.randn(1, 2, 2, 3, device=device), torch.randn(1, 1, 3, 5, device=device)
    large = torch.randn(1, 2, 3, 4, device=device), torch.randn(1, 1, 5, 7, device=device)
    with torch.no_grad():
        traced = torch.jit.trace(like, small, check_trace=False)
        assert like(*large).shape == (1, 2, 5, 7)
        assert traced(*large).shape == (1, 2, 3, 5)
        torch.testing.assert_close(traced(*large), like(*large)[..., :3, :5])
        whole = torch.jit.trace(like.pack, small[:1], check_trace=False)
        torch.testing.assert_close(whole(large[0]), like.pack(large[0]))
