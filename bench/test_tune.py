"""Variants of tiles, held against float64 in the interpreter; their times are not."""

import cases
import clock
import measure
import pytest
import tune
from cases import TINY, Case

from dlu_triton import _launch

KERNELS = {
    "forward": "reassemble_forward",
    "features": "reassemble_backward_features",
    "kernels": "reassemble_backward_kernels",
}
RUN = {  # names of constants, and variants, of which the second cannot run
    "forward": (
        ("BLOCK_H", "BLOCK_W", "BLOCK_Q", "num_warps"),
        [(4, 8, 32, 4), (3, 8, 16, 4), (8, 8, 16, 8)],
    ),
    "features": (
        ("STRIP_W", "BLOCK_H", "BLOCK_W", "BLOCK_C", "num_warps", "maxnreg"),
        [(4, 2, 8, 32, 4, 255), (6, 2, 8, 32, 4, 255), (8, 8, 8, 16, 8, 128)],
    ),
    "kernels": (
        ("BLOCK_H", "BLOCK_W", "BLOCK_Q", "CELLS", "BLOCK_C", "num_warps", "maxnreg"),
        [(4, 8, 32, 4, 16, 4, 168), (3, 8, 32, 8, 16, 4, 168), (8, 8, 64, 0, 32, 8, 128)],
    ),
}


@pytest.mark.skipif(not measure.RUNS_KERNELS, reason="a CPU runs no kernels: set TRITON_INTERPRET=1")
@pytest.mark.parametrize("direction", tune.PASSES)
def test_variants_run_and_leave_the_table_alone(direction, monkeypatch):
    names, variants = RUN[direction]
    tuned = tune.PASSES[direction]._replace(variants=lambda op, case: variants)
    launches, launch = [], _launch.Launch
    monkeypatch.setattr(_launch, "Launch", lambda *parts: launches.append(parts) or launch(*parts))
    monkeypatch.setitem(tune.PASSES, direction, tuned)
    monkeypatch.setattr(tune, "_seconds", lambda call, flush: (call(), 1e-6)[1])
    monkeypatch.setattr(clock, "Flush", object)
    before = dict(getattr(_launch, tuned.table))
    rows = tune.tune(direction, "dlu_upsample", TINY._replace(kernel=5))
    for variant, row in zip(variants, rows, strict=True):
        assert (row["pass"], row["variant"]) == (direction, variant)
        if variant == variants[1]:
            assert "power of 2" in row["cannot"]
            continue
        assert row["error"] <= 2e-6
        assert row["roofline"] == 1
        found = {kernel.__name__: constants for kernel, _, _, constants in launches}
        assert tuple(found[KERNELS[direction]][name] for name in names) == variant
        others = set(KERNELS.values()) - {KERNELS[direction]}
        assert not others & (found.keys() - {"reassemble_forward"})
        launches.clear()
    assert before == getattr(_launch, tuned.table)


@pytest.mark.skipif(not measure.RUNS_KERNELS, reason="a CPU runs no kernels: set TRITON_INTERPRET=1")
def test_a_wrong_variant_is_told(monkeypatch):
    right, wrong = (4, 8, 4, 32, 4, 255), (4, 16, 4, 32, 4, 255)  # a step has 8 rows of outputs
    tuned = tune.PASSES["features"]._replace(variants=lambda op, case: [wrong, right])
    monkeypatch.setitem(tune.PASSES, "features", tuned)
    monkeypatch.setattr(tune, "_seconds", lambda call, flush: 1e-6)
    monkeypatch.setattr(clock, "Flush", object)
    first, second = tune.tune("features", "carafe", TINY._replace(kernel=5))
    assert first["cannot"].startswith("ValueError: wrong by ")
    assert "seconds" not in first
    assert second["error"] <= 2e-6
    assert tune._told(first).startswith("  strips of 4, pieces of 16 x 4, 32 channels, 4 warps, 255 registers ")


@pytest.mark.parametrize("direction", tune.PASSES)
@pytest.mark.parametrize("op", ("dlu_upsample", "carafe"))
def test_variants_are_few_and_begin_with_the_table(direction, op):
    for (itemsize, channels_last, scale), entry in getattr(_launch, tune.PASSES[direction].table).items():
        layout = "channels_last" if channels_last else "contiguous"
        dtype = {2: "bfloat16", 4: "float32"}[itemsize]
        case = Case(8, 256, 208 // scale, 336 // scale, scale=scale, dtype=dtype, layout=layout)
        found = tune.PASSES[direction].variants(op, case)
        assert found[0] == entry
        assert 9 <= len(found) == len(set(found)) <= 50


@pytest.mark.parametrize(("direction", "op", "elements"), [
    ("forward", "dlu_upsample", 4 * 32 + 32 + 25 + 8),
    ("features", "dlu_upsample", 4 * 32 + 25 + 8 + 32),
    ("kernels", "dlu_upsample", 4 * 32 + 32 + 2 * (25 + 8)),
    ("kernels", "carafe", 4 * 32 + 32 + 4 * 25),  # without the masks
    ("kernels", "carafe_upsample", 4 * 32 + 32 + 2 * 4 * 25),
])  # fmt: skip
def test_a_pass_is_held_against_what_it_reads_and_writes(direction, op, elements):
    case = TINY._replace(kernel=5)
    tensors, gradient = cases.inputs(op, case, "cpu"), cases.upstream(op, case, "cpu")
    assert tune.ideal_bytes(direction, op, tensors, gradient) == 4 * case.h * case.w * elements


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "argument --batch: the number must be from 1 to 1000000, got 0"),
        (["--size", "8", "x"], "argument --size: the number must be an integer, got 'x' of type str"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8' "),
        (["--scale", "17"], "argument --scale: invalid choice: 17 "),
        (["--scale", "2", "16", "--size", "8", "32"], "--size must be at least --scale, 16, got 8"),
        (["--json", "{here}/no/a.json"], "--json must be a file that can be written, got {here}/no/a.json: No such"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "DEVICE", "cuda")
    monkeypatch.setattr("sys.argv", ["tune.py", *(each.replace("{here}", str(tmp_path)) for each in arguments)])
    with pytest.raises(SystemExit, match=r"^2$"):
        tune.main()
    assert f"tune.py: error: {message.replace('{here}', str(tmp_path))}" in capsys.readouterr().err


def test_tuning_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr("sys.argv", ["tune.py"])
    with pytest.raises(SystemExit, match=r"^2$"):
        tune.main()
    assert "error: needs a GPU: the speed of a CPU or of the interpreter" in capsys.readouterr().err
