"""Argument rules, shared by the operators and their eager twins: every error names rule and received value."""

import math
import numbers
import operator
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
MAX_KERNEL_SIZE = 9
MAX_SCALE_FACTOR = 16
MAX_SIZE = 2**31 - 2**12  # kernels number channels, rows and columns, and a block beyond, in 32 bits
MAX_MAP_PIXELS = MAX_SIZE  # of one plane or map of class activation maps, likewise
MAX_PROGRAMS = 2**31 - 1
WEIGHING_METHODS = ("xgradcam", "gradcam", "gradcam++")  # one weight per channel
CAM_METHODS = (*WEIGHING_METHODS, "hirescam", "layercam", "elementwise")
LAYOUTS = ("NCHW", "NHWC", "NTC")  # of a layer's output

Sizes = tuple[int, int, int, tuple[int, int] | None]  # three integers as operators take them, and the output's size


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


def output_size(value: object, scale: int, source: Tensor) -> tuple[int, int] | None:
    """None, or the height and width of what becomes of a (N, C, H, W) source; sizes may be symbols."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"output_size must be a pair (height, width) or None, got {value!r}")
    if len(value) != 2:
        raise ValueError(f"output_size must be a pair (height, width), got {tuple(value)}")
    sizes = (int, torch.SymInt)  # `integer` would tie a traced program to a number
    height, width = (
        side if isinstance(side, sizes) and not isinstance(side, bool) else integer("output_size", side, 1)
        for side in value
    )
    h, w = source.shape[2:]
    if not (1 <= height <= scale * h and 1 <= width <= scale * w):
        raise ValueError(
            f"output_size must be from (1, 1) to scale_factor*(H, W) = {(scale * h, scale * w)}, got {(height, width)}"
        )
    if max(scale * h, scale * w) > MAX_SIZE:  # kernels number what is cut off too
        raise ValueError(
            f"maps must have at most {MAX_SIZE} rows and columns, upsampled ones too, before they are cut, "
            f"got scale_factor*(H, W) = {(scale * h, scale * w)}"
        )
    return height, width


def channel_groups(name: str, value: object, channels: int) -> int:
    groups = integer(name, value, 1)
    if channels % groups:
        raise ValueError(f"{name} must divide the channels: {channels} channels, got {name} {groups}")
    return groups


def pack(
    channels: object, scale: object, kernel: object, groups: object, encoder_kernel: object, compressed: object
) -> tuple[int, int, int, int, int, int]:
    """Rules that `complexity` shares with the constructors of `DLUPack` and `CARAFEPack`; the values as ints."""
    c = integer("channels", channels, 1)
    return (
        c,
        scale_factor(scale),
        kernel_size(kernel, "up_kernel"),
        channel_groups("up_group", groups, c),
        odd("encoder_kernel", encoder_kernel),
        integer("compressed_channels", compressed, 1),
    )


def dense(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got {'a nested one' if value.is_nested else f'layout {value.layout}'}"
        )


def _floating(name: str, value: object) -> None:
    dense(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def _map(name: str, value: object) -> None:
    _floating(name, value)
    if value.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions (N, C, H, W), got shape {tuple(value.shape)}")
    _, c, h, w = value.shape
    if not (c and h and w):
        raise ValueError(f"{name} must have no empty dimension but the batch, got shape {tuple(value.shape)}")


def pack_input(x: object, channels: int) -> None:
    """Rules of the forward passes of `DLUPack` and `CARAFEPack`."""
    _map("x", x)
    if x.shape[1] != channels:
        raise ValueError(f"x must have shape (N, channels, H, W) with {channels} channels, got {tuple(x.shape)}")


def kernel_device(name: str, value: Tensor) -> None:
    """Kernels run on cuda and, interpreted, on cpu tensors."""
    if value.device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(
            f"{name} must be on a cuda or cpu device, got {value.device}; dlu_triton.reference runs on any device"
        )


def launch(programs: int, *tensors: Tensor) -> None:
    """Rules of what a kernel is launched on, which also what was traced at other sizes has to keep to."""
    for tensor in tensors:
        if max(tensor.shape[1:]) > MAX_SIZE:
            raise ValueError(
                f"maps must have at most {MAX_SIZE} channels, rows and columns, upsampled ones too, "
                f"got shape {tuple(tensor.shape)}"
            )
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"a batch must take at most {MAX_PROGRAMS} programs of a kernel, as parts of it may, got {programs} "
            f"for {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}"
        )


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def _beside(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    same_device(name, value, other_name, other)
    if (value.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"{name} must be float64 exactly when {other_name} is: {other_name} {other.dtype}, got {value.dtype}"
        )


def _shape(name: str, value: Tensor, rule: str, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {rule} = {expected}, got {tuple(value.shape)}")


def expand_kernels(
    kernel_space: Tensor, offsets: Tensor, scale: object, kernel: object, groups: object, size: object
) -> Sizes:
    """Rules of `expand_kernels(kernel_space, offsets, scale_factor, kernel_size, groups, output_size)`; all but the
    tensors as ints."""
    k, s, g = kernel_size(kernel), scale_factor(scale), integer("groups", groups, 1)
    _map("kernel_space", kernel_space)
    _map("offsets", offsets)
    _beside("offsets", offsets, "kernel_space", kernel_space)
    n, _, h, w = kernel_space.shape
    _shape("kernel_space", kernel_space, "(N, groups*kernel_size^2, H, W)", (n, g * k * k, h, w))
    _shape("offsets", offsets, "(N, 2*groups*scale_factor^2, H, W)", (n, 2 * g * s * s, h, w))
    return s, k, g, output_size(size, s, kernel_space)


def dlu_upsample(
    features: Tensor, kernel_space: Tensor, offsets: Tensor, scale: object, kernel: object, groups: object, size: object
) -> Sizes:
    """Rules of `dlu_upsample(features, kernel_space, offsets, scale_factor, kernel_size, groups, output_size)`;
    likewise."""
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
    return s, k, g, output_size(size, s, kernel_space)


def carafe(features: Tensor, masks: Tensor, kernel: object, groups: object, scale: object, size: object) -> Sizes:
    """Rules of `carafe(features, masks, kernel_size, group_size, scale_factor, output_size)`; likewise."""
    k, s = kernel_size(kernel), scale_factor(scale)
    _map("features", features)
    _map("masks", masks)
    _beside("masks", masks, "features", features)
    n, c, h, w = features.shape
    g = channel_groups("group_size", groups, c)
    size = output_size(size, s, features)
    rule = "(N, group_size*kernel_size^2, " + ("scale_factor*H, scale_factor*W)" if size is None else "*output_size)")
    _shape("masks", masks, rule, (n, g * k * k, *(size or (s * h, s * w))))
    return k, g, s, size


def carafe_upsample(
    features: Tensor, logits: Tensor, scale: object, kernel: object, groups: object, size: object
) -> Sizes:
    """Rules of `carafe_upsample(features, logits, scale_factor, kernel_size, groups, output_size)`; likewise."""
    k, s = kernel_size(kernel), scale_factor(scale)
    _map("features", features)
    _map("logits", logits)
    _beside("logits", logits, "features", features)
    n, c, h, w = features.shape
    g = channel_groups("groups", groups, c)
    rule = "(N, groups*kernel_size^2*scale_factor^2, H, W)"
    _shape("logits", logits, rule, (n, g * k * k * s * s, h, w))
    return s, k, g, output_size(size, s, features)


def class_activation_map(
    activations: Tensor,
    gradients: Tensor,
    method: object,
    eps: object,
    relu: object,
    size: object,
    normalize: object,
    return_weights: object = False,
) -> float:
    """Rules of `class_activation_map(activations, gradients, method, eps, relu, size, normalize, return_weights)`; eps
    as a float."""
    if not isinstance(method, str) or method not in CAM_METHODS:
        raise ValueError(f"method must be one of {', '.join(CAM_METHODS)}, got {method!r}")
    flags(relu=relu, normalize=normalize, return_weights=return_weights)
    if return_weights and method not in WEIGHING_METHODS:
        raise ValueError(f"return_weights must be False for {method}, which has no channel weights, got True")
    eps = non_negative("eps", eps)
    map_size(size)
    _activations(activations)
    _floating("gradients", gradients)
    n, c, h, w = activations.shape
    if gradients.dim() == 5 and gradients.shape[1] > 0:
        _shape("gradients", gradients, "(N, K, C, H, W)", (n, gradients.shape[1], c, h, w))
    else:
        _shape("gradients", gradients, "(N, C, H, W), or (N, K, C, H, W) for K maps,", (n, c, h, w))
    _beside("gradients", gradients, "activations", activations)
    return eps


def weighted_activation_map(
    activations: Tensor, weights: Tensor, relu: object, size: object, normalize: object
) -> None:
    """Rules of `weighted_activation_map(activations, weights, relu, size, normalize)`."""
    flags(relu=relu, normalize=normalize)
    map_size(size)
    _activations(activations)
    _floating("weights", weights)
    n, c = activations.shape[:2]
    if weights.dim() == 3 and weights.shape[1] > 0:
        _shape("weights", weights, "(N, K, C)", (n, weights.shape[1], c))
    else:
        _shape("weights", weights, "(N, C), or (N, K, C) for K maps,", (n, c))
    _beside("weights", weights, "activations", activations)


def upstream(
    name: str, value: Tensor, upsampled_name: str, upsampled: Tensor, scale: int, size: Sequence[int] | None
) -> None:
    """Rules of the gradient that a backward operator is given, of what came of the upsampled tensor."""
    _floating(name, value)
    n, c, h, w = upsampled.shape
    if size is None:
        _shape(name, value, "(N, C, scale_factor*H, scale_factor*W)", (n, c, scale * h, scale * w))
    else:
        _shape(name, value, "(N, C, *output_size)", (n, c, *size))
    _beside(name, value, upsampled_name, upsampled)


def class_activation_map_op(
    activations: Tensor, gradients: Tensor, method: object, eps: object, relu: object, size: object, normalize: object,
    wants_channels: bool,
) -> None:  # fmt: skip
    """Rules of the registered operator."""
    class_activation_map(activations, gradients, method, eps, relu, size, normalize)
    if gradients.dim() != 5:
        raise ValueError(f"gradients must have 5 dimensions (N, K, C, H, W), got shape {tuple(gradients.shape)}")


def weighted_activation_map_op(
    activations: Tensor, weights: Tensor, relu: object, size: object, normalize: object
) -> None:
    """Rules of the registered operator."""
    weighted_activation_map(activations, weights, relu, size, normalize)
    if weights.dim() != 3:
        raise ValueError(f"weights must have 3 dimensions (N, K, C), got shape {tuple(weights.shape)}")


def flags(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


def _number(name: str, value: object) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def non_negative(name: str, value: object) -> float:
    """The value as a float that float32 holds, whatever kind of number it is."""
    _number(name, value)
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not 0 <= number <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be at least 0 and finite in float32, got {value}")
    return number


def map_size(value: object, name: str = "size") -> tuple[int, int] | None:
    """None, or the height and width that an integer or a pair of them stands for."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):  # torch 2.9 does not trace `tuple | list`
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be an integer or a pair (height, width), got {tuple(value)}")
    height, width = (integer(name, side, 1) for side in value)
    if height * width > MAX_MAP_PIXELS:
        raise ValueError(f"{name} must have at most {MAX_MAP_PIXELS} pixels, got {height} x {width}")
    return height, width


def _activations(value: object) -> None:
    if isinstance(value, Tensor) and value.dim() == 3:
        raise ValueError(
            "activations must have 4 dimensions (N, C, H, W); view tokens (N, T, C) as "
            f"tokens[:, -H * W:].transpose(1, 2).unflatten(2, (H, W)), got shape {tuple(value.shape)}"
        )
    _map("activations", value)
    h, w = value.shape[2:]
    if h * w > MAX_MAP_PIXELS:
        raise ValueError(f"activations must have at most {MAX_MAP_PIXELS} pixels in a plane, got {h} x {w}")


# ---------------------------------------------------------------------------------------------------------------
# Explainers and metrics
# ---------------------------------------------------------------------------------------------------------------


def model(value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(value).__name__}")


def fuse(value: object) -> None:
    if value is not None and not (isinstance(value, str) and value == "mean"):
        raise ValueError(f"fuse must be None or 'mean', got {value!r}")


def layout(value: object) -> None:
    if value is not None and not (isinstance(value, str) and value in LAYOUTS):
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)} or None, got {value!r}")


def chunk_size(value: object) -> None:
    if value is not None:
        integer("chunk_size", value, 1)


def explanation(value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"explanation must be an Explanation, of one layer, got {type(value).__name__}; "
            "a FusedExplanation has those of its layers in `layers`"
        )


def drops(value: Tensor, contributions: Tensor) -> None:
    _floating("drops", value)
    if value.shape != contributions.shape:
        raise ValueError(
            f"drops must have the shape of the contributions, {tuple(contributions.shape)}, got {tuple(value.shape)}"
        )


def _values(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """For what is copied to the device of another tensor."""
    if value.is_meta and not other.is_meta:
        raise ValueError(f"{name} must hold values, as {other_name} on {other.device}, got a tensor on meta")


def tolerance(value: object) -> int:
    return integer("tolerance", value, 0, MAX_SIZE)


def maps_and_boxes(maps: Tensor, boxes: Tensor) -> None:
    """Rules that `pointing_hit` and `energy_in_box` share."""
    _floating("maps", maps)
    dense("boxes", boxes)
    if boxes.dtype not in (*INTEGERS, *DTYPES):
        raise TypeError(f"boxes must hold integers, or be float16, bfloat16, float32 or float64, got {boxes.dtype}")
    _values("boxes", boxes, "maps", maps)
    if maps.dim() not in (3, 4) or 0 in maps.shape[-2:]:
        raise ValueError(f"maps must be (N, H, W) or (N, K, H, W) with pixels, got shape {tuple(maps.shape)}")
    leading = tuple(maps.shape[:-2])
    if boxes.shape[-1:] != (4,) or tuple(boxes.shape[:-1])[: len(leading)] != leading or (
        boxes.dim() - 1 - len(leading) not in (0, 1)
    ):  # fmt: skip
        raise ValueError(f"boxes must be {(*leading, 4)} or {(*leading, 'B', 4)}, got {tuple(boxes.shape)}")


def confidence_change(inputs: Tensor, maps: Tensor) -> None:
    """Rules of `confidence_change(model, inputs, maps, target)` that need no output of the model."""
    _map("inputs", inputs)
    _floating("maps", maps)
    expected = (inputs.shape[0], *maps.shape[1:-2], *inputs.shape[-2:])
    if maps.dim() not in (3, 4) or tuple(maps.shape) != expected or 0 in maps.shape[1:]:
        raise ValueError(
            f"maps must be (N, H, W) or (N, K, H, W) for inputs {tuple(inputs.shape)}, got {tuple(maps.shape)}"
        )


def class_indices(value: Tensor, batch: int, logits: Tensor) -> None:
    """Rules of a tensor of class indices, whose values are looked at where that waits for no device."""
    dense("target", value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"target must hold integers, got {value.dtype}")
    if value.dim() not in (1, 2) or value.shape[0] != batch or 0 in value.shape[1:]:
        raise ValueError(f"target must have shape (N,) or (N, K) with N = {batch}, got {tuple(value.shape)}")
    _values("target", value, "the class scores", logits)
    if value.device.type == "cpu" and batch > 0:
        array = value.numpy(force=True)  # which has bounds of unsigned types, as PyTorch has not
        low, high, classes = int(array.min()), int(array.max()), logits.shape[1]
        if low < 0 or high >= classes:
            raise ValueError(f"target must be from 0 to {classes - 1}, got {low if low < 0 else high}")


def class_of_each_map(target: object, indices: Tensor | None, maps: tuple[int, ...]) -> None:
    if indices is None or tuple(indices.shape) != maps:
        raise ValueError(f"target must hold a class for each map, {maps}, got {target!r}")


def overlay(images: Tensor, maps: Tensor, alpha: object, colormap: object, known: Collection[str]) -> float:
    """Rules of `overlay(images, maps, alpha, colormap)` but for the values of the tensors; alpha as a float."""
    if not isinstance(colormap, str) or colormap not in known:
        raise ValueError(f"colormap must be one that matplotlib knows, got {colormap!r}")
    _number("alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    dense("images", images)
    if images.dtype not in (*DTYPES, torch.uint8):
        raise TypeError(f"images must be float16, bfloat16, float32, float64 or uint8, got {images.dtype}")
    _floating("maps", maps)
    n, size = images.shape[:-3], images.shape[-2:]
    several = maps.dim() == images.dim()
    if (
        images.dim() not in (3, 4)
        or images.shape[-3] != 3
        or maps.shape != (*n, *maps.shape[len(n) :][:several], *size)
    ):
        raise ValueError(
            "images must be (N, 3, H, W) and maps (N, H, W) or (N, K, H, W), or without N, "
            f"got {tuple(images.shape)} and {tuple(maps.shape)}"
        )
    return float(alpha)


def zero_to_one(name: str, low: float, high: float, hint: str = "") -> None:
    """For the least and the largest of some values."""
    if not (low >= 0 and high <= 1):  # nor NaN
        raise ValueError(f"{name} must be from 0 to 1{hint}, got {low:.3g} to {high:.3g}")


def pyramid(
    in_channels: object, num_outs: object, start_level: object, end_level: object, end_is_included: bool
) -> tuple[int, int]:
    """Rules of the constructors of feature pyramids; the first level, and the one after the last."""
    if not isinstance(in_channels, Sequence) or not in_channels:
        raise TypeError(f"in_channels must be a sequence of integers, at least one, got {in_channels!r}")
    levels = len(in_channels)
    start = integer("start_level", start_level, 0, levels - 1)
    end = integer("end_level", end_level, -1, levels - end_is_included)
    stop = levels if end == -1 else end + end_is_included
    if stop <= start:
        raise ValueError(f"end_level must be -1 or leave levels from start_level on, {start}, got {end}")
    integer("num_outs", num_outs, stop - start, None if stop == levels else stop - start)
    return start, stop


def pyramid_inputs(inputs: Sequence[Tensor], levels: int) -> None:
    if len(inputs) != levels:
        raise ValueError(f"inputs must be {levels} maps, one for each of in_channels, got {len(inputs)}")
