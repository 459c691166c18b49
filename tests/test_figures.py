"""The figures of the pages show the tiles that launches have, and what the page says of a trained module."""

import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import dlu_triton

ROOT = Path(__file__).parents[1]
if not ROOT.joinpath("docs").exists():
    pytest.skip("compares the pages beside the tests", allow_module_level=True)
matplotlib = pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tqdm")

FIGURES = ROOT / "docs" / "figures"
PINNED = re.findall(r"^matplotlib==(.+)$", ROOT.joinpath("constraints.txt").read_text(), re.MULTILINE)
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("docs_figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiles(figures):
    return figures.tiles()


@pytest.mark.parametrize("name", ("tile", "gradients"))
def test_pictures_are_of_the_tiles_that_launches_have(name, tiles):
    (described,) = ElementTree.parse(FIGURES / f"{name}.svg").iter(DESCRIPTION)
    assert json.loads(described.text) == tiles


@pytest.mark.skipif([matplotlib.__version__] != PINNED, reason="another matplotlib draws other bytes")
def test_pictures_are_up_to_date(figures, capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().out


def test_another_tile_makes_pictures_stale(figures, monkeypatch, capsys):
    right = figures._launch.forward_tile
    monkeypatch.setattr(figures._launch, "forward_tile", lambda *sizes: right(4, *sizes[1:]))
    monkeypatch.setattr(figures, "band", lambda tile: [[*range(1, 26), *[0] * 39]] * tile.BLOCK_H * tile.BLOCK_W)
    assert figures.main(["--check"]) == 1
    assert capsys.readouterr().out.count("out of date") == 2


def test_band_is_that_of_the_kernels(figures, tiles):
    """By hand: where each tap of each output falls in the window. The operator that made it ran the kernels."""
    size, k, s = tiles["forward"], figures.KERNEL, figures.SCALE
    tile = figures._launch.Tile(**{name: size[name] for name in figures._launch.Tile._fields})
    y, x, window_y, window_x = figures.window(tile)
    assert y % tile.BLOCK_H == x % tile.BLOCK_W == window_x % 2 == 0
    expected = [[0] * (tile.WINDOW_H * tile.WINDOW_W) for _ in range(tile.BLOCK_H * tile.BLOCK_W)]
    for output, row in enumerate(expected):
        first_y, first_x = (y + output // tile.BLOCK_W) // s - k // 2, (x + output % tile.BLOCK_W) // s - k // 2
        for tap in range(k * k):
            down, across = first_y + tap // k - window_y, first_x + tap % k - window_x
            assert 0 <= down < tile.WINDOW_H
            assert 0 <= across < tile.WINDOW_W
            row[down * tile.WINDOW_W + across] = tap + 1
    assert tiles["band"] == expected


def test_titles_have_the_sizes(figures, tiles):
    size, strip, kernels = tiles["forward"], tiles["features"], tiles["kernels"]
    said = " ".join(axis.get_title() for part in figures.forward(tiles).subfigs for axis in part.axes)
    m, q = size["BLOCK_H"] * size["BLOCK_W"], size["WINDOW_H"] * size["WINDOW_W"]
    assert f"{size['WINDOW_H']} x {size['WINDOW_W']} = Q = {q}," in said
    assert f"{size['BLOCK_H']} x {size['BLOCK_W']} = M = {m}," in said
    assert f"{25 * m:,} of {m * q:,} entries" in said
    said = " ".join(axis.get_title() for axis in figures.gradients(tiles).axes)
    assert f"pieces of {strip['BLOCK_H']} x {strip['BLOCK_W']} outputs" in said
    assert f"tile of {kernels['BLOCK_H']} x {kernels['BLOCK_W']} outputs" in said
    assert f"{kernels['CELLS']} x {kernels['CELLS']} cells" in said


def test_page_says_what_is_on_the_picture():
    """The figures beside the kernels of a trained module, from the picture's own description."""
    with Image.open(FIGURES / "kernels.png") as picture:
        described = picture.text["Description"]
    assert described.startswith("Means over the whole image, on edges")
    record = json.loads(ROOT.joinpath("bench", "results", "learned.json").read_text())
    assert described == record["learned"]["caption"]
    assert record["machine"].keys() >= {"torch", "triton", "commit", "device"}
    for measure, digits in (("offset", ".2f"), ("entropy", ".2f"), ("change", ".1%")):
        means = record["learned"]["means"][measure]
        assert f"{means['edges']:{digits}} and {means['flat']:{digits}}" in described
    assert described in " ".join(ROOT.joinpath("docs", "dlu.md").read_text().split())


def test_page_has_the_costs_of_the_formulas():
    text = ROOT.joinpath("docs", "dlu.md").read_text()
    rows = re.findall(r"^\| (\d+)\S \| (.+) \|$", text, re.MULTILINE)
    assert [scale for scale, _ in rows] == ["2", "16"]
    for scale, cells in rows:
        cost = dlu_triton.complexity(256, int(scale))
        expected = [f"{cost.carafe.parameters:,}", f"{cost.dlu.parameters:,}", f"{cost.parameters_saved:.1%}"]
        expected += [f"{cost.carafe.flops:,}", f"{cost.dlu.flops:,}", f"{cost.flops_saved:.1%}"]
        assert cells.split(" | ") == expected
        assert f"{cost.dlu.interpolation_flops:,}" in text
        assert f"{2 * int(scale) ** 2 * 25 * 256:,}" in text


def test_files_are_small():
    for path in FIGURES.iterdir():
        assert path.stat().st_size < 700_000, path
