"""The upsamplers in a few ATen operators: what compilers on a CPU, `torch.export` there, and ONNX are given.

The twins of `dlu_triton.reference` are as many multiply-adds as a kernel has taps, and gather: large graphs, minutes of
compilation, and scatters that Inductor of torch 2.13 gets wrong on CPUs with several threads (pytorch#191837). Here
sampling is `grid_sample`, of the four corners one by one for the derivative's sake. For a compiler, reassembly is one
sum of products over a view of all windows, which it fuses, so that nothing is unfolded; in an exported program, which
may run operator by operator, the windows are one convolution with the identity and the sums one matrix product, which
ONNX has, on unfolded features. Arguments are checked already. bench/NOTES.md has the forms measured beside these.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _launch, reference


def carafe(
    features: Tensor,
    masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
    output_size: Sequence[int] | None,
) -> Tensor:
    """See `dlu_triton.carafe`."""
    if output_size is not None:
        sides = _sources(output_size, scale_factor) if _fused() else features.shape[2:]
        masks = _resized(masks, *(scale_factor * side for side in sides))
    kernels = _beside(F.pixel_unshuffle(masks, scale_factor), group_size, kernel_size, scale_factor)
    return _reassemble(features, kernels, group_size, scale_factor, output_size)


def carafe_upsample(
    features: Tensor,
    logits: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    output_size: Sequence[int] | None,
) -> Tensor:
    """See `dlu_triton.carafe_upsample`."""
    logits = _with_outputs(logits, output_size, scale_factor)
    kernels = _beside(logits, groups, kernel_size, scale_factor).softmax(dim=1)
    return _reassemble(features, kernels, groups, scale_factor, output_size)


def expand_kernels(
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    output_size: Sequence[int] | None,
) -> Tensor:
    """See `dlu_triton.expand_kernels`."""
    n, c, _, _ = kernel_space.shape
    offsets = _with_outputs(offsets, output_size, scale_factor)
    kernels = _sample(kernel_space, offsets, scale_factor, kernel_size, groups)
    masks = F.pixel_shuffle(kernels.reshape(n, c * scale_factor**2, *offsets.shape[2:]), scale_factor)
    return _laid_out_as(kernel_space, _cut(masks, output_size))


def dlu_upsample(
    features: Tensor,
    kernel_space: Tensor,
    offsets: Tensor,
    scale_factor: int,
    kernel_size: int,
    groups: int,
    output_size: Sequence[int] | None,
) -> Tensor:
    """See `dlu_triton.dlu_upsample`."""
    offsets = _with_outputs(offsets, output_size, scale_factor)
    kernels = _sample(kernel_space, offsets, scale_factor, kernel_size, groups)
    return _reassemble(features, kernels, groups, scale_factor, output_size)


def _beside(channels: Tensor, groups: int, kernel_size: int, scale_factor: int) -> Tensor:
    """(N, G*k*k*s*s, H, W) -> (N*G, k*k, s*s, H, W), float32 at least: the kernels of a source pixel's outputs."""
    n, _, h, w = channels.shape
    wide = channels.to(_launch.sum_dtype(channels.dtype))
    return wide.reshape(n * groups, kernel_size**2, scale_factor**2, h, w)


def _sample(kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int, groups: int) -> Tensor:
    """Softmax, then a bilinear sample at the offsets, which may be those of the first rows and columns alone:
    (N*G, k*k, s*s, H', W'), float32 at least."""
    n, _, h, w = kernel_space.shape
    rows, cols = offsets.shape[2:]
    s, dtype = scale_factor, _launch.sum_dtype(kernel_space.dtype)
    space = kernel_space.to(dtype).reshape(n * groups, kernel_size**2, h, w).softmax(dim=1)
    shifts = offsets.to(dtype).reshape(n * groups, 2, s * s, rows, cols).permute(0, 2, 3, 4, 1)
    dx, dy = shifts.split(1, dim=-1)  # (N*G, s*s, H', W', 1)
    if torch.onnx.is_in_onnx_export():
        # Fewer nodes, but coordinates are rounded: a kink of the derivative at a pixel would be missed.
        x = torch.arange(0.5, cols, dtype=dtype, device=offsets.device)[:, None]
        y = torch.arange(0.5, rows, dtype=dtype, device=offsets.device)[:, None, None]
        # -1 and 1 are the edges of the image: between its outermost pixels a side of one pixel would divide by zero.
        grid = torch.cat(((dx + x) * (2 / w), (dy + y) * (2 / h)), dim=-1) - 1
        grid = grid.reshape(n * groups, s * s * rows, cols, 2)
        sampled = F.grid_sample(space, grid, padding_mode="border", align_corners=False)
        return sampled.reshape(n * groups, kernel_size**2, s * s, rows, cols)
    x0, x1, fx = reference.cells(dx + torch.arange(cols, device=dx.device)[:, None], w)
    y0, y1, fy = reference.cells(dy + torch.arange(rows, device=dy.device)[:, None, None], h)
    x, y = torch.stack((x0, x1, x0, x1), dim=1), torch.stack((y0, y0, y1, y1), dim=1)  # (N*G, 4, s*s, H', W', 1)
    weights = torch.stack(((1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx), dim=1)
    centres = torch.cat(((2 * x + 1).to(dtype) / w, (2 * y + 1).to(dtype) / h), dim=-1) - 1
    corners = F.grid_sample(
        space, centres.reshape(n * groups, 4 * s * s * rows, cols, 2), mode="nearest", align_corners=False
    )
    corners = corners.reshape(n * groups, kernel_size**2, 4, s * s, rows, cols)
    return (corners * weights.reshape(n * groups, 1, 4, s * s, rows, cols)).sum(2)


def _reassemble(
    features: Tensor, kernels: Tensor, groups: int, scale_factor: int, output_size: Sequence[int] | None
) -> Tensor:
    """(N, C, H, W), (N*G, k*k, s*s, H', W') of the first rows and columns -> (N, C, s*H', s*W'), or of the size that is
    given."""
    n, c, _, _ = features.shape
    h, w = kernels.shape[3:]
    k, s = math.isqrt(kernels.shape[1]), scale_factor
    wide = features.to(kernels.dtype)
    if _fused():
        wide = F.pad(wide, [k // 2] * 4)
        if output_size is not None:  # no more than is read
            wide = _resized(wide, h + k - 1, w + k - 1)
        windows = wide.unfold(2, k, 1).unfold(3, k, 1)  # a view
        windows = windows.unflatten(1, (groups, c // groups))[:, :, :, :, None, :, None]
        taps = kernels.reshape(n, groups, 1, k, k, s, s, h, w).permute(0, 1, 2, 7, 5, 8, 6, 3, 4)
        sums = (windows * taps).sum((7, 8))  # (N, G, C/G, H, s, W, s)
        return _laid_out_as(features, _cut(sums.reshape(n, c, s * h, s * w), output_size))
    grouped = wide.reshape(n * groups, c // groups, h, w)
    identity = torch.eye(k * k, dtype=kernels.dtype, device=kernels.device).view(k * k, 1, k, k, 1)
    pixels = grouped.permute(0, 2, 3, 1).unsqueeze(1)
    windows = F.conv3d(pixels, identity, padding=(k // 2, k // 2, 0))  # (N*G, k*k, H, W, C/G)
    sums = kernels.permute(0, 3, 4, 2, 1) @ windows.permute(0, 2, 3, 1, 4)  # (N*G, H, W, s*s, C/G)
    beside = sums.permute(0, 4, 3, 1, 2).reshape(n, c * s**2, h, w)
    return _laid_out_as(features, _cut(F.pixel_shuffle(beside, s), output_size))


def _fused() -> bool:
    """Whether a compiler fuses what it is given. An exported program is to have few operators: it computes all, then
    cuts it."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _sources(output_size: Sequence[int], scale_factor: int) -> list[int]:
    """How many of the first rows and columns of the source have outputs."""
    return [(side + scale_factor - 1) // scale_factor for side in output_size]


def _with_outputs(x: Tensor, output_size: Sequence[int] | None, scale_factor: int) -> Tensor:
    """What the source pixels that have outputs say of them; where nothing is fused all."""
    return x if output_size is None or not _fused() else _resized(x, *_sources(output_size, scale_factor))


def _cut(x: Tensor, output_size: Sequence[int] | None) -> Tensor:
    """The first rows and columns; or all."""
    return x if output_size is None else _resized(x, *output_size)


def _resized(x: Tensor, rows: int, cols: int) -> Tensor:
    """The first rows and columns, or zeros after the last ones. A slice would tie a program to whether sizes are odd;
    padding by less than none does not."""
    return F.pad(x, [0, cols - x.shape[3], 0, rows - x.shape[2]])


def _laid_out_as(given: Tensor, result: Tensor) -> Tensor:
    """In type and memory format of what was given."""
    channels_last = _launch.channels_innermost(given)
    return result.to(given.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
