"""Class activation maps: values by hand, errors against float64, layouts, sizes, edges."""

import pytest
import torch
import torch.nn.functional as F
from layouts import channels_last, expanded, scalar, sliced, tokens, transposed
from test_operators import memory_of
from torch.utils._python_dispatch import TorchDispatchMode

import dlu_triton
from dlu_triton import _checks, _launch, _verify, reference
from dlu_triton.ops import cam as cam_ops

METHODS = _checks.CAM_METHODS
WEIGHING = _checks.WEIGHING_METHODS
LIBRARIES = pytest.mark.parametrize("library", (reference, dlu_triton), ids=("reference", "kernels"))
by_name = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}


def planes(*shape, dtype=torch.float64, device="cpu", seed=0):
    """Activations after a ReLU, and gradients."""
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(shape, generator=generator, dtype=torch.float64).relu()
    gradients = torch.randn(shape, generator=generator, dtype=torch.float64)
    return activations.to(device, dtype), gradients.to(device, dtype)


def assert_parts_equal(found, expected, **tolerance):
    for name in expected._fields:
        if getattr(expected, name) is None:
            assert getattr(found, name) is None
        else:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance, msg=lambda m: m)


# ---------------------------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------------------------

# Two channels of 1 x 2 pixels.
A = [[[1.0, 3.0]], [[2.0, 2.0]]]
G = [[[2.0, -1.0]], [[0.5, 1.5]]]
BY_HAND = {  # weights, contributions, map before ReLU
    "xgradcam": ([-1 / 4, 1.0], [-1.0, 4.0], [[-0.25 + 2, -0.75 + 2]]),
    "gradcam": ([0.5, 1.0], [2.0, 4.0], [[0.5 + 2, 1.5 + 2]]),
    # 2 * 4 / (2 * 4 + 4 * 8); 0.5 * 0.25 / (2 * 0.25 + 4 * 0.125) + 1.5 * 2.25 / (2 * 2.25 + 4 * 3.375)
    "gradcam++": ([0.2, 0.125 + 0.1875], [0.8, 1.25], [[0.2 + 0.625, 0.6 + 0.625]]),
    "hirescam": (None, [-1.0, 4.0], [[2.0 + 1, -3.0 + 3]]),
    "layercam": (None, [2.0, 4.0], [[2.0 + 1, 0.0 + 3]]),
    "elementwise": (None, [2.0, 4.0], [[2.0 + 1, 0.0 + 3]]),
}


@LIBRARIES
@pytest.mark.parametrize("method", METHODS)
def test_by_hand(method, library, device):
    weights, contributions, raw = BY_HAND[method]
    a, g = (torch.tensor([values], dtype=torch.float64, device=device) for values in (A, G))
    parts = library.class_activation_parts(a, g, method, eps=0)
    expected = torch.tensor([raw], dtype=torch.float64, device=device)
    torch.testing.assert_close(parts.raw, expected)
    torch.testing.assert_close(parts.map, expected.clamp(min=0))
    torch.testing.assert_close(parts.contributions, expected.new_tensor([contributions]))
    torch.testing.assert_close(parts.cancellation, expected.new_tensor([[1.0, 1.0]]))
    if weights is None:
        assert parts.weights is None
    else:
        torch.testing.assert_close(parts.weights, expected.new_tensor([weights]))


@LIBRARIES
def test_resize_and_normalisation_by_hand(library, device):
    """One channel of weight 1: half-pixel centres, borders held; then (x - min) / (max - min)."""
    a = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]], device=device)
    weights = torch.ones(1, 1, device=device)
    line = [0.0, 1.0, 3.0, 4.0]  # 0 and 4 at twice the size: centres at -0.25, 0.25, 0.75, 1.25
    expected = torch.tensor([[[x + 2 * y for x in line] for y in line]], device=device)
    torch.testing.assert_close(library.weighted_activation_map(a, weights, size=4), expected)
    normalized = library.weighted_activation_map(a - 6, weights, relu=False, size=(4, 4), normalize=True)
    torch.testing.assert_close(normalized, expected / 12)


@LIBRARIES
def test_cancellation(library, device):
    a = torch.tensor([[[[1.0, -1.0]], [[3.0, -1.0]], [[0.0, 0.0]], [[-2.0, -2.0]]]], device=device)
    parts = library.class_activation_parts(a, torch.ones_like(a))
    torch.testing.assert_close(parts.cancellation, torch.tensor([[0.0, 0.5, 1.0, 1.0]], device=device))


# ---------------------------------------------------------------------------------------------------------------
# Against float64
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", _verify.DTYPES, **by_name)
@pytest.mark.parametrize("case", _verify.CAM_CASES, **by_name)
def test_error_against_float64(case, dtype, device):
    if case.gpu_only and device.type == "cpu":
        pytest.skip("too large for a CPU")
    if not _verify.applies(case, _verify.CAM, dtype):
        pytest.skip("not a mixture of types")
    for name, found in _verify.compare(_verify.CAM, case, dtype, device).items():
        assert found.passed, f"{name}: kernel {found.kernel:.2e}, eager {found.eager:.2e}, bound {found.bound:.2e}"


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 17), (16, 16), (17, 16)], ids=str)
@pytest.mark.parametrize("channels", (1, 33, 64))
def test_sizes(channels, size, device):
    a, g = planes(2, channels, *size, device=device)
    for method in ("xgradcam", "elementwise"):
        for options in ({}, {"size": (7, 5), "normalize": True}, {"normalize": True, "relu": False}):
            found = dlu_triton.class_activation_parts(a, g, method, **options)
            assert_parts_equal(found, reference.class_activation_parts(a, g, method, **options))


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 7), (11, 40), (33, 64)], ids=str)
def test_resize_is_that_of_interpolate(size, normalize, device):
    """Up, down, and not at all; more outputs than a program takes."""
    a, g = planes(2, 3, 5, 7, device=device)
    raw = reference.class_activation_map(a, g, relu=False)
    expected = F.interpolate(raw.relu()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    if normalize:
        low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
        expected = torch.where(high > low, (expected - low) / (high - low), 0)
    torch.testing.assert_close(dlu_triton.xgrad_cam(a, g, size=size, normalize=normalize), expected)


@pytest.mark.parametrize("outputs", [(40, 40), (5, 64), (37, 23), (12, 14), (113, 3)], ids=str)
def test_extremes_are_found_among_few_outputs(outputs, device):
    """Enlarged maps are searched next to the source pixels only; every pixel has to be in [0, 1], both ends taken."""
    for h, w in ((5, 7), (1, 3), (6, 1), (2, 2)):
        for seed in range(3):
            a, g = planes(1, 3, h, w, device=device, dtype=torch.float32, seed=seed)
            found = dlu_triton.xgrad_cam(a - 0.3, g, size=outputs, relu=False, normalize=True)
            expected = reference.xgrad_cam(a - 0.3, g, size=outputs, relu=False, normalize=True)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
            assert found.amin() == 0
            assert found.amax() == 1


@pytest.mark.parametrize("enough", (1, 10**6))
@pytest.mark.parametrize("large", (False, True))
def test_work_shared_between_programs(large, enough, device, monkeypatch):
    """Few images split their channels and outputs over programs, many do not; planes may not fit one program."""
    monkeypatch.setattr(_launch, "ENOUGH_PROGRAMS", enough)
    a, g = planes(1, 150, *((40, 33) if large else (5, 6)), device=device)
    a -= 0.3  # signed, so that magnitudes are not values
    if large:
        a, g = a[:, :40].contiguous(memory_format=torch.channels_last), g[:, :40]
    assert _launch.plane_tile(a, g).whole != large
    for method in ("gradcam++", "layercam") if large else METHODS:
        for options in ({}, {"size": (20, 31)}, {"size": (20, 31), "normalize": True}):
            found = dlu_triton.class_activation_parts(a, g, method, **options)
            assert_parts_equal(found, reference.class_activation_parts(a, g, method, **options))


def test_partial_maps_are_added_once_for_large_maps(device, monkeypatch):
    """In a launch of their own, which changes no bit."""
    finish, calls, found = cam_ops._finish, [], []
    monkeypatch.setattr(cam_ops, "_finish", lambda *args, **options: calls.append(1) or finish(*args, **options))
    a, g = planes(1, 40, 33, 32, dtype=torch.float32, device=device)
    for most in (_launch.MOST_PIXELS_ADDED_AGAIN, 33 * 32):
        monkeypatch.setattr(_launch, "MOST_PIXELS_ADDED_AGAIN", most)
        calls.clear()
        parts = dlu_triton.class_activation_parts(a, g, size=(20, 31), normalize=True)
        found.append((len(calls), parts))
    (first, parts), (second, others) = found
    assert (first, second) == (2, 1)
    assert torch.equal(parts.map, others.map)
    assert torch.equal(parts.raw, others.raw)


@pytest.mark.parametrize(
    "shape", [(1, 256, 56, 56), (8, 256, 56, 56), (64, 256, 56, 56), (1, 2048, 7, 7), (1, 3, 9, 9)]
)
def test_finishing_reads_no_more_than_half_of_the_inputs(shape):
    """All programs that finish a map read all its partial maps."""
    n, c, h, w = shape
    a = torch.empty(shape, device="meta")
    slices, per_program = _launch.map_slices(n, c, _launch.plane_tile(a, a), h * w)
    assert (slices - 1) * per_program < c <= slices * per_program
    assert slices * h * w <= max(_launch.MOST_PARTIAL_PIXELS, h * w)
    tiles, outputs = _launch.finishing_tiles(n, 224 * 224, slices, c)
    assert (tiles - 1) * outputs < 224 * 224 <= tiles * outputs
    assert slices == 1 or tiles * slices <= c


def test_slices_of_several_blocks(device, monkeypatch):
    """Of which the last one has fewer."""
    a, g = planes(1, 45, 20, 33, device=device)
    tile = _launch.plane_tile(a, g)
    monkeypatch.setattr(_launch, "ENOUGH_PROGRAMS", 4)
    slices, per_program = _launch.map_slices(1, 45, tile, 20 * 33)
    assert 1 < slices < _launch.cdiv(45, tile.channels)
    assert per_program > tile.channels
    assert_parts_equal(dlu_triton.class_activation_parts(a, g), reference.class_activation_parts(a, g))


def test_more_slices_than_are_added_at_a_time(device):
    a, g = planes(1, 100, 32, 32, device=device)
    slices, _ = _launch.map_slices(1, 100, _launch.plane_tile(a, g), 32 * 32)
    assert slices > _launch.FINISHING_BLOCKS["BLOCK_S"]
    found = dlu_triton.class_activation_parts(a, g, size=(40, 30))
    assert_parts_equal(found, reference.class_activation_parts(a, g, size=(40, 30)))


# ---------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------


LAYOUTS = (channels_last, sliced, transposed, tokens, expanded, scalar)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("large", (False, True))
def test_layout_changes_no_value(layout, large, device):
    a, g = planes(2, 5, *((66, 67) if large else (4, 6)), device=device)
    for activations, gradients in ((layout(a), g), (a, layout(g)), (layout(a), layout(g))):
        assert not _launch.plane_tile(activations, gradients).whole or not large
        for method in ("gradcam++",) if large else METHODS:
            found = dlu_triton.class_activation_parts(activations, gradients, method, size=(9, 9))
            plain = (activations.contiguous(), gradients.contiguous())
            assert_parts_equal(found, reference.class_activation_parts(*plain, method, size=(9, 9)))
    weights = g[..., 0, 0].t().contiguous().t()
    found = dlu_triton.weighted_activation_map(layout(a), weights)
    torch.testing.assert_close(found, reference.weighted_activation_map(layout(a).contiguous(), weights))


@LIBRARIES
@pytest.mark.parametrize("method", METHODS)
def test_several_classes_are_a_loop(method, library, device):
    """Also where the classes come first in memory, as a batched backward leaves them."""
    a, _ = planes(2, 6, 4, 5, device=device)
    _, g = planes(3, 2, 6, 4, 5, device=device)
    found = library.class_activation_parts(a, g.transpose(0, 1), method, size=(6, 7), normalize=True)
    for k in range(3):
        one = library.class_activation_parts(a, g[k], method, size=(6, 7), normalize=True)
        for name in ("map", "raw", "weights", "contributions"):
            if getattr(one, name) is not None:
                torch.testing.assert_close(getattr(found, name)[:, k], getattr(one, name))
        torch.testing.assert_close(found.cancellation, one.cancellation)
    weights = g[:, :, :, 0, 0].transpose(0, 1)
    several = library.weighted_activation_map(a, weights)
    torch.testing.assert_close(several[:, 1], library.weighted_activation_map(a, weights[:, 1]))


@pytest.mark.parametrize("method", ("gradcam++", "elementwise"))
def test_several_classes_of_large_planes(method, device):
    a, _ = planes(2, 3, 66, 67, device=device)
    _, g = planes(2, 2, 3, 66, 67, device=device)
    found = dlu_triton.class_activation_parts(a, g, method)
    assert_parts_equal(found, reference.class_activation_parts(a, g, method))


@pytest.mark.parametrize("shape", [(33, 5, 7), (5, 40, 33)], ids=str)
@pytest.mark.parametrize("layout", (torch.Tensor.contiguous, channels_last, sliced), ids=lambda layout: layout.__name__)
def test_nothing_outside_is_touched(layout, shape, device, checked_addresses, guarded_allocations):
    """Every address of every load and store is that of an element, also where its value would be dropped. On a GPU,
    which shows no addresses, nothing beside results and arguments changes."""
    a, g = (layout(x) for x in planes(2, *shape, device=device))
    before = memory_of(a, g)
    dlu_triton.class_activation_parts(a, g, "gradcam++", size=(9, 5), normalize=True)
    dlu_triton.class_activation_map(a, g, "layercam")
    dlu_triton.weighted_activation_map(a, g[..., 0, 0], size=8)
    assert torch.equal(memory_of(a, g), before)
    assert checked_addresses != set()  # what was stored to; None on a GPU


@LIBRARIES
def test_batch_is_a_loop(library, device):
    a, g = planes(3, 20, 4, 5, device=device)
    for method in METHODS:
        found = library.class_activation_map(a, g, method, size=(6, 7), normalize=True)
        each = [library.class_activation_map(a[n : n + 1], g[n : n + 1], method, size=(6, 7), normalize=True)
                for n in range(3)]  # fmt: skip
        torch.testing.assert_close(found, torch.cat(each))


# ---------------------------------------------------------------------------------------------------------------
# Invariants
# ---------------------------------------------------------------------------------------------------------------


@LIBRARIES
def test_invariants(library, device):
    a, g = planes(2, 9, 5, 4, device=device)
    raw = {method: library.class_activation_parts(a, g, method, eps=0, relu=False) for method in METHODS}
    total = (g * a).sum((1, 2, 3))
    # The maps of XGrad-CAM and HiResCAM sum to sum(G * A), the score less its bias terms.
    for method in ("xgradcam", "hirescam"):
        torch.testing.assert_close(raw[method].map.sum((1, 2)), total)
    for method in METHODS:
        torch.testing.assert_close(raw[method].contributions.sum(1), raw[method].map.sum((1, 2)))
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(device)
        permuted = library.class_activation_map(a[:, order], g[:, order], method, eps=0, relu=False)
        torch.testing.assert_close(permuted, raw[method].map)
    # A larger gradient scales the map; larger activations, with the smaller gradient they have, leave XGrad-CAM's.
    for method in ("xgradcam", "gradcam", "hirescam", "layercam", "elementwise"):
        scaled = library.class_activation_map(a, 3 * g, method, eps=0, relu=False)
        torch.testing.assert_close(scaled, 3 * raw[method].map)
    rescaled = library.xgrad_cam(5 * a, g / 5, eps=0, relu=False)
    torch.testing.assert_close(rescaled, raw["xgradcam"].map)
    # With global pooling after the layer the gradient is constant over a plane, and three methods agree.
    pooled = g.mean((2, 3), keepdim=True).expand_as(g)
    maps = [library.class_activation_map(a, pooled, method, eps=0) for method in ("xgradcam", "gradcam", "hirescam")]
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[0], maps[2])


@LIBRARIES
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), **by_name)
def test_sums_past_the_range_of_half_precision(dtype, library, device):
    """Sums of 16 * 17 * 300 = 81600 > 65504 and products past it; eager half precision gives inf."""
    a = torch.full((1, 2, 16, 17), 300.0, dtype=dtype, device=device)
    g = torch.full_like(a, 0.5)
    g[:, 1] = 300.0
    for method in METHODS:
        found = library.class_activation_map(a, g, method)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, reference.class_activation_map(a.double(), g.double(), method).float())
    value = float(a[0, 0, 0, 0]) * (0.5 + float(g[0, 1, 0, 0]))
    torch.testing.assert_close(library.class_activation_map(a, g, "hirescam"), torch.full_like(found, value))


@LIBRARIES
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), **by_name)
def test_autocast_changes_nothing(dtype, library, device):
    a, g = planes(2, 20, 6, 5, dtype=torch.float32, device=device)
    a *= 1e5  # past the range of float16
    for method in METHODS:
        expected = library.class_activation_parts(a, g, method, size=(9, 9))
        with torch.autocast(device.type, dtype):
            found = library.class_activation_parts(a, g, method, size=(9, 9))
            weighted = library.weighted_activation_map(a, g[..., 0, 0])
        assert_parts_equal(found, expected)
        torch.testing.assert_close(weighted, library.weighted_activation_map(a, g[..., 0, 0]))


# ---------------------------------------------------------------------------------------------------------------
# Edges
# ---------------------------------------------------------------------------------------------------------------


@LIBRARIES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", (1e-6, 0))
def test_dead_channels_and_maps_are_zero(method, eps, library, device):
    a, g = planes(3, 4, 3, 5, dtype=torch.float32, device=device)
    a[0], a[1, 2], g[2] = 0, 0, -1
    parts = library.class_activation_parts(a, g, method, eps, size=(6, 6), normalize=True)
    assert parts.map[0].eq(0).all()
    assert parts.map[2].eq(0).all()
    assert parts.contributions[1, 2] == 0
    assert all(part.isfinite().all() for part in parts if part is not None)


@LIBRARIES
def test_constant_maps_are_zero(library, device):
    """A resized constant must not become the noise of its roundings."""
    a = torch.full((1, 1, 3, 3), 0.1, device=device)
    for size in (None, (3, 3), (7, 5), (64, 33)):
        assert library.weighted_activation_map(a, a[:, :, 0, 0], size=size, normalize=True).eq(0).all()


def test_an_axis_of_the_same_size_is_not_resized(device):
    """Of sizes that are not one when multiplied by their reciprocals, in float32."""
    for rows in (41, 47, 55):
        a, _ = planes(1, 2, rows, 3, dtype=torch.float32, device=device)
        weights = torch.ones(1, 2, device=device)
        found = dlu_triton.weighted_activation_map(a, weights, size=(rows, 6))
        each = [dlu_triton.weighted_activation_map(a[:, :, y : y + 1], weights, size=(1, 6)) for y in range(rows)]
        assert torch.equal(found, torch.cat(each, 1))


@LIBRARIES
def test_infinite_eps_is_refused(library, device):
    """It would make every weight zero."""
    a, g = planes(1, 2, 3, 3, device=device)
    with pytest.raises(ValueError, match="eps must be at least 0 and finite in float32, got inf"):
        library.xgrad_cam(a, g, eps=float("inf"))


def test_as_many_pixels_as_there_may_be():
    sides = (2**12, _checks.MAX_MAP_PIXELS // 2**12)
    assert _checks.map_size(sides) == sides
    with pytest.raises(ValueError, match=f"size must have at most {_checks.MAX_MAP_PIXELS} pixels"):
        _checks.map_size((sides[0], sides[1] + 1))


@LIBRARIES
@pytest.mark.parametrize("eps", (1e-6, 0))
def test_activations_that_cancel_stay_finite(eps, library, device):
    a, g = planes(2, 4, 4, 4, dtype=torch.float32, device=device)
    a[:, :, ::2] = -a[:, :, 1::2]
    assert a.sum((2, 3)).abs().max() < 1e-6
    a[0, 0] = torch.tensor([1.0, -1.0], device=device).repeat(8).view(4, 4)  # exactly
    for method in METHODS:
        parts = library.class_activation_parts(a, g, method, eps, normalize=True)
        assert all(part.isfinite().all() for part in parts if part is not None)
        assert parts.cancellation.max() < 1e-6
    if eps == 0:
        assert library.class_activation_parts(a, g, eps=0).weights[0, 0] == 0


@LIBRARIES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ("activations", "gradients"))
def test_nan_stays_in_its_image(method, where, library, device):
    a, g = planes(3, 4, 3, 5, dtype=torch.float32, device=device)
    clean = library.class_activation_map(a, g, method, size=(6, 6), normalize=True)
    (a if where == "activations" else g)[1, 2, 1, 1] = float("nan")
    cam = library.class_activation_map(a, g, method, size=(6, 6), normalize=True)
    assert cam[1].isnan().all()
    assert torch.equal(cam[::2], clean[::2])
    raw = library.class_activation_map(a, g, method)
    assert raw[1, 1, 1].isnan()


@LIBRARIES
def test_empty_batch(library, device):
    a, g = planes(0, 4, 3, 5, dtype=torch.float16, device=device)
    parts = library.class_activation_parts(a, g, size=(6, 7), normalize=True)
    shapes = [tuple(part.shape) for part in parts]
    assert shapes == [(0, 6, 7), (0, 3, 5), (0, 4), (0, 4), (0, 4)]
    assert all(part.dtype == torch.float32 for part in parts)
    assert library.weighted_activation_map(a, g[:, :, 0, 0]).shape == (0, 3, 5)


def test_repeatable(device):
    a, g = planes(2, 70, 9, 9, dtype=torch.float32, device=device)
    for method in METHODS:
        runs = [dlu_triton.class_activation_parts(a, g, method, size=(20, 20), normalize=True) for _ in range(3)]
        for name in runs[0]._fields:
            if getattr(runs[0], name) is not None:
                assert all(torch.equal(getattr(run, name), getattr(runs[0], name)) for run in runs)


@LIBRARIES
def test_return_weights(library, device):
    a, g = planes(2, 4, 3, 5, device=device)
    for method in WEIGHING:
        cam, weights = library.class_activation_map(a, g, method, return_weights=True)
        torch.testing.assert_close(cam, library.weighted_activation_map(a, weights))
    cam, weights = library.xgrad_cam(a, g, eps=1e-7, return_weights=True)
    torch.testing.assert_close(weights, (a * g).sum((2, 3)) / (a.sum((2, 3)) + 1e-7))


@LIBRARIES
@pytest.mark.parametrize("dtype", _verify.DTYPES, **by_name)
def test_result_is_float32_or_float64(dtype, library, device):
    a, g = planes(1, 2, 3, 4, dtype=dtype, device=device)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(part.dtype == expected for part in library.class_activation_parts(a, g))
    assert library.weighted_activation_map(a, g[..., 0, 0]).dtype == expected


# ---------------------------------------------------------------------------------------------------------------
# Launches, derivatives, registration
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_launches(method, device, monkeypatch):
    """Two for small maps, whatever is asked for; three if a plane does not fit a program and channels are weighed."""
    launched = []
    for name in ("cam_partial_maps", "cam_channels", "cam_finish"):
        kernel = getattr(cam_ops._cam_kernels, name)

        class Counted:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                launched.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(cam_ops._cam_kernels, name, Counted(kernel, name))
    a, g = planes(1, 3, 5, 5, dtype=torch.float32, device=device)
    dlu_triton.class_activation_parts(a, g, method, size=(9, 9), normalize=True)
    assert launched == ["cam_partial_maps", "cam_finish"]
    launched.clear()
    a, g = planes(1, 1, 65, 64, dtype=torch.float32, device=device)
    dlu_triton.class_activation_map(a, g, method, size=(9, 9), normalize=True)
    assert launched == ["cam_channels"] * (method in WEIGHING) + ["cam_partial_maps", "cam_finish"]


def test_nothing_is_copied_or_zeroed(device):
    """No contiguous copy of an input, no zero-filled temporary."""
    names = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.name().removeprefix("aten::").split(".")[0])
            return function(*args, **(kwargs or {}))

    a, g = planes(2, 8, 4, 4, dtype=torch.float32, device=device)
    for activations, gradients in ((channels_last(a), g), (sliced(a), tokens(g))):
        with Recorder():
            cam_ops.class_activation_map_op.launch(
                activations, gradients.unsqueeze(1), "xgradcam", 1e-6, True, (9, 9), True, True
            )
    assert "empty" in names
    assert names.isdisjoint({"clone", "_to_copy", "zeros", "zero_"})  # the interpreter's own copies are copy_


@pytest.mark.parametrize("method", METHODS)
def test_derivatives(method, device):
    """Of first and second order, away from the kinks of ReLU."""
    a, g = planes(1, 2, 2, 3, device=device)
    a, g = (a + 0.5).requires_grad_(), (g.abs() + 0.3).requires_grad_()

    def call(a, g):
        return dlu_triton.class_activation_map(a, g, method, relu=False, size=(3, 4))

    assert torch.autograd.gradcheck(call, (a, g), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (a, g), fast_mode=True)
    weights = torch.rand(1, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(dlu_triton.weighted_activation_map, (a, weights), fast_mode=True)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_wanted_derivatives(wanted, device):
    a, g = (tensor.requires_grad_(want) for tensor, want in zip(planes(1, 2, 3, 3, device=device), wanted, strict=True))
    dlu_triton.xgrad_cam(a, g).backward(torch.ones(1, 3, 3, dtype=torch.float64, device=device))
    assert (a.grad is not None, g.grad is not None) == wanted


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_derivatives_of_all_parts(wanted, method, device):
    """Some parts depend on one of the two inputs alone."""
    found = []
    for library in (dlu_triton, reference):
        tensors = [t.requires_grad_(want) for t, want in zip(planes(1, 2, 3, 3, device=device), wanted, strict=True)]
        parts = library.class_activation_parts(*tensors, method)
        differentiable = [(n, part) for n, part in enumerate(parts) if part is not None and part.requires_grad]
        sum((part * (n + 1)).sum() for n, part in differentiable).backward()
        found.append([tensor.grad for tensor in tensors])
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("method", ("xgradcam", "hirescam"))
@pytest.mark.parametrize("size", (None, [5, 6]))
def test_opcheck(method, size, device):
    a, g = planes(1, 3, 3, 4, dtype=torch.float32, device=device)
    for needs_grad in (False, True):
        tensors = (a.clone().requires_grad_(needs_grad), g.unsqueeze(1).clone().requires_grad_(needs_grad))
        torch.library.opcheck(cam_ops.class_activation_map_op.op, (*tensors, method, 1e-6, True, size, True, True))
    weights = g[:, None, :, 0, 0].clone()
    torch.library.opcheck(cam_ops.weighted_activation_map_op.op, (a, weights, False, size, False))


def test_cuda_graph(device):
    if device.type == "cpu":
        pytest.skip("needs a GPU")
    a, g = planes(1, 64, 7, 7, dtype=torch.float16, device=device)
    expected = dlu_triton.xgrad_cam(a, g, size=(224, 224), normalize=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cam = dlu_triton.xgrad_cam(a, g, size=(224, 224), normalize=True)
    graph.replay()
    assert torch.equal(cam, expected)


def test_no_host_synchronisation(device):
    if device.type == "cpu":
        pytest.skip("needs a GPU")
    a, g = planes(2, 64, 7, 7, dtype=torch.float16, device=device)
    dlu_triton.xgrad_cam(a, g, size=(224, 224), normalize=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dlu_triton.class_activation_parts(a, g, size=(224, 224), normalize=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
