"""What the host does for a call: how many launches, when it compiles, and what it keeps to launch again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("launch_again.py")
LAYOUTS = ("contiguous_format", "channels_last")


@pytest.fixture(scope="module")
def report():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_passes_take_few_launches(report, layout):
    """Softmax and reassembly for DLU, one each for CARAFE with masks and with logits, softmax and sampling alone."""
    assert report["launches"][layout] == 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_size_compiles_nothing(report, layout):
    """Even and odd, large and small, one image and many, after a call of another size."""
    assert report["compiled at first"][layout] == 5  # softmax is the same twice
    assert report["compiled"][layout] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_call_alike_repeats_its_launches(report, layout):
    """With the arguments that Triton would pass on, and without keeping tensors alive."""
    assert report["repeated"][layout] == {"through Triton": 0, "afresh": 5, "same": True, "held": 0}


def test_calls_that_differ_are_told_apart(report):
    """A kernel for other types, or for tensors that are aligned, would read wrong or fault."""
    assert report["alike"].pop("again")
    assert report["alike"] == dict.fromkeys(("dtype", "settings", "strides", "alignment", "tf32"), False)
