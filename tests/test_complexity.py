"""Parameters and FLOPs: the published figures, formulas against modules and against products that PyTorch counts."""

import itertools
import random
import re
import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dlu_triton
from dlu_triton import __main__, _count, complexity
from dlu_triton.ops import _registration
from dlu_triton.ops.carafe import carafe_op


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Not here: `with torch.device("meta")` knows `torch.empty` by identity, and would compute where it is replaced."""


# For 256 channels: parameters and FLOPs of CARAFE and of DLU, and what DLU saves of each, in per cent.
PUBLISHED = {
    2: ((74_148, 199_496), (35_489, 122_178), (52.1, 38.8)),
    4: ((247_248, 699_296), (49_337, 303_474), (80.0, 56.6)),
    8: ((939_648, 2_698_496), (104_729, 1_028_658), (88.9, 61.9)),
    16: ((3_709_248, 10_695_296), (326_297, 3_929_394), (91.2, 63.3)),
}


@pytest.mark.parametrize("count", (complexity, _count.counted))
@pytest.mark.parametrize("scale_factor", PUBLISHED)
def test_published_figures(scale_factor, count):
    found = count(256, scale_factor)
    carafe, dlu, saved = PUBLISHED[scale_factor]
    assert found.carafe == (*carafe, 0)
    assert found.dlu == (*dlu, 7 * 25 * scale_factor**2)
    assert (round(100 * found.parameters_saved, 1), round(100 * found.flops_saved, 1)) == saved
    in_all = 100 * (1 - (dlu[1] + 7 * 25 * scale_factor**2) / carafe[1])
    assert 100 * found.flops_saved_with_interpolation == pytest.approx(in_all)


def test_by_hand():
    """Of 10 parameters in the compressor, and 51 for each channel of the encoders: 18 for CARAFE, and 38 for DLU, which
    is the dearer one here."""
    found = complexity(4, 3, 1, 2, 5, compressed_channels=2)
    assert found.carafe == (10 + 51 * 18, 20 + 102 * 18 + 72, 0)
    assert found.dlu == (10 + 51 * 38, 20 + 102 * 38 + 72, 126)
    assert found.parameters_saved == pytest.approx(-1020 / 928)
    assert found.flops_saved == pytest.approx(-2040 / 1928)
    assert found.flops_saved_with_interpolation == pytest.approx(-2166 / 1928)


def test_modules_have_what_the_formulas_say():
    draw = random.Random(0)
    for _ in range(40):
        groups = draw.randint(1, 4)
        sizes = dict(
            channels=groups * draw.randint(1, 40), scale_factor=draw.randint(1, 16), up_group=groups,
            up_kernel=draw.choice((1, 3, 5, 7, 9)), encoder_kernel=draw.choice((1, 3, 5)),
            compressed_channels=draw.randint(1, 70),
        )  # fmt: skip
        assert complexity(**sizes) == _count.counted(**sizes), sizes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"channels": 8.0}, TypeError, "channels must be an integer, got 8.0 of type float"),
        ({"scale_factor": 17}, ValueError, "scale_factor must be from 1 to 16, got 17"),
        ({"up_kernel": 4}, ValueError, "up_kernel must be odd, got 4"),
        ({"up_group": 3}, ValueError, "up_group must divide the channels: 8 channels, got up_group 3"),
        ({"encoder_kernel": 2}, ValueError, "encoder_kernel must be odd, got 2"),
        ({"compressed_channels": 0}, ValueError, "compressed_channels must be at least 1, got 0"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        complexity(**{"channels": 8, "scale_factor": 2, **arguments})


# ---------------------------------------------------------------------------------------------------------------
# FlopCounterMode
# ---------------------------------------------------------------------------------------------------------------


def counts(call):
    """FLOPs by operator."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}


# Features (2, 6, 3, 4), scale 2, k = 3, 3 groups: 576 values of the output with 9 taps each, so 10,368 FLOPs; and 96
# pixels with 27 taps each, so 18,144 FLOPs of interpolation, and 20,736 back to the kernel space or to the offsets.
SHAPES = {"features": (6, 3, 4), "masks": (27, 6, 8), "logits": (108, 3, 4), "space": (27, 3, 4), "offsets": (24, 3, 4)}
CALLS = {
    "carafe": (("features", "masks"), lambda *tensors: dlu_triton.carafe(*tensors, 3, 3, 2)),
    "carafe_upsample": (("features", "logits"), lambda *tensors: dlu_triton.carafe_upsample(*tensors, 2, 3, 3)),
    "dlu_upsample": (("features", "space", "offsets"), lambda *tensors: dlu_triton.dlu_upsample(*tensors, 2, 3, 3)),
    "expand_kernels": (("space", "offsets"), lambda *tensors: dlu_triton.expand_kernels(*tensors, 2, 3, 3)),
}
FORWARD = {"carafe": 10_368, "carafe_upsample": 10_368, "dlu_upsample": 28_512, "expand_kernels": 18_144}
BACKWARD = {
    "carafe": {"features": 10_368, "masks": 10_368, "features masks": 20_736},
    "carafe_upsample": {"features": 10_368, "logits": 10_368, "features logits": 20_736},
    "dlu_upsample": {
        "features": 10_368,
        "space": 31_104,
        "offsets": 31_104,
        "features space": 41_472,
        "features offsets": 41_472,
        "space offsets": 51_840,
        "features space offsets": 62_208,
    },
    "expand_kernels": {"space": 20_736, "offsets": 20_736, "space offsets": 41_472},
}


@pytest.mark.parametrize("meta", (False, True), ids=("", "meta"))
@pytest.mark.parametrize("operator", CALLS)
def test_operators_by_hand(operator, meta, device):
    """Forward, and backward for every choice of gradients; where kernels run, for all of them at once."""
    names, call = CALLS[operator]
    device = torch.device("meta") if meta else device
    for count in range(len(names) + 1) if meta else (len(names),):
        for wanted in itertools.combinations(names, count):
            tensors = [torch.randn(2, *SHAPES[name], device=device, requires_grad=name in wanted) for name in names]
            expected = {f"dlu_triton.{operator}": FORWARD[operator]}
            if wanted:
                expected[f"dlu_triton.{operator}_backward"] = BACKWARD[operator][" ".join(wanted)]

            def step(tensors=tensors, wanted=wanted):
                output = call(*tensors)
                if wanted:
                    output.backward(torch.randn_like(output))

            assert counts(step) == expected, wanted
            assert [tensor.grad is not None for tensor in tensors] == [name in wanted for name in names]


@pytest.mark.parametrize("operator", CALLS)
def test_fake_tensors(operator):
    names, call = CALLS[operator]
    with FakeTensorMode():
        tensors = [torch.randn(2, *SHAPES[name], device="meta") for name in names]
        assert counts(lambda: call(*tensors)) == {f"dlu_triton.{operator}": FORWARD[operator]}


@pytest.mark.parametrize("groups", (1, 2))
def test_reassembly_counts_as_the_matrix_product_it_is(groups):
    """Each source pixel's window (C/G, k*k) times its kernels (k*k, s*s)."""
    n, c, h, w, k, s = 2, 4, 3, 5, 3, 2
    features = torch.randn(n, c, h, w, device="meta", requires_grad=True)
    masks = torch.randn(n, groups * k * k, s * h, s * w, device="meta", requires_grad=True)

    def product():
        windows = F.unfold(features, k, padding=1).view(n, groups, c // groups, k * k, h * w).permute(0, 1, 4, 2, 3)
        kernels = masks.view(n, groups, k * k, h, s, w, s).permute(0, 1, 3, 5, 2, 4, 6)
        output = windows.reshape(-1, c // groups, k * k) @ kernels.reshape(-1, k * k, s * s)
        output.backward(torch.randn_like(output))

    def operator():
        output = dlu_triton.carafe(features, masks, k, groups, s)
        output.backward(torch.randn_like(output))

    assert counts(product) == {"aten.bmm": sum(counts(operator).values())}


CAMS = {
    "gradcam": ("nkc,nchw->nkhw",),  # the mean is no product
    "xgradcam": ("nkchw,nchw->nkc", "nkc,nchw->nkhw"),
    "gradcam++": ("nkchw,nkchw->nkc", "nkc,nchw->nkhw"),
    "hirescam": ("nkchw,nchw->nkhw",),
    "layercam": ("nkchw,nchw->nkhw",),
    "elementwise": ("nkchw,nchw->nkhw",),
}


@pytest.mark.parametrize("method", CAMS)
def test_maps_count_as_the_products_they_are(method, device):
    sizes = {"n": 2, "k": 3, "c": 4, "h": 5, "w": 6}

    def product():
        for equation in CAMS[method]:
            operands = equation.split("->")[0].split(",")
            torch.einsum(equation, *(torch.randn(*(sizes[i] for i in axes), device="meta") for axes in operands))

    activations, gradients = torch.rand(2, 4, 5, 6, device=device), torch.randn(2, 3, 4, 5, 6, device=device)
    expected = sum(counts(product).values())
    assert expected == len(CAMS[method]) * 2 * 2 * 3 * 4 * 5 * 6
    for size in (None, 7):
        found = counts(lambda size=size: dlu_triton.class_activation_map(activations, gradients, method, size=size))
        assert found == {"dlu_triton.class_activation_map": expected}
    parts = counts(lambda: dlu_triton.class_activation_parts(activations, gradients[:, 0], method))
    assert parts == {"dlu_triton.class_activation_map": expected // 3}


@pytest.mark.parametrize("maps", (1, 3))
def test_weighted_maps_count_as_the_product_they_are(maps, device):
    activations, weights = torch.randn(2, 4, 5, 6, device=device), torch.randn(2, maps, 4, device=device)
    product = counts(lambda: weights @ activations.flatten(2))
    assert product == {"aten.bmm": 2 * 2 * maps * 4 * 30}
    found = counts(lambda: dlu_triton.weighted_activation_map(activations, weights))
    assert found == {"dlu_triton.weighted_activation_map": product["aten.bmm"]}


def test_a_formula_can_be_registered_again():
    """As when a module is reloaded."""
    features, masks = torch.randn(1, 2, 2, 2, device="meta"), torch.randn(1, 1, 4, 4, device="meta")
    op, shapes = torch.ops.dlu_triton.carafe, []
    formula = _registration.flop_registry[op]
    try:
        carafe_op.register_flops(lambda *arguments: shapes.append(arguments) or 5)
        assert counts(lambda: op(features, masks, kernel_size=1, group_size=1, scale_factor=2, output_size=None)) == {
            "dlu_triton.carafe": 5
        }
        assert shapes == [(features.shape, masks.shape, 1, 1, 2, None)]
    finally:
        _registration.flop_registry[op] = formula


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def relaunches(monkeypatch):
    """No kernel runs, so neither a GPU nor the interpreter is asked for."""
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: calls.append(arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: calls.append("is_available"))
    return calls


CLAIM = "DLU's abstract (arXiv 2410.22139) claims 91% fewer parameters, at least 63% fewer FLOPs at 16x."
COUNTED = [
    "Counted for 256 channels: 91.2% fewer parameters, 63.3% fewer FLOPs. The claim holds.",
    "Counted with the interpolation: 91.2% fewer parameters, 62.8% fewer FLOPs. The claim does not hold.",
]


def test_command(capsys, relaunches):
    assert __main__.main(["complexity"]) == 0
    assert not relaunches
    lines = capsys.readouterr().out.splitlines()
    assert "256 channels" in lines[0]
    rows = [" ".join(line.split()) for line in lines]
    assert "2x 74,148 35,489 52.1% 199,496 122,178 38.8% 122,878 38.4%" in rows
    assert "16x 3,709,248 326,297 91.2% 10,695,296 3,929,394 63.3% 3,974,194 62.8%" in rows
    assert "All of it is what the formulas of `dlu_triton.complexity` give." in lines
    assert lines[-3:] == [CLAIM, *COUNTED]
    widths = {len(line) for line in lines if line.lstrip().startswith(("2x", "4x", "8x", "16x", "scale", "parameters"))}
    assert len(widths) == 1


def test_command_for_other_channels(capsys):
    """The claim is about 256 whatever the table is about."""
    assert __main__.main(["complexity", "--channels", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "64 channels" in lines[0]
    rows = [" ".join(line.split()) for line in lines]
    assert "2x 61,860 23,201 62.5% 136,520 59,202 56.6% 59,902 56.1%" in rows
    assert lines[-3:] == [CLAIM, *COUNTED]


@pytest.mark.parametrize("channels", (256, 64))
def test_command_fails_where_formulas_and_modules_differ(channels, monkeypatch, capsys):
    right = _count.complexity

    def wrong(channels, scale_factor):
        found = right(channels, scale_factor)
        return found._replace(dlu=found.dlu._replace(flops=5)) if scale_factor == 16 else found

    monkeypatch.setattr(_count, "complexity", wrong)
    assert __main__.main(["complexity", "--channels", str(channels)]) == 1
    lines = capsys.readouterr().out.splitlines()
    where = dict.fromkeys((channels, 256))
    assert [line for line in lines if "formula" in line] == [
        f"DLU at 16x for {c} channels: counted {_count.counted(c, 16).dlu.flops:,} flops, the formula gives 5"
        for c in where
    ]


def test_a_claim_that_does_not_hold_is_said_to(monkeypatch, capsys):
    monkeypatch.setattr(_count, "CLAIMED_PARAMETERS", 0.95)
    assert __main__.main(["complexity"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "95% fewer parameters" in lines[-3]
    assert lines[-2].endswith("The claim does not hold.")
