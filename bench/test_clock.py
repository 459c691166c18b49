"""The clock on a simulated GPU: a host that launches, and a device that works off its launches in order."""

import time
from types import SimpleNamespace

import clock
import pytest
import torch

LAUNCH = 10e-6  # seconds of the host per launch
KERNEL = 2e-6  # seconds of the device per kernel of the timed call
ZEROS = 100e-6  # seconds of the device per flush
KERNELS = 50


class Machine:
    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, seconds: float) -> None:
        self.host += LAUNCH
        self.device = max(self.device, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.host, self.device)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
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
    zeros = SimpleNamespace(zero_=lambda: machine.launch(ZEROS))
    monkeypatch.setattr(torch, "empty", lambda size, **_: zeros)
    monkeypatch.setattr(time, "perf_counter", lambda: machine.host)
    return machine


def test_only_the_kernels_of_the_call_are_timed(machine: Machine) -> None:
    def call() -> None:
        for _ in range(KERNELS):
            machine.launch(KERNEL)

    flush = clock.Flush()
    host_seconds = clock.issue_seconds(call)
    assert host_seconds == pytest.approx(KERNELS * LAUNCH)
    flush.cover(host_seconds)
    for _ in range(3):  # as pytest-benchmark runs a round
        flush()
        start = clock.Instant()
        call()
        end = clock.Instant()
        assert end - start == pytest.approx(KERNELS * KERNEL)


def test_without_a_head_start_the_launches_would_be_timed(machine: Machine) -> None:
    start = clock.Instant()
    for _ in range(KERNELS):
        machine.launch(KERNEL)
    assert clock.Instant() - start > KERNELS * KERNEL * 2
