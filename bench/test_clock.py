"""What is measured, on a simulated GPU: a host that launches, and a device that works off its launches in order.

And an allocator that counts.
"""

import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import accuracy
import clock
import measure
import pytest
import torch
from cases import BACKWARD, BOTH, FORWARD, STEP
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAUNCH = 10e-6  # seconds of the host per launch
KERNEL = 2e-6  # seconds of the device per kernel of the timed call
ZEROS = 100e-6  # seconds of the device per flush
KERNELS = 50
HERTZ = 2e9


class Machine:
    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.cached = False

    def launch(self, seconds: float) -> None:
        self.host += LAUNCH
        self.device = max(self.device, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def flush(self) -> None:
        self.cached = False
        self.launch(ZEROS)

    def sleep(self, cycles: int) -> None:
        self.launch(cycles / HERTZ)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            machine.launch(0)
            self.passed = machine.device

        def synchronize(self) -> None:
            machine.host = max(machine.host, self.passed)

        def elapsed_time(self, end: "Event") -> float:
            assert machine.host >= end.passed, "elapsed_time before the event has passed"
            return 1e3 * (end.passed - self.passed)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.wait)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 * 2**20))
    monkeypatch.setattr(torch.cuda, "_sleep", machine.sleep)
    zeros = SimpleNamespace(zero_=machine.flush)
    monkeypatch.setattr(torch, "empty", lambda size, **_: zeros)
    monkeypatch.setattr(time, "perf_counter", lambda: machine.host)
    for kept in (measure._flush, measure._spin):
        kept.cache_clear()
    yield machine
    for kept in (measure._flush, measure._spin):
        kept.cache_clear()


@pytest.mark.parametrize("ahead", [clock.Flush, clock.Spin])
def test_only_the_kernels_of_the_call_are_timed(machine: Machine, ahead: Callable[[], clock.HeadStart]) -> None:
    def call() -> None:
        for _ in range(KERNELS):
            machine.launch(KERNEL)

    head_start = ahead()
    host_seconds = clock.host_seconds(call)
    assert host_seconds == pytest.approx(KERNELS * LAUNCH)
    head_start.cover(host_seconds)
    for _ in range(3):  # as pytest-benchmark runs a round
        head_start()
        start = clock.Instant()
        call()
        end = clock.Instant()
        assert end - start == pytest.approx(KERNELS * KERNEL)


def test_without_a_head_start_the_launches_would_be_timed(machine: Machine) -> None:
    start = clock.Instant()
    for _ in range(KERNELS):
        machine.launch(KERNEL)
    assert clock.Instant() - start > KERNELS * KERNEL * 2


def test_what_a_record_has_of_the_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    cold, warm = 5 * KERNEL, KERNEL  # of a call of one kernel, which runs faster on what is left in the cache
    waits, mode = False, "default"
    memory = {"requested_bytes.all.current": 1000, "requested_bytes.all.peak": 1000}

    def call() -> tuple[()]:
        memory["requested_bytes.all.peak"] = 1640
        machine.launch(warm if machine.cached else cold)
        machine.cached = True
        if waits and mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return ()

    def set_mode(name: str) -> None:
        nonlocal mode
        mode = name

    def pedantic(run: Callable[[], None], setup: clock.Flush, rounds: int, warmup_rounds: int) -> None:
        for _ in range(warmup_rounds + rounds):
            setup()
            start = measure.TIMER()
            run()
            assert measure.TIMER() - start == pytest.approx(cold)

    cuda, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [SimpleNamespace(name=name, device_type=cuda) for name in ("a kernel", "Memcpy DtoH", "Memset", "another")]
    events.append(SimpleNamespace(name="aten::add", device_type=host))
    profile = SimpleNamespace(events=lambda: events)
    graph = SimpleNamespace(replay=call)
    mocks: dict[Any, dict[str, Any]] = {
        measure: {"DEVICE": "cuda", "TIMER": clock.Instant},
        torch.profiler: {"profile": lambda activities: nullcontext(profile)},
        torch.cuda: {
            "memory_stats": lambda: memory,
            "reset_peak_memory_stats": lambda: None,
            "set_sync_debug_mode": set_mode,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
            "current_stream": lambda: None,
            "stream": nullcontext,
            "CUDAGraph": lambda: graph,
            "graph": nullcontext,
        },
    }
    for module, functions in mocks.items():
        for name, function in functions.items():
            monkeypatch.setattr(module, name, function)
    benchmark = SimpleNamespace(pedantic=pedantic)
    assert measure.device_time(benchmark, call, replays=True) == {
        "peak_extra_bytes": 640,
        "launches": 2,
        "host_waits": 0,
        "host_us": pytest.approx(1e6 * LAUNCH),
        "warm_seconds": pytest.approx(warm),
        "replay_seconds": pytest.approx(cold),
    }

    waits = True
    found = measure.device_time(benchmark, call, replays=True)
    assert found["host_waits"] == 1
    assert "replay_seconds" not in found


# ---------------------------------------------------------------------------------------------------------------
# Memory, of a simulated allocator
# ---------------------------------------------------------------------------------------------------------------


class Allocator(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stats = dict.fromkeys(("requested_bytes.all.current", "requested_bytes.all.peak"), 0)
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self.stats["requested_bytes.all.current"] += size
        self.reset(max(self.stats.values()))

    def _free(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.stats["requested_bytes.all.current"] -= size

    def reset(self, peak: int | None = None) -> None:
        self.stats["requested_bytes.all.peak"] = self.stats["requested_bytes.all.current"] if peak is None else peak


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocator]:
    with Allocator() as allocator:
        monkeypatch.setattr(measure, "DEVICE", "cpu")
        monkeypatch.setattr(measure, "allocated_bytes", lambda: allocator.stats["requested_bytes.all.current"])
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda: allocator.stats)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocator.reset)
        yield allocator


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH, STEP])
@pytest.mark.parametrize("keeps", [False, True])
def test_memory_is_that_beyond_inputs_output_and_gradients(allocator: Allocator, direction: str, keeps: bool) -> None:
    size = 4 * 1000  # of each tensor, in bytes

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return (x.sigmoid() if keeps else x) * weight

    # What its graph keeps is there before `backward`, which needs a gradient of it. The momentum is there before a
    # `step`, which needs as much for the decay of the weight.
    expected = {FORWARD: (0, 1), BACKWARD: (0, 1), BOTH: (0, 2), STEP: (1, 2)}[direction][keeps] * size
    x, gradient = torch.randn(1000, requires_grad=True), torch.randn(1000)
    weight = torch.nn.Parameter(torch.randn(1000))
    call = accuracy.ready(function, direction, (x, weight), gradient)
    call()
    assert measure.peak_extra_bytes(call) == expected
    before = measure.allocated_bytes()
    call()
    assert measure.allocated_bytes() == before
