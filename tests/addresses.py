"""Kernels in Triton's interpreter with every address checked.

Each tensor of a launch gets an address that is not its own, far from those of the others, which kernels compute with.
Before memory is touched, the address of every lane that is not masked off has to be that of an element of the view that
its pointer came from: not of a gap between the elements, nor of what else is in its storage, nor of another tensor.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

REGION_BITS = 46  # of bytes around an argument: less than that away, a wrong address is known to be of that argument


class AddressError(AssertionError):
    """A kernel reached outside of an argument."""


class Argument:
    """A tensor of a launch: where kernels think it is, where it is, and where its elements are."""

    def __init__(self, name: str, tensor: torch.Tensor, region: int, address: int) -> None:
        self.name, self.tensor, self.address = name, tensor, address
        # As aligned as it is; in the middle of its region, for what comes before it.
        self.base = (region << REGION_BITS) + (1 << REGION_BITS - 1) + address % 4096
        self.itemsize = tensor.element_size()
        axes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)
        self.axes, self.offsets = [(1, 1)], None  # innermost first, those that follow each other without a gap as one
        for stride, size in axes:
            inner, count = self.axes[-1]
            if stride == inner * count or size == 0:
                self.axes[-1] = inner, count * size
            elif stride > sum(inner * (count - 1) for inner, count in self.axes):
                self.axes.append((stride, size))
            elif stride > 0:  # elements overlap
                places = (np.arange(size) * stride for stride, size in axes)
                self.offsets = np.unique(sum(np.ix_(*places)))
                break

    def holds(self, offsets: np.ndarray) -> np.ndarray:
        """Whether there are elements at these offsets, in bytes."""
        if self.offsets is not None:
            return np.isin(offsets, self.itemsize * self.offsets)
        found = offsets >= 0
        for stride, size in reversed(self.axes):
            places, offsets = np.divmod(offsets, stride * self.itemsize)
            found &= places < size
        return found & (offsets == 0)


class Store(NamedTuple):
    """A store or an atomic operation."""

    kernel: str
    argument: str


class _CheckedMemory:
    """In place of the interpreter's own functions that touch memory, which see all such operations of a kernel."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions
        self.kernel, self.names, self.arguments = "", iter(()), []
        self.stores: set[Store] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.functions, name)

    def start(self, kernel: str, names: list[str]) -> None:
        self.kernel, self.names, self.arguments = kernel, iter(names), []

    def take(self, tensor: torch.Tensor, pointer: Any) -> Any:
        """Move the pointer to an argument away from it."""
        argument = Argument(next(self.names), tensor, len(self.arguments) + 1, int(pointer.handle.data[0]))
        self.arguments.append(argument)
        pointer.handle.data = np.array([argument.base], dtype=np.uint64)
        return pointer

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: Any) -> np.ndarray:
        return self.functions.load(self.checked("loads", pointers, mask, dtype), mask, other, dtype)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        self.functions.store(self.checked("stores", pointers, mask, values.dtype), values, mask)

    def atomic_rmw(self, operation: Any, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray, order: Any) -> Any:
        pointers = self.checked("adds atomically to", pointers, mask, values.dtype)
        return self.functions.atomic_rmw(operation, pointers, values, mask, order)

    def atomic_cas(self, pointers: np.ndarray, compared: np.ndarray, values: np.ndarray, order: Any) -> Any:
        pointers = self.checked("swaps atomically", pointers, np.ones_like(pointers, dtype=bool), values.dtype)
        return self.functions.atomic_cas(pointers, compared, values, order)

    def checked(self, does: str, pointers: np.ndarray, mask: np.ndarray, dtype: Any) -> np.ndarray:
        """The addresses in memory of these, of which lanes that are masked off may be anything."""
        lanes = np.broadcast_to(mask, pointers.shape).astype(bool, copy=False)
        everything = lanes.all()
        regions = (pointers if everything else pointers[lanes]) >> np.uint64(REGION_BITS)
        if not regions.size:
            return pointers
        addresses = pointers.copy()
        first = regions.flat[0]
        for region in [first] if (regions == first).all() else np.unique(regions):
            if not 1 <= region <= len(self.arguments):
                raise AddressError(f"{self.kernel} {does} an address that comes from none of its arguments")
            argument = self.arguments[int(region) - 1]
            here = everything or (lanes & (pointers >> np.uint64(REGION_BITS) == region))
            offsets = (pointers[here] - np.uint64(argument.base)).view(np.int64)
            if np.dtype(dtype).itemsize != argument.itemsize:
                raise AddressError(f"{self.kernel} {does} {np.dtype(dtype)} in {self.described(argument)}")
            held = argument.holds(offsets)
            if not held.all():
                offset = offsets[~held].flat[0] / argument.itemsize
                outside = f"{does} offset {offset:.15g} of {self.described(argument)}"
                raise AddressError(f"{self.kernel} {outside}, and {(~held).sum()} of {held.size} lanes lie outside")
            addresses[here] = (offsets + argument.address).view(np.uint64)
            if does != "loads":
                self.stores.add(Store(self.kernel, argument.name))
        return addresses

    def described(self, argument: Argument) -> str:
        tensor = argument.tensor
        return f"{argument.name}, {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"


@contextlib.contextmanager
def checked() -> Iterator[set[Store]]:
    """Raises AddressError from launches inside; yields what they have stored to so far."""
    memory = _CheckedMemory(interpreter._interpreter)
    convert, call = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def take(argument: Any) -> Any:
        converted = convert(argument)
        return memory.take(argument, converted) if hasattr(argument, "data_ptr") else converted

    def launch(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
        known = {name: value for name, value in kwargs.items() if name in self.arg_names}
        arguments = inspect.getcallargs(self.fn, *args, **known)
        memory.start(self.fn.__name__, _names({k: v for k, v in arguments.items() if k not in self.constexprs}))
        try:
            call(self, *args, **kwargs)
        except InterpreterError as error:
            cause = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:  # one for each function
                cause = cause.__cause__
            raise cause if isinstance(cause, AddressError) else error from None

    with (
        mock.patch.object(interpreter, "_interpreter", memory),
        mock.patch.object(interpreter, "_implicit_cvt", take),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
    ):
        yield memory.stores


def _names(arguments: dict[str, Any]) -> list[str]:
    """Those of the tensors, as they are converted, with the numbers of those in tuples, or of a descriptor's."""
    names = []
    for name, value in arguments.items():
        if isinstance(value, tuple):
            names += _names({f"{name}[{index}]": each for index, each in enumerate(value)})
        elif hasattr(getattr(value, "base", value), "data_ptr"):
            names.append(name)
    return names
