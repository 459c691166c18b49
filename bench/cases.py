"""What is run: the shapes, the random tensors of a shape, and the bytes that an operator has to move."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """Features (N, C, H, W), and how they are upsampled; strings, so that a record can hold it."""

    n: int
    c: int
    h: int
    w: int
    scale: int = 2
    kernel: int = 5
    dtype: str = "bfloat16"
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w}-x{self.scale}-k{self.kernel}-{self.dtype}-{self.layout}"


P2, P3, P4, P5 = (104, 168), (52, 84), (26, 42), (13, 21)  # levels of a feature pyramid under 832 x 1344 images

# On a CPU: enough to see that everything runs. Few taps, for torch.compile to be done soon.
CPU = {
    "dlu_upsample": [
        Case(1, 64, *P4, kernel=3, dtype="float32"),
        Case(2, 32, *P5, scale=4, kernel=3, dtype="float32", layout="channels_last"),
        Case(1, 64, *P5, kernel=3),
    ],
    "carafe": [Case(1, 64, *P4, kernel=3, dtype="float32")],
}

QUICK = {
    "dlu_upsample": [
        *(Case(8, 256, *P2, dtype=dtype) for dtype in ("bfloat16", "float16", "float32")),
        Case(8, 256, *P2, layout="channels_last"),
        *(Case(2, 256, *P3, dtype=dtype) for dtype in ("bfloat16", "float32")),
        Case(2, 256, *P5),
        Case(2, 64, *P3, scale=4),
    ],
    "carafe": [Case(8, 256, *P2, dtype=dtype) for dtype in ("bfloat16", "float32")],
}

FULL = {
    "dlu_upsample": [
        *QUICK["dlu_upsample"],
        *(Case(n, 256, *size) for size in (P5, P4, P3, P2) for n in (1, 2, 4, 8, 16)),
        *(Case(8, 256, *size, layout="channels_last") for size in (P5, P4, P3)),
        *(Case(8, 256, *size, dtype=dtype) for size in (P5, P4, P3) for dtype in ("float16", "float32")),
        Case(128, 256, 14, 14),  # mask head
        Case(128, 256, 14, 14, layout="channels_last"),
        *(Case(4, 512, size, size) for size in (16, 32, 64, 128)),  # UperNet
        *(Case(2, 256, *size) for size in ((25, 42), (50, 84), (100, 167))),
        Case(2, 256, 100, 167, layout="channels_last"),
        *(Case(2, 256, *P4, scale=scale) for scale in (4, 8)),
        Case(2, 256, *P5, scale=16),
        Case(4, 384, 32, 32, kernel=3),
        Case(1, 64, *P5, dtype="float64"),
    ],
    "carafe": [
        *QUICK["carafe"],
        *(Case(8, 256, *size) for size in (P5, P4, P3)),
        Case(8, 256, *P2, layout="channels_last"),
        Case(128, 256, 14, 14),
        Case(2, 256, 100, 167),
        Case(2, 256, *P4, scale=8),
    ],
}


def selection(device: str, *, full: bool) -> list[tuple[str, Case]]:
    """Pairs of operator and case, those of a case together and its copy first."""
    operators = CPU if device == "cpu" else FULL if full else QUICK
    pairs = []
    for case in dict.fromkeys(case for cases in operators.values() for case in cases):
        pairs += [("copy", case), ("interpolate", case)]
        pairs += [(op, case) for op, cases in operators.items() if case in cases]
    return pairs


def inputs(op: str, case: Case, device: str) -> dict[str, Tensor]:
    """Random tensors of a case by name, the same at every call, that require gradients.

    Offsets reach two source pixels and keep away from whole ones, where the derivative has two sides.
    """
    n, c, h, w, s, k = case[:6]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def offsets(*shape: int) -> Tensor:
        whole = torch.randint(-2, 2, shape, generator=generator, device=device)
        return whole + 0.125 + 0.75 * torch.rand(shape, generator=generator, device=device)

    if op == "copy":  # reads half of the bytes that dlu_upsample moves, and writes as many
        tensors = {"source": normal(n, (c + k * k + 2 * s * s + s * s * c) * h * w // 2)}
    else:
        tensors = {"features": normal(n, c, h, w)}
    if op == "carafe":
        tensors["masks"] = normal(n, k * k, s * h, s * w).softmax(dim=1)
    elif op == "dlu_upsample":
        tensors["kernel_space"] = normal(n, k * k, h, w)
        tensors["offsets"] = offsets(n, 2 * s * s, h, w)
    return {name: _as(case, tensor).requires_grad_() for name, tensor in tensors.items()}


def upstream(op: str, case: Case, device: str) -> Tensor:
    """A random gradient of the output, the same at every call; a copy, which is only run forward, has none."""
    n, c, h, w, s = case[:5]
    shape = (0,) if op == "copy" else (n, c, s * h, s * w)
    return _as(case, torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device))


def ideal_bytes(op: str, direction: str, tensors: Iterable[Tensor], output: Tensor) -> int:
    """Bytes that have to be moved: in a forward pass, every input and the output once.

    A backward pass reads the gradient of the output and the inputs again, and writes the gradient of every input.
    Interpolation is linear, and its backward pass needs no input.
    """
    read, written = sum(tensor.nbytes for tensor in tensors), output.nbytes
    if direction == "forward":
        return read + written
    return 2 * read + 2 * written if op == "interpolate" else 3 * read + 2 * written


def _as(case: Case, tensor: Tensor) -> Tensor:
    tensor = tensor.to(getattr(torch, case.dtype))
    return tensor.to(memory_format=MEMORY_FORMATS[case.layout]) if tensor.dim() == 4 else tensor
