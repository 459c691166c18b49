"""The same tests run interpreted on a CPU and compiled on a GPU."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():
    # Read when Triton is imported, so before dlu_triton. With 0, test_ways.py runs as where there is neither.
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

with torch.device("meta"):  # which looks once for the functions it changes: before some of them are poisoned
    torch.empty(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also what is marked long, and many more random cases")


def pytest_configure(config: pytest.Config) -> None:
    """Random cases: always the same few, or with --long many others, which can be had again by --hypothesis-seed."""
    long = config.getoption("--long")
    settings.register_profile(
        "long" if long else "default",
        max_examples=200 if long else 8 if INTERPRETED else 3,  # on a GPU each size of kernel and scale is compiled
        derandomize=not long,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if long else [])],
        deadline=None,
        database=None,
        print_blob=long,
        # Examples may share what fixtures set, and tensors take long.
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("long" if long else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    long = [item for item in items if item.get_closest_marker("long")]
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def _call(function: Callable[..., None], arguments: dict[str, object]) -> None:
    function(**arguments)


# CPython keeps frames in chunks of 16 KB, and maps one anew for each call where the last one is full: interpreted
# kernels took twice as long at some depths. A frame that needs more than 256 KB comes with a chunk of 512 KB.
_call.__code__ = _call.__code__.replace(co_stacksize=2**15)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    function = pyfuncitem.obj
    pyfuncitem.obj = lambda **arguments: _call(function, arguments)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")


@pytest.fixture(params=("kernels", "eager path"))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """A device, with what runs on it: kernels, or on a CPU the eager twins."""
    if request.param == "kernels":
        return device
    monkeypatch.setattr("dlu_triton._launch.INTERPRETED", False)
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating-point memory holds NaN, so whatever a kernel fails to write is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        real = tensor.is_floating_point() and tensor.device.type != "meta"
        return tensor.fill_(float("nan")) if real else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture(autouse=INTERPRETED)
def checked_addresses() -> Iterator[set]:
    """Interpreted kernels reach nothing but elements of their arguments. What they have stored to."""
    import addresses  # imports Triton
    import interpreting

    with interpreting.spared(), addresses.checked() as stores:
        yield stores
