"""Variants of tiles, held against float64 in the interpreter; their times are not."""

import clock
import measure
import pytest
import tune
from cases import TINY

from dlu_triton import _launch


@pytest.mark.skipif(not measure.RUNS_KERNELS, reason="a CPU runs no kernels: set TRITON_INTERPRET=1")
def test_variants_run_and_leave_the_table_alone(monkeypatch):
    monkeypatch.setattr(tune, "variants", lambda *sizes: [(4, 8, 32, 4), (8, 8, 16, 8), (3, 8, 16, 4)])
    monkeypatch.setattr(tune, "_seconds", lambda call, flush: (call(), 1e-6)[1])
    monkeypatch.setattr(clock, "Flush", object)
    before = dict(_launch.FORWARD_TILES)
    rows = list(tune.tune("dlu_upsample", TINY._replace(kernel=5)))
    assert before == _launch.FORWARD_TILES
    assert [row["variant"][0] for row in rows] == [4, 8, 3]
    assert all(row["error"] <= 1e-6 and row["roofline"] == 1 for row in rows[:2])
    assert "power of 2" in rows[2]["cannot"]  # 24 outputs


@pytest.mark.parametrize("scale", (2, 4, 8, 16))
def test_variants_are_few_and_include_the_table(scale):
    for (itemsize, _, its), entry in _launch.FORWARD_TILES.items():
        if its == scale:
            found = tune.variants(scale, itemsize)
            assert entry in found
            assert len(found) == len(set(found)) <= 48
