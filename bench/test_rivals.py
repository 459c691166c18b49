"""That rivals compute what they are compared with, and what becomes of those that do not; on a CPU, without mmcv."""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import accuracy
import cases
import packs
import pytest
import rivals
import torch
import torch.nn.functional as F
from cases import BACKWARD, BOTH, FORWARD, Case
from libraries import library
from records import Records
from torch import Tensor

import dlu_triton
from dlu_triton import reference

CASES = [Case(2, 8, 5, 7, dtype="float64"), Case(1, 4, 4, 3, 3, 3, dtype="float64", layout="channels_last")]
DEFINITIONS = {
    "dlu_upsample": reference.dlu_upsample,
    "carafe": partial(reference.carafe, group_size=1),
    "carafe_upsample": reference.carafe_upsample,
    "expand_kernels": reference.expand_kernels,
}


def _errors(op: str, case: Case, direction: str, function: Callable[..., Tensor]) -> list[float]:
    tensors, gradient = list(cases.inputs(op, case, "cpu").values()), cases.upstream(op, case, "cpu")
    sizes = {"scale_factor": case.scale, "kernel_size": case.kernel}
    results = accuracy.ready(partial(function, **sizes), direction, tensors, gradient)()
    found = accuracy.errors(partial(DEFINITIONS[op], **sizes), direction, tensors, gradient, results, 1)
    return [error.result for error in found]


# ---------------------------------------------------------------------------------------------------------------
# Rivals
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("op", "rival"),
    [
        ("dlu_upsample", rivals.shifted_dlu),
        ("dlu_upsample", rivals.unfold_dlu),
        ("dlu_upsample", rivals.nearest_unfold_dlu),
        ("carafe", rivals.shifted_carafe),
        ("carafe", rivals.unfold_carafe),
        ("carafe", rivals.nearest_unfold_carafe),
        ("carafe_upsample", rivals.shifted_carafe_upsample),
        ("carafe_upsample", rivals.unfold_carafe_upsample),
        ("carafe_upsample", rivals.nearest_unfold_carafe_upsample),
        ("expand_kernels", rivals.sampled_masks),
    ],
)
def test_rivals_compute_the_operator(op: str, rival: Callable[..., Tensor], case: Case) -> None:
    assert max(_errors(op, case, BOTH, rival)) < 1e-13


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD, BOTH])
def test_a_wrong_rival_is_seen(direction: str) -> None:
    def wrong(features: Tensor, masks: Tensor, **sizes: int) -> Tensor:
        return rivals.unfold_carafe(features, masks.roll(1, 0), **sizes)  # the masks of the other image

    errors = _errors("carafe", CASES[0], direction, wrong)
    assert len(errors) == {FORWARD: 1, BACKWARD: 2, BOTH: 3}[direction]
    assert min(errors) > 0.01


def test_dysample_at_half_pixel_centres_is_bilinear_interpolation() -> None:
    n, c, h, w, s = 2, 8, 5, 7, 3
    features = torch.randn(n, c, h, w, dtype=torch.float64)
    shift = (torch.arange(s, dtype=torch.float64) + 0.5) / s - 0.5
    dx, dy = shift.expand(s, s), shift[:, None].expand(s, s)
    offsets = torch.stack((dx, dy)).repeat(cases.DYSAMPLE_GROUPS, 1, 1).view(1, -1, 1, 1).expand(n, -1, h, w)
    expected = F.interpolate(features, scale_factor=s, mode="bilinear", align_corners=False)
    torch.testing.assert_close(rivals.dysample(features, offsets, s, 5), expected)


class _ContiguousCARAFE(torch.autograd.Function):
    """mmcv's `carafe` as far as it can be had here: positional arguments, contiguous tensors and gradients alone."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
        assert features.is_contiguous()
        assert masks.is_contiguous()
        ctx.sizes = kernel, groups, scale
        ctx.save_for_backward(features, masks)
        return reference.carafe(features, masks, kernel, groups, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        assert gradient.is_contiguous()
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = reference.carafe(*inputs, *ctx.sizes)
        return *torch.autograd.grad(output, inputs, gradient), None, None, None


class _ContiguousCARAFEPack(dlu_triton.CARAFEPack):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.content_encoder(self.channel_compressor(x))
        masks = F.pixel_shuffle(logits, self.scale_factor).softmax(1).contiguous()
        return _ContiguousCARAFE.apply(x, masks, self.up_kernel, self.up_group, self.scale_factor)


@pytest.fixture
def mmcv(monkeypatch: pytest.MonkeyPatch) -> Any:
    ops = SimpleNamespace(carafe=_ContiguousCARAFE.apply, CARAFEPack=_ContiguousCARAFEPack)
    monkeypatch.setitem(sys.modules, "mmcv.ops", ops)
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.usefixtures("mmcv")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("op", "rival", "limit"),
    [
        ("carafe", rivals.mmcv_carafe, 1e-13),
        ("carafe_upsample", rivals.mmcv_carafe_upsample, 1e-13),
        ("dlu_upsample", rivals.official_dlu, 1e-5),  # its grid is float32
    ],
)
def test_what_mmcv_is_given(op: str, rival: Callable[..., Tensor], limit: float, case: Case) -> None:
    assert max(_errors(op, case, BOTH, rival)) < limit
    assert max(_errors(op, case, BACKWARD, rival)) < limit


# ---------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mmcv")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", packs.PACKS)
def test_modules_compute_their_definition(impl: str, case: Case) -> None:
    module, parameters, definition = packs.build("module", impl, case, "cpu")
    tensors = [*cases.inputs("module", case, "cpu").values(), *parameters.values()]
    gradient = cases.upstream("module", case, "cpu")
    results = accuracy.ready(lambda x, *_: module(x), BOTH, tensors, gradient)()
    assert all(result.abs().max() > 0 for result in results)
    errors = accuracy.errors(definition, BOTH, tensors, gradient, results, None)
    assert len(errors) == 2 + len(parameters)
    assert max(error.result for error in errors) < 1e-13


def test_offsets_of_modules_are_about_a_pixel() -> None:
    case = Case(2, 64, 9, 8, dtype="float32")
    (features,) = cases.inputs("module", case, "cpu").values()
    pack = packs.build("module", "DLUPack", case, "cpu").module
    compressed = pack.channel_compressor(features)
    assert 0.5 < pack.conv_offset(compressed).std() < 2
    assert 0.5 < pack.kernel_space_generator(compressed).std() < 2


# ---------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["mmcv", "unfold"])
def test_what_a_rival_cannot_run_is_recorded(impl: str) -> None:
    records, subject = Records(), {"op": "carafe", "impl": impl, "pass": "forward"}
    with pytest.raises(pytest.skip.Exception, match="cannot run this case"), records.supported(subject):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert records.unsupported == [{**subject, "error": reason}]
    assert records.reasons() == [f"{impl} (1): {reason}"]


def test_a_library_that_is_wrong_is_recorded() -> None:
    records = Records()
    records.hold({"impl": "mmcv"}, "the output", 1e-3, 1e-3)
    with pytest.raises(pytest.skip.Exception):
        records.hold({"impl": "mmcv"}, "the output", float("nan"), 1e-3)
    assert records.unsupported == [{"impl": "mmcv", "error": "wrong: the output is off by nan, over 1.00e-03"}]


@pytest.mark.parametrize(("impl", "error"), [("triton", torch.OutOfMemoryError), ("unfold", TypeError)])
def test_what_is_written_here_fails(impl: str, error: type[Exception]) -> None:
    records = Records()
    with pytest.raises(error), records.supported({"impl": impl}):
        raise error
    with pytest.raises(pytest.fail.Exception, match=f"{impl} is wrong: the output"):
        records.hold({"impl": impl}, "the output", 2e-3, 1e-3)
    assert records.unsupported == []


def test_a_results_file_has_what_is_unsupported(
    pytestconfig: pytest.Config, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsupported = [{"impl": "mmcv", "error": "no bfloat16"}]
    monkeypatch.setattr(records, "unsupported", unsupported)
    contents = {"benchmarks": []}
    pytestconfig.hook.pytest_benchmark_update_json(config=pytestconfig, benchmarks=[], output_json=contents)
    assert contents["unsupported"] == unsupported


def test_shares_of_the_copy_of_the_same_case() -> None:
    records = Records()
    for op, case, seconds in (("copy", "a", 1.0), ("copy", "b", 3.0), ("carafe", "b", 4.0), ("carafe", "c", 4.0)):
        benchmark = SimpleNamespace(extra_info={"op": op, "ideal_bytes": 12e9}, stats={"median": seconds})
        records.add(benchmark, case)
    assert [record["gbps"] for record in records.measured] == [12, 4, 3, 3]
    assert [record["roofline"] for record in records.measured] == [1, 1, 0.75, None]


@pytest.mark.parametrize("name", cases.SELECTIONS)
def test_a_case_starts_with_its_copy_and_nothing_runs_twice(name: str) -> None:
    upsampling = ("triton", "eager", "compiled", "unfold")
    implementations = {op: upsampling for op in DEFINITIONS} | {"module": packs.PACKS, "neck": packs.NECKS}
    implementations |= {op: (op,) for op in cases.CONTEXT}
    runs = cases.selection(name, implementations)
    assert len(set(runs)) == len(runs)
    for case in {run.case for run in runs}:
        assert next(run for run in runs if run.case == case).op == "copy"
    assert {"dlu_upsample", "module", "neck"} < {run.op for run in runs}
