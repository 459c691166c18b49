"""DLU and CARAFE upsampling and class activation maps for PyTorch, as Triton kernels."""

from . import metrics, reference
from ._complexity import Complexity, complexity
from .explain import (
    AblationCAM,
    Explanation,
    FusedExplanation,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
    overlay,
)
from .modules import CARAFE, CARAFEPack, DLUPack
from .ops.cam import class_activation_map, class_activation_parts, weighted_activation_map, xgrad_cam
from .ops.carafe import carafe, carafe_upsample
from .ops.dlu import dlu_upsample, expand_kernels
from .reference import CAMParts

__version__ = "0.1.0"
__all__ = [
    "CARAFE",
    "AblationCAM",
    "CAMParts",
    "CARAFEPack",
    "Complexity",
    "DLUPack",
    "Explanation",
    "FusedExplanation",
    "GradCAM",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "XGradCAM",
    "carafe",
    "carafe_upsample",
    "class_activation_map",
    "class_activation_parts",
    "complexity",
    "dlu_upsample",
    "expand_kernels",
    "metrics",
    "overlay",
    "reference",
    "weighted_activation_map",
    "xgrad_cam",
]
