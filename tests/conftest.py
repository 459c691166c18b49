"""The same tests run interpreted on a CPU, compiled on a GPU, and with `--emulate sm_90` as compiled, on a CPU.

ON_CPU is true where INTERPRETED or EMULATED is. `pytest_configure` sets all three, before tests are collected.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

INTERPRETED = EMULATED = ON_CPU = False

with torch.device("meta"):  # which looks once for the functions it changes: before some of them are poisoned
    torch.empty(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also what is marked long, and many more random cases")
    parser.addoption("--emulate", metavar="TARGET", help="emulate kernels on a CPU, as compiled for sm_90, say")
    parser.addoption(
        "--shuffle", metavar="SEED", type=int, help="with --emulate: seed of the order of blocks and additions"
    )


def pytest_configure(config: pytest.Config) -> None:
    global INTERPRETED, EMULATED, ON_CPU
    target = config.getoption("--emulate")
    if target is None and config.getoption("--shuffle") is not None:
        raise pytest.UsageError(f"--shuffle needs --emulate, got --shuffle {config.getoption('--shuffle')} alone")
    if target:
        os.environ["TRITON_INTERPRET"] = "0"
    elif not torch.cuda.is_available():
        # Read when Triton is imported, so before dlu_triton. With 0, test_ways.py runs as where there is neither.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    INTERPRETED, EMULATED = os.environ.get("TRITON_INTERPRET", "0") == "1", target is not None
    ON_CPU = INTERPRETED or EMULATED
    if target:
        import emulator  # imports Triton

        if target not in emulator.TARGETS:
            raise pytest.UsageError(f"--emulate must be one of {', '.join(emulator.TARGETS)}, got {target!r}")
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        report = stack.enter_context(emulator.running(target, shuffle=config.getoption("--shuffle")))
        report.raises.update(emulator.findings.KINDS)
    _choose_random_cases(config.getoption("--long"))


def _choose_random_cases(long: bool) -> None:
    """Always the same few, or with --long many others, which can be had again by --hypothesis-seed."""
    settings.register_profile(
        "long" if long else "default",
        max_examples=200
        if long
        else 8
        if INTERPRETED
        else 3,  # without the interpreter each size of kernel and scale is compiled
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
    return torch.device("cpu" if ON_CPU or not torch.cuda.is_available() else "cuda")


@pytest.fixture(params=("kernels", "eager path"))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """A device, with what runs on it: kernels, or on a CPU the eager twins."""
    if request.param == "kernels":
        return device
    monkeypatch.setattr("dlu_triton._launch.INTERPRETED", False)
    monkeypatch.setattr("dlu_triton._launch.runs_kernels", lambda x: isinstance(x, torch.Tensor) and not x.is_cpu)
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


@pytest.fixture
def guarded_allocations(monkeypatch: pytest.MonkeyPatch, poisoned_allocations: None) -> Iterator[None]:
    """Tensors made from here on lie between elements that nothing writes to: a GPU shows no more of its addresses."""
    from dlu_triton import _launch

    beside, guard, made = 64, 77.0, []
    empty, empty_like = torch.empty, torch.empty_like

    def guarded(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.new_full((tensor.numel() + 2 * beside,), guard)
        made.append(storage)
        return storage.as_strided(tensor.shape, tensor.stride(), beside).copy_(tensor)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: guarded(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: guarded(empty_like(*args, **kwargs)))

    def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, inside: object) -> torch.Tensor:
        """Not inside another tensor, of whose storage it would take the guards as well."""
        return torch.empty(shape, dtype=dtype, device=device)

    monkeypatch.setattr(_launch, "scratch", scratch)
    yield
    assert made
    for storage in made:
        assert (torch.cat([storage[:beside], storage[-beside:]]) == guard).all(), "stored outside of a tensor"


@pytest.fixture(autouse=True)
def checked_addresses() -> Iterator[set | None]:
    """Interpreted and emulated kernels reach nothing but elements of their arguments, and emulated ones do not race.
    What they have stored to, as (kernel, argument); None on a GPU, where nothing is checked."""
    if EMULATED:
        from emulator import state

        state.report.stores.clear()
        before = state.report.counts()
        yield state.report.stores
        new = state.report.since(before)
        assert not new, "\n".join(new)
    elif INTERPRETED:
        import addresses  # imports Triton
        import interpreting

        with interpreting.spared(), addresses.checked() as stores:
            yield stores
    else:
        yield None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if EMULATED:
        from emulator import state

        terminalreporter.section(f"emulated for {config.getoption('--emulate')}")
        terminalreporter.write_line(str(state.report))
