"""Launches of the reassembly kernels, which CARAFE and DLU share.

`kernels` are the masks (N, G*k*k, s*H, s*W), with `logits` what CARAFE's encoder puts out, (N, G*k*k*s*s, H, W), or
with `offsets` the normalised kernel space (N, G, H, W, taps). Outputs, their gradients and masks may be cut off below
s*H and s*W: what the launches find in their shapes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _launch
from . import _kernels


def new_output(features: Tensor, scale_factor: int, output_size: Sequence[int] | None) -> Tensor:
    """Uninitialised (N, C, s*H, s*W), or of the size that is given."""
    _, c, h, w = features.shape
    return _launch.new_map(features, c, *(output_size or (scale_factor * h, scale_factor * w)))


def forward(
    features: Tensor,
    kernels: Tensor,
    offsets: Tensor | None,
    kernel_size: int,
    groups: int,
    scale_factor: int,
    output_size: Sequence[int] | None,
    *,
    logits: bool = False,
) -> Tensor:
    output = new_output(features, scale_factor, output_size)
    if output.numel():
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
    most_bytes = _launch.operand_bytes(features.dtype)
    tile, warps = _launch.forward_tile(scale_factor, kernel_size, features.dtype.itemsize, channels_last, most_bytes)
    tiles_h, tiles_w = tiles(output.shape[2:], tile)
    block = _launch.forward_channels(features.dtype, c // groups, kernel_size)
    slices, per_program = _launch.shares(n * tiles_h * tiles_w * groups, c // groups, block)
    layout = _launch.feature_layout(features)
    long_run, short_run = _launch.runs(scale_factor, features.dtype.itemsize, tile.BLOCK_W)
    aligned = 0 if not layout.even or output.shape[3] % short_run else 1 if output.shape[3] % long_run else 2
    arguments = (
        features, *layout.strides,
        *_taps(kernels, offsets, groups),
        *_launch.pointer_and_strides(offsets, 4),
        output,
        h, w, *output.shape[2:], tiles_h, tiles_w, groups, c // groups, slices, per_program // block, aligned,
    )  # fmt: skip
    constants = dict(
        INNER=layout.INNER, UNIT=layout.UNIT, RUN=math.gcd(c // groups, block), CHANNELS_LAST=channels_last,
        TAPS_INNER="" if offsets is not None else _launch.taps_inner(kernels), LOGITS=logits,
        SCALE=scale_factor, KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size),
        **tile._asdict(), BLOCK_C=block, LONG_RUN=long_run, SHORT_RUN=short_run, INDEX=_launch.index_dtype(*tensors),
        ROUND=_launch.triton_dtype(features.dtype), **_launch.product_types(features.dtype, precision),
        **_launch.options(warps, 255 if features.dtype == torch.float64 else None),
    )  # fmt: skip
    return _launch.Launch(_kernels.reassemble_forward, n * tiles_h * tiles_w * groups * slices, arguments, constants)


def backward_features(
    grad_output: Tensor,
    grad_features: Tensor,
    kernels: Tensor,
    offsets: Tensor | None,
    kernel_size: int,
    groups: int,
    scale_factor: int,
    *,
    logits: bool = False,
) -> None:
    """Write `grad_features`."""
    if grad_features.numel():
        tensors = (grad_output, kernels, grad_features) if offsets is None else (
            grad_output, kernels, offsets, grad_features
        )  # fmt: skip
        precision = _launch.precision(grad_features.dtype)
        _launch.launch(_backward_features_launch, tensors, kernel_size, groups, scale_factor, logits, precision)


def _backward_features_launch(
    tensors: tuple[Tensor, ...], kernel_size: int, groups: int, scale_factor: int, logits: bool, precision: str
) -> _launch.Launch:
    grad_output, kernels, *offsets, grad_features = tensors
    offsets = offsets[0] if offsets else None
    n, c, h, w = grad_features.shape
    dtype = grad_features.dtype
    channels_last = _launch.channels_innermost(grad_output)
    tile = _launch.gather_tile(scale_factor, kernel_size, dtype.itemsize, channels_last)
    strip = tile.strip
    start = scale_factor * math.gcd(strip.STRIP_W, kernel_size // 2)
    layout = _launch.map_layout(grad_output, math.gcd(start, strip.BLOCK_W))
    grad_layout = _launch.map_layout(grad_features, strip.STRIP_W)
    steps, columns = _launch.cdiv(h, strip.STEP_H), n * _launch.cdiv(w, strip.STRIP_W) * groups
    run = min(layout.UNIT, grad_layout.UNIT)
    block, warps = _launch.gather_channels(
        tile, dtype.itemsize, c // groups, kernel_size, columns * steps, run, _launch.operand_bytes(dtype)
    )
    slices = _launch.cdiv(c // groups, block)
    steps = _launch.strip_steps(columns * slices, steps)
    tiles_h = _launch.cdiv(h, steps * strip.STEP_H)
    # Pieces may begin before the first output, and offsets are from there.
    last_of_piece = (c - 1, strip.BLOCK_H - 1, strip.BLOCK_W - 1)
    furthest = sum(last * stride for last, stride in zip(last_of_piece, grad_output.stride()[1:], strict=True))
    arguments = (
        grad_output, *layout.strides,
        *_taps(kernels, offsets, groups),
        *_launch.pointer_and_strides(offsets, 4),
        grad_features, *grad_layout.strides,
        h, w, *grad_output.shape[2:], tiles_h, _launch.cdiv(w, strip.STRIP_W), groups, c // groups, slices, steps,
    )  # fmt: skip
    constants = dict(
        INNER=layout.INNER, UNIT=layout.UNIT, GRAD_INNER=grad_layout.INNER, GRAD_UNIT=grad_layout.UNIT,
        RUN=math.gcd(c // groups, block), TAPS_INNER="" if offsets is not None else _launch.taps_inner(kernels),
        LOGITS=logits, SCALE=scale_factor, KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size),
        **strip._asdict(), BLOCK_C=block, INDEX=_launch.index_dtype(*tensors, furthest=furthest),
        ROUND=_launch.triton_dtype(dtype), **_launch.product_types(dtype, precision),
        **_launch.options(warps, tile.registers),
    )  # fmt: skip
    programs = columns * slices * tiles_h
    return _launch.Launch(_kernels.reassemble_backward_features, programs, arguments, constants)


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
    if features.numel():
        named = dict(
            grad_output=grad_output, features=features, kernels=kernels, grad_kernels=grad_kernels, offsets=offsets,
            grad_space=grad_space, grad_offsets=grad_offsets,
        )  # fmt: skip
        present = {name: tensor for name, tensor in named.items() if tensor is not None}
        settings = tuple(present), kernel_size, groups, scale_factor, logits, _launch.precision(features.dtype)
        _launch.launch(_backward_kernels_launch, tuple(present.values()), *settings)


def _backward_kernels_launch(
    tensors: tuple[Tensor, ...], names: tuple[str, ...], kernel_size: int, groups: int, scale_factor: int,
    logits: bool, precision: str,
) -> _launch.Launch:  # fmt: skip
    named = dict(zip(names, tensors, strict=True))
    grad_output, features, kernels = named["grad_output"], named["features"], named.get("kernels")
    offsets, grad_kernels, grad_offsets = (named.get(name) for name in ("offsets", "grad_kernels", "grad_offsets"))
    n, c, h, w = features.shape
    dtype = features.dtype
    channels_last, most_cells = _launch.channels_innermost(grad_output), _launch.cells(dtype)
    tile, cells, channels, warps, registers = _launch.kernel_tile(
        scale_factor, kernel_size, dtype.itemsize, channels_last
    )
    if dtype == torch.float32 and most_cells == 0:
        warps = 8  # four spill
    # Gradients of logits and offsets are zero where outputs are cut off.
    whole = logits or grad_offsets is not None
    tiles_h, tiles_w = tiles((scale_factor * h, scale_factor * w) if whole else grad_output.shape[2:], tile)
    block = _launch.channel_block(channels, c // groups)
    layout, grad_layout = _launch.map_layout(features, 2), _launch.map_layout(grad_output, tile.BLOCK_W)
    arguments = (
        grad_output, *grad_layout.strides,
        features, *layout.strides,
        *_taps(kernels, offsets, groups),
        *_launch.pointer_and_group_strides(grad_kernels, groups),
        *_launch.pointer_and_strides(offsets, 4),
        named.get("grad_space"),
        *_launch.pointer_and_strides(grad_offsets, 4),
        h, w, *grad_output.shape[2:], tiles_h, tiles_w, groups, c // groups,
    )  # fmt: skip
    constants = dict(
        INNER=layout.INNER, UNIT=layout.UNIT,
        GRAD_INNER=grad_layout.INNER, GRAD_UNIT=grad_layout.UNIT, RUN=math.gcd(c // groups, block),
        TAPS_INNER=_launch.taps_inner(kernels) if logits else "", GRAD_TAPS_INNER=_launch.taps_inner(grad_kernels),
        LOGITS=logits, SCALE=scale_factor, KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size),
        **tile._asdict(), BLOCK_C=block, CELLS=min(cells, most_cells), INDEX=_launch.index_dtype(*tensors),
        **_launch.product_types(dtype, precision), SUM_PRECISION=_launch.sum_precision(dtype),
        **_launch.options(warps, registers),
    )  # fmt: skip
    return _launch.Launch(_kernels.reassemble_backward_kernels, n * tiles_h * tiles_w * groups, arguments, constants)


def _taps(kernels: Tensor | None, offsets: Tensor | None, groups: int) -> tuple[Any, ...]:
    """Pointer and strides of `kernels`; those of the kernel space follow from its sizes."""
    if offsets is not None:
        return (kernels, 0, 0, 0, 0, 0)
    return _launch.pointer_and_group_strides(kernels, groups)


def tiles(size: Sequence[int], tile: _launch.Tile) -> tuple[int, int]:
    """That cover so many rows and columns."""
    return _launch.cdiv(size[0], tile.BLOCK_H), _launch.cdiv(size[1], tile.BLOCK_W)
