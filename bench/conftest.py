"""Options, machine information and the closing summary of the benchmarks."""

from collections import defaultdict
from typing import Any

import machine
import pytest
import triton
from records import Records

RECORDS = pytest.StashKey[Records]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="on a GPU, benchmark every shape, not the quick selection")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = Records()
    if triton.knobs.runtime.interpret and not config.getoption("benchmark_disable"):
        raise pytest.UsageError(
            "TRITON_INTERPRET is set, and the speed of the interpreter means nothing: unset it, or run the benchmarks "
            "as tests with --benchmark-disable"
        )


@pytest.fixture
def records(pytestconfig: pytest.Config) -> Records:
    """What was found in this run so far."""
    return pytestconfig.stash[RECORDS]


# ---------------------------------------------------------------------------------------------------------------
# What the results file has besides the benchmarks
# ---------------------------------------------------------------------------------------------------------------


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["unsupported"] = config.stash[RECORDS].unsupported
    for record in output_json["benchmarks"]:
        record["stats"].pop("data", None)  # every round: most of the file


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= machine.info()


# ---------------------------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    records = config.stash[RECORDS]
    passes = defaultdict(lambda: defaultdict(list))
    for record in records.measured:
        rows = passes[f"{record['case']} {record['pass']}"]
        share = "" if record["roofline"] is None else f" ({record['roofline']:.0%})"
        rows[record["op"]].append(f"{record['impl']} {record['seconds'] * 1e3:.3f} ms{share}")
    if passes:
        terminalreporter.section("median time (share of the copy's bytes per second)")
    for title, rows in passes.items():
        terminalreporter.line(title)
        for op, cells in rows.items():
            terminalreporter.line(f"  {op:<21}" + "   ".join(cells))
    if records.unsupported:
        terminalreporter.section("unsupported")
    for line in records.reasons():
        terminalreporter.line(line)
