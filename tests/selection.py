"""What runs with --long only."""

import pytest
from conftest import EMULATED


def long(*values, when=True):
    """These values of a parameter; a tuple is one of several parameters."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long if when else ())
        for value in values
    ]


def long_emulated(*values):
    """`long`, but only when emulated: each of these compiles kernels of its own."""
    return long(*values, when=EMULATED)
