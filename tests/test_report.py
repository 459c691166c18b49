"""Tables and plots of README and the pages, from made-up results in made-up pages."""

import importlib.util
import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")  # what the example that trains imports, and the report that
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

MACHINE = {
    "device": "cuda",
    "gpu": "Made-up GPU",
    "gpu_driver": "1.2",
    "gpu_runtime": "3.4",
    "torch": "5.6",
    "triton": "7.8",
    "python_version": "9.10",
    "torch_threads": 3,
    "processors": 4,
    "load_average": 1.234,
    "cpu": {"brand_raw": "Made-up CPU"},
    "commit": "0123456789abcdef",
    "dirty": False,
}
SELECTION = {"name": "full", "shard": [1, 1], "failed": 0, "keyword": ""}
SIZES = ((2, 8, 4, 5), (2, 8, 8, 10), (2, 8, 16, 20))


def record(impl, microseconds, *, op="dlu_upsample", features=SIZES[0], direction="forward", **other):
    fields = {
        "op": op,
        "impl": impl,
        "pass": direction,
        "dtype": "bfloat16",
        "layout": "contiguous",
        "shape": {"features": list(features), "scale_factor": 2, "kernel_size": 5},
        "roofline": 0.789,
        "launches": 1,
        "peak_extra_bytes": 3 * 2**20,
        "allowed_extra_bytes": None,
        "host_us": 25.0,
        "replay_seconds": None,
        "max_error": 1.5e-3,
        "eager_error": 2.5e-3,
        "ideal_bytes": 10**9,
        "series": False,
    }
    stats = {"median": microseconds * 1e-6, "min": 0.75 * microseconds * 1e-6}
    return {"name": f"{op}-{impl}-{direction}", "group": None, "stats": stats, "extra_info": fields | other}


def unsupported(error, **names):
    return record(**names, microseconds=0)["extra_info"] | {"error": error}


draw, render = report.plots, report.render


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository without results, but for those of the explanations, and with an empty block for each table.

    Nothing is drawn, which takes its time, unless a test has `drawn`.
    """
    monkeypatch.setattr(report, "plots", lambda run: {})
    monkeypatch.setattr(report, "render", lambda drawings: {})
    (tmp_path / "bench" / "results").mkdir(parents=True)
    explain = ROOT.joinpath("bench", "results", "explain.json").read_text()
    tmp_path.joinpath("bench", "results", "explain.json").write_text(explain)
    (tmp_path / "docs").mkdir()
    for page, names in report.PAGES.items():
        blocks = "\n".join(f"<!-- {name}: bench/report.py -->\n<!-- end -->" for name in names)
        tmp_path.joinpath(page).write_text(f"Before\n{blocks}\nAfter\n")
    return tmp_path


@pytest.fixture
def drawn(root, monkeypatch):
    monkeypatch.setattr(report, "plots", draw)
    monkeypatch.setattr(report, "render", render)


def write(root, *records, name="gpu.json", errors=(), sizes=SIZES, selection=None, **machine):
    """Results of a series of sizes of DLU's forward pass, and of what else there is."""
    series = [record("triton", 10 * 4**index, features=size, series=True) for index, size in enumerate(sizes)]
    results = {
        "machine_info": MACHINE | machine,
        "benchmarks": [*series, *records],
        "unsupported": list(errors),
        "selection": SELECTION | (selection or {}),
    }
    root.joinpath("bench", "results", name).write_text(json.dumps(results))


def plain(path):
    """A file with letters for the signs that look like them."""
    return path.read_text().replace(report.TIMES, "x").replace(report.DASH, "-")


def block(root, name):
    page = next(page for page, names in report.PAGES.items() if name in names)
    return re.search(rf"<!-- {name}: .*?<!-- end -->", plain(root / page), re.DOTALL)[0]


def cases(root, name="gpu"):
    return plain(root / "docs" / "results" / f"{name}.md")


def table(text):
    """Cells of the first table of a text, by column."""
    lines = text[text.index("\n| ") + 1 :].partition("\n\n")[0].splitlines()
    titles, _, *lines = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(titles, line, strict=True)) for line in lines]


def rows(root, title, name="gpu"):
    """Cells of the table whose fold has that title."""
    text = cases(root, name)
    return table(text[text.index(f"<summary>{title}") :])


def overview(root):
    return table(block(root, "gpu").partition("A target is met")[2])


def target(root, what, title="<code>dlu_upsample</code> forward"):
    """What was measured for a target, and whether it is met."""
    text = block(root, "gpu")
    (row,) = (row for row in table(text[text.index(f"\n| {title} |") :]) if what in row[title])
    return row["measured (cases)"], row["met"]


def training_target(root, what):
    return target(root, what, "<code>dlu_upsample</code> in training")


FORWARD = "<code>dlu_upsample</code>, forward"


def test_not_measured_yet(root, drawn):
    assert report.main([], root) == 0
    for name, what in {"gpu": "bench --full", "cpu": "bench", "host": "bench/test_host.py"}.items():
        command = f"python -m pytest {what} --benchmark-only --benchmark-json bench/results/{name}.json"
        assert "Not measured yet." in block(root, name)
        assert command in block(root, name)
    assert "![" not in block(root, "gpu")
    assert not root.joinpath("docs", "plots").exists()
    assert "**Speed on a GPU: not measured. No kernel has run on hardware yet.**" in block(root, "gpu-short")
    assert "python bench/emulated.py --record" in block(root, "emulated")
    for page in report.PAGES:
        text = root.joinpath(page).read_text()
        assert text.startswith("Before\n")
        assert text.endswith("\nAfter\n")


def test_figures_are_those_of_the_file(root):
    write(root, record("compiled", 43.21), record("mmcv", 5), record("copy", 7, op="copy"))
    report.main([], root)
    first = rows(root, FORWARD)[0]
    assert first == {
        "case": "2x8x4x5 s 2 k 5",
        "dtype": "bfloat16",
        "layout": "contiguous",
        "time, µs": "10",
        "of a copy": "0.789",
        "launches": "1",
        "peak extra, MiB": "3",
        "max error (eager)": "1.5e-03 (2.5e-03)",
        "over compiled": "4.32x",
        "over mmcv": "0.5x",
    }
    text = block(root, "gpu")
    machine = "Made-up GPU, driver 1.2, runtime 3.4, host Made-up CPU, torch 5.6, Triton 7.8, Python 9.10"
    assert f"{machine}, commit 0123456789ab, `bench/results/gpu.json` (selection full)." in text
    assert "Not measured" not in text
    assert "(results/gpu.md)" in text
    assert "<details>" not in text
    assert machine in cases(root)
    assert machine in block(root, "gpu-short")
    assert "share of a copy" in block(root, "gpu-short")


def test_overview_over_all_cases(root):
    rivals = [record("compiled", us, features=size) for us, size in zip((20, 20, 640), SIZES, strict=True)]
    write(root, *rivals, record("triton", 9, op="carafe"), record("unfold", 90, op="carafe"))
    report.main([], root)
    dlu, carafe = overview(root)
    assert (dlu["op"], dlu["of a copy"]) == ("dlu_upsample", "0.789 (0.789 to 0.789, 3)")
    assert (dlu["over compiled"], dlu["over unfold"]) == ("2 (0.5 to 4, 3)", "")
    assert (carafe["over compiled"], carafe["over unfold"]) == ("", "10 (10 to 10, 1)")


@pytest.mark.parametrize(
    "other",
    (
        {"features": (2, 8, 4, 6)},
        {"direction": "backward"},
        {"dtype": "float16"},
        {"layout": "channels_last"},
        {"op": "carafe"},
        {"shape": {"features": [2, 8, 4, 5], "scale_factor": 2, "kernel_size": 3}},
    ),
    ids=lambda other: next(iter(other)),
)
def test_a_rival_of_something_else_is_no_rival(root, other):
    write(root, record("compiled", 30, **other), record("compiled", 80, features=SIZES[1]))
    report.main([], root)
    assert [row["over compiled"] for row in rows(root, FORWARD)] == ["", "2x", ""]


def test_interpolation_is_compared_with_upsampling_only(root):
    names = ("interpolate", "nearest")
    rivals = [record(impl, us, op="interpolate") for impl, us in zip(names, (5, 2.5), strict=True)]
    write(root, *rivals, record("triton", 10, op="expand_kernels"), record("eager", 20, op="expand_kernels"))
    report.main([], root)
    assert rows(root, FORWARD)[0]["over interpolate"] == "0.5x"
    assert rows(root, FORWARD)[0]["over interpolate nearest"] == "0.25x"
    (row,) = rows(root, "<code>expand_kernels</code>, forward")
    assert {title for title in row if title.startswith("over")} == {"over eager"}
    assert "<code>interpolate</code>" not in cases(root)


def test_unsupported_rivals_have_a_footnote(root):
    error = "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB.\nMore"
    errors = [unsupported(error, impl="unfold", features=size) for size in SIZES[1:]]
    write(root, record("unfold", 50), errors=[*errors, unsupported("no kernel", impl="mmcv")])
    report.main([], root)
    found = rows(root, FORWARD)
    assert [row["over unfold"] for row in found] == ["5x", "-<sup>2</sup>", "-<sup>2</sup>"]
    assert "over mmcv" not in found[0]  # nothing but dashes
    assert "<sup>1</sup> mmcv: no kernel" in cases(root)
    assert "<sup>2</sup> unfold: OutOfMemoryError: CUDA out of memory\n" in cases(root)
    assert "Tried" not in cases(root)


def test_columns_without_a_figure_are_left_out(root):
    large = {"features": SIZES[1]}
    errors = [unsupported("no kernel", impl="mmcv"), unsupported("not installed", impl="official", **large)]
    write(root, record("unfold", 50), record("mmcv", 60, **large), errors=errors)
    report.main([], root)
    titles = [title for title in rows(root, FORWARD)[0] if title.startswith("over ")]
    assert titles == ["over unfold", "over mmcv"]
    assert "official: not installed" in cases(root)


def test_where_our_own_cannot_run_there_is_no_figure(root):
    large = {"features": (4, 8, 16, 20)}
    write(root, record("compiled", 50, **large), errors=[unsupported("out of memory", impl="triton", **large)])
    report.main([], root)
    last = rows(root, FORWARD)[-1]
    assert last["time, µs"] == "-<sup>1</sup>"
    assert last["of a copy"] == ""
    assert "over compiled" not in last


def test_operators_without_a_kernel_are_timed_by_name(root):
    modules = [record(impl, us, op="module") for impl, us in (("DLUPack", 123.4), ("ConvTranspose2d", 56.7))]
    write(root, *modules)
    report.main([], root)
    (row,) = rows(root, "<code>module</code>, forward")
    assert (row["DLUPack, µs"], row["ConvTranspose2d, µs"]) == ("123", "56.7")


def test_small_maps_are_those_with_a_replay(root):
    small = {"features": (1, 8, 4, 5)}
    ours = record("triton", 10, replay_seconds=4.56e-6, **small)
    write(root, ours, record("eager", 99, launches=17, host_us=321.0, **small), record("eager", 50))
    report.main([], root)
    found = [
        [row[name] for name in ("case", "implementation", "launches", "time, µs", "graph replay, µs", "host, µs")]
        for row in rows(root, "Small maps")
    ]
    assert found == [
        ["1x8x4x5 s 2 k 5", "triton", "1", "10", "4.56", "25"],
        ["1x8x4x5 s 2 k 5", "eager", "17", "99", "", "321"],
    ]


def test_scaling_is_of_the_cases_in_a_series(root):
    others = [record("triton", 3, features=(2, 16, size, 5)) for size in (4, 8, 16)]
    write(root, *others, record("triton", 3, features=(2, 8, 4, 4)))
    report.main([], root)
    (row,) = rows(root, "Scaling")
    assert row == {
        "series": "C 8 s 2 k 5 bfloat16 contiguous",
        "cases": "3",
        "smallest: elements": "1,280",
        "smallest: ps each": "7812",
        "smallest: of a copy": "0.789",
        "largest: elements": "20,480",
        "largest: ps each": "7812",
        "largest: of a copy": "0.789",
    }


LARGE = [(n, 256, 100, 100) for n in (1, 2, 4)]  # 10,240,000 elements and more


def of_the_series(microseconds, sizes=LARGE):
    return [record("triton", us, features=size, series=True) for us, size in zip(microseconds, sizes, strict=True)]


@pytest.mark.parametrize(
    ("microseconds", "spread", "met"), (((10, 22, 40), "1.1", "yes"), ((10, 20, 48), "1.2", "no")), ids=("flat", "not")
)
def test_spread_is_that_above_ten_million_elements(root, microseconds, spread, met):
    small = record("triton", 10, features=(1, 256, 10, 10), series=True)
    write(root, small, *of_the_series(microseconds), sizes=())
    report.main([], root)
    (row,) = rows(root, "Scaling")
    assert row["cases"] == "4"
    assert row["spread above 10⁷ elements"] == spread
    assert target(root, "time per element") == (f"{spread}x (1)", met)


def test_without_a_series_there_is_no_scaling(root, drawn):
    write(root, record("triton", 10), sizes=())
    report.main([], root)
    assert target(root, "time per element") == ("", "not measured")
    assert "Scaling" not in cases(root)
    assert "scaling.svg" not in block(root, "gpu")
    assert "roofline.svg" in block(root, "gpu")
    assert not list(root.glob("docs/plots/scaling*"))


def test_cpu_times(root):
    rivals = [record(impl, us) for impl, us in (("eager", 1500), ("unfold", 6000), ("unfold-nearest", 750))]
    carafe = [record(impl, us, op="carafe") for impl, us in (("eager", 2500), ("unfold", 5000))]
    module = [record(impl, us, op="module") for impl, us in (("DLUPack", 123.4), ("CARAFEPack", 56.7))]
    explanation = record("dlu_triton", 78.9, op="explanation", direction="explanation")
    missing = unsupported("not installed", impl="official")
    other = {"name": "cpu.json", "sizes": (), "device": "cpu", "gpu": None}
    write(root, *rivals, *carafe, *module, explanation, errors=[missing], **other)
    report.main([], root)
    (row,) = table(block(root, "cpu"))
    assert (row["pass"], row["time, ms"]) == ("forward", "1.5")
    assert (row["over unfold"], row["over unfold-nearest"]) == ("4x", "0.5x")
    assert "over official" not in row
    assert "<sup>1</sup> official: not installed" in block(root, "cpu")
    assert "Made-up CPU, threads: 3, torch 5.6" in block(root, "cpu")
    assert "(results/cpu.md)" in block(root, "cpu")
    assert "carafe" not in block(root, "cpu")
    assert "GPU" not in block(root, "cpu")
    assert "Not measured yet." in block(root, "gpu")
    (row,) = rows(root, "<code>carafe</code>, forward", "cpu")
    assert (row["time, ms"], row["over unfold"]) == ("2.5", "2x")
    (row,) = rows(root, "<code>module</code>, forward", "cpu")
    assert (row["DLUPack, µs"], row["CARAFEPack, µs"]) == ("123", "56.7")
    (row,) = rows(root, "<code>explanation</code>, explanation", "cpu")
    assert row["dlu_triton, µs"] == "78.9"
    assert "Made-up CPU, threads: 3, torch 5.6" in cases(root, "cpu")
    assert "<summary><code>dlu_upsample" not in cases(root, "cpu")
    assert not root.joinpath("docs", "results", "gpu.md").exists()


def host_records():
    """Of two passes: our own call in 40 and 90 microseconds, what else there is."""
    impls = {"dlu_triton": 40, "checks": 4, "launches": 20, "registered": 60, "Function": 8, "grid_sample": 2}
    forward = [record(impl, each) for impl, each in impls.items()]
    graph = [
        record(impl, each + 50, direction="forward with a graph")
        for impl, each in impls.items()
        if impl not in ("checks", "launches")
    ]
    return [each | {"group": "host"} for each in forward + graph]


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_the_part_of_the_host(root, device):
    write(root, *host_records(), name="host.json", sizes=(), device=device)
    report.main([], root)
    text = block(root, "host")
    assert ("Made-up CPU, threads: 3" if device == "cpu" else "Made-up GPU, driver 1.2") in text
    assert ("without a GPU" in text) == (device == "cpu")
    assert "Load average 1.23 on 4 processors." in text
    assert "of 2x8x4x5 s 2 k 5 bfloat16." in text
    columns = {
        "op": "dlu_upsample", "pass": "forward", "a call": "30 (40)", "of it checks": "3 (4)",
        "of it launches": "15 (20)", "by the registered op": "45 (60)", "<code>Function</code>": "6 (8)",
        "<code>F.grid_sample</code>": "1.5 (2)",
    }  # fmt: skip
    forward, graph = table(text)
    assert forward == columns
    assert (graph["pass"], graph["a call"], graph["of it launches"]) == ("forward with a graph", "67.5 (90)", "")


def test_the_part_of_the_host_is_in_no_other_table(root):
    """A run of all benchmarks has it as well."""
    other = {"device": "cpu", "gpu": None}
    for name in ("cpu.json", "host.json"):
        write(root, record("eager", 10), *host_records(), name=name, sizes=(), **other)
    report.main([], root)
    assert len(table(block(root, "cpu"))) == 1
    assert "registered" not in block(root, "cpu") + cases(root, "cpu")
    assert "eager" not in block(root, "host")
    assert len(table(block(root, "host"))) == 2


# ---------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------


def case(n=8, c=256, h=104, w=168, scale=2, kernel=5, **fields):
    return {"shape": {"features": [n, c, h, w], "scale_factor": scale, "kernel_size": kernel}, **fields}


def small_map(**fields):
    return case(n=2, h=13, w=21, **fields)


PIXELS = 8 * 104 * 168
SINGLE, LAST = {"dtype": "float32"}, {"layout": "channels_last"}
OTHERS = [case(n=4), case(c=64), case(h=100), case(scale=4), case(kernel=3)]


@pytest.mark.parametrize(
    ("what", "records", "measured", "met"),
    (
        ("bfloat16 and float16", [case(roofline=0.85), case(n=16, roofline=0.9)], "0.85 to 0.9 (2)", "yes"),
        ("bfloat16 and float16", [case(dtype="float16", roofline=0.84)], "0.84 (1)", "no"),
        ("bfloat16 and float16", [case(roofline=0.95), case(roofline=0.84, **LAST)], "0.84 to 0.95 (2)", "no"),
        ("bfloat16 and float16", [case(), case(roofline=None, **LAST)], "0.789 (1 of 2)", "no"),
        ("bfloat16 and float16", [case(roofline=1), case(roofline=None, **LAST)], "1 (1 of 2)", "not measured"),
        ("bfloat16 and float16", [case(**SINGLE), *OTHERS], "", "not measured"),
        ("s 2 k 5, float32", [case(roofline=0.8, **SINGLE)], "0.8 (1)", "yes"),
        ("s 2 k 5, float32", [case(roofline=0.79, **SINGLE), case(roofline=1)], "0.79 (1)", "no"),
        ("s 4, 8 and 16", [case(scale=s, roofline=s / 4) for s in (2, 4, 8, 16)], "1 to 4 (3)", "yes"),
        ("s 4, 8 and 16", [case(scale=4, roofline=0.7), case(scale=4, **SINGLE)], "0.7 (1)", "no"),
        ("64 channels", [case(c=64, roofline=0.81), case(), case(c=64, **SINGLE)], "0.81 (1)", "yes"),
        ("64 channels", [case(c=64, roofline=0.79)], "0.79 (1)", "no"),
        ("launches", [small_map(launches=1), case(n=1, h=26, w=42, launches=2)], "1 to 2 (2)", "yes"),
        ("launches", [small_map(launches=3)], "3 (1)", "no"),
        ("launches", [case(h=13, w=21), case(n=2, h=14, w=14), small_map(scale=16)], "", "not measured"),
        ("graph replay", [small_map(replay_seconds=7.9e-6)], "7.9 µs (1)", "yes"),
        ("graph replay", [small_map(replay_seconds=8.1e-6)], "8.1 µs (1)", "no"),
        ("host", [small_map(host_us=40.0)], "40 µs (1)", "yes"),
        ("host", [small_map(host_us=41.0)], "41 µs (1)", "no"),
        ("peak memory", [case(peak_extra_bytes=64 * PIXELS + 10**7)], "1% (1)", "yes"),
        ("peak memory", [case(peak_extra_bytes=64 * PIXELS + 2 * 10**7)], "2% (1)", "no"),
        ("peak memory", [case(peak_extra_bytes=128 * PIXELS + 10**7, **SINGLE)], "1% (1)", "yes"),
        ("peak memory", [case(peak_extra_bytes=128 * PIXELS + 2 * 10**7, **SINGLE)], "2% (1)", "no"),
        ("peak memory", [case(peak_extra_bytes=0)], "0% (1)", "yes"),
    ),
)
def test_target(root, what, records, measured, met):
    backward = record("triton", 10, direction="backward", **case(roofline=0))
    write(root, *(record("triton", 10, **each) for each in records), backward, sizes=())
    report.main([], root)
    assert target(root, what) == (measured, met)


CARAFE = {"op": "carafe", "dtype": "float16"}


@pytest.mark.parametrize(
    ("what", "rival", "ours", "limit", "better"),
    (
        ("bilinear", {"impl": "interpolate", "op": "interpolate"}, {}, 1 / 1.15, "0.575 to 1.15x (2)"),
        ("compiled", {"impl": "compiled"}, {}, 5, "5 to 10x (2)"),
        ("mmcv", {"impl": "mmcv", **CARAFE}, CARAFE, 8, "8 to 16x (2)"),
    ),
    ids=("interpolate", "compiled", "mmcv"),
)
def test_target_over_a_rival(root, what, rival, ours, limit, better):
    def results(*times, **other):
        mine = [record("triton", 100, features=size, **ours) for size in SIZES]
        rivals = [record(**rival, microseconds=us, features=size) for us, size in zip(times, SIZES, strict=False)]
        write(root, *mine, *rivals, sizes=(), **other)
        report.main([], root)
        return target(root, what)

    just = 100 * limit * (1 + 1e-9)
    assert results(just, 2 * just) == (better, "yes")
    assert results(0.9 * just, 2 * just)[1] == "no"
    assert results() == ("", "not measured")
    assert results(errors=[unsupported("no kernel", **rival)]) == ("", "not measured")
    measured, met = results(just, errors=[unsupported("no kernel", **rival, features=SIZES[1])])
    assert measured.endswith("(1 of 2)")
    assert met == "not measured"


@pytest.mark.parametrize(
    "other",
    (
        {"impl": "compiled", "dtype": "float32"},
        {"impl": "nearest", "op": "interpolate"},
        {"impl": "compiled", **CARAFE},
        {"impl": "mmcv", "op": "carafe"},
    ),
)
def test_no_target_is_over_another_rival(root, other):
    names = {"op": "carafe" if other.get("op") == "carafe" else "dlu_upsample", "dtype": other.get("dtype", "bfloat16")}
    write(root, record("triton", 100, **names), record(**other, microseconds=1), sizes=())
    report.main([], root)
    for what in ("compiled", "bilinear", "mmcv"):
        assert target(root, what) == ("", "not measured")


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------

BACKWARD, BOTH, STEP = "backward", "forward+backward", "step"
DLU_BACKWARD, DLU_BOTH = {"direction": BACKWARD}, {"direction": BOTH}
DETERMINISTIC = "triton-deterministic"
IMAGES = [2, 3, 832, 1344]


def neck(impl, microseconds, *, images=IMAGES, direction=BOTH, **fields):
    shape = {"images": images, "channels": 256, "scale_factor": 2, "kernel_size": 5}
    return record(impl, microseconds, op="neck", direction=direction, **{"shape": shape, **fields})


def one_point(**fields):
    """The case of the headline whose offsets all lead to one point."""
    fields = case(**fields)
    return {**fields, "shape": {**fields["shape"], "offsets": "one point"}}


HALF_DTYPE = {"dtype": "float16"}
MEMORY = "peak memory beyond inputs, output and gradients"


@pytest.mark.parametrize(
    ("what", "records", "measured", "met"),
    (
        ("share of a copy", [case(roofline=0.6), case(n=16, roofline=0.7, **LAST)], "0.6 to 0.7 (2)", "yes"),
        ("share of a copy", [case(roofline=0.59), case(roofline=0.9, **LAST)], "0.59 to 0.9 (2)", "no"),
        ("share of a copy", [case(**HALF_DTYPE), case(**SINGLE), *OTHERS, one_point()], "", "not measured"),
        ("share of a copy", [case(roofline=0.7), one_point(roofline=0.1)], "0.7 (1)", "yes"),
        (MEMORY, [case(peak_extra_bytes=100, allowed_extra_bytes=100)], "1x (1)", "yes"),
        (MEMORY, [case(peak_extra_bytes=102, allowed_extra_bytes=100)], "1.02x (1)", "no"),
        (MEMORY, [small_map(peak_extra_bytes=50, allowed_extra_bytes=100)], "0.5x (1)", "yes"),
        (MEMORY, [case(peak_extra_bytes=None, allowed_extra_bytes=100)], "", "not measured"),
        (MEMORY, [case(peak_extra_bytes=200, allowed_extra_bytes=100, dtype="float64")], "", "not measured"),
        ("launches", [case(launches=9)], "", "not measured"),  # of another pass
    ),
)
def test_target_of_both_passes(root, what, records, measured, met):
    others = [record("triton", 10, direction=other, **case(roofline=0, launches=None)) for other in ("forward", STEP)]
    write(root, *(record("triton", 10, **each, **DLU_BOTH) for each in records), *others, sizes=())
    report.main([], root)
    assert training_target(root, what) == (measured, met)


@pytest.mark.parametrize(
    ("launches", "measured", "met"),
    (((4, 3), "3 to 4 (2)", "yes"), ((4, 5), "4 to 5 (2)", "no"), ((4, None), "4 (1 of 2)", "not measured")),
)
def test_target_of_launches(root, launches, measured, met):
    pairs = zip(launches, SIZES, strict=False)
    found = [record("triton", 10, features=size, launches=count, **DLU_BACKWARD) for count, size in pairs]
    write(root, *found, record("triton", 10, launches=7, op="carafe", **DLU_BACKWARD))
    report.main([], root)
    assert training_target(root, "alone: launches") == (measured, met)


@pytest.mark.parametrize(
    ("what", "rival", "ours", "limit", "best"),
    (
        ("compiled", {"impl": "compiled", **DLU_BOTH}, DLU_BOTH, 4, "4 to 8x (2)"),
        ("mmcv", {"impl": "mmcv", **CARAFE, **DLU_BOTH}, {**CARAFE, **DLU_BOTH}, 8, "8 to 16x (2)"),
    ),
    ids=("compiled", "mmcv"),
)
def test_training_target_over_a_rival(root, what, rival, ours, limit, best):
    def results(*times, **other):
        mine = [record("triton", 100, features=size, **ours) for size in SIZES]
        rivals = [record(**rival, microseconds=us, features=size) for us, size in zip(times, SIZES, strict=False)]
        write(root, *mine, *rivals, sizes=(), **other)
        report.main([], root)
        assert target(root, what) == ("", "not measured")  # of the forward pass
        return training_target(root, what)

    just = 100 * limit * (1 + 1e-9)
    assert results(just, 2 * just) == (best, "yes")
    assert results(0.99 * just, 2 * just)[1] == "no"
    assert results() == ("", "not measured")
    assert results(errors=[unsupported("no kernel", **rival)]) == ("", "not measured")
    measured, met = results(just, errors=[unsupported("no kernel", **rival, features=SIZES[1])])
    assert measured.endswith("(1 of 2)")
    assert met == "not measured"


@pytest.mark.parametrize("direction", (BACKWARD, BOTH))
def test_target_of_the_deterministic_mode(root, direction):
    shapes = [case(), one_point()]

    def results(*times, **other):
        mine = [record("triton", 100, direction=direction, **shape) for shape in shapes]
        found = [
            record(impl, us, direction=direction, **shape)
            for us, shape in zip(times, shapes, strict=False)
            for impl in (DETERMINISTIC, f"{DETERMINISTIC}-unfilled")
        ]
        write(root, *mine, *found, sizes=(), **other)
        report.main([], root)
        whats = {BACKWARD: "backward alone: time of the", BOTH: "forward+backward: time of the deterministic"}
        found = training_target(root, whats.pop(direction))
        assert [training_target(root, what) for what in whats.values()] == [("", "not measured")]
        return found

    assert results(150, 110) == ("1.1 to 1.5x (2)", "yes")
    assert results(110, 151) == ("1.1 to 1.51x (2)", "no")
    error = unsupported("has no deterministic implementation", impl=DETERMINISTIC, direction=direction, **shapes[1])
    assert results(110, errors=[error]) == ("1.1x (1 of 2)", "not measured")
    assert results() == ("", "not measured")
    assert "8x256x104x168 s 2 k 5 offsets one point" in cases(root)


def both_passes(nearest, pack, **fields):
    found = zip((BOTH, STEP), nearest, pack, strict=True)
    return [
        neck(impl, us, direction=direction, **fields)
        for direction, *times in found
        for impl, us in zip(("nearest", "DLUPack"), times, strict=True)
    ]


@pytest.mark.parametrize(
    ("records", "measured", "met"),
    (
        (both_passes((100, 200), (110, 206)), "1.03 to 1.1x (2)", "yes"),
        (both_passes((100, 200), (109, 222)), "1.09 to 1.11x (2)", "no"),
        ([*both_passes((100, 200), (109, 210)), *both_passes((80, 99), (99, 99), **LAST)], "1 to 1.24x (4)", "no"),
        ([*both_passes((9, 20), (9, 20)), *both_passes((9, 9), (99, 99), **HALF_DTYPE)], "1x (2)", "yes"),
        (both_passes((100, 200), (300, 300), images=[1, 3, 64, 96]), "", "not measured"),
        ([neck("DLUPack", 100)], "", "not measured"),
        ([neck("nearest", 100), neck("CARAFEPack", 300)], "", "not measured"),
    ),
)
def test_target_of_the_neck(root, records, measured, met):
    write(root, *records, sizes=())
    report.main([], root)
    assert training_target(root, "neck of four") == (measured, met)


def test_necks_and_steps_beside_nearest(root):
    modules = [record(impl, us, op="module", direction=STEP) for impl, us in (("CARAFEPack", 300), ("nearest", 100))]
    missing = unsupported("not installed", op="module", impl="mmcv-CARAFEPack", direction=STEP)
    write(root, *modules, *both_passes((100, 200), (110, 206)), neck("bilinear", 101), errors=[missing])
    report.main([], root)
    text = block(root, "gpu")
    neck_both, neck_step, module = table(text[text.index("In training,") :])
    assert neck_both["case"] == "images 2x3x832x1344 channels 256 s 2 k 5"
    assert (neck_both["op"], neck_both["pass"], neck_both["nearest, µs"]) == ("neck", BOTH, "100")
    assert (neck_both["DLUPack"], neck_both["bilinear"]) == ("1.1x", "1.01x")
    assert (neck_step["pass"], neck_step["DLUPack"], neck_step["bilinear"]) == (STEP, "1.03x", "")
    assert (module["op"], module["pass"], module["CARAFEPack"], module["DLUPack"]) == ("module", STEP, "3x", "")
    assert "<sup>1</sup> mmcv-CARAFEPack: not installed" in text
    found = [
        [row[name] for name in ("op", "pass", "implementation", "over nearest", "time, µs", "host, µs", "launches")]
        for row in rows(root, "Necks, and steps")
    ]
    assert found == [
        ["neck", BOTH, "nearest", "1x", "100", "25", "1"],
        ["neck", BOTH, "DLUPack", "1.1x", "110", "25", "1"],
        ["neck", BOTH, "bilinear", "1.01x", "101", "25", "1"],
        ["neck", STEP, "nearest", "1x", "200", "25", "1"],
        ["neck", STEP, "DLUPack", "1.03x", "206", "25", "1"],
        ["module", STEP, "CARAFEPack", "3x", "300", "25", "1"],
        ["module", STEP, "nearest", "1x", "100", "25", "1"],
        ["module", STEP, "mmcv-CARAFEPack", "-<sup>1</sup>", "", "", ""],
    ]
    assert "<code>neck</code>" not in cases(root)  # once is enough
    assert f"<code>module</code>, {STEP}" not in cases(root)


def test_backward_has_a_table_of_its_own(root):
    rival = record("compiled", 30, **DLU_BACKWARD)
    write(root, record("triton", 10, **DLU_BACKWARD), rival, record(DETERMINISTIC, 14, **DLU_BACKWARD))
    report.main([], root)
    (row,) = rows(root, "<code>dlu_upsample</code>, backward")
    assert (row["time, µs"], row["over compiled"], row[f"over {DETERMINISTIC}"]) == ("10", "3x", "1.4x")
    assert overview(root)[1]["over compiled"] == "3 (3 to 3, 1)"


def test_training_on_a_cpu(root):
    other = {"name": "cpu.json", "sizes": (), "device": "cpu", "gpu": None}
    fields = dict.fromkeys(("host_us", "launches", "peak_extra_bytes"))
    module = record("nearest", 10, op="module", direction=STEP, **fields)
    write(root, record("eager", 10), *both_passes((100, 200), (300, 500), **fields), module, **other)
    report.main([], root)
    first, _ = table(block(root, "cpu").partition("In training,")[2])
    assert (first["pass"], first["nearest, µs"], first["DLUPack"]) == (BOTH, "100", "3x")
    assert [row["over nearest"] for row in rows(root, "Necks, and steps", "cpu")] == ["1x", "3x", "1x", "2.5x", "1x"]
    assert "host, µs" not in rows(root, "Necks, and steps", "cpu")[0]
    write(root, record("eager", 10), **other)
    report.main([], root)
    assert "In training," not in block(root, "cpu")
    assert "Necks, and steps" not in cases(root, "cpu")


def write_errors(root, name="errors-gpu.json", **machine):
    """Two upsamplers and maps, in two types."""
    rows = [("carafe", "output", 1), ("carafe", "features", 2), ("carafe", "masks", 3), ("expand_kernels", "output", 4)]
    rows += [("expand_kernels", "kernel_space", 0.5), ("expand_kernels", "offsets", 6)]
    rows += [("class_activation_map", name, 7) for name in ("output", "activations", "gradients")]
    fields = ("operator", "result", "error")
    errors = [
        dict(zip(fields, row, strict=True)) | {"dtype": dtype, "eager": 10 * row[2], "cases": 11}
        for dtype in ("float64", "float32")
        for row in rows
    ]
    figures = {"machine": MACHINE | machine, "errors": errors}
    root.joinpath(report.RESULTS, name).write_text(json.dumps(figures))


def test_errors(root):
    report.main([], root)
    assert "python bench/errors.py" in block(root, "errors")
    write_errors(root)
    write_errors(root, "errors-interpreted.json", gpu=None)
    report.main([], root)
    text = block(root, "errors")
    assert text.splitlines()[2].startswith(
        "Made-up GPU: torch 5.6, Triton 7.8, commit 0123456789ab, `bench/results/errors-gpu.json`."
    )
    assert "Largest errors of 198 results" in text
    first, second = (table(text[text.index(f"\n|  | {column}") :]) for column in ("output", "map"))
    assert [list(row.values()) for row in first] == [
        ["upsampling, float64", "4.0e+00", "2.0e+00", "3.0e+00", "6.0e+00"],
        ["upsampling, float32", "4.0e+00 (4.0e+01)", "2.0e+00 (2.0e+01)", "3.0e+00 (3.0e+01)", "6.0e+00 (6.0e+01)"],
    ]
    assert second[1]["map"] == "7.0e+00 (7.0e+01)"


def write_emulated(root, findings=(), **machine):
    row = {"results": 970, "launches": {"a": 12340, "b": 5}, "failed": [], "findings": list(findings)}
    targets = {target: row | {"tests": number} for number, target in enumerate(("sm_80", "sm_90"))}
    record = {"machine": MACHINE | machine, "targets": targets}
    root.joinpath(report.EMULATED).write_text(json.dumps(record))


def test_emulated(root):
    write_emulated(root)
    report.main([], root)
    text = block(root, "emulated")
    assert "as Triton 7.8 compiles them" in text
    assert "(torch 5.6, commit 0123456789ab, `bench/results/emulated.json`)" in text
    assert [list(row.values())[1:] for row in table(text[text.index("\n|  |") :])] == [
        ["970", "970"], ["0", "1"], ["12,345", "12,345"],
    ]  # fmt: skip
    write_emulated(root, findings=["a race"])
    with pytest.raises(
        ValueError, match=r"^bench/results/emulated\.json must be of a run without failures, got .*race"
    ):
        report.main([], root)
    write_emulated(root, dirty=True)
    with pytest.raises(ValueError, match=r"^bench/results/emulated\.json must be measured at a commit, got"):
        report.main([], root)


def test_errors_of_no_commit_are_refused(root):
    write_errors(root, "errors-interpreted.json", gpu=None, dirty=True)
    with pytest.raises(ValueError, match=r"^bench/results/errors-interpreted\.json must be measured at a commit, got"):
        report.main([], root)
    report.main(["--allow-dirty"], root)
    assert (
        block(root, "errors")
        .splitlines()[2]
        .startswith("Triton's interpreter on a CPU, **not a GPU's arithmetic** (it truncates")
    )


# ---------------------------------------------------------------------------------------------------------------
# What is refused, and what is put together
# ---------------------------------------------------------------------------------------------------------------


def test_failed_tests_are_refused(root):
    write(root, selection={"failed": 2})
    with pytest.raises(ValueError, match=r"^bench/results/gpu\.json must be of a run without failures, got 2$"):
        report.main(["--allow-dirty"], root)


def test_a_part_of_a_selection_is_refused(root):
    write(root, name="cpu.json", device="cpu", selection={"keyword": "dlu and not carafe"})
    with pytest.raises(
        ValueError, match=r"^bench/results/cpu\.json must hold a whole selection, got 'dlu and not carafe' of it$"
    ):
        report.main(["--allow-dirty"], root)


def write_shards(root, numbers, count=4, **machine):
    """A shard each, with another channels' forward pass and the copy of that case."""
    for number in numbers:
        shard = {"features": (2, 8 * number, 4, 5)}
        records = [record("triton", 10 * number, **shard), record("copy", 7, op="copy", **shard)]
        selection = {"shard": [number, count]}
        write(root, *records, name=f"gpu-{number}.json", sizes=(), selection=selection, **machine)


def test_shards_are_one_run(root):
    write_shards(root, (1, 2, 3, 4))
    report.main([], root)
    found = {row["case"]: row["time, µs"] for row in rows(root, FORWARD)}
    assert found == {f"2x{8 * number}x4x5 s 2 k 5": f"{10 * number}" for number in (1, 2, 3, 4)}
    assert overview(root)[0]["of a copy"] == "0.789 (0.789 to 0.789, 4)"
    assert "`bench/results/gpu*.json` (selection full)." in block(root, "gpu")


@pytest.mark.parametrize(
    ("numbers", "message"), (((1, 2, 4), r"got \[1, 2, 4\]: missing \[3\]$"), ((1,), r"missing \[2, 3, 4\]$"))
)
def test_shards_must_be_complete(root, numbers, message):
    write_shards(root, numbers)
    with pytest.raises(ValueError, match=r"^bench/results/gpu\*\.json must be shards \[1, 2, 3, 4\], .*" + message):
        report.main([], root)


def test_a_shard_twice_is_refused(root):
    write_shards(root, (1, 2), count=2)
    write(root, name="gpu-9.json", selection={"shard": [2, 2]})
    with pytest.raises(ValueError, match=r"must be shards \[1, 2\], each once, got \[1, 2, 2\]"):
        report.main([], root)


@pytest.mark.parametrize(
    "other",
    ({"gpu": "B"}, {"gpu_driver": "B"}, {"torch": "B"}, {"triton": "B"}, {"commit": "B"}, {"dirty": True}),
    ids=lambda other: next(iter(other)),
)
def test_shards_of_other_machines_or_commits_are_refused(root, other):
    write_shards(root, (1,), count=2)
    write_shards(root, (2,), count=2, **other)
    ((field, value),) = other.items()
    with pytest.raises(
        ValueError,
        match=rf"^bench/results/gpu-1\.json and bench/results/gpu-2\.json must have the same {field}, "
        rf"got {MACHINE[field]!r} and {value!r}$",
    ):
        report.main(["--allow-dirty"], root)


@pytest.mark.parametrize(
    ("selection", "what"),
    (({"name": "quick", "shard": [2, 2]}, "selection"), ({"shard": [2, 3]}, "number of shards")),
)
def test_shards_of_another_selection_are_refused(root, selection, what):
    write_shards(root, (1,), count=2)
    write(root, name="gpu-2.json", selection=selection)
    with pytest.raises(ValueError, match=f"must have the same {what}, got "):
        report.main([], root)


@pytest.mark.parametrize("impl", ("triton", "copy"))
def test_a_record_in_two_shards_is_refused(root, impl):
    write_shards(root, (1,), count=2)
    again = record(impl, 7, op="copy" if impl == "copy" else "dlu_upsample", features=(2, 8, 4, 5))
    write(root, again, name="gpu-2.json", sizes=(), selection={"shard": [2, 2]})
    with pytest.raises(ValueError, match=rf"^bench/results/gpu-2\.json must hold one run, got {impl} twice for "):
        report.main([], root)


@pytest.mark.parametrize("machine", ({"dirty": True}, {"commit": None, "dirty": None}), ids=("dirty", "unknown"))
def test_a_dirty_tree_is_refused(root, machine):
    write(root, **machine)
    before = root.joinpath("README.md").read_text()
    with pytest.raises(ValueError, match=r"^bench/results/gpu\.json must be measured at a commit, got a dirty tree"):
        report.main([], root)
    assert root.joinpath("README.md").read_text() == before
    assert report.main(["--allow-dirty"], root) == 0
    assert ("with uncommitted changes" if machine["dirty"] else "no commit") in block(root, "gpu")


def test_results_of_another_device_are_refused(root):
    write(root, device="cpu")
    with pytest.raises(ValueError, match=r"^bench/results/gpu\.json must be of device 'cuda', got 'cpu'$"):
        report.main([], root)


def test_results_of_two_runs_are_refused(root):
    write(root, record("triton", 11))
    with pytest.raises(
        ValueError, match=r"must hold one run, got triton twice for dlu_upsample 2.8.4.5 s 2 k 5 bfloat"
    ):
        report.main([], root)


@pytest.mark.parametrize("field", ("impl", "launches", "host_us", "replay_seconds", "roofline", "max_error", "series"))
def test_a_missing_field_of_a_benchmark_is_named(root, field):
    write(root, record("triton", 10, replay_seconds=4.56e-6, layout="channels_last"))
    path = root / "bench" / "results" / "gpu.json"
    results = json.loads(path.read_text())
    del results["benchmarks"][-1]["extra_info"][field]
    path.write_text(json.dumps(results))
    with pytest.raises(
        ValueError, match=rf"^dlu_upsample-triton-forward of bench/results/gpu\.json has no field '{field}'"
    ):
        report.main([], root)


@pytest.mark.parametrize("field", ("gpu", "commit", "unsupported", "selection"))
def test_a_missing_field_of_the_run_is_named(root, field):
    write(root)
    path = root / "bench" / "results" / "gpu.json"
    results = json.loads(path.read_text())
    for part in (results, results["machine_info"]):
        part.pop(field, None)
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=rf"bench/results/gpu\.json has no field '{field}'"):
        report.main([], root)


@pytest.mark.parametrize("count", (0, 2))
def test_pages_must_have_the_blocks(root, count):
    block = "<!-- {}: bench/report.py -->\n<!-- end -->\n"
    root.joinpath("docs", "performance.md").write_text(block.format("cpu") + count * block.format("gpu"))
    with pytest.raises(ValueError, match=rf"^docs/performance\.md must have one block 'gpu', got {count}$"):
        report.main([], root)


def test_check_writes_nothing_and_tells(root, drawn, capsys):
    write(root)
    before = {page: root.joinpath(page).read_text() for page in report.PAGES}
    assert report.main(["--check"], root) == 1
    stale = capsys.readouterr().err
    for page, text in before.items():
        assert f"{page} is out of date: run python bench/report.py\n" in stale
        assert root.joinpath(page).read_text() == text
    assert not root.joinpath("docs", "plots").exists()
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    write(root, record("compiled", 20))
    assert report.main(["--check"], root) == 1
    report.main([], root)
    capsys.readouterr()
    path = root / "docs" / "results" / "gpu.md"
    path.write_text(path.read_text().replace("Made-up", "Real"))
    assert report.main(["--check"], root) == 1
    assert capsys.readouterr().err == "docs/results/gpu.md is out of date: run python bench/report.py\n"
    report.main([], root)
    plot = root / "docs" / "plots" / "scaling.svg"
    plot.write_text(plot.read_text().replace("picoseconds", "femtoseconds"))
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    assert capsys.readouterr().err == "docs/plots/scaling.svg is out of date: run python bench/report.py\n"


def test_plots_are_the_same_each_time(root, drawn):
    write(root, record("compiled", 20))
    report.main([], root)
    folder = root / "docs" / "plots"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = ("roofline", "speedup", "scaling")
    assert set(first) == {f"{name}.svg" for name in names}
    for name in names:
        for colour in (report.PAPER, report.INK, report.COLOURS[0]):
            assert colour.encode() in first[f"{name}.svg"]
        assert f"](plots/{name}.svg)" in block(root, "gpu")
    for path in folder.iterdir():
        xml.etree.ElementTree.parse(path)
        assert b"<dc:date>" not in first[path.name]
        path.unlink()
    report.main([], root)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_plots_show_the_figures(root, drawn):
    write(root, record("triton", 12, direction="backward", roofline=0.432), record("compiled", 20))
    report.main([], root)
    folder = root / "docs" / "plots"
    roofline = plain(folder / "roofline.svg")
    for text in ("0.79", "0.43", "forward", "backward", "2x8x16x20 s 2 k 5 bfloat16 contiguous"):
        assert f">{text}</text>" in roofline
    assert ">dlu_upsample over compiled</text>" in folder.joinpath("speedup.svg").read_text()
    assert ">C 8 s 2 k 5 bfloat16 contiguous</text>" in folder.joinpath("scaling.svg").read_text()


# ---------------------------------------------------------------------------------------------------------------
# The example that trains
# ---------------------------------------------------------------------------------------------------------------


def write_training(root, **machine):
    """Three seeds at one scale: DLU ties with CARAFE, and is 0.5 dB above bilinear."""
    example = report.train_upsampler
    names = ("a", "b", "c", "d")
    runs = [
        {
            "method": method,
            "scale": 4,
            "seed": seed,
            "psnr": {name: psnr + seed / 10 for name in names},
            "ssim": dict.fromkeys(names, 0.789),
            "parameters": parameters,
            "training_seconds": 12.3,
            "upsampler_milliseconds": 3.456,
            "network_milliseconds": 5.0,
        }
        for method, psnr, parameters in (("bilinear", 20.5, 0), ("carafe", 21, 9876), ("dlu", 21, 543))
        for seed in range(3)
    ]
    place = {"device": "Made-up CPU", "threads": 3, "torch": "5.6", "triton": "7.8", "python": "9.10"}
    place["commit"] = "0123456789abcdef0123456789abcdef01234567"
    key = {"settings": {"steps": 12, "held_out": list(names)}, "machine": place | machine}
    figures = example.summarise(runs, key, [0, 1, 2])
    root.joinpath("bench", "results", "train.json").write_text(json.dumps(figures))


def test_training_not_measured_yet(root):
    assert report.main([], root) == 0
    assert "Not measured yet:\n\n    python examples/train_upsampler.py\n" in block(root, "train")


def test_training(root, drawn):
    write_training(root)
    assert report.main([], root) == 0
    text = block(root, "train")
    carafe, dlu = table("\n" + text[text.index("| scale") :])[1:]
    assert (carafe["parameters"], dlu["parameters"]) == ("9,876", "543")
    assert carafe["PSNR, dB"] == dlu["PSNR, dB"] == "21.10 ± 0.10"
    assert carafe["DLU over it, dB (95%)"] == "+0.00 (+0.00 to +0.00)"
    assert "- 4x: DLU is better than bilinear; ties with CARAFE.\n" in text
    assert "Made-up CPU, threads: 3, torch 5.6, Triton 7.8, Python 9.10, commit 0123456789ab, `bench/results" in text
    assert "Python 9.10, commit 0123456789ab.\n" in cases(root, "train")
    assert "](plots/train.svg)" in text
    plot = root / "docs" / "plots" / "train.svg"
    xml.etree.ElementTree.parse(plot)
    for word in ("4x", "bilinear", "CARAFE", "DLU"):
        assert f">{word}</text>" in plain(plot)
    (row,) = table(block(root, "train-short"))
    assert (row["scale"], row["bilinear"], row["CARAFE"], row["DLU"]) == ("4x", "20.60", "21.10", "21.10")
    assert row["DLU's share of CARAFE's parameters"] == "5%"  # 543 of 9,876
    assert "- 4x: DLU is better than bilinear; ties with CARAFE.\n" in block(root, "train-short")
    assert report.main(["--check"], root) == 0
    write_training(root, torch="9.9")
    assert report.main(["--check"], root) == 1


@pytest.mark.parametrize("commit", (None, "0123456789abcdef0123456789abcdef01234567-dirty"), ids=("unknown", "dirty"))
def test_training_of_a_dirty_tree_is_refused(root, commit):
    write_training(root, commit=commit)
    with pytest.raises(ValueError, match=r"^bench/results/train\.json must be measured at a commit, got "):
        report.main([], root)
    assert report.main(["--allow-dirty"], root) == 0
    assert ("no commit" if commit is None else "commit 0123456789ab-dirty") in block(root, "train")
