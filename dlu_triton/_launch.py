"""What a launch needs to know: tile sizes, number types, memory layouts and views. No kernels, no argument rules."""

import contextlib
import math
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks

# Fixed when Triton is first imported, as it decides what `triton.jit` returns.
INTERPRETED: bool = not isinstance(tl.cdiv, triton.JITFunction)
if triton.knobs.runtime.interpret != INTERPRETED:
    raise RuntimeError(
        f"TRITON_INTERPRET must be what it was when Triton was imported, {int(INTERPRETED)}, "
        f"got {int(triton.knobs.runtime.interpret)}; set it before the first import of either"
    )
if INTERPRETED:
    # The first launch imports this, which looks at the variable once more.
    with contextlib.suppress(ImportError):
        import triton.experimental.gluon

# Programs up to which the channels of a tile are shared out between several: about a wave of the largest GPUs, no more,
# since each makes the kernels of the tile again. Not measured.
ENOUGH_PROGRAMS = 1024

# Programs of the feature gradient that run at a time: one on each SM of the largest GPUs, for its registers.
PROGRAMS_AT_A_TIME = 132

# Beyond, kernels compute with 64 bits; a tile may reach a little past an image, in offsets that are masked.
MOST_32_BIT_OFFSETS = 2**31 - 2**24

_TRITON = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def runs_kernels(tensor: object) -> bool:
    """Whether a call on this tensor runs the Triton kernels; CPU tensors take the eager path unless interpreted."""
    return INTERPRETED or (isinstance(tensor, Tensor) and tensor.device.type != "cpu")


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up; Triton's own takes microseconds on the host."""
    return -(-a // b)


def power_of_2(number: int) -> int:
    """The power of two at or above a number."""
    return 1 << (number - 1).bit_length()


# ---------------------------------------------------------------------------------------------------------------
# Launching again
# ---------------------------------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """A kernel with the arguments and constants to launch it on."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class _Repeat(NamedTuple):
    """A launch of a compiled kernel, and where its tensors belong among its arguments."""

    run: Callable[..., None]
    arguments: tuple[Any, ...]
    slots: tuple[int, ...]


_repeats: dict[tuple[Any, ...], _Repeat] = {}
MOST_REPEATS = 4096

# Triton's interpreter puts its own functions into `triton.language` while a kernel runs, and holds the number of the
# program, for all threads.
_interpreting = threading.RLock()
if INTERPRETED:  # a forked process must not find it taken by a thread that it does not have
    os.register_at_fork(
        before=_interpreting.acquire, after_in_parent=_interpreting.release, after_in_child=_interpreting.release
    )


def launching(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """What a launch on this tensor runs inside: its device, or in the interpreter nobody else's launch."""
    return _interpreting if INTERPRETED else torch.cuda.device_of(tensor)


def launch(prepare: Callable[..., Launch], tensors: tuple[Tensor, ...], *settings: object) -> None:
    """Run the launch that `prepare(tensors, *settings)` returns.

    Its arguments are kept, but for the tensors: working them out, and finding the kernel compiled for them, takes the
    host several times as long as launching it. They may therefore depend on the settings, and on shapes, strides,
    dtypes and devices of the tensors, and on nothing else; they hold every tensor once, in the same order.
    """
    with launching(tensors[0]):
        if INTERPRETED:
            kernel, programs, arguments, constants = prepare(tensors, *settings)
            _checks.launch(programs, *tensors)
            kernel[(programs,)](*arguments, **constants)
            return
        described = [(t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors]
        key = (prepare, tensors[0].device, *settings, *described)
        repeat = _repeats.get(key)
        if repeat is not None:
            arguments = list(repeat.arguments)
            for slot, tensor in zip(repeat.slots, tensors, strict=True):
                arguments[slot] = tensor
            repeat.run(*arguments)
            return
        kernel, programs, arguments, constants = prepare(tensors, *settings)
        _checks.launch(programs, *tensors)
        compiled = kernel[(programs,)](*arguments, **constants)
        arguments = (*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :]))
        slots = tuple(slot for slot, argument in enumerate(arguments) if isinstance(argument, Tensor))
        kept = tuple(None if isinstance(argument, Tensor) else argument for argument in arguments)
        if len(_repeats) >= MOST_REPEATS:
            _repeats.clear()
        _repeats[key] = _Repeat(compiled[programs, 1, 1], kept, slots)


def forget_launches() -> None:
    """For tests and benchmarks that change what arguments follow from."""
    _repeats.clear()


# ---------------------------------------------------------------------------------------------------------------
# Number types
# ---------------------------------------------------------------------------------------------------------------


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of sums, of coordinates, and of normalised kernels in backward passes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def space_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which a forward pass stores the normalised kernels; float16 resolves [0, 1] finer than bfloat16."""
    return torch.float16 if dtype in (torch.float16, torch.bfloat16) else dtype


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return _TRITON[dtype]


def autocast(tensor: Tensor) -> Tensor:
    """In the type of the autocast region, if the call is in one: what a convolution does with its input."""
    device = tensor.device.type
    if (
        device == "meta" or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64
    ):  # meta has no regions
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def accumulator(dtype: torch.dtype) -> dict[str, Any]:
    return {"ACC": triton_dtype(sum_dtype(dtype))}


def sum_precision(dtype: torch.dtype) -> str:
    """How products are computed that only add up numbers of type `sum_dtype(dtype)`, whatever the user's settings."""
    return "ieee" if torch.version.hip is not None or dtype == torch.float64 else "tf32x3"


def product_types(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Types of a matrix product on features of this dtype.

    The interpreter multiplies half-precision operands as float32 after rounding, which is exact; compiled kernels
    hand them to the tensor cores. Float32 runs as three TF32 products, or one where the user allows TF32.
    """
    operand = tl.float32 if INTERPRETED and dtype != torch.float64 else triton_dtype(dtype)
    return {**accumulator(dtype), "OPERAND": operand, "PRECISION": precision}


def precision(dtype: torch.dtype) -> str:
    """How products on features of this dtype are to be computed, as the user's settings have it at present."""
    if torch.version.hip is not None or dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


# ---------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A block of output pixels, the window of source pixels that it can reach, and how many of these at a time."""

    BLOCK_H: int
    BLOCK_W: int
    WINDOW_H: int
    WINDOW_W: int
    BLOCK_Q: int


def padded_taps(kernel_size: int) -> int:
    """Taps as kernels hold them. Triton 3.7 fails to compile gathers from fewer than 16."""
    return max(16, power_of_2(kernel_size * kernel_size))


def _reach(block: int, scale_factor: int, kernel_size: int) -> int:
    """Source pixels, along one axis, under any aligned run of `block` output pixels and their kernels."""
    misaligned = scale_factor - math.gcd(block, scale_factor)
    return (block - 1 + misaligned) // scale_factor + kernel_size


def _even_reach(block: int, scale_factor: int, kernel_size: int) -> int:
    """The same from the even pixel at or before the first to the odd one at or after the last."""
    starts_alike = block % (2 * scale_factor) == 0
    before = kernel_size // 2 % 2 if starts_alike else 1
    return cdiv(_reach(block, scale_factor, kernel_size) + before, 2) * 2


def warps_for(kernel_size: int, outputs: int = 0) -> int:
    """Eight where the taps of a tile would not fit the registers of four."""
    return 4 if kernel_size <= 5 and outputs < 128 else 8


def operand_bytes(dtype: torch.dtype) -> float:
    """Most bytes of shared memory that operands of a program may take: three quarters of a program's, on the current
    GPU; the rest is for sums and changes of layout (not measured). Half of that for half precision before sm_80,
    where Triton computes products in float32."""
    if INTERPRETED:
        return math.inf
    driver = triton.runtime.driver.active
    most = driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"] * 3 // 4
    target = driver.get_current_target()
    widened = dtype.itemsize == 2 and target.backend == "cuda" and target.arch < 80
    return most // 2 if widened else most


def operand_size(itemsize: int) -> int:
    """Bytes of an element of an operand: float32 has two TF32 parts."""
    return 8 if itemsize == 4 else itemsize


def options(warps: int, registers: int | None = None) -> dict[str, int]:
    """Launch options."""
    return {"num_warps": warps, "num_stages": 1, **(most_registers(registers) if registers else {})}


def most_registers(number: int = 255) -> dict[str, int]:
    """Lets ptxas take so many registers: left to itself, it spills a few of some kernels for occupancy."""
    return {"maxnreg": number} if torch.version.hip is None else {}


# Outputs of a forward program, window pixels of a product, and warps, for kernels of 5 x 5: by itemsize, whether
# channels are innermost, and scale factor. Chosen by counts in machine code, see "The forward pass" in bench/NOTES.md;
# not measured on a GPU yet. NCHW takes wide tiles for the sake of whole sectors.
FORWARD_TILES = {
    (2, True, 2): (8, 8, 64, 4),
    (2, False, 2): (4, 32, 128, 4),
    (2, True, 4): (8, 16, 64, 4),
    (2, False, 4): (4, 32, 64, 4),
    (2, True, 8): (8, 16, 32, 4),
    (2, False, 8): (8, 16, 32, 4),
    (2, True, 16): (8, 16, 32, 4),
    (2, False, 16): (4, 32, 32, 4),
    **{(4, channels_last, 2): (8, 8, 32, 4) for channels_last in (True, False)},
    **{(4, channels_last, 4): (4, 16, 16, 4) for channels_last in (True, False)},
    **{(4, channels_last, scale): (4, 16, 32, 4) for channels_last in (True, False) for scale in (8, 16)},
}


@cache
def forward_tile(
    scale_factor: int, kernel_size: int, itemsize: int, channels_last: bool, most_bytes: float = math.inf
) -> tuple[Tile, int]:
    """Tile and warps of the forward pass, with bands of at most `most_bytes`.

    Windows start at even columns and are even in width, to load pairs.
    """
    entry = FORWARD_TILES.get((itemsize, channels_last, scale_factor))
    if entry is not None and kernel_size == 5:
        block_h, block_w, block_q, warps = entry
        tile = Tile(block_h, block_w, *window(block_h, block_w, scale_factor, kernel_size), block_q)
        if band_bytes(tile, itemsize) <= most_bytes:
            return tile, warps
    return output_tile(scale_factor, kernel_size, itemsize, most_bytes), warps_for(kernel_size)


def runs(scale_factor: int, itemsize: int, block_w: int) -> tuple[int, int]:
    """Outputs that are written at a time: 16 bytes, and what divides the width of every output of an even source."""
    long = min(16 // itemsize, block_w)
    return long, min(2 * (scale_factor & -scale_factor), long)


def window(block_h: int, block_w: int, scale_factor: int, kernel_size: int) -> tuple[int, int]:
    """Height and width of what a tile of outputs loads."""
    return _reach(block_h, scale_factor, kernel_size), _even_reach(block_w, scale_factor, kernel_size)


def _piece(pixels: int, itemsize: int) -> int:
    """Window pixels of a product: all of them if the band of so many fits the registers."""
    return max(16, min(128 if itemsize == 2 else 64, power_of_2(pixels)))


def band_bytes(tile: Tile, itemsize: int) -> int:
    """Shared memory of all bands of a tile: the compiler builds every band before the loop over channels."""
    pieces = cdiv(tile.WINDOW_H * tile.WINDOW_W, tile.BLOCK_Q)
    return pieces * tile.BLOCK_Q * tile.BLOCK_H * tile.BLOCK_W * operand_size(itemsize)


@cache
def output_tile(scale_factor: int, kernel_size: int, itemsize: int, most_bytes: float = math.inf) -> Tile:
    """The tile whose product wastes least: few window pixels, in one piece, shared by many outputs. Its bands take at
    most `most_bytes`, or as few as can be."""
    most = min(128 if itemsize == 2 else 64, _most_outputs(kernel_size, itemsize))
    tiles = []
    for block_h in (2, 4, 8, 16):
        for block_w in (4, 8, 16):
            if 16 <= block_h * block_w <= most:
                window_h, window_w = window(block_h, block_w, scale_factor, kernel_size)
                tiles.append(Tile(block_h, block_w, window_h, window_w, _piece(window_h * window_w, itemsize)))

    def cost(tile: Tile) -> float:
        pieces = cdiv(tile.WINDOW_H * tile.WINDOW_W, tile.BLOCK_Q)
        per_output = pieces * tile.BLOCK_Q * (1 + 128 / (tile.BLOCK_H * tile.BLOCK_W))  # products, and loads
        return per_output if pieces == 1 else 2 * per_output  # the band is built again for each channel block

    return min(tiles, key=lambda tile: (max(band_bytes(tile, itemsize), most_bytes), cost(tile), -tile.BLOCK_W))


def cells(dtype: torch.dtype) -> int:
    """Largest sides of the window of the kernel space in which gradients of a tile are summed before they are added:
    the tile and about two cells around it. None where that product spills: in float64, and where its operands do not
    come from shared memory, before sm_90."""
    if dtype == torch.float64:
        return 0
    target = None if INTERPRETED else triton.runtime.driver.active.get_current_target()
    return 0 if target is not None and target.backend == "cuda" and target.arch < 90 else 8


class KernelTile(NamedTuple):
    """A program of the gradient of the kernels: its tile, sides of the window of cells where there can be one, channels
    of a product, warps, and registers of a thread."""

    tile: Tile
    cells: int
    channels: int
    warps: int
    registers: int


# Outputs of such a program, window pixels of a product, and what follows the tile above, for kernels of 5 x 5: by
# itemsize, whether channels are innermost, and scale factor. As the rule of `kernel_tile` has them, but for float32 at
# scale 4, see bench/NOTES.md; not measured yet.
KERNEL_TILES = {
    **{(2, last, 2): (8, 8, 64, 8, 64, 4, 255) for last in (True, False)},
    **{(2, last, 4): (8, 16, 64, 8, 64, 8, 255) for last in (True, False)},
    **{(2, last, scale): (8, 16, 32, 8, 64, 8, 255) for last in (True, False) for scale in (8, 16)},
    **{(4, last, 2): (8, 8, 64, 8, 32, 4, 255) for last in (True, False)},
    **{(4, last, 4): (4, 16, 64, 8, 32, 4, 255) for last in (True, False)},
    **{(4, last, scale): (4, 16, 32, 8, 32, 4, 255) for last in (True, False) for scale in (8, 16)},
}


@cache
def kernel_tile(scale_factor: int, kernel_size: int, itemsize: int, channels_last: bool) -> KernelTile:
    entry = KERNEL_TILES.get((itemsize, channels_last, scale_factor)) if kernel_size == 5 else None
    if entry is None:
        tile = output_tile(scale_factor, kernel_size, itemsize)
        warps = warps_for(kernel_size, tile.BLOCK_H * tile.BLOCK_W)
        return KernelTile(tile, 8, PRODUCT_CHANNELS[itemsize], warps, 255)
    block_h, block_w, block_q, *others = entry
    return KernelTile(Tile(block_h, block_w, *window(block_h, block_w, scale_factor, kernel_size), block_q), *others)


class Strip(NamedTuple):
    """Source pixels that a program of the feature gradient finishes in each step, and the pieces in which it takes the
    outputs that reach them."""

    STEP_H: int
    STRIP_W: int
    BLOCK_H: int
    BLOCK_W: int
    PIECES_H: int
    PIECES_W: int

    def cost(self, channels_last: bool) -> float:
        """Of a column of source pixels: few pieces, with little beyond what reaches it, and in NCHW few rows, each of
        which is a cache line for every channel."""
        outputs, rows = self.BLOCK_H * self.BLOCK_W, 0 if channels_last else self.BLOCK_H
        return self.PIECES_H * self.PIECES_W * (outputs + 16 + 16 * rows) / self.STRIP_W


def strip(scale_factor: int, kernel_size: int, strip_w: int, block_h: int, block_w: int) -> Strip:
    """The strip of this width with pieces of these outputs, whose rows have to divide those of a step."""
    step_h = step_rows(kernel_size)
    pieces_h, pieces_w = scale_factor * step_h // block_h, cdiv(scale_factor * (strip_w + kernel_size - 1), block_w)
    return Strip(step_h, strip_w, block_h, block_w, pieces_h, pieces_w)


def step_rows(kernel_size: int) -> int:
    """Source rows of a step: all that a kernel reaches to either side of it."""
    return max(4, power_of_2(2 * (kernel_size // 2)))


class GatherTile(NamedTuple):
    """A program of the gradient of the features: its strip, channels where there are enough programs, warps for so
    many, and registers of a thread."""

    strip: Strip
    channels: int
    warps: int
    registers: int


# Width of the strip of such a program, outputs of a piece, channels, warps and registers, with keys as above. As the
# rule of `gather_tile` has them; not measured yet.
GATHER_TILES = {
    (2, True, 2): (8, 8, 8, 256, 8, 255),
    (2, False, 2): (8, 2, 32, 256, 8, 255),
    (4, True, 2): (8, 4, 8, 256, 8, 255),
    (4, False, 2): (8, 1, 32, 256, 8, 255),
    **{(2, last, 4): (8, 4, 16, 256, 8, 255) for last in (True, False)},
    **{(4, last, 4): (8, 2, 16, 256, 8, 255) for last in (True, False)},
    **{(2, last, scale): (8, 2, 32, 256, 8, 255) for last in (True, False) for scale in (8, 16)},
    **{(4, last, scale): (8, 1, 32, 256, 8, 255) for last in (True, False) for scale in (8, 16)},
}


@cache
def gather_tile(scale_factor: int, kernel_size: int, itemsize: int, channels_last: bool) -> GatherTile:
    entry = GATHER_TILES.get((itemsize, channels_last, scale_factor)) if kernel_size == 5 else None
    if entry is not None:
        strip_w, block_h, block_w, *others = entry
        return GatherTile(strip(scale_factor, kernel_size, strip_w, block_h, block_w), *others)
    step_h = step_rows(kernel_size)
    strip_w = max(4, (16 if itemsize == 8 else 32) // step_h)
    most = min(64 if itemsize == 2 else 32, _most_outputs(kernel_size, 2 if itemsize == 2 else 8))
    strips = [
        strip(scale_factor, kernel_size, strip_w, block_h, block_w)
        for block_h in (1, 2, 4, 8)
        for block_w in (4, 8, 16, 32)
        if 16 <= block_h * block_w <= most and scale_factor * step_h % block_h == 0
    ]
    best = min(strips, key=lambda each: (each.cost(channels_last), -each.BLOCK_W))
    channels = 16 if itemsize == 8 else 256
    return GatherTile(best, channels, _gather_warps(channels, itemsize, kernel_size), 255)


def _gather_warps(channels: int, itemsize: int, kernel_size: int) -> int:
    return 8 if channels * itemsize > 256 or kernel_size > 5 else 4


def gather_channels(
    tile: GatherTile,
    itemsize: int,
    channels_per_group: int,
    kernel_size: int,
    programs: int,
    run: int,
    most_bytes: float = math.inf,
) -> tuple[int, int]:
    """Channels and warps of a program of the feature gradient: all of a group where that leaves enough programs, as
    each program makes the kernels again. `run` elements are side by side wherever it reads and writes; those of the
    output's gradient take at most `most_bytes` of shared memory."""
    block = channel_block(tile.channels, channels_per_group)
    short = itemsize == 2 and run < 4
    if short:  # as many addresses: 256 channels, or 128 in four warps, spill
        block = min(block, 128)
    outputs = tile.strip.BLOCK_H * tile.strip.BLOCK_W
    while block > 64 and (
        programs * cdiv(channels_per_group, block) < ENOUGH_PROGRAMS // 4
        or block * outputs * operand_size(itemsize) > most_bytes
    ):
        block //= 2
    if short and block == 128:
        return block, 8
    return block, tile.warps if block == tile.channels else _gather_warps(block, itemsize, kernel_size)


@cache
def strip_steps(columns: int, steps: int) -> int:
    """Steps of a strip, of which there are `columns` side by side: each begins with one step more, so few, unless too
    few programs would run at a time."""

    def time(strips: int) -> int:
        return cdiv(columns * strips, PROGRAMS_AT_A_TIME) * (cdiv(steps, strips) + 1)

    few = range(1, math.isqrt(steps) + 2)
    strips = {*few, *(cdiv(steps, length) for length in few)}  # the fewest of each length
    return cdiv(steps, min(sorted(strips), key=time))


def _most_outputs(kernel_size: int, itemsize: int) -> int:
    """Outputs whose taps stay in registers."""
    return (2048 if itemsize == 8 else 4096) // padded_taps(kernel_size)


def pixels_per_program(kernel_size: int) -> int:
    """Pixels of a softmax program."""
    return max(4, 2048 // padded_taps(kernel_size))


# Channels of a product, by itemsize.
PRODUCT_CHANNELS = {2: 64, 4: 32, 8: 16}


def forward_channels(dtype: torch.dtype, channels_per_group: int, kernel_size: int) -> int:
    """Channels of a product of the forward pass: its rows, of which the tensor cores of sm_90 want 64."""
    wide = dtype == torch.float32 and kernel_size <= 5  # beyond, the taps leave too few registers
    return channel_block(64 if wide else PRODUCT_CHANNELS[dtype.itemsize], channels_per_group)


def channel_block(widest: int, channels_per_group: int) -> int:
    return max(16, min(widest, power_of_2(channels_per_group)))


def shares(programs: int, items: int, block: int, most: int | None = None) -> tuple[int, int]:
    """How many programs, at most `most`, share the work of each of `programs`, and how many `items` each takes."""
    blocks = cdiv(items, block)
    wanted = min(blocks, max(ENOUGH_PROGRAMS // max(programs, 1), 1), most or blocks)
    per_program = cdiv(blocks, wanted) * block
    return cdiv(items, per_program), per_program


class PlaneTile(NamedTuple):
    """Channels and pixels that a program of a class activation map holds, and whether the pixels are whole planes."""

    channels: int
    pixels: int
    whole: bool

    def options(self) -> dict[str, int]:
        """Blocks and launch options: at most 16 elements of a tile in each thread, which compiles without spills."""
        warps = max(1, min(8, self.channels * self.pixels // 256))
        return {"BLOCK_C": self.channels, "BLOCK_P": self.pixels, "num_warps": warps, **most_registers()}


# Pixels of all partial maps of one map, which every program that finishes it may have to read. Not measured.
MOST_PARTIAL_PIXELS = 2**16

# Up to so many pixels of a map, each program that finishes it adds up the partial maps for itself. Beyond, one more
# launch adds them first: for 32 maps of 56 x 56, 31 + 3 microseconds instead of 45 by counts, see bench/NOTES.md.
MOST_PIXELS_ADDED_AGAIN = 1024

# Slices, raw pixels and output pixels that a finishing program takes at a time.
FINISHING_BLOCKS = {"BLOCK_S": 16, "BLOCK_P": 256, "BLOCK_O": 512}


def plane_tile(activations: Tensor, gradients: Tensor | None) -> PlaneTile:
    """Whole planes where they fit, of as many channels as fit; where channels are innermost, at least a sector wide."""
    _, c, h, w = activations.shape
    itemsize = activations.dtype.itemsize
    most = 2048 if itemsize == 8 else 4096  # two such tiles and their sum stay in registers
    innermost = [t for t in (activations, gradients) if t is not None and t.stride(-3) == 1 and h * w > 1]
    sector = min(32 // itemsize, power_of_2(c)) if innermost else 1
    block_p = max(16, power_of_2(h * w))
    whole = block_p * sector <= most
    if not whole:
        block_p = 128 if innermost else 1024
    block_c = min(most // block_p, power_of_2(c))
    return PlaneTile(block_c, block_p, whole)


def map_slices(programs: int, channels: int, tile: PlaneTile, pixels: int) -> tuple[int, int]:
    """Slices of the channels, and channels of each; the partial maps stay small."""
    return shares(programs, channels, tile.channels, max(1, MOST_PARTIAL_PIXELS // pixels))


def finishing_tiles(maps: int, outputs: int, slices: int, channels: int) -> tuple[int, int]:
    """Programs that finish a map, and outputs of each. All of them add up the partial maps of all slices, which must
    not come to more than half of what was read for them. Not measured."""
    most = None if slices == 1 else max(1, channels // slices)
    return shares(maps, outputs, FINISHING_BLOCKS["BLOCK_O"], most)


# ---------------------------------------------------------------------------------------------------------------
# Layouts and views
# ---------------------------------------------------------------------------------------------------------------


def new_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised map in the layout of `like`: channels innermost if they are there, else NCHW."""
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_innermost(like) else torch.contiguous_format,
    )


def channels_innermost(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 and tensor.stride(3) != 1


def new_space(kernel_space: Tensor, groups: int, kernel_size: int, dtype: torch.dtype) -> Tensor:
    """Storage for normalised kernels: (N, G, H, W, taps), the taps padded."""
    n, _, h, w = kernel_space.shape
    return torch.empty((n, groups, h, w, padded_taps(kernel_size)), dtype=dtype, device=kernel_space.device)


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, inside: Tensor | None) -> Tensor:
    """Uninitialised memory: that of `inside`, which is yet to be written, if it is enough."""
    if inside is not None and inside.untyped_storage().nbytes() >= math.prod(shape) * dtype.itemsize:
        return torch.empty(0, dtype=dtype, device=device).set_(inside.untyped_storage(), 0, shape)
    return torch.empty(shape, dtype=dtype, device=device)


def index_dtype(*tensors: Tensor | None, furthest: int = 0) -> tl.dtype:
    """Type of offsets inside an image: 32 bits unless there may be as many elements, gaps included, or an offset that a
    kernel takes from elsewhere is as large."""
    if furthest >= MOST_32_BIT_OFFSETS:
        return tl.int64
    for tensor in tensors:
        if tensor is not None and tensor.untyped_storage().nbytes() >= MOST_32_BIT_OFFSETS * tensor.element_size():
            sizes, strides = tensor.shape[1:], tensor.stride()[1:]
            if sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) >= MOST_32_BIT_OFFSETS:
                return tl.int64
    return tl.int32


class FeatureLayout(NamedTuple):
    """What kernels are compiled for and strides as they take them, see `reassemble_forward`.

    `even` where rows, of pixels one beside the other, can be read in pairs of columns.
    """

    INNER: str
    UNIT: int
    strides: tuple[int, ...]
    even: bool


def feature_layout(features: Tensor) -> FeatureLayout:
    n, c, h, w = features.stride()
    if channels_innermost(features):
        unit = math.gcd(n, h, w, 16 // features.element_size())
        return FeatureLayout("c", unit, (n // unit, c, h // unit, w // unit), False)
    if w == 1:
        return FeatureLayout("w", 1, (n, c, h, w), math.gcd(n, c, h, features.shape[3]) % 2 == 0)
    return FeatureLayout("", 1, (n, c, h, w), False)


class MapLayout(NamedTuple):
    """The axis of a map (N, C, y, x) whose stride is one ("c" or "w", "" if none is), what divides the other strides
    and the runs along it, at most 16 bytes, and these strides in such units."""

    INNER: str
    UNIT: int
    strides: tuple[int, ...]


def map_layout(tensor: Tensor, start: int) -> MapLayout:
    """`start` divides the columns that blocks begin at: longer runs along "w" would not be read as such."""
    n, c, h, w = tensor.stride()
    most = 16 // tensor.element_size()
    if channels_innermost(tensor):
        unit = math.gcd(n, h, w, most)
        return MapLayout("c", unit, (n // unit, c, h // unit, w // unit))
    if w == 1:
        unit = math.gcd(n, c, h, tensor.shape[3], most, start)
        return MapLayout("w", unit, (n // unit, c // unit, h // unit, w))
    return MapLayout("", 1, (n, c, h, w))


def taps_inner(kernels: Tensor | None) -> str:
    """Which axis of masks or logits (N, taps, y, x) has stride one, if it is taps or x."""
    if kernels is None:
        return ""
    return "w" if kernels.stride(3) == 1 else "t" if kernels.stride(1) == 1 else ""


def pointer_and_group_strides(kernels: Tensor | None, groups: int) -> tuple[Any, ...]:
    """Masks, logits or their gradient (N, G*taps, y, x) as kernels take them: pointer, strides of (n, g, t, y, x)."""
    if kernels is None:
        return (None, 0, 0, 0, 0, 0)
    n, c, h, w = kernels.stride()
    return (kernels, n, kernels.shape[1] // groups * c, c, h, w)


def logits_plane(logits: Tensor, groups: int) -> tuple[Any, ...]:
    """The same, without a row stride where rows follow each other."""
    pointer, n, g, t, h, w = pointer_and_group_strides(logits, groups)
    return (pointer, n, g, t, None if h == logits.shape[3] * w else h, w)


def plane(tensor: Tensor | None) -> tuple[Any, ...]:
    """(N, [K,] C, h, w) as kernels take it: pointer, strides, width. No row stride where rows follow each other."""
    if tensor is None:
        return (None, 0, 0, 0, None, 0, 1)  # one more outer stride: only gradients are ever absent
    *outer, row, column = tensor.stride()
    h, w = tensor.shape[-2:]
    if h == 1:
        row = None
    elif w == 1:
        row, column = None, row
    elif row == w * column:
        row = None
    return (tensor, *outer, row, column, w)


def plane_load(tensor: Tensor | None, tile: PlaneTile) -> str:
    """How whole planes are read, see `_load_planes` in the kernels; float32 gains nothing from "rows"."""
    if tensor is None or not tile.whole or tile.channels < 2:
        return "plain"
    *_, channel, row, column = tensor.stride()
    h, w = tensor.shape[-2:]
    if channel == h * w and (w == 1 or column == 1) and (h == 1 or row == w):
        return "run"
    return "rows" if channel == 1 and tensor.dtype.itemsize == 2 else "plain"


def pointer_and_strides(tensor: Tensor | None, dims: int) -> tuple[Any, ...]:
    """A tensor as kernels take it; an absent one is None with zero strides."""
    return (None, *[0] * dims) if tensor is None else (tensor, *tensor.stride())
