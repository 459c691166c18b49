"""Less for Triton's interpreter to do: with both of these a kernel takes it less than half as long."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from triton.runtime import interpreter


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """Sums of integers are not computed twice, in 64 bits for an assertion that is off; and `triton.language` is
    patched once in a launch for the functions of a module, not for each call of one."""
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
    ):
        yield
