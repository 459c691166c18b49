"""Times the operators and their rivals on the same inputs, each one checked against float64 before it is timed."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import accuracy
import cases
import measure
import pytest
import rivals
import torch
import torch.nn.functional as F
from cases import Case
from measure import DEVICE
from torch import Tensor

import dlu_triton
from dlu_triton import reference

# ---------------------------------------------------------------------------------------------------------------
# What is compared: functions of the inputs, the scale factor and the kernel size
# ---------------------------------------------------------------------------------------------------------------


class Operator(NamedTuple):
    """An operator by its definition, which computes the truth when it is given float64."""

    definition: Callable[..., Tensor]
    implementations: dict[str, Callable[..., Tensor]]
    directions: tuple[str, ...] = ("forward", "forward+backward")


def _copy(source: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return source.clone()


def _interpolate(features: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return F.interpolate(features, scale_factor=scale_factor, mode="bilinear", align_corners=False)


def _triton_carafe(features: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return dlu_triton.carafe(features, masks, kernel_size, 1, scale_factor)


def _eager_carafe(features: Tensor, masks: Tensor, scale_factor: int, kernel_size: int) -> Tensor:
    return reference.carafe(features, masks, kernel_size, 1, scale_factor)


def _upsampling(
    triton: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    shifted: Callable[..., Tensor],
    unfold: Callable[..., Tensor],
) -> Operator:
    compiled = torch.compile(shifted, fullgraph=True, dynamic=False)
    implementations = {"eager": eager, "compiled": compiled, "unfold": unfold}
    if DEVICE == "cuda":  # on a CPU dlu_triton takes the eager path, which has its own name here
        implementations = {"triton": triton, **implementations}
    return Operator(eager, implementations)


OPERATORS = {
    "copy": Operator(_copy, {"copy": _copy}, ("forward",)),
    "interpolate": Operator(_interpolate, {"interpolate": _interpolate}),
    "dlu_upsample": _upsampling(dlu_triton.dlu_upsample, reference.dlu_upsample, rivals.shifted_dlu, rivals.unfold_dlu),
    "carafe": _upsampling(_triton_carafe, _eager_carafe, rivals.shifted_carafe, rivals.unfold_carafe),
}


# ---------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parameters = [
        pytest.param(op, case, impl, direction, id=f"{op}-{case}-{impl}-{direction}")
        for op, case in cases.selection(DEVICE, full=metafunc.config.getoption("full", False))
        for direction in OPERATORS[op].directions
        for impl in OPERATORS[op].implementations
    ]
    metafunc.parametrize(("op", "case", "impl", "direction"), parameters)


@pytest.mark.benchmark(timer=measure.TIMER)
@pytest.mark.filterwarnings("default", "ignore:Benchmark fixture was not used")  # torch.compile's are no errors
def test_upsampling(
    benchmark: Any, records: list[dict[str, Any]], op: str, case: Case, impl: str, direction: str
) -> None:
    definition, implementations, _ = OPERATORS[op]
    names, tensors, gradient = _inputs(op, case)
    torch.compiler.reset()  # so that torch.compile makes a graph for these sizes alone

    def call() -> tuple[Tensor, ...]:
        return accuracy.evaluate(implementations[impl], case, direction, tensors, gradient)

    cannot_run = None
    try:
        results = call()
        errors = accuracy.errors(definition, case, direction, tensors, gradient, results)
    except RuntimeError as error:
        if impl in ("triton", "eager") and not isinstance(error, torch.OutOfMemoryError):
            raise
        cannot_run = f"{impl} cannot run this case: {type(error).__name__}: {error}"
    if cannot_run is not None:  # the traceback, which held tensors, is gone by now
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        pytest.skip(cannot_run)
    for name, error in zip(names, errors, strict=False):
        limit = accuracy.limit(op, case, error.eager)
        if not error.result <= limit:
            pytest.fail(f"{impl} is wrong: {name} is off by {error.result:.2e} of its largest value, over {limit:.2e}")

    record = benchmark.extra_info
    record |= {
        "op": op,
        "impl": impl,
        "pass": direction,
        "dtype": case.dtype,
        "layout": case.layout,
        "shape": {"features": case[:4], "scale_factor": case.scale, "kernel_size": case.kernel},
        "max_error": max(error.result for error in errors),
        "eager_error": max(error.eager for error in errors) if "eager" in implementations else None,
        "ideal_bytes": cases.ideal_bytes(op, direction, tensors, results[0]),
    }
    del results
    benchmark.group = f"{case} {direction}"
    if not benchmark.enabled:
        benchmark.pedantic(call)  # once, as a test
        return
    record |= measure.device_time(benchmark, call)
    record["gbps"] = record["ideal_bytes"] / benchmark.stats["median"] / 1e9
    copies = [other["gbps"] for other in records if other["op"] == "copy" and other["case"] == case]
    record["roofline"] = record["gbps"] / copies[0] if copies else None
    records.append({**record, "case": case, "seconds": benchmark.stats["median"]})


@lru_cache(maxsize=1)
def _inputs(op: str, case: Case) -> tuple[list[str], list[Tensor], Tensor]:
    """Names of what a pass returns, the inputs, and a gradient of the output."""
    tensors = cases.inputs(op, case, DEVICE)
    names = ["the output", *(f"the gradient of {name}" for name in tensors)]
    return names, list(tensors.values()), cases.upstream(op, case, DEVICE)
