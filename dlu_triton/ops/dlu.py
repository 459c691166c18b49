"""DLU: reassembly with kernels that are sampled from a small kernel space at learned offsets."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _complexity, _launch, reference
from . import _graph, _kernels, _reassembly, _registration

_Launch = tuple[int, tuple[int, ...], dict[str, Any]]  # programs, sizes, constants


class _Sums(NamedTuple):
    """What gradients of the normalised kernels (N, G, H, W, taps) are added to, by atomic additions.

    For the sums not to depend on their order they are 64-bit integers (N, G, limbs, H, W, taps), and `largest` (N, G)
    is a bound of what is added, from which their unit follows. The first cell has a padded tap: there, programs that
    saw a NaN offset are counted.
    """

    grad_space: Tensor
    largest: Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------


def _softmax(
    kernel_space: Tensor, groups: int, kernel_size: int, dtype: torch.dtype, zeros: Tensor | None = None
) -> Tensor:
    """Logits (N, G*k*k, H, W) -> normalised kernels (N, G, H, W, taps), the taps padded. Fills `zeros`, if given.

    Backward passes keep them in the type of sums: gradients of offsets are differences of kernels.
    """
    space = _launch.new_space(kernel_space, groups, kernel_size, dtype)
    if space.numel():
        tensors = (kernel_space, space) if zeros is None else (kernel_space, space, zeros)
        _launch.launch(_softmax_forward_launch, tensors, groups, kernel_size)
    return space


def _softmax_forward_launch(tensors: tuple[Tensor, ...], groups: int, kernel_size: int) -> _launch.Launch:
    kernel_space, space, *zeros = tensors
    programs, sizes, constants = _softmax_launch(tensors, groups, kernel_size)
    arguments = (*_launch.logits_plane(kernel_space, groups), space, zeros[0] if zeros else None, *sizes)
    constants |= {"TAPS_INNER": _launch.taps_inner(kernel_space)}
    return _launch.Launch(_kernels.softmax_forward, programs, arguments, constants)


def _softmax_backward(kernel_space: Tensor, sums: _Sums, groups: int, kernel_size: int, count_bits: int) -> Tensor:
    """Gradient of the normalised kernels -> gradient of the logits."""
    grad_logits = torch.empty_like(kernel_space)
    if grad_logits.numel():
        tensors = (kernel_space, *(tensor for tensor in sums if tensor is not None), grad_logits)
        _launch.launch(_softmax_backward_launch, tensors, groups, kernel_size, count_bits)
    return grad_logits


def _softmax_backward_launch(
    tensors: tuple[Tensor, ...], groups: int, kernel_size: int, count_bits: int
) -> _launch.Launch:
    kernel_space, grad_space, *largest, grad_logits = tensors
    programs, sizes, constants = _softmax_launch(tensors, groups, kernel_size)
    arguments = (
        *_launch.logits_plane(kernel_space, groups),
        grad_space, *((largest[0], count_bits) if largest else (None, None)),
        *_launch.logits_plane(grad_logits, groups),
        *sizes,
    )  # fmt: skip
    constants |= {"TAPS_INNER": _launch.taps_inner(kernel_space), "GRAD_TAPS_INNER": _launch.taps_inner(grad_logits)}
    return _launch.Launch(_kernels.softmax_backward, programs, arguments, constants)


def _softmax_launch(tensors: tuple[Tensor, ...], groups: int, kernel_size: int) -> _Launch:
    kernel_space = tensors[0]
    n, _, h, w = kernel_space.shape
    block = _launch.pixels_per_program(kernel_size)
    blocks = _launch.cdiv(h * w, block)
    constants = dict(
        KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size), BLOCK_P=block,
        INDEX=_launch.index_dtype(*tensors),
        **_launch.accumulator(kernel_space.dtype), **_launch.options(_launch.warps_for(kernel_size)),
    )  # fmt: skip
    return n * groups * blocks, (h, w, groups, blocks), constants


def _sample(space: Tensor, offsets: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> None:
    """Write the kernels sampled at the offsets into `masks`."""
    if masks.numel():
        _launch.launch(_sample_forward_launch, (space, offsets, masks), scale_factor, kernel_size)


def _sample_forward_launch(
    tensors: tuple[Tensor, Tensor, Tensor], scale_factor: int, kernel_size: int
) -> _launch.Launch:
    space, offsets, masks = tensors
    programs, sizes, constants = _sampling_launch(tensors, space, masks, masks.shape[2:], scale_factor, kernel_size)
    arguments = (
        space,
        *_launch.pointer_and_strides(offsets, 4),
        *_launch.pointer_and_group_strides(masks, space.shape[1]),
        *sizes,
    )
    constants |= {"TAPS_INNER": _launch.taps_inner(masks)}
    return _launch.Launch(_kernels.sample_forward, programs, arguments, constants)


def _sample_backward(
    grad_masks: Tensor,
    space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    count_bits: int,
    *,
    sums: _Sums | None,
    grad_offsets: Tensor | None,
) -> None:
    """Add to `sums` and write `grad_offsets`, whichever is given."""
    if grad_masks.numel():
        grad_space, largest = sums or (None, None)
        named = dict(
            grad_masks=grad_masks, space=space, offsets=offsets,
            grad_space=grad_space, largest=largest, grad_offsets=grad_offsets,
        )  # fmt: skip
        present = {name: tensor for name, tensor in named.items() if tensor is not None}
        settings = tuple(present), scale_factor, kernel_size, count_bits
        _launch.launch(_sample_backward_launch, tuple(present.values()), *settings)


def _sample_backward_launch(
    tensors: tuple[Tensor, ...], names: tuple[str, ...], scale_factor: int, kernel_size: int, count_bits: int
) -> _launch.Launch:
    named = dict(zip(names, tensors, strict=True))
    grad_masks, space, largest = named["grad_masks"], named["space"], named.get("largest")
    _, _, h, w, _ = space.shape
    # The gradient of the offsets is zero where outputs are cut off.
    covered = (scale_factor * h, scale_factor * w) if "grad_offsets" in named else grad_masks.shape[2:]
    programs, sizes, constants = _sampling_launch(tensors, space, grad_masks, covered, scale_factor, kernel_size)
    arguments = (
        *_launch.pointer_and_group_strides(grad_masks, space.shape[1]),
        space,
        *_launch.pointer_and_strides(named["offsets"], 4),
        named.get("grad_space"), largest, None if largest is None else count_bits,
        *_launch.pointer_and_strides(named.get("grad_offsets"), 4),
        *sizes,
    )  # fmt: skip
    constants |= {
        "TAPS_INNER": _launch.taps_inner(grad_masks),
        "CELLS": _launch.cells(grad_masks.dtype),
        "SUM_PRECISION": _launch.sum_precision(grad_masks.dtype),
        **_launch.most_registers(),
    }
    if grad_masks.dtype == torch.float64:
        constants["num_warps"] = 8  # four spill
    return _launch.Launch(_kernels.sample_backward, programs, arguments, constants)


def _sampling_launch(
    tensors: tuple[Tensor, ...],
    space: Tensor,
    masks: Tensor,
    covered: Sequence[int],
    scale_factor: int,
    kernel_size: int,
) -> _Launch:
    """By tiles that cover so many rows and columns."""
    n, groups, h, w, taps = space.shape
    tile = _launch.output_tile(scale_factor, kernel_size, masks.dtype.itemsize)
    tiles_h, tiles_w = _reassembly.tiles(covered, tile)
    constants = dict(
        SCALE=scale_factor, KERNEL=kernel_size, TAPS=taps, BLOCK_H=tile.BLOCK_H, BLOCK_W=tile.BLOCK_W,
        INDEX=_launch.index_dtype(*tensors),
        **_launch.accumulator(masks.dtype), **_launch.options(_launch.warps_for(kernel_size)),
    )  # fmt: skip
    return n * tiles_h * tiles_w * groups, (h, w, *masks.shape[2:], tiles_h, tiles_w, groups), constants


# ---------------------------------------------------------------------------------------------------------------
# Forward and backward passes
# ---------------------------------------------------------------------------------------------------------------


def _in_any_order() -> bool:
    """Whether sums may depend on the order of their additions, which varies from run to run."""
    return not torch.are_deterministic_algorithms_enabled()


def _new_sums(kernel_space: Tensor, groups: int, kernel_size: int, inside: Tensor | None) -> Tensor:
    """Uninitialised `_Sums.grad_space`."""
    n, _, h, w = kernel_space.shape
    dtype, limbs = _launch.sum_dtype(kernel_space.dtype), ()
    if not _in_any_order():
        dtype, limbs = torch.int64, (2 if dtype == torch.float64 else 1,)
    shape = (n, groups, *limbs, h, w, _launch.padded_taps(kernel_size))
    return _launch.scratch(shape, dtype, kernel_space.device, inside)


def _largest(grad_masks: Tensor, groups: int) -> Tensor:
    """The largest magnitude of each image and group."""
    by_group, dtype = grad_masks.unflatten(1, (groups, -1)), _launch.sum_dtype(grad_masks.dtype)
    return torch.linalg.vector_norm(by_group, math.inf, dim=(2, 3, 4), dtype=dtype)


def _backward_from_masks(
    grad_masks: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    wants_space: bool,
    wants_offsets: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The normalised kernels, and the wanted ones of grad_kernel_space and grad_offsets, from the gradient of the
    sampled kernels."""
    grad_offsets = torch.empty_like(offsets) if wants_offsets else None
    grad_space = _new_sums(kernel_space, groups, kernel_size, None) if wants_space else None
    space = _softmax(kernel_space, groups, kernel_size, _launch.sum_dtype(kernel_space.dtype), zeros=grad_space)
    sums, bits = None, _count_bits(kernel_space, scale_factor)
    if grad_space is not None:
        sums = _Sums(grad_space, None if _in_any_order() or not grad_masks.numel() else _largest(grad_masks, groups))
    _sample_backward(grad_masks, space, offsets, scale_factor, kernel_size, bits, sums=sums, grad_offsets=grad_offsets)
    gradients = [] if sums is None else [_softmax_backward(kernel_space, sums, groups, kernel_size, bits)]
    return space, gradients if grad_offsets is None else [*gradients, grad_offsets]


def _count_bits(kernel_space: Tensor, scale_factor: int) -> int:
    """Bits of how many outputs may sample one kernel, see `_fixed_point`."""
    _, _, h, w = kernel_space.shape
    return (scale_factor**2 * h * w - 1).bit_length()


def _dlu_upsample(
    features: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    output_size: Sequence[int] | None,
) -> Tensor:
    space = _softmax(kernel_space, groups, kernel_size, _launch.space_dtype(kernel_space.dtype))
    return _reassembly.forward(features, space, offsets, kernel_size, groups, scale_factor, output_size)


def _dlu_upsample_gradients(
    grad_output: Tensor,
    features: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    output_size: Sequence[int] | None,
    wants_features: bool,
    wants_space: bool,
    wants_offsets: bool,
) -> list[Tensor]:
    """The wanted ones of grad_features, grad_kernel_space and grad_offsets, in this order."""
    sizes = (kernel_size, groups, scale_factor)
    grad_features = torch.empty_like(features) if wants_features else None
    gradients = []
    if wants_space and not _in_any_order():
        shape = (len(features), groups * kernel_size**2, *grad_output.shape[2:])
        # In the memory that the gradient of the features takes later.
        grad_masks = _launch.scratch(shape, _launch.sum_dtype(features.dtype), features.device, inside=grad_features)
        _reassembly.backward_kernels(grad_output, features, *sizes, grad_kernels=grad_masks)
        space, gradients = _backward_from_masks(
            grad_masks, kernel_space, offsets, scale_factor, kernel_size, groups, wants_space, wants_offsets
        )
    else:
        grad_space = None
        if wants_space:  # likewise
            grad_space = _new_sums(kernel_space, groups, kernel_size, inside=grad_features)
        space = _softmax(kernel_space, groups, kernel_size, _launch.sum_dtype(kernel_space.dtype), zeros=grad_space)
        if wants_space or wants_offsets:
            grad_offsets = torch.empty_like(offsets) if wants_offsets else None
            _reassembly.backward_kernels(
                grad_output, features, *sizes,
                kernels=space, offsets=offsets, grad_space=grad_space, grad_offsets=grad_offsets,
            )  # fmt: skip
            if grad_space is not None:
                gradients.append(_softmax_backward(kernel_space, _Sums(grad_space), groups, kernel_size, 0))
                del grad_space
            if grad_offsets is not None:
                gradients.append(grad_offsets)
    if grad_features is not None:
        _reassembly.backward_features(grad_output, grad_features, space, offsets, *sizes)
        gradients.insert(0, grad_features)
    return gradients


def _expand_kernels(
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    output_size: Sequence[int] | None,
) -> Tensor:
    masks = _reassembly.new_output(kernel_space, scale_factor, output_size)
    space = _softmax(kernel_space, groups, kernel_size, _launch.space_dtype(kernel_space.dtype))
    _sample(space, offsets, masks, scale_factor, kernel_size)
    return masks


def _expand_kernels_gradients(
    grad_masks: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    output_size: Sequence[int] | None,
    wants_space: bool,
    wants_offsets: bool,
) -> list[Tensor]:
    """The wanted ones of grad_kernel_space and grad_offsets, in this order."""
    _, gradients = _backward_from_masks(
        grad_masks, kernel_space, offsets, scale_factor, kernel_size, groups, wants_space, wants_offsets
    )
    return gradients


# ---------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------


dlu_upsample_op = _registration.Operator(
    "dlu_upsample",
    _dlu_upsample,
    lambda features, kernel_space, offsets, scale_factor, kernel_size, groups, output_size: _reassembly.new_output(
        features, scale_factor, output_size
    ),
    reference.dlu_upsample,
    check=_checks.dlu_upsample,
    traced=_graph.dlu_upsample,
    tensors=3,
    gradients=_dlu_upsample_gradients,
)
expand_kernels_op = _registration.Operator(
    "expand_kernels",
    _expand_kernels,
    lambda kernel_space, offsets, scale_factor, kernel_size, groups, output_size: _reassembly.new_output(
        kernel_space, scale_factor, output_size
    ),
    reference.expand_kernels,
    check=_checks.expand_kernels,
    traced=_graph.expand_kernels,
    tensors=2,
    gradients=_expand_kernels_gradients,
)


def _backward_flops(
    grad: Sequence[int], features: Sequence[int], space: Sequence[int], offsets: Sequence[int],
    s: int, k: int, groups: int, size: Sequence[int] | None, wants_features: bool, *wants_sampling: bool,
) -> int:  # fmt: skip
    reassembly = (wants_features + any(wants_sampling)) * _complexity.reassembly_flops(features, s, k, size)
    return reassembly + sum(wants_sampling) * _complexity.interpolation_adjoint_flops(space, s, size)


dlu_upsample_op.register_flops(
    lambda features, space, offsets, s, k, groups, size: (
        _complexity.reassembly_flops(features, s, k, size) + _complexity.interpolation_flops(space, s, size)
    ),
)
dlu_upsample_op.gradients.register_flops(_backward_flops)
expand_kernels_op.register_flops(
    lambda space, offsets, s, k, groups, size: _complexity.interpolation_flops(space, s, size),
)
expand_kernels_op.gradients.register_flops(
    lambda grad, space, offsets, s, k, groups, size, *wanted: (
        sum(wanted) * _complexity.interpolation_adjoint_flops(space, s, size)
    ),
)


# ---------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------


def dlu_upsample(
    features: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int = 5,
    groups: int = 1,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Dynamic lightweight upsampling (DLU, arXiv 2410.22139): CARAFE with kernels sampled from a kernel space.

    Equal to `carafe(features, expand_kernels(kernel_space, offsets, ...), ...)`, in one pass that never writes the
    upsampled kernels to memory.

    Args:
        features: (N, C, H, W), float16, bfloat16, float32 or float64, any strides.
        kernel_space: (N, groups * kernel_size^2, H, W), logits; a softmax over the kernel_size^2 channels of each
            group normalises them before sampling.
        offsets: (N, 2 * groups * scale_factor^2, H, W), in source pixels. After a pixel shuffle by scale_factor,
            channel 2g is the x and 2g + 1 the y displacement of group g.
        scale_factor: from 1 to 16.
        kernel_size: odd, from 1 to 9.
        groups: number of channel groups, a divisor of C; each has kernels and offsets of its own.
        output_size: (height, width) of the output, for pyramids of odd sizes; each from 1 to scale_factor times that
            of the source, and by default that. Rows and columns beyond are not computed, and have no gradient.

    Float32 and half precision may be mixed among the three tensors; float64 goes with float64 only.

    Returns:
        (N, C, scale_factor * H, scale_factor * W) or `(N, C, *output_size)`, in the dtype and memory format of the
        features, under autocast in the dtype of the region, to which features other than float64 are cast. Half
        precision is summed in float32; coordinates are float32 (float64 for float64). A NaN offset makes its own
        output NaN.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not an integer, or float64 is mixed with others.
        ValueError: a size, a divisibility rule or the device does not fit.
    """
    sizes = _checks.dlu_upsample(features, kernel_space, offsets, scale_factor, kernel_size, groups, output_size)
    _checks.kernel_device("features", features)
    return dlu_upsample_op(_launch.autocast(features), kernel_space, offsets, *sizes)


def expand_kernels(
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int = 5,
    groups: int = 1,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Reassembly kernels of every output pixel, sampled from a kernel space (DLU, arXiv 2410.22139).

    S = softmax of kernel_space over the kernel_size^2 channels of each group; then::

        masks[g, :, i, j] = S[g] sampled bilinearly at x = clamp(j // scale + dx, 0, W - 1),
                                                       y = clamp(i // scale + dy, 0, H - 1)

    The gradient of an offset is zero where its unclamped coordinate is at or beyond the border, and the right-hand
    derivative at an integer coordinate inside.

    Args:
        kernel_space: (N, groups * kernel_size^2, H, W), logits, float16, bfloat16, float32 or float64, any strides.
        offsets: (N, 2 * groups * scale_factor^2, H, W), in source pixels. After a pixel shuffle by scale_factor,
            channel 2g is the x and 2g + 1 the y displacement of group g.
        scale_factor: from 1 to 16.
        kernel_size: odd, from 1 to 9.
        groups: number of kernels per pixel.
        output_size: (height, width) of the output, each from 1 to scale_factor times that of the source, and by
            default that. Rows and columns beyond are not computed, and have no gradient.

    Returns:
        (N, groups * kernel_size^2, scale_factor * H, scale_factor * W), or of `output_size`, in the dtype and memory
        format of kernel_space, under autocast in the dtype of the region, to which a kernel_space other than float64
        is cast; the kernel_size^2 channels of each group sum to 1.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not an integer, or float64 is mixed with others.
        ValueError: a size or the device does not fit.
    """
    sizes = _checks.expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups, output_size)
    _checks.kernel_device("kernel_space", kernel_space)
    return expand_kernels_op(_launch.autocast(kernel_space), offsets, *sizes)
