"""Times what the host does for a call of an operator in eager code, beside other ways and a Function that does nothing.

On a CPU that is without the driver's own work, see `host.py`.
"""

from typing import Any

import cases
import host
import measure
import pytest
import torch
import triton

ROUNDS, WARM_UP = 2000 if measure.DEVICE == "cuda" else 10000, 200  # a second each, for neighbours to go by


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter launches nothing")
@pytest.mark.parametrize("run", [pytest.param(run, id="-".join(run)) for run in host.RUNS])
def test_host(benchmark: Any, run: host.Run) -> None:
    """The device is idle when a call begins, so that it never waits for a place in the queue."""
    benchmark.group = host.GROUP
    benchmark.extra_info |= {
        "op": run.op,
        "impl": run.impl,
        "pass": run.direction,
        "dtype": host.CASE.dtype,
        "layout": host.CASE.layout,
        "shape": cases.shape(run.op, host.CASE),
    }
    setup = torch.cuda.synchronize if measure.DEVICE == "cuda" else None
    with host.call(run) as timed:
        benchmark.pedantic(timed, setup=setup, rounds=ROUNDS, warmup_rounds=WARM_UP)


@pytest.mark.skipif(measure.RUNS_KERNELS, reason="there is no stub")
@pytest.mark.parametrize("op", host.SUBJECTS)
def test_the_stub_stands_in_for_the_kernels_and_leaves_nothing_behind(op: str) -> None:
    """Outputs are not computed, by either way; afterwards they are again."""
    subject = host.SUBJECTS[op]
    tensors = [tensor.detach() for tensor in cases.inputs(op, host.CASE, "cpu").values()]
    ways = (subject.public, subject.operator.op)
    expected = subject.operator.twin(*tensors, *subject.settings)
    launched = []
    for impl in (host.OURS, host.REGISTERED):
        with host.call(host.Run(op, cases.BOTH, impl)) as timed, pytest.MonkeyPatch.context() as patch:
            patch.setattr(host.StubDriver.launcher_cls, "__call__", lambda *arguments: launched.append(arguments))
            patch.setattr(subject.operator, "twin", None)
            assert [each.shape for each in timed()] == [tensor.shape for tensor in tensors]
            assert not launched  # for the first time, when kernels would be compiled
            timed()
        assert len(launched) == (6 if op == cases.DLU else 3)
        launched.clear()
    for way in ways:
        torch.testing.assert_close(way(*tensors, *subject.settings), expected)
