"""Variants of tiles, held against float64 in the interpreter; their times are not."""

import measure
import pytest
import tune
from cases import TINY

from dlu_triton import _launch


@pytest.mark.skipif(not measure.RUNS_KERNELS, reason="a CPU runs no kernels: set TRITON_INTERPRET=1")
def test_variants_run_and_leave_the_table_alone(monkeypatch):
    variants = [tune.Variant(4, 8, 32, 4), tune.Variant(8, 8, 16, 8), tune.Variant(3, 8, 16, 4)]
    monkeypatch.setattr(tune, "variants", lambda scale, itemsize: variants)
    monkeypatch.setattr(tune, "_seconds", lambda call: (call(), 1e-6)[1])
    before = dict(_launch.FORWARD_TILES)
    case = TINY._replace(kernel=5)
    rows = tune.tune("dlu_upsample", case)
    assert before == _launch.FORWARD_TILES
    assert [row["block_h"] for row in rows] == [4, 8, 3]
    assert all(row["error"] <= 1e-6 and row["roofline"] == rows[0]["roofline"] for row in rows[:2])
    assert "power of 2" in rows[2]["cannot"]  # 24 outputs


def test_variants_are_tiles_of_the_table():
    for (itemsize, _, scale), entry in _launch.FORWARD_TILES.items():
        assert entry in [variant[:3] for variant in tune.variants(scale, itemsize)]
