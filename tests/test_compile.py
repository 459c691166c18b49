"""torch.compile: one graph for all sizes, forward and backward; and what registered operators promise about strides."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from layouts import channel_slice, channels_last, cropped, expanded, sliced, transposed
from selection import long
from torch import nn
from torch._dynamo import config
from torch._subclasses import FakeTensorMode

import dlu_triton
from dlu_triton import CARAFEPack, DLUPack, _launch, _verify
from dlu_triton._verify import Case

# Sizes that are no numbers of channels, or they would be taken for them, and not 1, which PyTorch compiles for itself.
SIZES = ((2, 5, 7), (3, 4, 9), (2, 8, 3))
CHANNELS = 6
by_name = {"ids": lambda value: getattr(value, "__name__", None) or str(value).removeprefix("torch.")}


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    with config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def case(n, h, w):
    return Case("", batch=n, channels=CHANNELS, height=h, width=w, kernel_size=3, groups=2)


def assert_same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
        assert found[name].stride() == value.stride()


@pytest.mark.parametrize("operator", ("dlu_upsample", *long("carafe_upsample", "carafe", "expand_kernels")))
def test_operators_compile_once_for_all_sizes(operator, device):
    """Fullgraph, dynamic, forward and backward; results as without compilation, in the same strides."""
    compiled = torch.compile(
        _verify.function(operator, case(*SIZES[0]), eager=False), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in SIZES:
        arguments = _verify.inputs(operator, case(*size), torch.float32, device)
        expected = _verify.results(_verify.function(operator, case(*size), eager=False), arguments)
        assert_same(_verify.results(compiled, arguments), expected)


def test_recompilation_would_show(device):
    """Without `dynamic`, to see that the tests here can fail."""
    compiled = torch.compile(
        _verify.function("carafe", case(*SIZES[0]), eager=False), fullgraph=True, dynamic=False, backend="aot_eager"
    )
    compiled(*list(_verify.inputs("carafe", case(*SIZES[0]), torch.float32, device).values())[:-1])
    with pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(*list(_verify.inputs("carafe", case(*SIZES[1]), torch.float32, device).values())[:-1])


@pytest.mark.parametrize("mode", ("reduce-overhead", *long("default")))
def test_inductor(mode, device):
    """The compiler itself, around the operator too: what precedes and follows it is fused as ever."""

    def call(features, space, offsets):
        return dlu_triton.dlu_upsample(features.relu(), 2 * space, offsets.tanh(), 2, 3, 2).sigmoid()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, mode=mode)
    for size in (SIZES[0], SIZES[0], *SIZES[1:]):  # CUDA graphs are recorded the second time
        arguments = _verify.inputs("dlu_upsample", case(*size), torch.float32, device)
        assert_same(_verify.results(compiled, arguments), _verify.results(call, arguments))


class Network(nn.Module):
    """A pack between convolutions, with a skip connection."""

    def __init__(self, pack):
        super().__init__()
        self.before = nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.pack = pack(CHANNELS, 2, up_kernel=3, compressed_channels=10)
        for parameter in self.pack.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x):
        hidden = self.before(x)
        return self.pack(hidden) + nn.functional.interpolate(hidden, scale_factor=2)


@pytest.mark.parametrize(("pack", "region"), [(DLUPack, None), (CARAFEPack, torch.bfloat16)], **by_name)
def test_modules_compile_once_for_all_sizes(pack, region, device):
    """In training, also in an autocast region."""
    torch.manual_seed(0)
    net = Network(pack).to(device)

    def step(net, x, grad_output):
        net.zero_grad()
        with torch.autocast(device.type, region, enabled=region is not None):
            output = net(x)
        output.backward(grad_output.to(output.dtype))
        return {"output": output.detach(), **{name: each.grad.clone() for name, each in net.named_parameters()}}

    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, h, w in SIZES:
        x, grad_output = torch.randn(n, 4, h, w).to(device), torch.randn(n, CHANNELS, 2 * h, 2 * w).to(device)
        expected = step(net, x, grad_output)
        compiled.zero_grad()
        found = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x, grad_output).items()}
        assert found["output"].dtype == (region or torch.float32)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("method", ("xgradcam", "hirescam"))
def test_maps_compile_once_for_all_sizes(method, device):
    def call(activations, gradients):
        return dlu_triton.class_activation_parts(activations, gradients, method, size=(9, 11), normalize=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, h, w in SIZES:
        a, g = torch.rand(n, 6, h, w).to(device), torch.randn(n, 6, h, w).to(device)
        for found, expected in zip(compiled(a, g), call(a, g), strict=True):
            if expected is not None:
                torch.testing.assert_close(found, expected)


def test_inside_transforms_of_a_compiled_function(device):
    """vmap and forward mode are traced; the tangent is not lost."""
    *tensors, _ = _verify.inputs("dlu_upsample", case(*SIZES[0]), torch.float64, device).values()
    call = _verify.function("dlu_upsample", case(*SIZES[0]), eager=False)
    for transformed in (
        lambda *xs: torch.func.vmap(call)(*(torch.stack([x, -x]) for x in xs)),
        lambda *xs: torch.func.jvp(call, xs, xs),
    ):
        found = torch.compile(transformed, fullgraph=True, backend="aot_eager")(*tensors)
        torch.testing.assert_close(found, transformed(*tensors))
        torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------------------
# Fake kernels
# ---------------------------------------------------------------------------------------------------------------

LAYOUTS = (torch.Tensor.contiguous, channels_last, sliced, cropped, channel_slice, transposed, expanded)


@pytest.mark.parametrize("operator", _verify.OPERATORS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 1), (0, 2, 3), (1, 4, 1)], ids=str)
def test_fake_and_real_results_are_laid_out_alike(operator, shape, device, monkeypatch):
    """Forward and backward ops, for every pair of layouts of the first two tensors; all but their launches."""
    monkeypatch.setattr(_launch, "launch", lambda *arguments: None)
    sizes = (3, 2, 2, None) if operator == "carafe" else (2, 3, 2, None)
    *tensors, grad_output = _verify.inputs(operator, case(*shape), torch.bfloat16, device).values()
    packet, backward = getattr(torch.ops.dlu_triton, operator), getattr(torch.ops.dlu_triton, f"{operator}_backward")
    layouts = [layout for layout in LAYOUTS if layout is not expanded or shape[0]]
    for first, second in product(layouts, layouts):
        given = [first(tensors[0]), second(tensors[1]), *tensors[2:]]
        flags = [True] * len(given)
        real = [packet(*given, *sizes), *backward(grad_output, *given, *sizes, *flags)]
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(x) for x in given]
            fake_grad = mode.from_tensor(grad_output)
            fake = [packet(*faked, *sizes), *backward(fake_grad, *faked, *sizes, *flags)]
        for one, other in zip(fake, real, strict=True):
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
            assert steps(one) == steps(other)


def steps(tensor):
    """Strides that lead anywhere."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


# ---------------------------------------------------------------------------------------------------------------
# On a CPU
# ---------------------------------------------------------------------------------------------------------------

ON_A_CPU = """
import re, sys
import torch
from torch._dynamo import config
from torch._inductor.utils import run_and_get_code
import dlu_triton
from dlu_triton import _launch, _verify
from dlu_triton._verify import Case

assert not _launch.INTERPRETED
torch.set_num_threads(2)
operator = sys.argv[1]

def case(n, h, w):
    return Case("", batch=n, channels=6, height=h, width=w, kernel_size=3, groups=2)

def inputs(*size):
    return _verify.inputs(operator, case(*size), torch.float32, "cpu")

SIZES = ((2, 5, 7), (3, 4, 9))
call = _verify.function(operator, case(*SIZES[0]), eager=False)

def check(compiled, size):
    found, expected = (_verify.results(each, inputs(*size)) for each in (compiled, call))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)

with config.patch(error_on_recompile=True):
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in SIZES:
            tensors = list(inputs(*size).values())[:-1]
            torch.testing.assert_close(compiled(*tensors), call(*tensors), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        check(compiled, size)
torch.compiler.reset()
check(torch.compile(call, fullgraph=True), SIZES[0])

if operator == "dlu_upsample":
    # Every operator and module, in the operators that compilers get, without the compiler.
    for name in _verify.OPERATORS:
        for shape in ((2, 5, 6), (1, 1, 1), (0, 2, 3)):
            for dtype in (torch.float32, torch.bfloat16):
                torch.compiler.reset()
                each = _verify.function(name, case(*shape), eager=False)
                given = _verify.inputs(name, case(*shape), dtype, "cpu")
                traced = torch.compile(each, fullgraph=True, backend="aot_eager")
                found, expected = (_verify.results(way, given) for way in (traced, each))
                bound = 1e-4 if dtype == torch.float32 else 0.05
                for key, value in expected.items():
                    assert found[key].dtype == value.dtype
                    torch.testing.assert_close(found[key], value, rtol=bound, atol=bound * (value.numel() > 0))
        last = _verify.inputs(name, case(2, 5, 6), dtype, "cpu").values()
        last = [x.contiguous(memory_format=torch.channels_last) for x in last]
        torch.compiler.reset()
        output = torch.compile(_verify.function(name, case(2, 5, 6), eager=False), backend="aot_eager")(*last[:-1])
        assert output.is_contiguous(memory_format=torch.channels_last)

    for height, width in ((3, 11), (25, 42)):  # where shares of the image are no exact numbers
        pack = dlu_triton.DLUPack(4, 2, up_kernel=3, compressed_channels=4)  # whose offsets are zero: kinks
        torch.nn.init.normal_(pack.kernel_space_generator.weight)
        x, grad_output = torch.randn(2, 4, height, width), torch.randn(2, 4, 2 * height, 2 * width)
        gradients = []
        for way in (torch.compile(pack, fullgraph=True, backend="aot_eager"), pack):
            torch.compiler.reset()
            pack.zero_grad()
            with torch.autocast("cpu", enabled=False):
                way(x).backward(grad_output)
            gradients.append(pack.conv_offset.weight.grad.clone())
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
        pack = dlu_triton.CARAFEPack(4, 2, up_kernel=3, compressed_channels=4)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = torch.compile(pack, fullgraph=True, backend="aot_eager")(x), pack(x)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    given = inputs(2, 5, 7)
    given["offsets"][0, 0, 0, 0] = float("nan")  # whose gradient would crash grid_sample
    given["offsets"][1, 0, 0, 0] = float("inf")
    found, expected = (_verify.results(each, given) for each in (compiled, call))
    torch.testing.assert_close(found["output"], expected["output"], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert found["output"].isnan().any() and found["kernel_space"][1:].isfinite().all()
    for key, value in expected.items():  # what is not finite is so in both, and nowhere else
        assert torch.equal(found[key].isfinite(), value.isfinite()), key

    torch.compiler.reset()
    tensors = list(inputs(2, 16, 24).values())[:-1]
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(call, fullgraph=True, dynamic=False), *tensors)
    assert "dlu_triton" not in re.sub(r"#.*", "", code)
    buffers = [eval(f"({sizes})") for sizes in re.findall(r"= empty_strided_cpu\\(\\(([\\d, ]*)\\)", code)]
    numels = [torch.Size(sizes if isinstance(sizes, tuple) else (sizes,)).numel() for sizes in buffers]
    output, kernels = 2 * 6 * 32 * 48, 2 * 2 * 9 * 32 * 48
    assert 0 < max(numels) <= max(output, kernels), numels  # not the windows of all outputs
"""


@pytest.mark.parametrize("operator", ("dlu_upsample", *long("carafe_upsample")))
def test_plain_operators_on_a_cpu(operator):
    """The compiler is given operators that it fuses: nothing is unfolded, no op of ours is left, and it is right."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", ON_A_CPU, operator], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
