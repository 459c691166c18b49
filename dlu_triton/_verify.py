"""Kernels held against float64: the cases, the measure and the bound, for `python -m dlu_triton verify` and tests."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _launch, reference
from .ops import dlu
from .ops.cam import class_activation_map
from .ops.carafe import carafe, carafe_upsample

OPERATORS = ("dlu_upsample", "expand_kernels", "carafe", "carafe_upsample")
CAM = "class_activation_map"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# An error may be twice that of eager PyTorch in the same dtype, plus this many machine epsilons of the largest value.
# Float32 products run as three TF32 products, whose sums the tensor cores truncate instead of rounding; the
# interpreter truncates when it stores bfloat16.
SLACK = {torch.float64: 32, torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}


@dataclass(frozen=True)
class Case:
    """Sizes and layout of one comparison. `reach` is the standard deviation of the offsets in source pixels."""

    name: str
    batch: int = 1
    channels: int = 8
    height: int = 5
    width: int = 7
    scale_factor: int = 2
    kernel_size: int = 5
    groups: int = 1
    reach: float = 1.0
    channels_last: bool = False
    output_size: tuple[int, int] | None = None  # where it is not scale_factor times that of the source
    kernel_dtype: torch.dtype | None = None  # of kernel space, offsets and masks, where it is not that of the features
    gpu_only: bool = False  # too large for a CPU
    seed: int = 0


CASES = (
    Case("typical", batch=2, channels=33, height=9, width=7),
    Case("channels_last", batch=2, channels=32, channels_last=True),
    Case("groups", channels=12, kernel_size=3, groups=4),
    Case("one group per channel", channels=3, scale_factor=3, groups=3, reach=4.0),
    Case("float32 kernels", channels=16, kernel_dtype=torch.float32),
    Case("bfloat16 kernels", channels=16, kernel_dtype=torch.bfloat16),
    Case("odd pyramid", channels=24, height=6, width=8, output_size=(11, 15)),
    Case("odd pyramid, channels_last", channels=24, height=6, width=8, output_size=(11, 15), channels_last=True),
    Case("cut inside, scale 4", channels=5, scale_factor=4, kernel_size=3, output_size=(9, 17)),
    Case("1 x 1 map", channels=3, height=1, width=1),
    Case("1 x 7 map", channels=1, height=1),
    Case("scale 1, kernel 9", channels=5, scale_factor=1, kernel_size=9),
    Case("scale 3, kernel 7", channels=6, height=4, width=3, scale_factor=3, kernel_size=7, groups=2),
    Case("scale 4, kernel 1", channels=17, height=3, width=6, scale_factor=4, kernel_size=1),
    Case("scale 16, kernel 3", channels=2, height=3, width=2, scale_factor=16, kernel_size=3, reach=2.0),
    Case("zero offsets", height=4, width=4, reach=0.0),  # on pixels, and on the border
    Case("far offsets", height=6, width=6, reach=1e6),
    Case("FPN level", batch=2, channels=256, height=52, width=84, gpu_only=True),
    Case("FPN level, channels_last", batch=2, channels=256, height=50, width=83, channels_last=True, gpu_only=True),
)


@dataclass(frozen=True)
class CAMCase:
    """Sizes and layout of one comparison of class activation maps. `classes` is the number of maps of an image."""

    name: str
    method: str
    batch: int = 1
    channels: int = 40
    height: int = 5
    width: int = 7
    classes: int | None = None
    size: tuple[int, int] | None = (13, 12)
    relu: bool = True
    channels_last: bool = False
    gradient_dtype: torch.dtype | None = None  # where it is not that of the activations
    gpu_only: bool = False
    seed: int = 0


CAM_CASES = (
    CAMCase("xgradcam", "xgradcam", batch=2),
    CAMCase("xgradcam, 3 classes", "xgradcam", batch=2, classes=3, size=None),
    CAMCase("xgradcam, channels_last", "xgradcam", channels=70, channels_last=True),
    CAMCase("xgradcam, 64 channels last", "xgradcam", channels=64, channels_last=True),
    CAMCase("xgradcam, float32 gradients", "xgradcam", gradient_dtype=torch.float32),
    CAMCase("xgradcam, large plane", "xgradcam", channels=3, height=70, width=61),
    CAMCase("xgradcam, 1 x 1 map", "xgradcam", height=1, width=1, relu=False),
    CAMCase("gradcam", "gradcam", relu=False),
    CAMCase("gradcam++", "gradcam++", batch=2),
    CAMCase("gradcam++, large plane", "gradcam++", channels=9, height=40, width=33, channels_last=True, size=(20, 70)),
    CAMCase("hirescam", "hirescam", size=(3, 4)),
    CAMCase("layercam", "layercam", channels=3),
    CAMCase("elementwise", "elementwise", channels=3, height=70, width=61, size=None),
    CAMCase("ResNet-50", "xgradcam", batch=8, channels=2048, height=7, width=7, size=(224, 224), gpu_only=True),
    CAMCase("VGG-16", "xgradcam", batch=8, channels=512, height=14, width=14, size=(224, 224), gpu_only=True),
)


def inputs(operator: str, case: Case | CAMCase, dtype: torch.dtype, device: str | torch.device) -> dict[str, Tensor]:
    """Random arguments of an operator by name, and `grad_output`."""
    generator = torch.Generator().manual_seed(case.seed)
    if isinstance(case, CAMCase):
        return _cam_inputs(case, dtype, device, generator)
    n, h, w, s, g = case.batch, case.height, case.width, case.scale_factor, case.groups
    taps = g * case.kernel_size**2
    kernel_dtype = case.kernel_dtype or dtype

    def draw(channels: int, height: int, width: int, dtype: torch.dtype, deviation: float = 1.0) -> Tensor:
        values = torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64) * deviation
        values = values.clamp(-6e4, 6e4).to(device, dtype)
        return values.contiguous(memory_format=torch.channels_last) if case.channels_last else values

    size = case.output_size or (s * h, s * w)
    features = draw(case.channels, h, w, dtype)
    space, offsets = draw(taps, h, w, kernel_dtype), draw(2 * g * s * s, h, w, kernel_dtype, case.reach)
    if operator == "dlu_upsample":
        grad_output = draw(case.channels, *size, dtype)
        return {"features": features, "kernel_space": space, "offsets": offsets, "grad_output": grad_output}
    if operator == "expand_kernels":
        return {"kernel_space": space, "offsets": offsets, "grad_output": draw(taps, *size, kernel_dtype)}
    if operator == "carafe_upsample":
        kernels = {"logits": draw(taps * s * s, h, w, kernel_dtype)}
    else:
        kernels = {"masks": draw(taps, *size, kernel_dtype)}
    return {"features": features, **kernels, "grad_output": draw(case.channels, *size, dtype)}


def _cam_inputs(
    case: CAMCase, dtype: torch.dtype, device: str | torch.device, generator: torch.Generator
) -> dict[str, Tensor]:
    n, c, h, w = case.batch, case.channels, case.height, case.width
    maps = (n,) if case.classes is None else (n, case.classes)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    activations, gradients = draw(n, c, h, w).relu(), draw(*maps, c, h, w)
    if case.channels_last:
        activations, gradients = (x.movedim(-3, -1).contiguous().movedim(-1, -3) for x in (activations, gradients))
    return {
        "activations": activations.to(device, dtype),
        "gradients": gradients.to(device, case.gradient_dtype or dtype),
        "grad_output": draw(*maps, *(case.size or (h, w))).to(device, torch.promote_types(dtype, torch.float32)),
    }


def function(operator: str, case: Case | CAMCase, *, eager: bool) -> Callable[..., Tensor]:
    """The operator, or its eager twin, as a function of its tensors."""
    if isinstance(case, CAMCase):
        cam = reference.class_activation_map if eager else class_activation_map
        return lambda *tensors: cam(*tensors, method=case.method, relu=case.relu, size=case.size)
    s, k, g, size = case.scale_factor, case.kernel_size, case.groups, case.output_size
    if operator == "carafe":
        call = reference.carafe if eager else carafe
        return lambda features, masks: call(features, masks, k, g, s, size)
    kernels = carafe_upsample if operator == "carafe_upsample" else getattr(dlu, operator)
    call = getattr(reference, operator) if eager else kernels
    return lambda *tensors: call(*tensors, s, k, g, size)


def results(
    call: Callable[..., Tensor], arguments: dict[str, Tensor], wanted: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Output and gradients by name, of all inputs or the wanted ones."""
    tensors = {name: value.detach() for name, value in arguments.items() if name != "grad_output"}
    wanted = tuple(tensors) if wanted is None else wanted
    differentiated = [tensors[name].requires_grad_() for name in wanted]
    output = call(*tensors.values())
    gradients = torch.autograd.grad(output, differentiated, arguments["grad_output"]) if wanted else ()
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


@dataclass(frozen=True)
class Comparison:
    """Largest errors of one result against float64."""

    kernel: float
    eager: float
    bound: float
    largest: float  # of the true values

    @property
    def passed(self) -> bool:
        return self.kernel <= self.bound  # False for NaN


def compare(
    operator: str,
    case: Case | CAMCase,
    dtype: torch.dtype,
    device: str | torch.device,
    results: Callable[[Callable[..., Tensor], dict[str, Tensor]], dict[str, Tensor]] = results,
) -> dict[str, Comparison]:
    """Errors of output and gradients, or of what else `results` finds, by name."""
    arguments = inputs(operator, case, dtype, device)
    exact = {name: value.double() for name, value in arguments.items()}
    truth = results(function(operator, case, eager=True), exact)
    eager = results(function(operator, case, eager=True), arguments)
    kernel = results(function(operator, case, eager=False), arguments)
    return comparisons(truth, eager, kernel)


def comparisons(
    truth: dict[str, Tensor], eager: dict[str, Tensor], kernel: dict[str, Tensor], least: Mapping[str, float] = {}
) -> dict[str, Comparison]:
    """Errors of results by name, and the bound of each, for which their largest value counts as `least` if below."""
    found = {}
    for name, expected in truth.items():
        if kernel[name].shape != expected.shape or kernel[name].dtype != eager[name].dtype:
            found[name] = Comparison(float("nan"), 0.0, 0.0, 0.0)
            continue
        dtype = kernel[name].dtype
        # Float64 is held against itself, so where the result is zero its own rounding is all there is.
        largest = largest_of(expected)
        counted = max(largest, least.get(name, 0.0), 1.0 if dtype == torch.float64 else 0.0)
        slack = SLACK[dtype] * torch.finfo(dtype).eps * counted
        eager_error, kernel_error = (largest_of(results[name].double() - expected) for results in (eager, kernel))
        found[name] = Comparison(kernel_error, eager_error, 2 * eager_error + slack, largest)
    return found


def largest_of(tensor: Tensor) -> float:
    """The largest magnitude; none in an empty batch."""
    return tensor.abs().max().item() if tensor.numel() else 0.0


def applies(case: Case | CAMCase, operator: str, dtype: torch.dtype) -> bool:
    """Whether a case of mixed types is one for this operator and type of features or activations."""
    if isinstance(case, CAMCase):
        return case.gradient_dtype is None or dtype not in (torch.float64, case.gradient_dtype)
    if case.kernel_dtype is None:
        return True
    return operator != "expand_kernels" and dtype not in (torch.float64, case.kernel_dtype)


def rows(
    device: str | torch.device, operators: Sequence[str] = (*OPERATORS, CAM)
) -> Iterator[tuple[str, torch.dtype, Case | CAMCase, dict[str, Comparison]]]:
    for operator in operators:
        for dtype in DTYPES:
            for case in CAM_CASES if operator == CAM else CASES:
                if case.gpu_only and torch.device(device).type == "cpu":
                    continue
                if applies(case, operator, dtype):
                    yield operator, dtype, case, compare(operator, case, dtype, device)


def run() -> int:
    """Print the table; 1 if any error is past its bound."""
    device = "cpu" if _launch.INTERPRETED else "cuda"
    where = "Triton's interpreter on the CPU" if device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}")
    print("Largest absolute error against float64, kernel / eager in the same dtype.")
    print("Bound: twice eager's, plus a few roundings of the largest value.\n")
    columns = ("output", "features or activations", "kernel_space or masks or logits or gradients", "offsets")
    headings = ("output", "features, activations", "kernels, gradients", "offsets")
    print(f"{'operator':22}{'dtype':10}{'case':29}" + "".join(f"{heading:23}" for heading in headings))
    start, checked, failed = time.perf_counter(), 0, 0
    for operator, dtype, case, comparisons in rows(device):
        cells = []
        for column in columns:
            found = [comparisons[name] for name in column.split(" or ") if name in comparisons]
            cells.append("".join(f"{c.kernel:.1e} / {c.eager:.1e}{'' if c.passed else ' FAIL'}" for c in found))
            checked += len(found)
            failed += sum(not c.passed for c in found)
        line = f"{operator:22}{str(dtype).removeprefix('torch.'):10}{case.name:29}"
        print((line + "".join(f"{cell:23}" for cell in cells)).rstrip(), flush=True)
    verdict = "all within bounds" if not failed else f"{failed} PAST THEIR BOUND"
    print(f"\n{checked} results checked in {time.perf_counter() - start:.0f} s: {verdict}")
    return 1 if failed else 0
