"""What a launch needs to know: tile sizes, number types, memory layouts and views. No kernels, no argument rules."""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fixed when Triton is first imported, as it decides what `triton.jit` returns.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Programs below which the channels of a tile are shared out between several: a few waves of the largest GPUs.
ENOUGH_PROGRAMS = 1024

# Source pixels, per axis, that one program of the feature gradient owns.
SOURCE_TILE = 8

_TRITON = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def runs_kernels(tensor: object) -> bool:
    """Whether a call on this tensor runs the Triton kernels; CPU tensors take the eager path unless interpreted."""
    return INTERPRETED or (isinstance(tensor, Tensor) and tensor.device.type != "cpu")


# ---------------------------------------------------------------------------------------------------------------
# Number types
# ---------------------------------------------------------------------------------------------------------------


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and coordinates."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def space_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which the normalised kernel space is stored; float16 resolves [0, 1] finer than bfloat16."""
    return torch.float16 if dtype in (torch.float16, torch.bfloat16) else dtype


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return _TRITON[dtype]


def accumulator(dtype: torch.dtype) -> dict[str, Any]:
    return {"ACC": triton_dtype(sum_dtype(dtype))}


def product_types(dtype: torch.dtype) -> dict[str, Any]:
    """Types of a matrix product on features of this dtype.

    The interpreter multiplies half-precision operands as float32 after rounding, which is exact; compiled kernels
    hand them to the tensor cores. Float32 runs as three TF32 products, or one where the user allows TF32.
    """
    operand = tl.float32 if INTERPRETED and dtype != torch.float64 else triton_dtype(dtype)
    if torch.version.hip is not None:
        precision = "ieee"
    elif torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    else:
        precision = "tf32x3"
    return {**accumulator(dtype), "OPERAND": operand, "PRECISION": precision}


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
    return max(16, triton.next_power_of_2(kernel_size * kernel_size))


def _reach(block: int, scale_factor: int, kernel_size: int) -> int:
    """Source pixels, along one axis, under any aligned run of `block` output pixels and their kernels."""
    misaligned = scale_factor - math.gcd(block, scale_factor)
    return (block - 1 + misaligned) // scale_factor + kernel_size


def options(kernel_size: int, *, all_registers: bool = False) -> dict[str, int]:
    """Launch options. Eight warps where the taps of a tile would not fit the registers of four."""
    return {"num_warps": 4 if kernel_size <= 5 else 8, "num_stages": 1, **(most_registers() if all_registers else {})}


def most_registers() -> dict[str, int]:
    """Lets ptxas take all registers: left to itself, it spills a few of some kernels for occupancy."""
    return {"maxnreg": 255} if torch.version.hip is None else {}


@cache
def output_tile(scale_factor: int, kernel_size: int, itemsize: int) -> Tile:
    """The tile whose product wastes least: few window pixels, in one piece, shared by many outputs."""
    most = min(128 if itemsize == 2 else 64, _most_outputs(kernel_size, itemsize))
    widest = 128 if itemsize == 2 else 64
    tiles = []
    for block_h in (2, 4, 8, 16):
        for block_w in (4, 8, 16):
            if 16 <= block_h * block_w <= most:
                window_h, window_w = (_reach(block, scale_factor, kernel_size) for block in (block_h, block_w))
                block_q = max(16, min(widest, triton.next_power_of_2(window_h * window_w)))
                tiles.append(Tile(block_h, block_w, window_h, window_w, block_q))

    def cost(tile: Tile) -> float:
        pieces = triton.cdiv(tile.WINDOW_H * tile.WINDOW_W, tile.BLOCK_Q)
        per_output = pieces * tile.BLOCK_Q * (1 + 128 / (tile.BLOCK_H * tile.BLOCK_W))  # products, and loads
        return per_output if pieces == 1 else 2 * per_output  # the band is built again for each channel block

    return min(tiles, key=lambda tile: (cost(tile), -tile.BLOCK_W))


@cache
def gather_tile(scale_factor: int, kernel_size: int, itemsize: int) -> tuple[int, int]:
    """Outputs that the feature gradient of a SOURCE_TILE takes at a time: few turns, little beyond its reach."""
    span = scale_factor * (SOURCE_TILE + kernel_size - 1)
    tiles = [(4, 4), (2, 8), (4, 8), (2, 16)]

    def cost(tile: tuple[int, int]) -> float:
        covered = math.prod(triton.cdiv(span, block) * block for block in tile)
        return covered * (1 + 8 / math.prod(tile))

    return min((tile for tile in tiles if math.prod(tile) <= _most_outputs(kernel_size, itemsize)), key=cost)


def _most_outputs(kernel_size: int, itemsize: int) -> int:
    """Outputs whose taps stay in registers."""
    return (2048 if itemsize == 8 else 4096) // padded_taps(kernel_size)


def pixels_per_program(kernel_size: int) -> int:
    """Pixels of a softmax program."""
    return max(4, 2048 // padded_taps(kernel_size))


def channel_block(dtype: torch.dtype, channels_per_group: int) -> int:
    widest = {2: 64, 4: 32, 8: 16}[dtype.itemsize]
    return max(16, min(widest, triton.next_power_of_2(channels_per_group)))


def shares(programs: int, items: int, block: int, most: int | None = None) -> tuple[int, int]:
    """How many programs, at most `most`, share the work of each of `programs`, and how many `items` each takes."""
    blocks = triton.cdiv(items, block)
    wanted = min(blocks, triton.cdiv(ENOUGH_PROGRAMS, max(programs, 1)), most or blocks)
    per_program = triton.cdiv(blocks, wanted) * block
    return triton.cdiv(items, per_program), per_program


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

# Slices, raw pixels and output pixels that a finishing program takes at a time.
FINISHING_BLOCKS = {"BLOCK_S": 16, "BLOCK_P": 256, "BLOCK_O": 512}


def plane_tile(activations: Tensor, gradients: Tensor | None) -> PlaneTile:
    """Whole planes where they fit, of as many channels as fit; where channels are innermost, at least a sector wide."""
    _, c, h, w = activations.shape
    itemsize = activations.dtype.itemsize
    most = 2048 if itemsize == 8 else 4096  # two such tiles and their sum stay in registers
    innermost = [t for t in (activations, gradients) if t is not None and t.stride(-3) == 1 and h * w > 1]
    sector = min(32 // itemsize, triton.next_power_of_2(c)) if innermost else 1
    block_p = max(16, triton.next_power_of_2(h * w))
    whole = block_p * sector <= most
    if not whole:
        block_p = 128 if innermost else 1024
    block_c = min(most // block_p, triton.next_power_of_2(c))
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
    channels_last = like.stride(1) == 1 and like.stride(3) != 1
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def new_space(kernel_space: Tensor, groups: int, kernel_size: int, dtype: torch.dtype, *, zero: bool = False) -> Tensor:
    """Storage for normalised kernels or their gradient, as a view (N, G, taps, H, W) with padded taps innermost."""
    n, _, h, w = kernel_space.shape
    shape = (n, groups, h, w, padded_taps(kernel_size))
    make = torch.zeros if zero else torch.empty
    return make(shape, dtype=dtype, device=kernel_space.device).permute(0, 1, 4, 2, 3)


def by_group(kernels: Tensor, groups: int) -> Tensor:
    """(N, G*k*k, H, W) -> a view (N, G, k*k, H, W)."""
    return kernels.unflatten(1, (groups, -1))


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
