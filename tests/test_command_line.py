"""`python -m dlu_triton`, the paths that calls take, and what an import must not do."""

import os
import subprocess
import sys

import pytest
import torch

from dlu_triton import __main__, _verify


def run(*arguments, interpret=None):
    """A fresh Python, with TRITON_INTERPRET as told."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


FEW_CASES = (_verify.Case("small", channels=2, height=2, width=3, kernel_size=3),)
FEW_CAM_CASES = (_verify.CAMCase("small", "xgradcam", channels=2, height=2, width=3),)


def test_verify_passes_and_says_what_ran(monkeypatch, capsys):
    monkeypatch.setattr(_verify, "CASES", FEW_CASES)
    monkeypatch.setattr(_verify, "CAM_CASES", FEW_CAM_CASES)
    assert __main__.main(["verify"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "Triton 3." in printed
    assert ("interpreter" in printed) != torch.cuda.is_available()
    for operator in (*_verify.OPERATORS, _verify.CAM):
        for dtype in ("float64", "float32", "float16", "bfloat16"):
            assert any(line.split()[:3] == [operator, dtype, "small"] for line in printed.splitlines())
    assert "64 results checked" in printed
    assert "all within bounds" in printed
    assert "FAIL" not in printed


WRONG = {
    "two per cent too large": lambda output: output * 1.02,
    "one pixel aside": lambda output: output.roll(1, dims=3),
    "NaN": lambda output: output * float("nan"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_verify_fails_on_a_wrong_operator(wrong, monkeypatch, capsys):
    monkeypatch.setattr(_verify, "CASES", FEW_CASES)
    monkeypatch.setattr(_verify, "CAM_CASES", ())
    right = _verify.carafe
    monkeypatch.setattr(_verify, "carafe", lambda *arguments: WRONG[wrong](right(*arguments)))
    assert __main__.main(["verify"]) == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.endswith("FAIL") or " FAIL " in line]
    assert failed
    assert all(line.startswith("carafe") for line in failed)
    assert "PAST THEIR BOUND" in printed


def test_verify_interprets_by_itself_without_a_gpu():
    """Started without the variable, as a user does."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs the compiled kernels")
    script = (
        "import subprocess, sys; from dlu_triton import __main__\n"
        "subprocess.run = lambda command, env: (print(command[1:], env['TRITON_INTERPRET']),"
        " subprocess.CompletedProcess(command, 7))[1]\n"
        "sys.exit(__main__.main(['verify']))"
    )
    process = run("-c", script)
    assert process.stdout.strip() == "['-m', 'dlu_triton', 'verify'] 1"
    assert process.returncode == 7


def test_complexity_without_the_interpreter():
    """As a user starts it; the rest of the command is in test_complexity.py."""
    process = run("-m", "dlu_triton", "complexity")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count("The claim holds.") == 1


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("verify", "extra"), ("complexity", "--channels", "0")])
def test_wrong_arguments_print_usage(arguments):
    process = run("-m", "dlu_triton", *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith("usage: python -m dlu_triton")


PROBE = """
import torch, dlu_triton
from dlu_triton.ops.carafe import carafe_op
launch, twin, taken = carafe_op.launch, carafe_op.twin, []
carafe_op.launch = lambda *arguments: (taken.append("kernels"), launch(*arguments))[1]
carafe_op.twin = lambda *arguments: (taken.append("eager"), twin(*arguments))[1]
dlu_triton.carafe(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 1, 1, 1)
print(*taken)
"""


@pytest.mark.parametrize(("interpret", "path"), [(None, "eager"), ("0", "eager"), ("1", "kernels")])
def test_cpu_tensors_take_the_eager_path_unless_interpreted(interpret, path):
    process = run("-c", PROBE, interpret=interpret)
    assert process.stdout.strip() == path, process.stderr


def test_import_is_quiet_and_touches_no_device():
    script = (
        "import torch\n"
        "def forbidden(*arguments, **options): raise SystemExit('the import asked for a device')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_properties',"
        " 'get_device_capability', 'init', '_lazy_init'): setattr(torch.cuda, name, forbidden)\n"
        "state = torch.random.get_rng_state()\n"
        "import dlu_triton\n"
        "assert torch.equal(state, torch.random.get_rng_state())\n"
    )
    process = run("-c", script)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
