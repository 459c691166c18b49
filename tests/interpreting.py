"""Less for Triton's interpreter to do: with all of these a kernel takes it about a third of the time."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from triton.language import core
from triton.runtime import interpreter

known_blocks: dict[tuple, dict[str, Any]] = {}
known_dtypes: dict[str, Any] = {}
new_block, find_dtype = core.block_type.__init__, interpreter._get_np_dtype


def block_type(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
    """The checks and names of a type are made once; each tensor has one."""
    key = str(element_ty), *core._unwrap_if_constexpr(list(shape))
    if key not in known_blocks:
        new_block(self, element_ty, shape)
        known_blocks[key] = dict(vars(self))
    vars(self).update(known_blocks[key])


@functools.cache
def sizes(shape: core.tuple) -> tuple[core.constexpr, core.tuple]:
    return core.constexpr(math.prod(shape)), core.tuple(map(core.constexpr, shape))


def np_dtype(dtype: core.dtype) -> Any:
    if dtype.name not in known_dtypes:
        known_dtypes[dtype.name] = find_dtype(dtype)
    return known_dtypes[dtype.name]


def tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = sizes(type.shape if type.is_block() else ())


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """Sums of integers are not computed twice, in 64 bits for an assertion that is off; `triton.language` is patched
    once in a launch for the functions of a module, not for each call of one; and types and shapes are made once."""
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    builder = interpreter.interpreter_builder
    patched: dict[int, Any] = {}

    def patch_once(function: Callable) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched[module] = patch(function)
        return patched[module]

    def launch(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        call(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "options", replace(builder.options, sanitize_overflow=False)),
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        mock.patch.object(interpreter, "_get_np_dtype", np_dtype),
        mock.patch.object(core.block_type, "__init__", block_type),
        mock.patch.object(core.tensor, "__init__", tensor),
    ):
        yield
