"""Kernels as compiled for GPUs that are not here: tests and `verify`, emulated (see `tests/emulator`).

    python bench/emulated.py sm_80 sm_90 sm_120  # a selection of the tests; --long: all; no target: all six
    python bench/emulated.py --record && python bench/report.py

Prints what passed for each target, and fails if anything did not. --record runs all of `python -m dlu_triton verify`
as well, and writes bench/results/emulated.json, where other targets stay if they are of the same commit. Jobs run side
by side, each in a process of its own.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench/results/emulated.json"
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
# Arguments of pytest, a job each: golden cases, by hand; typical cases in all dtypes, and maps; cut outputs, hostile
# values, big launches in part, determinism in shuffled orders.
SELECTION = (
    "tests/test_golden.py tests/test_by_hand.py -k 'kernels and (by_hand or float32 or cam_0) and not dlu_0 and "
    "not dlu_3 and not carafe_2'",
    "tests/test_operators.py::test_error_against_float64 tests/test_operators.py::test_float32_of_small_magnitude "
    "tests/test_cam.py::test_error_against_float64 tests/test_cam.py::test_partial_maps_are_added_once_for_large_maps "
    "--long -k 'typical or xgradcam- or small_magnitude or added_once'",
    "tests/test_output_size.py::test_is_the_first_part_of_all tests/test_hostile.py::test_damage_of_maps "
    "tests/test_hostile.py::test_damage_ends_where_the_definition_or_the_tile_does "
    "tests/test_sizes.py::test_parts_of_huge_maps tests/test_sizes.py::test_parts_of_many_planes "
    "tests/test_deterministic.py --shuffle 1 -k 'kernels- and not path and (odd or float32 or small and nan) or "
    "parts_of and (row or class) or deterministic and not expand and not exact and not (magnitude and not -120)'",
)
EVERYTHING = ("tests --long --ignore-glob=*test_emulator*",)
OPERATORS = ("dlu_upsample", "expand_kernels", "carafe", "carafe_upsample", "class_activation_map")


def verify(target: str, operator: str) -> dict[str, Any]:
    """All results of `python -m dlu_triton verify` for one operator."""
    sys.path.insert(0, str(ROOT / "tests"))
    import emulator

    from dlu_triton import _verify

    passed, failed = 0, []
    with emulator.running(target) as report:
        for _, dtype, case, comparisons in _verify.rows("cpu", [operator]):
            wrong = [name for name, each in comparisons.items() if not each.passed]
            passed += len(comparisons) - len(wrong)
            failed += [f"verify {operator} {dtype} {case.name}: {name}" for name in wrong]
    findings = [each.message for each in report.findings.values()]
    return {"results": passed, "failed": failed, "launches": report.launches.total(), "findings": findings}


def test(target: str, arguments: str) -> dict[str, Any]:
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
                launches=report.launches.total(), findings=[each.message for each in report.findings.values()],
            )  # fmt: skip

    os.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = pytest.main(
            ["-p", "no:cacheprovider", "--emulate", target, *shlex.split(arguments)], plugins=[Outcomes()]
        )
    if code != pytest.ExitCode.OK:
        print(output.getvalue(), flush=True)
        found["failed"] = found.get("failed") or [f"pytest {arguments}: {code!r}"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET")
    parser.add_argument("--long", action="store_true", help="all tests")
    parser.add_argument("--record", action="store_true", help="verify as well, and write bench/results/emulated.json")
    options = parser.parse_args()
    os.environ |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}  # of the processes below, before they import
    jobs = [(test, target, each) for target in options.targets for each in (EVERYTHING if options.long else SELECTION)]
    if options.record:
        jobs = [(verify, target, each) for target in options.targets for each in OPERATORS] + jobs
    rows: dict[str, dict[str, Any]] = {}
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawned, max_tasks_per_child=1) as pool:
        for (_, target, _), result in zip(jobs, [pool.submit(*job) for job in jobs], strict=True):
            row = rows.setdefault(target, {"results": 0, "tests": 0, "launches": 0, "failed": [], "findings": []})
            for key, value in result.result().items():
                row[key] += value
    for target, row in rows.items():
        print(f"{target}: {row['results']} results of verify, {row['tests']} tests passed, "
              f"{row['launches']} launches, {len(row['failed'])} failed, {len(row['findings'])} findings")  # fmt: skip
    problems = [line for row in rows.values() for line in row["failed"] + row["findings"]]
    if options.record and not problems:
        import machine

        record = {"machine": machine.info(), "datetime": datetime.now(UTC).isoformat(), "targets": rows}
        before = json.loads(RESULT.read_text()) if RESULT.exists() else None
        if before is not None and before["machine"]["commit"] == record["machine"]["commit"]:
            record["targets"] = before["targets"] | rows
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(*problems, sep="\n", end="")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
