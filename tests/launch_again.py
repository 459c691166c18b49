"""Call operators on meta tensors of several sizes, with a stub in place of the GPU, and report what was launched.

    python tests/launch_again.py

prints a JSON object: how many kernels were compiled at each step, whether launches that are repeated pass on the very
arguments that Triton's own way to launch would, and which calls are alike. In a process of its own, as
`compile_kernels.py`.
"""

import json
from collections.abc import Callable

import torch
import triton
from compile_kernels import StubDriver, StubLauncher, unfinished
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

    def forward(n: int, h: int, w: int, layout: torch.memory_format, c: int = 64, cut: int = 0) -> None:
        size = (2 * h - cut, 2 * w - cut)
        features, space, offsets = (meta(n, x, h, w, layout=layout) for x in (c, 25, 8))
        dlu.dlu_upsample_op.launch(features, space, offsets, 2, 5, 1, size)
        carafe.carafe_op.launch(features, meta(n, 25, *size, layout=layout), 5, 1, 2, size)
        carafe.carafe_upsample_op.launch(features, meta(n, 100, h, w, layout=layout), 2, 5, 1, size)
        dlu.expand_kernels_op.launch(space, offsets, 2, 5, 1, size)

    def backward(n: int, h: int, w: int, layout: torch.memory_format, c: int = 256, cut: int = 0) -> None:
        size = (2 * h - cut, 2 * w - cut)
        features, space, offsets = (meta(n, x, h, w, layout=layout) for x in (c, 25, 8))
        output, masks = (meta(n, x, *size, layout=layout) for x in (c, 25))
        dlu.dlu_upsample_op.gradients.launch(output, features, space, offsets, 2, 5, 1, size, True, True, True)
        carafe.carafe_op.gradients.launch(output, features, masks, 5, 1, 2, size, True, True)
        logits = meta(n, 100, h, w, layout=layout)
        carafe.carafe_upsample_op.gradients.launch(output, features, logits, 2, 5, 1, size, True, True)
        dlu.expand_kernels_op.gradients.launch(masks, space, offsets, 2, 5, 1, size, True, True)

    def call(run: Callable[..., None], *arguments: object, **options: int) -> list[tuple]:
        """What was launched."""
        launched.clear()
        run(*arguments, **options)
        return [(grid, kernel, [_plain(argument) for argument in arguments]) for grid, kernel, arguments in launched]

    report = {}
    for step in (forward, backward):
        for layout in (torch.contiguous_format, torch.channels_last):
            found = report[f"{step.__name__} {str(layout).removeprefix('torch.')}"] = {}
            before = driver.utils.loaded
            first = call(step, 2, 26, 42, layout)
            found["compiled at first"] = driver.utils.loaded - before
            found["launches"] = len(first)
            before = driver.utils.loaded
            for n, h, w in ((1, 13, 21), (8, 104, 168), (3, 25, 43), (2, 17, 64), (16, 5, 44), (1, 1, 2)):
                call(step, n, h, w, layout)
            found["compiled"] = driver.utils.loaded - before
            before = driver.utils.loaded
            call(step, 2, 25, 42, layout, cut=1)
            call(step, 2, 26, 42, layout, cut=2)
            found["compiled for cut outputs"] = driver.utils.loaded - before
            runs.clear()
            again = call(step, 2, 26, 42, layout)
            kept = list(runs)
            _launch.forget_launches()
            runs.clear()
            afresh = call(step, 2, 26, 42, layout)
            found["repeated"] = {
                "through Triton": len(kept), "afresh": len(runs), "same": first == again == afresh,
                "held": _held(_launch),
            }  # fmt: skip
    launched.clear()
    tensors = [meta(2, x, 26, 42) for x in (64, 25, 8)]
    dlu.dlu_upsample_op.gradients.launch(meta(2, 64, 52, 84), *tensors, 2, 5, 1, None, True, True, True)
    report["launches of a backward pass"] = len(launched)
    report["alike"] = alike(carafe)
    _launch.forget_launches()
    _launch.MOST_REPEATS = 3
    kept = []
    for height in range(2, 10):
        call(forward, 1, height, 5, torch.contiguous_format)
        kept.append(len(_launch._repeats))
    report["kept of many"] = max(kept)
    print(json.dumps(report))


def alike(carafe) -> dict[str, bool]:
    """Whether calls that differ in one thing launch the same kernel on the same arguments, tensors aside."""

    def call(features, masks, kernel_size=3, groups=1) -> tuple:
        return only(carafe.carafe_op.launch, features, masks, kernel_size, groups, 2, None)

    def only(run, *arguments) -> tuple:
        launched.clear()
        run(*arguments)
        ((grid, kernel, arguments),) = launched
        return grid, kernel, [None if isinstance(argument, torch.Tensor) else argument for argument in arguments]

    x, masks, small = meta(2, 72, 26, 42), meta(2, 9, 52, 84), meta(2, 9, 26, 42)
    real = torch.zeros(2 * 72 * 26 * 42 + 1, dtype=torch.bfloat16)  # meta tensors have no address
    based, shifted = real[:-1].view(2, 72, 26, 42), real[1:].view(2, 72, 26, 42)
    wide, matmul = (x.float(), masks.float()), torch.backends.cuda.matmul
    plain = call(x, masks)
    found = {
        "again": call(meta(2, 72, 26, 42), masks) == plain,
        "dtype": call(x.half(), masks.half()) == plain,
        "settings": call(x, masks, kernel_size=1, groups=9) == plain,
        "shape": call(meta(4, 72, 26, 42)[:1], meta(4, 9, 52, 84)[:1]) == plain,
        "strides": call(meta(2, 144, 26, 42)[:, ::2], masks) == plain,
        "alignment": call(shifted, masks) == call(based, masks),
        "forward and backward": only(carafe.carafe_op.launch, x, small, 3, 1, 1, None)
        == only(carafe.carafe_op.gradients.launch, x, x, small, 3, 1, 1, None, True, False),
    }
    before, exact = matmul.fp32_precision, call(*wide)
    matmul.fp32_precision = "tf32"
    found["tf32"] = call(*wide) == exact
    matmul.fp32_precision = before
    return found


def _plain(argument: object) -> object:
    return (argument.shape, argument.stride()) if isinstance(argument, torch.Tensor) else argument


def _held(launch: object) -> int:
    """Tensors that are kept alive."""
    return sum(isinstance(each, torch.Tensor) for repeat in launch._repeats.values() for each in repeat.arguments)


if __name__ == "__main__":
    with unfinished():
        main()
