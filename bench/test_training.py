"""What training is measured of: necks, steps, deterministic mode; on a CPU."""

import accuracy
import cases
import modes
import packs
import pytest
import torch
from cases import BACKWARD, BOTH, DETERMINISTIC, DLU, FORWARD, HALF, HEADLINE, NECK, ONE_POINT, PYRAMID, STEP, Case
from records import Records
from torch._subclasses.fake_tensor import FakeTensorMode

from dlu_triton import reference

SMALL = Case(2, 8, 2, 3, kernel=3, dtype="float64")

# ---------------------------------------------------------------------------------------------------------------
# Necks and steps
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", packs.NECKS)
@pytest.mark.parametrize("direction", [FORWARD, BOTH, STEP])
def test_necks_compute_their_definition(impl: str, direction: str) -> None:
    module, parameters, definition = packs.build(NECK, impl, SMALL, "cpu")
    tensors = [*cases.inputs(NECK, SMALL, "cpu").values(), *parameters.values()]
    before = [tensor.detach().clone() for tensor in tensors]
    gradients = cases.upstream(NECK, SMALL, "cpu")
    results = accuracy.ready(lambda *all_of_them: module(*all_of_them[:4]), direction, tensors, gradients)()
    assert len(results) == 5 + (0 if direction == FORWARD else len(tensors))
    assert all(result.abs().max() > 0 for result in results)
    errors = accuracy.errors(definition, direction, before, gradients, results, None)
    assert max(error.result for error in errors) < 1e-13


def test_the_pyramid_is_that_of_two_images_on_a_resnet50() -> None:
    pyramid = PYRAMID._replace(dtype="float32")
    with FakeTensorMode(), torch.no_grad():
        maps = list(cases.inputs(NECK, pyramid, "cpu").values())
        levels = packs.Neck(256, lambda: torch.nn.Upsample(scale_factor=2))(*maps)
        gradients = cases.upstream(NECK, pyramid, "cpu")
    assert cases.shape(NECK, pyramid)["images"] == (2, 3, 832, 1344)
    for i, each in enumerate(maps):
        assert each.shape == (2, 256 * 2**i, 832 // 2 ** (i + 2), 1344 // 2 ** (i + 2))
    assert [each.shape[2:] for each in levels] == [(208, 336), (104, 168), (52, 84), (26, 42), (13, 21)]
    assert [each.shape for each in gradients] == [each.shape for each in levels]


def test_a_step_updates_the_parameters_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "OPTIMISER", {"lr": 0.5, "momentum": 0.9})
    x, gradient = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    weight = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    call = accuracy.ready(torch.mul, STEP, (x, weight), gradient)
    output, of_x, of_weight = call()
    assert torch.equal(output, 2 * x)
    assert torch.equal(of_x, 2 * gradient)
    assert torch.equal(of_weight, x * gradient)
    assert torch.equal(weight, 2 - 0.5 * of_weight)
    assert x.grad is None
    assert weight.grad is None
    call()
    torch.testing.assert_close(weight.detach(), (2 - 0.5 * of_weight - 0.5 * 1.9 * of_weight).detach())


def test_steps_of_a_benchmark_leave_the_weights_where_they_are() -> None:
    module, parameters, _ = packs.build("module", "DLUPack", SMALL._replace(dtype="float32"), "cpu")
    before = [parameter.detach().clone() for parameter in parameters.values()]
    (x,) = cases.inputs("module", SMALL._replace(dtype="float32"), "cpu").values()
    gradient = cases.upstream("module", SMALL._replace(dtype="float32"), "cpu")
    call = accuracy.ready(lambda x, *_: module(x), STEP, [x, *parameters.values()], gradient)
    for _ in range(300):
        call()
    for parameter, start in zip(parameters.values(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), start, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Deterministic mode
# ---------------------------------------------------------------------------------------------------------------


def _mode() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


@pytest.fixture(params=[False, True], ids=["off", "warns"])
def before(request: pytest.FixtureRequest) -> tuple[bool, bool, bool]:
    torch.use_deterministic_algorithms(request.param, warn_only=request.param)
    yield _mode()
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("fill", [False, True])
def test_deterministic_mode_is_around_the_call_alone(before: tuple[bool, bool, bool], fill: bool) -> None:
    call = modes.deterministic(_mode, fill=fill)
    assert _mode() == before
    assert call() == (True, False, fill)
    assert _mode() == before

    def failing() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        modes.deterministic(failing, fill=fill)()
    assert _mode() == before


@pytest.mark.parametrize("impl", DETERMINISTIC)
def test_what_has_no_deterministic_algorithm_is_unsupported(impl: str) -> None:
    """As PyTorch says it, and only then: all other errors are ours."""
    records = Records()
    error = "index_add does not have a deterministic implementation, but you set"
    with pytest.raises(pytest.skip.Exception), records.supported({"impl": impl}):
        raise RuntimeError(error)
    assert records.unsupported == [{"impl": impl, "error": f"RuntimeError: {error}"}]
    for name, other in ((impl, "CUDA error"), ("triton", error)):
        with pytest.raises(RuntimeError, match=other), records.supported({"impl": name}):
            raise RuntimeError(other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_offsets_to_one_point(dtype: str) -> None:
    """All outputs have the mean of the same four kernels, which half precision does not move."""
    case = HEADLINE._replace(n=1, c=1, kernel=1, dtype=dtype, offsets=ONE_POINT)
    offsets = cases.inputs(DLU, case, "cpu")["offsets"]
    space = torch.arange(104.0 * 168).view(1, 1, 104, 168)
    space = torch.cat((space / 1e4, torch.zeros(1, 8, 104, 168)), 1)  # whose softmax tells pixels apart
    masks = reference.expand_kernels(space, offsets.float(), 2, 3)
    expected = space.softmax(1)[0, :, 51:53, 83:85].mean((1, 2))
    torch.testing.assert_close(masks, expected[None, :, None, None].expand_as(masks))


# ---------------------------------------------------------------------------------------------------------------
# What the targets need
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quick", "full"])
def test_every_target_can_be_judged(name: str) -> None:
    upsampling = ("triton", "eager", "compiled", "mmcv", *DETERMINISTIC)
    implementations = {op: upsampling for op in (DLU, "carafe", "carafe_upsample", "expand_kernels")}
    implementations |= {op: (op,) for op in ("copy", "interpolate", "dysample")}
    runs = cases.selection(name, {**implementations, "module": packs.PACKS, NECK: packs.NECKS})
    small = PYRAMID
    needed = [
        *((DLU, case, impl, BOTH) for case in (HEADLINE, HALF) for impl in ("triton", "compiled")),
        *(("carafe", HALF, impl, BOTH) for impl in ("triton", "mmcv")),
        *((DLU, case, "triton", BACKWARD) for case in (HEADLINE, HALF, small)),
        *(
            (DLU, case, impl, direction)
            for case in (HEADLINE, HEADLINE._replace(offsets=ONE_POINT), small)
            for impl in ("triton", *DETERMINISTIC)
            for direction in (BACKWARD, BOTH)
        ),
        *((NECK, PYRAMID, impl, direction) for impl in ("DLUPack", "nearest") for direction in (BOTH, STEP)),
        *(("module", HALF, impl, STEP) for impl in packs.PACKS),
    ]
    assert [run for run in needed if run not in runs] == []
    assert not [run for run in runs if run.impl in DETERMINISTIC and run.direction == FORWARD]


def test_memory_allowed_is_that_of_the_normalised_kernels() -> None:
    assert cases.allowed_extra_bytes(DLU, BOTH, HEADLINE) == 8 * 32 * 104 * 168 * 4
    assert cases.allowed_extra_bytes(DLU, FORWARD, HEADLINE) is None
    assert cases.allowed_extra_bytes("carafe", BOTH, HEADLINE) is None
