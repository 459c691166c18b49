"""Eager twins of the operators: the definition, in plain PyTorch.

Differentiable by autograd, runnable in float64, and the path that CPU tensors take. The unfolded tensor is never
built: reassembly is k*k shifted multiply-adds, so memory stays at a few times output and masks. Softmax, sampling and
sums run in float32 at least; masks and output are rounded to half precision once each.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks

__all__ = [
    "CAMParts",
    "carafe",
    "carafe_upsample",
    "class_activation_map",
    "class_activation_parts",
    "dlu_upsample",
    "expand_kernels",
    "weighted_activation_map",
    "xgrad_cam",
]


def carafe(
    features: Tensor,
    masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """See `dlu_triton.carafe`.

    In short::

        out[c, i, j] = sum over u, v in -r..r of
                       masks[g(c), (u + r) * k + v + r, i, j] * features[c, i//s + u, j//s + v]
    """
    _checks.carafe(features, masks, kernel_size, group_size, scale_factor, output_size)
    c, (h, w) = features.shape[1], masks.shape[2:]
    k, s, g = kernel_size, scale_factor, group_size
    wide = _wide(features.dtype)
    nearest = F.interpolate(F.pad(features.to(wide), [k // 2] * 4), scale_factor=s)  # zeros outside the image
    nearest = nearest.unflatten(1, (g, c // g))  # (N, G, C/G, s*(H + 2r), s*(W + 2r))
    taps = masks.to(wide).unflatten(1, (g, 1, k * k)).unbind(3)  # k*k of (N, G, 1, s*H, s*W)
    output = None
    for u in range(k):
        for v in range(k):
            shifted = nearest[..., s * u : s * u + h, s * v : s * v + w]
            tap = taps[u * k + v]
            output = shifted * tap if output is None else _plus_product(output, shifted, tap)
    return output.flatten(1, 2).to(features.dtype)


def carafe_upsample(
    features: Tensor,
    logits: Tensor,
    scale_factor: int,
    kernel_size: int = 5,
    groups: int = 1,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """See `dlu_triton.carafe_upsample`."""
    *_, size = _checks.carafe_upsample(features, logits, scale_factor, kernel_size, groups, output_size)
    shuffled = cut(pixel_shuffle(logits, scale_factor), size).unflatten(1, (groups, kernel_size**2))
    masks = shuffled.to(_wide(logits.dtype)).softmax(dim=2).to(logits.dtype).flatten(1, 2)
    return carafe(features, masks, kernel_size, groups, scale_factor, output_size)


def expand_kernels(
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int = 5,
    groups: int = 1,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """See `dlu_triton.expand_kernels`.

    Softmax over the taps at low resolution, then a bilinear sample at (j//s + dx, i//s + dy), clamped to the image.
    """
    *_, size = _checks.expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups, output_size)
    n, _, h, w = kernel_space.shape
    k, s, g = kernel_size, scale_factor, groups
    wide = _wide(kernel_space.dtype)
    space = kernel_space.to(wide).unflatten(1, (g, k * k)).softmax(dim=2).flatten(3)  # (N, G, k*k, H*W)
    shifts = cut(pixel_shuffle(offsets.to(wide), s), size).unflatten(1, (g, 2))
    dx, dy = shifts.unbind(2)  # (N, G, s*H, s*W), in source pixels
    rows, cols = dx.shape[2:]
    x0, x1, fx = cells(dx + torch.arange(cols, device=dx.device) // s, w)
    y0, y1, fy = cells(dy + (torch.arange(rows, device=dy.device) // s)[:, None], h)

    def corner(y: Tensor, x: Tensor) -> Tensor:  # (N, G, k*k, s*H*s*W)
        index = (y * w + x).flatten(2).unsqueeze(2)
        return space.gather(3, index.expand(-1, -1, k * k, -1))

    def weight(wy: Tensor, wx: Tensor) -> Tensor:  # (N, G, 1, s*H*s*W)
        return (wy * wx).flatten(2).unsqueeze(2)

    masks = corner(y0, x0) * weight(1 - fy, 1 - fx)
    masks = _plus_product(masks, corner(y0, x1), weight(1 - fy, fx))
    masks = _plus_product(masks, corner(y1, x0), weight(fy, 1 - fx))
    masks = _plus_product(masks, corner(y1, x1), weight(fy, fx))
    return masks.view(n, g * k * k, rows, cols).to(kernel_space.dtype)


def dlu_upsample(
    features: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int = 5,
    groups: int = 1,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """See `dlu_triton.dlu_upsample`."""
    _checks.dlu_upsample(features, kernel_space, offsets, scale_factor, kernel_size, groups, output_size)
    masks = expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups, output_size)
    return carafe(features, masks, kernel_size, groups, scale_factor, output_size)


class CAMParts(NamedTuple):
    """Class activation maps and what their pass over the activations knows besides; K only for K maps an image."""

    map: Tensor  #: (N, [K,] H, W)
    raw: Tensor  #: (N, [K,] h, w), signed, before ReLU, resize and normalisation
    weights: Tensor | None  #: (N, [K,] C); None for methods that weigh every pixel
    contributions: Tensor  #: (N, [K,] C), the sum over the pixels of each channel's share of `raw`
    cancellation: Tensor  #: (N, C), `|sum of A| / sum of |A|`, 1 without cancellation, and for a dead channel


def class_activation_parts(
    activations: Tensor,
    gradients: Tensor,
    method: str = "xgradcam",
    eps: float = 1e-6,
    relu: bool = True,
    size: int | tuple[int, int] | None = None,
    normalize: bool = False,
) -> CAMParts:
    """See `dlu_triton.class_activation_parts`."""
    eps = _checks.class_activation_map(activations, gradients, method, eps, relu, size, normalize)
    wide = _wide(activations.dtype)
    a = activations.to(wide).unsqueeze(1)  # (N, 1, C, h, w)
    g = (gradients.unsqueeze(1) if gradients.dim() == 4 else gradients).to(wide)  # (N, K, C, h, w)
    total = a.sum((3, 4))  # (N, 1, C)
    weights = None
    if method in _checks.WEIGHING_METHODS:
        weights = _channel_weights(a, g, total, method, eps)  # (N, K, C)
        raw = _weighted_sum(activations, weights)
        contributions = weights * total
    else:
        shares = {"hirescam": g * a, "layercam": g.relu() * a, "elementwise": (g * a).relu()}[method]
        raw, contributions = shares.sum(2), shares.sum((3, 4))
    parts = CAMParts(finish(raw, relu, size, normalize), raw, weights, contributions, cancellation(activations))
    return parts if gradients.dim() == 5 else one_map(parts)


def class_activation_map(
    activations: Tensor,
    gradients: Tensor,
    method: str = "xgradcam",
    eps: float = 1e-6,
    relu: bool = True,
    size: int | tuple[int, int] | None = None,
    normalize: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `dlu_triton.class_activation_map`."""
    eps = _checks.class_activation_map(activations, gradients, method, eps, relu, size, normalize, return_weights)
    parts = class_activation_parts(activations, gradients, method, eps, relu, size, normalize)
    return (parts.map, parts.weights) if return_weights else parts.map


def xgrad_cam(
    activations: Tensor,
    gradients: Tensor,
    eps: float = 1e-6,
    relu: bool = True,
    size: int | tuple[int, int] | None = None,
    normalize: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `dlu_triton.xgrad_cam`."""
    return class_activation_map(activations, gradients, "xgradcam", eps, relu, size, normalize, return_weights)


def weighted_activation_map(
    activations: Tensor,
    weights: Tensor,
    relu: bool = True,
    size: int | tuple[int, int] | None = None,
    normalize: bool = False,
) -> Tensor:
    """See `dlu_triton.weighted_activation_map`."""
    _checks.weighted_activation_map(activations, weights, relu, size, normalize)
    raw = _weighted_sum(activations, weights.unsqueeze(1) if weights.dim() == 2 else weights)
    cam = finish(raw, relu, size, normalize)
    return cam if weights.dim() == 3 else cam.squeeze(1)


def cancellation(activations: Tensor) -> Tensor:
    """|sum of A| / sum of |A| of each channel: (N, C, h, w) -> (N, C); 1 for a dead channel."""
    a = activations.to(_wide(activations.dtype))
    magnitude = a.abs().sum((2, 3))
    return torch.where(magnitude == 0, 1, _ratio(a.sum((2, 3)).abs(), magnitude))


def one_map(parts: CAMParts) -> CAMParts:
    """(N, 1, ...) -> (N, ...)"""
    *per_map, cancellation = parts
    return CAMParts(*(None if part is None else part.squeeze(1) for part in per_map), cancellation)


def _channel_weights(a: Tensor, g: Tensor, total: Tensor, method: str, eps: float) -> Tensor:
    """(N, 1, C, h, w), (N, K, C, h, w), (N, 1, C) -> (N, K, C)"""
    if method == "xgradcam":
        return _ratio((g * a).sum((3, 4)), total + eps)
    if method == "gradcam":
        return g.mean((3, 4))
    square = g * g
    cubes = (total[..., None, None] * square * g).masked_fill(square == 0, 0)  # also where the plane is infinite
    return (g.relu() * _ratio(square, 2 * square + cubes + eps)).sum((3, 4))


def _weighted_sum(activations: Tensor, weights: Tensor) -> Tensor:
    """Sum over the channels of weights (N, K, C) times activations (N, C, h, w): (N, K, h, w)."""
    wide, device = _wide(activations.dtype), activations.device.type
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)  # which torch 2.9 does not trace
    with (
        torch.autocast(device, enabled=False) if available else contextlib.nullcontext()
    ):  # it would narrow the product
        return (weights.to(wide) @ activations.to(wide).flatten(2)).unflatten(2, activations.shape[2:])


def finish(raw: Tensor, relu: bool, size: int | tuple[int, int] | None, normalize: bool) -> Tensor:
    """ReLU, bilinear resize with half-pixel centres, then (map - min) / (max - min), and zeros where max = min."""
    cam = raw.relu() if relu else raw
    span = cam.amax((2, 3), keepdim=True) - cam.amin((2, 3), keepdim=True)
    constant = span == 0  # exactly, unlike a resized constant; not where all is infinite
    if size is not None:
        flat = cam.flatten(0, 1).unsqueeze(1)
        flat = F.interpolate(flat, size=_checks.map_size(size), mode="bilinear", align_corners=False)
        cam = flat.squeeze(1).unflatten(0, raw.shape[:2])
    if normalize:
        low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
        cam = _ratio(cam - low, (high - low).masked_fill(constant, 0))
    return cam


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and zero where the denominator is zero; so is its gradient there."""
    none = denominator == 0
    return (numerator / denominator.masked_fill(none, math.inf)).masked_fill(none, 0)  # also of what is not finite


def pixel_shuffle(x: Tensor, scale_factor: int) -> Tensor:
    """(N, C*s^2, H, W) -> (N, C, s*H, s*W), as `F.pixel_shuffle`, whose backward fails on an empty batch."""
    x = x.unflatten(1, (x.shape[1] // scale_factor**2, scale_factor, scale_factor))
    return x.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def cut(x: Tensor, output_size: Sequence[int] | None) -> Tensor:
    """The first rows and columns, of the size that is given; or all."""
    return x if output_size is None else x[..., : output_size[0], : output_size[1]]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and coordinates: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _plus_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a * b: in place, a fifth faster, unless a compiler or vmap, which has no rule for it, takes it apart."""
    taken_apart = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return total.addcmul(a, b) if taken_apart else total.addcmul_(a, b)


def cells(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell below, cell above and fraction of a coordinate, held to the image.

    A coordinate at or beyond the border stays there and has no gradient. NaN addresses cell 0 with a NaN fraction.
    """
    inside = (position > 0) & (position < size - 1)
    clamped = torch.where(inside, position, position.detach().clamp(0, size - 1))
    low = clamped.detach().nan_to_num().floor()
    cell = low.long().clamp(max=size - 1)  # float32 rounds sizes beyond 2^24, perhaps up
    return cell, (cell + 1).clamp(max=size - 1), clamped - low
