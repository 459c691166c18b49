"""The deterministic mode of PyTorch, around a call."""

from collections.abc import Callable
from typing import Any

import torch


def deterministic(call: Callable[[], Any], *, fill: bool) -> Callable[[], Any]:
    """The call with `torch.use_deterministic_algorithms(True)`, and everything as it was after each.

    With `fill`, as by default, the mode also has PyTorch write NaN to every new tensor, for which it launches kernels.
    """

    def run() -> Any:
        filled = torch.utils.deterministic.fill_uninitialized_memory
        enabled = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = filled

    return run
