"""Argument rules, shared by the operators and their eager twins: every error names rule and received value."""

import operator

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_KERNEL_SIZE = 9
MAX_SCALE_FACTOR = 16


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as an int inside [low, high]."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bounds}, got {number}")
    return number


def odd(name: str, value: object, high: int | None = None) -> int:
    number = integer(name, value, 1, high)
    if number % 2 == 0:
        raise ValueError(f"{name} must be odd, got {number}")
    return number


def kernel_size(value: object, name: str = "kernel_size") -> int:
    return odd(name, value, MAX_KERNEL_SIZE)


def scale_factor(value: object, name: str = "scale_factor") -> int:
    return integer(name, value, 1, MAX_SCALE_FACTOR)


def channel_groups(name: str, value: object, channels: int) -> int:
    groups = integer(name, value, 1)
    if channels % groups:
        raise ValueError(f"{name} must divide the channels: {channels} channels, got {name} {groups}")
    return groups


def _map(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (N, C, H, W), got shape {tuple(value.shape)}")
    if 0 in value.shape[1:]:
        raise ValueError(f"{name} must have no empty dimension but the batch, got shape {tuple(value.shape)}")


def kernel_device(name: str, value: Tensor) -> None:
    """Kernels run on cuda and, interpreted, on cpu tensors."""
    if value.device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(
            f"{name} must be on a cuda or cpu device, got {value.device}; dlu_triton.reference runs on any device"
        )


def _beside(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")
    if (value.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"{name} must be float64 exactly when {other_name} is: {other_name} {other.dtype}, got {value.dtype}"
        )


def _shape(name: str, value: Tensor, rule: str, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {rule} = {expected}, got {tuple(value.shape)}")


def expand_kernels(kernel_space: Tensor, offsets: Tensor, scale: object, kernel: object, groups: object) -> None:
    """Rules of `expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups)`."""
    k, s, g = kernel_size(kernel), scale_factor(scale), integer("groups", groups, 1)
    _map("kernel_space", kernel_space)
    _map("offsets", offsets)
    _beside("offsets", offsets, "kernel_space", kernel_space)
    n, _, h, w = kernel_space.shape
    _shape("kernel_space", kernel_space, "(N, groups*kernel_size^2, H, W)", (n, g * k * k, h, w))
    _shape("offsets", offsets, "(N, 2*groups*scale_factor^2, H, W)", (n, 2 * g * s * s, h, w))


def dlu_upsample(
    features: Tensor, kernel_space: Tensor, offsets: Tensor, scale: object, kernel: object, groups: object
) -> None:
    """Rules of `dlu_upsample(features, kernel_space, offsets, scale_factor, kernel_size, groups)`."""
    k, s = kernel_size(kernel), scale_factor(scale)
    _map("features", features)
    _map("kernel_space", kernel_space)
    _map("offsets", offsets)
    _beside("kernel_space", kernel_space, "features", features)
    _beside("offsets", offsets, "features", features)
    n, c, h, w = features.shape
    g = channel_groups("groups", groups, c)
    _shape("kernel_space", kernel_space, "(N, groups*kernel_size^2, H, W)", (n, g * k * k, h, w))
    _shape("offsets", offsets, "(N, 2*groups*scale_factor^2, H, W)", (n, 2 * g * s * s, h, w))


def carafe(features: Tensor, masks: Tensor, kernel: object, groups: object, scale: object) -> None:
    """Rules of `carafe(features, masks, kernel_size, group_size, scale_factor)`."""
    k, s = kernel_size(kernel), scale_factor(scale)
    _map("features", features)
    _map("masks", masks)
    _beside("masks", masks, "features", features)
    n, c, h, w = features.shape
    g = channel_groups("group_size", groups, c)
    rule = "(N, group_size*kernel_size^2, scale_factor*H, scale_factor*W)"
    _shape("masks", masks, rule, (n, g * k * k, s * h, s * w))
