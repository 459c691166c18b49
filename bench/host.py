"""What the host does for a call in eager code: the operators, what they could cost, and their parts.

python bench/host.py

prints as a JSON object how many functions each such call calls, which no neighbour on the machine changes.
`test_host.py` times them.

Without a GPU a stub takes the driver's place, and the operators launch their kernels on tiny CPU tensors: all that
Python and PyTorch do is done, but nothing is handed to a driver, and nothing computed.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import cases
import torch
import torch.nn.functional as F
import triton
from cases import BOTH, CARAFE, DLU, FORWARD, LOGITS, P5, Case
from measure import DEVICE
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import dlu_triton
from dlu_triton import _checks, _launch
from dlu_triton.ops import carafe, dlu
from dlu_triton.ops._registration import Operator

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from compile_kernels import StubDriver

GROUP = "host"  # of pytest-benchmark, by which the report tells these records from others
GRAPH = "forward with a graph"  # to be differentiated, which it is not
PASSES = (FORWARD, GRAPH, BOTH)
CASE = Case(2, 256, *P5, dtype="float32") if DEVICE == "cuda" else Case(1, 1, 1, 2, dtype="float32")


class Subject(NamedTuple):
    public: Callable[..., Tensor]
    checks: Callable[..., object]
    operator: Operator
    settings: tuple[int, int, int, None]


SUBJECTS = {
    DLU: Subject(
        dlu_triton.dlu_upsample, _checks.dlu_upsample, dlu.dlu_upsample_op, (CASE.scale, CASE.kernel, 1, None)
    ),
    CARAFE: Subject(dlu_triton.carafe, _checks.carafe, carafe.carafe_op, (CASE.kernel, 1, CASE.scale, None)),
    LOGITS: Subject(
        dlu_triton.carafe_upsample,
        _checks.carafe_upsample,
        carafe.carafe_upsample_op,
        (CASE.scale, CASE.kernel, 1, None),
    ),
}
OURS, REGISTERED, GRID_SAMPLE, FUNCTION, CHECKS, LAUNCHES = (
    "dlu_triton", "registered", "grid_sample", "Function", "checks", "launches",
)  # fmt: skip


class Run(NamedTuple):
    op: str
    direction: str
    impl: str


RUNS = [
    Run(op, direction, impl)
    for op in SUBJECTS
    for direction in PASSES
    for impl in (OURS, REGISTERED, GRID_SAMPLE, FUNCTION, CHECKS, LAUNCHES)
    if direction != GRAPH or impl not in (CHECKS, LAUNCHES)  # they are those of `forward`
]


@contextmanager
def call(run: Run) -> Iterator[Callable[[], object]]:
    """The call that is timed; inside, operators launch their kernels even without a GPU."""
    subject = SUBJECTS[run.op]
    operator, settings = subject.operator, subject.settings
    tensors = list(cases.inputs(run.op, CASE, DEVICE).values())
    gradient = cases.upstream(run.op, CASE, DEVICE)
    if run.impl == GRID_SAMPLE:
        tensors = [tensors[0], torch.rand(CASE.n, *gradient.shape[2:], 2, device=DEVICE).requires_grad_()]
    if run.direction == FORWARD or run.impl == LAUNCHES:
        tensors = [tensor.detach() for tensor in tensors]
    function = {
        OURS: subject.public,
        REGISTERED: subject.public,
        GRID_SAMPLE: _grid_sample,
        FUNCTION: _function(gradient.shape),
        CHECKS: subject.checks,
        LAUNCHES: operator.launch,
    }[run.impl]
    settings = () if run.impl in (GRID_SAMPLE, FUNCTION) else settings

    def forward() -> object:
        return function(*tensors, *settings)

    def both() -> object:
        return torch.autograd.grad(function(*tensors, *settings), tensors, gradient)

    def launches() -> object:
        function(*tensors, *settings)
        return operator.gradients.launch(gradient, *tensors, *settings, *(True for _ in tensors))

    with ExitStack() as stack:
        if DEVICE == "cpu":
            stack.enter_context(_stub(operator))
        if run.impl == REGISTERED:  # and its gradients by the one that is registered for them
            stack.enter_context(mock.patch.object(Operator, "__call__", lambda self, *arguments: self.op(*arguments)))
        yield forward if run.direction != BOTH or run.impl == CHECKS else launches if run.impl == LAUNCHES else both


def _grid_sample(features: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(features, grid, align_corners=False)


def _function(shape: Sequence[int]) -> Callable[..., Tensor]:
    """The least that anything with gradients written in Python costs: it allocates what it returns."""

    class Least(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return tensors[0].new_empty(shape)

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
            return tuple(map(torch.empty_like, ctx.saved_tensors))

    return Least.apply


@triton.jit
def _nothing():
    pass


@contextmanager
def _stub(operator: Operator) -> Iterator[None]:
    """In place of the driver, and of every kernel one that does nothing: all are launched alike."""
    every = (operator, operator.gradients)
    with mock.patch.object(triton.runtime.driver, "_active", StubDriver(GPUTarget("cuda", 90, 32))):
        compiled = _nothing[(1,)]()
        for each in every:
            torch.library.register_kernel(each.op, "cpu", each._as_registered(each.launch))
        try:
            with (
                mock.patch.object(JITFunction, "run", return_value=compiled),
                mock.patch.object(_launch, "runs_kernels", _runs_kernels),
            ):
                yield
        finally:
            _launch.forget_launches()
            for each in every:
                torch.library.register_kernel(each.op, "cpu", each._as_registered(each._by_twin))


def _runs_kernels(tensor: object) -> bool:
    """As costly as what it replaces."""
    return isinstance(tensor, Tensor) and tensor.device.type == "cpu"


def calls(function: Callable[[], object]) -> int:
    """Functions that it calls, of Python, and of C from Python."""
    events: list[str] = []
    function()
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events)


def main() -> None:
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for run in RUNS:
        with call(run) as counted:
            counts.setdefault(run.op, {}).setdefault(run.direction, {})[run.impl] = calls(counted)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
