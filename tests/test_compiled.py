"""Every kernel, compiled as the operators launch it, fits each target: no spills, no local memory, shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

PAGE, PINS = (Path(__file__).parents[1] / name for name in ("docs/kernels.md", "constraints.txt"))
SCRIPT, MODEL = (Path(__file__).with_name(name) for name in ("compile_kernels.py", "cost_model.py"))
KERNELS = {
    "softmax_forward", "softmax_backward", "sample_forward", "sample_backward",
    "reassemble_forward", "reassemble_backward_features", "reassemble_backward_kernels",
    "cam_partial_maps", "cam_channels", "cam_finish",
}  # fmt: skip
# Bytes of shared memory that one block may have; sm_86 and sm_89, which run sm_80 code, have 99 KB of it.
SHARED = {"cuda:90": 227 * 1024, "cuda:80": 99 * 1024, "cuda:100": 227 * 1024, "hip:gfx942": 64 * 1024}

# With --long: corners that spill a few registers on GPUs that nobody has tuned for, and the most bytes they take.
SPILLED = {
    ("cuda:80", "reassemble_backward_kernels", "float32 contiguous 2 7 1 64"): 56,
    ("cuda:100", "reassemble_forward", "float64 channels_last 2 5 1 256"): 504,
    ("cuda:100", "reassemble_backward_kernels", "bfloat16 contiguous 3 5 33 33"): 8,
    ("cuda:100", "sample_backward", "bfloat16 contiguous 3 5 33 33"): 32,
    ("cuda:100", "sample_backward", "bfloat16 contiguous 4 5 1 64"): 32,
    ("cuda:100", "sample_backward", "bfloat16 contiguous 16 5 1 256"): 32,
    ("cuda:100", "reassemble_forward", "float32 contiguous 16 5 1 256"): 24,
}


@pytest.fixture(scope="module")
def compiled(request):
    return rows_of(SCRIPT, *SHARED, *["--corners"] * request.config.getoption("--long"))


@pytest.fixture(scope="module")
def models():
    return rows_of(MODEL, "--json")


@pytest.fixture(scope="module")
def model(models):
    return [row for row in models if row["kernel"] == "reassemble_forward"]


def rows_of(script, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=False
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
        if row["local"] > SPILLED.get((target, row["kernel"], row["case"]), 0)
        or (row["spills"] and not row["local"])
        or row["shared"] > SHARED[target]
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


# ---------------------------------------------------------------------------------------------------------------
# The forward pass on sm_90: budgets that leave memory as its limit
# ---------------------------------------------------------------------------------------------------------------


def over_budget(rows, resource, share):
    return [
        f"{row['operator']} {row['dtype']} {row['layout']} C {row['channels']} s {row['scale']}: {row[resource]}"
        for row in rows
        if row[resource] > share
    ]


@pytest.mark.parametrize(
    ("resource", "share"),
    [("instructions", 0.9), ("tensor cores", 0.75), ("shared memory", 0.65), ("cache lines", 1.15)],
)
def test_wide_maps_are_not_limited_by(resource, share, model):
    """Shares of the time that the bytes of a tile take; of maps with 256 channels."""
    rows = [row for row in model if row["channels"] == 256]
    assert len(rows) == 20
    assert not over_budget(rows, resource, share)


def test_narrow_maps_are_limited_by_instructions(model):
    """64 channels do not amortise the kernels of an output; how far from it is kept from growing."""
    rows = [row for row in model if row["channels"] == 64]
    assert len(rows) == 8
    assert not over_budget(rows, "instructions", 1.75)
    assert not over_budget(rows, "tensor cores", 0.5)
    assert not over_budget(rows, "shared memory", 1.25)
    assert not over_budget(rows, "cache lines", 1.6)


def test_enough_warps_hide_latency(model):
    few = [f"{row['dtype']} {row['layout']} s {row['scale']}: {row['warps']}" for row in model if row["warps"] < 12]
    assert not few, "\n".join(few)


def test_streams_are_wide(model):
    """Outputs leave 16 bytes at a time; features arrive so where channels are innermost, else in pairs of columns."""
    for row in model:
        case = f"{row['operator']} {row['dtype']} {row['layout']} C {row['channels']} s {row['scale']}"
        assert row["wgmma"] > 0, case
        assert row["narrow stores"] == 0, case
        assert row["wide stores"] == row["output bytes"] // (16 * 32 * row["program warps"]), case
        if row["operator"] == "dlu_upsample":  # but for its offsets
            assert row["scalar loads"] <= 4, case
        kind, size = ("wide loads", 16) if row["layout"] == "channels_last" else ("pair loads", row["pair bytes"])
        assert row[kind] >= row["feature bytes"] // (size * 32 * row["program warps"]), case


def test_odd_widths_take_a_loop_of_their_own(model):
    """In NCHW: of maps whose rows come in runs of 16 bytes, of even ones, and of odd ones, the slowest."""
    for row in model:
        case = f"{row['operator']} {row['dtype']} {row['layout']} C {row['channels']} s {row['scale']}"
        if row["layout"] == "channels_last":
            assert len(row["turns"]) <= 1, case  # unrolled with 64 channels
        elif row["channels"] == 256 and row["scale"] == 2 and row["dtype"] == "bfloat16":
            wide, even, odd = row["turns"]
            assert even <= 1.3 * wide, case
            assert odd <= 3.2 * wide, case
            if row["operator"] == "dlu_upsample" and f"triton=={triton.__version__}" in PINS.read_text().split():
                page = " ".join(PAGE.read_text().split())
                assert [f"bytes | {turn} |" in page for turn in row["turns"]] == [True] * 3, row["turns"]


# ---------------------------------------------------------------------------------------------------------------
# The backward pass on sm_90
# ---------------------------------------------------------------------------------------------------------------

FEATURES, TAPS = "reassemble_backward_features", "reassemble_backward_kernels"  # whose gradients they find


@pytest.mark.parametrize(
    ("kernel", "resource", "half", "float32"),
    [
        (FEATURES, "instructions", 0.95, 0.95), (TAPS, "instructions", 1.15, 1.0),
        (FEATURES, "tensor cores", 0.6, 1.7), (TAPS, "tensor cores", 0.3, 0.85),
        (FEATURES, "shared memory", 0.5, 0.5), (TAPS, "shared memory", 0.65, 0.7),
        (FEATURES, "from L2", 1.75, 1.75), (TAPS, "from L2", 1.55, 1.9),
    ],
)  # fmt: skip
def test_gradients_stay_near_the_rate_of_memory(kernel, resource, half, float32, models):
    """Shares of the time that their bytes take; where 1 is passed, bench/NOTES.md says what follows. Softmax of logits
    is taken again for every output in reach, see `test_logits_cost_instructions`."""
    rows = [row for row in models if row["kernel"] == kernel and row["operator"] != "carafe_upsample"]
    assert len(rows) == 10
    assert not over_budget([row for row in rows if row["dtype"] != "float32"], resource, half)
    assert not over_budget([row for row in rows if row["dtype"] == "float32"], resource, float32)


def test_logits_cost_instructions(models):
    rows = [row for row in models if row["kernel"] == FEATURES and row["operator"] == "carafe_upsample"]
    assert len(rows) == 2
    assert not over_budget(rows, "instructions", 1.3)


def test_gradients_use_tensor_cores_and_wide_loads(models):
    rows = [row for row in models if row["kernel"] in (FEATURES, TAPS)]
    assert len(rows) == 24
    for row in rows:
        case = f"{row['kernel']} {row['operator']} {row['dtype']} {row['layout']} s {row['scale']}"
        assert row["wgmma"] > 0, case
        if row["layout"] == "channels_last" or row["operator"] == "dlu_upsample":  # else blocks begin at fours
            assert row["wide loads"] > 0, case
        assert row["warps"] >= 8, case
        # Of offsets, two for each piece of outputs; masks and logits have taps that are far from each other, or odd.
        assert row["scalar loads"] <= (3 * row["scale"] ** 2 if row["operator"] == "dlu_upsample" else 40), case


# ---------------------------------------------------------------------------------------------------------------
# The forward passes on other targets
# ---------------------------------------------------------------------------------------------------------------

REGISTERS, WARPS = 65536, {"cuda:80": 64, "cuda:90": 64, "cuda:100": 64}  # of an SM


@pytest.mark.parametrize("target", WARPS)
@pytest.mark.parametrize(
    ("kernel", "least"), [("softmax_forward", 32), ("sample_forward", 16), ("reassemble_forward", 8)]
)
def test_forward_kernels_leave_room_for_warps(kernel, least, target, compiled):
    """Of half precision and float32 with kernels of 5 x 5, at typical shapes; limits are registers, shared memory and
    the SM's own."""
    few = []
    for row in compiled:
        typical = row["case"].split()[-4:] == ["2", "5", "1", "256"] and not row["case"].startswith("float64")
        if (row["kernel"], row["target"]) == (kernel, target) and typical:
            programs = min(
                REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * row["warps"]),
                SHARED[target] // (row["shared"] + 1024),
                WARPS[target] // row["warps"],
            )
            if programs * row["warps"] < least:
                few.append(f"{row['case']}: {programs * row['warps']} warps, {row['registers']} registers")
    assert not few, "\n".join(few)
