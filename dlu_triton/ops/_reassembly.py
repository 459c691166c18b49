"""Launches of the reassembly kernels, which CARAFE and DLU share.

`kernels` are the masks (N, G*k*k, s*H, s*W), with `logits` what CARAFE's encoder puts out, (N, G*k*k*s*s, H, W), or
with `offsets` the normalised kernel space (N, G, H, W, taps).
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _launch
from . import _kernels


def forward(
    features: Tensor,
    kernels: Tensor,
    offsets: Tensor | None,
    kernel_size: int,
    groups: int,
    scale_factor: int,
    *,
    logits: bool = False,
) -> Tensor:
    n, c, h, w = features.shape
    output = _launch.new_map(features, c, scale_factor * h, scale_factor * w)
    if n > 0:
        tensors = (features, kernels, output) if offsets is None else (features, kernels, offsets, output)
        precision = _launch.precision(features.dtype)
        _launch.launch(_forward_launch, tensors, kernel_size, groups, scale_factor, logits, precision)
    return output


def _forward_launch(
    tensors: tuple[Tensor, ...], kernel_size: int, groups: int, scale_factor: int, logits: bool, precision: str
) -> _launch.Launch:
    features, kernels, *offsets, output = tensors
    offsets = offsets[0] if offsets else None
    n, c, h, w = features.shape
    channels_last = _launch.channels_innermost(features)
    tile, warps = _launch.forward_tile(scale_factor, kernel_size, features.dtype.itemsize, channels_last)
    tiles_h, tiles_w = _tiles(output, tile)
    block = _launch.forward_channels(features.dtype, c // groups, kernel_size)
    slices, per_program = _launch.shares(n * tiles_h * tiles_w * groups, c // groups, block)
    layout = _launch.feature_layout(features)
    long_run, short_run = _launch.runs(scale_factor, features.dtype.itemsize, tile.BLOCK_W)
    aligned = 0 if not layout.even else 1 if output.shape[3] % long_run else 2
    arguments = (
        features, *layout.strides,
        *_taps(kernels, offsets, groups),
        *_launch.pointer_and_strides(offsets, 4),
        output,
        h, w, tiles_h, tiles_w, groups, c // groups, slices, per_program // block, aligned,
    )  # fmt: skip
    constants = dict(
        INNER=layout.INNER, UNIT=layout.UNIT, RUN=math.gcd(c // groups, block), CHANNELS_LAST=channels_last,
        TAPS_INNER="" if offsets is not None else _launch.taps_inner(kernels), LOGITS=logits,
        SCALE=scale_factor, KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size),
        **tile._asdict(), BLOCK_C=block, LONG_RUN=long_run, SHORT_RUN=short_run, INDEX=_launch.index_dtype(*tensors),
        ROUND=_launch.triton_dtype(features.dtype), **_launch.product_types(features.dtype, precision),
        **_launch.options(kernel_size, all_registers=features.dtype == torch.float64) | {"num_warps": warps},
    )  # fmt: skip
    return _launch.Launch(_kernels.reassemble_forward, n * tiles_h * tiles_w * groups * slices, arguments, constants)


def backward_features(
    grad_output: Tensor,
    features: Tensor,
    kernels: Tensor,
    offsets: Tensor | None,
    kernel_size: int,
    groups: int,
    scale_factor: int,
    *,
    logits: bool = False,
) -> Tensor:
    n, c, h, w = features.shape
    grad_features = torch.empty_like(features)
    if n == 0:
        return grad_features
    block_h, block_w = _launch.gather_tile(scale_factor, kernel_size, features.dtype.itemsize)
    tiles_h, tiles_w = _launch.cdiv(h, _launch.SOURCE_TILE), _launch.cdiv(w, _launch.SOURCE_TILE)
    block = _launch.channel_block(features.dtype, c // groups)
    slices = _launch.cdiv(c // groups, block)
    with torch.cuda.device_of(features):
        _kernels.reassemble_backward_features[(n * tiles_h * tiles_w * groups * slices,)](
            *_launch.pointer_and_strides(grad_output, 4),
            *_taps(kernels, offsets, groups),
            *_launch.pointer_and_strides(offsets, 4),
            *_launch.pointer_and_strides(grad_features, 4),
            h, w, tiles_h, tiles_w, groups, c // groups, slices,
            LOGITS=logits, SCALE=scale_factor, KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size),
            BLOCK_H=block_h, BLOCK_W=block_w, TILE_H=_launch.SOURCE_TILE, TILE_W=_launch.SOURCE_TILE, BLOCK_C=block,
            INDEX=_launch.index_dtype(kernels, offsets),
            ROUND=_launch.triton_dtype(features.dtype),
            **_launch.product_types(features.dtype, _launch.precision(features.dtype)),
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
    kernels: Tensor | None = None,
    grad_kernels: Tensor | None = None,
    offsets: Tensor | None = None,
    grad_space: Tensor | None = None,
    grad_offsets: Tensor | None = None,
    logits: bool = False,
) -> None:
    """Write `grad_kernels`, of masks or logits, or for DLU add to `grad_space` and write `grad_offsets` if given.

    `kernels` may be left out for masks, whose gradient does not depend on them.
    """
    n, c, h, w = features.shape
    if n == 0:
        return
    tile = _launch.output_tile(scale_factor, kernel_size, features.dtype.itemsize)
    tiles_h, tiles_w = _tiles(grad_output, tile)
    with torch.cuda.device_of(features):
        _kernels.reassemble_backward_kernels[(n * tiles_h * tiles_w * groups,)](
            *_launch.pointer_and_strides(grad_output, 4),
            *_launch.pointer_and_strides(features, 4),
            *_taps(kernels, offsets, groups),
            *_launch.pointer_and_group_strides(grad_kernels, groups),
            *_launch.pointer_and_strides(offsets, 4),
            grad_space,
            *_launch.pointer_and_strides(grad_offsets, 4),
            h, w, tiles_h, tiles_w, groups, c // groups,
            LOGITS=logits, SCALE=scale_factor, KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size),
            **tile._asdict(), BLOCK_C=_launch.channel_block(features.dtype, c // groups),
            INDEX=_launch.index_dtype(kernels, grad_kernels, offsets, grad_offsets),
            **_launch.product_types(features.dtype, _launch.precision(features.dtype)),
            **_launch.options(kernel_size, tile.BLOCK_H * tile.BLOCK_W, all_registers=True),
        )  # fmt: skip


def _taps(kernels: Tensor | None, offsets: Tensor | None, groups: int) -> tuple[Any, ...]:
    """Pointer and strides of `kernels`; those of the kernel space follow from its sizes."""
    if offsets is not None:
        return (kernels, 0, 0, 0, 0, 0)
    return _launch.pointer_and_group_strides(kernels, groups)


def _tiles(output: Tensor, tile: _launch.Tile) -> tuple[int, int]:
    return _launch.cdiv(output.shape[2], tile.BLOCK_H), _launch.cdiv(output.shape[3], tile.BLOCK_W)
