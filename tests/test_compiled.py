"""Every kernel, compiled as the operators launch it, fits each target: no spills, enough shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[1]
PAGE, NOTES, PINS = (ROOT / name for name in ("docs/kernels.md", "bench/NOTES.md", "constraints.txt"))
SCRIPT, MODEL = (Path(__file__).with_name(name) for name in ("compile_kernels.py", "cost_model.py"))
KERNELS = {
    "softmax_forward", "softmax_backward", "sample_forward", "sample_backward",
    "reassemble_forward", "reassemble_backward_features", "reassemble_backward_kernels",
    "cam_partial_maps", "cam_channels", "cam_finish",
}  # fmt: skip
TARGETS = ("cuda:90", "cuda:80", "cuda:100", "hip:gfx942")

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
    return rows_of(SCRIPT, *TARGETS, *["--corners"] * request.config.getoption("--long"))


@pytest.fixture(scope="module")
def model(request):
    """Cases of half precision at a scale factor of 2; with --long all."""
    return rows_of(MODEL, "--json", *[] if request.config.getoption("--long") else ["bfloat16", "s2"])


def rows_of(script, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def limit(row):
    """Bytes of shared memory that a block may have: for sm_80 those of sm_86 and sm_89, which can run its code."""
    return 99 * 1024 if row["target"] == "cuda:80" else row["limit"]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit(compiled, target):
    rows = [row for row in compiled if row["target"] == target]
    assert {row["kernel"] for row in rows} == KERNELS
    problems = [
        f"{row['kernel']} [{row['case']}]: {row['local']} bytes of local memory, {row['shared']} of shared memory"
        for row in rows
        if row["local"] > SPILLED.get((target, row["kernel"], row["case"]), 0) or row["shared"] > limit(row)
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


def test_kernels_of_every_size_and_scale_have_enough_shared_memory(request):
    """Where it is least; with --long on all targets, for every operator, dtype, kernel size and scale (sm_89 has the
    memory of sm_86, and its kernels ask for the same)."""
    long = request.config.getoption("--long")
    targets = ("cuda:75", "cuda:86", *["cuda:80", "cuda:90", "cuda:120"] * long)
    rows = rows_of(SCRIPT, "--shared", *targets, *["--corners"] * long)
    assert {row["target"] for row in rows} == set(targets)
    large = [row for row in rows if row["shared"] > row["limit"]]
    assert not large, "\n".join(str(row) for row in large)


# ---------------------------------------------------------------------------------------------------------------
# What kernels do on sm_90
# ---------------------------------------------------------------------------------------------------------------


def test_counts_are_those_in_the_notes(model, request):
    """Counts are those of the table in bench/NOTES.md. More work fails, and less fails too until the table is written
    again. Only rounding is allowed for."""
    if f"triton=={triton.__version__}" not in PINS.read_text().split():
        pytest.skip("counted with the pinned Triton")
    lines = [line.strip("|").split("|") for line in NOTES.read_text().splitlines()]
    lines = [[cell.strip() for cell in line] for line in lines]
    names = next(line for line in lines if line[:2] == ["case", "kernel"])
    table = [line for line in lines if len(line) == len(names) and line[0] not in ("case", "---")]
    noted = {tuple(line[:2]): line for line in table}
    assert len(noted) == len(table)
    figures, differ = [line[1:] for line in noted.values()], []
    for row in model:
        line = noted.pop((row["case"], row["kernel"]), None)
        if [str(row[name]) for name in names[1:]] in figures:  # several cases may have it in common
            continue
        if line is None:
            differ.append(f"{row['case']} {row['kernel']}: not in the table")
            continue
        for name in names[names.index("traffic") :]:
            figure = line[names.index(name)]
            if name == "limit" or str(row[name]) == figure:
                continue
            if name == "instructions" or abs(row[name] - float(figure)) > 0.011:
                differ.append(f"{row['case']} {row['kernel']}: {name} {row[name]}, noted as {figure}")
    assert not differ, "\n".join([*differ, "python tests/cost_model.py writes the table"])
    assert not noted or not request.config.getoption("--long")


def test_enough_warps_hide_latency(model, request):
    least = {"reassemble_forward": 12, "reassemble_backward_features": 8, "reassemble_backward_kernels": 8}
    rows = [row for row in model if row["kernel"] in least]
    assert len(rows) == (52 if request.config.getoption("--long") else 24)
    few = [f"{row['case']} {row['kernel']}: {row['warps']}" for row in rows if row["warps"] < least[row["kernel"]]]
    assert not few, "\n".join(few)


def test_reassembly_multiplies_matrices_and_streams_are_wide(model):
    """Maps are read and written 16 bytes at a time; in NCHW in pairs of columns where windows begin at even ones, and
    one by one where the width is odd."""
    for row in model:
        if not row["kernel"].startswith("reassemble"):
            continue
        case = f"{row['case']} {row['kernel']}"
        assert row["tensor cores"] > 0, case
        pair = 2 * {"bfloat16": 2, "float32": 4}[row["dtype"]]
        for access, sizes in row["widths"].items():
            name = access.split()[1]
            if name not in ("features_ptr", "output_ptr", "grad_output_ptr", "grad_features_ptr"):
                continue
            least = 16
            if row["layout"] == "NCHW":
                if row["width"] % 2:
                    least = pair // 2
                elif name == "features_ptr":
                    least = pair
                elif name == "grad_output_ptr" and row["kernel"] == "reassemble_backward_features":
                    least = min(16, row["scale"] * pair)  # strips begin two source pixels early
                elif row["width"] % 4:
                    least = 8
            assert set(sizes) == {str(least)}, f"{case}: {access} {sizes}"
        if row["operator"] == "dlu_upsample":  # masks and logits have taps that are far from each other, or odd
            assert set(row["widths"]["ld.global kernels_ptr"]) == {"16"}, case


def test_odd_widths_take_a_loop_of_their_own(model):
    """In NCHW: of maps whose rows come in runs of 16 bytes, of even ones, and of odd ones, the slowest."""
    counts = {
        (row["layout"], row["width"]): row["instructions"]
        for row in model
        if row["kernel"] == "reassemble_forward" and row["operator"] == "dlu_upsample"
        and (row["dtype"], row["channels"], row["scale"]) == ("bfloat16", 256, 2)
    }  # fmt: skip
    assert len({counts["channels_last", width] for width in (166, 167, 168)}) == 1
    wide, even, odd = (counts["NCHW", width] for width in (168, 166, 167))
    assert even <= 1.05 * wide
    assert odd <= 1.6 * wide
    if f"triton=={triton.__version__}" in PINS.read_text().split():
        page = " ".join(PAGE.read_text().split())
        assert [f"bytes | {count} |" in page for count in (wide, even, odd)] == [True] * 3, (wide, even, odd)


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
                limit(row) // (row["shared"] + 1024),
                WARPS[target] // row["warps"],
            )
            if programs * row["warps"] < least:
                few.append(f"{row['case']}: {programs * row['warps']} warps, {row['registers']} registers")
    assert not few, "\n".join(few)
