"""What `.ci/matrix.py` makes of versions, of pytest's reports and of rows that fail; no environment is made."""

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / ".ci" / "matrix.py"
if not FILE.exists():
    pytest.skip("is not in source distributions", allow_module_level=True)
spec = importlib.util.spec_from_file_location("matrix", FILE)
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)


def test_lower_bounds_are_constraints_of_the_oldest():
    python, lines = matrix.constraints("oldest")
    bounds = matrix.lower_bounds()
    assert python == bounds.pop("python") == matrix.PROJECT["requires-python"].removeprefix(">=")
    assert {"torch", "triton", "numpy"} < set(bounds)
    assert lines == [f"{name}=={version}" for name, version in bounds.items()]


def test_versions_by_number():
    expected = ["torch==2.11.0", "triton==3.6.0", "numpy==2.0"]
    assert matrix.constraints("3.12/2.11.0/3.6.0/numpy==2.0") == ("3.12", expected)


@pytest.mark.parametrize(
    ("status", "kinds", "failed"),
    [
        (0, ("", "<skipped/>", ""), []),
        (1, ("", "<skipped/>", "", "<failure/>", "<error/>"), ["a::3", "a::4"]),
        (1, ("", "<skipped/>", ""), ["pytest exited with 1"]),
        (2, ("", "<skipped/>", "", "<failure/>"), ["a::3", "pytest exited with 2"]),
        (-9, ("", "<skipped/>", ""), ["pytest exited with -9"]),
    ],
)
def test_outcomes(status, kinds, failed, tmp_path):
    """A run that was interrupted fails, whatever had passed by then."""
    report = tmp_path / "report.xml"
    cases = [f"<testcase classname='a' name='{n}'>{kind}</testcase>" for n, kind in enumerate(kinds)]
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert matrix.outcome(report, status) == (2, failed, 1)


def test_a_run_without_a_report_fails(tmp_path):
    assert matrix.outcome(tmp_path / "report.xml", 4) == (0, ["pytest exited with 4"], 0)
    assert matrix.outcome(tmp_path / "report.xml", 0) == (0, ["nothing ran"], 0)


def test_tests_have_no_package_beside_them(tmp_path):
    source = tmp_path / "source"
    for name in ("dlu_triton/__init__.py", "tests/test_a.py", "pyproject.toml"):
        source.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        source.joinpath(name).touch()
    with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as archive:
        archive.add(source, "dlu_triton-1")
    tree = matrix.tests_of(tmp_path / "sdist.tar.gz", tmp_path / "unpacked")
    assert {path.name for path in tree.iterdir()} == {"tests", "pyproject.toml"}


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, ["pip"]), FileNotFoundError("there is no Python")])
def test_a_row_that_fails_leaves_the_others(error, monkeypatch, capsys):
    def environment(folder, versions, wheel):
        if versions == "newest":
            raise error
        return Path(sys.executable)

    row = dict.fromkeys(matrix.COLUMNS, 7)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # which is given back afterwards
    monkeypatch.setattr(sys, "argv", ["matrix.py", "oldest", "newest", "tested", "--", "tests/test_a.py"])
    monkeypatch.setattr(matrix, "distributions", lambda folder: (None, None))
    monkeypatch.setattr(matrix, "tests_of", lambda sdist, folder: folder)
    monkeypatch.setattr(matrix, "environment", environment)
    monkeypatch.setattr(matrix, "run", lambda python, tree, selection: (row, []))
    assert matrix.main() == 1
    failure, header, *rows = capsys.readouterr().out.splitlines()
    assert failure == f"newest: {error}"
    assert header.split() == list(matrix.COLUMNS)
    assert [line.split() for line in rows] == [["7"] * 8, ["newest", "-", "-", "-", "-", "1", "-", "-"], ["7"] * 8]
