"""Compile the reassembly for sm_90 and hold what a tile costs against the time that its bytes take.

    python tests/cost_model.py [--json]

prints for each shape and kernel, for one tile of outputs, or a step of the feature gradient's strips: clocks that its
bytes take at the memory's rate, and by resource clocks that it keeps an SM busy, as a share of these. Arithmetic on
machine code, not a measurement: bench/NOTES.md says what it leaves out. In a process of its own, as
`compile_kernels.py`.
"""

import argparse
import json
import math
from collections import Counter
from typing import Any, NamedTuple

import torch
import triton
from compile_kernels import StubDriver, compiling
from machine_code import Program, dump, instructions
from triton.backends.compiler import GPUTarget

# An H200: a device copy at 4.3e12 bytes a second, 132 SMs at 1.7e9 clocks. An SM issues four warp instructions a clock,
# one that goes to shared memory or exchanges lanes, and looks up one line of 128 bytes in its L1 cache. Operations of
# the tensor cores, dense, by size of the operands.
BYTES_PER_CLOCK = 4.3e12 / 132 / 1.7e9
INSTRUCTIONS_PER_CLOCK, SHARED_PER_CLOCK, LINES_PER_CLOCK = 4, 1, 1
TENSOR_FLOP_PER_CLOCK = {2: 4096, 4: 2048}
WARPS, REGISTERS, SHARED, BLOCKS = 64, 65536, 227 * 1024, 32
LINE = 128

HALF, WIDE = torch.bfloat16, torch.float32
NCHW, LAST = torch.contiguous_format, torch.channels_last
N, H, W, KERNEL = 8, 104, 168, 5


class Shape(NamedTuple):
    """An operator on 8 maps of 104 x 168."""

    operator: str
    dtype: torch.dtype
    layout: torch.memory_format
    channels: int
    scale: int


SHAPES = [
    *(Shape("dlu_upsample", dtype, layout, 256, scale) for dtype in (HALF, WIDE) for scale in (2, 4, 8, 16)
      for layout in (LAST, NCHW)),
    *(Shape("dlu_upsample", HALF, layout, 64, scale) for scale in (2, 4, 8, 16) for layout in (LAST, NCHW)),
    *(Shape(operator, HALF, layout, 256, 2) for operator in ("carafe", "carafe_upsample") for layout in (LAST, NCHW)),
]  # fmt: skip
BACKWARD_SHAPES = [shape for shape in SHAPES if shape.channels == 256 and shape.scale <= 4]
TABLE = (
    "kernel", "operator", "dtype", "channels", "scale", "layout", "tile", "memory",
    "instructions", "tensor cores", "shared memory", "cache lines", "from L2", "registers", "warps",
)  # fmt: skip


def launches(shape: Shape, *, backward: bool) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What an operator, or its backward pass, compiles: kernel and arguments, by name."""
    from dlu_triton.ops import carafe, dlu

    operator, dtype, layout, channels, scale = shape

    def meta(c: int, h: int = H, w: int = W) -> torch.Tensor:
        return torch.empty(N, c, h, w, dtype=dtype, device="meta").contiguous(memory_format=layout)

    features, taps, output_size = meta(channels), KERNEL**2, (scale * H, scale * W)
    if operator == "dlu_upsample":
        module, tensors, settings = dlu, (features, meta(taps), meta(2 * scale**2)), (scale, KERNEL, 1, None)
    elif operator == "carafe":
        module, tensors, settings = carafe, (features, meta(taps, *output_size)), (KERNEL, 1, scale, None)
    else:
        module, tensors, settings = carafe, (features, meta(taps * scale**2)), (scale, KERNEL, 1, None)
    with compiling(GPUTarget("cuda", 90, 32)) as compiled:
        op = getattr(module, f"{operator}_op")
        if backward:
            op.gradients.launch(meta(channels, *output_size), *tensors, *settings, *[True] * len(tensors))
        else:
            op.launch(*tensors, *settings)
    return {name: (kernel, arguments) for name, kernel, arguments in compiled}


def row(name: str, shape: Shape, kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    tile = Tile(shape, arguments, kernel.metadata.num_warps)
    program = Program(instructions(dump(kernel, "-sass")))
    cost = {
        "reassemble_forward": forward_cost,
        "reassemble_backward_features": features_cost,
        "reassemble_backward_kernels": kernels_cost,
    }[name](tile, program)
    memory = cost.bytes / BYTES_PER_CLOCK
    clocks = {
        "instructions": cost.executed.total() * tile.warps / INSTRUCTIONS_PER_CLOCK,
        "tensor cores": cost.products / TENSOR_FLOP_PER_CLOCK[tile.itemsize],
        "shared memory": _count(cost.executed, "SHFL", "STS", "LDS", "STSM") * tile.warps / SHARED_PER_CLOCK,
        "cache lines": cost.lines / LINES_PER_CLOCK,
    }
    registers = max(int(word.split(":")[1]) for word in dump(kernel, "-res-usage").split() if word.startswith("REG:"))
    blocks = min(
        REGISTERS // (triton.cdiv(registers, 8) * 8 * 32 * tile.warps),
        SHARED // (kernel.metadata.shared + 1024),
        WARPS // tile.warps,
        BLOCKS,
    )
    return {
        "kernel": name, "operator": shape.operator, "dtype": str(shape.dtype).removeprefix("torch."),
        "channels": shape.channels, "scale": shape.scale,
        "layout": "channels_last" if shape.layout is LAST else "NCHW", "tile": cost.tile, "memory": round(memory),
        **{resource: round(value / memory, 2) for resource, value in clocks.items()},
        "from L2": round(cost.from_l2 / cost.bytes, 2), "registers": registers, "shared": kernel.metadata.shared,
        "warps": blocks * tile.warps, "program warps": tile.warps,
        "feature bytes": tile.window * shape.channels * tile.itemsize,
        "output bytes": tile.outputs * shape.channels * tile.itemsize, "pair bytes": 2 * tile.itemsize,
        "wgmma": _count(cost.executed, "HGMMA"), "turns": program.turns(),
        "wide loads": _count(cost.executed, "LDG.E.128"), "scalar loads": _count(cost.executed, "LDG.E.U16"),
        "pair loads": cost.executed["LDG.E.64" if tile.itemsize == 4 else "LDG.E"],
        "wide stores": _count(cost.executed, "STG.E.128"),
        "narrow stores": _count(cost.executed, "STG") - _count(cost.executed, "STG.E.128"),
    }  # fmt: skip


def _count(executed: Counter[str], *opcodes: str) -> int:
    return sum(count for opcode, count in executed.items() if opcode.startswith(opcodes))


# ---------------------------------------------------------------------------------------------------------------
# What a tile costs
# ---------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of a tile: bytes that have to be moved, bytes that come from the L2 cache, instructions of a warp, operations of
    products with the zeros of their bands, and cache lines that are touched."""

    tile: str
    bytes: float
    from_l2: float
    executed: Counter[str]
    products: float
    lines: float


class Tile:
    """What the three kernels have in common: a block of outputs and the window of source pixels that it reaches."""

    def __init__(self, shape: Shape, arguments: dict[str, Any], warps: int) -> None:
        self.shape, self.arguments, self.warps = shape, arguments, warps
        self.itemsize, self.area = shape.dtype.itemsize, shape.scale**2
        self.channels_last, self.sampled = shape.layout is LAST, shape.operator == "dlu_upsample"
        self.outputs = arguments["BLOCK_H"] * arguments["BLOCK_W"]
        self.window = 0
        if "WINDOW_H" in arguments:
            window = arguments["WINDOW_H"] * arguments["WINDOW_W"]
            self.window = arguments["BLOCK_Q"] * math.ceil(window / arguments["BLOCK_Q"])
        self.source = self.itemsize * shape.channels  # bytes of a source pixel, or an output
        self.turns = math.ceil(shape.channels / arguments["BLOCK_C"])

    def products(self, outputs: int, window: int) -> int:
        return 2 * (3 if self.shape.dtype == WIDE else 1) * outputs * window * self.shape.channels

    def kernels(self) -> int:
        """Bytes of masks, logits, or kernel space and offsets, of a source pixel."""
        taps = KERNEL**2
        return self.itemsize * (taps + 2 * self.area if self.sampled else taps * self.area)

    def normalised(self) -> int:
        """The same where the kernel space has been normalised and its taps padded."""
        return 2 * self.itemsize * self.area + 32 * min(self.itemsize, 4) if self.sampled else self.kernels()

    def lines(self, rows: int, columns: int) -> float:
        """Of so many pixels in rows of a map, of all its channels."""
        if self.channels_last:
            return rows * columns * math.ceil(self.source / LINE)
        return self.shape.channels * rows * math.ceil(columns * self.itemsize / LINE)

    def corners(self, outputs: int) -> int:
        """Lines of the kernel space, of which each output reads four kernels."""
        return 4 * outputs if self.sampled else 0


def forward_cost(tile: Tile, program: Program) -> Cost:
    """A run that begins anywhere may touch one more line."""
    a, pixels = tile.arguments, tile.outputs / tile.area
    if tile.channels_last:
        window = tile.lines(1, tile.window)
    else:
        rows = tile.window / a["WINDOW_W"]
        window = tile.shape.channels * rows * (1 + (a["WINDOW_W"] - 2) * tile.itemsize / LINE)
    return Cost(
        f"{a['BLOCK_H']} x {a['BLOCK_W']}",
        pixels * (tile.source * (1 + tile.area) + tile.kernels()),
        tile.window * tile.source + pixels * tile.normalised(),
        program.executed(tile.turns),
        tile.products(tile.outputs, tile.window),
        tile.corners(tile.outputs) + window + tile.lines(a["BLOCK_H"], a["BLOCK_W"]),
    )


def features_cost(tile: Tile, program: Program) -> Cost:
    """A step of a strip; strips begin with one step more."""
    a, scale, steps = tile.arguments, tile.shape.scale, tile.arguments["steps"]
    pixels, pieces = a["STEP_H"] * a["STRIP_W"], a["PIECES_H"] * a["PIECES_W"]
    more, columns = (steps + 1) / steps, scale * (a["STRIP_W"] + KERNEL - 1)
    outputs, rows = scale * a["STEP_H"] * columns, scale * a["STEP_H"]
    if tile.channels_last:
        read = tile.lines(rows, columns)
    else:
        read = tile.lines(rows, min(a["BLOCK_W"], columns)) * a["PIECES_W"]
    executed = program.executed_by_step(pieces, "STG")
    return Cost(
        f"{a['STEP_H']} x {a['STRIP_W']}",
        pixels * (tile.source * (1 + tile.area) + tile.normalised()),
        more * (outputs * tile.source + outputs / tile.area * tile.normalised()),
        Counter({name: round(more * tile.turns * count) for name, count in executed.items()}),
        more * tile.products(pieces * tile.outputs, 2 * pixels),
        more * (tile.corners(outputs) * tile.turns + read) + tile.lines(a["STEP_H"], a["STRIP_W"]),
    )


def kernels_cost(tile: Tile, program: Program) -> Cost:
    """By the window of cells, with no output apart; additions to memory are not in the lines, and in bytes once."""
    a, pixels = tile.arguments, tile.outputs / tile.area
    gradients = 4 * 32 + 2 * tile.itemsize * tile.area if tile.sampled else tile.kernels()
    read = tile.normalised() if tile.shape.operator != "carafe" else 0
    return Cost(
        f"{a['BLOCK_H']} x {a['BLOCK_W']}",
        pixels * (tile.source * (1 + tile.area) + read + gradients),
        tile.window * tile.source + tile.outputs * tile.source + pixels * read,
        program.executed(tile.turns, "REDG" if tile.sampled else ""),
        tile.products(tile.outputs, tile.window),
        tile.corners(tile.outputs) + tile.lines(a["BLOCK_H"], a["BLOCK_W"]) + tile.lines(a["WINDOW_H"], a["WINDOW_W"]),
    )


def rows() -> Any:
    for backward, shapes in ((False, SHAPES), (True, BACKWARD_SHAPES)):
        for shape in shapes:
            for name, (kernel, arguments) in launches(shape, backward=backward).items():
                if name.startswith("reassemble"):
                    yield row(name, shape, kernel, arguments)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    triton.runtime.driver.set_active(StubDriver(GPUTarget("cuda", 90, 32)))
    if not options.json:
        print("| " + " | ".join(TABLE) + " |\n|" + " --- |" * 6 + " ---: |" * (len(TABLE) - 6))
    for found in rows():
        cells = "| " + " | ".join(str(found[name]) for name in TABLE) + " |"
        print(json.dumps(found) if options.json else cells, flush=True)


if __name__ == "__main__":
    main()
