"""Kernels as compiled for GPUs that are not here: tests and `verify`, emulated (see `tests/emulator`).

    python bench/emulated.py sm_80 sm_90 sm_120  # a selection of the tests; no target: all six
    python bench/emulated.py --record && python bench/report.py

Prints what passed for each target, and fails if anything did not, or if a kernel of the library was not launched.
--long runs all tests except those that are marked long, which takes hours for all targets. --record runs the selection
and all of `python -m dlu_triton verify`, and writes bench/results/emulated.json. Jobs run side by side, each in a
process of its own.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench/results/emulated.json"
# Tests, and which of them (-k): golden cases, by hand; typical cases in all dtypes; cut outputs, hostile values, big
# launches in part, determinism. Blocks and additions come in random orders.
SELECTION = (
    ("test_operators.py", "test_error_against_float64 and typical or of_small_magnitude"),
    ("test_golden.py", "kernels and (float32 or cam_0)"),
    ("test_deterministic.py", "repeat or beside or terms or finite"),
    ("test_sizes.py", "parts_of_huge_maps[ and row or parts_of_many_planes and class"),
    ("test_hostile.py", "damage_of_maps and kernels and small and nan or damage_ends and float32 and not path"),
    ("test_cam.py", "test_error_against_float64 and (xgradcam- or plane) or partial_maps_are_added_once"),
    ("test_output_size.py", "is_the_first_part_of_all and odd and not twin"),
    ("test_by_hand.py", "kernels"),
)
FILES = sorted(file.name for file in ROOT.joinpath("tests").glob("test_*.py"))
ALL = tuple((name, "") for name in FILES if not name.startswith(("test_emulator", "test_compiled")))
OPERATORS = ("dlu_upsample", "expand_kernels", "carafe", "carafe_upsample", "class_activation_map")


def verify(target: str, operator: str) -> dict[str, Any]:
    """All results of `python -m dlu_triton verify` for one operator."""
    import emulator

    from dlu_triton import _verify

    passed, failed = 0, []
    with emulator.running(target) as report:
        for _, dtype, case, comparisons in _verify.rows("cpu", [operator]):
            wrong = [name for name, each in comparisons.items() if not each.passed]
            passed += len(comparisons) - len(wrong)
            failed += [f"verify {operator} {dtype} {case.name}: {name}" for name in wrong]
    findings = [each.message for each in report.findings.values()]
    return {"results": passed, "failed": failed, "launches": report.launches, "findings": findings}


def test(target: str, tests: str, words: str, *options: str) -> dict[str, Any]:
    import pytest

    found: dict[str, Any] = {}
    launching: set[str] = set()  # tests that launch kernels: others are not counted

    class Outcomes:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self, item: pytest.Item) -> Any:
            from emulator import state

            before = state.report.launches.total()
            try:
                return (yield)
            finally:
                if state.report.launches.total() > before:
                    launching.add(item.nodeid)

        def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
            from emulator import state

            stats, report = terminalreporter.stats, state.report
            failed = [each.nodeid for outcome in ("failed", "error") for each in stats.get(outcome, ())]
            found.update(
                tests=sum(each.nodeid in launching for each in stats.get("passed", ())), failed=failed,
                launches=report.launches, findings=[each.message for each in report.findings.values()],
            )  # fmt: skip

    os.chdir(ROOT)
    arguments = ["--emulate", target, "--shuffle", "1", f"tests/{tests}", "-k", words, *options]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[Outcomes()])
    if code != pytest.ExitCode.OK:
        print(output.getvalue(), flush=True)
        found["failed"] = found.get("failed") or [f"pytest {' '.join(arguments)}: {code!r}"]
    return found


def main() -> int:
    os.environ |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}  # before anything imports Triton, here or in a job
    sys.path.insert(0, str(ROOT / "tests"))
    import machine
    from emulator import TARGETS
    from test_compiled import KERNELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--long", action="store_true", help="all tests except those that are marked long")
    more.add_argument("--record", action="store_true", help="verify as well, and write bench/results/emulated.json")
    options = parser.parse_args()
    if not set(options.targets) <= set(TARGETS):
        parser.error(f"targets must be of {', '.join(TARGETS)}, got {' '.join(options.targets)}")
    record = {"machine": machine.info(), "datetime": datetime.now(UTC).isoformat()}
    jobs = [(test, *each) for each in ALL] if options.long else [(test, *each, "--long") for each in SELECTION]
    if options.record:
        jobs = [(verify, operator) for operator in OPERATORS] + jobs
    rows: dict[str, dict[str, Any]] = {}
    problems = []
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawned, max_tasks_per_child=1) as pool:
        running = {target: [pool.submit(job, target, *each) for job, *each in jobs] for target in options.targets}
        for target, results in running.items():
            row = {"results": 0, "tests": 0, "launches": Counter(), "failed": [], "findings": []}
            for result in results:
                for key, value in result.result().items():
                    row[key] += value
            row["failed"] += [f"{kernel} was not launched" for kernel in sorted(KERNELS - row["launches"].keys())]
            found = (
                f"{row['results']} results of verify, {row['tests']} tests passed, {row['launches'].total()} launches"
            )
            print(f"{target}: {found}", *row["failed"], *row["findings"], sep="\n", flush=True)
            problems += row["failed"] + row["findings"]
            rows[target] = row
            if options.record and not problems:
                targets = {each: rows[each] for each in TARGETS if each in rows}
                RESULT.write_text(json.dumps(record | {"targets": targets}, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
