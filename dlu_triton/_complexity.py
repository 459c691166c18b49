"""Parameters and FLOPs of operators and modules: the only place with formulas of costs.

A multiply-add is two FLOPs, as `torch.utils.flop_counter` has it. Softmax, pixel shuffle, coordinates and corner
weights, ReLU, resize and normalisation of maps, and sums without products are not counted, nor is anything that a
backward pass computes again. A backward pass counts what it is asked for:

    gradient of the features                      as many as the reassembly
    gradient of the reassembly kernels            as many; for DLU once, for kernel space and offsets together
    from there to the kernel space                8 per tap of an output pixel: a multiply-add into each of four corners
    from there to the offsets                     8 per tap of an output pixel: a dot product with each of four corners

Derivatives beyond, and those of class activation maps, are computed by the eager twins, whose operations PyTorch does
not count. Tensors are given by their shapes; formulas of operators are registered beside the operators.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from . import _checks

CAM_FLOPS = {"xgradcam": 4, "gradcam": 2, "gradcam++": 4, "hirescam": 2, "layercam": 2, "elementwise": 2}


class UpsamplerCost(NamedTuple):
    """What an upsampling module costs."""

    parameters: int
    flops: int  #: per source pixel, without the interpolation
    interpolation_flops: int  #: per source pixel, of sampling the kernels; 0 for CARAFE


class Complexity(NamedTuple):
    """Costs of DLU and CARAFE, and the shares of CARAFE's that DLU saves: 0.5 is half, negative is more expensive."""

    dlu: UpsamplerCost
    carafe: UpsamplerCost
    parameters_saved: float
    flops_saved: float  #: without the interpolation
    flops_saved_with_interpolation: float


def complexity(
    channels: int,
    scale_factor: int,
    up_kernel: int = 5,
    up_group: int = 1,
    encoder_kernel: int = 3,
    *,
    compressed_channels: int = 64,
) -> Complexity:
    """Parameters and FLOPs of `DLUPack` and `CARAFEPack`, by the formulas of the papers (arXiv 2410.22139, 1905.02188).

    With C channels, Cm compressed channels, scale s, kernel size k, encoder kernel e, G groups, and the channels that
    the encoders put out, A = G*s^2*k^2 for CARAFE and A = G*(k^2 + 2*s^2) for DLU::

        parameters     (C + 1)*Cm + (e^2*Cm + 1)*A
        FLOPs          2*(C + 1)*Cm + 2*(e^2*Cm + 1)*A + 2*s^2*k^2*C
        interpolation  7*s^2*k^2*G, of DLU: four products and three additions for each tap of an output pixel

    FLOPs are per source pixel, a multiply-add is two, biases count like weights, softmax is left out. So counted, the
    published figures come out for C = 256: CARAFE's 74k parameters and 199k FLOPs at 2x, and the 91% of the parameters
    and 63% of the FLOPs that DLU saves at 16x, the latter without the interpolation. Groups are our extension.

    Args:
        channels, scale_factor, up_kernel, up_group, encoder_kernel, compressed_channels: as for `DLUPack`, with the
            same defaults. The last by name only, since the modules have a dilation before it.

    Returns:
        A named tuple of `dlu` and `carafe`, each with `parameters`, `flops` and `interpolation_flops`, and of the
        shares that DLU saves, `parameters_saved`, `flops_saved` (without the interpolation) and
        `flops_saved_with_interpolation`.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of its range, or the groups do not divide the channels.
    """
    c, s, k, g, e, cm = _checks.pack(channels, scale_factor, up_kernel, up_group, encoder_kernel, compressed_channels)

    def cost(encoded: int, interpolation: int) -> UpsamplerCost:
        parameters = (c + 1) * cm + (e**2 * cm + 1) * encoded
        return UpsamplerCost(parameters, 2 * parameters + reassembly_flops((1, c, 1, 1), s, k), interpolation)

    return compare(
        dlu=cost(g * (k**2 + 2 * s**2), interpolation_flops((1, g * k**2, 1, 1), s)),
        carafe=cost(g * s**2 * k**2, 0),
    )


def compare(dlu: UpsamplerCost, carafe: UpsamplerCost) -> Complexity:
    return Complexity(
        dlu,
        carafe,
        parameters_saved=1 - dlu.parameters / carafe.parameters,
        flops_saved=1 - dlu.flops / carafe.flops,
        flops_saved_with_interpolation=1 - (dlu.flops + dlu.interpolation_flops) / carafe.flops,
    )


def _outputs(source: Sequence[int], scale_factor: int, output_size: Sequence[int] | None) -> int:
    """Values of what becomes of a (N, C, H, W) source."""
    n, c, h, w = source
    return n * c * math.prod(output_size or (scale_factor * h, scale_factor * w))


def reassembly_flops(
    features: Sequence[int], scale_factor: int, kernel_size: int, output_size: Sequence[int] | None = None
) -> int:
    """Of (N, C, H, W) features: a multiply-add for each tap of an output value."""
    return 2 * kernel_size**2 * _outputs(features, scale_factor, output_size)


def interpolation_flops(
    kernel_space: Sequence[int], scale_factor: int, output_size: Sequence[int] | None = None
) -> int:
    """Of (N, G*k*k, H, W) kernels: four products and three additions for each tap of an output pixel."""
    return 7 * _outputs(kernel_space, scale_factor, output_size)


def interpolation_adjoint_flops(
    kernel_space: Sequence[int], scale_factor: int, output_size: Sequence[int] | None = None
) -> int:
    """From the gradient of sampled kernels to that of the kernel space, or as many to that of the offsets."""
    return 8 * _outputs(kernel_space, scale_factor, output_size)


def class_activation_flops(gradients: Sequence[int], method: str) -> int:
    """Of (N, K, C, h, w) gradients: multiply-adds into the map, and into weights that are sums of products."""
    return CAM_FLOPS[method] * math.prod(gradients)


def weighted_activation_flops(activations: Sequence[int], weights: Sequence[int]) -> int:
    """Of (N, C, h, w) activations and (N, K, C) weights: multiply-adds into the map."""
    return 2 * math.prod(weights) * math.prod(activations[2:])
