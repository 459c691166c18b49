"""DLU: reassembly with kernels that are sampled from a small kernel space at learned offsets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _launch, reference
from . import _kernels, _reassembly, _registration

_Launch = tuple[tuple[int], tuple[int, ...], dict[str, Any]]  # grid, sizes, constants

# ---------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------


def _softmax(kernel_space: Tensor, groups: int, kernel_size: int) -> Tensor:
    """Logits (N, G*k*k, H, W) -> normalised kernels (N, G, H, W, taps), the taps padded."""
    space = _launch.new_space(kernel_space, groups, kernel_size, _launch.space_dtype(kernel_space.dtype))
    if space.numel():
        _launch.launch(_softmax_forward_launch, (kernel_space, space), groups, kernel_size)
    return space


def _softmax_forward_launch(tensors: tuple[Tensor, Tensor], groups: int, kernel_size: int) -> _launch.Launch:
    kernel_space, space = tensors
    (programs,), sizes, constants = _softmax_launch(kernel_space, space, groups, kernel_size)
    arguments = (*_launch.logits_plane(kernel_space, groups), space, *sizes)
    constants |= {"TAPS_INNER": _launch.taps_inner(kernel_space)}
    return _launch.Launch(_kernels.softmax_forward, programs, arguments, constants)


def _softmax_backward(kernel_space: Tensor, grad_space: Tensor, groups: int, kernel_size: int) -> Tensor:
    """Gradient of the normalised kernels -> gradient of the logits."""
    grad_logits = torch.empty_like(kernel_space)
    if grad_logits.numel():
        grid, sizes, constants = _softmax_launch(kernel_space, grad_space, groups, kernel_size)
        with torch.cuda.device_of(kernel_space):
            _kernels.softmax_backward[grid](
                *_launch.logits_plane(kernel_space, groups),
                grad_space,
                *_launch.logits_plane(grad_logits, groups),
                *sizes, **constants,
            )  # fmt: skip
    return grad_logits


def _softmax_launch(kernel_space: Tensor, space: Tensor, groups: int, kernel_size: int) -> _Launch:
    n, _, h, w = kernel_space.shape
    block = _launch.pixels_per_program(kernel_size)
    blocks = _launch.cdiv(h * w, block)
    constants = dict(
        KERNEL=kernel_size, TAPS=_launch.padded_taps(kernel_size), BLOCK_P=block,
        INDEX=_launch.index_dtype(kernel_space, space),
        **_launch.accumulator(kernel_space.dtype), **_launch.options(kernel_size),
    )  # fmt: skip
    return (n * groups * blocks,), (h, w, groups, blocks), constants


def _sample(space: Tensor, offsets: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> None:
    """Write the kernels sampled at the offsets into `masks`."""
    if masks.numel():
        _launch.launch(_sample_forward_launch, (space, offsets, masks), scale_factor, kernel_size)


def _sample_forward_launch(
    tensors: tuple[Tensor, Tensor, Tensor], scale_factor: int, kernel_size: int
) -> _launch.Launch:
    space, offsets, masks = tensors
    (programs,), sizes, constants = _sampling_launch(space, offsets, masks, scale_factor, kernel_size)
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
    *,
    grad_space: Tensor | None,
    grad_offsets: Tensor | None,
) -> None:
    """Add to `grad_space` and write `grad_offsets`, whichever is given."""
    if grad_masks.numel():
        grid, sizes, constants = _sampling_launch(space, offsets, grad_masks, scale_factor, kernel_size)
        with torch.cuda.device_of(grad_masks):
            _kernels.sample_backward[grid](
                *_launch.pointer_and_group_strides(grad_masks, space.shape[1]),
                space,
                *_launch.pointer_and_strides(offsets, 4),
                grad_space,
                *_launch.pointer_and_strides(grad_offsets, 4),
                *sizes, **constants,
            )  # fmt: skip


def _sampling_launch(space: Tensor, offsets: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> _Launch:
    n, groups, h, w, taps = space.shape
    tile = _launch.output_tile(scale_factor, kernel_size, masks.dtype.itemsize)
    tiles_h, tiles_w = _launch.cdiv(scale_factor * h, tile.BLOCK_H), _launch.cdiv(scale_factor * w, tile.BLOCK_W)
    constants = dict(
        SCALE=scale_factor, KERNEL=kernel_size, TAPS=taps, BLOCK_H=tile.BLOCK_H, BLOCK_W=tile.BLOCK_W,
        INDEX=_launch.index_dtype(space, offsets, masks),
        **_launch.accumulator(masks.dtype), **_launch.options(kernel_size),
    )  # fmt: skip
    return (n * tiles_h * tiles_w * groups,), (h, w, tiles_h, tiles_w, groups), constants


def _kernel_gradients(
    launch: Callable[..., None],
    space: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    kernel_size: int,
    wants_space: bool,
    wants_offsets: bool,
) -> list[Tensor]:
    """Run the launch that yields the sampling's gradients, and return the wanted ones."""
    groups = space.shape[1]
    grad_space = grad_offsets = None
    if wants_space:
        _registration.alert_not_deterministic("the gradient of kernel_space")
        dtype = _launch.sum_dtype(kernel_space.dtype)
        grad_space = _launch.new_space(kernel_space, groups, kernel_size, dtype, zero=True)
    if wants_offsets:
        grad_offsets = torch.empty_like(offsets)
    launch(grad_space=grad_space, grad_offsets=grad_offsets)
    gradients = []
    if grad_space is not None:
        gradients.append(_softmax_backward(kernel_space, grad_space, groups, kernel_size))
    if grad_offsets is not None:
        gradients.append(grad_offsets)
    return gradients


# ---------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("dlu_triton::dlu_upsample", mutates_args=())
def dlu_upsample_op(
    features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int, groups: int
) -> Tensor:
    space = _softmax(kernel_space, groups, kernel_size)
    return _reassembly.forward(features, space, offsets, kernel_size, groups, scale_factor)


@dlu_upsample_op.register_fake
def _(
    features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int, groups: int
) -> Tensor:
    _, c, h, w = features.shape
    return _launch.new_map(features, c, scale_factor * h, scale_factor * w)


@torch.library.custom_op("dlu_triton::dlu_upsample_backward", mutates_args=())
def dlu_upsample_backward_op(
    grad_output: Tensor,
    features: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    wants_features: bool,
    wants_space: bool,
    wants_offsets: bool,
) -> list[Tensor]:
    """The wanted ones of grad_features, grad_kernel_space and grad_offsets, in this order."""
    space = _softmax(kernel_space, groups, kernel_size)
    gradients = []
    if wants_features:
        gradients.append(
            _reassembly.backward_features(grad_output, features, space, offsets, kernel_size, groups, scale_factor)
        )
    if wants_space or wants_offsets:

        def launch(**outputs: Tensor | None) -> None:
            _reassembly.backward_kernels(
                grad_output, features, kernel_size, groups, scale_factor, kernels=space, offsets=offsets, **outputs
            )

        gradients += _kernel_gradients(launch, space, kernel_space, offsets, kernel_size, wants_space, wants_offsets)
    return gradients


@dlu_upsample_backward_op.register_fake
def _(
    grad_output: Tensor,
    features: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    wants_features: bool,
    wants_space: bool,
    wants_offsets: bool,
) -> list[Tensor]:
    wanted = (wants_features, wants_space, wants_offsets)
    return _registration.empty_like_wanted((features, kernel_space, offsets), wanted)


@torch.library.custom_op("dlu_triton::expand_kernels", mutates_args=())
def expand_kernels_op(
    kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int, groups: int
) -> Tensor:
    _, _, h, w = kernel_space.shape
    masks = _launch.new_map(kernel_space, groups * kernel_size**2, scale_factor * h, scale_factor * w)
    _sample(_softmax(kernel_space, groups, kernel_size), offsets, masks, scale_factor, kernel_size)
    return masks


@expand_kernels_op.register_fake
def _(kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int, groups: int) -> Tensor:
    _, c, h, w = kernel_space.shape
    return _launch.new_map(kernel_space, c, scale_factor * h, scale_factor * w)


@torch.library.custom_op("dlu_triton::expand_kernels_backward", mutates_args=())
def expand_kernels_backward_op(
    grad_masks: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    wants_space: bool,
    wants_offsets: bool,
) -> list[Tensor]:
    """The wanted ones of grad_kernel_space and grad_offsets, in this order."""
    space = _softmax(kernel_space, groups, kernel_size)

    def launch(**outputs: Tensor | None) -> None:
        _sample_backward(grad_masks, space, offsets, scale_factor, kernel_size, **outputs)

    return _kernel_gradients(launch, space, kernel_space, offsets, kernel_size, wants_space, wants_offsets)


@expand_kernels_backward_op.register_fake
def _(
    grad_masks: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    wants_space: bool,
    wants_offsets: bool,
) -> list[Tensor]:
    return _registration.empty_like_wanted((kernel_space, offsets), (wants_space, wants_offsets))


_registration.register_autograd(dlu_upsample_op, dlu_upsample_backward_op, tensors=3)
_registration.register_autograd(expand_kernels_op, expand_kernels_backward_op, tensors=2)


# ---------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------


def dlu_upsample(
    features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int = 5, groups: int = 1
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

    Float32 and half precision may be mixed among the three tensors; float64 goes with float64 only.

    Returns:
        (N, C, scale_factor * H, scale_factor * W), in the dtype and memory format of the features. Half precision is
        summed in float32; coordinates are float32 (float64 for float64). A NaN offset makes its own output NaN.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not an integer, or float64 is mixed with others.
        ValueError: a size, a divisibility rule or the device does not fit.
    """
    if not _launch.runs_kernels(features):
        return reference.dlu_upsample(features, kernel_space, offsets, scale_factor, kernel_size, groups)
    _checks.dlu_upsample(features, kernel_space, offsets, scale_factor, kernel_size, groups)
    _checks.kernel_device("features", features)
    return dlu_upsample_op(features, kernel_space, offsets, scale_factor, kernel_size, groups)


def expand_kernels(
    kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int = 5, groups: int = 1
) -> Tensor:
    """Reassembly kernels of every output pixel, sampled from a kernel space (DLU, arXiv 2410.22139).

    S = softmax of kernel_space over the kernel_size^2 channels of each group; then

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

    Returns:
        (N, groups * kernel_size^2, scale_factor * H, scale_factor * W), in the dtype and memory format of
        kernel_space; the kernel_size^2 channels of each group sum to 1.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not an integer, or float64 is mixed with others.
        ValueError: a size or the device does not fit.
    """
    if not _launch.runs_kernels(kernel_space):
        return reference.expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups)
    _checks.expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups)
    _checks.kernel_device("kernel_space", kernel_space)
    return expand_kernels_op(kernel_space, offsets, scale_factor, kernel_size, groups)
