"""How cases are shared out between runs, and what a results file says of its run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*arguments):
    """pytest on the operators' benchmarks; on a CPU, whose selection is small."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):  # in a worker nothing is measured
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "test_upsampling.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE.parent)


def collected(*arguments):
    return [line.partition("::")[2] for line in run("--collect-only", *arguments).stdout.splitlines() if "::" in line]


def cases_of(names):
    return {re.search(r"-(\d+x.*?-(?:contiguous|channels_last))-", name)[1] for name in names}


def test_shards_part_the_cases():
    """Every benchmark is in one shard, with all others of its case, the copy among them; none is much the longest."""
    whole, first, second = collected(), collected("--shard", "1/2"), collected("--shard", "2/2")
    assert len(whole) > 50
    assert sorted(first + second) == sorted(whole)
    assert cases_of(first).isdisjoint(cases_of(second))
    for shard in (first, second):
        assert cases_of(shard) == cases_of(name for name in shard if "[copy-" in name)
        assert len(shard) > len(whole) / 4


@pytest.mark.parametrize("shard", ("0/2", "3/2", "x"))
def test_wrong_shards(shard):
    assert "--shard" in run("--collect-only", "--shard", shard).stderr


def test_results_say_what_they_are_of(tmp_path):
    file = tmp_path / "results.json"
    done = run("-k", "interpolate", "--shard", "1/1", "--benchmark-only", "--benchmark-json", file)
    assert done.returncode == 0, done.stdout
    results = json.loads(file.read_text())
    assert results["selection"] == {
        "name": "cpu", "shard": [1, 1], "failed": 0, "keyword": "interpolate"
    }  # fmt: skip
    assert results["unsupported"] == []
    assert all("data" not in record["stats"] for record in results["benchmarks"])
    assert results["benchmarks"]
