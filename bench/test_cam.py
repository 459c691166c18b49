"""Times class activation maps and their rivals: the operators on the same tensors, explanations on the same network.

Every map is checked before it is timed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import accuracy
import cam_cases
import cam_rivals
import measure
import nets
import pytest
import torch
from cam_cases import IMAGE, CAMCase, ExplanationCase
from measure import DEVICE
from records import FOREIGN, Records
from torch import Tensor

import dlu_triton
from dlu_triton import reference

# Of a map from 0 to 1: what the rivals' epsilons make of it in float32, and about what an eye sees.
RIVALS_LIMIT = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.05}
# Convolutions round to TF32, and not alike in every order.
NETS_LIMIT = {"float32": 5e-3, "float16": 0.05, "bfloat16": 0.1}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    selection = measure.selection(full=metafunc.config.getoption("full", False))
    if metafunc.function is test_cam:
        pairs = cam_cases.selection(selection, ("copy", *IMPLEMENTATIONS))
    else:
        pairs = [(case, impl) for case in cam_cases.explanations(selection) for impl in EXPLAINERS]
    metafunc.parametrize(("case", "impl"), [pytest.param(*pair, id="-".join(map(str, pair))) for pair in pairs])


# ---------------------------------------------------------------------------------------------------------------
# The operators
# ---------------------------------------------------------------------------------------------------------------


def _of(function: Callable[..., Any], method: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, g: function(a, g, method, eps=cam_rivals.EPS, size=IMAGE, normalize=True)


def _compiled(method: str) -> Callable[[Tensor, Tensor], Tensor]:
    torch.compiler.reset()  # so that it makes a graph for these sizes alone
    compiled = torch.compile(cam_rivals.formula, fullgraph=True, dynamic=False)
    return lambda a, g: compiled(a, g, method)


IMPLEMENTATIONS: dict[str, Callable[[str], Callable[[Tensor, Tensor], Any]]] = {
    **({"triton": lambda method: _of(dlu_triton.class_activation_map, method)} if measure.RUNS_KERNELS else {}),
    "eager": lambda method: _of(reference.class_activation_map, method),
    "compiled": _compiled,
    "torchcam": cam_rivals.torchcam,
    "grad-cam": lambda method: cam_rivals.grad_cam(method, DEVICE),
}


@pytest.mark.benchmark(timer=measure.TIMER)
@pytest.mark.filterwarnings("default", "ignore:Benchmark fixture was not used")  # torch.compile's are no errors
@torch.no_grad()
def test_cam(benchmark: Any, records: Records, case: CAMCase, impl: str) -> None:
    activations, gradients = _inputs(case)
    record = benchmark.extra_info
    record |= {
        "op": "copy" if impl == "copy" else "class_activation_map",
        "impl": impl,
        "pass": "forward",
        "dtype": case.dtype,
        "layout": case.layout,
        "shape": {"features": case[:4], "method": case.method, "size": IMAGE},
    }
    ideal_bytes = cam_cases.ideal_bytes(case)
    if impl == "copy":  # reads half of the bytes that a map moves, and writes as many
        source = torch.ones(ideal_bytes // 2, dtype=torch.int8, device=DEVICE)

        def call() -> tuple[Any]:
            return (source.clone(),)
    else:
        with records.supported(record):
            function = IMPLEMENTATIONS[impl](case.method)

            def call() -> tuple[Any]:
                return (function(activations, gradients),)

            error, eager = _errors(case, impl, call())
        limit = RIVALS_LIMIT[case.dtype] if impl in FOREIGN else 4 * eager + accuracy.FLOOR["float32"]
        records.hold(record, "a map", error, limit)
        record |= {"max_error": error, "eager_error": eager}
    record["ideal_bytes"] = ideal_bytes
    benchmark.group = f"{case} forward"
    if not benchmark.enabled:
        benchmark.pedantic(call)  # once, as a test
        return
    with records.supported(record):
        record |= measure.device_time(benchmark, call, replays=impl == "triton" and case.n == 1)
    records.add(benchmark, case)


@lru_cache(maxsize=1)
def _inputs(case: CAMCase) -> tuple[Tensor, Tensor]:
    return cam_cases.inputs(case, DEVICE)


def _errors(case: CAMCase, impl: str, results: tuple[Any]) -> tuple[float, float]:
    """Largest errors of the maps, which are from 0 to 1: of this implementation, and of the eager twin."""
    maps = torch.as_tensor(results[0]).to(DEVICE)
    if maps.shape != (case.n, *IMAGE):
        raise ValueError(f"maps must be {(case.n, *IMAGE)}, got {tuple(maps.shape)}")
    definition = _of(reference.class_activation_map, case.method)
    peaks = []
    for n in range(case.n):  # one at a time, so that float64 fits into memory
        activations, gradients = (tensor[n : n + 1] for tensor in _inputs(case))
        truth = definition(activations.double(), gradients.double())
        found = maps[n : n + 1].double()
        if impl == "torchcam":
            found = _normalized(found)
        eager = definition(activations, gradients)
        peaks.append([(found - truth).abs().amax(), (eager - truth).abs().amax()])
    error, eager = torch.tensor(peaks, dtype=torch.float64).amax(0).tolist()  # amax keeps a NaN
    return error, eager


# ---------------------------------------------------------------------------------------------------------------
# Explanations
# ---------------------------------------------------------------------------------------------------------------

Explainer = Callable[[torch.nn.Module, str], AbstractContextManager[cam_rivals.Explain]]
EXPLAINERS: dict[str, tuple[Explainer, int]] = {  # and how many classes of each image are explained
    "dlu_triton": (cam_rivals.explain_dlu_triton, 1),
    "dlu_triton-10": (cam_rivals.explain_dlu_triton, 10),
    "dlu_triton-100": (cam_rivals.explain_dlu_triton, 100),
    "torchcam": (cam_rivals.explain_torchcam, 1),
    "grad-cam": (cam_rivals.explain_grad_cam, 1),
}


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_explanation(benchmark: Any, records: Records, case: ExplanationCase, impl: str) -> None:
    (model, layer), images, target, expected = _network(case)
    explainer, classes = EXPLAINERS[impl]
    wanted = [[index, *_others(index, classes - 1)] for index in target] if classes > 1 else target
    record = benchmark.extra_info
    record |= {
        "op": "explanation",
        "impl": impl,
        "pass": "explanation",
        "dtype": case.dtype,
        "layout": case.layout,
        "shape": {"net": case.net, "width": case.width, "images": list(images.shape), "classes": classes},
    }
    memory_before = measure.allocated_bytes()
    with records.supported(record):
        context = explainer(model, layer)
        explain = context.__enter__()
    try:

        def call() -> tuple[Any]:
            return (explain(images, wanted),)

        with records.supported(record):
            maps = torch.as_tensor(call()[0]).to(DEVICE)
            difference = (_normalized((maps[:, 0] if classes > 1 else maps).double()) - expected).abs().amax().item()
        del maps
        records.hold(record, "a map", difference, NETS_LIMIT[case.dtype])
        record["max_error"] = difference
        benchmark.group = str(case)
        if not benchmark.enabled:
            benchmark.pedantic(call)  # once, as a test
            return
        record |= measure.user_time(benchmark, call, memory_before)
        records.add(benchmark, case)
    finally:
        context.__exit__(None, None, None)
        model.zero_grad()


@lru_cache(maxsize=1)
def _network(case: ExplanationCase) -> tuple[nets.Net, Tensor, list[int], Tensor]:
    """A network, images, the class of each one, and its map by autograd and the eager twin."""
    dtype = getattr(torch, case.dtype)
    net = nets.build(case.net, case.width, dtype, DEVICE)
    images = torch.randn(case.n, 3, case.image, case.image, generator=torch.Generator().manual_seed(0))
    images = images.to(DEVICE, dtype)
    if case.layout == "channels_last":
        net.model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    kept = []
    handle = net.model.get_submodule(net.layer).register_forward_hook(lambda _, __, output: kept.append(output))
    logits = net.model(images)
    handle.remove()
    target = logits.argmax(1)
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), kept)
    size = (case.image, case.image)
    definition = reference.class_activation_map
    expected = definition(kept[0].detach().double(), gradient.double(), "xgradcam", size=size, normalize=True)
    if not (expected.amax((1, 2)) == 1).all():
        raise ValueError(f"a map of {case} is dead, and would show no error")
    return net, images, target.tolist(), expected


def _others(index: int, count: int) -> list[int]:
    """Classes that are not this one."""
    return [(index + step) % nets.CLASSES for step in range(1, count + 1)]


def _normalized(maps: Tensor) -> Tensor:
    """The maps from 0 to 1 again: torchcam normalises before it resizes."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)
