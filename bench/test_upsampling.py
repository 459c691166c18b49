"""Times operators, modules, necks and their rivals on the same inputs, each checked against float64 beforehand."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import accuracy
import cases
import measure
import modes
import packs
import pytest
import rivals
import torch
from cases import BACKWARD, BOTH, DETERMINISTIC, FORWARD, MODULE, NECK, STEP, Case
from measure import DEVICE
from records import FOREIGN, Records
from torch import Tensor

import dlu_triton
from dlu_triton import reference

# ---------------------------------------------------------------------------------------------------------------
# What is compared: functions of the inputs, the scale factor and the kernel size
# ---------------------------------------------------------------------------------------------------------------

Upsampler = Callable[..., Tensor]


def _upsampling(triton: Upsampler, eager: Upsampler, shifted: Upsampler, **others: Upsampler) -> dict[str, Upsampler]:
    compiled = torch.compile(shifted, fullgraph=True, dynamic=False)
    # On a CPU dlu_triton takes the eager path, which has its own name here.
    ours = {"triton": triton} if measure.RUNS_KERNELS else {}
    return {**ours, "eager": eager, "compiled": compiled, **{name.replace("_", "-"): f for name, f in others.items()}}


# An operator's `eager` is its definition; where there is none, the implementation itself in float64 is.
OPERATORS = {
    "copy": {"copy": rivals.copy},
    "interpolate": {"interpolate": rivals.bilinear, "nearest": rivals.nearest},
    "dysample": {"dysample": rivals.dysample},
    "dlu_upsample": _upsampling(
        dlu_triton.dlu_upsample,
        reference.dlu_upsample,
        rivals.shifted_dlu,
        unfold=rivals.unfold_dlu,
        unfold_nearest=rivals.nearest_unfold_dlu,
        official=rivals.official_dlu,
    ),
    "carafe": _upsampling(
        partial(dlu_triton.carafe, group_size=1),
        partial(reference.carafe, group_size=1),
        rivals.shifted_carafe,
        unfold=rivals.unfold_carafe,
        unfold_nearest=rivals.nearest_unfold_carafe,
        mmcv=rivals.mmcv_carafe,
    ),
    "carafe_upsample": _upsampling(
        dlu_triton.carafe_upsample,
        reference.carafe_upsample,
        rivals.shifted_carafe_upsample,
        unfold=rivals.unfold_carafe_upsample,
        unfold_nearest=rivals.nearest_unfold_carafe_upsample,
        mmcv=rivals.mmcv_carafe_upsample,
    ),
    "expand_kernels": _upsampling(
        dlu_triton.expand_kernels, reference.expand_kernels, rivals.sampled_masks, official=rivals.official_masks
    ),
}


if measure.RUNS_KERNELS:
    for op in ("dlu_upsample", "expand_kernels"):
        OPERATORS[op] |= dict.fromkeys(DETERMINISTIC, OPERATORS[op]["triton"])


class Subject(NamedTuple):
    """An implementation with its inputs: both functions take the tensors alone."""

    function: Callable[..., accuracy.Outputs]
    definition: Callable[..., accuracy.Outputs]
    tensors: dict[str, Tensor]
    gradient: accuracy.Outputs
    images: int | None  # compared at a time


def _subject(op: str, case: Case, impl: str) -> Subject:
    tensors, gradient = _inputs(op, case)
    if op in (MODULE, NECK):
        module, parameters, definition = packs.build(op, impl, case, DEVICE)
        count = len(tensors)
        return Subject(lambda *both: module(*both[:count]), definition, {**tensors, **parameters}, gradient, None)
    implementations = OPERATORS[op]
    definition = implementations.get("eager", implementations[impl])
    bound = (partial(f, scale_factor=case.scale, kernel_size=case.kernel) for f in (implementations[impl], definition))
    return Subject(*bound, tensors, gradient, accuracy.chunk_images(case))


@lru_cache(maxsize=1)
def _inputs(op: str, case: Case) -> tuple[dict[str, Tensor], accuracy.Outputs]:
    return cases.inputs(op, case, DEVICE), cases.upstream(op, case, DEVICE)


# ---------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    selection = measure.selection(full=metafunc.config.getoption("full", False))
    runs = cases.selection(selection, {**OPERATORS, MODULE: packs.PACKS, NECK: packs.NECKS})
    metafunc.parametrize(cases.Run._fields, [pytest.param(*run, id="-".join(map(str, run))) for run in runs])


@pytest.mark.benchmark(timer=measure.TIMER)
@pytest.mark.filterwarnings("default", "ignore:Benchmark fixture was not used")  # torch.compile's are no errors
def test_upsampling(benchmark: Any, records: Records, op: str, case: Case, impl: str, direction: str) -> None:
    record = benchmark.extra_info
    record |= {
        "op": op,
        "impl": impl,
        "pass": direction,
        "dtype": case.dtype,
        "layout": case.layout,
        "shape": cases.shape(op, case),
        "series": case in cases.SERIES,
    }
    torch.compiler.reset()  # so that torch.compile makes a graph for these sizes alone
    with records.supported(record):
        subject = _subject(op, case, impl)
        tensors = list(subject.tensors.values())
        call = accuracy.ready(subject.function, direction, tensors, subject.gradient)
        if impl in DETERMINISTIC:
            call = modes.deterministic(call, fill=impl == DETERMINISTIC[0])
        before = [tensor.detach().clone() for tensor in tensors] if direction == STEP else tensors
        results = call()
        errors = accuracy.errors(subject.definition, direction, before, subject.gradient, results, subject.images)
        if impl in DETERMINISTIC and not all(map(torch.equal, results, call())):
            pytest.fail(f"{impl} returned something else the second time")
    del before
    outputs = [f"output {i}" for i, _ in enumerate(accuracy.each_output(subject.gradient))]
    gradients = [f"the gradient of {name}" for name in subject.tensors]
    both = outputs + gradients
    names = {FORWARD: outputs, BACKWARD: gradients, BOTH: both, STEP: both}[direction]
    for name, error in zip(names, errors, strict=True):
        limit = accuracy.limit(op, case, error.eager, foreign=impl in FOREIGN)
        records.hold(record, name, error.result, limit)
    del results

    record |= {
        "max_error": max(error.result for error in errors),
        "eager_error": None if op in cases.CONTEXT else max(error.eager for error in errors),
        "ideal_bytes": cases.ideal_bytes(op, direction, tensors, subject.gradient),
        "allowed_extra_bytes": cases.allowed_extra_bytes(op, direction, case),
    }
    benchmark.group = f"{case} {direction}"
    if not benchmark.enabled:
        benchmark.pedantic(call)  # once, as a test
        return
    # The graph of `backward` belongs to the stream that it was built on, where a capture must not launch.
    replays = impl == "triton" and case.small and direction != BACKWARD
    with records.supported(record):
        record |= measure.device_time(benchmark, call, replays=replays)
    records.add(benchmark, case)
