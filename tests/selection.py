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
    """`long` where all their kernels have to be compiled first, and are then emulated."""
    return long(*values, when=EMULATED)
