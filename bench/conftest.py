"""Options, machine information and the closing summary of the benchmarks."""

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

RECORDS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="on a GPU, benchmark every shape, not the quick selection")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    if triton.knobs.runtime.interpret and not config.getoption("benchmark_disable"):
        raise pytest.UsageError(
            "TRITON_INTERPRET is set, and the speed of the interpreter means nothing: unset it, or run the benchmarks "
            "as tests with --benchmark-disable"
        )


@pytest.fixture
def records(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """What was measured in this run so far."""
    return pytestconfig.stash[RECORDS]


# ---------------------------------------------------------------------------------------------------------------
# Machine information
# ---------------------------------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    on_gpu = torch.cuda.is_available()
    status = _output("git", "-C", str(Path(__file__).parent), "status", "--porcelain", "--untracked-files=no")
    machine_info |= {
        "device": "cuda" if on_gpu else "cpu",
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_driver": _driver() if on_gpu else None,
        "gpu_runtime": torch.version.cuda or torch.version.hip,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "triton": triton.__version__,
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
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


# ---------------------------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.stash[RECORDS]:
        return
    passes = defaultdict(lambda: defaultdict(list))
    for record in config.stash[RECORDS]:
        rows = passes[f"{record['case']} {record['pass']}"]
        share = "" if record["roofline"] is None else f" ({record['roofline']:.0%})"
        rows[record["op"]].append(f"{record['impl']} {record['seconds'] * 1e3:.3f} ms{share}")
    terminalreporter.section("median time (share of the copy's bytes per second)")
    for title, rows in passes.items():
        terminalreporter.line(title)
        for op, cells in rows.items():
            terminalreporter.line(f"  {op:<21}" + "   ".join(cells))
