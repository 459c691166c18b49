"""Count what kernels do on a GPU, by the emulator, and what the units of an SM would take for it.

    python tests/cost_model.py [words of a case ...] [--json] [--lines] [--target sm_90]

prints a row for each launch, of a block in the middle of a map: what it does, and the clocks of each unit as shares of
the clocks that its bytes take to come from memory and go there, every argument once. "of a copy" is the time of these
bytes over that of the busiest unit. --lines adds the source lines that do most. Counts of memory, shared memory and
tensor cores are exact; instructions of machine code are estimated from those of PTX; times are computed, for an H200
whatever the target, and not measured: bench/NOTES.md says what they leave out. In processes of their own, as those of
`compile_kernels.py`.
"""

import argparse
import json
import math
import os
import re
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from typing import Any, NamedTuple
from unittest import mock

import emulator
import torch
from emulator.counters import Counters
from emulator.driver import SHARED
from machine_code import assemble, usage
from triton.runtime.jit import JITFunction

# An H200: 132 SMs at 1.755 GHz. Bytes a clock and SM of a copy at 4.3e12 a second, and of the L2 cache, reads and
# writes together, at 5.75e12; the port of an SM to it, each way; a wavefront of 128 bytes a clock through the unit that
# L1 and shared memory are, which looks up four cache lines; four warp instructions a clock, and a special function in
# two; operations of the tensor cores, dense.
SMS, CLOCK = 132, 1.755e9
MEMORY, L2, PORT, ISSUE, SPECIAL = 4.3e12 / SMS / CLOCK, 5.75e12 / SMS / CLOCK, 64, 4, 0.5
TENSOR = {"bf16": 4096, "f16": 4096, "tf32": 2048, "f64": 512}
WARPS, REGISTERS, BLOCKS = {75: 32, 80: 64, 86: 48, 89: 48, 90: 64, 120: 48}, 65536, 32

HALF, WIDE = torch.bfloat16, torch.float32
NCHW, LAST = torch.contiguous_format, torch.channels_last
GLOBAL, STORES = ("ld.global", "st.global", "atomic"), ("st.global", "atomic")
EXCHANGES = ("ld.shared", "st.shared", "ldmatrix", "stmatrix")


class Case(NamedTuple):
    """An operator with 5 x 5 kernels, or class activation maps."""

    operator: str
    dtype: torch.dtype
    layout: torch.memory_format
    channels: int
    scale: int = 2
    height: int = 104
    width: int = 168
    backward: bool = False
    batch: int = 8

    def __str__(self) -> str:
        layout = "channels_last" if self.layout is LAST else "NCHW"
        dtype = str(self.dtype).removeprefix("torch.")
        scale = "" if self.operator == "cam" else f" s{self.scale}"
        way = " backward" if self.backward else ""
        return f"{self.operator}{way} {dtype} {layout} C{self.channels}{scale} {self.height}x{self.width}"


CASES = [
    *(Case("dlu_upsample", dtype, layout, 256, scale, batch=8 if scale < 8 else 1) for dtype in (HALF, WIDE)
      for scale in (2, 4, 8, 16) for layout in (LAST, NCHW)),
    *(Case("dlu_upsample", HALF, layout, 64, scale) for scale in (2, 4) for layout in (LAST, NCHW)),
    *(Case("dlu_upsample", HALF, layout, 256, width=width) for width in (166, 167) for layout in (LAST, NCHW)),
    *(Case(operator, HALF, layout, 256) for operator in ("carafe", "carafe_upsample") for layout in (LAST, NCHW)),
    *(Case("dlu_upsample", dtype, layout, 256, scale, backward=True) for dtype in (HALF, WIDE) for scale in (2, 4)
      for layout in (LAST, NCHW)),
    *(Case(operator, HALF, layout, 256, backward=True) for operator in ("carafe", "carafe_upsample")
      for layout in (LAST, NCHW)),
    *(Case("cam", HALF, layout, channels, height=side, width=side, batch=32)
      for channels, side in ((2048, 7), (512, 14), (256, 56)) for layout in (LAST, NCHW)),
]  # fmt: skip


def launch(case: Case) -> None:
    """Only offsets influence the counts; they are random, near their source pixel."""
    from dlu_triton.ops import cam, carafe, dlu

    _, dtype, layout, channels, s, h, w, backward, batch = case

    def new(channels: int, height: int, width: int) -> torch.Tensor:
        if layout is LAST:
            return torch.zeros(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
        return torch.zeros(batch, channels, height, width, dtype=dtype)

    features, k = new(channels, h, w), 5
    if case.operator == "cam":
        gradients = new(channels, h, w).unsqueeze(1)
        cam.class_activation_map_op.launch(features, gradients, "xgradcam", 1e-6, True, (224, 224), True, False)
        return
    if case.operator == "dlu_upsample":
        offsets = new(2 * s * s, h, w)
        offsets[0] = torch.randn(offsets.shape[1:], generator=torch.Generator().manual_seed(0))
        op, tensors, settings = dlu.dlu_upsample_op, (features, new(k * k, h, w), offsets), (s, k, 1, None)
    elif case.operator == "carafe":
        op, tensors, settings = carafe.carafe_op, (features, new(k * k, s * h, s * w)), (k, 1, s, None)
    else:
        op, tensors, settings = carafe.carafe_upsample_op, (features, new(k * k * s * s, h, w)), (s, k, 1, None)
    if backward:
        op.gradients.launch(new(channels, s * h, s * w), *tensors, *settings, *[True] * len(tensors))
    else:
        op.launch(*tensors, *settings)


def inside(arguments: dict[str, Any], name: str, total: int, most: int = 4) -> list[int]:
    """Blocks to run: neighbours in the middle of the first image, all that share the channels of a tile."""
    if "tiles_w" not in arguments:
        return list(range(total // 16, total // 16 + most)) if total > most else list(range(total))
    slices = arguments.get("slices", 1)
    first = arguments["tiles_h"] // 2 * arguments["tiles_w"] + arguments["tiles_w"] // 2 - 1
    if name == "reassemble_backward_features":  # long strips, in reverse
        return [total - 1 - first * slices]
    return list(range(first * slices, (first + most) * slices))


def share(case: Case, arguments: dict[str, Any], grid: int) -> float:
    """What part of the launch a block does, if no border cuts it off."""
    pixels = case.batch * case.height * case.width
    if "STRIP_W" in arguments:
        return arguments["steps"] * arguments["STEP_H"] * arguments["STRIP_W"] / pixels / arguments["slices"]
    if "BLOCK_H" in arguments:
        outputs = arguments["BLOCK_H"] * arguments["BLOCK_W"]
        return outputs / case.scale**2 / pixels / arguments.get("slices", 1)
    return 1 / grid


def counted(case: Case, target: str) -> list[tuple[Counters, dict[str, Any]]]:
    """Counters and arguments of each launch."""
    launched, run = [], JITFunction.run

    def recording(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        launched.append(dict(zip(self.arg_names, args, strict=False)) | kwargs)
        kernel = run(self, *args, **kwargs)
        launched[-1]["shared"] = kernel.metadata.shared
        return kernel

    def choose(name: str, total: int) -> list[int]:
        return inside(launched[-1], name, total)

    with (
        emulator.running(target, shared_races=False, global_races=False, counters=True, choose=choose) as report,
        mock.patch.object(JITFunction, "run", recording),
    ):
        launch(case)
    return list(zip(report.counters, launched, strict=True))


def row(case: Case, found: Counters, arguments: dict[str, Any], target: str) -> dict[str, Any]:
    """Of a block."""
    n, grid, warps = found.blocks, math.prod(found.grid), found.threads // 32
    load, store = found.total("ld.global"), found.total(*STORES)
    shared = found.total(*EXCHANGES)
    added = {each.region for each in found.accesses.values() if each.kind == "atomic"}
    touched = {each.region for each in found.accesses.values()} - {""}
    bytes_ = sum(found.sizes[name] * (2 if name in added else 1) for name in touched) * share(case, arguments, grid)
    read = sum(found.by_block.get("ld.global", {}).values()) * 32 / n
    written = store.sectors * 32 / n
    requests = sum(max(each.tags, math.ceil(each.lanes * each.size / 128))
                   for each in found.accesses.values() if each.region)  # fmt: skip
    # Which way a block takes is known of PTX alone, what ptxas makes of it by the length of the whole.
    code, counts = usage(assemble(found.program.text)), found.instructions()
    ptx = sum(kind != "param" for block in found.program.counted for _, kind, *_ in block)
    issued = (counts.total() - counts["param"]) * code["instructions"] / ptx
    memory = bytes_ / MEMORY
    clocks = {
        "L2": (read + written) / L2,
        "L2 port": max(read, written) / PORT,
        "wavefronts": (shared.wavefronts + requests + found.wgmma_bytes / 128) / n,
        "issue": issued / n / ISSUE,
        "special": counts["special"] / n / SPECIAL,
        "tensor cores": sum(flops / TENSOR[kind] for kind, flops in found.flops().items()) / n,
    }
    arch = int(target.removeprefix("sm_"))
    blocks = min(
        REGISTERS // (-(-code["registers"] // 8) * 8 * found.threads),
        SHARED[arch] // (arguments["shared"] + 1024),
        WARPS[arch] // warps,
        BLOCKS,
    )
    busiest = max(clocks, key=clocks.get)
    sides = "STEP_H STRIP_W" if "STEP_H" in arguments else "BLOCK_H BLOCK_W"
    return {
        "case": str(case), "kernel": found.name, "operator": case.operator, "dtype": str(case.dtype)[6:],
        "layout": "channels_last" if case.layout is LAST else "NCHW", "channels": case.channels, "scale": case.scale,
        "width": case.width, "block": " x ".join(str(arguments[side]) for side in sides.split() if side in arguments),
        "grid": grid, "bytes": round(bytes_), "memory": round(memory), "traffic": round((read + written) / bytes_, 2),
        "load": round(load.sectors / max(load.fewest, 1), 2), "store": round(store.sectors / max(store.fewest, 1), 2),
        "conflicts": round(shared.wavefronts / max(shared.least, 1), 2),
        "instructions": round(issued / n / warps),
        **{unit: round(clock / memory, 2) for unit, clock in clocks.items()},
        "limit": busiest if clocks[busiest] > memory else "memory",
        "of a copy": round(memory / max(memory, clocks[busiest]), 2),
        "registers": code["registers"], "local": code["local"], "warps": blocks * warps,
        "widths": widths(found), "lines": lines(found),
    }  # fmt: skip


def widths(found: Counters) -> dict[str, dict[int, float]]:
    """Requests of a warp by kind and argument, and by bytes of a lane."""
    result: dict[str, dict[int, float]] = {}
    for each in found.accesses.values():
        if each.region:
            by_size = result.setdefault(f"{each.kind} {each.region}", {})
            by_size[each.size] = by_size.get(each.size, 0) + each.requests / found.blocks / (found.threads // 32)
    return result


def source(location: str) -> str:
    return " < ".join(re.findall(r"[\w.]+\.py:\d+", location)) or location


def lines(found: Counters) -> list[str]:
    """What each source line does, for one block: those with the most sectors or wavefronts, and with the most
    instructions."""
    told = []
    for (kind, location, region, size), a in found.by_location(*GLOBAL, *EXCHANGES).items():
        text = f"{kind} {region} {source(location)}: {a.requests / found.blocks:.0f} requests of {size} bytes a lane, "
        if region:
            text += f"{a.sectors / found.blocks:.0f} sectors where {a.fewest / found.blocks:.0f} hold what is used"
        else:
            text += f"{a.wavefronts / found.blocks:.0f} wavefronts where {a.least / found.blocks:.0f} are the fewest"
        told.append((a.sectors if region else a.wavefronts, text))
    issued = found.by_source().most_common(16)
    return [text for _, text in sorted(told, reverse=True)[:16]] + [
        f"{kind} {source(location)}: {count / found.blocks:.0f} warp instructions" for (kind, location), count in issued
    ]


def rows(case: Case, target: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [row(case, found, arguments, target) for found, arguments in counted(case, target)]


TABLE = (
    "case", "kernel", "block", "bytes", "traffic", "load", "store", "conflicts", "instructions",
    "L2", "wavefronts", "issue", "tensor cores", "limit", "of a copy", "registers", "warps",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", help="of the cases to count, such as backward or NCHW; all by default")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--lines", action="store_true", help="below each row, the source lines that do most")
    parser.add_argument("--target", default="sm_90", help="what to compile for, as sm_90")
    options = parser.parse_args()
    if not options.json:
        print("| " + " | ".join(TABLE) + " |\n|" + " --- |" * 3 + " ---: |" * (len(TABLE) - 3))
    cases, printed = [case for case in CASES if set(options.words) <= set(str(case).split())], set()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in chain.from_iterable(pool.map(rows, cases, [options.target] * len(cases))):
            if options.json:
                print(json.dumps(found), flush=True)
                continue
            figures = " | ".join(str(found[name]) for name in TABLE[1:])
            if figures not in printed:  # launches that several cases have in common
                print(f"| {found['case']} | {figures} |", flush=True)
                printed.add(figures)
                if options.lines:
                    print("\n".join(f"    {line}" for line in found["lines"]), flush=True)


if __name__ == "__main__":
    main()
