"""Writes the tables and plots of README and docs from the committed results; `--check` tells whether they are stale.

python -m dlu_triton explain && cp dlu_explain/explain.json bench/results/
python examples/train_upsampler.py && cp dlu_train/train.json bench/results/
python -m pytest bench --full --benchmark-only --benchmark-json bench/results/gpu.json  # where there is a GPU
python -m pytest bench --benchmark-only --benchmark-json bench/results/cpu.json  # where there is none
python -m pytest bench/test_host.py --benchmark-only --benchmark-json bench/results/host.json  # on either
python bench/errors.py  # on either
python bench/report.py

Summaries go into the blocks of `PAGES`; the tables of every case are docs/results/gpu.md and cpu.md. The GPU's results
may be shards of one selection, `--shard 1/4` in bench/results/gpu-1.json and so on: all of them, of one commit on one
kind of machine. A run that failed in part, or that -k or -m cut short, is refused.

Draws with matplotlib and numpy of constraints.txt: others may draw other bytes; plots then count as out of date.
"""

import argparse
import html
import io
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import matplotlib.ticker
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

import train_upsampler  # noqa: E402

RESULTS, PLOTS, TABLES = Path("bench/results"), Path("docs/plots"), Path("docs/results")
TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
MAKE = "python -m pytest {} --benchmark-only --benchmark-json {} && python bench/report.py"


# ---------------------------------------------------------------------------------------------------------------
# One run of the benchmarks
# ---------------------------------------------------------------------------------------------------------------


class Fields(dict[str, Any]):
    """An object of a results file, which says so if it lacks a field."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.name = name

    def __missing__(self, field: str) -> Any:
        raise ValueError(f"{self.name} has no field {field!r}: measure again with the benchmarks of this commit")


class Comparison(NamedTuple):
    """What two times have in common that may be compared, besides their run."""

    op: str
    case: str
    dtype: str
    layout: str
    direction: str


class Run(NamedTuple):
    path: str
    selection: str
    machine: Fields
    records: dict[Comparison, dict[str, Fields]]  # by implementation; those of rivals that cannot run have an `error`

    def select(self, impl: str, op: str | None = None, direction: str | None = None) -> list[Comparison]:
        """Comparisons that an implementation has a record in."""
        return [
            key
            for key, impls in self.records.items()
            if impl in impls and op in (None, key.op) and direction in (None, key.direction)
        ]


FULL_ELEMENTS = 10**7  # of the output, beyond which the GPU counts as full
PASSES = ("forward", "backward", "forward+backward", "step", "explanation")
HOST = "host"  # the group of the benchmarks of the host's part
# Other mathematics at the same shapes, shown beside the upsamplers for context.
CONTEXT, UPSAMPLERS = ("interpolate", "dysample"), ("dlu_upsample", "carafe_upsample", "carafe")


# What shards of one run have in common, of `machine_info`.
COMMON = ("gpu", "gpu_driver", "torch", "triton", "commit", "dirty")


class Part(NamedTuple):
    """A results file: a whole run, or a shard of one."""

    path: Path
    selection: Fields
    machine: Fields
    records: list[Fields]


def read(root: Path, pattern: str, device: str | None, *, allow_dirty: bool, group: str | None = None) -> Run | None:
    """The run of the results files of that name, if there are any; ValueError unless it is whole and says of what.

    Of the benchmarks of the host's part, which are a group of their own, or of all others; `device` None is any.
    """
    paths = sorted(path.relative_to(root) for path in root.joinpath(RESULTS).glob(pattern))
    if not paths:
        return None
    parts = [_part(root, path, device, group, allow_dirty=allow_dirty) for path in paths]
    _check_shards(parts, RESULTS / pattern)
    records = defaultdict(dict)
    for part in parts:
        for record in part.records:
            key = Comparison(record["op"], _label(record["shape"]), record["dtype"], record["layout"], record["pass"])
            if record["impl"] in records[key]:
                raise ValueError(f"{part.path} must hold one run, got {record['impl']} twice for {' '.join(key)}")
            records[key][record["impl"]] = record
    path = paths[0] if len(paths) == 1 else RESULTS / pattern
    return Run(str(path), parts[0].selection["name"], parts[0].machine, dict(records))


def _part(root: Path, path: Path, device: str | None, group: str | None, *, allow_dirty: bool) -> Part:
    contents = Fields(str(path), json.loads(root.joinpath(path).read_text()))
    machine = Fields(f"machine_info of {path}", contents["machine_info"])
    if device not in (None, machine["device"]):
        raise ValueError(f"{path} must be of device {device!r}, got {machine['device']!r}")
    if not allow_dirty and (machine["dirty"] or machine["commit"] is None):
        raise ValueError(f"{path} must be measured at a commit, got a dirty tree or none: commit, then measure again")
    selection = Fields(f"selection of {path}", contents["selection"])
    if selection["failed"]:
        raise ValueError(f"{path} must be of a run without failures, got {selection['failed']}")
    if selection["keyword"]:
        raise ValueError(f"{path} must hold a whole selection, got {selection['keyword']!r} of it")
    measured = [
        Fields(
            f"{each['name']} of {path}",
            {**each["extra_info"], "seconds": each["stats"]["median"], "least_seconds": each["stats"]["min"]},
        )
        for each in contents["benchmarks"]
        if (each["group"] == HOST) == (group == HOST)
    ]
    unsupported = [Fields(f"a record of `unsupported` of {path}", each) for each in contents["unsupported"]]
    return Part(path, selection, machine, [*measured, *unsupported])


def _check_shards(parts: list[Part], pattern: Path) -> None:
    """ValueError unless these are all shards of one run."""

    def common(part: Part) -> dict[str, Any]:
        names = {"selection": part.selection["name"], "number of shards": part.selection["shard"][1]}
        return {field: part.machine[field] for field in COMMON} | names

    expected = common(parts[0])
    for part in parts[1:]:
        for field, value in common(part).items():
            if value != expected[field]:
                raise ValueError(
                    f"{parts[0].path} and {part.path} must have the same {field}, got {expected[field]!r} and {value!r}"
                )
    numbers = sorted(part.selection["shard"][0] for part in parts)
    every = list(range(1, expected["number of shards"] + 1))
    if numbers != every:
        missing = [number for number in every if number not in numbers]
        raise ValueError(f"{pattern} must be shards {every}, each once, got {numbers}: missing {missing}")


def rivals(run: Run, key: Comparison, ours: str) -> dict[str, Fields]:
    """What the record of `ours` is compared with, by the title of its column."""
    found = {impl: record for impl, record in run.records[key].items() if impl != ours}
    for op in CONTEXT if key.op in UPSAMPLERS else ():
        for impl, record in run.records.get(key._replace(op=op), {}).items():
            found[op if impl == op else f"{op} {impl}"] = record
    return found


def speedups(run: Run, keys: Iterable[Comparison], ours: str) -> dict[str, list[float]]:
    """By rival: how many times its time is ours, in each comparison that both ran."""
    found = defaultdict(list)
    for key in keys:
        mine = run.records[key][ours]
        for name, record in rivals(run, key, ours).items():
            if "error" not in record and "error" not in mine:
                found[name].append(record["seconds"] / mine["seconds"])
    return found


def elements(record: Fields) -> int:
    """How many numbers an upsampler returns."""
    return math.prod(record["shape"]["features"]) * record["shape"]["scale_factor"] ** 2


def scaling(run: Run) -> dict[str, list[tuple[int, Fields]]]:
    """Sizes of the output and records of DLU's forward pass, of cases in a series, by series; three sizes at least."""
    series = defaultdict(list)
    for key in run.select("triton", "dlu_upsample", "forward"):
        record = run.records[key]["triton"]
        if "error" not in record and record["series"]:
            shape = {**record["shape"], "features": record["shape"]["features"][1:2]}
            name = f"C {_label(shape)} {key.dtype} {key.layout}"
            series[name].append((elements(record), record))
    return {
        name: sorted(points, key=lambda point: (point[0], point[1]["seconds"]))
        for name, points in series.items()
        if len({size for size, _ in points}) >= 3
    }


def spread(points: list[tuple[int, Fields]]) -> float | None:
    """The largest time per element over the smallest, of a series where the GPU is full; two sizes at least."""
    times = [record["seconds"] / size for size, record in points if size > FULL_ELEMENTS]
    return max(times) / min(times) if len(times) > 1 else None


def _label(shape: dict[str, Any]) -> str:
    """A shape in words: the size of the tensor, then what else there is by name."""
    names = {"features": "", "scale_factor": "s ", "kernel_size": "k "}
    words = []
    for name, value in shape.items():
        text = TIMES.join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(names.get(name, f"{name} ") + text)
    return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------

Column = Callable[[Fields], str]


class Notes:
    """Why cells are empty, below a table."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def cell(self, record: Fields | None, column: Column) -> str:
        if record is None:
            return ""
        if "error" not in record:
            return column(record)
        reason = record["error"].partition("\n")[0].split(". ")[0][:120]
        text = html.escape(f"{record['impl']}: {reason}", quote=False)
        if text not in self.texts:
            self.texts.append(text)
        return f"{DASH}<sup>{self.texts.index(text) + 1}</sup>"

    def below(self, table: str) -> str:
        return "\n\n".join([table, *(f"<sup>{index}</sup> {text}" for index, text in enumerate(self.texts, start=1))])


GPU_COLUMNS: dict[str, Column] = {
    "of a copy": lambda record: number(record["roofline"]),
    "launches": lambda record: number(record["launches"]),
    "peak extra, MiB": lambda record: number(record["peak_extra_bytes"], 2**-20),
    "max error (eager)": lambda record: _error(record["max_error"], record["eager_error"]),
}
TRAINING_COLUMNS: dict[str, Column] = {
    "time, µs": lambda record: number(record["seconds"], 1e6),
    "host, µs": lambda record: number(record["host_us"]),
    "launches": lambda record: number(record["launches"]),
    "peak extra, MiB": lambda record: number(record["peak_extra_bytes"], 2**-20),
    "max error (eager)": lambda record: _error(record["max_error"], record["eager_error"]),
}
SMALL_COLUMNS: dict[str, Column] = {
    "launches": lambda record: number(record["launches"]),
    "time, µs": lambda record: number(record["seconds"], 1e6),
    "graph replay, µs": lambda record: number(record["replay_seconds"], 1e6),
    "host, µs": lambda record: number(record["host_us"]),
}


def number(value: float | None, unit: float = 1) -> str:
    """Three digits, and nothing for what was not measured."""
    if value is None:
        return ""
    value *= unit
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _error(found: float, eager: float | None) -> str:
    return f"{found:.1e}" if eager is None else f"{found:.1e} ({eager:.1e})"


def markdown(titles: list[str], rows: Iterable[list[str]], words: int) -> str:
    """A table whose first columns are words, the others numbers; without columns of numbers that hold none."""
    rows = list(rows)
    kept = [
        index
        for index in range(len(titles))
        if index < words or any(row[index] and not row[index].startswith(DASH) for row in rows)
    ]
    lines = [titles, ["---"] * words + ["---:"] * (len(titles) - words), *rows]
    lines = [[line[index] for index in kept] for line in lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def compared(
    run: Run, keys: list[Comparison], ours: str, unit: tuple[str, float], columns: dict[str, Column], *words: str
) -> str:
    """Times of `ours`, and how many times as long its rivals took."""
    notes = Notes()
    against = {key: rivals(run, key, ours) for key in keys}
    names = list(dict.fromkeys(name for found in against.values() for name in found))
    title, scale = unit

    def row(key: Comparison) -> list[str]:
        mine = run.records[key][ours]
        cells = [getattr(key, word) for word in words]
        cells.append(notes.cell(mine, lambda record: number(record["seconds"], scale)))
        if "error" in mine:
            return cells + [""] * (len(columns) + len(names))
        cells += [column(mine) for column in columns.values()]
        return cells + [
            notes.cell(against[key].get(name), lambda record: number(record["seconds"] / mine["seconds"]) + TIMES)
            for name in names
        ]

    titles = ["pass" if word == "direction" else word for word in words]
    titles += [title, *columns, *(f"over {name}" for name in names)]
    return notes.below(markdown(titles, [row(key) for key in keys], len(words)))


def timed(run: Run, keys: list[Comparison]) -> str:
    """Times of all implementations where none has a kernel as its rival."""
    notes = Notes()
    names = list(dict.fromkeys(name for key in keys for name in run.records[key]))
    rows = [
        [
            *(key.case, key.dtype, key.layout),
            *(notes.cell(run.records[key].get(name), lambda record: number(record["seconds"], 1e6)) for name in names),
        ]
        for key in keys
    ]
    return notes.below(markdown(["case", "dtype", "layout", *(f"{name}, µs" for name in names)], rows, 3))


def small_maps(run: Run) -> str:
    """Every implementation where a CUDA graph of ours was replayed, which the benchmarks do for small maps."""
    keys = [
        key
        for key in run.select("triton")
        for mine in (run.records[key]["triton"],)
        if "error" not in mine and mine["replay_seconds"] is not None
    ]
    notes = Notes()
    rows = [
        [key.op, key.direction, key.case, key.dtype, key.layout, impl]
        + [notes.cell(record, column) for column in SMALL_COLUMNS.values()]
        for key in keys
        for impl, record in run.records[key].items()
    ]
    titles = ["op", "pass", "case", "dtype", "layout", "implementation", *SMALL_COLUMNS]
    return notes.below(markdown(titles, rows, 6)) if rows else ""


def scaling_table(run: Run) -> str:
    rows = []
    for name, points in scaling(run).items():
        cells = [name, str(len(points))]
        for size, record in (points[0], points[-1]):
            cells += [f"{size:,}", number(record["seconds"] / size, 1e12), number(record["roofline"])]
        rows.append([*cells, number(spread(points))])
    ends = [f"{end}: {what}" for end in ("smallest", "largest") for what in ("elements", "ps each", "of a copy")]
    return markdown(["series", "cases", *ends, "spread above 10⁷ elements"], rows, 1)


def overview(run: Run) -> str:
    """By operator and pass, each figure over all cases."""
    found = {}
    for op, direction in _tables(run):
        keys = run.select("triton", op, direction)
        if not keys:
            continue
        mine = [run.records[key]["triton"] for key in keys]
        shares = [record["roofline"] for record in mine if "error" not in record and record["roofline"] is not None]
        found[op, direction] = {
            "of a copy": shares,
            **{f"over {k}": v for k, v in speedups(run, keys, "triton").items()},
        }
    titles = dict.fromkeys(title for figures in found.values() for title in figures)
    rows = [[*names, *(_range(figures.get(title, [])) for title in titles)] for names, figures in found.items()]
    return markdown(["op", "pass", *titles], rows, 2)


def _range(values: list[float]) -> str:
    if not values:
        return ""
    least, middle, most = (number(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({least} to {most}, {len(values)})"


def _tables(run: Run) -> list[tuple[str, str]]:
    """Operators and passes that have a table: what the library is named after, then the others."""
    tables = {(key.op, key.direction) for key in run.records if key.op not in (*CONTEXT, "copy") and not trains(key)}
    return sorted(tables, key=lambda table: (table[0] != "dlu_upsample", table[0], PASSES.index(table[1])))


def every_case(
    run: Run, tables: list[tuple[str, str]], ours: str, unit: tuple[str, float], columns: dict[str, Column]
) -> list[str]:
    """A folded table for each operator and pass."""
    parts = []
    for op, direction in tables:
        keys = run.select(ours, op, direction)
        if keys:
            table = compared(run, keys, ours, unit, columns, "case", "dtype", "layout")
        else:
            table = timed(run, [key for key in run.records if (key.op, key.direction) == (op, direction)])
        parts.append(_folded(f"<code>{op}</code>, {direction}", table))
    return parts


def trains(key: Comparison) -> bool:
    """Whether this is a neck or a whole step, which are compared with nearest-neighbour upsampling in its place."""
    return key.op == "neck" or key.direction == "step"


def steps_table(run: Run) -> str:
    """Every implementation that trains."""
    notes = Notes()
    rows = []
    for key in sorted(filter(trains, run.records), key=lambda key: (key.op != "neck", PASSES.index(key.direction))):
        nearest = run.records[key].get("nearest")
        rows += [
            [key.op, key.direction, key.case, key.dtype, key.layout, impl]
            + [notes.cell(record, partial(over_nearest, nearest))]
            + [notes.cell(record, column) if "error" not in record else "" for column in TRAINING_COLUMNS.values()]
            for impl, record in run.records[key].items()
        ]
    titles = ["op", "pass", "case", "dtype", "layout", "implementation", "over nearest", *TRAINING_COLUMNS]
    return notes.below(markdown(titles, rows, 6)) if rows else ""


def steps_overview(run: Run, *ops: str) -> str:
    """The same in a line for each case: the time with nearest-neighbour upsampling, and ratios to it."""
    keys = [key for key in filter(trains, run.records) if key.op in ops and "nearest" in run.records[key]]
    names = dict.fromkeys(name for key in keys for name in run.records[key] if name != "nearest")
    notes = Notes()
    rows = []
    for key in sorted(keys, key=lambda key: (key.op != "neck", PASSES.index(key.direction))):
        nearest = run.records[key]["nearest"]
        cells = [key.op, key.direction, key.case, key.dtype, key.layout, number(nearest["seconds"], 1e6)]
        found = (run.records[key].get(name) for name in names)
        rows.append(cells + [notes.cell(record, partial(over_nearest, nearest)) for record in found])
    titles = ["op", "pass", "case", "dtype", "layout", "nearest, µs", *names]
    return notes.below(markdown(titles, rows, 5)) if rows else ""


def over_nearest(nearest: Fields | None, record: Fields) -> str:
    return "" if nearest is None else number(record["seconds"] / nearest["seconds"]) + TIMES


def _folded(title: str, contents: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{contents}\n\n</details>"


def _machine(run: Run, hardware: str) -> str:
    machine = run.machine
    state = " with uncommitted changes" if machine["dirty"] else ""
    commit = "no commit" if machine["commit"] is None else f"commit {machine['commit'][:12]}{state}"
    return (
        f"{hardware}, torch {machine['torch']}, Triton {machine['triton']}, Python {machine['python_version']}, "
        f"{commit}, `{run.path}` (selection {run.selection})."
    )


# ---------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    what: str
    bound: str
    limit: float
    unit: str
    values: Callable[[Run], list[float | None]]  # of each case that it covers, None where that was not measured

    def met(self, values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        if not all(value >= self.limit if self.bound == "≥" else value <= self.limit for value in known):
            return "no"
        return "yes" if known and len(known) == len(values) else "not measured"


def forward(
    covers: Callable[[Fields], bool],
    metric: Callable[..., float | None],
    rival: str = "",
    op: str = "dlu_upsample",
    *,
    direction: str | None = "forward",
    impl: str = "triton",
) -> Callable[[Run], list[float | None]]:
    """Figures of a pass of ours in the cases that a target covers, those that have a record of the rival, if any."""

    def values(run: Run) -> list[float | None]:
        found = []
        for key in run.select(impl, op, direction):
            records = [run.records[key][impl]]
            if rival:
                records.append(rivals(run, key, impl).get(rival))
            if covers(records[0]) and None not in records:
                found.append(None if any("error" in record for record in records) else metric(*records))
        return found

    return values


backward, both = partial(forward, direction="backward"), partial(forward, direction="forward+backward")


def field(name: str, unit: float = 1) -> Callable[[Fields], float | None]:
    return lambda mine: None if mine[name] is None else mine[name] * unit


def half(record: Fields) -> bool:
    return record["dtype"] in ("bfloat16", "float16")


def headline(record: Fields) -> bool:
    n, *rest = record["shape"]["features"]
    sizes = (record["shape"]["scale_factor"], record["shape"]["kernel_size"])
    return n >= 8 and rest == [256, 104, 168] and sizes == (2, 5) and "offsets" not in record["shape"]


def small(record: Fields) -> bool:
    n, _, *size = record["shape"]["features"]
    return n <= 2 and size in ([13, 21], [26, 42]) and record["shape"]["scale_factor"] == 2


def percent_extra(mine: Fields) -> float | None:
    """Memory beyond the normalised kernel space, over that of inputs and output."""
    if mine["peak_extra_bytes"] is None:
        return None
    n, _, h, w = mine["shape"]["features"]
    stored = n * h * w * (64 if half(mine) else 128)  # 5 x 5 taps in 32 places
    return 100 * max(0, mine["peak_extra_bytes"] - stored) / mine["ideal_bytes"]


def pyramid(record: Fields) -> bool:
    """Four upsamplers from 13 x 21 on, over two images on a ResNet-50."""
    shape = record["shape"]
    sizes = (shape["channels"], shape["scale_factor"], shape["kernel_size"])
    return shape["images"] == [2, 3, 832, 1344] and sizes == (256, 2, 5) and record["dtype"] == "bfloat16"


def over_normalised_kernels(mine: Fields) -> float | None:
    """Memory beyond inputs, output and gradients, over that of the normalised kernels in float32."""
    if mine["peak_extra_bytes"] is None or mine["allowed_extra_bytes"] is None:
        return None
    return mine["peak_extra_bytes"] / mine["allowed_extra_bytes"]


def slower(mine: Fields, other: Fields) -> float:
    return mine["seconds"] / other["seconds"]


def faster(mine: Fields, other: Fields) -> float:
    return other["seconds"] / mine["seconds"]


HEADLINE, SHARE = f"256{TIMES}104{TIMES}168, N ≥ 8, s 2 k 5", field("roofline")
TARGETS = (
    Target(f"share of a copy, {HEADLINE}, bfloat16 and float16", "≥", 0.85, "",
           forward(lambda record: headline(record) and half(record), SHARE)),
    Target(f"share of a copy, {HEADLINE}, float32", "≥", 0.80, "",
           forward(lambda record: headline(record) and record["dtype"] == "float32", SHARE)),
    Target("share of a copy, s 4, 8 and 16, bfloat16", "≥", 0.80, "",
           forward(lambda record: record["shape"]["scale_factor"] in (4, 8, 16) and record["dtype"] == "bfloat16",
                   SHARE)),
    Target("share of a copy, 64 channels, bfloat16", "≥", 0.80, "",
           forward(lambda record: record["shape"]["features"][1] == 64 and record["dtype"] == "bfloat16", SHARE)),
    Target("time over that of bilinear interpolation", "≤", 1.15, TIMES,
           forward(lambda record: True, slower, "interpolate")),
    Target("time of compiled over ours, half precision", "≥", 5, TIMES, forward(half, faster, "compiled")),
    Target("<code>carafe</code>, float16: time of mmcv over ours", "≥", 8, TIMES,
           forward(lambda record: record["dtype"] == "float16", faster, "mmcv", "carafe")),
    Target(f"launches, 13{TIMES}21 and 26{TIMES}42, N ≤ 2, s 2", "≤", 2, "", forward(small, field("launches"))),
    Target("graph replay, the same maps", "≤", 8, " µs", forward(small, field("replay_seconds", 1e6))),
    Target("host, the same maps", "≤", 40, " µs", forward(small, field("host_us"))),
    Target(f"peak memory beyond inputs, output and normalised kernel space, {HEADLINE}", "≤", 1, "%",
           forward(lambda record: headline(record) and record["dtype"] != "float64", percent_extra)),
    Target("largest time per element over the smallest, above 10⁷ elements", "≤", 1.15, TIMES,
           lambda run: [spread(points) for points in scaling(run).values()]),
)  # fmt: skip

TRAINING_TARGETS = (
    Target(f"share of a copy, {HEADLINE}, bfloat16, forward+backward", "≥", 0.60, "",
           both(lambda record: headline(record) and record["dtype"] == "bfloat16", SHARE)),
    Target("forward+backward: time of compiled over ours, half precision", "≥", 4, TIMES,
           both(half, faster, "compiled")),
    Target("<code>carafe</code> forward+backward, float16: time of mmcv over ours", "≥", 8, TIMES,
           both(lambda record: record["dtype"] == "float16", faster, "mmcv", "carafe")),
    Target("backward alone: launches", "≤", 4, "", backward(lambda record: True, field("launches"))),
    Target("forward+backward: peak memory beyond inputs, output and gradients, over that of the normalised kernels, "
           "half precision and float32", "≤", 1, TIMES,
           both(lambda record: record["dtype"] != "float64", over_normalised_kernels)),
    Target("forward+backward: time of the deterministic mode over ours", "≤", 1.5, TIMES,
           both(lambda record: True, faster, "triton-deterministic")),
    Target("backward alone: time of the deterministic mode over ours", "≤", 1.5, TIMES,
           backward(lambda record: True, faster, "triton-deterministic")),
    Target(f"neck of four <code>DLUPack</code>, N 2, 832{TIMES}1344, bfloat16, forward+backward and step: time over "
           "that of nearest", "≤", 1.10, TIMES,
           forward(pyramid, slower, "nearest", "neck", direction=None, impl="DLUPack")),
)  # fmt: skip


def targets(run: Run, title: str, aimed: tuple[Target, ...]) -> str:
    """What was aimed at, and whether every case that it covers gets there."""
    rows = []
    for target in aimed:
        values = target.values(run)
        known = [value for value in values if value is not None]
        cells = [target.what, f"{target.bound} {number(target.limit)}{target.unit}", "", target.met(values)]
        if known:
            count = str(len(known)) if len(known) == len(values) else f"{len(known)} of {len(values)}"
            ends = dict.fromkeys((number(min(known)), number(max(known))))
            cells[2] = f"{' to '.join(ends)}{target.unit} ({count})"
        rows.append(cells)
    return markdown([title, "target", "measured (cases)", "met"], rows, 4)


# ---------------------------------------------------------------------------------------------------------------
# Blocks of README and the pages, and the files with every case
# ---------------------------------------------------------------------------------------------------------------

OVER = (
    f"“Over” a rival is its time over ours, in the same run: below 1{TIMES} the rival is faster. Interpolation and "
    "DySample compute something else and are there for context."
)
OF_A_COPY = "“Of a copy” is the rate of the bytes that have to be moved over that of a plain copy."
CASES = "s is the scale factor, k the kernel size; an empty cell was not measured."
GPU_CASES, CPU_CASES = TABLES / "gpu.md", TABLES / "cpu.md"
PAGES = {  # whose blocks are written, by their names
    "README.md": ("train-short", "gpu-short", "emulated"),
    "docs/choosing.md": ("train",),
    "docs/explain.md": ("explain",),
    "docs/performance.md": ("gpu", "cpu", "host"),
    "docs/promises.md": ("errors", "emulated"),
}


def gpu(run: Run | None) -> str:
    if run is None:
        command = MAKE.format("bench --full", RESULTS / "gpu.json")
        return f"Not measured yet. On a machine with a GPU and a clean tree:\n\n    {command}"
    parts = [
        _gpu_machine(run),
        targets(run, "<code>dlu_upsample</code> forward", TARGETS),
        targets(run, "<code>dlu_upsample</code> in training", TRAINING_TARGETS),
        "A target is met if every case that it covers meets it. Over all cases, the median, the least, the most, and "
        f"how many were compared. {OF_A_COPY} {OVER}",
        overview(run),
        *_steps(steps_overview(run, "neck", "module")),
        *(_picture(name, PLOT_TEXTS[name]) for name in drawings(run)),
        f"[Every case]({_from_docs(GPU_CASES)})",
    ]
    return "\n\n".join(parts)


def gpu_short(run: Run | None) -> str:
    if run is None:
        return "**Speed on a GPU: not measured. No kernel has run on hardware yet.**"
    return f"Speed on a GPU: {_gpu_machine(run)}\n\n{targets(run, '<code>dlu_upsample</code> forward', TARGETS)}"


def gpu_cases(run: Run) -> str:
    parts = [
        "# Speed on a GPU",
        _gpu_machine(run),
        f"Median times of the device, inputs in memory rather than in cache. {OF_A_COPY} Errors are the largest "
        "against float64, in units of the largest true value, with those of eager PyTorch in the same type. "
        f"{OVER} {CASES}",
        *every_case(run, _tables(run), "triton", ("time, µs", 1e6), GPU_COLUMNS),
    ]
    steps = steps_table(run)
    if steps:
        parts.append(_folded("Necks, and steps of modules", steps))
    maps = small_maps(run)
    if maps:
        parts.append(_folded("Small maps: launched, replayed as a CUDA graph, and the host's part", maps))
    if scaling(run):
        parts.append(_folded("Scaling of <code>dlu_upsample</code>, forward", scaling_table(run)))
    return "\n\n".join(parts) + "\n"


def _steps(table: str) -> list[str]:
    if not table:
        return []
    text = (
        "In training, where a neck is a feature pyramid with four upsamplers, and a step forward, backward and "
        "optimiser: time with each upsampler over that with nearest-neighbour upsampling in its place, in the same run."
    )
    return [text, table]


def _gpu_machine(run: Run) -> str:
    machine = run.machine
    host = Fields("cpu of machine_info", machine["cpu"])["brand_raw"]
    return _machine(
        run, f"{machine['gpu']}, driver {machine['gpu_driver']}, runtime {machine['gpu_runtime']}, host {host}"
    )


def cpu(run: Run | None) -> str:
    """On a CPU the eager twins are what the operators run."""
    if run is None:
        return f"Not measured yet. On a machine without a GPU:\n\n    {MAKE.format('bench', RESULTS / 'cpu.json')}"
    keys = run.select("eager", "dlu_upsample")
    table = compared(run, keys, "eager", ("time, ms", 1e3), {}, "direction", "case", "dtype", "layout")
    parts = [
        _cpu_machine(run),
        f"<code>dlu_upsample</code>, median times. {OVER} {CASES}",
        table,
        *_steps(steps_overview(run, "neck")),
        f"[Everything else]({_from_docs(CPU_CASES)})",
    ]
    return "\n\n".join(parts)


def cpu_cases(run: Run) -> str:
    rest = [table for table in _tables(run) if table[0] != "dlu_upsample"]
    parts = [
        "# Speed on a CPU",
        _cpu_machine(run),
        f"Median times; those of <code>dlu_upsample</code> are in [Performance](../performance.md). {OVER} {CASES}",
        *every_case(run, rest, "eager", ("time, ms", 1e3), {}),
    ]
    steps = steps_table(run)
    if steps:
        parts.append(_folded("Necks, and steps of modules", steps))
    return "\n\n".join(parts) + "\n"


def _cpu_machine(run: Run) -> str:
    brand = Fields("cpu of machine_info", run.machine["cpu"])["brand_raw"]
    return _machine(run, f"{brand}, threads: {run.machine['torch_threads']}")


HOST_COLUMNS = {
    "dlu_triton": "a call",
    "checks": "of it checks",
    "launches": "of it launches",
    "registered": "by the registered op",
    "Function": "<code>Function</code>",
    "grid_sample": "<code>F.grid_sample</code>",
}
HOST_LEGEND = (
    "By the registered op: the same call if it and its gradients went through PyTorch's dispatcher, as they do while "
    "tracing. <code>Function</code>: an <code>autograd.Function</code> of as many tensors that only allocates what it "
    "returns. <code>F.grid_sample</code>: PyTorch's own operator on such a map. Checks and launches with a graph are "
    "those without."
)
NO_DRIVER = (
    "This is **without a GPU**, by a stub in the driver's place: what Triton's launcher and the driver take for each "
    "launch, some microseconds, is missing. A forward pass has one launch, with DLU two; a backward pass two, with DLU "
    "four; <code>Function</code> has none. <code>F.grid_sample</code> runs on the CPU here, with next to nothing to "
    "compute, and has no launches either, of which it would have one or two on a GPU."
)


def host(run: Run | None) -> str:
    """What the host does for a call in eager code, apart from the device."""
    if run is None:
        command = MAKE.format("bench/test_host.py", RESULTS / "host.json")
        return f"Not measured yet. With or without a GPU:\n\n    {command}"
    on_gpu = run.machine["device"] == "cuda"
    notes = Notes()

    def cell(record: Fields) -> str:
        return f"{number(record['least_seconds'], 1e6)} ({number(record['seconds'], 1e6)})"

    rows = [
        [key.op, key.direction, *(notes.cell(impls.get(impl), cell) for impl in HOST_COLUMNS)]
        for key, impls in run.records.items()
    ]
    cases = dict.fromkeys(f"{key.case} {key.dtype}" for key in run.records)
    load = f"Load average {number(run.machine['load_average'])} on {run.machine['processors']} processors."
    parts = [
        f"{_gpu_machine(run) if on_gpu else _cpu_machine(run)} {load}",
        f"Microseconds until a call gives control back, least (median), of {', '.join(cases)}. {HOST_LEGEND}",
        *([] if on_gpu else [NO_DRIVER]),
        notes.below(markdown(["op", "pass", *HOST_COLUMNS.values()], rows, 2)),
    ]
    return "\n\n".join(parts)


def explanations(root: Path) -> str:
    """The demo of the explanations: what it measured of each method, and where they tie."""
    figures = json.loads(root.joinpath(RESULTS, "explain.json").read_text())
    columns = {
        "hit": "pointing hit",
        "energy": "energy in box",
        "sensitivity": "sensitivity error",
        "conservation": "conservation error",
    }
    rows = []
    for name, values in figures["methods"].items():
        cells = [f"{values[key]:.3f}" if key in values else "" for key in columns]
        milliseconds = values["milliseconds_per_image"]
        rows.append([name, *cells, "" if milliseconds is None else f"{milliseconds:.3g}"])
    (reference,) = (key.removeprefix("against ") for key in figures if key.startswith("against "))
    verdicts = []
    words = {"tie": ("ties", "tie"), "better": ("is better", "are better"), "worse": ("is worse", "are worse")}
    for title, found in zip(columns.values(), figures[f"against {reference}"].values(), strict=True):
        parts = []
        for verdict, (one, several) in words.items():
            names = [name for name, each in found.items() if each == verdict]
            if names:
                parts.append(f"{', '.join(names)} {one if len(names) == 1 else several}")
        verdicts.append(f"- {title}: {'; '.join(parts)}.")
    versions = figures["versions"]
    lines = [
        markdown(["method", *columns.values(), "ms per image, both digits"], rows, 1),
        "",
        f"{figures['images']} test images, two digits each; {figures['device']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, Python {versions['python']}, commit {figures['commit'][:12]}, "
        "`bench/results/explain.json`.",
        "",
        f"Against {reference}, by a paired bootstrap over the images (95%, each comparison by itself):",
        "",
        *verdicts,
    ]
    return "\n".join(lines)


ERRORS = RESULTS / "errors-gpu.json", RESULTS / "errors-interpreted.json"
# Columns of the table of errors, by what a result is called.
UPSAMPLED = {
    "output": "output",
    "gradient of features": "features",
    "of kernels": "kernel_space masks logits",
    "of offsets": "offsets",
}
MAPPED = {"map": "output", "gradient of activations": "activations", "of gradients": "gradients"}


def accuracy(root: Path, *, allow_dirty: bool) -> str:
    """The largest errors against float64, of kernels and of eager PyTorch."""
    path = next((path for path in ERRORS if root.joinpath(path).exists()), None)
    if path is None:
        return "Not measured yet:\n\n    python bench/errors.py && python bench/report.py"
    figures = Fields(str(path), json.loads(root.joinpath(path).read_text()))
    machine, rows = Fields(str(path), figures["machine"]), figures["errors"]
    _at_a_commit(path, machine, allow_dirty)
    interpreter = "Triton's interpreter on a CPU, **not a GPU's arithmetic** (it truncates to bfloat16, a GPU rounds)"
    where = machine["gpu"] or interpreter
    cases = sum(row["cases"] for row in rows)
    parts = [
        f"{where}: torch {machine['torch']}, Triton {machine['triton']}, commit {machine['commit'][:12]}, "
        f"`{path}`. Largest errors of {cases} results of `python -m dlu_triton verify`, without mixed types and "
        "without what is zero, in units of the largest value of each, beside (those of eager PyTorch in the same type, "
        "which in float64 are the measure):"
    ]
    for title, columns in (("upsampling", UPSAMPLED), ("maps", MAPPED)):
        chosen = [row for row in rows if (row["operator"] == "class_activation_map") == (title == "maps")]
        table = []
        for dtype in dict.fromkeys(row["dtype"] for row in chosen):
            cells = [f"{title}, {dtype}"]
            for results in columns.values():
                those = [row for row in chosen if row["dtype"] == dtype and row["result"] in results.split()]
                error, eager = (max(row[name] for row in those) for name in ("error", "eager"))
                cells.append(f"{error:.1e}" + f" ({eager:.1e})" * (dtype != "float64"))
            table.append(cells)
        parts.append(markdown(["", *columns], table, 1))
    return "\n\n".join(parts)


def _at_a_commit(path: Path, machine: Any, allow_dirty: bool) -> None:
    if not allow_dirty and (machine["commit"] is None or machine["dirty"]):
        raise ValueError(f"{path} must be measured at a commit, got {machine['commit']!r}: commit, then measure again")


EMULATED = RESULTS / "emulated.json"


def emulated(root: Path, *, allow_dirty: bool) -> str:
    """What ran in the emulator, for each target."""
    if not root.joinpath(EMULATED).exists():
        command = "python bench/emulated.py --record && python bench/report.py"
        return f"Kernels as compiled have not run in the emulator for this table yet:\n\n    {command}"
    figures = Fields(str(EMULATED), json.loads(root.joinpath(EMULATED).read_text()))
    machine, targets = Fields(str(EMULATED), figures["machine"]), figures["targets"]
    _at_a_commit(EMULATED, machine, allow_dirty)
    wrong = [f"{target}: {row['failed'] + row['findings']}" for target, row in targets.items()
             if row["failed"] + row["findings"]]  # fmt: skip
    if wrong:
        raise ValueError(f"{EMULATED} must be of a run without failures, got {'; '.join(wrong)}")
    text = (
        f"The kernels as Triton {machine['triton']} compiles them ran in an emulator of PTX (`tests/emulator`). "
        "It checks values, bounds, alignment, shared memory, barriers, fences and races, and found no fault "
        f"(torch {machine['torch']}, commit {machine['commit'][:12]}, `{EMULATED}`). It cannot show speed, the work of "
        "`ptxas`, or the last bits of tensor cores. A selection of the tests "
        "(`bench/emulated.py`) ran, with blocks and additions in random orders."
    )
    figures = {
        "results of `verify`, on emulated kernels, within bounds": [row["results"] for row in targets.values()],
        "tests passed that launch kernels": [row["tests"] for row in targets.values()],
        "launches": [sum(row["launches"].values()) for row in targets.values()],
    }
    rows = [[title, *(f"{number:,}" for number in numbers)] for title, numbers in figures.items()]
    return f"{text}\n\n{markdown(['', *targets], rows, 1)}"


def read_training(root: Path, *, allow_dirty: bool) -> dict[str, Any] | None:
    """What the example measured, if it was; ValueError unless that was at a commit."""
    path = RESULTS / train_upsampler.FIGURES
    if not root.joinpath(path).exists():
        return None
    figures = json.loads(root.joinpath(path).read_text())
    commit = figures["machine"]["commit"]
    if not allow_dirty and (commit is None or commit.endswith("-dirty")):
        raise ValueError(f"{path} must be measured at a commit, got {commit!r}: commit, then measure again")
    return figures


def training_short(figures: dict[str, Any] | None) -> str:
    """A row for each scale, with the PSNR of each upsampler and DLU's share of CARAFE's parameters."""
    if figures is None:
        return "Not measured yet."
    scales = defaultdict(dict)
    for row in figures["methods"]:
        scales[row["scale"]][row["method"]] = row
    methods = list(dict.fromkeys(row["method"] for row in figures["methods"]))
    rows = []
    for scale, found in scales.items():
        cells = [f"{found[method]['psnr']:.2f}" if method in found else "" for method in methods]
        dlu, carafe = (found[method]["parameters"] if method in found else None for method in ("dlu", "carafe"))
        rows.append([f"{scale}{TIMES}", *cells, f"{dlu / carafe:.0%}" if dlu and carafe else ""])
    titles = [train_upsampler.TITLES[method] for method in methods]
    parts = [
        markdown(["scale", *titles, "DLU's share of CARAFE's parameters"], rows, 1),
        f"PSNR in dB, {train_upsampler.place(figures)[0].lower()}{train_upsampler.place(figures)[1:]}.",
        train_upsampler.BOOTSTRAP,
        "\n".join(f"- {line}" for line in train_upsampler.verdicts(figures)),
    ]
    return "\n\n".join(parts)


def training(figures: dict[str, Any] | None) -> str:
    """The example that trains: what came out of it, and where DLU ties."""
    if figures is None:
        return "Not measured yet:\n\n    python examples/train_upsampler.py"
    parts = [
        train_upsampler.table(figures),
        f"{train_upsampler.place(figures)}, `{RESULTS / train_upsampler.FIGURES}`.",
        train_upsampler.LEGEND,
        train_upsampler.BOOTSTRAP,
        "\n".join(f"- {line}" for line in train_upsampler.verdicts(figures)),
        _picture("train", PLOT_TEXTS["train"]),
        f"[By photograph]({_from_docs(TABLES / train_upsampler.TABLE)})",
    ]
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------

PLOT_TEXTS = {
    "speedup": "Time of each rival over that of dlu_triton's kernels, a dot for each case, on a logarithmic scale",
    "scaling": "Time of dlu_upsample's forward pass per output element, against the number of output elements",
    "roofline": "Share of a copy's bytes per second that dlu_upsample reaches, by case",
    "train": "PSNR on held-out photographs against the parameters of the upsampler, a panel for each scale",
}
INK, GRID, PAPER = "#1f2328", "#d1d9e0", "#ffffff"  # not transparent: pages may be dark
# Okabe and Ito's colours, which the colour-blind tell apart; those that contrast with the background by 3 to 1.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc5b9e", "#1f2328")
MARKERS = "osD^v"


def drawings(run: Run) -> dict[str, Callable[[Run, tuple[str, ...]], Figure]]:
    """What is drawn, by name: the scaling only if the selection has a series of sizes."""
    return {"speedup": speedup, **({"scaling": scaling_plot} if scaling(run) else {}), "roofline": roofline}


def plots(run: Run) -> dict[Path, str]:
    return render({name: partial(draw, run) for name, draw in drawings(run).items()})


def render(pictures: dict[str, Callable[[tuple[str, ...]], Figure]]) -> dict[Path, str]:
    """SVG files by name, the same bytes for the same results."""
    found = {}
    style = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **{"grid.color": GRID, "font.size": 9, "axes.axisbelow": True, "figure.constrained_layout.use": True},
        **{"svg.hashsalt": "dlu_triton", "svg.fonttype": "none"},  # text of the viewer's: a fifth of the bytes
    }
    for name, draw in pictures.items():
        file = io.StringIO()
        with matplotlib.style.context(("default", style)):
            draw(COLOURS).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        lines = (line.rstrip() for line in file.getvalue().splitlines())
        found[PLOTS / f"{name}.svg"] = "\n".join(lines) + "\n"
    return found


def roofline(run: Run, colours: tuple[str, ...]) -> Figure:
    shares = defaultdict(dict)  # by pass, then by case
    sizes = {}
    for key in run.select("triton", "dlu_upsample"):
        record = run.records[key]["triton"]
        if "error" not in record and record["roofline"] is not None:
            case = f"{key.case} {key.dtype} {key.layout}"
            shares[key.direction][case] = record["roofline"]
            sizes[case] = elements(record)
    cases = sorted(sizes, key=sizes.__getitem__)
    figure = Figure(figsize=(10, 1 + 0.18 * len(cases)))
    most = max(1, *(share for found in shares.values() for share in found.values()))
    panels = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for axes, direction in zip(panels, sorted(shares, key=PASSES.index), strict=True):
        found = shares[direction]
        places = [cases.index(case) for case in found]
        axes.barh(places, found.values(), height=0.7, color=colours[0])
        for place, share in zip(places, found.values(), strict=True):
            axes.text(1.04 * most, place, f"{share:.2f}", fontsize=7, verticalalignment="center")
        axes.axvline(1, color=colours[1], linewidth=1)
        axes.set(title=direction, xlabel="share of a copy", xlim=(0, 1.2 * most), ylim=(-0.6, len(cases) - 0.4))
        axes.set_xticks((0, 0.5, 1))
        axes.set_yticks(range(len(cases)), cases, fontsize=7)
    return figure


def speedup(run: Run, colours: tuple[str, ...]) -> Figure:
    ratios = defaultdict(dict)  # by operator and rival, then by pass
    for key in run.select("triton"):
        for name, values in speedups(run, [key], "triton").items():
            ratios[f"{key.op} over {name}"].setdefault(key.direction, []).extend(values)
    rows = sorted(ratios, reverse=True)
    directions = sorted({direction for found in ratios.values() for direction in found}, key=PASSES.index)
    figure = Figure(figsize=(10, 1.2 + 0.42 * len(rows)))
    axes = figure.subplots()
    for index, direction in enumerate(directions):
        shift = 0.22 * ((len(directions) - 1) / 2 - index)
        points = [(value, y + shift) for y, row in enumerate(rows) for value in ratios[row].get(direction, ())]
        look = {"color": colours[index], "marker": MARKERS[index], "linestyle": "none", "markersize": 4, "alpha": 0.8}
        axes.plot(*zip(*points, strict=True), label=direction, markeredgewidth=0, **look)
    axes.axvline(1, color=axes.xaxis.label.get_color(), linewidth=1)
    axes.set(xscale="log", xlabel="time of the rival over ours: right of 1, dlu_triton is faster")
    _plain_ticks(axes.xaxis, "{x:g}" + TIMES)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="both", linewidth=0.6)
    if directions:
        figure.legend(loc="outside upper center", ncols=len(directions))
    return figure


def scaling_plot(run: Run, colours: tuple[str, ...]) -> Figure:
    figure = Figure(figsize=(10, 4.5))
    axes = figure.subplots()
    for index, (name, points) in enumerate(scaling(run).items()):
        sizes, times = zip(*((size, record["seconds"] / size * 1e12) for size, record in points), strict=True)
        look = {"color": colours[index % len(colours)], "marker": MARKERS[index % len(MARKERS)]}
        dashes = ("-", "--", ":")[index // len(colours) % 3]
        axes.plot(sizes, times, linewidth=1, markersize=4, linestyle=dashes, label=name, **look)
    axes.set(xscale="log", yscale="log", xlabel="output elements", ylabel="picoseconds per output element")
    _plain_ticks(axes.yaxis, "{x:g}")
    axes.grid(linewidth=0.6)
    axes.legend(fontsize=8)
    return figure


def _plain_ticks(axis: Any, text: str) -> None:
    """1, 2, 5, 10, ... instead of powers of ten."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(matplotlib.ticker.StrMethodFormatter(text))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def _picture(name: str, text: str) -> str:
    return f"![{text}]({_from_docs(PLOTS / name)}.svg)"


def _from_docs(path: Path) -> str:
    """As the pages, which lie beside each other, link to it."""
    return str(path.relative_to("docs"))


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


def outputs(root: Path, *, allow_dirty: bool) -> dict[Path, str]:
    """What the files that are made of the results should hold."""
    on_gpu = read(root, "gpu*.json", "cuda", allow_dirty=allow_dirty)
    on_cpu = read(root, "cpu.json", "cpu", allow_dirty=allow_dirty)
    on_host = read(root, "host.json", None, allow_dirty=allow_dirty, group=HOST)
    trained = read_training(root, allow_dirty=allow_dirty)
    blocks = {"explain": explanations(root), "gpu": gpu(on_gpu), "cpu": cpu(on_cpu), "host": host(on_host)}
    blocks |= {"train": training(trained), "errors": accuracy(root, allow_dirty=allow_dirty)}
    blocks["emulated"] = emulated(root, allow_dirty=allow_dirty)
    blocks |= {"train-short": training_short(trained), "gpu-short": gpu_short(on_gpu)}
    found = {}
    for page, names in PAGES.items():
        text = root.joinpath(page).read_text()
        for name in names:
            block = f"<!-- {name}: bench/report.py -->\n\n{blocks[name]}\n\n<!-- end -->"
            text, count = re.subn(rf"<!-- {name}: .*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
            if count != 1:
                raise ValueError(f"{page} must have one block {name!r}, got {count}")
        found[Path(page)] = text
    if on_gpu is not None:
        found |= {GPU_CASES: gpu_cases(on_gpu), **plots(on_gpu)}
    if on_cpu is not None:
        found[CPU_CASES] = cpu_cases(on_cpu)
    if trained is not None:
        found[TABLES / train_upsampler.TABLE] = train_upsampler.document(trained)
        found |= render({"train": partial(train_upsampler.draw, trained)})
    return found


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    parser.add_argument("--allow-dirty", action="store_true", help="take results of a tree that was not committed")
    options = parser.parse_args(arguments)
    stale = False
    for name, text in outputs(root, allow_dirty=options.allow_dirty).items():
        path = root / name
        if path.exists() and path.read_text() == text:
            continue
        stale = True
        if options.check:
            print(f"{name} is out of date: run python bench/report.py", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
