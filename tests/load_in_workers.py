"""Call operators in the worker processes of a data loader, after this process has called them with many threads.

    python tests/load_in_workers.py fork|spawn|forkserver [cuda]

prints a JSON object: what differs between workers and this process, and whether CUDA was initialised, or asked for its
devices, which takes CUDA from forked processes, unless this process is to use it. With the interpreter, a thread of
this process is in the midst of launches whenever workers are forked.
"""

import json
import sys
import threading

import torch
from torch.utils.data import DataLoader, Dataset

import dlu_triton
from dlu_triton import _launch, _verify

CASE = _verify.Case("", channels=4, height=2, width=3, kernel_size=3)


class Results(Dataset):
    """Output and gradients of an operator."""

    def __len__(self) -> int:
        return len(_verify.OPERATORS)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        operator = _verify.OPERATORS[index]
        return [*results(operator).values()]


def results(operator: str) -> dict[str, torch.Tensor]:
    arguments = _verify.inputs(operator, CASE, torch.float32, "cpu")
    return _verify.results(_verify.function(operator, CASE, eager=False), arguments)


def collate(samples: list[list[torch.Tensor]]) -> tuple[list[torch.Tensor], torch.Tensor, bool]:
    """A batch of one, with its output explained, and whether the process could not use CUDA."""
    (sample,) = samples
    maps = dlu_triton.xgrad_cam(sample[0], sample[0], size=(7, 5), normalize=True)
    return sample, maps, torch.cuda._is_in_bad_fork()


def main() -> None:
    method, uses_cuda = sys.argv[1], "cuda" in sys.argv[2:]
    torch.set_num_threads(4)
    if uses_cuda:
        torch.ones(3, device="cuda").sum().item()
    large = torch.randn(2, 16, 64, 64, requires_grad=True)
    dlu_triton.reference.carafe(large, torch.randn(2, 9, 128, 128), 3, 1, 2).sum().backward()  # takes all threads
    torch.set_num_threads(1)  # as in workers, for the same order of sums
    expected = [collate([[*results(operator).values()]]) for operator in _verify.OPERATORS]

    done = threading.Event()

    def launch() -> None:
        while not done.is_set():
            results("carafe")

    thread = threading.Thread(target=launch)
    if _launch.INTERPRETED:
        thread.start()
    loader = DataLoader(Results(), collate_fn=collate, num_workers=2, multiprocessing_context=method, timeout=100)
    different, initialised = [], False
    for _ in range(2):
        for operator, (sample, maps, _), (found, found_maps, bad) in zip(
            _verify.OPERATORS, expected, loader, strict=True
        ):
            if not all(map(torch.equal, [*sample, maps], [*found, found_maps])):
                different.append(operator)
            initialised |= bad
    done.set()
    if thread.is_alive():
        thread.join()
    initialised |= torch.cuda.is_initialized()
    print(json.dumps({"different": different, "initialised": initialised and not uses_cuda}))


if __name__ == "__main__":
    main()
