"""Passes through an operator or a module, how far their results are from float64, and how far they may be."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch._functorch.config
from cases import BACKWARD, BOTH, CONTEXT, FORWARD, NECK, STEP, Case
from torch import Tensor, nn

# Rounding that the eager twin may happen not to show, in units of the largest true value.
FLOOR = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-6, "float64": 1e-13}
# For code of others, which may sum in half precision or sample at coordinates of float32: enough to see a wrong result.
FOREIGN = {"bfloat16": 0.1, "float16": 0.03, "float32": 1e-4, "float64": 1e-4}
CHUNK = 2**25  # elements of the output that are compared at a time, so that float64 fits into memory
# As detectors are trained, but for the learning rate: many steps by the same random gradient would lead anywhere, so
# weights stay where they are.
OPTIMISER = {"lr": 1e-12, "momentum": 0.9, "weight_decay": 1e-4}


class Error(NamedTuple):
    """Largest errors of a tensor, in units of its largest true value: of the result, and of the definition."""

    result: float
    eager: float


Outputs = Tensor | tuple[Tensor, ...]


def ready(
    function: Callable[..., Outputs], direction: str, tensors: Sequence[Tensor], gradient: Outputs
) -> Callable[[], tuple[Tensor, ...]]:
    """A pass that can be run again and again. It returns the outputs, but for `backward`, then every gradient.

    Of `backward` the graph is built here, and kept. A `step` has an optimiser besides, for the parameters among the
    tensors.
    """
    upstream = each_output(gradient)
    if direction == BACKWARD:
        # torch.compile would have the backward pass write over what the graph keeps.
        with torch._functorch.config.patch(donated_buffer=False):
            kept = each_output(function(*tensors))
        return lambda: torch.autograd.grad(kept, tensors, upstream, retain_graph=True)
    if direction == STEP:
        return _step(function, tensors, upstream)

    def call() -> tuple[Tensor, ...]:
        if direction == FORWARD:
            with torch.no_grad():
                return each_output(function(*tensors))
        outputs = each_output(function(*tensors))
        return *(output.detach() for output in outputs), *torch.autograd.grad(outputs, tensors, upstream)

    return call


def each_output(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _step(
    function: Callable[..., Outputs], tensors: Sequence[Tensor], upstream: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, backward and optimiser, as a training loop has them; without parameters there is nothing to optimise."""
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    optimiser = torch.optim.SGD(parameters, **OPTIMISER) if parameters else None

    def call() -> tuple[Tensor, ...]:
        outputs = each_output(function(*tensors))
        torch.autograd.backward(outputs, upstream, inputs=list(tensors))
        if optimiser is not None:
            optimiser.step()
        gradients = [tensor.grad for tensor in tensors]
        for tensor in tensors:  # none left over, so that a call takes the memory of a whole step
            tensor.grad = None
        return *(output.detach() for output in outputs), *gradients

    return call


def errors(
    definition: Callable[..., Outputs],
    direction: str,
    tensors: Sequence[Tensor],
    gradient: Outputs,
    results: Sequence[Tensor],
    images: int | None,
) -> list[Error]:
    """Errors of what a pass returned, against the definition in float64, for that many images at a time.

    None compares the whole batch at once, as parameters need, whose gradients are sums over it. Of a `step` the outputs
    and gradients are compared; `tensors` are those before it.
    """
    direction = BOTH if direction == STEP else direction
    gradients = each_output(gradient)
    peaks = []  # per chunk and result: largest true value, error of the result, error of the definition in this type
    count, end = len(tensors), len(tensors) + len(gradients)
    for chunk in zip(*(_chunks(tensor.detach(), images) for tensor in (*tensors, *gradients, *results)), strict=True):
        inputs, upstream, found = chunk[:count], chunk[count:end], chunk[end:]
        eager = ready(definition, direction, _leaves(inputs), upstream)()
        wide = _leaves(tensor.double() for tensor in inputs)
        truth = ready(definition, direction, wide, tuple(tensor.double() for tensor in upstream))()
        for result, twin in zip(found, eager, strict=True):
            if (result.dtype, result.shape) != (twin.dtype, twin.shape):
                raise ValueError(f"expected {twin.dtype} {tuple(twin.shape)}, got {result.dtype} {tuple(result.shape)}")
        peaks.append([_peaks(*row) for row in zip(truth, found, eager, strict=True)])
    largest = torch.tensor(peaks, dtype=torch.float64).amax(dim=0)  # amax keeps a NaN
    return [Error(result / true, eager / true) for true, result, eager in largest.tolist()]


def chunk_images(case: Case) -> int:
    return max(1, CHUNK // (case.c * case.h * case.w * case.scale**2))


def limit(op: str, case: Case, eager: float, *, foreign: bool) -> float:
    """Largest error that an implementation may have, next to that of the eager twin in the same type."""
    floor = FLOOR[case.dtype] * (4 if op == NECK else 1)  # its upsamplers take from each other
    if op == "copy":
        return 0.0
    if op in CONTEXT:
        # The more outputs share a source pixel, the more its gradient is rounded. Coordinates of DySample, which are
        # normalised, are rounded by a few units in the last place of the size of the image.
        return 4 * case.scale * floor + (4e-7 * max(case.h, case.w) if op == "dysample" else 0)
    return max(4 * eager + floor, FOREIGN[case.dtype] if foreign else 0)


def _chunks(tensor: Tensor, images: int | None) -> Sequence[Tensor]:
    return (tensor,) if images is None else tensor.split(images)


def _leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def _peaks(truth: Tensor, result: Tensor, eager: Tensor) -> list[float]:
    return [difference.abs().amax().item() for difference in (truth, result - truth, eager - truth)]
