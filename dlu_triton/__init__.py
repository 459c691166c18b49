"""DLU and CARAFE upsampling for PyTorch, as Triton kernels."""

from . import reference
from .modules import CARAFE, CARAFEPack, DLUPack
from .ops.carafe import carafe
from .ops.dlu import dlu_upsample, expand_kernels

__version__ = "0.1.0.dev0"
__all__ = ["CARAFE", "CARAFEPack", "DLUPack", "carafe", "dlu_upsample", "expand_kernels", "reference"]
