"""`python -m dlu_triton info`: what a report of a bug needs, also where something is broken, and nothing private."""

import importlib.metadata
import inspect
import os
import platform
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch
import triton
import triton.runtime.build

import dlu_triton
from dlu_triton import __main__, _info


def parsed(printed):
    """Values by name; each line has both, once."""
    pairs = [line.partition(": ") for line in printed.splitlines()]
    assert all(name and separator and value for name, separator, value in pairs), printed
    values = {name: value for name, _, value in pairs}
    assert len(values) == len(pairs)
    return values


@pytest.fixture
def values(capsys):
    def run():
        assert __main__.main(["info"]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return parsed(printed.out)

    return run


def test_versions_and_where_they_are_from(values, monkeypatch):
    monkeypatch.setattr(_info, "_without_home", lambda text: text)
    found = values()
    assert found["dlu_triton"] == f"{dlu_triton.__version__}, from {os.path.dirname(dlu_triton.__file__)}"
    assert found["Python"] == f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    assert found["torch"].startswith(f"{torch.__version__}, built for ")
    assert found["Triton"] == triton.__version__
    assert found["NumPy"] == numpy.__version__
    assert platform.machine() in found["system"]
    assert f"pytest {importlib.metadata.version('pytest')}" in found["packages"].split(", ")


# No process, no connection, and no device that is made ready where there is none.
ALONE = """
import sys
import torch
from dlu_triton import __main__, _info
def look(event, arguments):
    if event.startswith(("subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "socket.")):
        raise SystemExit(f"{event} {arguments}")
def forbidden(*arguments, **options):
    raise SystemExit("asked for a device")
sys.addaudithook(look)
torch.cuda.is_available = lambda: False
for name in ("init", "_lazy_init", "current_device", "get_device_properties", "device_count"):
    setattr(torch.cuda, name, forbidden)
sys.exit(__main__.main(["info"]))
"""


@pytest.mark.parametrize("interpret", (None, "0", "1"))
def test_it_starts_nothing(interpret):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    process = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    found = parsed(process.stdout)
    assert found["TRITON_INTERPRET"] == (interpret or "not set")
    assert found["kernels"].startswith("interpreted" if interpret == "1" else "compiled for GPUs")
    assert found["GPUs"] == "none that torch can use"
    assert not any(name.startswith("GPU ") for name in found)


def test_gpus(values, monkeypatch):
    """Each by itself; one that fails says how, in a line."""

    def properties(index):
        if index == 1:
            raise RuntimeError("CUDA error: unknown error\nCompile with `TORCH_USE_CUDA_DSA`")
        name = "NVIDIA H100 80GB HBM3"
        return SimpleNamespace(name=name, major=9, minor=0, total_memory=79 * 2**30 + 2**29, gcnArchName="gfx942")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    found = values()
    assert found["torch"] == f"{torch.__version__}, built for CUDA 13.0"
    assert found["GPUs"] == "3"
    assert found["GPU 0"] == found["GPU 2"] == "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.5 GiB"
    message = "cannot be asked: RuntimeError: CUDA error: unknown error Compile with `TORCH_USE_CUDA_DSA`"
    assert found["GPU 1"] == message
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found = values()
    assert found["torch"] == f"{torch.__version__}, built for HIP 7.0"
    assert found["GPU 0"] == "NVIDIA H100 80GB HBM3, gfx942, 79.5 GiB"


def test_a_driver_that_torch_cannot_use(values, monkeypatch):
    """As torch has it: a warning and False, or an error."""

    def warn():
        text = "CUDA initialization: The NVIDIA driver on your system is too old\n(found version 11040)."
        warnings.warn(text, stacklevel=2)
        return False

    def fail():
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "is_available", warn)
    expected = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."
    assert values()["GPUs"] == f"none that torch can use; {expected}"
    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert values()["GPUs"] == "cannot be counted: RuntimeError: No CUDA GPUs are available"


def test_drivers_of_the_kernel(tmp_path):
    assert list(_info._drivers(tmp_path)) == []
    (tmp_path / "amdgpu").mkdir()
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "version").write_text("580.82.07\n")
    assert list(_info._drivers(tmp_path)) == ["nvidia 580.82.07", "amdgpu"]


@pytest.mark.parametrize(
    ("there", "named", "expected"),
    [
        (("gcc", "clang"), None, "gcc"),
        (("clang",), None, "clang"),
        (("cc",), None, None),
        (("gcc", "mine"), "mine", "mine"),
        (("gcc",), "gone", None),
    ],
)
def test_the_compiler_is_that_of_triton(there, named, expected, monkeypatch, tmp_path):
    for name in there:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    found = _info._compiler()
    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda command, **options: started.append(command[0]))
    build = triton.runtime.build._build
    missing = len(inspect.signature(build).parameters) - 3  # which are lists
    if expected is None and named is None:
        assert found == "none; Triton wants one at its first launch on a GPU"
        with pytest.raises(RuntimeError, match="C compiler"):
            build("name", "name.c", str(tmp_path), *[[]] * missing)
        return
    build("name", "name.c", str(tmp_path), *[[]] * missing)
    assert started == [named or str(tmp_path / expected)]
    assert found == (f"CC={named}, which is not there" if expected is None else str(tmp_path / expected))


def test_settings(values, monkeypatch):
    before = torch.get_float32_matmul_precision()
    for name in ("TRITON_INTERPRET", *_info.VARIABLES):
        monkeypatch.delenv(name, raising=False)
    found = values()
    assert found["environment"] == "nothing that matters"
    assert found["TRITON_INTERPRET"] == "not set"
    assert found["float32 products of torch"] == before
    assert found["deterministic algorithms"] == "off"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/a folder\nof\x1b[2Jmine")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TRITON_REDIS_HOST", "secret")
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    try:
        found = values()
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(False)
    assert found["environment"] == r"TRITON_CACHE_DIR=/a folder of\x1b[2Jmine CUDA_VISIBLE_DEVICES="
    assert found["float32 products of torch"] == "high"
    assert found["deterministic algorithms"] == "on"


def test_packages_that_are_there(values, monkeypatch):
    def version(name):
        if name not in ("mmengine", "mmcv-lite"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert values()["packages"] == "mmcv-lite 2.0, mmengine 2.0"


def test_nothing_of_the_home_folder(values, monkeypatch, tmp_path):
    """Neither by its name nor by what a link of it leads to; other folders keep theirs."""
    home = tmp_path / "jane"
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", f"{tmp_path / 'link'}/")
    monkeypatch.setenv("TRITON_CACHE_DIR", f"{home}/cache")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "link"))
    monkeypatch.setenv("TRITON_PTXAS_PATH", f"{home}t/ptxas")
    monkeypatch.setattr(_info, "__file__", f"{home}/code/dlu_triton/_info.py")
    found = values()
    assert found["dlu_triton"].endswith(", from ~/code/dlu_triton")
    environment = found["environment"]
    assert "TRITON_CACHE_DIR=~/cache TRITON_HOME=~ " in environment
    assert f"TRITON_PTXAS_PATH={home}t/ptxas" in environment
    monkeypatch.setenv("HOME", "/")
    assert f"TRITON_CACHE_DIR={home}/cache" in values()["environment"]
