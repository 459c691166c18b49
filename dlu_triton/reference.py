"""Eager twins of the operators: the definition, in plain PyTorch.

Differentiable by autograd, runnable in float64, and the path that CPU tensors take. The unfolded tensor is never
built: reassembly is k*k shifted multiply-adds, so memory stays at a few times output and masks. Softmax, sampling and
sums run in float32 at least; masks and output are rounded to half precision once each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks

__all__ = ["carafe", "dlu_upsample", "expand_kernels"]


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """See `dlu_triton.carafe`.

    out[c, i, j] = sum over u, v in -r..r of masks[g(c), (u + r) * k + v + r, i, j] * features[c, i//s + u, j//s + v]
    """
    _checks.carafe(features, masks, kernel_size, group_size, scale_factor)
    _, c, h, w = features.shape
    k, s, g = kernel_size, scale_factor, group_size
    wide = _wide(features.dtype)
    nearest = F.interpolate(F.pad(features.to(wide), [k // 2] * 4), scale_factor=s)  # zeros outside the image
    nearest = nearest.unflatten(1, (g, c // g))  # (N, G, C/G, s*(H + 2r), s*(W + 2r))
    taps = masks.to(wide).unflatten(1, (g, 1, k * k)).unbind(3)  # k*k of (N, G, 1, s*H, s*W)
    output = None
    for u in range(k):
        for v in range(k):
            shifted = nearest[..., s * u : s * (u + h), s * v : s * (v + w)]
            tap = taps[u * k + v]
            output = shifted * tap if output is None else output.addcmul_(shifted, tap)
    return output.flatten(1, 2).to(features.dtype)


def expand_kernels(
    kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int = 5, groups: int = 1
) -> Tensor:
    """See `dlu_triton.expand_kernels`.

    Softmax over the taps at low resolution, then a bilinear sample at (j//s + dx, i//s + dy), clamped to the image.
    """
    _checks.expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups)
    n, _, h, w = kernel_space.shape
    k, s, g = kernel_size, scale_factor, groups
    wide = _wide(kernel_space.dtype)
    space = kernel_space.to(wide).unflatten(1, (g, k * k)).softmax(dim=2).flatten(3)  # (N, G, k*k, H*W)
    shifts = pixel_shuffle(offsets.to(wide), s).unflatten(1, (g, 2))
    dx, dy = shifts.unbind(2)  # (N, G, s*H, s*W), in source pixels
    x0, x1, fx = _cells(dx + torch.arange(s * w, device=dx.device) // s, w)
    y0, y1, fy = _cells(dy + (torch.arange(s * h, device=dy.device) // s)[:, None], h)

    def corner(y: Tensor, x: Tensor) -> Tensor:  # (N, G, k*k, s*H*s*W)
        cells = (y * w + x).flatten(2).unsqueeze(2)
        return space.gather(3, cells.expand(-1, -1, k * k, -1))

    def weight(wy: Tensor, wx: Tensor) -> Tensor:  # (N, G, 1, s*H*s*W)
        return (wy * wx).flatten(2).unsqueeze(2)

    masks = corner(y0, x0) * weight(1 - fy, 1 - fx)
    masks = masks.addcmul_(corner(y0, x1), weight(1 - fy, fx))
    masks = masks.addcmul_(corner(y1, x0), weight(fy, 1 - fx))
    masks = masks.addcmul_(corner(y1, x1), weight(fy, fx))
    return masks.view(n, g * k * k, s * h, s * w).to(kernel_space.dtype)


def dlu_upsample(
    features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int = 5, groups: int = 1
) -> Tensor:
    """See `dlu_triton.dlu_upsample`."""
    _checks.dlu_upsample(features, kernel_space, offsets, scale_factor, kernel_size, groups)
    masks = expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups)
    return carafe(features, masks, kernel_size, groups, scale_factor)


def pixel_shuffle(x: Tensor, scale_factor: int) -> Tensor:
    """(N, C*s^2, H, W) -> (N, C, s*H, s*W), as `F.pixel_shuffle`, whose backward fails on an empty batch."""
    x = x.unflatten(1, (x.shape[1] // scale_factor**2, scale_factor, scale_factor))
    return x.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and coordinates: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _cells(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell below, cell above and fraction of a coordinate, held to the image.

    A coordinate at or beyond the border stays there and has no gradient. NaN addresses cell 0 with a NaN fraction.
    """
    inside = (position > 0) & (position < size - 1)
    clamped = torch.where(inside, position, position.detach().clamp(0, size - 1))
    low = clamped.detach().nan_to_num().floor()
    cell = low.long()
    return cell, (cell + 1).clamp(max=size - 1), clamped - low
