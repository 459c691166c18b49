"""What interpreted kernels may touch: the elements of the tensors they are launched on, and nothing beside them."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from triton.runtime import interpreter


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + stride * torch.arange(size)).flatten()
    return tensor.data_ptr() + tensor.element_size() * offsets.unique().numpy()


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Accesses elsewhere, by the kinds of access: raised where they happen, before they do harm."""
    builder, launch = type(interpreter.interpreter_builder), interpreter.GridExecutor.__call__
    allowed, kinds = [np.empty(0, np.int64)], []

    def launch_watched(self, *arguments, **constants) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        allowed[0] = np.unique(np.concatenate([_addresses(tensor) for tensor in tensors]))
        launch(self, *arguments, **constants)

    def checked(kind: str, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle) -> None:
        kinds.append(kind)
        wanted = pointers.data[mask.data.astype(bool)].astype(np.int64)
        places = np.minimum(np.searchsorted(allowed[0], wanted), len(allowed[0]) - 1)
        outside = allowed[0][places] != wanted
        assert not outside.any(), f"{kind} of {outside.sum()} places outside of all tensors"

    load, store, add = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def load_watched(self, pointers, mask, *others) -> interpreter.TensorHandle:
        checked("load", pointers, mask)
        return load(self, pointers, mask, *others)

    def store_watched(self, pointers, values, mask, *others) -> None:
        checked("store", pointers, mask)
        return store(self, pointers, values, mask, *others)

    def add_watched(self, kind, pointers, values, mask, *others) -> interpreter.TensorHandle:
        checked("atomic addition", pointers, mask)
        return add(self, kind, pointers, values, mask, *others)

    interpreter.GridExecutor.__call__ = launch_watched
    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = (
        load_watched, store_watched, add_watched,
    )  # fmt: skip
    try:
        yield kinds
    finally:
        interpreter.GridExecutor.__call__ = launch
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, add
