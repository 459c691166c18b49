"""How a call is timed: by CUDA events on a GPU, by the wall clock on a CPU."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

CALIBRATION_CALLS = 5
HOST_CALLS = 50


class Instant:
    """A mark on the current CUDA stream; `later - earlier` is the device time between two marks, in seconds.

    As pytest-benchmark's timer it is called right before and right after the timed call, and the two are subtracted.
    Making a mark only enqueues it: the device meets the flush, the first mark, the kernels of the call and the second
    mark in this order, and the host waits nowhere before the subtraction, when all of them are in the queue. So the
    flush is outside the marks, and no synchronisation is between them.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: "Instant") -> float:
        self._event.synchronize()  # marks of one stream pass in order, so the earlier one has passed too
        return earlier._event.elapsed_time(self._event) / 1e3  # from milliseconds


def timer(device: str) -> Callable[[], Any]:
    """The timer for pytest-benchmark; what it returns is only ever subtracted."""
    return Instant if device == "cuda" else time.perf_counter


class HeadStart:
    """What precedes every round on a GPU: work of the device for longer than the host needs to issue the call.

    A small call runs faster than Python can launch it. While the device is busy, the host enqueues the whole call, so
    the marks enclose kernels that follow each other and no waiting for launches.
    """

    def __init__(self) -> None:
        self._units = 1
        self()  # the first launch loads the kernel
        start = Instant()
        for _ in range(CALIBRATION_CALLS):
            self()
        self._unit_seconds = (Instant() - start) / CALIBRATION_CALLS

    def __call__(self) -> None:
        raise NotImplementedError

    def cover(self, host_seconds: float) -> None:
        """Work for at least twice the time that the host takes to issue the call."""
        self._units = max(math.ceil(2 * host_seconds / self._unit_seconds), 1)


class Flush(HeadStart):
    """Zeros over more than the L2 cache.

    Inputs left in the cache by the round before would be read from there; the zeros push them out. They leave the
    cache full of unwritten lines, as any kernel before the call would: writing these back costs the call about what
    it saves by leaving its own last lines unwritten.
    """

    MOST_PASSES = 400  # a stream takes about a thousand launches before it makes the host wait

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._zeros = torch.empty(max(2 * cache, 2**28), dtype=torch.int8, device="cuda")
        super().__init__()

    def __call__(self) -> None:
        for _ in range(min(self._units, self.MOST_PASSES)):
            self._zeros.zero_()


class Spin(HeadStart):
    """Counting of clock cycles, which leaves in the L2 cache what the round before left there."""

    CYCLES = 2**20  # about half a millisecond

    def __call__(self) -> None:
        torch.cuda._sleep(self._units * self.CYCLES)


def host_seconds(call: Callable[[], object]) -> float:
    """Median time until a call gives control back to the host, while the device has nothing else to do."""
    seconds = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def device_seconds(call: Callable[[], object], ahead: HeadStart, rounds: int) -> float:
    """Median device time of a call, outside of pytest-benchmark."""
    seconds = []
    for _ in range(rounds):
        ahead()
        start = Instant()
        call()
        seconds.append(Instant() - start)
    return statistics.median(seconds)
