"""Libraries that rivals come from, imported when they are first needed: none of them is a dependency."""

import importlib
from contextlib import suppress
from functools import cache
from types import ModuleType

import torch

_schemas = []  # a library's definitions go with it


@cache
def library(name: str) -> ModuleType:
    """Import a rival, which may need torchvision."""
    with suppress(ImportError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # built for CUDA, beside a CPU build of torch: two operators that it looks up are missing
            schemas = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _schemas.append(schemas)
    return importlib.import_module(name)
