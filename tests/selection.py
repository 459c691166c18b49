"""What runs with --long only."""

import pytest


def long(*values):
    """These values of a parameter; a tuple is one of several parameters."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long) for value in values
    ]
