"""Call operators from several threads at once, with a stub in place of the GPU, and report launches mixed up.

    python tests/launch_from_threads.py

prints a JSON object: for every step, how many launches there were, and the first that are not what their thread
launches alone. Threads differ in sizes, types, layouts and streams, but for two that differ in their streams alone.
Kernels are compiled by whichever thread comes first. In a process of its own, as `compile_kernels.py`.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Callable

import torch
import triton
from compile_kernels import StubDriver, StubLauncher, StubUtils
from triton.backends.compiler import GPUTarget

ROUNDS = 25
KINDS = (
    (2, 26, 42, 16, torch.bfloat16, torch.contiguous_format),
    (2, 26, 42, 16, torch.bfloat16, torch.contiguous_format),
    (3, 14, 22, 16, torch.bfloat16, torch.contiguous_format),
    (1, 26, 42, 16, torch.bfloat16, torch.channels_last),
)

own = threading.local()  # stream, inputs and launches of a thread
binaries = {}  # what was compiled, by the number of the loaded kernel


class Utils(StubUtils):
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def load_binary(self, name: str, kernel: bytes, *others: object) -> tuple[int, ...]:
        with self.lock:
            found = super().load_binary(name, kernel, *others)
            binaries[found[1]] = name, hashlib.sha256(kernel).hexdigest()
        return found


class Launcher(StubLauncher):
    def __call__(self, *arguments: object) -> None:
        grid, stream, kernel, arguments = arguments[:3], arguments[3], arguments[4], arguments[9:]
        own.launched.append((grid, stream == own.stream, binaries[kernel], [describe(each) for each in arguments]))


class Driver(StubDriver):
    launcher_cls = Launcher

    def __init__(self) -> None:
        super().__init__(GPUTarget("cuda", 90, 32))
        self.utils = Utils()

    def get_current_stream(self, device: str) -> int:
        return own.stream


def describe(argument: object) -> object:
    """A tensor by which of the thread's it is; others are made by the call."""
    if not isinstance(argument, torch.Tensor):
        return argument
    mine = [index for index, tensor in enumerate(own.tensors) if tensor is argument]
    return mine, argument.shape, argument.stride(), argument.dtype


def calls(kind: tuple) -> list[Callable[[], object]]:
    """Every operator, forward and backward, on tensors of this thread."""
    from dlu_triton.ops import cam, carafe, dlu

    n, h, w, c, dtype, layout = kind

    def new(channels: int, scale: int = 1) -> torch.Tensor:
        tensor = torch.empty((n, channels, scale * h, scale * w), dtype=dtype, device="meta").contiguous(
            memory_format=layout
        )
        own.tensors.append(tensor)
        return tensor

    own.tensors = []
    features, space, offsets, logits, output, masks = new(c), new(9), new(8), new(36), new(c, 2), new(9, 2)
    gradients = torch.empty((n, 2, c, h, w), dtype=dtype, device="meta")
    own.tensors.append(gradients)
    return [
        lambda: dlu.dlu_upsample_op.launch(features, space, offsets, 2, 3, 1, None),
        lambda: dlu.dlu_upsample_op.gradients.launch(output, features, space, offsets, 2, 3, 1, None, True, True, True),
        lambda: dlu.expand_kernels_op.launch(space, offsets, 2, 3, 1, None),
        lambda: dlu.expand_kernels_op.gradients.launch(masks, space, offsets, 2, 3, 1, None, True, True),
        lambda: carafe.carafe_op.launch(features, masks, 3, 1, 2, None),
        lambda: carafe.carafe_op.gradients.launch(output, features, masks, 3, 1, 2, None, True, True),
        lambda: carafe.carafe_upsample_op.launch(features, logits, 2, 3, 1, None),
        lambda: carafe.carafe_upsample_op.gradients.launch(output, features, logits, 2, 3, 1, None, True, True),
        lambda: cam.class_activation_map_op.launch(features, gradients, "xgradcam", 1e-6, True, (64, 64), True, True),
    ]


def launches_of(call: Callable[[], object]) -> list[tuple]:
    own.launched = []
    call()
    return own.launched


def together(barrier: threading.Barrier, rounds: int, meanwhile: Callable[[int], None]) -> list[list[list[tuple]]]:
    """Launches of each thread, round and operator; each thread begins with another operator."""
    found = [[] for _ in KINDS]

    def work(index: int) -> None:
        own.stream = 100 + index
        mine = calls(KINDS[index])
        barrier.wait()
        for _ in range(rounds):
            launched = [None] * len(mine)
            for step in range(len(mine)):
                turn = (step + (index // 2) * 2) % len(mine)  # the two that are alike begin alike
                launched[turn] = launches_of(mine[turn])
                meanwhile(index)
            found[index].append(launched)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(KINDS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    sys.setswitchinterval(1e-5)
    from dlu_triton import _launch

    barrier = threading.Barrier(len(KINDS))
    steps = {"first": together(barrier, 1, lambda index: None), "again": together(barrier, ROUNDS, lambda index: None)}
    most, _launch.MOST_REPEATS = _launch.MOST_REPEATS, 5
    steps["forgotten when full"] = together(barrier, ROUNDS, lambda index: None)
    _launch.MOST_REPEATS = most
    steps["forgotten by a thread"] = together(
        barrier, ROUNDS, lambda index: _launch.forget_launches() if index == 0 else None
    )
    _launch.forget_launches()
    alone = []
    for index, kind in enumerate(KINDS):
        own.stream = 100 + index
        alone.append([launches_of(call) for call in calls(kind)])
    report = {}
    for step, found in steps.items():
        wrong = [
            str((index, launched, expected))[:1000]
            for index, rounds in enumerate(found)
            for operators in rounds
            for launched, expected in zip(operators, alone[index], strict=True)
            if launched != expected or not all(streams for _, streams, *_ in launched)
        ]
        report[step] = {
            "rounds": [len(rounds) for rounds in found],
            "launches of a round": sum(map(len, alone[0])),
            "wrong": wrong[:3],
        }
    report["kernels"] = len(set(binaries.values()))
    report["loaded"] = len(binaries)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
