"""Other ways to upsample, for one channel group: rivals of the operators, not references.

All are functions of tensors, scale factor and kernel size. `shifted` is written for `torch.compile`, which fuses its
multiply-adds into one kernel; `unfold` multiplies masks and the k*k neighbours of each source pixel; `nearest_unfold`
is what most code bases copy, and builds k*k copies of the upsampled features. Their masks of DLU come from
`F.grid_sample`. Of mmcv its CUDA op runs, as mmcv 2.2 has it.
"""

import torch
import torch.nn.functional as F
from cases import DYSAMPLE_GROUPS
from libraries import library
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------
# CARAFE with given masks
# ---------------------------------------------------------------------------------------------------------------


def shifted_carafe(features: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    """Sum of k*k shifted copies of the features, each times its tap, in float32 at least; keeps the layout."""
    h, w = features.shape[2:]
    r, wide = kernel_size // 2, torch.promote_types(features.dtype, torch.float32)
    channels_last = features.is_contiguous(memory_format=torch.channels_last)
    # (N, C, H, W, 1) or (N, 1, H, W, C): Inductor writes in the order of the axes, so an order for each layout.
    features = features.permute(0, 2, 3, 1).unsqueeze(1) if channels_last else features.unsqueeze(4)
    padded = F.pad(features, (0, 0, r, r, r, r)).to(wide)
    # H, scale, W, scale repeat a source pixel by broadcasting: its gradient is a plain sum, no scatter.
    taps = _by_source(masks.to(wide), scale_factor).unbind(1)
    output = None
    for t, tap in enumerate(taps):  # (N, H, scale, W, scale)
        u, v = divmod(t, kernel_size)
        product = padded[:, :, u : u + h, None, v : v + w, None] * tap[:, None, ..., None]
        output = product if output is None else output + product
    output = output.to(features.dtype).flatten(4, 5).flatten(2, 3)
    return output.squeeze(1).permute(0, 3, 1, 2) if channels_last else output.squeeze(4)


def unfold_carafe(features: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    """Neighbours stay at low resolution: outputs of a source pixel are two more axes of its masks."""
    output = torch.einsum("nckhw,nkhiwj->nchiwj", _neighbours(features, kernel_size), _by_source(masks, scale_factor))
    return output.flatten(4, 5).flatten(2, 3)


def nearest_unfold_carafe(features: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    neighbours = _neighbours(features, kernel_size).flatten(1, 2)
    neighbours = F.interpolate(neighbours, scale_factor=scale_factor, mode="nearest")
    return torch.einsum("nckhw,nkhw->nchw", neighbours.unflatten(1, (features.shape[1], -1)), masks)


def mmcv_carafe(features: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    """mmcv takes tensors of another layout for contiguous ones, so these are copied."""
    carafe = library("mmcv.ops").carafe
    return contiguous_gradient(carafe(features.contiguous(), masks.contiguous(), kernel_size, 1, scale_factor))


def contiguous_gradient(output: Tensor) -> Tensor:
    """Of an output of mmcv, whose backward pass takes any gradient for a contiguous one."""
    if output.requires_grad:
        output.register_hook(Tensor.contiguous)
    return output


def _by_source(masks: Tensor, scale_factor: int) -> Tensor:
    """(N, k*k, scale*H, scale*W) -> (N, k*k, H, scale, W, scale), a view"""
    return masks.unflatten(3, (-1, scale_factor)).unflatten(2, (-1, scale_factor))


def _neighbours(features: Tensor, kernel_size: int) -> Tensor:
    """(N, C, H, W) -> (N, C, k*k, H, W), zeros outside the image"""
    c, h, w = features.shape[1:]
    return F.unfold(features, kernel_size, padding=kernel_size // 2).unflatten(2, (h, w)).unflatten(1, (c, -1))


# ---------------------------------------------------------------------------------------------------------------
# CARAFE with the output of its encoder
# ---------------------------------------------------------------------------------------------------------------


def shifted_carafe_upsample(features: Tensor, logits: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return shifted_carafe(features, _normalized(logits, scale_factor), scale_factor, kernel_size)


def unfold_carafe_upsample(features: Tensor, logits: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return unfold_carafe(features, _normalized(logits, scale_factor), scale_factor, kernel_size)


def nearest_unfold_carafe_upsample(features: Tensor, logits: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return nearest_unfold_carafe(features, _normalized(logits, scale_factor), scale_factor, kernel_size)


def mmcv_carafe_upsample(features: Tensor, logits: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return mmcv_carafe(features, _normalized(logits, scale_factor), scale_factor, kernel_size)


def _normalized(logits: Tensor, scale_factor: int) -> Tensor:
    """Masks (N, k*k, scale*H, scale*W) of one group, in the type of the logits, as mmcv's `CARAFEPack` makes them."""
    return F.pixel_shuffle(logits, scale_factor).softmax(dim=1)


# ---------------------------------------------------------------------------------------------------------------
# DLU
# ---------------------------------------------------------------------------------------------------------------


def shifted_dlu(features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    masks = sampled_masks(kernel_space, offsets, scale_factor, kernel_size)
    return shifted_carafe(features, masks, scale_factor, kernel_size)


def unfold_dlu(features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    masks = sampled_masks(kernel_space, offsets, scale_factor, kernel_size)
    return unfold_carafe(features, masks, scale_factor, kernel_size)


def nearest_unfold_dlu(
    features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int
) -> Tensor:
    masks = sampled_masks(kernel_space, offsets, scale_factor, kernel_size)
    return nearest_unfold_carafe(features, masks, scale_factor, kernel_size)


def official_dlu(
    features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int
) -> Tensor:
    masks = official_masks(kernel_space, offsets, scale_factor, kernel_size)
    return mmcv_carafe(features, masks, scale_factor, kernel_size)


def sampled_masks(kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    """Masks (N, k*k, scale*H, scale*W) in the type of kernel_space; coordinates and sums in float32 at least."""
    h, w = kernel_space.shape[2:]
    wide = torch.promote_types(kernel_space.dtype, torch.float32)
    dx, dy = F.pixel_shuffle(offsets.to(wide), scale_factor).unbind(1)  # (N, scale*H, scale*W), in source pixels
    x = dx + torch.arange(scale_factor * w, device=dx.device) // scale_factor
    y = dy + (torch.arange(scale_factor * h, device=dy.device) // scale_factor)[:, None]
    grid = torch.stack((2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1), dim=-1)
    space = kernel_space.to(wide).softmax(dim=1)
    masks = F.grid_sample(space, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return masks.to(kernel_space.dtype)


def official_masks(kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    """As the official module makes them: of a float32 grid that comes from the host each time, in one type only."""
    h, w = kernel_space.shape[2:]
    shifts = F.pixel_shuffle(offsets, scale_factor).permute(0, 2, 3, 1)
    for axis, size in enumerate((w, h)):
        shifts[..., axis] *= 2 / (size - 1)
    x, y = (torch.linspace(-1, 1, size).repeat_interleave(scale_factor) for size in (w, h))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(kernel_space.device)
    return F.grid_sample(kernel_space.softmax(dim=1), grid + shifts, padding_mode="border", align_corners=True)


# ---------------------------------------------------------------------------------------------------------------
# Other mathematics, for context
# ---------------------------------------------------------------------------------------------------------------


def copy(source: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return source.clone()


def bilinear(features: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return F.interpolate(features, scale_factor=scale_factor, mode="bilinear", align_corners=False)


def nearest(features: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return F.interpolate(features, scale_factor=scale_factor, mode="nearest")


def dysample(features: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    """DySample (arXiv 2308.15085): each output samples the features of its group once, bilinearly, at an offset.

    Sampled in float32 at least, as under autocast: in half precision coordinates are off by whole pixels.
    """
    n, c, h, w = features.shape
    wide = torch.promote_types(features.dtype, torch.float32)
    shifts = F.pixel_shuffle(offsets.to(wide), scale_factor).unflatten(1, (DYSAMPLE_GROUPS, 2)).flatten(0, 1)
    dx, dy = shifts.unbind(1)  # (N * groups, scale*H, scale*W), in source pixels
    x = dx + torch.arange(scale_factor * w, device=dx.device) // scale_factor
    y = dy + (torch.arange(scale_factor * h, device=dy.device) // scale_factor)[:, None]
    grid = torch.stack(((2 * x + 1) / w - 1, (2 * y + 1) / h - 1), dim=-1)
    groups = features.to(wide).reshape(n * DYSAMPLE_GROUPS, -1, h, w)
    sampled = F.grid_sample(groups, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.view(n, c, scale_factor * h, scale_factor * w).to(features.dtype)
