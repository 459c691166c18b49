"""What a results file says of the machine, the versions and the commit."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton


def info() -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    folder = str(Path(__file__).parent)
    status = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "device": "cuda" if on_gpu else "cpu",
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_driver": _driver() if on_gpu else None,
        "gpu_runtime": torch.version.cuda or torch.version.hip,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "triton": triton.__version__,
        "processors": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # of the last minute: what else ran
        # A copy without its history may be told what it is a copy of.
        "commit": _output("git", "-C", folder, "rev-parse", "HEAD") or os.environ.get("BENCH_COMMIT"),
        "dirty": None if status is None else status != "",
    }


def _driver() -> str | None:
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def _output(program: str, *arguments: str) -> str | None:
    """What a program prints, if it is there and succeeds."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
