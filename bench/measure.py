"""What is measured of a call besides its accuracy: time, memory, launches, and how often the host waits."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import clock
import torch
import triton
from torch import Tensor

os.environ.setdefault("TEARDOWN_CUPTI", "1")  # read when a profile ends: none goes on while the next call is timed
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_KERNELS = DEVICE == "cuda" or triton.knobs.runtime.interpret
TIMER = clock.timer(DEVICE)
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = (0.2, 5, 100) if DEVICE == "cuda" else (0.3, 5, 50)


def selection(*, full: bool) -> str:
    """Which cases are run here."""
    if DEVICE == "cuda":
        return "full" if full else "quick"
    return "interpreted" if RUNS_KERNELS else "cpu"


def device_time(benchmark: Any, call: Callable[[], Iterable[Any]], *, replays: bool) -> dict[str, Any]:
    """Run the rounds of a benchmark whose timer is TIMER, and return what else was measured of the device.

    With `replays` also as a CUDA graph, unless the call waits for the device, which a graph cannot hold.
    """

    def run() -> None:
        call()  # a result that was kept would take memory from the next round

    if DEVICE == "cpu":
        benchmark.pedantic(run, rounds=_rounds(run, TIMER), warmup_rounds=1)
        return {}
    found = {"peak_extra_bytes": peak_extra_bytes(call), "host_waits": host_waits(run)}
    host_seconds, rounds = clock.host_seconds(run), _rounds(run, TIMER)
    _flush().cover(host_seconds)
    benchmark.pedantic(run, setup=_flush(), rounds=rounds, warmup_rounds=rounds)  # a GPU may have to raise its clocks
    _spin().cover(host_seconds)
    found |= {"host_us": 1e6 * host_seconds, "warm_seconds": clock.device_seconds(run, _spin(), rounds)}
    if replays and found["host_waits"] == 0:
        found["replay_seconds"] = replay_seconds(call)
    return found | {"launches": launches(run)}  # last: a profiler may slow down what follows it


def user_time(benchmark: Any, call: Callable[[], Iterable[Any]], memory_before: int) -> dict[str, Any]:
    """Run the rounds of a benchmark by the wall clock, until the device is done, as a user waits for a result.

    What calls leave behind counts as theirs: `memory_before` was allocated before the first one.
    """

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    found = {}
    if DEVICE == "cuda":
        extra = peak_extra_bytes(call, memory_before)
        found = {"peak_extra_bytes": extra, "host_waits": host_waits(call)}
    rounds = _rounds(run, time.perf_counter)
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=min(rounds, 10) if DEVICE == "cuda" else 1)
    return found | ({"launches": launches(call)} if DEVICE == "cuda" else {})


def allocated_bytes() -> int:
    """What tensors on the GPU have asked for; the allocator gives large ones up to a MiB more."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"] if DEVICE == "cuda" else 0


def peak_extra_bytes(call: Callable[[], Iterable[Any]], before: int | None = None) -> int:
    """GPU memory that a call takes at its peak, beyond its inputs and what it returns.

    What it returns counts from the beginning, as if it were there before the call.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = allocated_bytes() if before is None else before
    returned = sum(value.nbytes for value in call() if isinstance(value, Tensor) and value.device.type == DEVICE)
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - returned


def launches(call: Callable[[], object]) -> int | None:
    """How many kernels a call runs on the GPU; copies and fills by the driver are none. None without a profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names) if names else None


def host_waits(call: Callable[[], object]) -> int:
    """How often the host waits for the device during a call, as far as PyTorch knows."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def replay_seconds(call: Callable[[], object]) -> float:
    """Median device time of a CUDA graph of the call, which the host launches as one: no gaps between its kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call sets up cannot be captured
        for _ in range(clock.CALIBRATION_CALLS):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()  # the memory that the graph writes to
    _flush().cover(clock.host_seconds(graph.replay))
    seconds = clock.device_seconds(graph.replay, _flush(), MOST_ROUNDS)
    del kept
    return seconds


def _rounds(run: Callable[[], None], timer: Callable[[], Any]) -> int:
    run()
    start = timer()
    run()
    rounds = math.ceil(SECONDS / max(timer() - start, 1e-6))
    return min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)


@cache
def _flush() -> clock.Flush:
    return clock.Flush()


@cache
def _spin() -> clock.Spin:
    """Made after the first rounds, when the clocks are up: its cycles would be too few of a GPU that wakes up."""
    return clock.Spin()
