"""CUDA graphs, streams, devices, and what else happens to modules and tensors on their way: copies, files, defaults.

What needs a GPU is at the end. What host code can show without one is shown by `launch_elsewhere.py`, on fake tensors.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED, ON_CPU
from test_deterministic import deterministic
from test_ways import CASE, OPERATORS, every_operator
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import dlu_triton
from dlu_triton import CARAFE, CARAFEPack, DLUPack, Explanation, FusedExplanation, _checks, _verify


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Not here: a default device and the capture of a graph should meet what PyTorch has."""


# ---------------------------------------------------------------------------------------------------------------
# Launches on GPUs that are not there
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("the same without the interpreter")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("launch_elsewhere.py")
    process = subprocess.run(
        [sys.executable, script], env={**environment, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


STEPS = pytest.mark.parametrize("step", ("first", "again", "deterministic"))
DEVICES = pytest.mark.parametrize("index", (0, 1))


@STEPS
@DEVICES
def test_launches_go_to_the_device_of_their_tensors(elsewhere, step, index):
    """Also while device 0 is the current one, and when they are repeated; kernels are loaded for each device."""
    found = elsewhere[f"{step} cuda:{index}"]
    assert found["launches"] == (26 if step == "deterministic" else 25)
    assert found["kernels"] == [index]
    assert found["tensors"] == found["allocations"] == [f"cuda:{index}"]
    assert found["current"] == 0


@STEPS
@DEVICES
def test_launches_go_to_the_current_stream(elsewhere, step, index):
    """Of that device, which is another one in each step; repeated launches keep none."""
    found = elsewhere[f"{step} cuda:{index}"]
    assert found["streams"] == [found["expected stream"]]
    repeated = {name for name in found["through Triton"] if not name.startswith("cam_")}
    assert bool(repeated) == (step != "again")


@STEPS
@DEVICES
def test_launches_ask_for_nothing_that_a_capture_forbids(elsewhere, step, index):
    """Views and allocations, and the largest magnitude where sums may not depend on their order: no copy, no `item`."""
    allowed = {"aten::empty", "aten::empty_like", "aten::set_", "aten::unsqueeze", "aten::view", "prim::device"}
    of_order = {"aten::linalg_vector_norm"} if step == "deterministic" else set()
    found = set(elsewhere[f"{step} cuda:{index}"]["operators"])
    assert of_order <= found <= allowed | of_order


# ---------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------

PACKS = {
    "DLUPack": lambda: DLUPack(4, 2, up_kernel=3, compressed_channels=4),
    "CARAFEPack": lambda: CARAFEPack(4, 2, up_kernel=3, compressed_channels=4),
}
MODULES = {**PACKS, "CARAFE": lambda: CARAFE(3, 1, 2)}
every_pack = pytest.mark.parametrize("name", PACKS)
every_module = pytest.mark.parametrize("name", MODULES)


def make(name, device):
    """A module whose parameters are all random, and its inputs."""
    torch.manual_seed(0)
    module = MODULES[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs = [torch.randn(1, 4, 2, 3)] if name in PACKS else [torch.randn(1, 4, 2, 3), torch.rand(1, 9, 4, 6)]
    return module.to(device), [value.to(device) for value in inputs]


def through_a_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def from_state(module, state):
    """A new module of the same arguments, with that state."""
    torch.manual_seed(1)
    fresh = MODULES[type(module).__name__]().to(next(module.parameters(), torch.empty(0)).device)
    fresh.load_state_dict(state, strict=True)
    return fresh


COPIES = {
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy": copy.deepcopy,
    "file": lambda module: through_a_file(module, weights_only=False),
    "state": lambda module: from_state(module, module.state_dict()),
    "state in a file": lambda module: from_state(module, through_a_file(module.state_dict(), weights_only=True)),
    "assigned state": lambda module: from_state_assigned(module),
}


def from_state_assigned(module):
    with torch.device("meta"):
        fresh = MODULES[type(module).__name__]()
    fresh.load_state_dict(copy.deepcopy(module.state_dict()), strict=True, assign=True)
    return fresh


@pytest.mark.parametrize("way", COPIES)
@every_module
def test_copies_of_modules(name, way, device):
    """The same bits, and parameters of their own."""
    module, inputs = make(name, device)
    output = module(*inputs)
    module.eval()
    twin = COPIES[way](module)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    assert twin.training == (way.endswith(("state", "in a file")))
    assert torch.equal(twin(*inputs), output)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(module(*inputs), output)
    assert name == "CARAFE" or not torch.equal(twin(*inputs), output)


@every_module
def test_shallow_copies_share_their_parameters(name, device):
    module, inputs = make(name, device)
    twin = copy.copy(module)
    assert all(one is other for one, other in zip(module.parameters(), twin.parameters(), strict=True))
    assert torch.equal(twin(*inputs), module(*inputs))


@pytest.mark.parametrize("swap", (False, True), ids=("", "swap"))
@every_module
@torch.no_grad()  # no graph may hold what is swapped
def test_conversions_of_modules(name, swap, device):
    """Types, channels_last and a state, whether they set the data of parameters or swap tensors."""
    module, inputs = make(name, device)
    expected = module.double()(*(value.double() for value in inputs))
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        parameters = list(module.parameters())
        # Tolerances are of convolutions; those of float32 may be TF32.
        for dtype, tolerance in ((torch.float32, 5e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
            converted = copy.deepcopy(module).to(dtype)
            output = converted(*(value.to(dtype) for value in inputs))
            assert output.dtype == dtype
            torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
        assert converted.half().float()(*inputs).dtype == torch.float32
        module.to(memory_format=torch.channels_last)
        last = [value.double().contiguous(memory_format=torch.channels_last) for value in inputs]
        output = module(*last)
        assert output.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(output, expected)
        module.load_state_dict(make(name, device)[0].state_dict())  # in float32
        assert all(one is other for one, other in zip(module.parameters(), parameters, strict=True))
        torch.testing.assert_close(module(*last), expected)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@every_pack
def test_parametrised_modules(name, device):
    """As modules with what the parametrisations give, and trained through them."""
    module, inputs = make(name, device)
    module, inputs = module.double(), [value.double() for value in inputs]
    twin = copy.deepcopy(module)
    parametrize.register_parametrization(module.channel_compressor, "weight", Doubled())
    parametrizations.weight_norm(module.channel_compressor, "bias", dim=None)  # which leaves the values
    with torch.no_grad():
        twin.channel_compressor.weight.mul_(2)
    torch.testing.assert_close(module(*inputs), twin(*inputs))
    upstream = torch.randn_like(twin(*inputs))
    module(*inputs).backward(upstream)
    twin(*inputs).backward(upstream)
    found = module.channel_compressor.parametrizations.weight.original.grad
    torch.testing.assert_close(found, 2 * twin.channel_compressor.weight.grad)
    parametrize.remove_parametrizations(module.channel_compressor, "weight")
    torch.testing.assert_close(module(*inputs), twin(*inputs))


@every_pack
def test_stateless_and_stacked_modules(name, device):
    """`torch.func.functional_call`, of one state and of several at once."""
    first, inputs = make(name, device)
    first, inputs = first.double(), [value.double() for value in inputs]
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.5)
    expected = torch.stack([first(*inputs), second(*inputs)])
    one = torch.func.functional_call(first, dict(second.named_parameters()), tuple(inputs))
    assert torch.equal(one, expected[1])
    state = torch.func.stack_module_state([first, second])
    found = torch.vmap(lambda *state: torch.func.functional_call(first, state, tuple(inputs)))(*state)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------------------------
# Explainers and explanations
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*layers).eval().to(device)


BY_FILE = {name: COPIES[name] for name in ("pickle", "deepcopy", "file")}


@pytest.mark.parametrize("way", BY_FILE)
def test_copies_of_explainers(way, model, device):
    """They explain a model of their own: the copy of what the original explains."""
    images = torch.randn(1, 2, 5, 6, device=device)
    explainer = dlu_triton.XGradCAM(model, ["0", "1"], fuse="mean", eps=1e-3)
    before = explainer(images)
    twin = BY_FILE[way](explainer)
    with torch.no_grad():
        model[0].weight.zero_()
    torch.testing.assert_close(twin(images).map, before.map)
    assert not torch.allclose(explainer(images).map, before.map)


@pytest.mark.parametrize("way", BY_FILE)
def test_copies_of_explanations(way, model, device):
    images = torch.randn(1, 2, 5, 6, device=device)
    single, fused = (dlu_triton.GradCAM(model, "1")(images), dlu_triton.GradCAM(model, ["0", "1"], fuse="mean")(images))
    for explanation in (single, fused):
        twin = BY_FILE[way](explanation)
        assert type(twin) is type(explanation)
        assert repr(twin) == repr(explanation)
        assert torch.equal(twin.map, explanation.map)
        twin.map.zero_()
        assert explanation.map.any()
    parts = dlu_triton.class_activation_parts(torch.rand(1, 2, 3, 4, device=device), torch.rand(1, 2, 3, 4).to(device))
    twin = BY_FILE[way](parts)
    assert type(twin) is type(parts)
    assert all(torch.equal(one, other) for one, other in zip(twin, parts, strict=True))


def test_explanations_in_files_of_weights(model, device):
    """`weights_only` refuses the classes until they are allowed by name."""
    explanation = dlu_triton.GradCAM(model, ["0", "1"], fuse="mean")(torch.randn(1, 2, 5, 6, device=device))
    with pytest.raises(pickle.UnpicklingError, match="FusedExplanation"):
        through_a_file(explanation, weights_only=True)
    with torch.serialization.safe_globals([Explanation, FusedExplanation]):
        assert torch.equal(through_a_file(explanation, weights_only=True).layers[1].raw, explanation.layers[1].raw)


# ---------------------------------------------------------------------------------------------------------------
# Inputs, modes and defaults
# ---------------------------------------------------------------------------------------------------------------


def sliced(x):
    """Of a leaf with more channels."""
    leaf = torch.cat([x, x], 1).requires_grad_()
    return leaf, leaf[:, : x.shape[1]]


def expanded(x):
    """Of a leaf of one pixel."""
    leaf = x[..., :1, :1].clone().requires_grad_()
    return leaf, leaf.expand_as(x)


def parameter(x):
    leaf = nn.Parameter(x.clone())
    return leaf, leaf


def negated(x):
    """A real view of a complex leaf, every second number of it, whose values are negated when they are read."""
    leaf = torch.complex(x, -x).requires_grad_()
    return leaf, leaf.conj().imag


@pytest.mark.parametrize("first", (True, False), ids=("first", "others"))
@pytest.mark.parametrize("kind", (sliced, expanded, parameter, negated))
@every_operator
def test_kinds_of_tensors(operator, kind, first, device):
    """Of the first tensor, or of the others and the upstream gradient: leaves get the gradients that eager gives."""
    arguments = _verify.inputs(operator, CASE, torch.float64, device)
    grad_output = arguments.pop("grad_output")
    found = []
    for eager in (False, True):
        pairs = [(kind if first == (n == 0) else parameter)(tensor) for n, tensor in enumerate(arguments.values())]
        leaves, tensors = zip(*pairs, strict=True)
        output = _verify.function(operator, CASE, eager=eager)(*tensors)
        output.backward(grad_output if first else kind(grad_output)[1].detach())
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*found)


def test_negated_activations(device):
    a, g = torch.randn(2, 1, 3, 4, 5, dtype=torch.float64, device=device)
    assert negated(a)[1].is_neg()
    expected = dlu_triton.xgrad_cam(-a, g)
    torch.testing.assert_close(dlu_triton.xgrad_cam(negated(-a)[1], g), expected)


@every_operator
def test_zeros_without_memory(operator, device):
    """As each input and as the upstream gradient."""
    arguments = _verify.inputs(operator, CASE, torch.float64, device)
    call = _verify.function(operator, CASE, eager=False)
    for name, value in arguments.items():
        found, expected = (
            _verify.results(call, arguments | {name: zeros(value.shape, dtype=value.dtype, device=device)})
            for zeros in (torch._efficientzerotensor, torch.zeros)
        )
        for result, value in expected.items():
            torch.testing.assert_close(found[result], value, msg=lambda text, result=result: f"{result}: {text}")


@every_operator
def test_without_gradients(operator, device):
    arguments = _verify.inputs(operator, CASE, torch.float32, device)
    grad_output = arguments.pop("grad_output")
    call = _verify.function(operator, CASE, eager=False)
    leaves = [tensor.clone().requires_grad_() for tensor in arguments.values()]
    expected = call(*leaves).detach()
    with torch.no_grad():
        output = call(*leaves)
    assert not output.requires_grad
    assert torch.equal(output, expected)
    with torch.inference_mode():
        output = call(*leaves)
        inside = [tensor.clone() for tensor in leaves]
    assert output.is_inference()
    assert torch.equal(output, expected)
    # Outside, tensors of that mode compute, and are refused where a backward pass would need them.
    assert torch.equal(call(*inside), expected)
    kept = [*inside[:-1], leaves[-1]]
    refused = pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward")
    with refused if ON_CPU or torch.cuda.is_available() else contextlib.suppress(RuntimeError):
        call(*kept).backward(grad_output)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "default", (lambda: default_device("meta"), lambda: default_dtype(torch.float64)), ids=("device", "dtype")
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_defaults_change_nothing(default, dtype, device):
    """What operators make has the devices and types of their arguments; a meta tensor among it would fail."""
    for operator in _verify.OPERATORS:
        call = _verify.function(operator, CASE, eager=False)
        arguments = _verify.inputs(operator, CASE, dtype, device)
        expected = _verify.results(call, arguments)
        with default():
            found = _verify.results(call, arguments)
        for name, value in expected.items():
            assert (found[name].dtype, found[name].device) == (value.dtype, value.device)
            torch.testing.assert_close(found[name], value)
    a = torch.rand(1, 2, 3, 4, device=device, dtype=dtype)
    expected = dlu_triton.xgrad_cam(a, a, size=(5, 6), normalize=True)
    with default():
        found = dlu_triton.xgrad_cam(a, a, size=(5, 6), normalize=True)
    assert torch.equal(found, expected)


def global_state():
    """Where generators of random numbers are, and settings, by name."""
    name, keys, *others = np.random.get_state()  # noqa: NPY002
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    settings = (
        torch.get_default_dtype, torch.get_default_device, torch.is_grad_enabled, torch.is_inference_mode_enabled,
        torch.are_deterministic_algorithms_enabled, torch.is_deterministic_algorithms_warn_only_enabled,
        torch.is_anomaly_enabled, torch.get_num_threads, np.geterr,
    )  # fmt: skip
    return {
        "torch": [state.tolist() for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())],
        "numpy": [name, keys.tolist(), *others],
        "random": random.getstate(),
        **{setting.__name__: setting() for setting in settings},
        **{f"autocast on {kind}": torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")},
        "precision": [each.fp32_precision for each in (torch.backends, cuda.matmul, cudnn.conv, cudnn.rnn)],
        **{f"cudnn.{name}": getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")},
    }


def every_call(device):
    """By name: upsamplers with their gradients, and maps with all that is known besides."""
    for operator in _verify.OPERATORS:
        arguments = _verify.inputs(operator, CASE, torch.float32, device)
        yield operator, partial(_verify.results, _verify.function(operator, CASE, eager=False), arguments)
    a, g = torch.rand(2, 1, 3, 4, 5, device=device)
    for method in _checks.CAM_METHODS:
        yield method, partial(dlu_triton.class_activation_map, a, g, method, size=(5, 6), normalize=True)
    yield "parts", partial(dlu_triton.class_activation_parts, a, g)
    yield "weighted", partial(dlu_triton.weighted_activation_map, a, g.mean((2, 3)))


@pytest.mark.parametrize("others", (False, True), ids=("", "other settings"))
def test_calls_draw_no_random_number_and_change_no_setting(others, path):
    """As PyTorch starts, and where settings that calls may look at are others."""
    calls = list(every_call(path))
    with default_dtype(torch.float64) if others else contextlib.nullcontext(), deterministic(others):
        before = global_state()
        for name, call in calls:
            call()
            after = global_state()
            assert [key for key in before if after[key] != before[key]] == [], name


@every_pack
def test_modules_of_a_default_device_and_type(name, device):
    module, inputs = make(name, device)
    with default_device(device), default_dtype(torch.float64):
        twin = MODULES[name]()
        assert {(p.device.type, p.dtype) for p in twin.parameters()} == {(device.type, torch.float64)}
        twin.load_state_dict(module.state_dict())
        output = twin(*(value.double() for value in inputs))
    torch.testing.assert_close(output, module.double()(*(value.double() for value in inputs)))


# ---------------------------------------------------------------------------------------------------------------
# With a GPU
# ---------------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def captured(work, warm_up=None):
    """A graph of what `work` does, and what it returns; before, what it is like runs on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            (warm_up or work)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


@needs_cuda
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("same_bits", (False, True), ids=("", "deterministic"))
@every_operator
def test_operators_in_a_graph(operator, same_bits, dtype, device):
    """Replayed on other values, the graph gives what eager calls give."""
    call = _verify.function(operator, CASE, eager=False)
    arguments = _verify.inputs(operator, CASE, dtype, device)
    static = {name: torch.zeros_like(value).requires_grad_(name != "grad_output") for name, value in arguments.items()}
    *leaves, upstream = static.values()

    def work():
        output = call(*leaves)
        return output, *torch.autograd.grad(output, leaves, upstream)

    with deterministic(same_bits):
        graph, results = captured(work)
        for factor in (1, -0.5):
            values = {name: factor * value for name, value in arguments.items()}
            with torch.no_grad():
                for name, value in values.items():
                    static[name].copy_(value)
            graph.replay()
            expected = list(_verify.results(call, values).values())
            if same_bits:
                assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
            else:
                torch.testing.assert_close([result.detach() for result in results], expected)


@needs_cuda
@pytest.mark.parametrize("same_bits", (False, True), ids=("", "deterministic"))
@every_pack
def test_training_in_a_graph(name, same_bits, device, monkeypatch):
    """Forward, backward and the update of the parameters, two steps of them, beside eager ones."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which PyTorch asks for in that mode
    dtype = torch.float32 if same_bits else torch.float64
    module = make(name, device)[0].to(dtype)
    eager, warm = copy.deepcopy(module), copy.deepcopy(module)
    x, target = (
        torch.zeros(2, 4, 5, 7, device=device, dtype=dtype),
        torch.zeros(2, 4, 10, 14, device=device, dtype=dtype),
    )

    def step(module):
        loss = F.mse_loss(module(x), target)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)
        return loss.detach()

    with deterministic(same_bits):
        graph, loss = captured(lambda: step(module), lambda: step(warm))
        for _ in range(2):
            x.normal_()
            target.normal_()
            graph.replay()
            pairs = [(loss, step(eager)), *zip(module.parameters(), eager.parameters(), strict=True)]
            for found, expected in pairs:
                if same_bits:
                    assert torch.equal(found, expected)
                else:
                    torch.testing.assert_close(found, expected)


@needs_cuda
@every_pack
def test_graphed_callables(name, device):
    module, inputs = make(name, device)
    module, x = module.double(), inputs[0].double()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module), (torch.zeros_like(x).requires_grad_(),))
    for factor in (1, -2):
        found = []
        for each in (module, graphed):
            leaf = (factor * x).requires_grad_()
            output = each(leaf)
            gradients = torch.autograd.grad(output, [leaf, *each.parameters()], output.detach().sin())
            found.append([output.detach().clone(), *(gradient.clone() for gradient in gradients)])
        torch.testing.assert_close(*found)


@needs_cuda
@pytest.mark.parametrize("same_bits", (False, True), ids=("", "deterministic"))
@every_operator
def test_no_host_synchronisation(operator, same_bits, device):
    call = _verify.function(operator, CASE, eager=False)
    arguments = _verify.inputs(operator, CASE, torch.float32, device)
    with deterministic(same_bits):
        _verify.results(call, arguments)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            _verify.results(call, arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@every_operator
def test_a_stream_beside_the_default_one(operator, device):
    """Forward and backward wait for what is on it, and nothing goes elsewhere."""
    call = _verify.function(operator, CASE, eager=False)
    arguments = _verify.inputs(operator, CASE, torch.float64, device)
    expected = list(_verify.results(call, arguments).values())
    *leaves, upstream = (torch.zeros_like(value).requires_grad_() for value in arguments.values())
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        with torch.no_grad():
            for static, value in zip((*leaves, upstream), arguments.values(), strict=True):
                static.copy_(value)
        output = call(*leaves)
        gradients = torch.autograd.grad(output, leaves, upstream.detach())
        assert not side.query()
    assert torch.cuda.default_stream().query()
    torch.cuda.synchronize()
    torch.testing.assert_close([output.detach(), *gradients], expected)


@needs_cuda
@every_operator
def test_derivatives_run_on_the_stream_of_the_call(operator, device, monkeypatch):
    """Of first and second order, wherever they are asked for."""
    arguments = _verify.inputs(operator, CASE, torch.float64, device)
    grad_output, found, used = arguments.pop("grad_output"), [], []
    side, backward = torch.cuda.Stream(), OPERATORS[operator].gradients
    for way in ("launch", "twin"):
        run = getattr(backward, way)
        record = lambda *args, run=run: (used.append(torch.cuda.current_stream().cuda_stream), run(*args))[1]  # noqa: E731
        monkeypatch.setattr(backward, way, record)
    for stream in (torch.cuda.default_stream(), side):
        leaves = [value.clone().requires_grad_() for value in arguments.values()]
        stream.wait_stream(torch.cuda.current_stream())
        used.clear()
        with torch.cuda.stream(stream):
            output = _verify.function(operator, CASE, eager=False)(*leaves)
        first = torch.autograd.grad(output, leaves, grad_output, create_graph=True)
        second = torch.autograd.grad(sum((each**2).sum() for each in first), leaves)
        torch.cuda.synchronize()
        found.append([output.detach(), *(each.detach() for each in first), *second])
        assert len(used) >= 2
        assert set(used) == {stream.cuda_stream}
    torch.testing.assert_close(*found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_operator
def test_a_device_that_is_not_the_current_one(operator):
    call, found = _verify.function(operator, CASE, eager=False), []
    for device in ("cuda:0", "cuda:1", "cuda:1"):  # the last one by repeated launches
        arguments = _verify.inputs(operator, CASE, torch.float64, device)
        with torch.cuda.device(0):
            results = _verify.results(call, arguments)
            assert torch.cuda.current_device() == 0
        assert {value.device for value in results.values()} == {torch.device(device)}
        found.append([value.cpu() for value in results.values()])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
