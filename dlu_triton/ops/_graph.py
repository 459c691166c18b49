"""The upsampling operators in few ATen operators, each of which is one of ONNX: what `torch.onnx.export` is given.

The twins of `dlu_triton.reference` are as many multiply-adds as a kernel has taps. Here the windows of k*k source
pixels are one convolution with the identity, the sums of all outputs of a source pixel one matrix product, and sampling
is `grid_sample`. That builds the unfolded tensor. bench/NOTES.md has the forms that were measured beside this one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _launch


def exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export` is tracing the call; in eager code this is the look at one flag.

    Not where it falls back on Dynamo, which takes `is_in_onnx_export` for False.
    """
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """See `dlu_triton.carafe`."""
    _checks.carafe(features, masks, kernel_size, group_size, scale_factor)
    kernels = _beside(F.pixel_unshuffle(masks, scale_factor), group_size, kernel_size, scale_factor)
    return _reassemble(features, kernels, group_size, scale_factor)


def carafe_upsample(
    features: Tensor, logits: Tensor, scale_factor: int, kernel_size: int = 5, groups: int = 1
) -> Tensor:
    """See `dlu_triton.carafe_upsample`."""
    _checks.carafe_upsample(features, logits, scale_factor, kernel_size, groups)
    kernels = _beside(logits, groups, kernel_size, scale_factor).softmax(dim=1)
    return _reassemble(features, kernels, groups, scale_factor)


def expand_kernels(
    kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int = 5, groups: int = 1
) -> Tensor:
    """See `dlu_triton.expand_kernels`."""
    _checks.expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups)
    n, c, h, w = kernel_space.shape
    kernels = _sample(kernel_space, offsets, scale_factor, kernel_size, groups)
    return F.pixel_shuffle(kernels.reshape(n, c * scale_factor**2, h, w), scale_factor).to(kernel_space.dtype)


def dlu_upsample(
    features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int = 5, groups: int = 1
) -> Tensor:
    """See `dlu_triton.dlu_upsample`."""
    _checks.dlu_upsample(features, kernel_space, offsets, scale_factor, kernel_size, groups)
    kernels = _sample(kernel_space, offsets, scale_factor, kernel_size, groups)
    return _reassemble(features, kernels, groups, scale_factor)


def _beside(channels: Tensor, groups: int, kernel_size: int, scale_factor: int) -> Tensor:
    """(N, G*k*k*s*s, H, W) -> (N*G, k*k, s*s, H, W), float32 at least: the kernels of a source pixel's outputs."""
    n, _, h, w = channels.shape
    wide = channels.to(_launch.sum_dtype(channels.dtype))
    return wide.reshape(n * groups, kernel_size**2, scale_factor**2, h, w)


def _sample(kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int, groups: int) -> Tensor:
    """Softmax, then a bilinear sample at the offsets: (N*G, k*k, s*s, H, W), float32 at least."""
    n, _, h, w = kernel_space.shape
    dtype = _launch.sum_dtype(kernel_space.dtype)
    space = kernel_space.to(dtype).reshape(n * groups, kernel_size**2, h, w).softmax(dim=1)
    shifts = offsets.to(dtype).reshape(n * groups, 2, scale_factor**2, h, w).permute(0, 2, 3, 4, 1)
    dx, dy = shifts.split(1, dim=-1)  # (N*G, s*s, H, W, 1)
    columns = torch.arange(0.5, w, dtype=dtype, device=offsets.device)[:, None]
    rows = torch.arange(0.5, h, dtype=dtype, device=offsets.device)[:, None, None]
    # -1 and 1 are the edges of the image: between its outermost pixels a side of one pixel would divide by zero.
    grid = torch.cat(((dx + columns) * (2 / w), (dy + rows) * (2 / h)), dim=-1) - 1
    sampled = F.grid_sample(
        space, grid.reshape(n * groups, scale_factor**2 * h, w, 2), padding_mode="border", align_corners=False
    )
    return sampled.reshape(n * groups, kernel_size**2, scale_factor**2, h, w)


def _reassemble(features: Tensor, kernels: Tensor, groups: int, scale_factor: int) -> Tensor:
    """(N, C, H, W), (N*G, k*k, s*s, H, W) -> (N, C, s*H, s*W)"""
    n, c, h, w = features.shape
    taps = kernels.shape[1]
    k = math.isqrt(taps)
    pixels = features.to(kernels.dtype).reshape(n * groups, c // groups, h, w).permute(0, 2, 3, 1)
    identity = torch.eye(taps, dtype=kernels.dtype, device=kernels.device).view(taps, 1, k, k, 1)
    windows = F.conv3d(pixels.unsqueeze(1), identity, padding=(k // 2, k // 2, 0))  # (N*G, k*k, H, W, C/G)
    sums = kernels.permute(0, 3, 4, 2, 1) @ windows.permute(0, 2, 3, 1, 4)  # (N*G, H, W, s*s, C/G)
    beside = sums.permute(0, 4, 3, 1, 2).reshape(n, c * scale_factor**2, h, w)
    return F.pixel_shuffle(beside, scale_factor).to(features.dtype)
