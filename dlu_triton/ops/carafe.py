"""CARAFE: reassembly of features with given kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks, _complexity, _launch, reference
from . import _graph, _reassembly, _registration

# ---------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------


def _carafe(
    features: Tensor,
    masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    output_size: Sequence[int] | None,
) -> Tensor:
    return _reassembly.forward(features, masks, None, kernel_size, group_size, scale_factor, output_size)


def _carafe_gradients(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    output_size: Sequence[int] | None,
    wants_features: bool,
    wants_masks: bool,
) -> list[Tensor]:
    """The wanted ones of grad_features and grad_masks, in this order."""
    gradients = []
    if wants_features:
        grad_features = torch.empty_like(features)
        _reassembly.backward_features(grad_output, grad_features, masks, None, kernel_size, group_size, scale_factor)
        gradients.append(grad_features)
    if wants_masks:
        grad_masks = torch.empty_like(masks)
        _reassembly.backward_kernels(
            grad_output, features, kernel_size, group_size, scale_factor, grad_kernels=grad_masks
        )
        gradients.append(grad_masks)
    return gradients


def _carafe_upsample(
    features: Tensor,
    logits: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    output_size: Sequence[int] | None,
) -> Tensor:
    return _reassembly.forward(features, logits, None, kernel_size, groups, scale_factor, output_size, logits=True)


def _carafe_upsample_gradients(
    grad_output: Tensor,
    features: Tensor,
    logits: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    output_size: Sequence[int] | None,
    wants_features: bool,
    wants_logits: bool,
) -> list[Tensor]:
    """The wanted ones of grad_features and grad_logits, in this order."""
    gradients = []
    if wants_features:
        grad_features = torch.empty_like(features)
        _reassembly.backward_features(
            grad_output, grad_features, logits, None, kernel_size, groups, scale_factor, logits=True
        )
        gradients.append(grad_features)
    if wants_logits:
        grad_logits = torch.empty_like(logits)
        _reassembly.backward_kernels(
            grad_output, features, kernel_size, groups, scale_factor,
            kernels=logits, grad_kernels=grad_logits, logits=True,
        )  # fmt: skip
        gradients.append(grad_logits)
    return gradients


# ---------------------------------------------------------------------------------------------------------------
# Registration
# ---------------------------------------------------------------------------------------------------------------


carafe_op = _registration.Operator(
    "carafe",
    _carafe,
    lambda features, masks, kernel_size, group_size, scale_factor, output_size: _reassembly.new_output(
        features, scale_factor, output_size
    ),
    reference.carafe,
    check=_checks.carafe,
    traced=_graph.carafe,
    tensors=2,
    gradients=_carafe_gradients,
)
carafe_upsample_op = _registration.Operator(
    "carafe_upsample",
    _carafe_upsample,
    lambda features, logits, scale_factor, kernel_size, groups, output_size: _reassembly.new_output(
        features, scale_factor, output_size
    ),
    reference.carafe_upsample,
    check=_checks.carafe_upsample,
    traced=_graph.carafe_upsample,
    tensors=2,
    gradients=_carafe_upsample_gradients,
)

carafe_op.register_flops(
    lambda features, masks, k, groups, s, size: _complexity.reassembly_flops(features, s, k, size),
)
carafe_op.gradients.register_flops(
    lambda grad, features, masks, k, groups, s, size, *wanted: (
        sum(wanted) * _complexity.reassembly_flops(features, s, k, size)
    ),
)
carafe_upsample_op.register_flops(
    lambda features, logits, s, k, groups, size: _complexity.reassembly_flops(features, s, k, size),
)
carafe_upsample_op.gradients.register_flops(
    lambda grad, features, logits, s, k, groups, size, *wanted: (
        sum(wanted) * _complexity.reassembly_flops(features, s, k, size)
    ),
)


# ---------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------


def carafe(
    features: Tensor,
    masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Content-aware reassembly of features (CARAFE, arXiv 1905.02188, section 3.2).

    With r = kernel_size // 2 and g(c) = c // (C / group_size), and zeros outside the image::

        out[c, i, j] = sum over u, v in -r..r of
                       masks[g(c), (u + r) * kernel_size + v + r, i, j] * features[c, i//scale + u, j//scale + v]

    The argument order is that of mmcv's `carafe`. Masks are used as they are; normalise them first.

    Args:
        features: (N, C, H, W), float16, bfloat16, float32 or float64, any strides.
        masks: (N, group_size * kernel_size^2, scale_factor * H, scale_factor * W), or of `output_size`, any strides.
            Float32 and half precision may be mixed with that of the features; float64 goes with float64 only.
        kernel_size: odd, from 1 to 9.
        group_size: number of channel groups, a divisor of C; each has masks of its own.
        scale_factor: from 1 to 16.
        output_size: (height, width) of masks and output, for pyramids of odd sizes; each from 1 to scale_factor times
            that of the source, and by default that. Rows and columns beyond are not computed, and have no gradient.

    Returns:
        (N, C, scale_factor * H, scale_factor * W) or `(N, C, *output_size)`, in the dtype and memory format of the
        features, under autocast in the dtype of the region, to which features other than float64 are cast. Half
        precision is summed in float32.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not an integer, or float64 is mixed with others.
        ValueError: a size, a divisibility rule or the device does not fit.
    """
    sizes = _checks.carafe(features, masks, kernel_size, group_size, scale_factor, output_size)
    _checks.kernel_device("features", features)
    return carafe_op(_launch.autocast(features), masks, *sizes)


def carafe_upsample(
    features: Tensor,
    logits: Tensor,
    scale_factor: int,
    kernel_size: int = 5,
    groups: int = 1,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """CARAFE from what its content encoder puts out (arXiv 1905.02188, sections 3.2 and 3.3).

    Equal to `carafe(features, masks, kernel_size, groups, scale_factor)` with masks that are the logits after a pixel
    shuffle and a softmax over the kernel_size^2 channels of each group; here neither writes anything to memory.

    Args:
        features: (N, C, H, W), float16, bfloat16, float32 or float64, any strides.
        logits: (N, groups * kernel_size^2 * scale_factor^2, H, W), any strides. Channel
            ((g * kernel_size^2 + t) * scale_factor + i) * scale_factor + j is tap t of group g for output pixel (i, j)
            of the scale_factor x scale_factor ones of a source pixel. Float32 and half precision may be mixed with
            that of the features; float64 goes with float64 only.
        scale_factor: from 1 to 16.
        kernel_size: odd, from 1 to 9.
        groups: number of channel groups, a divisor of C; each has kernels of its own.
        output_size: (height, width) of the output, for pyramids of odd sizes; each from 1 to scale_factor times that
            of the source, and by default that. Rows and columns beyond are not computed, and have no gradient.

    Returns:
        (N, C, scale_factor * H, scale_factor * W) or `(N, C, *output_size)`, in the dtype and memory format of the
        features, under autocast in the dtype of the region, to which features other than float64 are cast. Softmax
        and sums are float32 at least.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not an integer, or float64 is mixed with others.
        ValueError: a size, a divisibility rule or the device does not fit.
    """
    sizes = _checks.carafe_upsample(features, logits, scale_factor, kernel_size, groups, output_size)
    _checks.kernel_device("features", features)
    return carafe_upsample_op(_launch.autocast(features), logits, *sizes)
