"""Time tiles of the forward pass side by side on a GPU, each held against float64 first.

    python bench/tune.py --dtype bfloat16 --layout channels_last --scale 2 --json tune.json

prints one line a variant, the fastest first, as a share of a copy of the same bytes in the same run; what does not fit
the GPU is told with its error. What wins goes into `FORWARD_TILES` of `dlu_triton/_launch.py`, by hand, and the
results are committed with a line in NOTES.md.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import accuracy
import cases
import clock
import machine
import measure
import torch
from cases import FORWARD, MEMORY_FORMATS, Case
from test_upsampling import OPERATORS

from dlu_triton import _launch

OUTPUTS = {2: (32, 64, 128, 256), 4: (32, 64, 128), 8: (16, 32)}  # of a tile, by itemsize
ROUNDS = 30


class Variant(NamedTuple):
    block_h: int
    block_w: int
    block_q: int
    warps: int


def variants(scale: int, itemsize: int) -> list[Variant]:
    """Every tile whose window comes to no more than twice its part in pieces, for four warps and eight."""
    found = []
    for block_h, block_w in itertools.product((1, 2, 4, 8, 16), (4, 8, 16, 32, 64)):
        window = _launch.window(block_h, block_w, scale, 5)
        whole = _launch.power_of_2(window[0] * window[1])
        if block_h * block_w in OUTPUTS[itemsize]:
            pieces = {block_q for block_q in (16, 32, 64, 128) if whole // 8 <= block_q <= whole}
            found += [Variant(block_h, block_w, q, warps) for q in sorted(pieces) for warps in (4, 8)]
    return found


@contextmanager
def chosen(variant: Variant, case: Case) -> Iterator[None]:
    """Launch this variant for the case."""
    key = (getattr(torch, case.dtype).itemsize, case.layout == "channels_last", case.scale)
    before, options = dict(_launch.FORWARD_TILES), _launch.options
    _launch.FORWARD_TILES[key] = variant[:3]
    _launch.options = lambda *args, **kwargs: {**options(*args, **kwargs), "num_warps": variant.warps}
    try:
        _forget()
        yield
    finally:
        _launch.FORWARD_TILES, _launch.options = before, options
        _forget()


def _forget() -> None:
    _launch.forward_tile.cache_clear()
    _launch.forget_launches()


def tune(op: str, case: Case) -> list[dict[str, Any]]:
    """What each variant takes, the fastest first; those that cannot run last."""
    tensors, gradient = cases.inputs(op, case, measure.DEVICE), cases.upstream(op, case, measure.DEVICE)
    ideal = cases.ideal_bytes(op, FORWARD, tensors.values(), gradient)
    source = cases.inputs("copy", case, measure.DEVICE)["source"].detach()
    copy = 2 * source.nbytes / _seconds(source.clone)
    ours, definition = (OPERATORS[op][impl] for impl in ("triton", "eager"))
    sizes = {"scale_factor": case.scale, "kernel_size": case.kernel}
    found = []
    for variant in variants(case.scale, getattr(torch, case.dtype).itemsize):
        row: dict[str, Any] = {"op": op, "case": str(case), **variant._asdict()}
        found.append(row)
        with chosen(variant, case):
            try:
                call = accuracy.ready(lambda *x: ours(*x, **sizes), FORWARD, list(tensors.values()), gradient)
                (error,) = accuracy.errors(
                    lambda *x: definition(*x, **sizes), FORWARD, list(tensors.values()), gradient, call(),
                    accuracy.chunk_images(case),
                )  # fmt: skip
                row |= {"error": error.result, "eager_error": error.eager}
                if not error.result <= accuracy.limit(op, case, error.eager, foreign=False):
                    raise ValueError("wrong")
                seconds = _seconds(call)
            except Exception as error:
                row["cannot"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                continue
            row |= {"seconds": seconds, "roofline": ideal / seconds / copy}
    return sorted(found, key=lambda row: row.get("seconds", float("inf")))


def _seconds(call: Any) -> float:
    flush = clock.Flush()
    flush.cover(clock.host_seconds(call))
    return clock.device_seconds(call, flush, ROUNDS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--op", default="dlu_upsample", choices=("dlu_upsample", "carafe", "carafe_upsample"))
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 256, 104, 168), metavar=("N", "C", "H", "W"))
    parser.add_argument("--scale", type=int, nargs="+", default=[2])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--layout", nargs="+", default=list(MEMORY_FORMATS), choices=list(MEMORY_FORMATS))
    parser.add_argument("--json", help="a file for all results")
    options = parser.parse_args()
    if measure.DEVICE != "cuda":
        parser.error("needs a GPU: the speed of a CPU or of the interpreter says nothing about tiles")
    results = []
    for dtype, layout, scale in itertools.product(options.dtype, options.layout, options.scale):
        case = Case(*options.shape, scale=scale, dtype=dtype, layout=layout)
        found = tune(options.op, case)
        results += found
        print(f"{options.op} {case}")
        for row in found:
            name = f"{row['block_h']} x {row['block_w']}, pieces of {row['block_q']}, {row['warps']} warps"
            told = row.get("cannot") or f"{row['seconds'] * 1e6:9.1f} µs  {row['roofline']:.3f} of a copy"
            print(f"  {name:40} {told}", flush=True)
        if options.json:
            with open(options.json, "w") as file:
                json.dump({"machine_info": machine.info(), "variants": results}, file, indent=1)


if __name__ == "__main__":
    main()
