"""Time tiles of the forward pass side by side on a GPU, each held against float64 first.

    python bench/tune.py --dtype bfloat16 float32 --scale 2 4 8 16 --seconds 500 --json tune.json

prints one line a variant as it is measured, as a share of a copy of the same bytes in the same run, then the fastest of
each group; what does not fit the GPU is told with its error. What wins goes into `FORWARD_TILES` of
`dlu_triton/_launch.py`, by hand, and the results are committed with a line in NOTES.md.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accuracy
import cases
import clock
import machine
import measure
import torch
from cases import MEMORY_FORMATS, Case
from test_upsampling import OPERATORS

from dlu_triton import _launch

# Height and width of a tile of outputs. A variant is an entry of `FORWARD_TILES`: these, pixels of a piece, warps.
BLOCKS = ((8, 8), (4, 16), (2, 32), (8, 16), (16, 8), (4, 32), (2, 64), (16, 16))
ROUNDS = 30


def variants(scale: int, itemsize: int) -> list[tuple[int, int, int, int]]:
    """In one piece and, where that is more than 16 pixels, in two or more; large tiles for eight warps as well."""
    found = []
    for block_h, block_w in BLOCKS:
        height, width = _launch.window(block_h, block_w, scale, 5)
        whole = _launch.power_of_2(height * width)
        few = block_h * block_w <= 128 // (itemsize // 2)
        if whole <= 256 and (few or scale > 2):
            pieces = {min(whole, 128), min(max(whole // 2, 16), 64), max(16, min(whole // 4, 32))}
            for block_q in sorted(pieces, reverse=True):
                found.append((block_h, block_w, block_q, 4))
                if block_h * block_w >= 128:
                    found.append((block_h, block_w, block_q, 8))
    return found


@contextmanager
def chosen(variant: tuple[int, int, int, int], case: Case) -> Iterator[None]:
    """Launch this variant for the case."""
    before = _launch.FORWARD_TILES
    key = (getattr(torch, case.dtype).itemsize, case.layout == "channels_last", case.scale)
    _launch.FORWARD_TILES = {**before, key: variant}
    try:
        _forget()
        yield
    finally:
        _launch.FORWARD_TILES = before
        _forget()


def _forget() -> None:
    _launch.forward_tile.cache_clear()
    _launch.forget_launches()


def tune(op: str, case: Case) -> Iterator[dict[str, Any]]:
    """What each variant takes, or why it cannot run."""
    tensors = {name: tensor.detach() for name, tensor in cases.inputs(op, case, measure.DEVICE).items()}
    sizes = {"scale_factor": case.scale, "kernel_size": case.kernel}
    ours, definition = (OPERATORS[op][impl] for impl in ("triton", "eager"))
    image = [tensor[:1] for tensor in tensors.values()]  # held against float64, as images do not depend on each other
    eager, truth = (definition(*each, **sizes) for each in (image, [tensor.double() for tensor in image]))
    largest = truth.abs().max().item()
    limit = accuracy.limit(op, case, (eager - truth).abs().max().item() / largest, foreign=False)
    output = ours(*tensors.values(), **sizes)
    ideal = output.nbytes + sum(tensor.nbytes for tensor in tensors.values())
    flush, copy = clock.Flush(), torch.empty(ideal // 2, dtype=torch.int8, device=measure.DEVICE).random_()
    del output
    copied = ideal / _seconds(copy.clone, flush)
    for variant in variants(case.scale, getattr(torch, case.dtype).itemsize):
        row: dict[str, Any] = {"op": op, "case": str(case), "variant": variant}
        with chosen(variant, case):
            try:
                error = (ours(*tensors.values(), **sizes)[:1] - truth).abs().max().item() / largest
                if not error <= limit:
                    raise ValueError(f"wrong by {error:.1e}, over {limit:.1e}")
                seconds = _seconds(lambda: ours(*tensors.values(), **sizes), flush)
                row |= {"error": error, "seconds": seconds, "roofline": ideal / seconds / copied}
            except Exception as error:
                row["cannot"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        yield row


def _seconds(call: Callable[[], object], flush: clock.Flush) -> float:
    flush.cover(clock.host_seconds(call))
    return clock.device_seconds(call, flush, ROUNDS)


def _told(row: dict[str, Any]) -> str:
    block_h, block_w, block_q, warps = row["variant"]
    figures = row.get("cannot") or f"{row['seconds'] * 1e6:9.1f} us  {row['roofline']:.3f} of a copy"
    return f"  {f'{block_h} x {block_w}, pieces of {block_q}, {warps} warps':40} {figures}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--op", default="dlu_upsample", choices=("dlu_upsample", "carafe", "carafe_upsample"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--size", type=int, nargs=2, default=(208, 336), help="height and width of the output")
    parser.add_argument("--scale", type=int, nargs="+", default=[2])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--layout", nargs="+", default=list(MEMORY_FORMATS), choices=list(MEMORY_FORMATS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no variant after these")
    parser.add_argument("--json", type=Path, help="a file for all results, written after each")
    options = parser.parse_args()
    if measure.DEVICE != "cuda":
        parser.error("needs a GPU: the speed of a CPU or of the interpreter says nothing about tiles")
    results, end = [], time.monotonic() + options.seconds
    for scale, dtype, layout in itertools.product(options.scale, options.dtype, options.layout):
        height, width = (side // scale for side in options.size)
        case = Case(options.batch, options.channels, height, width, scale=scale, dtype=dtype, layout=layout)
        print(f"{options.op} {case}", flush=True)
        found = []
        for row in tune(options.op, case):
            found.append(row)
            print(_told(row), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"machine_info": machine.info(), "variants": results + found}))
            if time.monotonic() > end:
                break
        results += found
        measured = [row for row in found if "seconds" in row]
        if measured:
            print("fastest:" + _told(min(measured, key=lambda row: row["seconds"])), flush=True)
        if time.monotonic() > end:
            print("out of time")
            break


if __name__ == "__main__":
    main()
