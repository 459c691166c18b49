"""A Triton driver that launches kernels on CPU tensors by the emulator, for a CUDA target that is not here."""

import contextlib
import hashlib
import os
import pathlib
import pickle
import sys
import threading
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from .findings import Report
from .machine import Launch, Options, Program

SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}  # bytes that a block can have
TARGETS = {f"sm_{arch}": arch for arch in SHARED}
MARK = "emulated\n"  # begins what stands for a cubin
lock = threading.RLock()


class State:
    """Options and report of the innermost `running`."""

    def __init__(self) -> None:
        self.options, self.report = Options(), Report()


state = State()
_programs: dict[str, Program] = {}  # by digest of the text
_loaded: list[Program] = []  # by the number that stands for a function of a GPU


def _version() -> bytes:
    """Of the emulator itself, whose own code is in what it translates to."""
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()


VERSION = _version()


def program_of(text: str) -> Program:
    """The PTX translated; kept in memory, and beside Triton's cache of kernels."""
    key = hashlib.sha256(VERSION + text.encode()).hexdigest()
    if key not in _programs:
        file = pathlib.Path(triton.knobs.cache.dir, "emulated", key)
        if file.exists():
            _programs[key] = pickle.loads(file.read_bytes())
        else:
            _programs[key] = Program(text)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_bytes(pickle.dumps(_programs[key]))
            part.replace(file)
    return _programs[key]


def _bits(type_: str, value: float) -> int:
    """Of a scalar argument."""
    if type_ == "bf16":
        return _bits("fp32", value) >> 16
    if type_[0] == "f":
        size = int(type_.lstrip("fp")) // 8
        return int(np.dtype(f"f{size}").type(value).view(f"u{size}"))
    return int(value) & (1 << max(8, int(type_[1:]))) - 1


def _flat(names: Sequence[str], types: Sequence, values: Sequence) -> list[tuple[str, str, object]]:
    """Arguments with their types, those in tuples one by one, without constants."""
    found = []
    for name, type_, value in zip(names, types, values, strict=False):
        if isinstance(type_, tuple):
            found += _flat([f"{name}[{i}]" for i in range(len(type_))], type_, value)
        elif type_ != "constexpr":
            found.append((name, type_, value))
    return found


class EmulatedLauncher:
    def __init__(self, source, metadata) -> None:
        self.signature, self.metadata = dict(source.signature), metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise NotImplementedError(f"num_ctas must be 1, as clusters are not emulated, got {metadata.num_ctas}")
        for name in ("global_scratch_size", "profile_scratch_size"):
            if getattr(metadata, name):
                raise NotImplementedError(f"{name} must be 0, as it is not emulated, got {getattr(metadata, name)}")

    def __call__(self, gx: int, gy: int, gz: int, stream, function: int, *rest) -> None:
        """`rest`: the kernel's and the launch's metadata, two hooks, and the arguments."""
        arguments = []
        for name, type_, value in _flat(self.signature, self.signature.values(), rest[4:]):
            if type_[0] != "*":
                value = _bits(type_, value)
            arguments.append((name, value))
        arguments += [("global_scratch", None), ("profile_scratch", None)]
        with lock:
            if gx * gy * gz:
                threads, shared = 32 * self.metadata.num_warps, self.metadata.shared
                Launch(_loaded[function], self.metadata.name, (gx, gy, gz), threads, shared, arguments, state.report,
                       state.options).run()  # fmt: skip


class StubUtils:
    """Takes PTX, in place of a cubin."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.arch], "warpSize": 32, "max_num_regs": 2**16,
                "multiprocessor_count": 132, "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, device: object) -> tuple[int, ...]:
        with lock:
            _loaded.append(program_of(binary.decode().removeprefix(MARK)))
            number = len(_loaded) - 1
        return number, number, 64, 0, 1024  # module, function, registers, spills, threads


class EmulatedDriver:
    """As much of a driver as compilation and launches ask for."""

    launcher_cls = EmulatedLauncher

    def __init__(self, arch: int) -> None:
        self.target, self.utils = GPUTarget("cuda", arch, 32), StubUtils(arch)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"emulated:{self.target.arch}"  # Triton keeps kernels by device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


def _instead_of_cubin(self, source: str, metadata, options, capability) -> bytes:
    return (MARK + source).encode()


def _hash(self) -> str:
    """Differs from the hash for a GPU, so that Triton's cache keeps the two apart."""
    return f"emulated-{self.target.arch}"


@contextlib.contextmanager
def running(target: str = "sm_90", **options) -> Iterator[Report]:
    """Kernels launched inside run emulated, on CPU tensors, also those of dlu_triton; yields the report of this time.

    `options` are those of `Options`. Raises ValueError if kernels are interpreted, or the target is not one of TARGETS.
    """
    from dlu_triton import _launch

    if _launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET must be 0 for kernels to be compiled, got 1")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    had, before = triton.runtime.driver._active, (state.options, state.report)
    state.options, state.report = Options(**options), Report()
    with (
        mock.patch.object(CUDABackend, "make_cubin", _instead_of_cubin),
        mock.patch.object(CUDABackend, "hash", _hash),
        mock.patch.object(_launch, "runs_kernels", lambda tensor: isinstance(tensor, torch.Tensor)),
    ):
        triton.runtime.driver.set_active(EmulatedDriver(TARGETS[target]))
        _launch.forget_launches()  # of other targets
        try:
            yield state.report
        finally:
            triton.runtime.driver._active = had
            state.options, state.report = before
            _launch.forget_launches()
