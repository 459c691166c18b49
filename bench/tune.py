"""Time tiles of one pass side by side on a GPU, each held against float64 first.

    python bench/tune.py --pass features --scale 2 --layout channels_last --seconds 180 --json features.json

prints one line a variant as it is measured, as a share of a copy of the same bytes in the same run, then the fastest of
each group; what does not fit the GPU or compile is told with its error. What wins goes into a table of
`dlu_triton/_launch.py`, by hand, and the results are committed with a line in NOTES.md.

| `--pass` | what is timed, with the softmax of kernel spaces that belongs to it | table |
| --- | --- | --- |
| `forward` | the forward pass | `FORWARD_TILES` |
| `features` | the gradient of the features alone | `GATHER_TILES` |
| `kernels` | the gradients of all other inputs, without that of the features | `KERNEL_TILES` |

The present choice comes first, so that what is cut off by `--seconds` had something to be compared with. README.md has
the commands for half an hour.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import accuracy
import cases
import clock
import machine
import measure
import torch
from cases import BACKWARD, CARAFE, DLU, DTYPES, FORWARD, LOGITS, MEMORY_FORMATS, Case
from test_upsampling import OPERATORS
from torch import Tensor

from dlu_triton import _checks, _launch
from dlu_triton.__main__ import positive_integer

FEATURES, KERNELS = "features", "kernels"
ROUNDS = 30
Variant = tuple[int, ...]  # an entry of a pass's table

# ---------------------------------------------------------------------------------------------------------------
# Variants
# ---------------------------------------------------------------------------------------------------------------

# Height and width of a tile of outputs.
FORWARD_BLOCKS = ((8, 8), (4, 16), (2, 32), (8, 16), (16, 8), (4, 32), (2, 64), (16, 16))
KERNEL_BLOCKS = ((8, 8), (4, 16), (2, 32), (8, 16), (4, 32), (16, 8))
CELLS = (8, 4, 0)  # offsets that reach two source pixels leave 4; without any, every output adds by itself
# Warps and registers of programs that compute few outputs, and many: on an SM of sm_90 three, four, two; two, one, two.
FEW_OUTPUTS = ((4, 168), (4, 128), (8, 128))
MANY_OUTPUTS = ((8, 128), (8, 255), (4, 255))
# How many strips of each width are tried, with channels, warps and registers of their programs.
STRIPS = {8: 3, 16: 2, 4: 2}
STRIP_PROGRAMS = (
    (256, 8, 255), (256, 8, 128), (128, 8, 128), (128, 4, 255), (128, 4, 168), (64, 4, 168), (64, 4, 128),
)  # fmt: skip


def forward_variants(op: str, case: Case) -> list[Variant]:
    """Tiles in one piece and, where that is more than 16 pixels, in two or more; large ones for eight warps as well."""
    scale, itemsize, channels_last = _key(case)
    tile, warps = _launch.forward_tile(scale, case.kernel, itemsize, channels_last)
    found = [(tile.BLOCK_H, tile.BLOCK_W, tile.BLOCK_Q, warps)]
    for block_h, block_w in FORWARD_BLOCKS:
        height, width = _launch.window(block_h, block_w, scale, case.kernel)
        whole = _launch.power_of_2(height * width)
        few = block_h * block_w <= 128 // (itemsize // 2)
        if whole <= 256 and (few or scale > 2):
            pieces = {min(whole, 128), min(max(whole // 2, 16), 64), max(16, min(whole // 4, 32))}
            for block_q in sorted(pieces, reverse=True):
                found.append((block_h, block_w, block_q, 4))
                if block_h * block_w >= 128:
                    found.append((block_h, block_w, block_q, 8))
    return list(dict.fromkeys(found))


def feature_variants(op: str, case: Case) -> list[Variant]:
    """Strips of three widths with the pieces that cost least, and for each so many channels, warps and registers.

    Where few programs take fewer channels than the table has, only as many are tried.
    """
    scale, itemsize, channels_last = _key(case)
    tile = _launch.gather_tile(scale, case.kernel, itemsize, channels_last)
    rows, sector = scale * _launch.step_rows(case.kernel), 8 if channels_last else 32 // itemsize
    strips = [tile.strip]
    for strip_w, count in STRIPS.items():
        pieces = [
            _launch.strip(scale, case.kernel, strip_w, block_h, block_w)
            for block_h in (1, 2, 4, 8)
            for block_w in (8, 16, 32, 64)
            if 16 <= block_h * block_w <= 64 and rows % block_h == 0 and block_w >= sector
        ]
        pieces.sort(key=lambda strip: (strip != tile.strip, strip.cost(channels_last)))
        strips += pieces[:count]
    found = [_entry(tile)]
    for strip in dict.fromkeys(strips):
        programs = case.n * _launch.cdiv(case.h, strip.STEP_H) * _launch.cdiv(case.w, strip.STRIP_W)
        for settings in STRIP_PROGRAMS:
            each = _launch.GatherTile(strip, *settings)
            if _launch.gather_channels(each, itemsize, case.c, case.kernel, programs, 16 // itemsize) == settings[:2]:
                found.append(_entry(each))
    return list(dict.fromkeys(found))


def _entry(tile: _launch.GatherTile) -> Variant:
    return (tile.strip.STRIP_W, tile.strip.BLOCK_H, tile.strip.BLOCK_W, *tile[1:])


def kernel_variants(op: str, case: Case) -> list[Variant]:
    """The present choice with one thing changed at a time, then other tiles in one piece or two, with cells where they
    are more than the source pixels under the tile."""
    scale, itemsize, channels_last = _key(case)
    tile, cells, channels, warps, registers = _launch.kernel_tile(scale, case.kernel, itemsize, channels_last)
    block = tile.BLOCK_H, tile.BLOCK_W, tile.BLOCK_Q
    found = [(*block, cells, channels, warps, registers)]
    found += [(*block, cells, channels, *others) for others in (*FEW_OUTPUTS, *MANY_OUTPUTS)]
    found += [(*block, others, channels, warps, registers) for others in CELLS]
    found += [(*block, cells, others, warps, registers) for others in (32, 64, 128)]
    for block_h, block_w in KERNEL_BLOCKS:
        height, width = _launch.window(block_h, block_w, scale, case.kernel)
        whole = max(16, _launch.power_of_2(height * width))
        around = 8 if max(block_h, block_w) < 8 * scale else 0
        for block_q in sorted({min(whole, 128), max(16, min(whole // 2, 64))}, reverse=True):
            for others in MANY_OUTPUTS if block_h * block_w >= 128 else FEW_OUTPUTS:
                found.append((block_h, block_w, block_q, around, channels, *others))
    if op != DLU:  # nothing is sampled, so no cells
        found = [(*variant[:3], cells, *variant[4:]) for variant in found]
    return list(dict.fromkeys(found))


def _key(case: Case) -> tuple[int, int, bool]:
    """Scale factor, itemsize, and whether channels are innermost."""
    return case.scale, getattr(torch, case.dtype).itemsize, case.layout == "channels_last"


class Pass(NamedTuple):
    """The table of `_launch` that a pass is tuned by, variants of it, and how one is told."""

    table: str
    variants: Callable[[str, Case], list[Variant]]
    told: str


PASSES = {
    FORWARD: Pass("FORWARD_TILES", forward_variants, "{} x {}, pieces of {}, {} warps"),
    FEATURES: Pass(
        "GATHER_TILES", feature_variants, "strips of {}, pieces of {} x {}, {} channels, {} warps, {} registers"
    ),
    KERNELS: Pass(
        "KERNEL_TILES", kernel_variants, "{} x {}, pieces of {}, cells of {}, {} channels, {} warps, {} registers"
    ),
}


@contextmanager
def chosen(table: str, variant: Variant, case: Case) -> Iterator[None]:
    """Launch this variant for the case."""
    before = getattr(_launch, table)
    scale, itemsize, channels_last = _key(case)
    setattr(_launch, table, {**before, (itemsize, channels_last, scale): variant})
    try:
        _forget()
        yield
    finally:
        setattr(_launch, table, before)
        _forget()


def _forget() -> None:
    for tile in (_launch.forward_tile, _launch.gather_tile, _launch.kernel_tile):
        tile.cache_clear()
    _launch.forget_launches()


# ---------------------------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------------------------


def tune(direction: str, op: str, case: Case) -> Iterator[dict[str, Any]]:
    """What each variant takes, or why it cannot run."""
    table, variants, _ = PASSES[direction]
    tensors = {name: tensor.detach() for name, tensor in cases.inputs(op, case, measure.DEVICE).items()}
    gradient = cases.upstream(op, case, measure.DEVICE)
    ours, definition = (OPERATORS[op][impl] for impl in ("triton", "eager"))
    image, wide = (  # held against float64, as images do not depend on each other
        [tensor[:1].to(dtype) for tensor in (*tensors.values(), gradient)] for dtype in (gradient.dtype, torch.float64)
    )
    eager, truth = (
        _ready(direction, definition, dict(zip(tensors, each, strict=False)), each[-1], case)()
        for each in (image, wide)
    )
    largest = [true.abs().max().item() for true in truth]
    limits = [accuracy.limit(op, case, error, foreign=False) for error in _errors(eager, truth, largest)]
    call = _ready(direction, ours, tensors, gradient, case)
    ideal = ideal_bytes(direction, op, tensors, gradient)
    flush, copy = clock.Flush(), torch.empty(ideal // 2, dtype=torch.int8, device=measure.DEVICE).random_()
    copied = ideal / _seconds(copy.clone, flush)
    for variant in variants(op, case):
        row: dict[str, Any] = {"pass": direction, "op": op, "case": str(case), "variant": variant}
        with chosen(table, variant, case):
            try:
                errors = _errors([result[:1] for result in call()], truth, largest)
                for error, limit in zip(errors, limits, strict=True):
                    if not error <= limit:
                        raise ValueError(f"wrong by {error:.1e}, over {limit:.1e}")
                seconds = _seconds(call, flush)
                row |= {"error": max(errors), "seconds": seconds, "roofline": ideal / seconds / copied}
            except Exception as error:
                row["cannot"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        yield row


def ideal_bytes(direction: str, op: str, tensors: dict[str, Tensor], gradient: Tensor) -> int:
    """Of the output or its gradient, the features or theirs, and the kernels, each once; gradients of kernels besides,
    but for masks, which theirs do not depend on."""
    features, *kernels = (tensor.nbytes for tensor in tensors.values())
    written_besides = sum(kernels) if direction == KERNELS and op != CARAFE else 0
    return gradient.nbytes + features + sum(kernels) + written_besides


def _ready(
    direction: str, function: Callable[..., Tensor], tensors: dict[str, Tensor], gradient: Tensor, case: Case
) -> Callable[[], tuple[Tensor, ...]]:
    """The pass, to be run again and again: the output, or the gradients that are wanted and no others."""
    features, *kernels = tensors
    wanted = {FORWARD: [], FEATURES: [features], KERNELS: kernels}[direction]

    def of_wanted(*leaves: Tensor) -> Tensor:
        all_tensors = {**tensors, **dict(zip(wanted, leaves, strict=True))}
        return function(*all_tensors.values(), scale_factor=case.scale, kernel_size=case.kernel)

    leaves = [tensors[name].detach().requires_grad_() for name in wanted]
    return accuracy.ready(of_wanted, BACKWARD if wanted else FORWARD, leaves, gradient)


def _errors(results: Iterable[Tensor], truth: Iterable[Tensor], largest: list[float]) -> list[float]:
    """Largest errors, in units of the largest true values."""
    return [
        (result - true).abs().max().item() / peak for result, true, peak in zip(results, truth, largest, strict=True)
    ]


def _seconds(call: Callable[[], object], flush: clock.Flush) -> float:
    flush.cover(clock.host_seconds(call))
    return clock.device_seconds(call, flush, ROUNDS)


def _told(row: dict[str, Any]) -> str:
    variant = PASSES[row["pass"]].told.format(*row["variant"])
    figures = row.get("cannot") or f"{row['seconds'] * 1e6:9.1f} us  {row['roofline']:.3f} of a copy"
    return f"  {variant:76} {figures}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pass", dest="direction", default=FORWARD, choices=PASSES)
    parser.add_argument("--op", default=DLU, choices=(DLU, CARAFE, LOGITS))
    parser.add_argument("--batch", type=positive_integer, default=8)
    parser.add_argument("--channels", type=positive_integer, default=256)
    parser.add_argument(
        "--size", type=positive_integer, nargs=2, default=(208, 336), help="height and width of the output"
    )
    parser.add_argument("--scale", type=int, nargs="+", default=[2], choices=range(1, _checks.MAX_SCALE_FACTOR + 1))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=(*DTYPES, "float64"))
    parser.add_argument("--layout", nargs="+", default=list(MEMORY_FORMATS), choices=list(MEMORY_FORMATS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no variant after these")
    parser.add_argument("--json", type=Path, help="a file for all results, written after each")
    options = parser.parse_args()
    if min(options.size) < max(options.scale):
        parser.error(f"--size must be at least --scale, {max(options.scale)}, got {min(options.size)}")
    if measure.DEVICE != "cuda":
        parser.error("needs a GPU: the speed of a CPU or of the interpreter says nothing about tiles")
    if options.json:
        try:
            options.json.open("a").close()
        except OSError as error:
            parser.error(f"--json must be a file that can be written, got {options.json}: {error.strerror}")
    results, end = [], time.monotonic() + options.seconds
    for scale, dtype, layout in itertools.product(options.scale, options.dtype, options.layout):
        height, width = (side // scale for side in options.size)
        case = Case(options.batch, options.channels, height, width, scale=scale, dtype=dtype, layout=layout)
        print(f"{options.direction} {options.op} {case}", flush=True)
        found = []
        for row in tune(options.direction, options.op, case):
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
