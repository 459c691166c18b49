"""What is run of the class activation maps: the shapes, and the random tensors of a shape."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

IMAGE = (224, 224)  # what a map is resized to


class CAMCase(NamedTuple):
    """A layer (N, C, h, w) whose map is resized to IMAGE and normalised; strings, so that a record can hold it."""

    n: int
    c: int
    h: int
    w: int
    method: str = "xgradcam"
    dtype: str = "float32"
    layout: str = "contiguous"  # or channels_last, or tokens: (N, 1 + h * w, C) without its class token

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w}-{self.method}-{self.dtype}-{self.layout}"


class ExplanationCase(NamedTuple):
    """XGrad-CAM of a network of the given width, from square images to maps of their size."""

    net: str
    n: int
    image: int = 224
    width: int = 64  # of the first stage; 64 is the published one
    dtype: str = "float32"
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.net}-width{self.width}-{self.n}x3x{self.image}x{self.image}-{self.dtype}-{self.layout}"


RESNET, VGG, WIDE, EARLY = (2048, 7, 7), (512, 14, 14), (1024, 14, 14), (256, 56, 56)
VITS, VITB = (384, 16, 16), (768, 16, 16)

# On a CPU: enough to see that everything runs, with one compilation each.
CPU = [
    CAMCase(1, 64, 7, 7),
    CAMCase(2, 32, 14, 14, "gradcam++", layout="channels_last"),
    CAMCase(1, 48, 16, 16, dtype="bfloat16", layout="tokens"),
    CAMCase(1, 64, 7, 7, "hirescam", dtype="float16"),
]

QUICK = [
    *(CAMCase(n, *RESNET) for n in (1, 8, 64, 256)),  # 256: 103 MB of activations
    *(CAMCase(n, *RESNET, dtype="float16") for n in (1, 64)),
    *(CAMCase(64, *RESNET, dtype=dtype, layout="channels_last") for dtype in ("float32", "bfloat16")),
    *(CAMCase(8, *VGG, dtype=dtype) for dtype in ("float32", "float16")),
    CAMCase(64, *VITB, dtype="bfloat16", layout="tokens"),
    CAMCase(64, *EARLY),  # 205 MB
    *(CAMCase(64, *RESNET, method) for method in ("gradcam", "gradcam++", "hirescam")),
]

FULL = [
    *QUICK,
    *(
        CAMCase(n, *layer, dtype=dtype, layout=layout)
        for layer in (RESNET, VGG, WIDE, EARLY)
        for n in (1, 8, 64)
        for dtype in ("float32", "bfloat16", "float16")
        for layout in ("contiguous", "channels_last")
    ),
    *(
        CAMCase(n, *layer, dtype=dtype, layout="tokens")
        for layer in (VITS, VITB)
        for n in (1, 8, 64)
        for dtype in ("float32", "bfloat16", "float16")
    ),
    *(CAMCase(n, *VGG, method) for n in (1, 64) for method in ("gradcam", "gradcam++", "hirescam")),
]

CPU_EXPLANATIONS = [ExplanationCase(net, 1, image=64, width=8) for net in ("resnet50", "vgg16")]
QUICK_EXPLANATIONS = [ExplanationCase(net, n) for net in ("resnet50", "vgg16") for n in (1, 16)]
FULL_EXPLANATIONS = [
    *QUICK_EXPLANATIONS,
    *(ExplanationCase("resnet50", 16, dtype=dtype, layout="channels_last") for dtype in ("float32", "float16")),
    *(ExplanationCase("resnet50", n) for n in (8, 64)),
]


# Where torch.compile takes part, as it takes some 7 seconds a case.
COMPILED = [
    *CPU,
    *(CAMCase(n, *RESNET) for n in (1, 64)),
    CAMCase(64, *RESNET, dtype="bfloat16", layout="channels_last"),
    CAMCase(64, *VITB, dtype="bfloat16", layout="tokens"),
    CAMCase(64, *EARLY),
]


SELECTIONS = {
    "interpreted": (CPU, []),
    "cpu": (CPU, CPU_EXPLANATIONS),
    "quick": (QUICK, QUICK_EXPLANATIONS),
    "full": (FULL, FULL_EXPLANATIONS),
}


def selection(name: str, implementations: Iterable[str]) -> list[tuple[CAMCase, str]]:
    """Pairs of case and implementation, those of a case together."""
    selected = dict.fromkeys(SELECTIONS[name][0])
    return [(case, impl) for case in selected for impl in implementations if impl != "compiled" or case in COMPILED]


def explanations(name: str) -> list[ExplanationCase]:
    return SELECTIONS[name][1]


def inputs(case: CAMCase, device: str) -> tuple[Tensor, Tensor]:
    """Random activations and gradients, the same at every call.

    Activations of tokens are signed, with a mean away from zero, where the weights of XGrad-CAM make sense; others
    are what a ReLU lets through.
    """
    n, c, h, w = case[:4]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    dtype = getattr(torch, case.dtype)
    if case.layout == "tokens":
        tokens = (normal(n, 1 + h * w, c) + 0.5).to(dtype), normal(n, 1 + h * w, c).to(dtype)
        activations, gradients = (x[:, 1:].transpose(1, 2).unflatten(2, (h, w)) for x in tokens)
        return activations, gradients
    layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    planes = normal(n, c, h, w).relu(), normal(n, c, h, w)
    activations, gradients = (x.to(dtype).contiguous(memory_format=layout) for x in planes)
    return activations, gradients


def ideal_bytes(case: CAMCase) -> int:
    """Activations and gradients are read once, a float32 map is written."""
    read = 2 * case.n * case.c * case.h * case.w * getattr(torch, case.dtype).itemsize
    return read + case.n * IMAGE[0] * IMAGE[1] * torch.float32.itemsize
