"""Programs of torch.export and models of ONNX: what they hold, and what they give at sizes they were not made with."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_programs import (
    DYNAMIC,
    EXAMPLE,
    LIBRARY_OPS,
    NETWORKS,
    OTHERS,
    assert_close,
    exact,
    image,
    library_ops,
    network,
)
from selection import long
from torch import nn

from dlu_triton import _verify
from dlu_triton.ops import _graph

SCRIPT = Path(__file__).with_name("export_programs.py")
WITHOUT_THE_INTERPRETER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def in_a_process(*arguments: object, environment: dict[str, str] = WITHOUT_THE_INTERPRETER) -> None:
    process = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.fixture(autouse=True)
def full_precision():
    """Float32 is float32, whatever the GPU's convolutions would rather take; by the flag that torch.export reads."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


# torch.export


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("name", NETWORKS)
def test_program_holds_the_operators(name, strict, device, tmp_path):
    """Where the kernels run; saved and loaded, with other batches, heights and widths, odd ones too."""
    net = network(name).to(device)
    program = torch.export.export(net, (image(*EXAMPLE).to(device),), dynamic_shapes=DYNAMIC, strict=strict)
    assert library_ops(program) == LIBRARY_OPS[name]
    torch.export.save(program, tmp_path / "program.pt2")
    run = torch.export.load(tmp_path / "program.pt2").module()
    for shape in OTHERS[name]:
        x = image(*shape).to(device)
        assert_close(run(x), exact(net, x))


LOAD = """
import sys, torch
folder, library = sys.argv[1:]
if library == "True":
    import dlu_triton
x, expected = torch.load(folder + "/case.pt")
torch.testing.assert_close(torch.export.load(folder + "/program.pt2").module()(x), expected)
"""


def test_program_with_the_operators_needs_the_library(device, tmp_path):
    net, x = network("DLUPack").to(device), image(*EXAMPLE).to(device)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "program.pt2")
    torch.save((x, net(x).detach()), tmp_path / "case.pt")
    in_a_process("-c", LOAD, tmp_path, True, environment=dict(os.environ))
    with pytest.raises(AssertionError, match="dlu_triton"):
        in_a_process("-c", LOAD, tmp_path, False, environment=dict(os.environ))


def test_program_of_a_cpu_needs_no_library(tmp_path):
    in_a_process(SCRIPT, "export", tmp_path)
    in_a_process(SCRIPT, "load", tmp_path)


@pytest.mark.long
def test_package_of_a_cpu(tmp_path):
    """By AOTInductor, with dynamic sizes."""
    in_a_process(SCRIPT, "package", tmp_path)


@pytest.mark.parametrize("name", ("DLUPack", "CARAFEPack"))
def test_program_trains(name, device):
    net, x = network(name, groups=2).to(device), image(*EXAMPLE).to(device)
    exported = torch.export.export(net, (x,), dynamic_shapes=DYNAMIC).module()
    x = image(*OTHERS[name][1]).to(device)
    grad_output = torch.randn_like(net(x))
    exported(x).backward(grad_output)
    twin = copy.deepcopy(net).double()
    twin.zero_grad()
    twin(x.double()).backward(grad_output.double())
    expected = dict(twin.named_parameters())
    for parameter_name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), expected[parameter_name].grad, rtol=1e-4, atol=1e-4)


# ONNX


@pytest.mark.parametrize("whole", (True, False), ids=("whole", "cut"))
@pytest.mark.parametrize("operator", _verify.OPERATORS)
@pytest.mark.parametrize(
    ("kernel_size", "scale_factor", "groups", "height", "width"),
    [
        (5, 2, 1, 4, 6), (3, 3, 2, 3, 5), (9, 2, 4, 5, 3), (1, 1, 1, 3, 4), (3, 16, 2, 2, 2),
        (5, 2, 2, 1, 4), (3, 2, 1, 3, 1), (5, 4, 1, 1, 1),
    ],
)  # fmt: skip
def test_form_for_onnx_is_the_operator(operator, kernel_size, scale_factor, groups, height, width, whole, device):
    """With offsets that reach past the border on every side."""
    size = None if whole else (scale_factor * height - scale_factor // 2, max(1, scale_factor * width - 1))
    case = _verify.Case(
        "", batch=2, channels=4, height=height, width=width, scale_factor=scale_factor,
        kernel_size=kernel_size, groups=groups, reach=3.0, output_size=size,
    )  # fmt: skip
    arguments = _verify.inputs(operator, case, torch.float64, device)
    del arguments["grad_output"]
    sizes = (kernel_size, groups, scale_factor) if operator == "carafe" else (scale_factor, kernel_size, groups)
    found = getattr(_graph, operator)(*arguments.values(), *sizes, size)
    torch.testing.assert_close(found, _verify.function(operator, case, eager=True)(*arguments.values()))


@pytest.mark.parametrize("operator", _verify.OPERATORS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_form_for_onnx_in_half_precision(operator, dtype, device):
    """Sums and coordinates in float32, the output rounded."""
    case = _verify.Case("", batch=1, channels=4, height=4, width=5, scale_factor=2, kernel_size=3, groups=2)
    arguments = _verify.inputs(operator, case, dtype, device)
    del arguments["grad_output"]
    sizes = (3, 2, 2) if operator == "carafe" else (2, 3, 2)
    found = getattr(_graph, operator)(*arguments.values(), *sizes, None)
    assert found.dtype == dtype
    expected = _verify.function(operator, case, eager=True)(*(value.double() for value in arguments.values()))
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


class Model:
    """A network as a model of ONNX, run by onnxruntime."""

    def __init__(self, net: nn.Module, *inputs: torch.Tensor, **options: object) -> None:
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        self.proto = torch.onnx.export(net.eval(), inputs, dynamo=True, verbose=False, **options).model_proto
        self.session = runtime.InferenceSession(self.proto.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = zip((each.name for each in self.session.get_inputs()), inputs, strict=True)
        outputs = self.session.run(None, {name: tensor.numpy(force=True) for name, tensor in named})
        return tuple(torch.from_numpy(output) for output in outputs)

    def nodes(self) -> int:
        """How many; all of them are of standard operators."""
        assert {each.domain for each in self.proto.opset_import} == {""}
        assert len(self.proto.functions) == 0
        assert {node.domain for node in self.proto.graph.node} == {""}
        return len(self.proto.graph.node)


@pytest.mark.parametrize("groups", (2, *long(1)))
@pytest.mark.parametrize(
    ("name", "static", "dynamic"), [("DLUPack", 28, 52), ("pyramid", 54, 116), *long(("CARAFEPack", 15, 24))]
)
def test_onnx(name, static, dynamic, groups, device):
    """Few nodes, of standard operators, and the numbers of the network in float64."""
    net, x = network(name, groups).to(device), image(*EXAMPLE).to(device)
    model = Model(net, x)
    assert_close(model(x), on_cpu(exact(net, x)))
    assert model.nodes() <= static
    model = Model(net, x, dynamic_shapes=DYNAMIC)
    assert model.nodes() <= dynamic
    for shape in (EXAMPLE, *OTHERS[name]):
        x = image(*shape).to(device)
        assert_close(model(x), on_cpu(exact(net, x)))


def on_cpu(tensors):
    return tuple(tensor.cpu() for tensor in tensors)
