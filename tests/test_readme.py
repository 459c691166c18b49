"""README's code runs when pasted, and its definitions are what the library computes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlu_triton import _verify

README = Path(__file__).parents[1].joinpath("README.md").read_text()
EXAMPLE, DEFINITIONS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_example_runs_when_pasted():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = EXAMPLE + "\nassert output.shape == (2, 64, 50, 84) and features.grad is not None\n"
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@pytest.mark.parametrize("operator", _verify.OPERATORS)
@pytest.mark.parametrize("groups", (1, 2))
def test_definitions(operator, groups, device):
    written = {}
    exec(DEFINITIONS, written)
    case = _verify.Case("", batch=2, channels=4, height=3, width=4, scale_factor=2, kernel_size=5, groups=groups)
    arguments = _verify.inputs(operator, case, torch.float64, device)
    del arguments["grad_output"]
    sizes = (5, groups, 2) if operator == "carafe" else (2, 5, groups)
    expected = written[operator](*arguments.values(), *sizes)
    for eager in (True, False):
        found = _verify.function(operator, case, eager=eager)(*arguments.values())
        torch.testing.assert_close(found, expected)
