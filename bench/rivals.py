"""The usual ways to write the operators in PyTorch, for one channel group: rivals, not references.

Both take their masks from `F.grid_sample`. `shifted` is written for `torch.compile`, which fuses its multiply-adds
into one kernel; `unfold` is what most code bases copy, and builds k*k copies of the upsampled features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted_dlu(features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    masks = _sampled_masks(kernel_space, offsets, scale_factor)
    return shifted_carafe(features, masks, scale_factor, kernel_size)


def shifted_carafe(features: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    """Sum of k*k shifted copies of the features, each times its tap, in float32 at least; keeps the layout."""
    h, w = features.shape[2:]
    r, wide = kernel_size // 2, torch.promote_types(features.dtype, torch.float32)
    channels_last = features.is_contiguous(memory_format=torch.channels_last)
    # (N, C, H, W, 1) or (N, 1, H, W, C): Inductor writes in the order of the axes, so an order for each layout.
    features = features.permute(0, 2, 3, 1).unsqueeze(1) if channels_last else features.unsqueeze(4)
    padded = F.pad(features, (0, 0, r, r, r, r)).to(wide)
    # H, scale, W, scale repeat a source pixel by broadcasting: its gradient is a plain sum, no scatter.
    taps = masks.to(wide).unflatten(3, (w, scale_factor)).unflatten(2, (h, scale_factor)).unbind(1)
    output = None
    for t, tap in enumerate(taps):  # (N, H, scale, W, scale)
        u, v = divmod(t, kernel_size)
        product = padded[:, :, u : u + h, None, v : v + w, None] * tap[:, None, ..., None]
        output = product if output is None else output + product
    output = output.to(features.dtype).flatten(4, 5).flatten(2, 3)
    return output.squeeze(1).permute(0, 3, 1, 2) if channels_last else output.squeeze(4)


def unfold_dlu(features: Tensor, kernel_space: Tensor, offsets: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    masks = _sampled_masks(kernel_space, offsets, scale_factor)
    return unfold_carafe(features, masks, scale_factor, kernel_size)


def unfold_carafe(features: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    c, h, w = features.shape[1:]
    neighbours = F.unfold(features, kernel_size, padding=kernel_size // 2).unflatten(2, (h, w))  # (N, C*k*k, H, W)
    neighbours = F.interpolate(neighbours, scale_factor=scale_factor, mode="nearest").unflatten(1, (c, -1))
    return torch.einsum("nckhw,nkhw->nchw", neighbours, masks)


def _sampled_masks(kernel_space: Tensor, offsets: Tensor, scale_factor: int) -> Tensor:
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
