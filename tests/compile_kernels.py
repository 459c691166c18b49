"""Compile every kernel exactly as the operators launch it, for GPUs that are not here, and report what it uses.

    python tests/compile_kernels.py cuda:90 cuda:80 cuda:100

prints one JSON object per compiled kernel: typical launches for the first target, one of them for the others; with
--corners all of them and the corners for every target, which takes many times as long.

    python tests/compile_kernels.py --shared cuda:75 cuda:86

stops at the shared memory that a kernel asks for, of `dlu_upsample` for a sample of kernel sizes and scales; with
--corners of all launches, and of every operator for all sizes and scales, which takes long (of launches that differ in
the scale factor alone, the first; float16 for sm_75 alone).

It runs in a process of its own because interpreted and compiled kernels cannot share one. A stub driver names the
target; the operators' own launch code runs on meta tensors, and every launch stops after compilation.
"""

import argparse
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import product
from unittest import mock

import machine_code
import torch
import triton
from emulator import driver
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, nvidia
from triton.runtime.jit import JITFunction

WARP_SIZE = {"cuda": 32, "hip": 64}
# Bytes of shared memory that a block may have
SHARED = {**{f"cuda:{arch}": size for arch, size in driver.SHARED.items()}, "cuda:100": 232448, "hip:gfx942": 65536}


class StubLauncher:
    """Takes what would go to the GPU."""

    def __init__(self, *description: object) -> None:
        pass

    def __call__(self, *arguments: object) -> None:
        pass


class StubUtils:
    """Counts the kernels that are loaded."""

    loaded, shared = 0, SHARED["cuda:90"]

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": self.shared, "warpSize": 32, "max_num_regs": 2**16}

    def load_binary(self, *arguments: object) -> tuple[int, ...]:
        self.loaded += 1
        return (0, self.loaded, 64, 0, 1024)  # module, function, registers, spills, threads


class StubDriver:
    """As much of a driver as compilation and launches ask for."""

    launcher_cls = StubLauncher

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.utils = target, StubUtils()
        self.utils.shared = SHARED[f"{target.backend}:{target.arch}"]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # Triton caches kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


# dtype, layout, scale_factor, kernel_size, groups, channels
TYPICAL = [
    (torch.bfloat16, "contiguous", 2, 5, 1, 256),
    (torch.bfloat16, "channels_last", 2, 5, 1, 256),
    (torch.float32, "contiguous", 2, 5, 1, 256),
    (torch.float32, "channels_last", 2, 5, 1, 256),
    (torch.float64, "contiguous", 2, 5, 1, 256),
    (torch.bfloat16, "contiguous", 2, 9, 1, 64),
    (torch.bfloat16, "cut", 2, 5, 1, 256),
]
CORNERS = [
    (torch.bfloat16, "odd sizes", 2, 5, 1, 255),
    (torch.float32, "odd sizes", 2, 5, 1, 255),
    (torch.bfloat16, "float32 kernels", 2, 5, 1, 256),
    (torch.bfloat16, "large odd sizes", 2, 5, 1, 256),
    (torch.float16, "contiguous", 2, 5, 1, 256),
    (torch.float16, "channels_last", 2, 5, 1, 256),
    (torch.float64, "channels_last", 2, 5, 1, 256),
    *(
        (dtype, "contiguous", scale_factor, kernel_size, groups, channels)
        for dtype in (torch.bfloat16, torch.float32)
        for scale_factor, kernel_size, groups, channels in (
            (1, 9, 1, 64),
            (2, 1, 1, 64),
            (2, 3, 4, 64),
            (2, 7, 1, 64),
            (3, 5, 33, 33),
            (4, 5, 1, 64),
            (16, 5, 1, 256),
        )
    ),
    (torch.float32, "contiguous", 2, 9, 1, 256),
    (torch.float64, "contiguous", 2, 9, 1, 64),
    (torch.float64, "contiguous", 3, 7, 2, 64),
    (torch.bfloat16, "huge", 2, 5, 1, 64),  # offsets of 64 bits
    (torch.float32, "huge, channels_last", 2, 5, 1, 64),
]

# dtype, layout, classes, channels, height, width of class activation maps
CAM_TYPICAL = [
    (torch.bfloat16, "contiguous", None, 64, 112, 112),
    (torch.bfloat16, "contiguous", None, 2048, 7, 7),
    (torch.float32, "channels_last", 3, 512, 14, 14),
]
CAM_CORNERS = [
    (torch.float16, "tokens", None, 384, 16, 16),
    (torch.float32, "mixed", None, 256, 56, 56),
    (torch.float64, "contiguous", None, 64, 20, 30),
    (torch.float32, "cropped", 2, 33, 9, 13),
    (torch.float32, "channels_last", None, 256, 56, 56),
    (torch.bfloat16, "mixed", None, 2048, 7, 7),
    (torch.float64, "channels_last", None, 64, 100, 100),
    (torch.float32, "contiguous", None, 3, 1, 1),
    (torch.bfloat16, "channels_last", None, 1024, 14, 14),
    (torch.float64, "cropped", None, 30, 64, 63),
]

# Kernel sizes, dtypes and layouts, and scale factors, of every operator; and of `dlu_upsample`, for a sample
SIZES, DTYPES = (9, 7, 5, 3, 1), (torch.float32, torch.bfloat16, torch.float64, torch.float16)
SCAN = (SIZES, DTYPES, ("large", "large, channels_last")), range(1, 17)  # odd sizes take no more
SCAN_SAMPLE = (SIZES[:2], DTYPES[:1], ("large",)), (1, 2)  # where there was too little


def launch_upsampling(dtype, layout, scale_factor, kernel_size, groups, channels, only_dlu=False) -> None:
    """Every upsampling operator or one, forward and backward, on meta tensors."""
    from dlu_triton.ops import carafe, dlu

    def meta(c, h, w, dtype=dtype):
        x = torch.empty(2, c, h, w, dtype=dtype, device="meta")
        return x.contiguous(memory_format=torch.channels_last) if "channels_last" in layout else x

    sizes = {"large": (128, 128), "odd sizes": (25, 41), "large odd sizes": (49, 81), "huge": (2**13, 2**14)}
    h, w = sizes.get(layout.removesuffix(", channels_last"), (48, 80))
    kernel_dtype = torch.float32 if layout == "float32 kernels" else dtype
    s, k, g = scale_factor, kernel_size, groups
    size = (s * h - 1, s * w - 1) if layout == "cut" else (s * h, s * w)
    features, output = meta(channels, h, w), meta(channels, *size)
    space, offsets = meta(g * k * k, h, w, kernel_dtype), meta(2 * g * s * s, h, w, kernel_dtype)
    masks = meta(g * k * k, *size, kernel_dtype)
    dlu.dlu_upsample_op.launch(features, space, offsets, s, k, g, size)
    dlu.dlu_upsample_op.gradients.launch(output, features, space, offsets, s, k, g, size, True, True, True)
    if only_dlu:
        return
    carafe.carafe_op.launch(features, masks, k, g, s, size)
    carafe.carafe_op.gradients.launch(output, features, masks, k, g, s, size, True, True)
    logits = meta(g * k * k * s * s, h, w, kernel_dtype)
    carafe.carafe_upsample_op.launch(features, logits, s, k, g, size)
    carafe.carafe_upsample_op.gradients.launch(output, features, logits, s, k, g, size, True, True)
    dlu.expand_kernels_op.launch(space, offsets, s, k, g, size)
    dlu.expand_kernels_op.gradients.launch(masks, space, offsets, s, k, g, size, True, True)
    if channels == 256:  # the typical shapes
        torch.use_deterministic_algorithms(True)
        try:
            dlu.dlu_upsample_op.gradients.launch(output, features, space, offsets, s, k, g, size, True, True, True)
        finally:
            torch.use_deterministic_algorithms(False)


def launch_scales(dtype, layout, scale_factors, *others) -> None:
    for scale_factor in scale_factors:
        launch_upsampling(dtype, layout, scale_factor, *others)


def launch_cam(dtype, layout, classes, channels, height, width) -> None:
    """Every method on meta tensors; with and without what is known of the channels, resize and normalisation."""
    from dlu_triton import _checks
    from dlu_triton.ops import cam

    def meta(layout):
        if layout == "tokens":
            tokens = torch.empty(2, 1 + height * width, channels, dtype=dtype, device="meta")
            return tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width))
        if layout == "cropped":
            return torch.empty(2, channels, height, width + 2, dtype=dtype, device="meta")[..., 1:-1]
        plane = torch.empty(2, channels, height, width, dtype=dtype, device="meta")
        return plane.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else plane

    activations = meta("channels_last" if layout == "mixed" else layout)
    gradients = meta("contiguous" if layout == "mixed" else layout)
    gradients = gradients.unsqueeze(1).expand(-1, classes or 1, -1, -1, -1)
    weights = torch.empty(2, classes or 1, channels, dtype=dtype, device="meta")
    calls = [(method, (224, 224), True, True) for method in _checks.CAM_METHODS]
    for method, size, normalize, wants_channels in (
        *calls,
        ("xgradcam", None, False, False),
        ("hirescam", (96, 96), False, False),
    ):
        cam.class_activation_map_op.launch(activations, gradients, method, 1e-6, True, size, normalize, wants_channels)
    cam.weighted_activation_map_op.launch(activations, weights, False, (224, 224), False)


def resources(kernel, target: GPUTarget) -> dict:
    if target.backend == "cuda":
        products = len(re.findall(r"^\s*(?:@\S+ )?(?:wgmma\.mma|mma|tcgen05\.mma)", kernel.asm["ptx"], re.MULTILINE))
        return machine_code.usage(kernel.asm["cubin"]) | {"tensor_core": products}
    text = kernel.asm["amdgcn"]
    found = {name: int(number) for name, number in re.findall(r"\.(\w+):\s*(\d+)", text)}
    local = found["private_segment_fixed_size"] + found["vgpr_spill_count"]  # spills may go to other registers
    return {"registers": found["vgpr_count"], "local": local}


def except_the_scale(kernel: str, arguments: tuple, constants: dict) -> str:
    """A launch without its scale factor: tiles, types, and what Triton knows of numbers. Of 1,808 launches on sm_75,
    sm_86 and sm_90, all that are the same in these took the same shared memory."""

    def known(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype
        return (value == 1, value % 16 == 0) if isinstance(value, int) else value

    return f"{kernel} {[known(value) for value in arguments]} {constants | {'SCALE': None, 'grid': None}}"


@contextmanager
def compiling(target: GPUTarget, scales: bool = True) -> Iterator[list[tuple]]:
    """Launches inside compile for the target and stop there; the list fills with (name, kernel, arguments). Without
    `scales`, of launches that differ in the scale factor alone only the first."""
    from dlu_triton import _launch

    triton.runtime.driver.set_active(StubDriver(target))
    torch.version.hip = "stub" if target.backend == "hip" else None  # as `_launch` tells them apart
    _launch.forget_launches()  # of other targets
    compiled, seen = [], set()
    run = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        key = except_the_scale(self.__name__, args, kwargs)
        if scales or key not in seen:
            seen.add(key)
            kernel = run(self, *args, warmup=True, **kwargs)
            compiled.append((self.__name__, kernel, dict(zip(self.arg_names, args, strict=False)) | kwargs))
        return defaultdict(StubLauncher)  # a kernel would not be loaded if it is too large

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def compile_case(
    target: GPUTarget,
    case: tuple,
    launch: Callable[..., None],
    resources: Callable[..., dict] = resources,
    scales: bool = True,
) -> list[dict]:
    """Resources of every kernel that one case launches."""
    with compiling(target, scales) as compiled:
        launch(*case)
    name = " ".join(str(part).removeprefix("torch.") for part in case)
    rows, seen = [], set()
    for kernel_name, kernel, arguments in compiled:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            device = triton.runtime.driver.active.get_current_device()
            rows.append(
                {
                    "target": device,
                    "kernel": kernel_name,
                    "case": name,
                    "scale": arguments.get("SCALE"),
                    "warps": kernel.metadata.num_warps,
                }
                | {"shared": kernel.metadata.shared, "limit": SHARED[device]}
                | resources(kernel, target)
            )
    return rows


class _Allocated(Exception):
    """Shared memory is known."""


def _allocate(backend, source, metadata, options, capability) -> str:
    """The passes of Triton's `make_llir` as far as to what makes LLVM code of them, which takes most of the time."""

    def run(passes, *_: object) -> None:
        passes.run(source, "make_llir")
        raise _Allocated

    with mock.patch.object(nvidia.passes.ttgpuir, "add_to_llvmir", run), suppress(_Allocated):
        make_llir(backend, source, metadata, options, capability)
    metadata |= {"shared": source.get_int_attr("ttg.shared"), "name": "", "tmem_size": 0}
    return ""


make_llir = CUDABackend.make_llir


@contextmanager
def unfinished() -> Iterator[None]:
    """Kernels inside are compiled as far as their shared memory is known, which takes a fraction of the time; in a
    cache that goes with them. In one thread alone."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder, TRITON_STORE_BINARY_ONLY="1"),
        mock.patch.multiple(CUDABackend, make_llir=_allocate, make_ptx=lambda *_: "", make_cubin=lambda *_: b""),
    ):
        yield


def shared_memory(target: GPUTarget, case: tuple, launch: Callable[..., None]) -> list[dict]:
    """What every kernel that one case launches asks for."""
    with unfinished():
        return compile_case(target, case, launch, lambda *_: {}, scales=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="+", metavar="BACKEND:ARCH")
    parser.add_argument("--corners", action="store_true", help="compile the corners for every target")
    parser.add_argument("--shared", action="store_true", help="shared memory by kernel sizes and scales")
    options = parser.parse_args()
    jobs = []
    for name in options.targets:
        backend, arch = name.split(":")
        target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, WARP_SIZE[backend])
        job = shared_memory if options.shared else compile_case
        if options.shared:
            scan, scales = SCAN if options.corners else SCAN_SAMPLE
            jobs += [
                (job, target, (dtype, layout, scales, size, 1, 256, not options.corners), launch_scales)
                for size, dtype, layout in product(*scan)
                if dtype != torch.float16 or name == "cuda:75"  # on others as bfloat16, in 264 of 264 launches
            ]
        for launch, typical, corners in ((launch_upsampling, TYPICAL, CORNERS), (launch_cam, CAM_TYPICAL, CAM_CORNERS)):
            if options.corners:
                cases = typical + corners
            elif options.shared:
                cases = []
            else:
                cases = typical if name == options.targets[0] else typical[:1]
            jobs += [(job, target, case, launch) for case in cases]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for job in [pool.submit(*job) for job in jobs]:
            for row in job.result():
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
