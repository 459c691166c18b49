"""What is run: the shapes, the random tensors of a shape, and the bytes that an operator has to move."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlu_triton import _launch

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DYSAMPLE_GROUPS = 4  # of channels with offsets of their own, as its authors have
# Where outputs sample the kernel space: about their own source pixel, or all of them in the middle of the same four.
NEAR, ONE_POINT = "near", "one point"


class Case(NamedTuple):
    """Features (N, C, H, W), and how they are upsampled; strings, so that a record can hold it.

    Of a neck these are the features of its coarsest level.
    """

    n: int
    c: int
    h: int
    w: int
    scale: int = 2
    kernel: int = 5
    dtype: str = "bfloat16"
    layout: str = "contiguous"
    offsets: str = NEAR

    def __str__(self) -> str:
        offsets = "" if self.offsets == NEAR else "-one-point"
        return f"{self.n}x{self.c}x{self.h}x{self.w}-x{self.scale}-k{self.kernel}{offsets}-{self.dtype}-{self.layout}"

    @property
    def small(self) -> bool:
        """Whether the device may be done before the host has launched the next call."""
        return self.n <= 2 and self.h * self.w <= 26 * 42


FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "forward+backward", "step"  # with an optimiser's
TWICE, THRICE = (FORWARD, BOTH), (FORWARD, BACKWARD, BOTH)
GRADIENTS, TRAINING = (BACKWARD, BOTH), (BOTH, STEP)


class Entry(NamedTuple):
    """An operator at a case: the passes that are run, and what `triton` is compared with besides the copy.

    `rivals` is one of `all`; `ready`, which is all but `compiled`, that takes 10 to 30 seconds to compile each pass;
    `eager`; `none`; and `modes`, which is `triton` itself in deterministic mode, and in no other list. Of an operator
    without `triton` all runs in any case.
    """

    op: str
    case: Case
    passes: tuple[str, ...] = TWICE
    rivals: str = "ready"

    def runs(self, impl: str) -> bool:
        if self.rivals == "modes" or impl in DETERMINISTIC:
            return self.rivals == "modes" and impl in ("triton", *DETERMINISTIC)
        if self.rivals == "ready":
            return impl != "compiled"
        return self.rivals == "all" or impl in {"eager": ("triton", "eager"), "none": ("triton",)}[self.rivals]


# As `torch.use_deterministic_algorithms` has it, and without the NaN that it writes to every new tensor.
DETERMINISTIC = ("triton-deterministic", "triton-deterministic-unfilled")
DLU, CARAFE, LOGITS, KERNELS = "dlu_upsample", "carafe", "carafe_upsample", "expand_kernels"
MODULE, NECK = "module", "neck"
CONTEXT = ("copy", "interpolate", "dysample")  # have no eager twin
P2, P3, P4, P5 = (104, 168), (52, 84), (26, 42), (13, 21)  # levels of a feature pyramid under 832 x 1344 images
HEADLINE = Case(8, 256, *P2)
WIDE, HALF = HEADLINE._replace(dtype="float32"), HEADLINE._replace(dtype="float16")
LAST = HEADLINE._replace(layout="channels_last")
PYRAMID = Case(2, 256, *P5)  # levels of strides 4 to 64 over two images of 832 x 1344
DTYPES = ("bfloat16", "float16", "float32")
MASK_HEAD = (14, 14)
YOLO = ((640, 20), (256, 20), (320, 40), (128, 40))

# On a CPU: enough to see that everything runs. Few taps, for torch.compile to be done soon.
SMALL = Case(1, 64, *P4, kernel=3, dtype="float32")
SMALL_LAST = Case(2, 32, *P5, scale=4, kernel=3, dtype="float32", layout="channels_last")
CPU = [
    Entry(DLU, SMALL, THRICE, "all"),
    Entry(DLU, SMALL_LAST, (FORWARD,), "all"),
    Entry(DLU, SMALL_LAST, (BOTH,)),
    Entry(DLU, Case(1, 64, *P5, kernel=3)),
    Entry(CARAFE, SMALL, TWICE, "all"),
    Entry(CARAFE, SMALL, (BACKWARD,)),
    Entry(LOGITS, SMALL, (FORWARD,), "all"),
    Entry(LOGITS, SMALL, (BOTH,)),
    Entry(KERNELS, SMALL),
    Entry("interpolate", SMALL),
    Entry("dysample", SMALL),
    Entry(MODULE, SMALL, (FORWARD, *TRAINING)),
    Entry(MODULE, Case(1, 64, *P5, layout="channels_last"), (FORWARD, *TRAINING)),
    Entry(NECK, Case(1, 64, 2, 3, dtype="float32"), TRAINING),
]

# As tests of the kernels in Triton's interpreter: few programs.
TINY = Case(1, 32, 4, 6, kernel=3, dtype="float32")
INTERPRETED = [
    *(Entry(op, TINY, THRICE, "eager") for op in (DLU, CARAFE, LOGITS, KERNELS)),
    *(Entry(op, TINY, (BOTH,), "modes") for op in (DLU, KERNELS)),
    Entry(DLU, TINY._replace(offsets=ONE_POINT), (BOTH,), "modes"),
    Entry(MODULE, TINY, (FORWARD, STEP)),
    Entry(NECK, Case(1, 8, 1, 2, kernel=3, dtype="float32"), (STEP,)),
]

# On an H200 some 220 benchmarks at half a second and 5 compilations: 3.5 minutes by this estimate, which is not
# measured. Class activation maps take about 2.5.
QUICK = [
    Entry(DLU, HEADLINE, TWICE, "all"),
    Entry(DLU, HALF, (BOTH,), "all"),
    Entry(DLU, HEADLINE, (BACKWARD,)),
    *(Entry(DLU, case, (BACKWARD,), "eager") for case in (HALF, LAST, Case(2, 256, *P5))),
    *(Entry(DLU, case, GRADIENTS, "modes")
      for case in (HEADLINE, HEADLINE._replace(offsets=ONE_POINT), Case(2, 256, *P5))),
    Entry(DLU, WIDE, (FORWARD,), "all"),
    Entry(DLU, WIDE, (BOTH,)),
    *(Entry(DLU, case) for case in (LAST, HALF)),
    *(Entry(DLU, Case(2, 256, *size)) for size in (P5, P4, P3)),
    Entry(DLU, Case(2, 64, *P3, scale=4)),
    Entry(CARAFE, HEADLINE, (FORWARD,), "all"),
    Entry(CARAFE, HEADLINE, (BOTH,)),
    *(Entry(CARAFE, case) for case in (WIDE, HALF)),
    Entry(CARAFE, HALF, (BACKWARD,)),
    *(Entry(LOGITS, case) for case in (HEADLINE, Case(2, 256, *P5))),
    Entry(LOGITS, HEADLINE, (BACKWARD,), "eager"),
    Entry(KERNELS, HEADLINE),
    Entry(KERNELS, HEADLINE, GRADIENTS, "modes"),
    *(Entry("interpolate", case, (FORWARD,)) for case in (HEADLINE, WIDE, LAST, HALF)),
    Entry("dysample", HEADLINE),
    *(Entry(MODULE, case, (FORWARD, *TRAINING)) for case in (HEADLINE, Case(2, 256, *P5))),
    Entry(MODULE, HALF, TRAINING),  # mmcv's has no bfloat16
    *(Entry(NECK, PYRAMID._replace(layout=layout), TRAINING) for layout in MEMORY_FORMATS),
]  # fmt: skip

# Output elements from 10^4 to 10^9, for the time of each; even widths, as odd ones take a slower way.
SERIES = [*(Case(1, 256, size, size) for size in (4, 12, 32, 100, 316)), Case(10, 256, 316, 316)]

# Some 1000 benchmarks and 20 compilations: 15 minutes by the same estimate, and 8 of class activation maps.
FULL = [
    *QUICK,
    *(Entry(DLU, HEADLINE._replace(dtype=dtype, layout=layout), TWICE, "all")
      for layout in MEMORY_FORMATS for dtype in DTYPES),
    *(Entry(DLU, case, (BACKWARD,)) for case in (WIDE, LAST)),
    *(Entry(op, HEADLINE, (BACKWARD,)) for op in (CARAFE, LOGITS)),
    *(Entry(DLU, Case(n, 256, *size), (BACKWARD,), "eager") for size in (P5, P4, P3) for n in (2, 8)),
    *(Entry(DLU, Case(2, 256, *size, scale=scale), (BACKWARD,), "eager")
      for size, scale in ((P4, 4), (P4, 8), (P5, 16))),
    *(Entry(DLU, case, (BACKWARD,), "eager") for case in (Case(128, 256, *MASK_HEAD), Case(8, 64, *P2))),
    *(Entry(DLU, case, GRADIENTS, "modes") for case in (WIDE, HALF, LAST)),
    *(Entry(DLU, Case(2, 256, *size, offsets=offsets), GRADIENTS, "modes")
      for size in (P5, P4, P3) for offsets in (NEAR, ONE_POINT)),
    Entry(DLU, Case(2, 256, *P5), (FORWARD,), "all"),
    *(Entry(DLU, Case(n, 256, *size), TWICE, "eager") for size in (P5, P4, P3, P2) for n in (1, 4, 16)),
    *(Entry(DLU, Case(8, 256, *size)) for size in (P5, P4, P3)),
    *(Entry(DLU, Case(8, 256, *size, layout="channels_last"), TWICE, "eager") for size in (P5, P4, P3)),
    *(Entry(DLU, Case(8, 256, *size, dtype=dtype), TWICE, "eager") for size in (P5, P4, P3) for dtype in DTYPES[1:]),
    *(Entry(DLU, Case(n, 256, *MASK_HEAD)) for n in (1, 128)),
    Entry(DLU, Case(1024, 256, *MASK_HEAD), TWICE, "eager"),
    Entry(DLU, Case(128, 256, *MASK_HEAD, layout="channels_last"), TWICE, "eager"),
    *(Entry(DLU, Case(4, 512, size, size)) for size in (16, 32, 64, 128)),  # UperNet
    *(Entry(DLU, Case(2, 256, 128, 256, dtype=dtype)) for dtype in DTYPES[:2]),  # a quarter of crops of 512 x 1024
    *(Entry(DLU, Case(8, c, size, size, dtype="float16")) for c, size in YOLO),
    *(Entry(DLU, Case(n, 384, size, size, kernel=3)) for n, size in ((4, 32), (1, 112))),  # FeatUp
    *(Entry(DLU, Case(2, c, *size, scale=scale)) for c in (256, 64) for size, scale in ((P4, 4), (P4, 8), (P5, 16))),
    Entry(DLU, Case(2, 256, *P4, scale=4), (FORWARD,), "all"),
    Entry(DLU, Case(8, 64, *P2)),
    *(Entry(DLU, Case(2, 256, *size)) for size in ((25, 42), (50, 84), (100, 167))),
    Entry(DLU, Case(2, 256, 100, 167, layout="channels_last"), TWICE, "eager"),
    Entry(DLU, Case(1, 64, *P5, dtype="float64"), TWICE, "eager"),
    *(Entry(DLU, case, (FORWARD,), "none") for case in SERIES),
    Entry(CARAFE, HEADLINE, TWICE, "all"),
    Entry(CARAFE, WIDE, (FORWARD,), "all"),
    Entry(CARAFE, LAST),
    *(Entry(CARAFE, Case(8, 256, *size, dtype=dtype)) for size in (P5, P4, P3) for dtype in DTYPES[:2]),
    *(Entry(CARAFE, case, (BACKWARD,), "eager") for case in (WIDE, LAST, Case(128, 256, *MASK_HEAD))),
    *(Entry(CARAFE, Case(128, 256, *MASK_HEAD, dtype=dtype)) for dtype in DTYPES),
    *(Entry(CARAFE, case) for case in (Case(2, 256, 100, 167), Case(2, 256, *P4, scale=8))),
    Entry(LOGITS, HEADLINE, TWICE, "all"),
    *(Entry(LOGITS, case) for case in (WIDE, LAST, HALF, Case(128, 256, *MASK_HEAD))),
    *(Entry(LOGITS, case, (BACKWARD,), "eager") for case in (WIDE, LAST, HALF)),
    *(Entry(LOGITS, Case(2, 256, *P4, scale=scale)) for scale in (4, 8)),
    Entry(KERNELS, HEADLINE, (FORWARD,), "all"),
    *(Entry(KERNELS, case) for case in (WIDE, LAST, Case(2, 256, *P5), Case(2, 256, *P4, scale=8))),
    *(Entry(KERNELS, case, GRADIENTS, "modes") for case in (WIDE, LAST, Case(2, 256, *P5))),
    *(Entry("interpolate", case) for case in (HEADLINE, WIDE, LAST, HALF)),
    *(Entry("interpolate", Case(8, 256, *size), (FORWARD,)) for size in (P5, P4, P3)),
    *(Entry("interpolate", Case(2, 256, *P4, scale=scale), (FORWARD,)) for scale in (4, 8)),
    *(Entry("dysample", case) for case in (WIDE, LAST, HALF, Case(2, 256, *P5))),
    *(Entry(MODULE, case, (FORWARD, *TRAINING)) for case in (WIDE, LAST, HALF, Case(2, 256, *P3))),
    *(Entry(MODULE, Case(2, 256, *size, scale=scale)) for size, scale in ((P4, 4), (P4, 8), (P5, 16))),
    *(Entry(NECK, PYRAMID._replace(dtype=dtype, layout=layout), TRAINING)
      for dtype in DTYPES[1:] for layout in MEMORY_FORMATS),
]  # fmt: skip


SELECTIONS = {"interpreted": INTERPRETED, "cpu": CPU, "quick": QUICK, "full": FULL}


class Run(NamedTuple):
    op: str
    case: Case
    impl: str
    direction: str


def selection(name: str, implementations: dict[str, Iterable[str]]) -> list[Run]:
    """What is run, each once: those of a case together, and its copy first."""
    entries = SELECTIONS[name]
    runs = []
    for case in dict.fromkeys(entry.case for entry in entries):
        runs += [Run("copy", case, impl, FORWARD) for impl in implementations["copy"]]
        runs += [
            Run(entry.op, case, impl, direction)
            for entry in sorted((entry for entry in entries if entry.case == case), key=lambda entry: entry.op)
            for direction in entry.passes
            for impl in implementations[entry.op]
            if entry.runs(impl)
        ]
    return list(dict.fromkeys(runs))


def inputs(op: str, case: Case, device: str) -> dict[str, Tensor]:
    """Random tensors of a case by name, the same at every call, that require gradients.

    Offsets reach two source pixels and keep away from whole ones, where the derivative has two sides. To one point they
    are halves, which half precision holds up to 128 source pixels.
    """
    n, c, h, w, s, k = case[:6]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def offsets(*shape: int) -> Tensor:
        if case.offsets == ONE_POINT:
            x, y = (size // 2 - 0.5 - torch.arange(size, device=device) for size in (w, h))
            one = torch.stack((x.expand(h, w), y[:, None].expand(h, w)))  # (2, H, W): channels of x, then of y
            return one.repeat_interleave(s * s, 0).expand(shape).contiguous()
        whole = torch.randint(-2, 2, shape, generator=generator, device=device)
        return whole + 0.125 + 0.75 * torch.rand(shape, generator=generator, device=device)

    if op == "copy":  # reads half of the bytes that dlu_upsample moves, and writes as many
        tensors = {"source": normal(n, (c + k * k + 2 * s * s + s * s * c) * h * w // 2)}
    elif op == NECK:  # what a ResNet puts out at strides of 4, 8, 16 and 32, finest first
        tensors = {f"c{i}": normal(n, 2**i * c // 4, *size) for i, size in enumerate(_levels(case), start=2)}
    else:
        tensors = {} if op == KERNELS else {"features": normal(n, c, h, w)}
    if op == CARAFE:
        tensors["masks"] = normal(n, k * k, s * h, s * w).softmax(dim=1)
    elif op == LOGITS:
        tensors["logits"] = normal(n, k * k * s * s, h, w)
    elif op in (DLU, KERNELS):
        tensors["kernel_space"] = normal(n, k * k, h, w)
        tensors["offsets"] = offsets(n, 2 * s * s, h, w)
    elif op == "dysample":
        tensors["offsets"] = offsets(n, 2 * DYSAMPLE_GROUPS * s * s, h, w)
    return {name: _as(case, tensor).requires_grad_() for name, tensor in tensors.items()}


def upstream(op: str, case: Case, device: str) -> Tensor | tuple[Tensor, ...]:
    """A random gradient of the output, the same at every call; a copy, which is only run forward, has none.

    A neck has an output for each level, finest first.
    """
    n, c, h, w, s, k = case[:6]
    generator = torch.Generator(device).manual_seed(1)
    if op == NECK:
        sizes = (*_levels(case), (h, w))
        return tuple(_as(case, torch.randn((n, c, *size), generator=generator, device=device)) for size in sizes)
    shape = (n, 0) if op == "copy" else (n, k * k if op == KERNELS else c, s * h, s * w)
    return _as(case, torch.randn(shape, generator=generator, device=device))


def _levels(case: Case) -> list[tuple[int, int]]:
    """Sizes of the four levels above the coarsest, finest first."""
    return [(case.h * case.scale**power, case.w * case.scale**power) for power in (4, 3, 2, 1)]


def shape(op: str, case: Case) -> dict[str, Any]:
    """What a record says of a case besides its type and layout."""
    if op == NECK:
        stride = 4 * case.scale**4  # of the coarsest level
        images = (case.n, 3, stride * case.h, stride * case.w)
        return {"images": images, "channels": case.c, "scale_factor": case.scale, "kernel_size": case.kernel}
    sizes = {"features": case[:4], "scale_factor": case.scale, "kernel_size": case.kernel}
    return sizes if case.offsets == NEAR else {**sizes, "offsets": case.offsets}


def allowed_extra_bytes(op: str, direction: str, case: Case) -> int | None:
    """What training with `dlu_upsample` may take beyond inputs, output and gradients: the normalised kernels."""
    if (op, direction) != (DLU, BOTH):
        return None
    return case.n * _launch.padded_taps(case.kernel) * case.h * case.w * torch.float32.itemsize


def ideal_bytes(
    op: str, direction: str, tensors: Iterable[Tensor], gradient: Tensor | tuple[Tensor, ...]
) -> int | None:
    """Bytes that have to be moved: in a forward pass, every input and the output once.

    A backward pass reads the gradient of the output and the inputs again, and writes the gradient of every input.
    Interpolation is linear, and its backward pass needs no input. None of a neck, and of a step.
    """
    if op == NECK or direction == STEP:
        return None
    inputs = sum(tensor.nbytes for tensor in tensors)
    output = inputs if op == "copy" else gradient.nbytes
    forward, backward = inputs + output, output + (1 if op == "interpolate" else 2) * inputs
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]


def _as(case: Case, tensor: Tensor) -> Tensor:
    tensor = tensor.to(getattr(torch, case.dtype))
    return tensor.to(memory_format=MEMORY_FORMATS[case.layout]) if tensor.dim() == 4 else tensor
