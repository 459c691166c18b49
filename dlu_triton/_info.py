"""What a report of a bug needs to say of its machine, for `python -m dlu_triton info`. Starts no process."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
import triton

from . import __version__, _launch

# Packages that the library, its extras and its examples meet, by the names that they are installed under.
PACKAGES = (
    "captum",
    "grad-cam",
    "matplotlib",
    "mmcv",
    "mmcv-lite",
    "mmdet",
    "mmengine",
    "mmsegmentation",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pillow",
    "pytest",
    "scikit-image",
    "scikit-learn",
    "torchcam",
    "torchvision",
    "tqdm",
    "transformers",
    "ultralytics",
)

# Named one by one, since others may hold what is private. TRITON_INTERPRET has a line of its own.
VARIABLES = (
    "TRITON_ALWAYS_COMPILE",
    "TRITON_CACHE_DIR",
    "TRITON_DEBUG",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_DISABLE_LINE_INFO",
    "TRITON_F32_DEFAULT",
    "TRITON_HOME",
    "TRITON_KERNEL_OVERRIDE",
    "TRITON_LIBCUDA_PATH",
    "TRITON_LIBHIP_PATH",
    "TRITON_OVERRIDE_ARCH",
    "TRITON_PTXAS_PATH",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHDYNAMO_DISABLE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def run() -> int:
    """Prints the report, a name and a value a line; returns the exit status."""
    for name, value in report():
        line = _without_home(" ".join(value.split()))
        print(f"{name}: {''.join(each if each.isprintable() else repr(each)[1:-1] for each in line)}")
    return 0


def report() -> Iterator[tuple[str, str]]:
    """Names and values. What cannot be found out says why, and stops nothing."""
    yield "dlu_triton", f"{__version__}, from {Path(__file__).parent}"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    yield "torch", f"{torch.__version__}, built for {_build()}"
    yield "Triton", triton.__version__
    yield "NumPy", numpy.__version__
    yield "system", _system()
    yield "CPU", f"{_cpu()}, {_processors()} processors, {torch.get_num_threads()} threads of torch"
    yield from _gpus()
    yield "driver", ", ".join(_drivers()) or "no module of the kernel"
    yield "kernels", "interpreted" if _launch.INTERPRETED else "compiled for GPUs; CPU tensors take eager PyTorch"
    yield "TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "not set")
    yield "C compiler", _compiler()
    yield "Python.h", "found" if Path(sysconfig.get_path("include"), "Python.h").exists() else "not found"
    yield "float32 products of torch", torch.get_float32_matmul_precision()
    yield "deterministic algorithms", "on" if torch.are_deterministic_algorithms_enabled() else "off"
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "environment", " ".join(variables) or "nothing that matters"
    yield "packages", ", ".join(_packages()) or "none that matter"


def _build() -> str:
    if torch.version.hip is not None:
        return f"HIP {torch.version.hip}"
    return "CPUs" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    libc = " ".join(platform.libc_ver()).strip() or "libc not known"
    return f"{name}, kernel {platform.release()}, {libc}, {platform.machine()}"


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else "model not known"


def _processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings(record=True) as caught:  # what torch says of a driver that it cannot use
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            found = str(count or "none that torch can use")
        except Exception as error:
            count, found = 0, f"cannot be counted: {_named(error)}"
    yield "GPUs", "; ".join([found, *(str(each.message) for each in caught)])
    for index in range(count):
        try:
            each = torch.cuda.get_device_properties(index)
            kind = each.gcnArchName if torch.version.hip else f"compute capability {each.major}.{each.minor}"
            about = f"{each.name}, {kind}, {each.total_memory / 2**30:.1f} GiB"
        except Exception as error:
            about = f"cannot be asked: {_named(error)}"
        yield f"GPU {index}", about


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _drivers(folder: Path = Path("/sys/module")) -> Iterator[str]:
    """As the kernel has them: torch does not say, and says nothing where they are broken."""
    for name in ("nvidia", "amdgpu"):
        if folder.joinpath(name).exists():
            try:
                yield f"{name} {folder.joinpath(name, 'version').read_text().strip()}"
            except OSError:  # amdgpu has none where it came with the kernel
                yield name


def _compiler() -> str:
    """What Triton starts to compile its launchers."""
    named = os.environ.get("CC")
    if named is not None:
        return shutil.which(named) or f"CC={named}, which is not there"
    return shutil.which("gcc") or shutil.which("clang") or "none; Triton wants one at its first launch on a GPU"


def _packages() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def _without_home(text: str) -> str:
    """Paths with ~ for the user's folder, whose name is often that of a person."""
    home = os.path.expanduser("~").rstrip("/")
    for folder in sorted({home, os.path.realpath(home)}, key=len, reverse=True):
        if folder not in ("", "~", "/"):
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])", "~", text)
    return text
