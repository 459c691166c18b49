"""Which way a call takes, and that every way gives the same values and gradients.

The same tests run for kernels and, in a process of its own, for CPU tensors without the interpreter, where the eager
twins compute.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import ON_CPU
from test_complexity import BACKWARD, CALLS, FORWARD, SHAPES, counts
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dlu_triton
from dlu_triton import _launch, _verify, reference
from dlu_triton._verify import Case
from dlu_triton.ops import cam as cam_ops
from dlu_triton.ops import carafe as carafe_ops
from dlu_triton.ops import dlu as dlu_ops

KERNELS = ON_CPU or torch.cuda.is_available()
OPERATORS = {
    "dlu_upsample": dlu_ops.dlu_upsample_op,
    "expand_kernels": dlu_ops.expand_kernels_op,
    "carafe": carafe_ops.carafe_op,
    "carafe_upsample": carafe_ops.carafe_upsample_op,
}
CASE = Case("", channels=3, height=2, width=3, kernel_size=3)
every_operator = pytest.mark.parametrize("operator", OPERATORS)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Not here: it would be seen by profilers, dispatch modes and subclasses."""


class Problem:
    """An operator, its arguments, and what it should give for them."""

    def __init__(self, operator, device, dtype=torch.float64, case=CASE):
        self.name, self.op = operator, OPERATORS[operator]
        self.arguments = _verify.inputs(operator, case, dtype, device)
        self.call = _verify.function(operator, case, eager=False)
        self.expected = _verify.results(_verify.function(operator, case, eager=True), self.arguments)
        self.grad_output = self.arguments["grad_output"]
        self.tensors = [value for name, value in self.arguments.items() if name != "grad_output"]
        sizes = case.scale_factor, case.kernel_size, case.groups
        self.settings = (*(sizes if operator != "carafe" else (*sizes[1:], sizes[0])), None)

    def leaves(self):
        return [tensor.clone().requires_grad_() for tensor in self.tensors]

    def check(self, output, gradients=None):
        torch.testing.assert_close(output.detach(), self.expected["output"])
        if gradients is not None:
            expected = list(self.expected.values())[1:]
            torch.testing.assert_close(list(gradients), expected)

    def train(self, call=None):
        """A call, its backward pass, and their check."""
        leaves = self.leaves()
        output = (call or self.call)(*leaves)
        output.backward(self.grad_output)
        self.check(output, [leaf.grad for leaf in leaves])


@pytest.fixture
def problem(operator, device):
    return Problem(operator, device)


@pytest.fixture
def taken(monkeypatch):
    """The ways taken from here on, of all operators and their gradients: "launch", "twin" or "op", and a name."""
    ways = []

    def record(operator, way, name):
        run = getattr(operator, way)
        monkeypatch.setattr(operator, way, lambda *arguments: (ways.append(f"{way} {name}"), run(*arguments))[1])

    for name, operator in OPERATORS.items():
        for way in ("launch", "twin", "op"):
            record(operator, way, name)
            record(operator.gradients, way, f"{name}_backward")
    return ways


@pytest.fixture
def launched(monkeypatch):
    """The launches from here on, whichever way led to them."""
    launches, launch = [], _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda *arguments: (launches.append(arguments[0]), launch(*arguments))[1])
    return launches


class Record(TorchDispatchMode):
    """Names of the operators that a dispatch mode is shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------------------
# Eager calls
# ---------------------------------------------------------------------------------------------------------------


@every_operator
def test_eager_calls_launch(problem, taken):
    """Or compute by the twin, whose graph its derivative is."""
    problem.check(problem.call(*problem.tensors))
    with torch.no_grad():
        problem.check(problem.call(*problem.leaves()))
    assert taken == [f"{'launch' if KERNELS else 'twin'} {problem.name}"] * 2
    taken.clear()
    problem.train()
    if KERNELS:
        assert taken == [f"launch {problem.name}", f"launch {problem.name}_backward"]
    else:
        assert taken == [f"twin {problem.name}"]


@pytest.mark.skipif(not KERNELS, reason="nothing is launched")
@every_operator
def test_profilers_name_the_operator_and_see_no_registered_one(problem):
    leaves = problem.leaves()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        problem.call(*leaves).backward(problem.grad_output)
    names = {event.key for event in profile.key_averages()}
    assert {problem.name, f"{problem.name}Backward"} <= names
    assert not [name for name in names if name.startswith("dlu_triton::")]


def test_class_activation_maps_take_the_same_ways(device, monkeypatch):
    ways, op = [], cam_ops.class_activation_map_op
    for way in ("launch", "twin", "op"):
        run = getattr(op, way)
        monkeypatch.setattr(op, way, lambda *args, way=way, run=run: (ways.append(way), run(*args))[1])
    a = torch.rand(1, 3, 2, 4, dtype=torch.float64, device=device)
    expected = reference.xgrad_cam(a, a)
    torch.testing.assert_close(dlu_triton.xgrad_cam(a, a), expected)
    with Record() as record:
        torch.testing.assert_close(dlu_triton.xgrad_cam(a, a), expected)
    with forward_ad.dual_level():
        torch.testing.assert_close(dlu_triton.xgrad_cam(a, a), expected)
    torch.testing.assert_close(torch.vmap(dlu_triton.xgrad_cam)(a[None], a[None])[0], expected)
    assert record.seen.count("dlu_triton::class_activation_map") == 1
    # The Function of a transform is taken apart, and folded into a plain call.
    assert [way for way in ways if way != "twin" or not KERNELS] == (
        ["launch", "op", "launch"] if KERNELS else ["twin", "op", "twin", "twin", "twin"]
    )


# ---------------------------------------------------------------------------------------------------------------
# Modes and subclasses
# ---------------------------------------------------------------------------------------------------------------


@every_operator
def test_dispatch_modes_see_one_operator(problem, taken):
    with Record() as forward:
        output = problem.call(*problem.tensors)
    problem.check(output)
    assert forward.seen == [f"dlu_triton::{problem.name}"]
    leaves = problem.leaves()
    with Record(), Record() as outer:  # an outer mode sees what the inner one does, which is no more
        output = problem.call(*leaves)
        gradients = torch.autograd.grad(output, leaves, problem.grad_output)
    problem.check(output, gradients)
    registered = [name for name in outer.seen if name.startswith("dlu_triton::")]
    assert registered == [f"dlu_triton::{problem.name}", f"dlu_triton::{problem.name}_backward"]
    assert not [name for name in outer.seen if name.startswith("aten::") and name != "aten::detach"]
    ops = [way for way in taken if way.startswith("op ")]
    assert ops == [f"op {problem.name}"] * 2 + [f"op {problem.name}_backward"]


@every_operator
def test_a_mode_that_ends_or_starts_between_the_passes(problem):
    """Of the two passes each goes its own way."""
    leaves = problem.leaves()
    with Record():
        output = problem.call(*leaves)
    problem.check(output, torch.autograd.grad(output, leaves, problem.grad_output))
    output = problem.call(*leaves)
    with Record() as record:
        gradients = torch.autograd.grad(output, leaves, problem.grad_output)
    problem.check(output, gradients)
    if KERNELS:
        assert record.seen == [f"dlu_triton::{problem.name}_backward"]
    else:  # the graph of the twin
        assert not [name for name in record.seen if name.startswith("dlu_triton::")]


@every_operator
def test_derivatives_of_gradients_under_a_mode(problem):
    leaves = problem.leaves()

    def second_order():
        first = torch.autograd.grad(problem.call(*leaves), leaves, problem.grad_output, create_graph=True)
        return torch.autograd.grad(sum((each**2).sum() for each in first), leaves)

    expected = second_order()
    with Record():
        torch.testing.assert_close(second_order(), expected)


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize("mode", ("fake", "meta"))
@every_operator
def test_fake_and_meta_tensors_compute_nothing(problem, mode, memory_format, launched, monkeypatch):
    monkeypatch.setattr(problem.op, "twin", None)
    monkeypatch.setattr(problem.op.gradients, "twin", None)
    tensors = [tensor.contiguous(memory_format=memory_format) for tensor in (*problem.tensors, problem.grad_output)]
    if mode == "fake":
        fake = FakeTensorMode()
        leaves = [fake.from_tensor(tensor).requires_grad_() for tensor in tensors]
    else:
        leaves = [tensor.to("meta").requires_grad_() for tensor in tensors]
    output = problem.call(*leaves[:-1])
    gradients = torch.autograd.grad(output, leaves[:-1], leaves[-1].detach())
    for found, like in zip((output, *gradients), (tensors[-1], *tensors[:-1]), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (like.shape, like.dtype, like.stride())
        assert found.device == (like.device if mode == "fake" else torch.device("meta"))
    assert not launched


@pytest.mark.skipif(KERNELS, reason="test_complexity.py has it")
@pytest.mark.parametrize("operator", CALLS)
def test_flops_are_counted(operator, device):
    """The literals of test_complexity.py, and at the same time a pass that is right."""
    names, call = CALLS[operator]
    leaves = [torch.randn(2, *SHAPES[name], device=device, requires_grad=True) for name in names]
    output = call(*leaves)
    upstream = torch.randn_like(output)
    expected = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    forward, backward = {f"dlu_triton.{operator}": FORWARD[operator]}, {}
    backward[f"dlu_triton.{operator}_backward"] = BACKWARD[operator][" ".join(names)]
    found = []
    assert counts(lambda: found.extend(torch.autograd.grad(call(*leaves), leaves, upstream))) == forward | backward
    torch.testing.assert_close(found, list(expected))
    assert counts(lambda: call(*[leaf.detach() for leaf in leaves])) == forward
    # After a forward pass outside, the eager twin has left a graph of sums and products, which count as none.
    assert counts(lambda: torch.autograd.grad(output, leaves, upstream)) == {}


class Wrapped(torch.Tensor):
    """A tensor that records the operators it is given to."""

    seen: ClassVar = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device,
            requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function.name())
        inner = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs or {}))
        results = function(*inner[0], **inner[1])
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, results)


@every_operator
def test_subclasses_see_one_operator(problem):
    leaves = [Wrapped(tensor).requires_grad_() for tensor in problem.tensors]
    Wrapped.seen.clear()
    output = problem.call(*leaves)
    output.backward(Wrapped(problem.grad_output))
    registered = [name for name in Wrapped.seen if name.startswith("dlu_triton::")]
    assert registered == [f"dlu_triton::{problem.name}", f"dlu_triton::{problem.name}_backward"]
    assert all(type(found) is Wrapped for found in (output, *(leaf.grad for leaf in leaves)))
    problem.check(output.inner, [leaf.grad.inner for leaf in leaves])


class Functions(torch.Tensor):
    """A tensor that records the functions of PyTorch that it is given to."""

    seen: ClassVar = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@every_operator
def test_subclasses_by_functions(problem):
    """They take part, and results are of their type; one such argument is enough."""
    Functions.seen.clear()
    leaves = [tensor.clone().as_subclass(Functions).requires_grad_() for tensor in problem.tensors]
    output = problem.call(*leaves)
    assert type(output) is Functions
    assert problem.op.op in Functions.seen
    output.backward(problem.grad_output)
    problem.check(output.as_subclass(torch.Tensor), [leaf.grad.as_subclass(torch.Tensor) for leaf in leaves])
    plain = problem.leaves()
    mixed = problem.call(*plain[:-1], plain[-1].as_subclass(Functions))
    mixed.backward(problem.grad_output)
    problem.check(mixed.as_subclass(torch.Tensor), [leaf.grad.as_subclass(torch.Tensor) for leaf in plain])


# ---------------------------------------------------------------------------------------------------------------
# Transforms and tracing
# ---------------------------------------------------------------------------------------------------------------


@every_operator
def test_transforms_launch(problem, taken, launched):
    """`torch.func` takes the Function apart down to plain tensors, which kernels compute."""
    output, pull = torch.func.vjp(problem.call, *problem.tensors)
    problem.check(output, pull(problem.grad_output))
    assert bool(launched) == KERNELS
    assert not [way for way in taken if way.startswith("op ")]
    launched.clear()
    batched = torch.vmap(problem.call)(*(torch.stack([tensor, tensor]) for tensor in problem.tensors))
    problem.check(batched[1])
    assert bool(launched) == KERNELS
    launched.clear()
    of_features = torch.func.grad(lambda *tensors: (problem.call(*tensors) * problem.grad_output).sum())
    gradients = torch.vmap(of_features)(*(torch.stack([tensor, tensor]) for tensor in problem.tensors))
    torch.testing.assert_close(gradients[0], list(problem.expected.values())[1])
    assert bool(launched) == KERNELS


@every_operator
def test_forward_mode_takes_the_twin(problem, taken):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, tensor.flip(1)) for tensor in problem.tensors]
        value, tangent = forward_ad.unpack_dual(problem.call(*duals))
    problem.check(value)
    assert taken == [f"twin {problem.name}"]
    # The tangent times the upstream gradient is the gradients times their directions.
    gradients = list(problem.expected.values())[1:]
    pairs = zip(gradients, problem.tensors, strict=True)
    expected = sum((gradient * tensor.flip(1)).sum() for gradient, tensor in pairs)
    torch.testing.assert_close((tangent * problem.grad_output).sum(), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_operator
def test_jit_traces_compute_again(problem):
    traced = torch.jit.trace(problem.call, tuple(tensor.flip(1) for tensor in problem.tensors))
    problem.check(traced(*problem.tensors))
    kinds = {node.kind() for node in traced.graph.nodes()}
    if KERNELS:
        assert f"dlu_triton::{problem.name}" in kinds
        assert not [kind for kind in kinds if kind.startswith("aten::")]
    else:
        assert not [kind for kind in kinds if kind.startswith("dlu_triton::")]


# ---------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------


@every_operator
def test_saved_tensors_may_be_packed(problem):
    with torch.autograd.graph.save_on_cpu():
        problem.train()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (packed.append(tensor.shape), tensor.cpu().numpy().copy())[1],
        lambda array: torch.from_numpy(array).to(problem.grad_output.device),
    ):
        problem.train()
    if KERNELS:
        assert packed == [tensor.shape for tensor in problem.tensors]


@pytest.mark.parametrize("use_reentrant", (False, True))
@every_operator
def test_checkpoints_compute_twice(problem, use_reentrant, taken):
    problem.train(lambda *tensors: checkpoint(problem.call, *tensors, use_reentrant=use_reentrant))
    assert taken.count(f"{'launch' if KERNELS else 'twin'} {problem.name}") == 2


@pytest.mark.parametrize("policy", ("save", "recompute", "list"))
@every_operator
def test_selective_checkpoints_see_the_operator(problem, policy, taken, launched):
    """And compute it once if they save its result."""
    op = getattr(torch.ops.dlu_triton, problem.name).default
    met = []

    def decide(context, function, *arguments, **options):
        met.append(function)
        return CheckpointPolicy.MUST_SAVE if policy == "save" else CheckpointPolicy.MUST_RECOMPUTE

    problem.train(
        lambda *tensors: checkpoint(
            lambda *tensors: problem.call(*(tensor * 1.0 for tensor in tensors)),
            *tensors,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts([op] if policy == "list" else decide),
        )
    )
    if policy != "list":
        assert op in met
    forward = [way for way in taken if way == f"twin {problem.name}"]
    times = 2 if policy == "recompute" else 1
    if KERNELS:
        backward = {"dlu_upsample": 4, "expand_kernels": 3}.get(problem.name, 2)
        assert len(launched) == times * (1 if "carafe" in problem.name else 2) + backward
    else:  # once more, where the gradients are those of the twin
        assert len(forward) == times + 1


@pytest.mark.filterwarnings("ignore:Error detected in", "ignore:Anomaly Detection has been enabled")
@every_operator
def test_anomalies_are_found(problem):
    leaves = problem.leaves()
    with torch.autograd.detect_anomaly(check_nan=True):
        problem.train()
        output = problem.call(*leaves)
        where = f"Function '{problem.name}Backward' returned nan values" if KERNELS else "returned nan values"
        with pytest.raises(RuntimeError, match=where):
            output.backward(problem.grad_output * float("nan"))


@every_operator
def test_hooks_and_graphs_that_are_kept(problem):
    leaves, sent, arrived = problem.leaves(), [], []
    output = problem.call(*leaves)
    output.register_hook(lambda gradient: (sent.append(gradient.clone()), 2 * gradient)[1])
    leaves[0].register_hook(lambda gradient: arrived.append(gradient.clone()))
    output.backward(problem.grad_output, retain_graph=True)
    torch.testing.assert_close(sent, [problem.grad_output])
    problem.check(output, [leaf.grad / 2 for leaf in leaves])
    torch.testing.assert_close(arrived, [leaves[0].grad])
    output.backward(problem.grad_output)  # gradients add up
    problem.check(output, [leaf.grad / 4 for leaf in leaves])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward(problem.grad_output)


@every_operator
def test_gradients_add_up_over_calls(problem):
    leaves = problem.leaves()
    for _ in range(3):
        problem.call(*leaves).backward(problem.grad_output)
    problem.check(problem.expected["output"], [leaf.grad / 3 for leaf in leaves])


@every_operator
def test_changed_inputs_are_noticed(problem):
    """Kernels need the inputs for gradients, and refuse; eager twins may have kept what they need."""
    for changed in range(len(problem.tensors)):
        leaves = problem.leaves()
        output = problem.call(*leaves)
        with torch.no_grad():
            leaves[changed].add_(1)
        refused = pytest.raises(RuntimeError, match="inplace") if KERNELS else contextlib.suppress(RuntimeError)
        with refused:
            problem.check(output, torch.autograd.grad(output, leaves, problem.grad_output))


@every_operator
def test_outputs_may_be_changed(problem):
    leaves = problem.leaves()
    output = problem.call(*leaves)
    output.mul_(2)
    output.backward(problem.grad_output)
    problem.check(output / 2, [leaf.grad / 2 for leaf in leaves])


def test_gradients_by_finite_differences(device):
    problem = Problem("dlu_upsample", device, case=Case("", channels=1, height=1, width=2, kernel_size=1, reach=0.1))
    with Record():  # without, test_operators.py has it
        torch.autograd.gradcheck(problem.call, problem.leaves(), nondet_tol=1e-12, fast_mode=True)


# ---------------------------------------------------------------------------------------------------------------
# Registered operators
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@every_operator
def test_registered_operators_by_themselves(problem, memory_format):
    """Values, and the strides that fake tensors promise."""
    tensors = [tensor.contiguous(memory_format=memory_format) for tensor in (*problem.tensors, problem.grad_output)]
    flags = (True,) * len(problem.tensors)
    output = problem.op.op(*tensors[:-1], *problem.settings)
    gradients = problem.op.gradients.op(tensors[-1], *tensors[:-1], *problem.settings, *flags)
    problem.check(output, gradients)
    for found, like in zip((output, *gradients), (tensors[-1], *tensors[:-1]), strict=True):
        assert found.stride() == like.stride()
    one = problem.op.gradients.op(tensors[-1], *tensors[:-1], *problem.settings, *(False,) * (len(flags) - 1), True)
    torch.testing.assert_close(one, gradients[-1:])


@pytest.mark.skipif(KERNELS, reason="test_operators.py has it")
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
@every_operator
def test_opcheck(problem, memory_format):
    leaves = [tensor.contiguous(memory_format=memory_format).requires_grad_() for tensor in problem.tensors]
    torch.library.opcheck(problem.op.op, (*leaves, *problem.settings))
    tensors = [leaf.detach() for leaf in leaves]
    flags = (True,) * len(leaves)
    torch.library.opcheck(problem.op.gradients.op, (problem.grad_output, *tensors, *problem.settings, *flags))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "0", reason="is what it starts")
def test_on_a_cpu_without_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    files = (__file__, Path(__file__).with_name("test_devices.py"))
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-8000:]
    assert " passed" in process.stdout
