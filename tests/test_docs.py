"""README and the pages: what they show runs when pasted, and what they say is so."""

import ast
import importlib
import importlib.metadata
import json
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
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
CONSTRAINTS = dict(re.findall(r"^([\w-]+)==(\S+)$", ROOT.joinpath("constraints.txt").read_text(), re.MULTILINE))
BLOCK = re.compile(r"^(?:<!-- requires: ([^\n]+) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGE = re.compile(r"^ *(?:```+|~~~+|:::+)([^\s`~:]+)", re.MULTILINE)
# In one namespace, under the file's name and at its own lines, where tracebacks and `inspect` find the text.
RUN = """
import json, sys, warnings
for _kind in (DeprecationWarning, FutureWarning):  # of other packages about each other
    warnings.filterwarnings("ignore", category=_kind, module="(?!__main__|dlu_triton)")
import torch
torch.manual_seed(0)  # for the errors that are checked; a model may have a score near zero
_blocks = json.load(sys.stdin)
for _path, _line, _text in _blocks:
    exec(compile("\\n" * _line + _text, _path, "exec"), globals())
"""
CHECKS = {  # what holds after the blocks of a page have run, and what it requires
    "README.md": [
        ("", "assert output.shape == (2, 64, 50, 84) and features.grad is not None"),
        ("", "assert explanation.map.shape == (2, 64, 64)"),
    ],
    "docs/choosing.md": [
        ("", "assert (costs.dlu.parameters, costs.carafe.parameters) == (35489, 74148)"),
        ("", "assert (round(costs.parameters_saved, 2), round(costs.flops_saved, 2)) == (0.52, 0.39)"),
    ],
    "docs/examples.md": [
        ("", "assert logits.shape == (1, 11, 25, 34)"),
        ("torchvision", "assert losses['classification'] > 0 and losses['bbox_regression'] > 0"),
        (
            "ultralytics",
            "assert [type(each).__name__ for each in model.modules()].count('DLUPack') == 2",
        ),
    ],
    "docs/explain.md": [
        ("", "assert explanation.map.shape == (2, 64, 64) and several.map.shape == maps.shape == (2, 3, 64, 64)"),
        ("", "assert explanation.map.amin() == 0 and explanation.map.amax() == 1"),
        ("", "assert conservation.shape == sensitivity.shape == (2, 3) and sensitivity.max() < 1e-5"),
        ("matplotlib", "assert pictures.shape == (2, 3, 64, 64, 3)"),
        ("", "expected = dlu_triton.XGradCAM(model, '1', eps=1e-7)(images, [3, 0]).map.cpu()"),
        ("", "torch.testing.assert_close(torch.from_numpy(grayscale_cam), expected)"),
    ],
    "docs/openmmlab.md": [
        ("mmengine, mmcv", "assert [tuple(x.shape[-2:]) for x in pyramid] == [*sizes.values(), (2, 3)]"),
        ("mmengine, mmcv", "assert finer.shape == (1, 256, 14, 18) and odd.shape == (1, 256, 13, 17)"),
        (
            "mmengine, mmcv",
            "assert all(map(torch.equal, neck.state_dict().values(), pretrained.state_dict().values()))",
        ),
        ("mmengine, mmcv", "assert MODELS.get('carafe').__module__ == 'dlu_triton.integrations.openmmlab'"),
    ],
    "docs/works-with.md": [
        ("", "assert torch.export.load('upsampler.pt2').module()(*inputs).shape == (2, 64, 50, 84)"),
        ("", "assert output.placements == (Shard(0),) and output.shape == (2, 64, 50, 84)"),
        ("", "torch.testing.assert_close(output.to_local(), dlu_triton.dlu_upsample(*whole, scale_factor=2))"),
        ("onnx, onnxscript", "assert {node.op_type for node in __import__('onnx').load('upsampler.onnx').graph.node}"),
    ],
}


def blocks(page):
    """Of each block of Python: the modules that it requires, its line, its text."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        yield block[1] or "", text.count("\n", 0, block.start(2)), block[2]


def absent(requires):
    """Which of the modules cannot be imported: beside another build of PyTorch some that are installed cannot."""
    found = []
    for module in re.findall(r"[\w.]+", requires):
        try:
            importlib.import_module(module)
        except (ImportError, RuntimeError):
            found.append(module)
    return found


def run(arguments, **settings):
    """Python without the interpreter, and with the package that is tested."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(dlu_triton.__file__).parents[1])
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **settings)


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name)
def test_examples_run_when_pasted(page, tmp_path):
    """From the root of a clone, on a CPU without the interpreter; warnings are errors."""
    tmp_path.joinpath("examples").symlink_to(ROOT / "examples")
    runs, missing = [], []
    for requires, line, text in blocks(page):
        if absent(requires):
            missing.append(f"line {line} needs {', '.join(absent(requires))}")
        else:
            runs.append((str(page), line, text))
    checks = [check for requires, check in CHECKS.get(name(page), []) if not absent(requires)]
    runs.append((f"checks of {name(page)}", 0, "\n".join(checks)))
    process = run(["-W", "error", "-c", RUN], cwd=tmp_path, input=json.dumps(runs))
    assert process.returncode == 0, process.stderr
    if missing:
        pytest.skip("; ".join(missing))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_known(page):
    """None is left out by a slip: Python is called that, what a block requires is right above it, and it is Python."""
    text, found = page.read_text(), list(blocks(page))
    assert {language for language in LANGUAGE.findall(text) if language[0] != "{"} <= {"python", "console", "yaml"}
    assert text.count("```python") == len(found)
    assert text.count("<!-- requires") == sum(bool(requires) for requires, *_ in found)
    for _, line, block in found:
        compile("\n" * line + block, str(page), "exec")


def test_checks_are_of_pages_with_blocks():
    assert set(CHECKS) <= {name(page) for page in PAGES if any(blocks(page))}


def test_page_of_names_has_them_all():
    """Each once, but for `CAMParts`, which `reference` shares. The builder fails where one of them does not exist."""
    page = ROOT.joinpath("docs", "api.md").read_text()
    documented = re.findall(r"^\.\. auto\w+:: dlu_triton\.(\S+)$", page, re.MULTILINE)
    names = [*dlu_triton.__all__]
    for module in (dlu_triton.metrics, dlu_triton.reference):
        path = module.__name__.removeprefix("dlu_triton.")
        names += [f"{path}.{each}" for each in module.__all__ if f"{path}.{each}" != "reference.CAMParts"]
    for path in Path(dlu_triton.__file__).parent.glob("integrations/[!_]*.py"):  # need packages that may not be there
        exported = re.search(r"^__all__ = (\[.*?\])$", path.read_text(), re.MULTILINE | re.DOTALL)[1]
        module = f"integrations.{path.stem}"
        names += [module, *(f"{module}.{each}" for each in ast.literal_eval(exported))]
    assert sorted(documented) == sorted(names)
    table = page[: page.index("## ")]
    assert {each for each in dlu_triton.__all__ if f"`{each}`" not in table} == {"CAMParts", "Complexity"}  # returned


def test_versions_are_those_of_the_project():
    """README and the linter say what pyproject.toml requires; constraints.txt and the versions here are within it."""
    settings = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())
    project = settings["project"]
    required = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    python, torch_, triton_ = (
        str(specifier).removeprefix(">=")
        for specifier in (project["requires-python"], required["torch"], required["triton"])
    )
    text = " ".join(ROOT.joinpath("README.md").read_text().split())
    assert f"with Python {python} or newer" in text
    assert f"the torch you have ({torch_} or newer, with Triton {triton_} or newer;" in text
    assert settings["tool"]["ruff"]["target-version"] == f"py{python.replace('.', '')}"
    extras = project["optional-dependencies"].values()
    for requirement in map(Requirement, chain(project["dependencies"], *extras)):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(CONSTRAINTS[requirement.name]), requirement
    for package, specifier in required.items():
        assert specifier.contains(importlib.metadata.version(package), prereleases=True)


def test_rows_of_what_it_works_with_link_to_tests():
    table = ROOT.joinpath("docs", "works-with.md").read_text().partition("\n\n\\*")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        links = re.findall(r"\[(test_\w+)\]\(\.\./(tests/test_\w+\.py)\)", row.split("|")[3])
        assert links, row
        for test, path in links:
            assert f"\ndef {test}(" in ROOT.joinpath(path).read_text(), row


def test_table_of_costs_is_what_the_command_prints(capsys):
    assert _count.run(256) == 0
    printed = textwrap.indent(capsys.readouterr().out.rstrip(), "    ", lambda line: bool(line.strip()))
    assert printed in ROOT.joinpath("docs", "choosing.md").read_text()


@pytest.mark.parametrize("operator", _verify.OPERATORS)
@pytest.mark.parametrize("groups", (1, 2))
def test_definitions(operator, groups, device):
    ((_, _, definitions),) = blocks(ROOT / "docs" / "definitions.md")
    written = {}
    exec(definitions, written)
    case = _verify.Case("", batch=2, channels=4, height=3, width=4, scale_factor=2, kernel_size=5, groups=groups)
    arguments = _verify.inputs(operator, case, torch.float64, device)
    del arguments["grad_output"]
    sizes = (5, groups, 2) if operator == "carafe" else (2, 5, groups)
    expected = written[operator](*arguments.values(), *sizes)
    for eager in (True, False):
        found = _verify.function(operator, case, eager=eager)(*arguments.values())
        torch.testing.assert_close(found, expected)


def test_tables_and_plots_are_those_of_the_results():
    pytest.importorskip("matplotlib")
    done = run([ROOT / "bench" / "report.py", "--check"])
    stale = re.findall(r"^(\S+) is out of date", done.stderr, re.MULTILINE)
    others = [name for name in ("matplotlib", "numpy") if importlib.metadata.version(name) != CONSTRAINTS[name]]
    if stale and others and all(name.endswith(".svg") for name in stale):
        pytest.skip(f"draws with {' and '.join(others)} of another version")
    assert done.returncode == 0, done.stderr
