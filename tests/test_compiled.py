"""Every kernel, compiled as the operators launch it, fits each target: no spills, no local memory, shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = {
    "softmax_forward", "softmax_backward", "sample_forward", "sample_backward",
    "reassemble_forward", "reassemble_backward_features", "reassemble_backward_kernels",
    "cam_partial_maps", "cam_channels", "cam_finish",
}  # fmt: skip
# Bytes of shared memory that one block may have; sm_86 and sm_89, which run sm_80 code, have 99 KB of it.
SHARED = {"cuda:90": 227 * 1024, "cuda:80": 99 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, SCRIPT, *SHARED], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("target", SHARED)
def test_kernels_fit(compiled, target):
    rows = [row for row in compiled if row["target"] == target]
    assert {row["kernel"] for row in rows} == KERNELS
    problems = [
        f"{row['kernel']} [{row['case']}]: {row['spills']} spills, {row['local']} bytes of local memory, "
        f"{row['shared']} bytes of shared memory"
        for row in rows
        if row["spills"] or row["local"] or row["shared"] > SHARED[target]
    ]
    assert not problems, "\n".join(problems)


def test_half_precision_reassembles_on_tensor_cores(compiled):
    rows = [
        row
        for row in compiled
        if row["kernel"].startswith("reassemble") and row["target"].startswith("cuda") and "float16" in row["case"]
    ]
    assert len(rows) > 50
    scalar = [f"{row['target']} {row['kernel']} [{row['case']}]" for row in rows if not row["tensor_core"]]
    assert not scalar, "\n".join(scalar)
