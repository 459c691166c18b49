"""Bad input: of every argument of every public function, the kind of error, the argument, the rule and the value."""

import ast
import functools
import inspect
import re
import types
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import dlu_triton
from dlu_triton import _checks, _launch, metrics, reference


class Row(NamedTuple):
    """A bad value of each of some arguments of each of some functions, as far as these have them.

    Functions of `reference` are tried with those of the same name. A lambda makes the bad value of the right one. In
    the message {argument}, {device} and {first} stand for argument, device and first argument of the call.
    """

    functions: str | tuple[str, ...]
    arguments: str | tuple[str, ...]
    value: object
    error: type[Exception]
    message: str


class Beside(NamedTuple):
    """A value that is bad beside some of other arguments."""

    value: object
    others: dict[str, object]


# ---------------------------------------------------------------------------------------------------------------
# Right arguments
# ---------------------------------------------------------------------------------------------------------------


def network(device):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval().to(device)


def explanation(device, **options):
    return dlu_triton.XGradCAM(network(device), ["0", "1"], **options)(torch.rand(2, 3, 6, 6, device=device), 0)


def maps(device):
    """C = 4, 3 x 5 pixels, kernel 3, scale 2, one group."""
    shapes = dict(features=(1, 4, 3, 5), kernel_space=(1, 9, 3, 5), offsets=(1, 8, 3, 5), masks=(1, 9, 6, 10))
    shapes |= dict(logits=(1, 36, 3, 5), activations=(2, 3, 4, 5), gradients=(2, 3, 4, 5), weights=(2, 3))
    return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


def take(device, *names, **others):
    tensors = maps(device)
    return {name: tensors[name] for name in names} | others


PACK = {"channels": 8, "scale_factor": 2}
PACKS = ("DLUPack", "CARAFEPack")
GRADIENT_EXPLAINERS = ("XGradCAM", "GradCAM", "GradCAMPlusPlus", "HiResCAM", "LayerCAM")
EXPLAINERS = (*GRADIENT_EXPLAINERS, "AblationCAM")
EXPLAIN = tuple(f"{name}.__call__" for name in EXPLAINERS)

RIGHT = {
    "dlu_upsample": lambda d: take(d, "features", "kernel_space", "offsets", scale_factor=2, kernel_size=3),
    "expand_kernels": lambda d: take(d, "kernel_space", "offsets", scale_factor=2, kernel_size=3),
    "carafe": lambda d: take(d, "features", "masks", kernel_size=3, group_size=1, scale_factor=2),
    "carafe_upsample": lambda d: take(d, "features", "logits", scale_factor=2, kernel_size=3),
    "class_activation_map": lambda d: take(d, "activations", "gradients"),
    "class_activation_parts": lambda d: take(d, "activations", "gradients"),
    "xgrad_cam": lambda d: take(d, "activations", "gradients"),
    "weighted_activation_map": lambda d: take(d, "activations", "weights"),
    "complexity": lambda d: PACK,
    "CARAFE": lambda d: {"kernel_size": 3, "group_size": 1, "scale_factor": 2},
    "CARAFE.forward": lambda d: take(d, "features", "masks"),
    **{name: lambda d: PACK for name in PACKS},
    **{f"{name}.forward": lambda d: {"x": torch.zeros(1, 8, 3, 5, device=d)} for name in PACKS},
    **{name: lambda d: {"model": network(d), "layers": "0"} for name in EXPLAINERS},
    **{name: lambda d: {"inputs": torch.rand(2, 3, 6, 6, device=d), "target": 0} for name in EXPLAIN},
    "overlay": lambda d: {"images": torch.zeros(2, 3, 4, 5, device=d), "maps": torch.zeros(2, 4, 5, device=d)},
    "metrics.conservation": lambda d: {"explanation": explanation(d)[0]},
    "metrics.sensitivity": lambda d: {"explanation": explanation(d)[0], "drops": torch.zeros(2, 4, device=d)},
    **{
        f"metrics.{name}": lambda d: {
            "model": network(d), "layer": "0", "inputs": torch.rand(2, 3, 6, 6, device=d), "target": 0,
        }
        for name in ("channel_drops", "score_decomposition")
    },
    **{
        f"metrics.{name}": lambda d: {"maps": torch.zeros(2, 4, 5, device=d), "boxes": torch.zeros(2, 4, device=d)}
        for name in ("pointing_hit", "energy_in_box")
    },
    "metrics.confidence_change": lambda d: {
        "model": network(d), "inputs": torch.rand(2, 3, 6, 6, device=d), "maps": torch.zeros(2, 6, 6, device=d),
        "target": torch.tensor([0, 4]),
    },
}  # fmt: skip

RESULTS = "a result, which users do not make; it holds what it is given"
NOTHING_IS_WRONG = {
    **dict.fromkeys(("CAMParts", "reference.CAMParts", "Complexity", "Explanation", "FusedExplanation"), RESULTS),
    **dict.fromkeys(("metrics.ConfidenceChange", "metrics.ScoreDecomposition"), RESULTS),
}


# ---------------------------------------------------------------------------------------------------------------
# Upsampling
# ---------------------------------------------------------------------------------------------------------------

UPSAMPLERS = ("dlu_upsample", "expand_kernels", "carafe", "carafe_upsample", "CARAFE.forward")
RESIZED = (*UPSAMPLERS, "DLUPack.forward", "CARAFEPack.forward")
SIZED = ("dlu_upsample", "expand_kernels", "carafe", "carafe_upsample", "CARAFE")
CAMS = ("class_activation_map", "class_activation_parts", "xgrad_cam", "weighted_activation_map")
MAPS = ("features", "kernel_space", "offsets", "masks", "logits")
TENSORS = (*MAPS, "activations", "gradients", "weights", "x")
WITH_TENSORS = (*UPSAMPLERS, *CAMS, "DLUPack.forward", "CARAFEPack.forward")
COUNTS = ("kernel_size", "scale_factor", "group_size", "groups", "up_kernel", "up_group", "channels", "encoder_kernel", "encoder_dilation", "compressed_channels")  # fmt: skip
COUNTED = (*SIZED, *PACKS, "complexity")


def nested(layout):
    return lambda x: torch.nested.nested_tensor([x[0], x[0]], layout=layout)


ROWS = [
    # Whatever takes a tensor.
    Row(WITH_TENSORS, TENSORS, None, TypeError, "{argument} must be a tensor, got NoneType"),
    Row(WITH_TENSORS, TENSORS, "features", TypeError, "{argument} must be a tensor, got str"),
    Row(WITH_TENSORS, TENSORS, 1.0, TypeError, "{argument} must be a tensor, got float"),
    Row(WITH_TENSORS, TENSORS, lambda x: x.tolist(), TypeError, "{argument} must be a tensor, got list"),
    Row(WITH_TENSORS, TENSORS, lambda x: x.numpy(force=True), TypeError, "{argument} must be a tensor, got ndarray"),
    Row(WITH_TENSORS, TENSORS, lambda x: x.int(), TypeError, "{argument} must be float16, bfloat16, float32 or float64, got torch.int32"),
    Row(WITH_TENSORS, TENSORS, lambda x: x.byte(), TypeError, "{argument} must be float16, bfloat16, float32 or float64, got torch.uint8"),
    Row(WITH_TENSORS, TENSORS, lambda x: x.bool(), TypeError, "{argument} must be float16, bfloat16, float32 or float64, got torch.bool"),
    Row(WITH_TENSORS, TENSORS, lambda x: x.cfloat(), TypeError, "{argument} must be float16, bfloat16, float32 or float64, got torch.complex64"),
    Row(WITH_TENSORS, TENSORS, lambda x: x.to(torch.float8_e4m3fn), TypeError, "{argument} must be float16, bfloat16, float32 or float64, got torch.float8_e4m3fn"),
    Row(WITH_TENSORS, TENSORS, lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), TypeError, "{argument} must be float16, bfloat16, float32 or float64, got torch.qint8"),
    Row(WITH_TENSORS, TENSORS, lambda x: x.to_sparse(), TypeError, "{argument} must be a dense tensor, got layout torch.sparse_coo"),
    Row(WITH_TENSORS, TENSORS, lambda x: x.flatten(1).to_sparse_csr(), TypeError, "{argument} must be a dense tensor, got layout torch.sparse_csr"),
    Row(WITH_TENSORS, TENSORS, nested(torch.strided), TypeError, "{argument} must be a dense tensor, got a nested one"),
    Row(WITH_TENSORS, TENSORS, nested(torch.jagged), TypeError, "{argument} must be a dense tensor, got a nested one"),
    # Mixed types and devices; the first tensor is what the others are held against.
    Row(UPSAMPLERS, ("masks", "logits"), lambda x: x.double(), TypeError, "{argument} must be float64 exactly when features is: features torch.float32, got torch.float64"),
    Row("dlu_upsample", ("kernel_space", "offsets"), lambda x: x.double(), TypeError, "{argument} must be float64 exactly when features is: features torch.float32, got torch.float64"),
    Row("dlu_upsample", "features", lambda x: x.double(), TypeError, "kernel_space must be float64 exactly when features is: features torch.float64, got torch.float32"),
    Row("expand_kernels", "offsets", lambda x: x.double(), TypeError, "offsets must be float64 exactly when kernel_space is: kernel_space torch.float32, got torch.float64"),
    Row("expand_kernels", "kernel_space", lambda x: x.double(), TypeError, "offsets must be float64 exactly when kernel_space is: kernel_space torch.float64, got torch.float32"),
    Row(UPSAMPLERS, ("masks", "logits"), lambda x: x.to("meta"), ValueError, "{argument} must be on the device of features, {device}, got meta"),
    Row("dlu_upsample", ("kernel_space", "offsets"), lambda x: x.to("meta"), ValueError, "{argument} must be on the device of features, {device}, got meta"),
    Row("expand_kernels", "offsets", lambda x: x.to("meta"), ValueError, "offsets must be on the device of kernel_space, {device}, got meta"),
    Row("carafe", "features", lambda x: x.to("meta"), ValueError, "masks must be on the device of features, meta, got {device}"),
    # Dimensions.
    Row(UPSAMPLERS, MAPS, lambda x: x[0, 0, 0, 0], ValueError, "{argument} must have 4 dimensions (N, C, H, W), got shape ()"),
    Row(UPSAMPLERS, MAPS, lambda x: x[0, 0, 0, :0], ValueError, "{argument} must have 4 dimensions (N, C, H, W), got shape (0,)"),
    Row(UPSAMPLERS, "features", lambda x: x[0], ValueError, "features must have 4 dimensions (N, C, H, W), got shape (4, 3, 5)"),
    Row(UPSAMPLERS, "features", lambda x: x[None], ValueError, "features must have 4 dimensions (N, C, H, W), got shape (1, 1, 4, 3, 5)"),
    Row(UPSAMPLERS, "masks", lambda x: x[0], ValueError, "masks must have 4 dimensions (N, C, H, W), got shape (9, 6, 10)"),
    Row(UPSAMPLERS, "masks", lambda x: x.unflatten(1, (3, 3)), ValueError, "masks must have 4 dimensions (N, C, H, W), got shape (1, 3, 3, 6, 10)"),
    Row(UPSAMPLERS, "features", lambda x: x[:, :0], ValueError, "features must have no empty dimension but the batch, got shape (1, 0, 3, 5)"),
    Row(UPSAMPLERS, "features", lambda x: x[:, :, :0], ValueError, "features must have no empty dimension but the batch, got shape (1, 4, 0, 5)"),
    Row(UPSAMPLERS, "features", lambda x: x[..., :0], ValueError, "features must have no empty dimension but the batch, got shape (1, 4, 3, 0)"),
    Row(UPSAMPLERS, ("kernel_space",), lambda x: x[:, :0], ValueError, "kernel_space must have no empty dimension but the batch, got shape (1, 0, 3, 5)"),
    Row(UPSAMPLERS, "offsets", lambda x: x[..., :0], ValueError, "offsets must have no empty dimension but the batch, got shape (1, 8, 3, 0)"),
    # Shapes.
    Row("dlu_upsample", "features", lambda x: x[:, :, :2], ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 9, 2, 5), got (1, 9, 3, 5)"),
    Row(("dlu_upsample", "expand_kernels"), "kernel_space", lambda x: x[:, :8], ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 9, 3, 5), got (1, 8, 3, 5)"),
    Row("dlu_upsample", "kernel_space", lambda x: x[:, :, :2], ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 9, 3, 5), got (1, 9, 2, 5)"),
    Row("dlu_upsample", "kernel_space", lambda x: x.repeat(2, 1, 1, 1), ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 9, 3, 5), got (2, 9, 3, 5)"),
    Row(("dlu_upsample", "expand_kernels"), "offsets", lambda x: x[:, :4], ValueError, "offsets must have shape (N, 2*groups*scale_factor^2, H, W) = (1, 8, 3, 5), got (1, 4, 3, 5)"),
    Row(("dlu_upsample", "expand_kernels"), "offsets", lambda x: x[..., :4], ValueError, "offsets must have shape (N, 2*groups*scale_factor^2, H, W) = (1, 8, 3, 5), got (1, 8, 3, 4)"),
    Row(("dlu_upsample", "expand_kernels"), "offsets", lambda x: x.repeat(2, 1, 1, 1), ValueError, "offsets must have shape (N, 2*groups*scale_factor^2, H, W) = (1, 8, 3, 5), got (2, 8, 3, 5)"),
    Row(("carafe", "CARAFE.forward"), "masks", lambda x: x[:, :, :5], ValueError, "masks must have shape (N, group_size*kernel_size^2, scale_factor*H, scale_factor*W) = (1, 9, 6, 10), got (1, 9, 5, 10)"),
    Row(("carafe", "CARAFE.forward"), "masks", lambda x: x[:0], ValueError, "masks must have shape (N, group_size*kernel_size^2, scale_factor*H, scale_factor*W) = (1, 9, 6, 10), got (0, 9, 6, 10)"),
    Row("carafe_upsample", "logits", lambda x: x[:, :9], ValueError, "logits must have shape (N, groups*kernel_size^2*scale_factor^2, H, W) = (1, 36, 3, 5), got (1, 9, 3, 5)"),
    Row("carafe_upsample", "features", lambda x: x[..., :4], ValueError, "logits must have shape (N, groups*kernel_size^2*scale_factor^2, H, W) = (1, 36, 3, 4), got (1, 36, 3, 5)"),
    Row("dlu_upsample", "scale_factor", 16, ValueError, "offsets must have shape (N, 2*groups*scale_factor^2, H, W) = (1, 512, 3, 5), got (1, 8, 3, 5)"),
    Row("dlu_upsample", "kernel_size", 5, ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 25, 3, 5), got (1, 9, 3, 5)"),
    Row("dlu_upsample", "groups", 2, ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 18, 3, 5), got (1, 9, 3, 5)"),
    # Whatever counts something.
    Row(COUNTED, COUNTS, 3.0, TypeError, "{argument} must be an integer, got 3.0 of type float"),
    Row(COUNTED, COUNTS, float("nan"), TypeError, "{argument} must be an integer, got nan of type float"),
    Row(COUNTED, COUNTS, "2", TypeError, "{argument} must be an integer, got '2' of type str"),
    Row(COUNTED, COUNTS, True, TypeError, "{argument} must be an integer, got True of type bool"),
    Row(COUNTED, COUNTS, None, TypeError, "{argument} must be an integer, got None of type NoneType"),
    Row(COUNTED, COUNTS, (2, 2), TypeError, "{argument} must be an integer, got (2, 2) of type tuple"),
    Row(COUNTED, COUNTS, torch.tensor(3.0), TypeError, "{argument} must be an integer, got tensor(3.) of type Tensor"),
    Row(SIZED, "kernel_size", 4, ValueError, "kernel_size must be odd, got 4"),
    Row(SIZED, "kernel_size", 0, ValueError, "kernel_size must be from 1 to 9, got 0"),
    Row(SIZED, "kernel_size", 11, ValueError, "kernel_size must be from 1 to 9, got 11"),
    Row(COUNTED, "scale_factor", 0, ValueError, "scale_factor must be from 1 to 16, got 0"),
    Row(COUNTED, "scale_factor", -2, ValueError, "scale_factor must be from 1 to 16, got -2"),
    Row(COUNTED, "scale_factor", 17, ValueError, "scale_factor must be from 1 to 16, got 17"),
    Row(COUNTED, "scale_factor", 10**30, ValueError, f"scale_factor must be from 1 to 16, got 1{'0' * 30}"),
    Row(("dlu_upsample", "carafe", "carafe_upsample"), ("groups", "group_size"), 3, ValueError, "{argument} must divide the channels: 4 channels, got {argument} 3"),
    Row(("dlu_upsample", "carafe", "carafe_upsample"), ("groups", "group_size"), 8, ValueError, "{argument} must divide the channels: 4 channels, got {argument} 8"),
    Row(SIZED, ("groups", "group_size"), 0, ValueError, "{argument} must be at least 1, got 0"),
    Row("expand_kernels", "groups", 10**20, ValueError, f"kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 9{'0' * 20}, 3, 5), got (1, 9, 3, 5)"),
    # The size of the output.
    Row(RESIZED, "output_size", 7, TypeError, "output_size must be a pair (height, width) or None, got 7"),
    Row(RESIZED, "output_size", "6x9", TypeError, "output_size must be a pair (height, width) or None, got '6x9'"),
    Row(RESIZED, "output_size", torch.tensor([6, 9]), TypeError, "output_size must be a pair (height, width) or None, got tensor([6, 9])"),
    Row(RESIZED, "output_size", (6,), ValueError, "output_size must be a pair (height, width), got (6,)"),
    Row(RESIZED, "output_size", [1, 4, 6, 9], ValueError, "output_size must be a pair (height, width), got (1, 4, 6, 9)"),
    Row(RESIZED, "output_size", (6, 9.0), TypeError, "output_size must be an integer, got 9.0 of type float"),
    Row(RESIZED, "output_size", (True, 9), TypeError, "output_size must be an integer, got True of type bool"),
    Row(RESIZED, "output_size", (6, None), TypeError, "output_size must be an integer, got None of type NoneType"),
    Row(RESIZED, "output_size", (0, 9), ValueError, "output_size must be from (1, 1) to scale_factor*(H, W) = (6, 10), got (0, 9)"),
    Row(RESIZED, "output_size", (6, -9), ValueError, "output_size must be from (1, 1) to scale_factor*(H, W) = (6, 10), got (6, -9)"),
    Row(RESIZED, "output_size", (7, 9), ValueError, "output_size must be from (1, 1) to scale_factor*(H, W) = (6, 10), got (7, 9)"),
    Row(RESIZED, "output_size", [6, 11], ValueError, "output_size must be from (1, 1) to scale_factor*(H, W) = (6, 10), got (6, 11)"),
    Row(RESIZED, "output_size", (6, 10**30), ValueError, f"output_size must be from (1, 1) to scale_factor*(H, W) = (6, 10), got (6, 1{'0' * 30})"),
    Row(("carafe", "CARAFE.forward"), "output_size", (5, 9), ValueError, "masks must have shape (N, group_size*kernel_size^2, *output_size) = (1, 9, 5, 9), got (1, 9, 6, 10)"),
    # Modules, and what they cost.
    Row((*PACKS, "complexity"), ("channels", "compressed_channels", "up_group"), 0, ValueError, "{argument} must be at least 1, got 0"),
    Row((*PACKS, "complexity"), "encoder_dilation", 0, ValueError, "encoder_dilation must be at least 1, got 0"),
    Row((*PACKS, "complexity"), "up_kernel", 4, ValueError, "up_kernel must be odd, got 4"),
    Row((*PACKS, "complexity"), "up_kernel", 11, ValueError, "up_kernel must be from 1 to 9, got 11"),
    Row((*PACKS, "complexity"), "encoder_kernel", 2, ValueError, "encoder_kernel must be odd, got 2"),
    Row((*PACKS, "complexity"), "encoder_kernel", -1, ValueError, "encoder_kernel must be at least 1, got -1"),
    Row((*PACKS, "complexity"), "up_group", 3, ValueError, "up_group must divide the channels: 8 channels, got up_group 3"),
    Row(("DLUPack.forward", "CARAFEPack.forward"), "x", lambda x: x[0], ValueError, "x must have 4 dimensions (N, C, H, W), got shape (8, 3, 5)"),
    Row(("DLUPack.forward", "CARAFEPack.forward"), "x", lambda x: x[..., :0], ValueError, "x must have no empty dimension but the batch, got shape (1, 8, 3, 0)"),
    Row(("DLUPack.forward", "CARAFEPack.forward"), "x", lambda x: x[:, :4], ValueError, "x must have shape (N, channels, H, W) with 8 channels, got (1, 4, 3, 5)"),
    Row(("DLUPack.forward", "CARAFEPack.forward"), "x", lambda x: x.mT.transpose(1, 3), ValueError, "x must have shape (N, channels, H, W) with 8 channels, got (1, 3, 5, 8)"),
    # Class activation maps.
    Row(CAMS, "method", "gradcampp", ValueError, "method must be one of xgradcam, gradcam, gradcam++, hirescam, layercam, elementwise, got 'gradcampp'"),
    Row(CAMS, "method", None, ValueError, "method must be one of xgradcam, gradcam, gradcam++, hirescam, layercam, elementwise, got None"),
    Row(CAMS, "method", torch.ones(2), ValueError, "method must be one of xgradcam, gradcam, gradcam++, hirescam, layercam, elementwise, got tensor([1., 1.])"),
    Row(CAMS, "eps", -1e-6, ValueError, "eps must be at least 0 and finite in float32, got -1e-06"),
    Row(CAMS, "eps", float("nan"), ValueError, "eps must be at least 0 and finite in float32, got nan"),
    Row(CAMS, "eps", float("inf"), ValueError, "eps must be at least 0 and finite in float32, got inf"),
    Row(CAMS, "eps", np.float16("inf"), ValueError, "eps must be at least 0 and finite in float32, got inf"),
    Row(CAMS, "eps", 1e39, ValueError, "eps must be at least 0 and finite in float32, got 1e+39"),
    Row(CAMS, "eps", 10**400, ValueError, f"eps must be at least 0 and finite in float32, got 1{'0' * 400}"),
    Row(CAMS, "eps", Fraction(-1, 3), ValueError, "eps must be at least 0 and finite in float32, got -1/3"),
    Row(CAMS, "eps", "1", TypeError, "eps must be a number, got '1' of type str"),
    Row(CAMS, "eps", True, TypeError, "eps must be a number, got True of type bool"),
    Row(CAMS, "eps", 1j, TypeError, "eps must be a number, got 1j of type complex"),
    Row(CAMS, "eps", None, TypeError, "eps must be a number, got None of type NoneType"),
    Row(CAMS, ("relu", "normalize", "return_weights"), "no", TypeError, "{argument} must be True or False, got 'no' of type str"),
    Row(CAMS, ("relu", "normalize", "return_weights"), 1, TypeError, "{argument} must be True or False, got 1 of type int"),
    Row(CAMS, ("relu", "normalize", "return_weights"), None, TypeError, "{argument} must be True or False, got None of type NoneType"),
    Row(CAMS, ("relu", "normalize", "return_weights"), torch.ones(2), TypeError, "{argument} must be True or False, got tensor([1., 1.]) of type Tensor"),
    Row("class_activation_map", "return_weights", Beside(True, {"method": "hirescam"}), ValueError, "return_weights must be False for hirescam, which has no channel weights, got True"),
    Row(CAMS, "size", 0, ValueError, "size must be at least 1, got 0"),
    Row(CAMS, "size", (4, -1), ValueError, "size must be at least 1, got -1"),
    Row(CAMS, "size", (4, 5, 6), ValueError, "size must be an integer or a pair (height, width), got (4, 5, 6)"),
    Row(CAMS, "size", [4], ValueError, "size must be an integer or a pair (height, width), got (4,)"),
    Row(CAMS, "size", (), ValueError, "size must be an integer or a pair (height, width), got ()"),
    Row(CAMS, "size", 2.5, TypeError, "size must be an integer, got 2.5 of type float"),
    Row(CAMS, "size", (4, None), TypeError, "size must be an integer, got None of type NoneType"),
    Row(CAMS, "size", (True, 4), TypeError, "size must be an integer, got True of type bool"),
    Row(CAMS, "size", "4", TypeError, "size must be an integer, got '4' of type str"),
    Row(CAMS, "size", (65536, 32768), ValueError, "size must have at most 2147479552 pixels, got 65536 x 32768"),
    Row(CAMS, "activations", lambda a: a[:1, :1, :1, :1].expand(1, 1, 65536, 32768), ValueError, "activations must have at most 2147479552 pixels in a plane, got 65536 x 32768"),
    Row(CAMS, "activations", lambda a: a.flatten(2).transpose(1, 2), ValueError, "activations must have 4 dimensions (N, C, H, W); view tokens (N, T, C) as tokens[:, -H * W:].transpose(1, 2).unflatten(2, (H, W)), got shape (2, 20, 3)"),
    Row(CAMS, "activations", lambda a: a[0, 0], ValueError, "activations must have 4 dimensions (N, C, H, W), got shape (4, 5)"),
    Row(CAMS, "activations", lambda a: a[:, :0], ValueError, "activations must have no empty dimension but the batch, got shape (2, 0, 4, 5)"),
    Row(CAMS, "gradients", lambda g: g[:1], ValueError, "gradients must have shape (N, C, H, W), or (N, K, C, H, W) for K maps, = (2, 3, 4, 5), got (1, 3, 4, 5)"),
    Row(CAMS, "gradients", lambda g: g[..., 0], ValueError, "gradients must have shape (N, C, H, W), or (N, K, C, H, W) for K maps, = (2, 3, 4, 5), got (2, 3, 4)"),
    Row(CAMS, "gradients", lambda g: g.unsqueeze(1)[:, :, :2], ValueError, "gradients must have shape (N, K, C, H, W) = (2, 1, 3, 4, 5), got (2, 1, 2, 4, 5)"),
    Row(CAMS, "gradients", lambda g: g.unsqueeze(1)[:, :0], ValueError, "gradients must have shape (N, C, H, W), or (N, K, C, H, W) for K maps, = (2, 3, 4, 5), got (2, 0, 3, 4, 5)"),
    Row(CAMS, "weights", lambda w: w[:, :2], ValueError, "weights must have shape (N, C), or (N, K, C) for K maps, = (2, 3), got (2, 2)"),
    Row(CAMS, "weights", lambda w: w.unsqueeze(1)[..., :2], ValueError, "weights must have shape (N, K, C) = (2, 1, 3), got (2, 1, 2)"),
    Row(CAMS, "weights", lambda w: w.unsqueeze(1)[:, :0], ValueError, "weights must have shape (N, C), or (N, K, C) for K maps, = (2, 3), got (2, 0, 3)"),
    Row(CAMS, "weights", lambda w: w[0], ValueError, "weights must have shape (N, C), or (N, K, C) for K maps, = (2, 3), got (3,)"),
    Row(CAMS, ("gradients", "weights"), lambda x: x.double(), TypeError, "{argument} must be float64 exactly when activations is: activations torch.float32, got torch.float64"),
    Row(CAMS, ("gradients", "weights"), lambda x: x.to("meta"), ValueError, "{argument} must be on the device of activations, {device}, got meta"),
    # Explainers.
    Row(EXPLAINERS, "model", lambda m: lambda x: x, TypeError, "model must be a torch.nn.Module, got function"),
    Row(EXPLAINERS, "model", None, TypeError, "model must be a torch.nn.Module, got NoneType"),
    Row(EXPLAINERS, "layers", "conv9", ValueError, "layers must name modules of the model, got 'conv9': Sequential has no attribute `conv9`"),
    Row(EXPLAINERS, "layers", nn.ReLU(), ValueError, "layers must be modules of the model, got a ReLU outside it"),
    Row(EXPLAINERS, "layers", ["0", nn.Conv2d(1, 1, 1)], ValueError, "layers must be modules of the model, got a Conv2d outside it"),
    Row(EXPLAINERS, "layers", 3, TypeError, "layers must be modules or their names, got int"),
    Row(EXPLAINERS, "layers", None, TypeError, "layers must be modules or their names, got NoneType"),
    Row(EXPLAINERS, "layers", ["0", 3], TypeError, "layers must be modules or their names, got int"),
    Row(EXPLAINERS, "layers", [], ValueError, "layers must have at least one layer, got none"),
    Row(EXPLAINERS, "layers", ["1", "1"], ValueError, "layers must differ, got '1' twice"),
    Row(EXPLAINERS, "fuse", "max", ValueError, "fuse must be None or 'mean', got 'max'"),
    Row(EXPLAINERS, "fuse", True, ValueError, "fuse must be None or 'mean', got True"),
    Row((*EXPLAINERS, "metrics.channel_drops"), "layout", "nchw", ValueError, "layout must be one of NCHW, NHWC, NTC or None, got 'nchw'"),
    Row((*EXPLAINERS, "metrics.channel_drops"), "layout", 4, ValueError, "layout must be one of NCHW, NHWC, NTC or None, got 4"),
    Row((*EXPLAINERS, "metrics.channel_drops"), "grid", (4, 0), ValueError, "grid must be at least 1, got 0"),
    Row((*EXPLAINERS, "metrics.channel_drops"), "grid", (1, 2, 3), ValueError, "grid must be an integer or a pair (height, width), got (1, 2, 3)"),
    Row((*EXPLAINERS, "metrics.channel_drops"), "grid", 2.0, TypeError, "grid must be an integer, got 2.0 of type float"),
    Row(EXPLAINERS, "eps", -1, ValueError, "eps must be at least 0 and finite in float32, got -1"),
    Row(EXPLAINERS, "eps", 10**400, ValueError, f"eps must be at least 0 and finite in float32, got 1{'0' * 400}"),
    Row(EXPLAINERS, "eps", "small", TypeError, "eps must be a number, got 'small' of type str"),
    Row(("AblationCAM", "metrics.channel_drops"), "batch_size", 0, ValueError, "batch_size must be at least 1, got 0"),
    Row(("AblationCAM", "metrics.channel_drops"), "batch_size", 2.0, TypeError, "batch_size must be an integer, got 2.0 of type float"),
    Row(("AblationCAM", "metrics.channel_drops"), ("reuse_trunk", "progress"), 1, TypeError, "{argument} must be True or False, got 1 of type int"),
    Row(("AblationCAM", "metrics.channel_drops"), ("reuse_trunk", "progress"), None, TypeError, "{argument} must be True or False, got None of type NoneType"),
    Row(EXPLAIN, "inputs", lambda x: x.numpy(force=True), TypeError, "inputs must be a tensor, a sequence or a mapping of arguments, got ndarray"),
    Row(EXPLAIN, "inputs", None, TypeError, "inputs must be a tensor, a sequence or a mapping of arguments, got NoneType"),
    Row(EXPLAIN, "inputs", "cat.png", TypeError, "inputs must be a tensor, a sequence or a mapping of arguments, got str"),
    Row(EXPLAIN, "inputs", lambda x: x[0], ValueError, "size must be given unless one of the inputs is a batch of images (N, C, H, W), got (3, 6, 6)"),
    Row(EXPLAIN, "inputs", [], ValueError, "size must be given unless one of the inputs is a batch of images (N, C, H, W), got no inputs"),
    Row(EXPLAIN, "inputs", lambda x: [x.numpy(force=True)], ValueError, "size must be given unless one of the inputs is a batch of images (N, C, H, W), got ndarray"),
    Row(EXPLAIN, "size", 0, ValueError, "size must be at least 1, got 0"),
    Row(EXPLAIN, "size", (6, 6, 6), ValueError, "size must be an integer or a pair (height, width), got (6, 6, 6)"),
    Row(EXPLAIN, "size", "6", TypeError, "size must be an integer, got '6' of type str"),
    Row(EXPLAIN, ("relu", "normalize"), "no", TypeError, "{argument} must be True or False, got 'no' of type str"),
    Row(EXPLAIN, ("relu", "normalize"), 0, TypeError, "{argument} must be True or False, got 0 of type int"),
    Row(EXPLAIN, "chunk_size", 0, ValueError, "chunk_size must be at least 1, got 0"),
    Row(EXPLAIN, "chunk_size", 1.0, TypeError, "chunk_size must be an integer, got 1.0 of type float"),
]  # fmt: skip

TARGETED = (*EXPLAIN, "metrics.channel_drops", "metrics.score_decomposition")
LAYERED = ("metrics.channel_drops", "metrics.score_decomposition")
BOXED = ("metrics.pointing_hit", "metrics.energy_in_box")
ROWS += [
    # Targets, for a batch of two images and five classes.
    Row(TARGETED, "target", 5, ValueError, "target must be from 0 to 4, got 5"),
    Row(TARGETED, "target", -1, ValueError, "target must be from 0 to 4, got -1"),
    Row(TARGETED, "target", True, TypeError, "target must be an integer, got True of type bool"),
    Row(TARGETED, "target", 1.0, TypeError, "target must be an integer, got 1.0 of type float"),
    Row(TARGETED, "target", "1", TypeError, "target must be an integer, got '1' of type str"),
    Row(TARGETED, "target", [], ValueError, "target must have one entry for each of the 2 images, got 0"),
    Row(TARGETED, "target", [0, 1, 2], ValueError, "target must have one entry for each of the 2 images, got 3"),
    Row(TARGETED, "target", [0, 5], ValueError, "target must be from 0 to 4, got 5"),
    Row(TARGETED, "target", [0, 0.5], TypeError, "target must hold integers, got torch.float32"),
    Row(TARGETED, "target", lambda t: [None, 1], TypeError, "target must be class indices or callables, got [None, 1]: Could not infer dtype of NoneType"),
    Row(TARGETED, "target", lambda t: torch.tensor([0]), ValueError, "target must have shape (N,) or (N, K) with N = 2, got (1,)"),
    Row(TARGETED, "target", lambda t: torch.zeros(2, 1, 1).long(), ValueError, "target must have shape (N,) or (N, K) with N = 2, got (2, 1, 1)"),
    Row(TARGETED, "target", lambda t: torch.zeros(2, 0).long(), ValueError, "target must have shape (N,) or (N, K) with N = 2, got (2, 0)"),
    Row(TARGETED, "target", lambda t: torch.zeros(2), TypeError, "target must hold integers, got torch.float32"),
    Row(TARGETED, "target", lambda t: np.zeros(2), TypeError, "target must hold integers, got torch.float64"),
    Row(TARGETED, "target", lambda t: torch.zeros(2).bool(), TypeError, "target must hold integers, got torch.bool"),
    Row(TARGETED, "target", lambda t: torch.tensor([[0, 5], [1, 1]]), ValueError, "target must be from 0 to 4, got 5"),
    Row(TARGETED, "target", lambda t: torch.tensor([0, 5], dtype=torch.uint64), ValueError, "target must be from 0 to 4, got 5"),
    Row(TARGETED, "target", lambda t: np.array([2**64 - 1, 0], np.uint64), ValueError, f"target must be from 0 to 4, got {2**64 - 1}"),
    Row(TARGETED, "target", lambda t: torch.zeros(2).to(torch.float8_e4m3fn), TypeError, "target must hold integers, got torch.float8_e4m3fn"),
    Row(TARGETED, "target", lambda t: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8), TypeError, "target must hold integers, got torch.qint8"),
    Row(TARGETED, "target", lambda t: torch.zeros(2, dtype=torch.long, device="meta"), ValueError, "target must hold values, as the class scores on {device}, got a tensor on meta"),
    Row(TARGETED, "target", lambda t: torch.ones(2).long().to_sparse(), TypeError, "target must be a dense tensor, got layout torch.sparse_coo"),
    Row(TARGETED, "target", lambda t: lambda logits: logits.sum(), ValueError, "target must return scores of shape (N,) or (N, K) with N = 2, got ()"),
    Row(TARGETED, "target", lambda t: lambda logits: 1.0, TypeError, "target must return a tensor of scores, got float"),
    # Metrics.
    Row(LAYERED, "model", "resnet", TypeError, "model must be a torch.nn.Module, got str"),
    Row(LAYERED, "model", lambda m: nn.Sequential(*m, nn.Dropout()), ValueError, "model must be in evaluation mode, got '4' in training mode"),
    Row(LAYERED, "layer", "conv9", ValueError, "layer must name a module of the model, got 'conv9': Sequential has no attribute `conv9`"),
    Row(LAYERED, "layer", nn.ReLU(), ValueError, "layer must be a module of the model, got a ReLU outside it"),
    Row(LAYERED, "layer", 0, TypeError, "layer must be a module or its name, got int"),
    Row(LAYERED, "layer", ["0", "1"], ValueError, "layer must be one layer, got 2"),
    Row(LAYERED, "layer", [], ValueError, "layer must be one layer, got 0"),
    Row(LAYERED, "inputs", "cat.png", TypeError, "inputs must be a tensor, a sequence or a mapping of arguments, got str"),
    Row(LAYERED, "inputs", lambda x: x.numpy(force=True), TypeError, "inputs must be a tensor, a sequence or a mapping of arguments, got ndarray"),
    Row(("metrics.conservation", "metrics.sensitivity"), "explanation", None, TypeError, "explanation must be an Explanation, of one layer, got NoneType; a FusedExplanation has those of its layers in `layers`"),
    Row(("metrics.conservation", "metrics.sensitivity"), "explanation", lambda e: [e], TypeError, "explanation must be an Explanation, of one layer, got list; a FusedExplanation has those of its layers in `layers`"),
    Row(("metrics.conservation", "metrics.sensitivity"), "explanation", lambda e: explanation(e.map.device, fuse="mean"), TypeError, "explanation must be an Explanation, of one layer, got FusedExplanation; a FusedExplanation has those of its layers in `layers`"),
    Row("metrics.sensitivity", "drops", lambda d: d[:, :2], ValueError, "drops must have the shape of the contributions, (2, 4), got (2, 2)"),
    Row("metrics.sensitivity", "drops", [1.0], TypeError, "drops must be a tensor, got list"),
    Row("metrics.sensitivity", "drops", lambda d: d.long(), TypeError, "drops must be float16, bfloat16, float32 or float64, got torch.int64"),
    Row(BOXED, ("maps", "boxes"), lambda x: x.tolist(), TypeError, "{argument} must be a tensor, got list"),
    *(
        Row(BOXED, "maps", lambda x, dtype=dtype: x.to(dtype), TypeError, f"maps must be float16, bfloat16, float32 or float64, got {dtype}")
        for dtype in (torch.int64, torch.uint8, torch.uint16, torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        Row(BOXED, "boxes", lambda x, dtype=dtype: x.to(dtype), TypeError, f"boxes must hold integers, or be float16, bfloat16, float32 or float64, got {dtype}")
        for dtype in (torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    Row(BOXED, "boxes", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), TypeError, "boxes must hold integers, or be float16, bfloat16, float32 or float64, got torch.qint8"),
    Row(BOXED, "boxes", lambda x: x.to("meta"), ValueError, "boxes must hold values, as maps on {device}, got a tensor on meta"),
    Row(BOXED, ("maps", "boxes"), lambda x: x.to_sparse(), TypeError, "{argument} must be a dense tensor, got layout torch.sparse_coo"),
    Row(BOXED, "maps", lambda x: x[0], ValueError, "maps must be (N, H, W) or (N, K, H, W) with pixels, got shape (4, 5)"),
    Row(BOXED, "maps", lambda x: x[..., :0], ValueError, "maps must be (N, H, W) or (N, K, H, W) with pixels, got shape (2, 4, 0)"),
    Row(BOXED, "boxes", lambda x: x[:1], ValueError, "boxes must be (2, 4) or (2, 'B', 4), got (1, 4)"),
    Row(BOXED, "boxes", lambda x: x[:, :3], ValueError, "boxes must be (2, 4) or (2, 'B', 4), got (2, 3)"),
    Row(BOXED, "boxes", lambda x: x[0], ValueError, "boxes must be (2, 4) or (2, 'B', 4), got (4,)"),
    Row(BOXED, "boxes", lambda x: x[:, None, None], ValueError, "boxes must be (2, 4) or (2, 'B', 4), got (2, 1, 1, 4)"),
    Row(BOXED, "boxes", lambda x: x[0, 0], ValueError, "boxes must be (2, 4) or (2, 'B', 4), got ()"),
    Row(BOXED, "tolerance", -1, ValueError, f"tolerance must be from 0 to {2**31 - 2**12}, got -1"),
    Row(BOXED, "tolerance", 2**70, ValueError, f"tolerance must be from 0 to {2**31 - 2**12}, got {2**70}"),
    Row(BOXED, "tolerance", 1.5, TypeError, "tolerance must be an integer, got 1.5 of type float"),
    Row("metrics.confidence_change", "model", None, TypeError, "model must be a torch.nn.Module, got NoneType"),
    Row("metrics.confidence_change", ("inputs", "maps"), None, TypeError, "{argument} must be a tensor, got NoneType"),
    Row("metrics.confidence_change", ("inputs", "maps"), lambda x: x.byte(), TypeError, "{argument} must be float16, bfloat16, float32 or float64, got torch.uint8"),
    Row("metrics.confidence_change", "inputs", lambda x: x[0], ValueError, "inputs must have 4 dimensions (N, C, H, W), got shape (3, 6, 6)"),
    Row("metrics.confidence_change", "maps", lambda m: m[:1], ValueError, "maps must be (N, H, W) or (N, K, H, W) for inputs (2, 3, 6, 6), got (1, 6, 6)"),
    Row("metrics.confidence_change", "maps", lambda m: m[..., :5], ValueError, "maps must be (N, H, W) or (N, K, H, W) for inputs (2, 3, 6, 6), got (2, 6, 5)"),
    Row("metrics.confidence_change", "maps", lambda m: m[0], ValueError, "maps must be (N, H, W) or (N, K, H, W) for inputs (2, 3, 6, 6), got (6, 6)"),
    Row("metrics.confidence_change", "maps", lambda m: m[:, None][:, :0], ValueError, "maps must be (N, H, W) or (N, K, H, W) for inputs (2, 3, 6, 6), got (2, 0, 6, 6)"),
    Row("metrics.confidence_change", "target", torch.tensor([[0, 1], [2, 3]]), ValueError, "target must hold a class for each map, (2,), got tensor([[0, 1],\n        [2, 3]])"),
    Row("metrics.confidence_change", "target", lambda t: t.to("meta"), ValueError, "target must hold values, as the class scores on {device}, got a tensor on meta"),
    Row("metrics.confidence_change", "target", [0, 5], ValueError, "target must be from 0 to 4, got 5"),
    # Pictures.
    Row("overlay", ("images", "maps"), None, TypeError, "{argument} must be a tensor, got NoneType"),
    Row("overlay", ("images", "maps"), lambda x: x.to_sparse(), TypeError, "{argument} must be a dense tensor, got layout torch.sparse_coo"),
    Row("overlay", "images", lambda x: x.long(), TypeError, "images must be float16, bfloat16, float32, float64 or uint8, got torch.int64"),
    Row("overlay", "maps", lambda x: x.byte(), TypeError, "maps must be float16, bfloat16, float32 or float64, got torch.uint8"),
    Row("overlay", "images", lambda x: x + 1.5, ValueError, "images must be from 0 to 1 (undo the normalisation of the model), got 1.5 to 1.5"),
    Row("overlay", "maps", lambda x: x - 1, ValueError, "maps must be from 0 to 1, got -1 to -1"),
    Row("overlay", "maps", lambda x: x + float("nan"), ValueError, "maps must be from 0 to 1, got nan to nan"),
    Row("overlay", "images", lambda x: x[:, :1], ValueError, "images must be (N, 3, H, W) and maps (N, H, W) or (N, K, H, W), or without N, got (2, 1, 4, 5) and (2, 4, 5)"),
    Row("overlay", "images", lambda x: x[0, 0], ValueError, "images must be (N, 3, H, W) and maps (N, H, W) or (N, K, H, W), or without N, got (4, 5) and (2, 4, 5)"),
    Row("overlay", "maps", lambda x: x[:1], ValueError, "images must be (N, 3, H, W) and maps (N, H, W) or (N, K, H, W), or without N, got (2, 3, 4, 5) and (1, 4, 5)"),
    Row("overlay", "maps", lambda x: x[..., 0], ValueError, "images must be (N, 3, H, W) and maps (N, H, W) or (N, K, H, W), or without N, got (2, 3, 4, 5) and (2, 4)"),
    Row("overlay", "alpha", 1.5, ValueError, "alpha must be from 0 to 1, got 1.5"),
    Row("overlay", "alpha", float("nan"), ValueError, "alpha must be from 0 to 1, got nan"),
    Row("overlay", "alpha", Fraction(3, 2), ValueError, "alpha must be from 0 to 1, got 3/2"),
    Row("overlay", "alpha", "0.5", TypeError, "alpha must be a number, got '0.5' of type str"),
    Row("overlay", "colormap", "none such", ValueError, "colormap must be one that matplotlib knows, got 'none such'"),
    Row("overlay", "colormap", ["jet"], ValueError, "colormap must be one that matplotlib knows, got ['jet']"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Registered operators
# ---------------------------------------------------------------------------------------------------------------

OPS = torch.ops.dlu_triton
UPSAMPLING_OPS = ("ops.dlu_upsample", "ops.expand_kernels", "ops.carafe", "ops.carafe_upsample")
BACKWARD_OPS = tuple(f"{name}_backward" for name in UPSAMPLING_OPS)
CAM_OPS = ("ops.class_activation_map", "ops.weighted_activation_map")
EVERY_OP = (*UPSAMPLING_OPS, *BACKWARD_OPS, *CAM_OPS)
EVERY_TENSOR = (*TENSORS, "grad_output", "grad_masks")


def cam_of_op(device, **tensors):
    """Their maps are K to an image."""
    several = {name: tensor.unsqueeze(1) for name, tensor in tensors.items()}
    return take(device, "activations") | several | {"relu": True, "size": None, "normalize": False}


RIGHT |= {
    "ops.dlu_upsample": lambda d: RIGHT["dlu_upsample"](d) | {"groups": 1, "output_size": None},
    "ops.expand_kernels": lambda d: RIGHT["expand_kernels"](d) | {"groups": 1, "output_size": None},
    "ops.carafe": lambda d: RIGHT["carafe"](d) | {"output_size": None},
    "ops.carafe_upsample": lambda d: RIGHT["carafe_upsample"](d) | {"groups": 1, "output_size": None},
    **{
        f"{name}_backward": lambda d, name=name: (
            {
                "grad_masks" if name == "ops.expand_kernels" else "grad_output": torch.zeros(
                    1, 9 if name == "ops.expand_kernels" else 4, 6, 10, device=d
                )
            }
            | RIGHT[name](d)
            | {flag: True for flag in parameters(f"{name}_backward") if flag.startswith("wants_")}
        )
        for name in UPSAMPLING_OPS
    },
    "ops.class_activation_map": lambda d: (
        cam_of_op(d, gradients=maps(d)["gradients"]) | {"method": "xgradcam", "eps": 0.0, "wants_channels": False}
    ),
    "ops.weighted_activation_map": lambda d: cam_of_op(d, weights=maps(d)["weights"]),
}
NOTHING_IS_WRONG_FOR_OPS = {
    "a bool, which is all that PyTorch lets through": ("relu", "normalize", "wants_channels", "wants_features",
    "wants_space", "wants_offsets", "wants_masks", "wants_logits"),
}  # fmt: skip

OP_ROWS = [
    Row(EVERY_OP, EVERY_TENSOR, lambda x: x.int(), TypeError, "{argument} must be float16, bfloat16, float32 or float64, got torch.int32"),
    Row(EVERY_OP, TENSORS, lambda x: x.to_sparse(), TypeError, "{argument} must be a dense tensor, got layout torch.sparse_coo"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), ("features", "kernel_space", "offsets", "logits"), lambda x: x[0, 0], ValueError, "{argument} must have 4 dimensions (N, C, H, W), got shape (3, 5)"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), "features", lambda x: x[:, :, :0], ValueError, "features must have no empty dimension but the batch, got shape (1, 4, 0, 5)"),
    Row(("ops.dlu_upsample", "ops.dlu_upsample_backward"), "kernel_space", lambda x: x[:, :8], ValueError, "kernel_space must have shape (N, groups*kernel_size^2, H, W) = (1, 9, 3, 5), got (1, 8, 3, 5)"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), "offsets", lambda x: x[..., :4], ValueError, "offsets must have shape (N, 2*groups*scale_factor^2, H, W) = (1, 8, 3, 5), got (1, 8, 3, 4)"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), "masks", lambda x: x[:, :, :5], ValueError, "masks must have shape (N, group_size*kernel_size^2, scale_factor*H, scale_factor*W) = (1, 9, 6, 10), got (1, 9, 5, 10)"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), "logits", lambda x: x[:, :9], ValueError, "logits must have shape (N, groups*kernel_size^2*scale_factor^2, H, W) = (1, 36, 3, 5), got (1, 9, 3, 5)"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), ("masks", "logits"), lambda x: x.double(), TypeError, "{argument} must be float64 exactly when features is: features torch.float32, got torch.float64"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), ("masks", "logits"), lambda x: x.to("meta"), ValueError, "{argument} must be on the device of {first}, {device}, got meta"),
    Row(CAM_OPS, ("gradients", "weights"), lambda x: x.to("meta"), ValueError, "{argument} must be on the device of activations, {device}, got meta"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), "kernel_size", 4, ValueError, "kernel_size must be odd, got 4"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), "scale_factor", 17, ValueError, "scale_factor must be from 1 to 16, got 17"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), ("groups", "group_size"), 0, ValueError, "{argument} must be at least 1, got 0"),
    Row(("ops.dlu_upsample_backward", "ops.carafe_backward", "ops.carafe_upsample_backward"), "grad_output", lambda g: g[..., :9], ValueError, "grad_output must have shape (N, C, scale_factor*H, scale_factor*W) = (1, 4, 6, 10), got (1, 4, 6, 9)"),
    Row(("ops.dlu_upsample_backward", "ops.carafe_backward", "ops.carafe_upsample_backward"), "grad_output", lambda g: g[0], ValueError, "grad_output must have shape (N, C, scale_factor*H, scale_factor*W) = (1, 4, 6, 10), got (4, 6, 10)"),
    Row(("ops.dlu_upsample_backward", "ops.carafe_backward", "ops.carafe_upsample_backward"), "grad_output", lambda g: g.double(), TypeError, "grad_output must be float64 exactly when features is: features torch.float32, got torch.float64"),
    Row("ops.expand_kernels_backward", "grad_masks", lambda g: g[:, :4], ValueError, "grad_masks must have shape (N, C, scale_factor*H, scale_factor*W) = (1, 9, 6, 10), got (1, 4, 6, 10)"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), "output_size", [6, 11], ValueError, "output_size must be from (1, 1) to scale_factor*(H, W) = (6, 10), got (6, 11)"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), "output_size", [0, 10], ValueError, "output_size must be from (1, 1) to scale_factor*(H, W) = (6, 10), got (0, 10)"),
    Row((*UPSAMPLING_OPS, *BACKWARD_OPS), "output_size", [6], ValueError, "output_size must be a pair (height, width), got (6,)"),
    Row(("ops.carafe", "ops.carafe_backward"), "output_size", [5, 9], ValueError, "masks must have shape (N, group_size*kernel_size^2, *output_size) = (1, 9, 5, 9), got (1, 9, 6, 10)"),
    Row(("ops.dlu_upsample_backward", "ops.carafe_upsample_backward"), "output_size", [5, 9], ValueError, "grad_output must have shape (N, C, *output_size) = (1, 4, 5, 9), got (1, 4, 6, 10)"),
    Row("ops.expand_kernels_backward", "output_size", [5, 9], ValueError, "grad_masks must have shape (N, C, *output_size) = (1, 9, 5, 9), got (1, 9, 6, 10)"),
    Row("ops.class_activation_map", "gradients", lambda g: g.squeeze(1), ValueError, "gradients must have 5 dimensions (N, K, C, H, W), got shape (2, 3, 4, 5)"),
    Row("ops.class_activation_map", "gradients", lambda g: g[..., :4], ValueError, "gradients must have shape (N, K, C, H, W) = (2, 1, 3, 4, 5), got (2, 1, 3, 4, 4)"),
    Row("ops.class_activation_map", "gradients", lambda g: g[:, :0], ValueError, "gradients must have shape (N, C, H, W), or (N, K, C, H, W) for K maps, = (2, 3, 4, 5), got (2, 0, 3, 4, 5)"),
    Row("ops.class_activation_map", "method", "gradcampp", ValueError, "method must be one of xgradcam, gradcam, gradcam++, hirescam, layercam, elementwise, got 'gradcampp'"),
    Row("ops.class_activation_map", "eps", float("nan"), ValueError, "eps must be at least 0 and finite in float32, got nan"),
    Row("ops.class_activation_map", "eps", 1e39, ValueError, "eps must be at least 0 and finite in float32, got 1e+39"),
    Row("ops.weighted_activation_map", "weights", lambda w: w.squeeze(1), ValueError, "weights must have 3 dimensions (N, K, C), got shape (2, 3)"),
    Row("ops.weighted_activation_map", "weights", lambda w: w[..., :2], ValueError, "weights must have shape (N, K, C) = (2, 1, 3), got (2, 1, 2)"),
    Row(CAM_OPS, "activations", lambda a: a[0], ValueError, "activations must have 4 dimensions (N, C, H, W); view tokens (N, T, C) as tokens[:, -H * W:].transpose(1, 2).unflatten(2, (H, W)), got shape (3, 4, 5)"),
    Row(CAM_OPS, "size", [0, 4], ValueError, "size must be at least 1, got 0"),
    Row(CAM_OPS, "size", [4, 5, 6], ValueError, "size must be an integer or a pair (height, width), got (4, 5, 6)"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------


@functools.cache
def public():
    """Every public function, class and method of the library, by name."""
    found = {}
    for prefix, module in (("", dlu_triton), ("reference.", reference), ("metrics.", metrics)):
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                continue
            found[prefix + name] = value
            for method, function in inspect.getmembers(value, inspect.isfunction) if inspect.isclass(value) else ():
                ours = function.__module__.startswith("dlu_triton")
                if ours and (method == "__call__" or not method.startswith("_")):
                    found[f"{prefix}{name}.{method}"] = function
    return found


def registered():
    """Every registered operator but those that run others on shards."""
    names = [name.removeprefix("dlu_triton::") for name in torch._C._dispatch_get_all_op_names()]
    return {f"ops.{name}" for name in names if hasattr(OPS, name) and not name.endswith("_on_shards")}


@functools.cache
def parameters(function):
    if function.startswith("ops."):
        return [argument.name for argument in getattr(OPS, function.removeprefix("ops.")).default._schema.arguments]
    return [name for name in inspect.signature(public()[function]).parameters if name != "self"]


def calls(row):
    """The functions and arguments that it is about."""
    functions, arguments = ((one,) if isinstance(one, str) else one for one in (row.functions, row.arguments))
    twins = [f"reference.{function}" for function in functions]
    functions = [*functions, *(twin for twin in twins if twin in public())]
    return [
        (function, argument) for function in functions for argument in arguments if argument in parameters(function)
    ]


def called(function, device):
    """The function, bound to a right object if it is a method, and right arguments."""
    name = function.removeprefix("reference.")
    right = dict(RIGHT[name](device))
    if function.startswith("ops."):
        return getattr(OPS, function.removeprefix("ops.")), right
    kind, _, method = name.partition(".")
    if kind in dlu_triton.__all__ and kind != "metrics" and method:
        made = getattr(dlu_triton, kind)(**RIGHT[kind](device))
        return getattr(made.to(device) if isinstance(made, nn.Module) else made, method), right
    return public().get(function), right


def assert_raises(row, device):
    found = calls(row)
    assert found, "a row for nothing"
    for function, argument in found:
        try:
            assert_call_raises(row, function, argument, device)
        except BaseException as error:
            error.add_note(f"{function}, {argument}")
            raise


def assert_call_raises(row, function, argument, device):
    call, given = called(function, device)
    value, others = row.value if isinstance(row.value, Beside) else (row.value, {})
    bad = value(given.get(argument)) if isinstance(value, types.FunctionType) else value
    stands_for = {"argument": argument, "device": torch.empty(0, device=device).device, "first": next(iter(given))}
    message = row.message
    for name, meant in stands_for.items():
        message = message.replace(f"{{{name}}}", str(meant))
    with pytest.raises(row.error) as caught:
        call(**{**given, **others, argument: bad})
    assert type(caught.value) is row.error
    assert str(caught.value) == message


@pytest.mark.filterwarnings("ignore:.*(prototype|beta|deprecat).*")
@pytest.mark.parametrize("row", ROWS)
def test_bad_input(row, path):
    if row.functions == "overlay":
        pytest.importorskip("matplotlib")
    assert_raises(row, path)


@pytest.mark.parametrize("row", OP_ROWS)
def test_bad_input_of_registered_operators(row, device, monkeypatch):
    """Programs of `torch.export` call them, and anybody can: a kernel would read where there is nothing."""
    monkeypatch.setattr(_launch, "launch", lambda *arguments: pytest.fail("a kernel was launched"))
    assert_raises(row, device)


@pytest.mark.parametrize("function", RIGHT)
def test_rows_are_about_calls_that_run(function, device, monkeypatch):
    """But for the bad value: else a row could be about something else."""
    if function == "overlay":
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(_launch, "launch", lambda *arguments: None)
    call, right = called(function, device)
    call(**right)


def test_every_public_argument_has_a_row():
    covered = {call for row in ROWS for call in calls(row)}
    missing = {(name, each) for name in public() if name not in NOTHING_IS_WRONG for each in parameters(name)} - covered
    assert not missing
    assert set(NOTHING_IS_WRONG) <= set(public())
    assert not {function for function, _ in covered} & set(NOTHING_IS_WRONG)


def test_every_argument_of_registered_operators_has_a_row():
    covered = {call for row in OP_ROWS for call in calls(row)}
    fine = {argument for arguments in NOTHING_IS_WRONG_FOR_OPS.values() for argument in arguments}
    everything = {(name, argument) for name in registered() for argument in parameters(name)}
    assert {each for each in everything - covered if each[1] not in fine} == set()
    assert fine == {argument for _, argument in everything - covered}
    assert len(registered()) == 10


def test_checks_alone_raise_for_bad_input():
    """And `_capture`, for what shows when it looks into a model."""
    folder = Path(dlu_triton.__file__).parent
    raising = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            raised = node.exc if isinstance(node, ast.Raise) else None
            name = raised.func if isinstance(raised, ast.Call) else raised
            if isinstance(name, ast.Name) and name.id in ("ValueError", "TypeError"):
                raising.add(path.relative_to(folder).as_posix())
    assert raising == {"_checks.py", "_capture.py"}


# ---------------------------------------------------------------------------------------------------------------
# Beside the tables
# ---------------------------------------------------------------------------------------------------------------


class Elsewhere(torch.Tensor):
    device = torch.device("xpu")


@pytest.mark.parametrize("function", (*UPSAMPLERS[:-1], *CAMS))
def test_a_device_without_kernels_is_refused(function):
    """No silent fallback: only cuda runs kernels and only cpu the eager path; the reference runs anywhere."""
    call, right = called(function, torch.device("cpu"))
    moved = {name: x.as_subclass(Elsewhere) if isinstance(x, torch.Tensor) else x for name, x in right.items()}
    first = next(iter(right))
    message = f"{first} must be on a cuda or cpu device, got xpu; dlu_triton.reference runs on any device"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(**moved)


def test_numbers_of_numpy_and_of_tensors_are_numbers(path):
    tensors = take(path, "features", "kernel_space", "offsets")
    for kind in (np.int64, np.uint8, np.array, torch.tensor):
        assert dlu_triton.dlu_upsample(*tensors.values(), kind(2), kind(3), kind(1)).shape == (1, 4, 6, 10)
        assert dlu_triton.dlu_upsample(*tensors.values(), 2, 3, 1, (kind(5), kind(9))).shape == (1, 4, 5, 9)
        assert dlu_triton.CARAFEPack(kind(8), kind(2)).up_kernel == 5
    tensors = take(path, "activations", "gradients").values()
    for eps in (
        np.float16(1),
        np.float32(1e-6),
        np.float64(0),
        0,
        1,
        Fraction(1, 10**6),
        torch.finfo(torch.float32).max,
    ):
        size = (np.int32(2), np.int64(3))
        for library in (dlu_triton, reference):
            assert library.class_activation_map(*tensors, eps=eps, size=size).shape == (2, 2, 3)


def test_fractions_are_numbers_to_explainers_and_overlays(device):
    model, x = network(device), torch.rand(2, 3, 6, 6, device=device)
    found, expected = (dlu_triton.XGradCAM(model, "0", eps=eps)(x, 0).raw for eps in (Fraction(1, 8), 0.125))
    assert torch.equal(found, expected)
    pytest.importorskip("matplotlib")
    right = RIGHT["overlay"](device)
    assert np.array_equal(dlu_triton.overlay(**right, alpha=Fraction(1, 4)), dlu_triton.overlay(**right, alpha=0.25))


@pytest.mark.parametrize("dtype", _checks.INTEGERS, ids=str)
@pytest.mark.parametrize("as_given", (lambda t: t, lambda t: t.numpy()), ids=("tensor", "array"))
def test_classes_are_integers_of_any_type(dtype, as_given, device):
    model, x = network(device), torch.rand(2, 3, 6, 6, device=device)
    classes = torch.tensor([1, 4])
    found = dlu_triton.GradCAM(model, "0")(x, as_given(classes.to(dtype)))
    assert torch.equal(found.scores, model(x).detach().gather(1, classes.to(device).unsqueeze(1)).squeeze(1))
    assert (found.target.dtype, found.target.tolist()) == (torch.int64, [1, 4])


def test_meta_tensors_go_together():
    """Where shapes alone are wanted, nothing is said about values."""
    maps, boxes = (tensor.to("meta") for tensor in RIGHT["metrics.energy_in_box"]("cpu").values())
    assert metrics.energy_in_box(maps, boxes).shape == metrics.pointing_hit(maps, boxes).shape == (2,)


@pytest.mark.parametrize("name", PACKS)
def test_compiled_modules_say_what_is_wrong(name, device):
    """As in eager code; where one graph is asked for, within what the compiler says."""
    pack = getattr(dlu_triton, name)(**PACK).to(device)
    message = "x must have shape (N, channels, H, W) with 8 channels, got (1, 4, 3, 5)"
    for options, error in (({}, ValueError), ({"fullgraph": True}, RuntimeError)):
        torch.compiler.reset()
        with pytest.raises(error) as caught:
            torch.compile(pack, backend="aot_eager", **options)(torch.zeros(1, 4, 3, 5, device=device))
        assert message in f"{caught.value}{caught.value.__cause__}"


@pytest.mark.parametrize("name", PACKS)
def test_exported_programs_say_what_is_wrong(name, device):
    pack = getattr(dlu_triton, name)(**PACK).to(device)
    message = "x must have shape (N, channels, H, W) with 8 channels, got (1, 4, 3, 5)"
    for strict, error in ((False, ValueError), (True, RuntimeError)):
        with pytest.raises(error) as caught:
            torch.export.export(pack, (torch.zeros(1, 4, 3, 5, device=device),), strict=strict)
        assert message in f"{caught.value}{caught.value.__cause__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 4}, "size mismatch for channel_compressor.weight"),
        ({"scale_factor": 4}, "size mismatch for conv_offset.weight"),
        ({"up_group": 2}, "size mismatch for kernel_space_generator.weight"),
    ],
)
def test_state_dicts_that_do_not_fit(arguments, message):
    """In PyTorch's words."""
    state = dlu_triton.DLUPack(**{**PACK, **arguments}).state_dict()
    with pytest.raises(RuntimeError, match=message):
        dlu_triton.DLUPack(**PACK).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*content_encoder"):
        dlu_triton.DLUPack(**PACK).load_state_dict(dlu_triton.CARAFEPack(**PACK).state_dict())
