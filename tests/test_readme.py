"""README's code runs when pasted, and its definitions are what the library computes."""

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import dlu_triton
from dlu_triton import _count, _verify

ROOT = Path(__file__).parents[1]
README = ROOT.joinpath("README.md").read_text()
CONSTRAINTS = dict(re.findall(r"^([\w-]+)==(\S+)$", ROOT.joinpath("constraints.txt").read_text(), re.MULTILINE))
UPSAMPLE, DEFINITIONS, EXPLAIN, MIGRATION, SUBCLASS, EXPORT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CHECKS = {
    UPSAMPLE: "assert output.shape == (2, 64, 50, 84) and features.grad is not None",
    EXPLAIN: "assert explanation.map.shape == (2, 64, 64) and several.map.shape == (2, 3, 64, 64)\n"
    "assert explanation.map.amin() == 0 and explanation.map.amax() == 1\n"
    "assert conservation.shape == sensitivity.shape == (2, 3) and sensitivity.max() < 1e-5\n"
    "assert pictures.shape == (2, 3, 64, 64, 3)",
}


@pytest.mark.parametrize("example", (UPSAMPLE, EXPLAIN), ids=("upsample", "explain"))
def test_example_runs_when_pasted(example):
    if example is EXPLAIN:
        pytest.importorskip("matplotlib")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    seed = "import torch; torch.manual_seed(0)"  # for the errors that are checked; a model may have a score near zero
    script = f"{seed}\n{example}\n{CHECKS[example]}\n"
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_export_runs_when_pasted(tmp_path):
    """The exporter talks about what it does."""
    pytest.importorskip("onnxscript")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", EXPORT], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert {"upsampler.pt2", "upsampler.onnx"} <= {path.name for path in tmp_path.iterdir()}


def test_versions_are_those_of_the_project():
    """README and the linter say what pyproject.toml requires; constraints.txt and the versions here are within it."""
    settings = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())
    project = settings["project"]
    required = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    python, torch_, triton_ = (
        str(specifier).removeprefix(">=")
        for specifier in (project["requires-python"], required["torch"], required["triton"])
    )
    text = " ".join(README.split())
    assert f"with Python {python} or newer" in text
    assert f"the torch you have ({torch_} or newer, with Triton {triton_} or newer;" in text
    assert settings["tool"]["ruff"]["target-version"] == f"py{python.replace('.', '')}"
    extras = project["optional-dependencies"].values()
    for requirement in map(Requirement, chain(project["dependencies"], *extras)):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(CONSTRAINTS[requirement.name]), requirement
    for name, specifier in required.items():
        assert specifier.contains(importlib.metadata.version(name), prereleases=True)


def test_rows_of_what_it_works_with_link_to_tests():
    table = README.partition("## Works with")[2].partition("\n\n\\*")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        links = re.findall(r"\[(test_\w+)\]\((tests/test_\w+\.py)\)", row.split("|")[3])
        assert links, row
        for name, path in links:
            assert f"\ndef {name}(" in ROOT.joinpath(path).read_text(), row


def test_table_of_costs_is_what_the_command_prints(capsys):
    assert _count.run(256) == 0
    printed = textwrap.indent(capsys.readouterr().out.rstrip(), "    ", lambda line: bool(line.strip()))
    assert printed in README


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


def test_subclass():
    """What it does is compared in test_neighbours.py, where pytorch-grad-cam is installed."""
    compile(SUBCLASS, "README.md", "exec")


def test_migration(device):
    """The two lines, with targets as pytorch-grad-cam has them: functions of one image's output."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    names = {
        "dlu_triton": dlu_triton,
        "model": model.to(device),
        "target_layers": [model[1]],
        "input_tensor": torch.rand(2, 3, 8, 8, device=device),
        "targets": [lambda output: output[3], lambda output: output[0]],
    }
    exec(MIGRATION, names)
    assert names["grayscale_cam"].shape == (2, 8, 8)
    expected = dlu_triton.XGradCAM(model, "1", eps=1e-7)(names["input_tensor"], [3, 0]).map
    torch.testing.assert_close(torch.from_numpy(names["grayscale_cam"]), expected.cpu())


def test_tables_and_plots_are_those_of_the_results():
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, ROOT / "bench" / "report.py", "--check"], capture_output=True, text=True)
    stale = re.findall(r"^(\S+) is out of date", done.stderr, re.MULTILINE)
    others = [name for name in ("matplotlib", "numpy") if importlib.metadata.version(name) != CONSTRAINTS[name]]
    if stale and others and all(name.endswith(".svg") for name in stale):
        pytest.skip(f"draws with {' and '.join(others)} of another version")
    assert done.returncode == 0, done.stderr
