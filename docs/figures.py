"""Draws the figures of the pages into docs/figures/.

    pip install -c constraints.txt ".[demo]" && python docs/figures.py

kernels.png is the second picture of `python -m dlu_triton demo`, of a module trained here for as many steps (half a
minute on one CPU core); bench/results/learned.json has the figures on it. tile.svg and gradients.svg follow from the
tile sizes in `dlu_triton/_launch.py`, and hold what they were drawn from as their description; `python docs/figures.py
--check` tells whether they are up to date.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a clone, installed or not
sys.path.append(str(Path(__file__).parents[1] / "bench"))

import machine

from dlu_triton import _demo, _launch, _learned, carafe

ROOT = Path(__file__).parents[1]
FIGURES, RECORD = ROOT / "docs" / "figures", ROOT / "bench" / "results" / "learned.json"
SCALE, KERNEL, CHANNELS, DTYPE = 2, 5, 256, torch.bfloat16  # with channels last: what the tables were chosen for
DPI = 100  # of the picture with a photograph, which is to stay small
INK, FAINT = "#1f2328", "#b0b7be"
TAPS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00")  # rows of a kernel, in Okabe and Ito's colours
STYLE = {
    "font.size": 10,
    "figure.facecolor": "white",  # also on a dark page
    "text.color": INK,
    "svg.hashsalt": "dlu_triton",
    "svg.fonttype": "none",
}


# ---------------------------------------------------------------------------------------------------------------
# What a module has learned
# ---------------------------------------------------------------------------------------------------------------


def learned() -> _learned.Learned:
    """What the DLU of the demo does to the packaged photograph."""
    clean, small = _demo._given(_demo._read(None))
    network = _demo._network(_demo.METHODS["DLU"])
    with tqdm(total=_demo.STEPS, unit="step", mininterval=0.5) as progress:
        _demo._train(network, clean, _demo.STEPS, progress)
    return _demo._learn(network, _demo._tensor(small), clean)


def kernels(found: _learned.Learned) -> bytes:
    """A PNG, with the figures on it as its description."""
    file, small = io.BytesIO(), io.BytesIO()
    _learned.picture(found, _demo.TITLE.format(steps=_demo.STEPS)).savefig(file, dpi=DPI)
    description = PngInfo()
    description.add_text("Description", _learned.caption(found))
    Image.open(file).convert("RGB").save(small, format="PNG", optimize=True, pnginfo=description)
    return small.getvalue()


def record(found: _learned.Learned) -> str:
    """The figures on the picture, as other results have theirs: with machine, versions and commit."""
    figures = {"steps": _demo.STEPS, "means": found.figures(), "caption": _learned.caption(found)}
    figures = {"machine": machine.info(), "datetime": datetime.now(UTC).isoformat(), "learned": figures}
    return json.dumps(figures, indent=1) + "\n"


# ---------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------


def tiles() -> dict[str, Any]:
    """What the pictures of tiles are drawn from: sizes as launches have them, and the band as the operator has it."""
    itemsize = DTYPE.itemsize
    tile, _ = _launch.forward_tile(SCALE, KERNEL, itemsize, True)
    kernel = _launch.kernel_tile(SCALE, KERNEL, itemsize, True)
    return {
        "forward": tile._asdict() | {"BLOCK_C": _launch.forward_channels(DTYPE, CHANNELS, KERNEL)},
        "band": band(tile),
        "features": _launch.gather_tile(SCALE, KERNEL, itemsize, True).strip._asdict(),
        "kernels": kernel.tile._asdict() | {"CELLS": kernel.cells},
    }


def window(tile: _launch.Tile) -> tuple[int, int, int, int]:
    """Row and column of a tile's first output, and of the first source pixel of its window, which is inside the map."""
    y, x = 2 * tile.BLOCK_H, 2 * tile.BLOCK_W
    return y, x, y // SCALE - KERNEL // 2, (x // SCALE - KERNEL // 2) // 2 * 2


def band(tile: _launch.Tile) -> list[list[int]]:
    """[M, Q]: which tap, counted from one, of each output of a tile falls on which pixel of its window; zero if none.

    From the operator itself: its output, where channel q of the features is one at pixel q of the window alone, and
    the kernels are the numbers of their taps.
    """
    y, x, window_y, window_x = window(tile)
    height, width = window_y + tile.WINDOW_H, window_x + tile.WINDOW_W
    pixels = torch.arange(tile.WINDOW_H * tile.WINDOW_W)
    features = torch.zeros(1, len(pixels), height, width)
    features[0, pixels, window_y + pixels // tile.WINDOW_W, window_x + pixels % tile.WINDOW_W] = 1
    taps = torch.arange(1.0, KERNEL**2 + 1)[None, :, None, None].repeat(1, 1, SCALE * height, SCALE * width)
    output = carafe(features, taps, KERNEL, 1, SCALE)
    return output[0, :, y : y + tile.BLOCK_H, x : x + tile.BLOCK_W].flatten(1).T.int().tolist()


def forward(data: dict[str, Any]) -> Figure:
    """The tile and its window above, their product below."""
    size, rows = data["forward"], data["band"]
    m, q, c = len(rows), len(rows[0]), size["BLOCK_C"]
    tile = _launch.Tile(**{name: size[name] for name in _launch.Tile._fields})
    shown = tile.BLOCK_W * (tile.BLOCK_H // 2 - 1) + tile.BLOCK_W // 2  # an output in the middle
    figure = Figure((10, 8), layout="constrained")
    _title(figure, "A tile of the forward pass")
    above, below = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    source, output = above.subplots(1, 2)
    y, x, window_y, window_x = window(tile)
    margin = 2
    _grid(source, window_y - margin, window_x - margin, tile.WINDOW_H + 2 * margin, tile.WINDOW_W + 2 * margin)
    for pixel, tap in enumerate(rows[shown]):
        if tap:
            place = (window_x + pixel % tile.WINDOW_W, window_y + pixel // tile.WINDOW_W)
            source.add_patch(Rectangle(place, 1, 1, facecolor=TAPS[(tap - 1) // KERNEL], edgecolor="white"))
            source.text(place[0] + 0.5, place[1] + 0.5, tap - 1, color="black", ha="center", va="center", fontsize=8)
    _frame(source, window_x, window_y, tile.WINDOW_W, tile.WINDOW_H)
    source.set_title(
        f"source pixels: the window, {tile.WINDOW_H} x {tile.WINDOW_W} = Q = {q},\n"
        f"and in it the {KERNEL} x {KERNEL} taps of one output"
    )
    _grid(output, y - margin, x - margin, tile.BLOCK_H + 2 * margin, tile.BLOCK_W + 2 * margin)
    _frame(output, x, y, tile.BLOCK_W, tile.BLOCK_H)
    place = (x + shown % tile.BLOCK_W, y + shown // tile.BLOCK_W)
    output.add_patch(Rectangle(place, 1, 1, facecolor=INK))
    output.set_title(f"outputs: a tile, {tile.BLOCK_H} x {tile.BLOCK_W} = M = {m},\nand in it that output")

    axis = below.subplots()
    gap = 14
    _band(axis, rows, shown)
    _box(axis, q + gap, 0, c, q, f"features\n[Q, C]\n\n{q} pixels of the window,\n{c} channels at a time")
    _box(axis, q + c + 2 * gap, 0, c, m, f"\n\n\n\noutputs\n[M, C]\n\n{m} pixels of the tile,\nthe same channels")
    axis.add_patch(Rectangle((q + c + 2 * gap, shown), c, 1, facecolor=INK))
    axis.text(q + gap / 2, q / 2, "@", ha="center", va="center", fontsize=16)
    axis.text(q + c + 1.5 * gap, q / 2, "=", ha="center", va="center", fontsize=16)
    filled = sum(tap > 0 for row in rows for tap in row)
    axis.set_title(
        f"band [M, Q]: row = output, column = pixel of the window, colour = row of the kernel;\n"
        f"{filled:,} of {m * q:,} entries are taps, {filled / (m * q):.0%}, the others are zero"
    )
    axis.set(xlim=(-1, q + 2 * c + 2 * gap + 1), ylim=(max(m, q) + 1, -1), aspect="equal")
    axis.set_axis_off()
    return figure


def gradients(data: dict[str, Any]) -> Figure:
    """A step of a strip of the features' gradient, and the window of cells of the kernels'."""
    figure = Figure((10, 6.2), layout="constrained")
    _title(figure, "A step and a tile of the backward pass")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    size, radius = data["features"], KERNEL // 2
    step, strip, width = size["STEP_H"], size["STRIP_W"], size["PIECES_W"] * size["BLOCK_W"] / SCALE
    _grid(left, -1, -radius - 1, 2 * step + 2, int(width) + 2)
    for name, row, colour in (("above", 0, TAPS[0]), ("below", step, TAPS[1])):
        left.add_patch(Rectangle((0, row), strip, step, facecolor=colour, alpha=0.55))
        left.text(strip / 2, row + (0.9 if row == 0 else step - 0.9), name, ha="center", va="center", fontsize=12)
    for down in range(size["PIECES_H"]):
        for across in range(size["PIECES_W"]):
            corner = (-radius + across * size["BLOCK_W"] / SCALE, radius + down * size["BLOCK_H"] / SCALE)
            left.add_patch(Rectangle(corner, size["BLOCK_W"] / SCALE, size["BLOCK_H"] / SCALE, fill=False, lw=1.8))
    pieces = f"{size['PIECES_H'] * size['PIECES_W']} pieces of {size['BLOCK_H']} x {size['BLOCK_W']} outputs, framed,"
    left.set_title(
        f"gradient of the features: a step of a strip {strip} wide;\n"
        f"{pieces} reach\n{2 * step} rows, and the {step} above are complete after it"
    )
    left.set_xlabel("source pixels, from the strip's first column")
    size = data["kernels"]
    cells, height, width = size["CELLS"], size["BLOCK_H"] // SCALE, size["BLOCK_W"] // SCALE
    top, start = -((cells - height) // 2), -((cells - width) // 2)
    _grid(right, top - 1, start - 1, cells + 2, cells + 2)
    right.add_patch(Rectangle((start, top), cells, cells, facecolor=TAPS[3], alpha=0.4))
    _frame(right, start, top, cells, cells)
    right.add_patch(Rectangle((0, 0), width, height, facecolor=TAPS[4], alpha=0.7))
    right.set_title(
        f"gradient of the kernels: a tile of {size['BLOCK_H']} x {size['BLOCK_W']} outputs\n"
        f"over {height} x {width} source pixels, and the {cells} x {cells} cells\n"
        "that it sums in before it adds into memory"
    )
    right.set_xlabel("source pixels, from the tile's first column")
    return figure


def _title(figure: Figure, text: str) -> None:
    text += f": {str(DTYPE).removeprefix('torch.')}, channels last, scale {SCALE}, kernels of {KERNEL} x {KERNEL}"
    figure.suptitle(text, x=0.01, horizontalalignment="left", fontsize=13, fontweight="bold")


def _grid(axis: Axes, top: int, left: int, height: int, width: int) -> None:
    """Pixels, as unit squares of which each has the number of its first corner."""
    axis.set(xlim=(left, left + width), ylim=(top + height, top), aspect="equal")
    axis.set_xticks(range(left, left + width + 1), minor=True)
    axis.set_yticks(range(top, top + height + 1), minor=True)
    axis.grid(which="both", color=FAINT, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)


def _frame(axis: Axes, x: float, y: float, width: float, height: float) -> None:
    axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=INK, linewidth=2.5))


def _box(axis: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    axis.add_patch(Rectangle((x, y), width, height, facecolor="#eef1f4", edgecolor=INK))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center")


def _band(axis: Axes, rows: list[list[int]], shown: int) -> None:
    """Runs of taps that are neighbours in a kernel and in the window, one rectangle each."""
    runs: dict[int, list[Rectangle]] = {row: [] for row in range(KERNEL)}
    for output, row in enumerate(rows):
        for pixel, tap in enumerate(row):
            if tap and (tap - 1) % KERNEL == 0:
                assert row[pixel : pixel + KERNEL] == list(range(tap, tap + KERNEL))
                runs[(tap - 1) // KERNEL].append(Rectangle((pixel, output), KERNEL, 1))
    for row, patches in runs.items():
        axis.add_collection(PatchCollection(patches, facecolor=TAPS[row], edgecolor="white", linewidth=0.3))
    q = len(rows[0])
    axis.add_patch(Rectangle((0, 0), q, len(rows), fill=False, edgecolor=INK))
    axis.add_patch(Rectangle((0, shown), q, 1, fill=False, edgecolor=INK, linewidth=1.5))


def drawings(data: dict[str, Any]) -> dict[Path, str]:
    """SVG files, the same bytes for the same data and matplotlib."""
    found = {}
    for name, draw in {"tile": forward, "gradients": gradients}.items():
        file = io.StringIO()
        with matplotlib.style.context(("default", STYLE)):
            metadata = {"Date": None, "Creator": None, "Description": json.dumps(data)}
            draw(data).savefig(file, format="svg", metadata=metadata)
        found[FIGURES / f"{name}.svg"] = "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
    return found


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a tile's picture is stale")
    options = parser.parse_args(arguments)
    found = drawings(tiles())
    if options.check:
        stale = [path for path, text in found.items() if not path.exists() or path.read_text() != text]
        print(*(f"out of date: {path}" for path in stale), sep="\n", end="\n" if stale else "")
        return int(bool(stale))
    FIGURES.mkdir(exist_ok=True)
    for path, text in found.items():
        path.write_text(text)
    module = learned()
    RECORD.write_text(record(module))
    (FIGURES / "kernels.png").write_bytes(kernels(module))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
