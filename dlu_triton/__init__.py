"""DLU and CARAFE upsampling and class activation maps for PyTorch, as Triton kernels."""

from . import reference
from .modules import CARAFE, CARAFEPack, DLUPack
from .ops.cam import class_activation_map, class_activation_parts, weighted_activation_map, xgrad_cam
from .ops.carafe import carafe
from .ops.dlu import dlu_upsample, expand_kernels
from .reference import CAMParts

__version__ = "0.1.0.dev0"
__all__ = [
    "CARAFE",
    "CAMParts",
    "CARAFEPack",
    "DLUPack",
    "carafe",
    "class_activation_map",
    "class_activation_parts",
    "dlu_upsample",
    "expand_kernels",
    "reference",
    "weighted_activation_map",
    "xgrad_cam",
]
