"""Launches of the reassembly kernels, which CARAFE and DLU share.

`kernels` is a view (N, G, k*k, ., .): the masks at output resolution, or with `offsets` the normalised kernel space
at source resolution.
"""

import torch
import triton
from torch import Tensor

from .. import _launch
from . import _kernels


def forward(
    features: Tensor, kernels: Tensor, offsets: Tensor | None, kernel_size: int, groups: int, scale_factor: int
) -> Tensor:
    n, c, h, w = features.shape
    output = _launch.new_map(features, c, scale_factor * h, scale_factor * w)
    if n == 0:
        return output
    tile = _launch.output_tile(scale_factor, kernel_size, features.dtype.itemsize)
    tiles_h, tiles_w = _tiles(output, tile)
    block = _launch.channel_block(features.dtype, c // groups)
    slices, per_program = _launch.shares(n * tiles_h * tiles_w * groups, c // groups, block)
    with torch.cuda.device_of(features):
        _kernels.reassemble_forward[(n * tiles_h * tiles_w * groups * slices,)](
            *_launch.pointer_and_strides(features, 4),
            *_launch.pointer_and_strides(kernels, 5),
            *_launch.pointer_and_strides(offsets, 4),
            *_launch.pointer_and_strides(output, 4),
            h, w, tiles_h, tiles_w, groups, c // groups, slices, per_program,
            SCALE=scale_factor, KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size),
            **tile._asdict(), BLOCK_C=block,
            ROUND=_launch.triton_dtype(features.dtype), **_launch.product_types(features.dtype),
            **_launch.options(kernel_size, all_registers=features.dtype == torch.float64),
        )  # fmt: skip
    return output


def backward_features(
    grad_output: Tensor,
    features: Tensor,
    kernels: Tensor,
    offsets: Tensor | None,
    kernel_size: int,
    groups: int,
    scale_factor: int,
) -> Tensor:
    n, c, h, w = features.shape
    grad_features = torch.empty_like(features)
    if n == 0:
        return grad_features
    block_h, block_w = _launch.gather_tile(scale_factor, kernel_size, features.dtype.itemsize)
    tiles_h, tiles_w = triton.cdiv(h, _launch.SOURCE_TILE), triton.cdiv(w, _launch.SOURCE_TILE)
    block = _launch.channel_block(features.dtype, c // groups)
    slices = triton.cdiv(c // groups, block)
    with torch.cuda.device_of(features):
        _kernels.reassemble_backward_features[(n * tiles_h * tiles_w * groups * slices,)](
            *_launch.pointer_and_strides(grad_output, 4),
            *_launch.pointer_and_strides(kernels, 5),
            *_launch.pointer_and_strides(offsets, 4),
            *_launch.pointer_and_strides(grad_features, 4),
            h, w, tiles_h, tiles_w, groups, c // groups, slices,
            SCALE=scale_factor, KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size),
            BLOCK_H=block_h, BLOCK_W=block_w, TILE_H=_launch.SOURCE_TILE, TILE_W=_launch.SOURCE_TILE, BLOCK_C=block,
            ROUND=_launch.triton_dtype(features.dtype), **_launch.product_types(features.dtype),
            **_launch.options(kernel_size, all_registers=True),
        )  # fmt: skip
    return grad_features


def backward_kernels(
    grad_output: Tensor,
    features: Tensor,
    kernel_size: int,
    groups: int,
    scale_factor: int,
    *,
    grad_masks: Tensor | None = None,
    space: Tensor | None = None,
    offsets: Tensor | None = None,
    grad_space: Tensor | None = None,
    grad_offsets: Tensor | None = None,
) -> None:
    """Write `grad_masks`, or for DLU add to `grad_space` and write `grad_offsets`, whichever is given."""
    n, c, h, w = features.shape
    if n == 0:
        return
    tile = _launch.output_tile(scale_factor, kernel_size, features.dtype.itemsize)
    tiles_h, tiles_w = _tiles(grad_output, tile)
    with torch.cuda.device_of(features):
        _kernels.reassemble_backward_kernels[(n * tiles_h * tiles_w * groups,)](
            *_launch.pointer_and_strides(grad_output, 4),
            *_launch.pointer_and_strides(features, 4),
            *_launch.pointer_and_strides(grad_masks, 5),
            *_launch.pointer_and_strides(space, 5),
            *_launch.pointer_and_strides(offsets, 4),
            grad_space,
            *_launch.pointer_and_strides(grad_offsets, 4),
            h, w, tiles_h, tiles_w, groups, c // groups,
            SCALE=scale_factor, KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size),
            **tile._asdict(), BLOCK_C=_launch.channel_block(features.dtype, c // groups),
            **_launch.product_types(features.dtype),
            **_launch.options(kernel_size, all_registers=True),
        )  # fmt: skip


def _tiles(output: Tensor, tile: _launch.Tile) -> tuple[int, int]:
    return triton.cdiv(output.shape[2], tile.BLOCK_H), triton.cdiv(output.shape[3], tile.BLOCK_W)
