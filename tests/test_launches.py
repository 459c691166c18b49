"""What the host does for a call: how many launches, when it compiles, and what it keeps to launch again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("launch_again.py")
HOST = Path(__file__).parents[1] / "bench" / "host.py"
LAYOUTS = ("contiguous_format", "channels_last")


def run(script):
    """What a script prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def report():
    return run(SCRIPT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_passes_take_few_launches(report, layout):
    """Softmax and reassembly for DLU, one each for CARAFE with masks and with logits, softmax and sampling alone."""
    assert report[f"forward {layout}"]["launches"] == 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_passes_take_few_launches(report, layout):
    """Softmax, kernels, softmax again and features for DLU; features and kernels for CARAFE; softmax, sampling and
    softmax again where there are no features."""
    assert report[f"backward {layout}"]["launches"] == 4 + 2 + 2 + 3
    assert report["launches of a backward pass"] == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_size_compiles_nothing(report, layout):
    """Even and odd, large and small, one image and many, after a call of another size."""
    found = report[f"forward {layout}"]
    assert found["compiled at first"] == 5  # softmax is the same twice
    assert found["compiled"] == found["compiled for cut outputs"] == 0


def test_a_new_size_compiles_gradients_where_its_runs_differ(report):
    """In NCHW by what divides the width; everywhere where a small map has its channels shared out in smaller blocks."""
    assert report["backward contiguous_format"]["compiled"] <= 20  # six sizes, three operators with features
    assert report["backward channels_last"]["compiled"] <= 6
    assert report["backward contiguous_format"]["compiled for cut outputs"] <= 12  # two sizes, three operators
    assert report["backward channels_last"]["compiled for cut outputs"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("step", "launches"), [("forward", 5), ("backward", 11)])
def test_a_call_alike_repeats_its_launches(report, step, launches, layout):
    """With the arguments that Triton would pass on, and without keeping tensors alive."""
    repeated = report[f"{step} {layout}"]["repeated"]
    assert repeated.pop("afresh") == (launches if step == "forward" else launches - 1)  # two softmaxes are alike
    assert repeated == {"through Triton": 0, "same": True, "held": 0}


def test_calls_that_differ_are_told_apart(report):
    """A kernel for other types, or for tensors that are aligned, would read wrong or fault."""
    assert report["alike"].pop("again")
    assert report["alike"] == dict.fromkeys(
        ("dtype", "settings", "shape", "strides", "alignment", "tf32", "forward and backward"), False
    )


def test_few_launches_are_kept(report):
    """Of calls at ever new sizes."""
    assert report["kept of many"] <= 3


def test_eager_code_takes_the_cheapest_way():
    """By the functions that a call calls: fewer than by the registered op, by a Function that does nothing at least;
    beyond checks and launches no more than three of these. Counted: 1.1 or more, and 3 or less."""
    for op, passes in run(HOST).items():
        launches, checks = (passes["forward"][part] for part in ("launches", "checks"))
        for name, took in passes.items():
            assert took["registered"] - took["dlu_triton"] > took["Function"], (op, name, took)
            parts = took.get("launches", launches) + took.get("checks", checks)
            assert took["dlu_triton"] - parts <= 3 * took["Function"], (op, name, took)
