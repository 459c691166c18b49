"""Call operators on meta tensors of several sizes, with a stub in place of the GPU, and report what was launched.

    python tests/launch_again.py

prints a JSON object: how many kernels were compiled at each step, and whether launches that are repeated pass on the
very arguments that Triton's own way to launch would. In a process of its own, as `compile_kernels.py`.
"""

import json

import torch
import triton
from compile_kernels import StubDriver, StubLauncher
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

launched = []


class Recorder(StubLauncher):
    def __call__(self, *arguments: object) -> None:
        launched.append((arguments[:3], arguments[4], arguments[9:]))  # programs, kernel, its arguments


def meta(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=layout)


def main() -> None:
    driver = StubDriver(GPUTarget("cuda", 90, 32))
    driver.launcher_cls = Recorder
    triton.runtime.driver.set_active(driver)

    from dlu_triton import _launch
    from dlu_triton.ops import carafe, dlu

    runs = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: (runs.append(self.__name__), run(self, *args, **kwargs))[1]

    def call(n: int, h: int, w: int, layout: torch.memory_format, c: int = 64) -> list[tuple]:
        """What each operator launched."""
        launched.clear()
        features, space, offsets = (meta(n, x, h, w, layout=layout) for x in (c, 25, 8))
        dlu.dlu_upsample_op._init_fn(features, space, offsets, 2, 5, 1)
        carafe.carafe_op._init_fn(features, meta(n, 25, 2 * h, 2 * w, layout=layout), 5, 1, 2)
        carafe.carafe_upsample_op._init_fn(features, meta(n, 100, h, w, layout=layout), 2, 5, 1)
        return [(grid, kernel, [_plain(argument) for argument in arguments]) for grid, kernel, arguments in launched]

    report = {"compiled at first": {}, "compiled": {}, "repeated": {}, "launches": {}}
    for layout in (torch.contiguous_format, torch.channels_last):
        name = str(layout).removeprefix("torch.")
        before = driver.utils.loaded
        first = call(2, 26, 42, layout)
        report["compiled at first"][name] = driver.utils.loaded - before
        report["launches"][name] = len(first)
        before = driver.utils.loaded
        for n, h, w in ((1, 13, 21), (8, 104, 168), (3, 25, 43), (2, 17, 64), (16, 5, 44), (1, 1, 2)):
            call(n, h, w, layout)
        report["compiled"][name] = driver.utils.loaded - before
        runs.clear()
        again = call(2, 26, 42, layout)
        kept = list(runs)
        _launch.forget_launches()
        runs.clear()
        afresh = call(2, 26, 42, layout)
        report["repeated"][name] = {
            "through Triton": len(kept), "afresh": len(runs), "same": first == again == afresh, "held": _held(_launch)
        }  # fmt: skip
    print(json.dumps(report))


def _plain(argument: object) -> object:
    return (argument.shape, argument.stride()) if isinstance(argument, torch.Tensor) else argument


def _held(launch: object) -> int:
    """Tensors that are kept alive."""
    return sum(isinstance(each, torch.Tensor) for repeat in launch._repeats.values() for each in repeat.arguments)


if __name__ == "__main__":
    main()
