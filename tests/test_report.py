"""README's tables and plots, from made-up results in a made-up README."""

import importlib.util
import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

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
    "cpu": {"brand_raw": "Made-up CPU"},
    "commit": "0123456789abcdef",
    "dirty": False,
}
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
        "host_us": 25.0,
        "replay_seconds": None,
        "max_error": 1.5e-3,
        "eager_error": 2.5e-3,
    }
    stats = {"median": microseconds * 1e-6}
    return {"name": f"{op}-{impl}-{direction}", "stats": stats, "extra_info": fields | other}


def unsupported(error, **names):
    return record(**names, microseconds=0)["extra_info"] | {"error": error}


draw = report.plots


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository without results, but for those of the explanations, and with an empty block for each table.

    Nothing is drawn, which takes its time, unless a test has `drawn`.
    """
    monkeypatch.setattr(report, "plots", lambda run: {})
    (tmp_path / "bench" / "results").mkdir(parents=True)
    explain = ROOT.joinpath("bench", "results", "explain.json").read_text()
    tmp_path.joinpath("bench", "results", "explain.json").write_text(explain)
    blocks = "\n".join(f"<!-- {name}: bench/report.py -->\n<!-- end -->" for name in ("explain", "gpu", "cpu"))
    tmp_path.joinpath("README.md").write_text(f"Before\n{blocks}\nAfter\n")
    return tmp_path


@pytest.fixture
def drawn(root, monkeypatch):
    monkeypatch.setattr(report, "plots", draw)


def write(root, *records, name="gpu.json", errors=(), **machine):
    """Results with three sizes of DLU's forward pass at least."""
    sizes = [record("triton", 10 * 4**index, features=size) for index, size in enumerate(SIZES)]
    results = {"machine_info": MACHINE | machine, "benchmarks": [*sizes, *records], "unsupported": list(errors)}
    root.joinpath("bench", "results", name).write_text(json.dumps(results))


def plain(path):
    """A file with letters for the signs that look like them."""
    return path.read_text().replace(report.TIMES, "x").replace(report.DASH, "-")


def block(root, name):
    return re.search(rf"<!-- {name}: .*?<!-- end -->", plain(root / "README.md"), re.DOTALL)[0]


def rows(root, title, name="gpu"):
    """Cells of a table by column, of the fold whose title starts so, or of the table above all folds."""
    text = block(root, name)
    text = text[text.index(f"<summary>{title}") :] if title else text
    text = text.partition("details>")[0]
    titles, _, *lines = (
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")
    )
    return [dict(zip(titles, line, strict=True)) for line in lines]


FORWARD = "<code>dlu_upsample</code>, forward"


def test_not_measured_yet(root, drawn):
    assert report.main([], root) == 0
    for name, option in {"gpu": "--full ", "cpu": ""}.items():
        command = f"python -m pytest bench {option}--benchmark-only --benchmark-json bench/results/{name}.json"
        assert "Not measured yet." in block(root, name)
        assert command in block(root, name)
    assert "picture" not in block(root, "gpu")
    assert not root.joinpath("bench", "results", "plots").exists()
    readme = root.joinpath("README.md").read_text()
    assert readme.startswith("Before\n")
    assert readme.endswith("\nAfter\n")


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
    assert f"{machine}, commit 0123456789ab, `bench/results/gpu.json`." in text
    assert "Not measured" not in text


def test_overview_over_all_cases(root):
    rivals = [record("compiled", us, features=size) for us, size in zip((20, 20, 640), SIZES, strict=True)]
    write(root, *rivals, record("triton", 9, op="carafe"), record("unfold", 90, op="carafe"))
    report.main([], root)
    dlu, carafe = rows(root, "")
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
    assert "<code>interpolate</code>" not in block(root, "gpu")


def test_unsupported_rivals_have_a_footnote(root):
    error = "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB.\nMore"
    errors = [unsupported(error, impl="unfold", features=size) for size in SIZES[1:]]
    write(root, record("unfold", 50), errors=[*errors, unsupported("no kernel", impl="mmcv")])
    report.main([], root)
    table = rows(root, FORWARD)
    assert [row["over unfold"] for row in table] == ["5x", "-<sup>2</sup>", "-<sup>2</sup>"]
    assert [row["over mmcv"] for row in table] == ["-<sup>1</sup>", "", ""]
    assert "<sup>1</sup> mmcv: no kernel" in block(root, "gpu")
    assert "<sup>2</sup> unfold: OutOfMemoryError: CUDA out of memory\n" in block(root, "gpu")
    assert "Tried" not in block(root, "gpu")


def test_where_our_own_cannot_run_there_is_no_figure(root):
    large = {"features": (4, 8, 16, 20)}
    write(root, record("compiled", 50, **large), errors=[unsupported("out of memory", impl="triton", **large)])
    report.main([], root)
    last = rows(root, FORWARD)[-1]
    assert last["time, µs"] == "-<sup>1</sup>"
    assert last["of a copy"] == last["over compiled"] == ""


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


def test_scaling(root):
    write(root, record("triton", 3, features=(2, 16, 4, 5)))  # one size of other channels is no series
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


def test_cpu_times(root):
    rivals = [record(impl, us) for impl, us in (("eager", 1500), ("unfold", 6000), ("unfold-nearest", 750))]
    write(root, *rivals, name="cpu.json", device="cpu", gpu=None)
    report.main([], root)
    (row,) = rows(root, "<code>dlu_upsample</code>", name="cpu")
    assert row["time, ms"] == "1.5"
    assert (row["over unfold"], row["over unfold-nearest"]) == ("4x", "0.5x")
    assert "Made-up CPU, threads: 3, torch 5.6" in block(root, "cpu")
    assert "GPU" not in block(root, "cpu")
    assert "Not measured yet." in block(root, "gpu")


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


@pytest.mark.parametrize("field", ("impl", "launches", "host_us", "replay_seconds", "roofline", "max_error"))
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


@pytest.mark.parametrize("field", ("gpu", "commit", "unsupported"))
def test_a_missing_field_of_the_run_is_named(root, field):
    write(root)
    path = root / "bench" / "results" / "gpu.json"
    results = json.loads(path.read_text())
    for part in (results, results["machine_info"]):
        part.pop(field, None)
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=rf"bench/results/gpu\.json has no field '{field}'"):
        report.main([], root)


def test_readme_must_have_the_blocks(root):
    root.joinpath("README.md").write_text("<!-- explain: bench/report.py -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="README must have one block 'gpu', got 0"):
        report.main([], root)


def test_check_writes_nothing_and_tells(root, drawn, capsys):
    write(root)
    before = root.joinpath("README.md").read_text()
    assert report.main(["--check"], root) == 1
    assert "README.md is out of date: run python bench/report.py\n" in capsys.readouterr().err
    assert root.joinpath("README.md").read_text() == before
    assert not root.joinpath("bench", "results", "plots").exists()
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    write(root, record("compiled", 20))
    assert report.main(["--check"], root) == 1
    report.main([], root)
    plot = root / "bench" / "results" / "plots" / "scaling-dark.svg"
    plot.write_text(plot.read_text().replace("picoseconds", "femtoseconds"))
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    assert (
        capsys.readouterr().err == "bench/results/plots/scaling-dark.svg is out of date: run python bench/report.py\n"
    )


def test_plots_of_both_modes_are_the_same_each_time(root, drawn):
    write(root, record("compiled", 20))
    report.main([], root)
    folder = root / "bench" / "results" / "plots"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    modes, names = ("light", "dark"), ("roofline", "speedup", "scaling")
    assert set(first) == {f"{name}-{mode}.svg" for name in names for mode in modes}
    for name in names:
        for mode in modes:
            for colour in (report.INK[mode][0], report.COLOURS[mode][0]):
                assert colour.encode() in first[f"{name}-{mode}.svg"]
        dark, light = (f"bench/results/plots/{name}-{mode}.svg" for mode in ("dark", "light"))
        assert f'media="(prefers-color-scheme: dark)" srcset="{dark}"' in block(root, "gpu")
        assert f'src="{light}"' in block(root, "gpu")
    for path in folder.iterdir():
        xml.etree.ElementTree.parse(path)
        assert b"<dc:date>" not in first[path.name]
        path.unlink()
    report.main([], root)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_plots_show_the_figures(root, drawn):
    write(root, record("triton", 12, direction="backward", roofline=0.432), record("compiled", 20))
    report.main([], root)
    folder = root / "bench" / "results" / "plots"
    roofline = plain(folder / "roofline-light.svg")
    for text in ("0.79", "0.43", "forward", "backward", "2x8x16x20 s 2 k 5 bfloat16 contiguous"):
        assert f">{text}</text>" in roofline
    assert ">dlu_upsample over compiled</text>" in folder.joinpath("speedup-light.svg").read_text()
    assert ">C 8 s 2 k 5 bfloat16 contiguous</text>" in folder.joinpath("scaling-light.svg").read_text()


def test_plots_want_a_series_of_sizes(root, drawn):
    results = {"machine_info": MACHINE, "benchmarks": [record("triton", 10)], "unsupported": []}
    root.joinpath("bench", "results", "gpu.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"gpu\.json must have dlu_upsample's forward pass at three sizes"):
        report.main([], root)
