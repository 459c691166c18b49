"""The mutants of `mutants.py` still fit the library, and a run of one tells what became of it."""

import ast
import os
import subprocess
import sys
from collections import Counter

import mutants
import pytest
from mutants import COMPLEXITY, MUTANTS, ROOT, Mutant

if not ROOT.joinpath("dlu_triton").exists():
    pytest.skip("changes the package beside the tests", allow_module_level=True)


def test_names_differ():
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []


def test_every_change_is_one_and_compiles():
    problems = []
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        try:
            ast.parse(mutants.mutated(mutant, text))
        except (ValueError, SyntaxError) as error:
            problems.append(f"{mutant.name}: {error}")
        if mutant.old == mutant.new:
            problems.append(f"{mutant.name}: changes nothing")
    assert not problems, "\n".join(problems)


def test_tests_exist():
    """By pytest itself, which knows their parameters."""
    assert all(mutant.tests for mutant in MUTANTS)
    tests = sorted({f"tests/{test}" for mutant in MUTANTS for test in mutant.tests})
    try:
        import mmcv.cnn  # noqa: F401
    except ImportError:  # not installed, or without a library that it wants; its tests are not collected then
        tests = [test for test in tests if not test.startswith("tests/test_openmmlab.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr + process.stdout[-2000:]
    assert "deselected" not in process.stdout  # for --long


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "1 passed", ("survived", "")),
        (None, "", ("hang", "nothing after 600 s")),
        (1, "..F\nFAILED tests/test_a.py::test_b[c d] - assert 1 == 2\n1 failed", ("caught", "test_a.py::test_b[c d]")),
        (1, "FAILED tests/test_a.py::test_b", ("caught", "test_a.py::test_b")),
        (
            1,
            "FAILED tests/test_a.py::test_b - NameError: name 'u'",
            ("broken", "test_a.py::test_b: NameError: name 'u'"),
        ),
        (1, "ERROR tests/test_a.py::test_b - assert 3", ("broken", "test_a.py::test_b: assert 3")),
        (
            2,
            "ERROR tests/test_a.py - SyntaxError: x",
            ("broken", "exit code 2: ERROR tests/test_a.py - SyntaxError: x"),
        ),
        (4, "no tests\nERROR: not found", ("broken", "exit code 4: ERROR: not found")),
        (-11, "", ("broken", "exit code -11: ")),
    ],
)
def test_verdicts(code, output, expected):
    assert mutants.verdict(code, output) == expected


@pytest.mark.long
@pytest.mark.parametrize(
    ("new", "expected"),
    [("8 * _outputs", "caught"), ("(3 + 4) * _outputs", "survived"), ("7 * outputs", "broken")],
)
def test_what_becomes_of_one(new, expected, tmp_path):
    mutants.copy_tree(tmp_path)
    mutant = Mutant("", COMPLEXITY, "7 * _outputs", new, ("test_complexity.py::test_by_hand",))
    result = mutants.try_mutant(mutant, tmp_path)
    assert result.verdict == expected, result
