"""Call operators on tensors of GPUs that are not there, and report where launches go and what else the host asks for.

    python tests/launch_elsewhere.py

prints a JSON object: for every step, the streams and devices of its launches, of their kernels and of their tensors,
the device that is current afterwards, what goes through Triton's own way to launch, and the operators of PyTorch that
launch code calls. Tensors are fake, a stub driver is in place of the GPUs, and so is a variable of the current device.
In a process of its own, as `compile_kernels.py`.
"""

import json
import warnings

import torch
import triton
from compile_kernels import StubDriver, StubLauncher, StubUtils, unfinished
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

current = 0  # device
streams = {0: 0, 1: 0}  # the current one of each device
loaded_for = {}  # device, by kernel
launched = []


def exchange(device: int) -> int:
    """What `torch.cuda.device` does, without a GPU; negative numbers ask for nothing."""
    global current
    before, current = current, device if device >= 0 else current
    return before


class Utils(StubUtils):
    def load_binary(self, *arguments: object) -> tuple[int, ...]:
        found = super().load_binary(*arguments)
        loaded_for[found[1]] = arguments[-1]
        return found


class Launcher(StubLauncher):
    def __call__(self, *arguments: object) -> None:
        tensors = [argument for argument in arguments[9:] if isinstance(argument, torch.Tensor)]
        launched.append((arguments[3], arguments[4], tensors))


class Driver(StubDriver):
    launcher_cls = Launcher

    def __init__(self) -> None:
        super().__init__(GPUTarget("cuda", 90, 32))
        self.utils = Utils()

    def get_current_device(self) -> int:
        return current

    def get_current_stream(self, device: int) -> int:
        return streams[device]


class Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.made = set(), set()  # operators, and devices of their results

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
        self.seen.add(function.name().split(".")[0])
        result = function(*args, **(kwargs or {}))
        self.made |= {str(result.device)} if isinstance(result, torch.Tensor) else set()
        return result


def call_everything(device: str) -> None:
    """Every operator, forward and backward."""
    from dlu_triton.ops import cam, carafe, dlu

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    features, space, offsets, output = new(2, 64, 26, 42), new(2, 25, 26, 42), new(2, 8, 26, 42), new(2, 64, 52, 84)
    masks, logits = new(2, 25, 52, 84), new(2, 100, 26, 42)
    dlu.dlu_upsample_op.launch(features, space, offsets, 2, 5, 1, None)
    dlu.dlu_upsample_op.gradients.launch(output, features, space, offsets, 2, 5, 1, None, True, True, True)
    dlu.expand_kernels_op.launch(space, offsets, 2, 5, 1, None)
    dlu.expand_kernels_op.gradients.launch(masks, space, offsets, 2, 5, 1, None, True, True)
    carafe.carafe_op.launch(features, masks, 5, 1, 2, None)
    carafe.carafe_op.gradients.launch(output, features, masks, 5, 1, 2, None, True, True)
    carafe.carafe_upsample_op.launch(features, logits, 2, 5, 1, None)
    carafe.carafe_upsample_op.gradients.launch(output, features, logits, 2, 5, 1, None, True, True)
    # Planes that are too large for one program take a kernel more.
    for activations in (new(2, 64, 14, 14), new(1, 64, 112, 112)):
        gradients = activations.unsqueeze(1)
        cam.class_activation_map_op.launch(activations, gradients, "xgradcam", 1e-6, True, (224, 224), True, True)
    cam.weighted_activation_map_op.launch(activations, new(1, 1, 64), True, None, False)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
    runs, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: (runs.append(self.__name__), run(self, *args, **kwargs))[1]
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")

    report = {}
    with FakeTensorMode():
        for step, deterministic in (("first", False), ("again", False), ("deterministic", True)):
            torch.use_deterministic_algorithms(deterministic)
            for index in (1, 0):
                streams[index] += 10 + index
                launched.clear()
                runs.clear()
                with Record() as record:
                    call_everything(f"cuda:{index}")
                report[f"{step} cuda:{index}"] = {
                    "launches": len(launched),
                    "expected stream": streams[index],
                    "streams": sorted({stream for stream, _, _ in launched}),
                    "kernels": sorted({loaded_for[kernel] for _, kernel, _ in launched}),
                    "tensors": sorted({str(tensor.device) for _, _, tensors in launched for tensor in tensors}),
                    "current": current,
                    "through Triton": sorted(set(runs)),
                    "operators": sorted(record.seen),
                    "allocations": sorted(record.made),
                }
    print(json.dumps(report))


if __name__ == "__main__":
    with unfinished():
        main()
