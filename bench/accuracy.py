"""How far results are from float64, and how far they may be."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from cases import Case
from torch import Tensor

# Rounding that the eager twin may happen not to show, in units of the largest true value.
FLOOR = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-6, "float64": 1e-13}


class Error(NamedTuple):
    """Largest errors of a tensor, in units of its largest true value: of the result, and of the definition."""

    result: float
    eager: float


def evaluate(
    function: Callable[..., Tensor], case: Case, direction: str, tensors: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor, ...]:
    """The output and, after a backward pass, the gradient of every tensor."""
    if direction == "forward":
        with torch.no_grad():
            return (function(*tensors, case.scale, case.kernel),)
    output = function(*tensors, case.scale, case.kernel)
    return output.detach(), *torch.autograd.grad(output, tensors, gradient)


def errors(
    definition: Callable[..., Tensor],
    case: Case,
    direction: str,
    tensors: Sequence[Tensor],
    gradient: Tensor,
    results: Sequence[Tensor],
) -> list[Error]:
    """Errors of what `evaluate` returned, against the definition in float64.

    Images do not depend on each other: one at a time is compared, so that float64 fits into memory.
    """
    peaks = []  # per image and tensor: largest true value, error of the result, error of the definition in this type
    for n in range(case.n):
        upstream = gradient[n : n + 1]
        inputs = [tensor.detach()[n : n + 1].requires_grad_() for tensor in tensors]
        doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
        eager = evaluate(definition, case, direction, inputs, upstream)
        truth = evaluate(definition, case, direction, doubles, upstream.double())
        for result, twin in zip(results, eager, strict=True):
            if (result.dtype, result.shape[1:], len(result)) != (twin.dtype, twin.shape[1:], case.n):
                raise ValueError(f"{result.dtype} {tuple(result.shape)} is not a batch of {twin.dtype} {twin.shape}")
        images = [result[n : n + 1] for result in results]
        peaks.append([_peaks(*row) for row in zip(truth, images, eager, strict=True)])
    largest = torch.tensor(peaks, dtype=torch.float64).amax(dim=0)  # amax keeps a NaN
    return [Error(result / true, eager / true) for true, result, eager in largest.tolist()]


def limit(op: str, case: Case, eager: float) -> float:
    """Largest error that an implementation may have, next to that of the eager twin in the same type."""
    floor = FLOOR[case.dtype]
    if op == "copy":
        return 0.0
    if op == "interpolate":  # has no twin; the more outputs share a source pixel, the more its gradient is rounded
        return 4 * case.scale * floor
    return 4 * eager + floor


def _peaks(truth: Tensor, result: Tensor, eager: Tensor) -> list[float]:
    return [difference.abs().amax().item() for difference in (truth, result - truth, eager - truth)]
