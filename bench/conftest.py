"""Options, machine information and the closing summary of the benchmarks."""

from collections import defaultdict
from typing import Any

import machine
import measure
import pytest
import triton
from records import Records

RECORDS = pytest.StashKey[Records]()
SESSION = pytest.StashKey[pytest.Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="on a GPU, benchmark every shape, not the quick selection")
    parser.addoption(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="of N parts of the cases only the I-th, from 1 to N"
    )


def _shard(text: str) -> tuple[int, int]:
    part, parts = (int(number) for number in text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(text)
    return part, parts


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SESSION] = session


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Share cases out with all that is run of each, the longest list first, always to the shard with the least."""
    part, parts = config.getoption("shard", (1, 1))
    by_case = defaultdict(list)
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        by_case[str(parameters.get("case", item.nodeid))].append(item)
    shards: list[list[pytest.Item]] = [[] for _ in range(parts)]
    for found in sorted(by_case.values(), key=len, reverse=True):
        min(shards, key=len).extend(found)
    chosen = set(shards[part - 1])
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


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
    output_json["selection"] = {  # by which the report tells whether results are complete
        "name": measure.selection(full=config.getoption("full", False)),
        "shard": config.getoption("shard", (1, 1)),
        "failed": config.stash[SESSION].testsfailed,
        "keyword": " ".join(filter(None, (config.option.keyword, config.option.markexpr))),
    }
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
