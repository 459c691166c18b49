"""Compile the forward pass for sm_90 and hold what a tile costs against the time that its bytes take.

    python tests/forward_model.py [--json]

prints for each shape, for one program and so one tile of outputs: clocks that its bytes take at the memory's rate, and
by resource clocks that it keeps an SM busy, as a share of these. Arithmetic on machine code, not a measurement:
bench/NOTES.md says what it leaves out. In a process of its own, as `compile_kernels.py`.
"""

import argparse
import json
import math

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
# operator, dtype, layout, channels, scale factor; 8 maps of 104 x 168
SHAPES = [
    *(("dlu_upsample", dtype, layout, 256, scale) for dtype in (HALF, WIDE) for scale in (2, 4, 8, 16)
      for layout in (LAST, NCHW)),
    *(("dlu_upsample", HALF, layout, 64, scale) for scale in (2, 4, 8, 16) for layout in (LAST, NCHW)),
    *((operator, HALF, layout, 256, 2) for operator in ("carafe", "carafe_upsample") for layout in (LAST, NCHW)),
]  # fmt: skip
N, H, W, KERNEL = 8, 104, 168, 5
TABLE = (
    "operator", "dtype", "channels", "scale", "layout", "tile", "memory",
    "instructions", "tensor cores", "shared memory", "cache lines", "registers", "warps",
)  # fmt: skip


def launch(operator: str, dtype: torch.dtype, layout: torch.memory_format, channels: int, scale: int) -> list[tuple]:
    """What an operator compiles: (name, compiled kernel, constants)."""
    from dlu_triton.ops import carafe, dlu

    def meta(c: int, h: int = H, w: int = W) -> torch.Tensor:
        return torch.empty(N, c, h, w, dtype=dtype, device="meta").contiguous(memory_format=layout)

    features, taps = meta(channels), KERNEL**2
    with compiling(GPUTarget("cuda", 90, 32)) as compiled:
        if operator == "dlu_upsample":
            dlu.dlu_upsample_op._init_fn(features, meta(taps), meta(2 * scale**2), scale, KERNEL, 1)
        elif operator == "carafe":
            carafe.carafe_op._init_fn(features, meta(taps, scale * H, scale * W), KERNEL, 1, scale)
        else:
            carafe.carafe_upsample_op._init_fn(features, meta(taps * scale**2), scale, KERNEL, 1)
    return compiled


def bytes_per_source(operator: str, channels: int, scale: int, itemsize: int) -> int:
    """Bytes of features, output and kernels that have to be moved, per source pixel."""
    kernels = {"dlu_upsample": KERNEL**2 + 2 * scale**2}.get(operator, KERNEL**2 * scale**2)
    return itemsize * (channels * (1 + scale**2) + kernels)


def lines(tile: dict, layout: torch.memory_format, channels: int, itemsize: int, window: int, sampled: bool) -> float:
    """Cache lines that loads of features and kernels and stores of outputs touch.

    A run that begins anywhere may touch one more. Of the kernel space each output reads four corners, a line each.
    """
    outputs = tile["BLOCK_H"] * tile["BLOCK_W"]
    corners = 4 * outputs if sampled else 0
    if layout is LAST:
        return corners + (window + outputs) * math.ceil(channels * itemsize / LINE)
    loads = window / tile["WINDOW_W"] * (1 + (tile["WINDOW_W"] - 2) * itemsize / LINE)
    stores = tile["BLOCK_H"] * math.ceil(tile["BLOCK_W"] * itemsize / LINE)
    return corners + channels * (loads + stores)


def row(operator: str, dtype: torch.dtype, layout: torch.memory_format, channels: int, scale: int) -> dict:
    (kernel, tile), = (
        (kernel, constants) for name, kernel, constants in launch(operator, dtype, layout, channels, scale)
        if name == "reassemble_forward"
    )  # fmt: skip
    itemsize, warps = dtype.itemsize, kernel.metadata.num_warps
    outputs = tile["BLOCK_H"] * tile["BLOCK_W"]
    memory = outputs / scale**2 * bytes_per_source(operator, channels, scale, itemsize) / BYTES_PER_CLOCK
    code = instructions(dump(kernel, "-sass"))
    executed = Program(code).executed(math.ceil(channels / tile["BLOCK_C"]))
    window = tile["BLOCK_Q"] * math.ceil(tile["WINDOW_H"] * tile["WINDOW_W"] / tile["BLOCK_Q"])
    products = 3 if dtype == WIDE else 1
    clocks = {
        "instructions": executed.total() * warps / INSTRUCTIONS_PER_CLOCK,
        "tensor cores": 2 * products * outputs * window * channels / TENSOR_FLOP_PER_CLOCK[itemsize],
        "shared memory": sum(
            count for opcode, count in executed.items() if opcode.startswith(("SHFL", "STS", "LDS", "STSM"))
        ) * warps / SHARED_PER_CLOCK,
        "cache lines": lines(tile, layout, channels, itemsize, window, operator == "dlu_upsample") / LINES_PER_CLOCK,
    }  # fmt: skip
    registers = max(int(word.split(":")[1]) for word in dump(kernel, "-res-usage").split() if word.startswith("REG:"))
    blocks = min(
        REGISTERS // (triton.cdiv(registers, 8) * 8 * 32 * warps),
        SHARED // (kernel.metadata.shared + 1024),
        WARPS // warps,
        BLOCKS,
    )
    return {
        "operator": operator, "dtype": str(dtype).removeprefix("torch."), "channels": channels, "scale": scale,
        "layout": "channels_last" if layout is LAST else "NCHW",
        "tile": f"{tile['BLOCK_H']} x {tile['BLOCK_W']}", "memory": round(memory),
        **{name: round(value / memory, 2) for name, value in clocks.items()},
        "registers": registers, "shared": kernel.metadata.shared, "warps": blocks * warps, "program warps": warps,
        "feature bytes": window * channels * itemsize, "output bytes": outputs * channels * itemsize,
        "pair bytes": 2 * itemsize,
        "wgmma": sum(count for opcode, count in executed.items() if opcode.startswith("HGMMA")),
        "wide loads": sum(count for opcode, count in executed.items() if opcode.startswith("LDG.E.128")),
        "scalar loads": sum(count for opcode, count in executed.items() if opcode.startswith("LDG.E.U16")),
        "pair loads": executed["LDG.E.64" if itemsize == 4 else "LDG.E"],
        "wide stores": sum(count for opcode, count in executed.items() if opcode.startswith("STG.E.128")),
        "narrow stores": sum(
            count for opcode, count in executed.items() if opcode.startswith("STG") and ".128" not in opcode
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    options = parser.parse_args()
    triton.runtime.driver.set_active(StubDriver(GPUTarget("cuda", 90, 32)))
    if not options.json:
        print("| " + " | ".join(TABLE) + " |\n|" + " --- |" * 5 + " ---: |" * (len(TABLE) - 5))
    for shape in SHAPES:
        found = row(*shape)
        cells = "| " + " | ".join(str(found[name]) for name in TABLE) + " |"
        print(json.dumps(found) if options.json else cells, flush=True)


if __name__ == "__main__":
    main()
