"""Examples of README and the pages run when pasted, and the page of names has them all."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dlu_triton

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^(?:<!-- requires: (.+) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = re.compile(r"^ *(?:```+|~~~+|:::+)([^\s`~:]+)", re.MULTILINE)
# In one namespace, under the file's name and at its own lines, where tracebacks and `inspect` find the text.
RUN = """
import json, sys, torch
torch.manual_seed(0)
_blocks = json.load(sys.stdin)
for _path, _line, _text in _blocks:
    exec(compile("\\n" * _line + _text, _path, "exec"), globals())
"""
CHECKS = {  # what holds after the blocks of a page have run
}


def blocks(page):
    """Of each block of Python: the modules that it requires, its line, its text."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        requires = re.split(r", *", block[1]) if block[1] else []
        yield requires, text.count("\n", 0, block.start(2)), block[2]


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name)
def test_examples_run_when_pasted(page, tmp_path):
    """On a CPU without the interpreter. Warnings fail, but for those of other packages as they are imported."""
    runs, missing = [], {}
    for requires, line, text in blocks(page):
        absent = [each for each in requires if importlib.util.find_spec(each) is None]
        if absent:
            missing[line] = absent
        else:
            runs.append((str(page), line, text))
    if name(page) in CHECKS and not missing:
        runs.append((f"checks of {name(page)}", 0, CHECKS[name(page)]))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(dlu_triton.__file__).parents[1])  # the one that is tested
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN],
        input=json.dumps(runs), env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    if missing:
        pytest.skip("; ".join(f"line {line} needs {', '.join(absent)}" for line, absent in missing.items()))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_known(page):
    """So that none is left out by a slip: Python is called that, and what a block requires stands right above it."""
    text = page.read_text()
    assert {language for language in LANGUAGES.findall(text) if language[0] != "{"} <= {"python", "console", "yaml"}
    assert text.count("```python") == len(list(blocks(page)))
    assert text.count("<!-- requires") == sum(bool(requires) for requires, *_ in blocks(page))


def test_page_of_names_has_them_all():
    page = ROOT.joinpath("docs", "api.md").read_text()
    module, named = None, []
    for kind, argument in re.findall(r"^\.\. (\w+):: (\S+)$", page, re.MULTILINE):
        if kind == "currentmodule":
            module = argument
        elif kind == "automodule":
            named.append(argument.removeprefix("dlu_triton."))
        elif kind.startswith("auto"):
            assert module == "dlu_triton"
            named.append(argument)
    assert sorted(named) == sorted(dlu_triton.__all__)
