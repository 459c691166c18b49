"""Sizes: from empty batches and single pixels to beyond 2^31 elements, programs and bytes.

Nothing that is huge is computed as a whole on a CPU. Memory is committed where it is touched, and of a launch of
millions of programs the first, the middle and the last run; or the strides alone are huge.
"""

import gc
import itertools
import math
import mmap
import re
import time
import weakref
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from conftest import EMULATED, INTERPRETED, ON_CPU
from selection import long, long_emulated
from test_deterministic import deterministic
from test_operators import assert_within_bounds
from triton.runtime import interpreter

import dlu_triton
from dlu_triton import _checks, _launch, _verify, reference
from dlu_triton._verify import Case
from dlu_triton.ops import cam as cam_ops
from dlu_triton.ops import carafe as carafe_ops
from dlu_triton.ops import dlu as dlu_ops

on_a_cpu = pytest.mark.skipif(not ON_CPU, reason="memory of a GPU is committed as a whole")
FAR = 2**31 - 16  # fits 32 bits, as arguments of kernels may, and three of them pass 2^32


def lazy(elements, dtype):
    """Zeros in memory that is committed page by page, where it is written."""
    size = elements * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no {size} bytes of address space: {error}")
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def far_apart(x, axis, stride=FAR, before=0):
    """The values of x, whose neighbours along an axis are so many elements apart, with zeros `before` them."""
    strides = list(x.stride())
    strides[axis] = stride
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True))
    return lazy(before + extent, x.dtype).as_strided(x.shape, strides, before).copy_(x)


def assert_same(found, expected, **tolerance):
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=lambda t, name=name: f"{name}: {t}")


# ---------------------------------------------------------------------------------------------------------------
# Offsets beyond 32 bits: by strides
# ---------------------------------------------------------------------------------------------------------------

AXES = pytest.mark.parametrize("axis", range(4), ids=("image", "channel", "row", "column"))
PASSES = [(operator, False) for operator in _verify.OPERATORS] + [("dlu_upsample", True), ("expand_kernels", True)]


@triton.jit
def multiply(products_ptr, factor, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(products_ptr + index, (index * factor).to(tl.int64))
    tl.store(products_ptr + BLOCK + index, index.to(tl.int64) * factor)


def test_products_of_32_bits_wrap(device):
    """Also in the interpreter, which so shows what is too narrow."""
    products = torch.zeros(8, dtype=torch.int64, device=device)
    multiply[(1,)](products, 2**30, BLOCK=4)
    assert products.tolist() == [0, 2**30, -(2**31), -(2**30), 0, 2**30, 2**31, 3 * 2**30]


def check_far_apart(operator, axis, channels_last, is_deterministic, monkeypatch):
    """All arguments and gradients lie so; outputs have no gaps."""
    sizes = {"batch": 3} if axis == 0 else {"channels": 6, "groups": 2}
    case = Case("", **{"channels": 3, **sizes}, height=3, width=4, kernel_size=3, channels_last=channels_last)
    arguments = _verify.inputs(operator, case, torch.float32, "cpu")
    expected = _verify.results(_verify.function(operator, case, eager=True), arguments)
    far = {name: far_apart(value, axis) for name, value in arguments.items()}
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: far_apart(empty_like(x), axis))
    with deterministic(is_deterministic):
        found = _verify.results(_verify.function(operator, case, eager=False), far)
    assert_same(found, expected, rtol=1e-5, atol=1e-5)
    assert all(found[name].stride(axis) == FAR for name in arguments if name != "grad_output")


@on_a_cpu
@AXES
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_neighbours_that_are_far_apart(operator, axis, monkeypatch):
    check_far_apart(operator, axis, False, False, monkeypatch)


@pytest.mark.long
@on_a_cpu
@AXES
@pytest.mark.parametrize(
    ("operator", "is_deterministic", "channels_last"),
    [(*each, True) for each in PASSES] + [(*each, False) for each in PASSES if each[1]],
)
def test_neighbours_that_are_far_apart_in_every_way(operator, is_deterministic, channels_last, axis, monkeypatch):
    check_far_apart(operator, axis, channels_last, is_deterministic, monkeypatch)


# Of two outputs along an axis, which pieces of eight rows or 32 columns reach from before the first.
PIECES = pytest.mark.parametrize(
    ("axis", "height", "width", "channels_last", "dtype"),
    [(2, 1, 3, True, torch.bfloat16), (3, 3, 1, False, torch.float32)],
    ids=("row", "column"),
)


@on_a_cpu
@PIECES
@pytest.mark.parametrize("operator", ("dlu_upsample", "carafe", "carafe_upsample"))
def test_pieces_that_begin_before_a_map(operator, axis, height, width, channels_last, dtype):
    """The gradient of the features takes outputs from before the first one on: several of two neighbours, although
    their image fits 32 bits."""
    case = Case("", channels=2, height=height, width=width, channels_last=channels_last)
    stride = _launch.MOST_32_BIT_OFFSETS - 64
    arguments = _verify.inputs(operator, case, dtype, "cpu")
    expected = _verify.results(_verify.function(operator, case, eager=True), arguments)
    arguments["grad_output"] = far_apart(arguments["grad_output"], axis, stride, before=2**36)
    assert _launch.index_dtype(arguments["grad_output"]) == tl.int32
    found = _verify.results(_verify.function(operator, case, eager=False), arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_offsets_of_64_bits(operator, channels_last, device, monkeypatch):
    """What huge images take, forced on a small one."""
    monkeypatch.setattr(_launch, "MOST_32_BIT_OFFSETS", 0)
    _launch.forget_launches()
    case = Case("", batch=2, channels=24, height=3, width=8, groups=2, channels_last=channels_last)
    assert_within_bounds(operator, case, torch.float32, device)
    _launch.forget_launches()


def test_which_images_take_64_bits():
    """Only those whose own elements are as far apart, however large the batch or the storage behind a view."""
    whole = torch.empty(3, 2**10, 2**10, 2**11, dtype=torch.bool, device="meta")
    for tensor, wide in (
        (whole, True),
        (whole[:, :512], False),
        (whole[:, ::2], True),
        (whole[:, :, :, :512], True),
        (whole[:1, :1], False),
        (torch.empty(2**12, 2**10, 2**10, 1, dtype=torch.bool, device="meta"), False),
    ):
        assert (_launch.index_dtype(None, tensor) == tl.int64) == wide, tensor.shape


CAM_AXES = pytest.mark.parametrize("axis", (0, -3, -2, -1), ids=("image", "channel", "row", "column"))


@on_a_cpu
@CAM_AXES
@pytest.mark.parametrize("method", _checks.CAM_METHODS)
@pytest.mark.parametrize(
    ("height", "width"), [(3, 4), pytest.param(33, 65, marks=pytest.mark.long)], ids=("small", "large")
)
def test_planes_that_are_far_apart(method, height, width, axis):
    """Of one program each, or of several; activations, and gradients of some classes."""
    n = 3 if axis == 0 else 1
    activations = torch.randn(n, 3, height, width, dtype=torch.float64).relu()
    gradients = torch.randn(n, 2, 3, height, width, dtype=torch.float64)
    assert _launch.plane_tile(activations, gradients).whole == (height == 3)
    expected = reference.class_activation_parts(activations, gradients, method, size=(5, 5))
    far = far_apart(activations, axis), far_apart(gradients, axis)
    found = dlu_triton.class_activation_parts(*far, method, size=(5, 5))
    assert_same(found._asdict(), expected._asdict())


@on_a_cpu
@pytest.mark.parametrize("axis", range(3), ids=("image", "class", "channel"))
def test_weights_that_are_far_apart(axis):
    activations, weights = torch.randn(3, 3, 3, 4), torch.randn(3, 3, 3)
    expected = reference.weighted_activation_map(activations, weights)
    found = dlu_triton.weighted_activation_map(far_apart(activations, 0), far_apart(weights, axis))
    torch.testing.assert_close(found, expected)


@on_a_cpu
@pytest.mark.parametrize("method", ("xgradcam", "layercam"))
def test_classes_that_are_far_apart(method):
    activations, gradients = torch.rand(1, 3, 3, 4), torch.randn(1, 3, 3, 3, 4)  # whose sums do not cancel
    expected = reference.class_activation_parts(activations, gradients, method)
    found = dlu_triton.class_activation_parts(activations, far_apart(gradients, 1), method)
    assert_same(found._asdict(), expected._asdict())


# ---------------------------------------------------------------------------------------------------------------
# Beyond 2^31 elements: by sizes, of which parts are computed
# ---------------------------------------------------------------------------------------------------------------


class Parts:
    """Which programs of a launch run: a few before and after each of some places, from 0 to 1, of all programs."""

    def __init__(self):
        self.places, self.launched = [Fraction(0), Fraction(1, 2), Fraction(1)], []

    def choose(self, name, programs):
        self.launched.append((name, programs))
        around = (int(place * programs) + shift for place in self.places for shift in range(-FEW, FEW))
        return sorted({number for number in around if 0 <= number < programs})

    def interpret(self, monkeypatch):
        builder, call, chosen = interpreter.interpreter_builder, interpreter.GridExecutor.__call__, []
        start, number = builder.set_grid_dim, builder.set_grid_idx

        def run(executor, *arguments, **constants):
            (programs,) = executor.grid
            chosen[:] = self.choose(executor.fn.__name__, programs)
            executor.grid = (len(chosen),)
            return call(executor, *arguments, **constants)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
        monkeypatch.setattr(builder, "set_grid_dim", lambda x, *others: start(self.launched[-1][1], *others))
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, *others: number(chosen[x], *others))


FEW = 3  # programs


@pytest.fixture
def parts(monkeypatch):
    """Only these run of launches from here on, on memory committed where it is written."""
    chosen = Parts()
    if EMULATED:
        import emulator

        monkeypatch.setattr(emulator.state.options, "choose", chosen.choose)
    else:
        chosen.interpret(monkeypatch)
    # One step a program: a long strip takes minutes.
    monkeypatch.setattr(_launch, "strip_steps", lambda columns, steps: 1)

    def empty(*shape, dtype=torch.float32, device=None, memory_format=torch.contiguous_format):
        assert memory_format == torch.contiguous_format
        shape = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        return lazy(max(math.prod(shape), 1), dtype)[: math.prod(shape)].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype))
    return chosen


# Along each axis: type and sizes of the case, and how many of these hold anything but zeros: at the beginning, in the
# middle and at the end. Past 2^24 columns, float64 has coordinates with fractions.
HUGE = {
    "image": (torch.float32, 0, 1, Case("", batch=2**26, channels=2, height=3, width=3, kernel_size=3)),
    "group": (torch.float32, 1, 1, Case("", channels=5 * 10**7, groups=5 * 10**7, height=2, width=3, kernel_size=3)),
    "row": (torch.float32, 2, 2, Case("", channels=24, height=2**23 - 64, width=3, kernel_size=9)),
    "column": (torch.float64, 3, 2, Case("", channels=24, height=1, width=2**26 - 64, kernel_size=9)),
}
SIZES = ("batch", "groups", "height", "width")
MARGIN = 8  # rows or columns beside these, which are zero; as far as kernels and offsets reach


def small_case(axis, count, case):
    few = 1 if axis < 2 else count + 2 * MARGIN
    return replace(case, **{SIZES[axis]: few, **({"channels": few} if axis == 1 else {})})


def arguments_of_part(operator, dtype, axis, count, small, part):
    """Of the small case; beyond the first, middle or last `count`, they are zero."""
    few = getattr(small, SIZES[axis])
    arguments = _verify.inputs(operator, replace(small, seed=part), dtype, "cpu")
    if "offsets" in arguments:  # coordinates are exact
        arguments["offsets"] = ((arguments["offsets"] * 2).round() / 2).clamp(-1.5, 1.5)
    for value in arguments.values():
        of_each = value.unflatten(axis, (few, value.shape[axis] // few))
        kept = of_each.narrow(axis, (few - count) * part // 2, count).clone()
        of_each.zero_().narrow(axis, (few - count) * part // 2, count).copy_(kept)
    return arguments


def check_huge(operator, name, is_deterministic, parts, monkeypatch):
    dtype, axis, count, case = HUGE[name]
    small, size = small_case(axis, count, case), getattr(case, SIZES[axis])
    few = getattr(small, SIZES[axis])
    of_parts = [arguments_of_part(operator, dtype, axis, count, small, part) for part in range(3)]
    arguments = {}
    for argument, value in of_parts[0].items():
        shape, each = list(value.shape), value.shape[axis] // few
        shape[axis] = each * size
        arguments[argument] = lazy(math.prod(shape), value.dtype).view(shape)
        for part in range(3):
            here = arguments[argument].narrow(axis, (size - few) * part // 2 * each, value.shape[axis])
            here.copy_(of_parts[part][argument])

    def largest(grad_masks, groups):
        """A bound, of what only these parts hold."""
        bounds = lazy(grad_masks.shape[0] * groups, dtype).view(-1, groups)
        for image, group in ((0, 0), ((len(bounds) - 1) // 2, (groups - 1) // 2), (-1, -1)):
            bounds[image, group] = 1e3
        return bounds

    monkeypatch.setattr(dlu_ops, "_largest", largest)
    with deterministic(is_deterministic):
        found = _verify.results(_verify.function(operator, case, eager=False), arguments)
    assert max(value.numel() for value in found.values()) > 2**31
    for part, given in enumerate(of_parts):
        exact = {argument: value.double() for argument, value in given.items()}
        expected = _verify.results(_verify.function(operator, small, eager=True), exact)
        for result, value in expected.items():
            each = value.shape[axis] // few
            start = (few - count) * part // 2
            value = value.narrow(axis, start * each, count * each)
            here = found[result].narrow(axis, ((size - few) * part // 2 + start) * each, count * each)
            assert value.any()
            torch.testing.assert_close(
                here.double(),
                value,
                rtol=1e-4,
                atol=1e-4,
                msg=lambda text, result=result, part=part: f"{result} {part}: {text}",
            )
    assert max(programs for _, programs in parts.launched) > 2**20


ALL_HUGE = [(operator, name) for name in HUGE for operator in _verify.OPERATORS]
QUICK_HUGE = [("dlu_upsample", "row"), ("carafe_upsample", "image")]


@on_a_cpu
@pytest.mark.parametrize(
    ("operator", "name"), (*QUICK_HUGE, *long_emulated(*(each for each in ALL_HUGE if each not in QUICK_HUGE)))
)
def test_parts_of_huge_maps(operator, name, parts, monkeypatch):
    check_huge(operator, name, False, parts, monkeypatch)


@pytest.mark.long
@on_a_cpu
@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("operator", ("dlu_upsample", "expand_kernels"))
def test_parts_of_huge_maps_where_sums_are_integers(operator, name, parts, monkeypatch):
    check_huge(operator, name, True, parts, monkeypatch)


@on_a_cpu
@pytest.mark.parametrize("axis", (0, 1), ids=("image", "class"))
@pytest.mark.parametrize("method", ("layercam", *long_emulated("gradcam++")))
def test_parts_of_many_planes(method, axis, parts):
    """Maps, raw maps and contributions, of more than 2^31 elements each."""
    count, c, few = 2**27, 20, 3
    maps = (count, 1) if axis == 0 else (1, count)
    huge = lazy(count * c * 25, torch.float32).view(*maps, c, 5, 5)
    many = lazy(maps[0] * c * 25, torch.float32).view(maps[0], c, 5, 5)
    starts = 0, (count - few) // 2, count - few
    expected = []
    activations = torch.randn(3 * few if axis == 0 else 1, c, 5, 5).relu()
    gradients = torch.randn(3 * few, c, 5, 5)
    for part, start in enumerate(starts):
        here = slice(part * few, (part + 1) * few)
        a, g = activations[here] if axis == 0 else activations, gradients[here].unsqueeze(1 - axis)
        huge.narrow(axis, start, few).copy_(g)
        many.narrow(0, start if axis == 0 else 0, len(a)).copy_(a)
        expected.append(reference.class_activation_parts(a.double(), g.double(), method, size=(7, 6), normalize=True))
    found = dlu_triton.class_activation_parts(many, huge, method, size=(7, 6), normalize=True)
    for name in ("map", "raw", "contributions"):
        whole = getattr(found, name)
        assert whole.numel() > 2**31
        for start, part in zip(starts, expected, strict=True):
            here = whole.narrow(axis, start, few).double()
            torch.testing.assert_close(here, getattr(part, name), rtol=1e-4, atol=1e-5)
    assert {name for name, programs in parts.launched} == {"cam_partial_maps", "cam_finish"}


LARGEST = (4096, 524287)  # as many pixels as a map may have
assert math.prod(LARGEST) == _checks.MAX_MAP_PIXELS


@pytest.fixture
def short_programs(monkeypatch):
    """That finish one block of outputs each: thousands of blocks take minutes."""
    monkeypatch.setattr(_launch, "ENOUGH_PROGRAMS", 2**31)


@on_a_cpu
def test_parts_of_the_largest_plane(parts, short_programs):
    activations, gradients = (lazy(2 * math.prod(LARGEST), torch.float16).view(1, 2, *LARGEST) for _ in range(2))
    pixels = FEW * _launch.FINISHING_BLOCKS["BLOCK_O"]
    places = [(0, slice(0, pixels)), (LARGEST[0] // 2, slice(0, pixels)), (-1, slice(-pixels, None))]
    for planes in (activations, gradients):
        for row, columns in places:
            planes[:, :, row, columns] = torch.randn(1, 2, pixels)
    found = dlu_triton.class_activation_map(activations, gradients, "hirescam", relu=False)
    for row, columns in places:
        expected = (activations[:, :, row, columns].double() * gradients[:, :, row, columns].double()).sum(1)
        torch.testing.assert_close(found[:, row, columns], expected.float())


def resized(plane, size, y, x):
    """Pixel (y, x) of a resized plane, in float64."""
    for axis, place in ((0, y), (1, x)):
        length = plane.shape[0]
        position = min(max((place + 0.5) * length / size[axis] - 0.5, 0), length - 1)
        low = min(int(position), max(length - 2, 0))
        plane = torch.lerp(plane[low], plane[min(low + 1, length - 1)], position - low)
    return plane


@on_a_cpu
@pytest.mark.parametrize(
    "size", [LARGEST, *long_emulated(((1, _checks.MAX_MAP_PIXELS),), ((_checks.MAX_MAP_PIXELS, 1),))], ids=str
)
@pytest.mark.filterwarnings("error:invalid value encountered in cast")
def test_parts_of_the_largest_map(size, parts, short_programs):
    activations = torch.tensor([[[[3.0, 1.0], [2.0, 7.0]]]])
    if 1 in size:
        activations = activations.flatten(2).unsqueeze(2 if size[0] == 1 else 3)
    h, w = size
    pixels = [(0, 0), (0, w - 1), (h // 2, w // 2), (h - 1, 0), (h - 1, w - 1)]
    parts.places = [Fraction(y * w + x, h * w) for y, x in pixels]
    found = dlu_triton.weighted_activation_map(activations, torch.ones(1, 1), size=size, normalize=True)
    assert found.numel() == _checks.MAX_MAP_PIXELS
    plane = (activations[0, 0].double() - 1) / 6
    for y, x in pixels:
        torch.testing.assert_close(found[0, y, x], resized(plane, size, y, x).float())


# ---------------------------------------------------------------------------------------------------------------
# What is launched on huge tensors: types of offsets, grids, and what is refused
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """Name, grid and arguments of launches, of which none runs."""
    launches = []

    class Launched:
        """What Triton returns, and is launched again."""

        def __getitem__(self, grid):
            return lambda *arguments: None

    def record(self, *arguments, grid=None, warmup=None, **constants):
        function = self.fn if INTERPRETED else self
        names = dict(zip(self.arg_names, arguments, strict=False))
        launches.append((function.__name__, self.grid if INTERPRETED else grid, names | constants))
        return Launched()

    launcher, method = (interpreter.GridExecutor, "__call__") if INTERPRETED else (triton.JITFunction, "run")
    monkeypatch.setattr(launcher, method, record)
    monkeypatch.setattr(_launch, "_repeats", {})
    return launches


def meta_arguments(operator, case, dtype=torch.bfloat16):
    """As `_verify.inputs` has them, on the meta device."""
    n, c, h, w, s, g = (getattr(case, name) for name in ("batch", "channels", *SIZES[2:], "scale_factor", "groups"))
    taps = g * case.kernel_size**2
    shapes = {
        "features": (n, c, h, w), "kernel_space": (n, taps, h, w), "offsets": (n, 2 * g * s * s, h, w),
        "masks": (n, taps, s * h, s * w), "logits": (n, taps * s * s, h, w),
    }  # fmt: skip
    names = {
        "dlu_upsample": ("features", "kernel_space", "offsets"), "expand_kernels": ("kernel_space", "offsets"),
        "carafe": ("features", "masks"), "carafe_upsample": ("features", "logits"),
    }[operator]  # fmt: skip
    arguments = {name: torch.empty(shapes[name], dtype=dtype, device="meta") for name in names}
    channels = taps if operator == "expand_kernels" else c
    grad_output = torch.empty(n, channels, s * h, s * w, dtype=dtype, device="meta")
    return {"grad_output": grad_output, **arguments}


def launch_both(operator, case, arguments):
    """Forward and backward pass, and the latter with integer sums."""
    grad_output, *tensors = arguments.values()
    s, k, g = case.scale_factor, case.kernel_size, case.groups
    sizes = (k, g, s, case.output_size) if operator == "carafe" else (s, k, g, case.output_size)
    ops = carafe_ops if operator.startswith("carafe") else dlu_ops
    op = getattr(ops, f"{operator}_op")
    op.launch(*tensors, *sizes)
    for wanted in (False, True):
        with deterministic(wanted):
            op.gradients.launch(grad_output, *tensors, *sizes, *(True for _ in tensors))


MANY = 70_000  # more than the 65535 that the second and third dimension of a grid may have
LONG = (
    Case("images", batch=MANY, channels=1, height=1, width=1),
    Case("channels", channels=MANY, height=1, width=1),
    Case("groups", channels=MANY, groups=MANY, height=1, width=1),
    Case("rows", channels=1, height=MANY, width=1),
    Case("columns", channels=1, height=1, width=MANY),
    Case("most programs", batch=_checks.MAX_PROGRAMS, channels=1, height=1, width=1, scale_factor=1, kernel_size=1),
    Case("most rows", channels=1, height=_checks.MAX_SIZE // 16, width=1, scale_factor=16, kernel_size=1),
    Case("most columns", channels=1, height=1, width=_checks.MAX_SIZE, scale_factor=1, kernel_size=1),
    Case("most channels", channels=_checks.MAX_SIZE, height=1, width=1, kernel_size=1),
)


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_grids_have_one_dimension(operator, case, recorded):
    launch_both(operator, case, meta_arguments(operator, case))
    assert recorded
    for name, grid, _ in recorded:
        assert len(grid) == 1, name
        assert 0 < grid[0] <= _checks.MAX_PROGRAMS, name


@pytest.mark.parametrize("shape", [(MANY, 1, 2, 3, 3), (1, MANY, 2, 3, 3), (1, 1, MANY, 1, 1), (1, 1, 2, MANY, 1)])
@pytest.mark.parametrize("method", _checks.CAM_METHODS)
def test_grids_of_maps_have_one_dimension(method, shape, recorded):
    gradients = torch.empty(shape, device="meta")
    arguments = gradients[:, 0], gradients, method, 1e-6, True, (300, 300), True, True
    cam_ops.class_activation_map_op.launch(*arguments)
    cam_ops.weighted_activation_map_op.launch(gradients[:, 0], gradients[..., 0, 0], True, None, False)
    assert all(len(grid) == 1 and 0 < grid[0] <= _checks.MAX_PROGRAMS for _, grid, _ in recorded)


@pytest.mark.parametrize(
    ("case", "wide"),
    [
        (Case("a huge image", channels=64, height=2**13, width=2**13), True),
        (Case("many images", batch=2**20, channels=64, height=16, width=16), False),
    ],
    ids=("a huge image", "many images"),
)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_offsets_are_as_wide_as_an_image(operator, case, wide, recorded):
    launch_both(operator, case, meta_arguments(operator, case))
    assert {arguments["INDEX"] for _, _, arguments in recorded} == {tl.int64 if wide else tl.int32}


@pytest.mark.parametrize("axis", (1, 2, 3), ids=("channel", "row", "column"))
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_offsets_are_as_wide_as_each_argument(operator, axis, recorded):
    """Every launch that takes the one tensor with huge strides."""
    case = Case("", channels=8, height=4, width=6)
    arguments = meta_arguments(operator, case)
    for name, tensor in arguments.items():
        strides = list(tensor.stride())
        strides[axis] = FAR
        far = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")
        recorded.clear()
        launch_both(operator, case, {**arguments, name: far})
        found = [arguments for _, _, arguments in recorded if any(each is far for each in arguments.values())]
        assert found, name
        assert all(arguments["INDEX"] == tl.int64 for arguments in found), name


@PIECES
def test_pieces_that_begin_before_a_map_take_64_bits(axis, height, width, channels_last, dtype, recorded):
    """Whose offsets count from their own beginning, whatever the map is."""
    case = Case("", channels=8, height=height, width=width)
    arguments = meta_arguments("carafe", case, dtype)
    grad_output = arguments["grad_output"]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    strides = list(grad_output.contiguous(memory_format=layout).stride())
    strides[axis] = 2**30
    arguments["grad_output"] = torch.empty_strided(grad_output.shape, strides, dtype=dtype, device="meta")
    assert _launch.index_dtype(arguments["grad_output"]) == tl.int32
    launch_both("carafe", case, arguments)
    found = {name: arguments["INDEX"] for name, _, arguments in recorded}
    assert found == {
        "reassemble_forward": tl.int32, "reassemble_backward_kernels": tl.int32,
        "reassemble_backward_features": tl.int64,
    }  # fmt: skip


TOO_MUCH = [
    (Case("", batch=2**31, channels=1, height=1, width=1), "a batch must take at most 2147483647 programs of a kernel"),
    (Case("", channels=1, height=2**27, width=1, scale_factor=16), "got shape (1, 1, 2147483648, 16)"),
    (Case("", channels=1, height=1, width=2**30 - 2**11 + 1, scale_factor=2), "got shape (1, 1, 2, 2147479554)"),
    (Case("", channels=2**31 - 2**12 + 1, height=1, width=1), "got shape (1, 2147479553, "),
]


@pytest.mark.parametrize(("case", "message"), TOO_MUCH)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_what_is_too_much_is_refused(operator, case, message, recorded):
    case = replace(case, kernel_size=1)
    if operator == "expand_kernels" and case.channels > 1:
        case, message = replace(case, groups=case.channels), "channels, rows and columns"
    arguments = meta_arguments(operator, case)
    with pytest.raises(ValueError, match=re.escape(message)):
        launch_both(operator, case, arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2**16, 2**15, 1, 1, 1), "a batch must take at most 2147483647 programs of a kernel, as parts of it may, got"),
        ((1, 2**31, 1, 1, 1), "a batch must take at most 2147483647 programs of a kernel, as parts of it may, got"),
        ((1, 1, 2**31, 1, 1), "maps must have at most 2147479552 channels, rows and columns, upsampled ones too, got"),
    ],
)
def test_maps_that_are_too_many_are_refused(shape, message, recorded):
    gradients = torch.empty(shape, device="meta")
    with pytest.raises(ValueError, match=re.escape(message)):
        cam_ops.class_activation_map_op.launch(gradients[:, 0], gradients, "layercam", 1e-6, True, None, False, False)
    with pytest.raises(ValueError, match=re.escape(message)):
        cam_ops.weighted_activation_map_op.launch(gradients[:, 0], gradients[..., 0, 0], True, None, False)


def test_strips_of_tall_maps_are_found_soon():
    """As by trying every number of strips, which takes minutes for millions of rows."""

    def by_trying(columns, steps):
        def cost(strips):
            return _launch.cdiv(columns * strips, _launch.PROGRAMS_AT_A_TIME) * (_launch.cdiv(steps, strips) + 1)

        return _launch.cdiv(steps, min(range(1, steps + 1), key=cost))

    strip_steps = _launch.strip_steps.__wrapped__
    for columns in (*range(1, 40, 3), 131, 132, 133, 500):
        for steps in (*range(1, 30), 97, 240, 257):
            assert strip_steps(columns, steps) == by_trying(columns, steps), (columns, steps)
    start = time.perf_counter()
    strip_steps(1, 2**29)
    assert time.perf_counter() - start < 5


# ---------------------------------------------------------------------------------------------------------------
# Beyond 2^31 elements, all of them
# ---------------------------------------------------------------------------------------------------------------

CROP = 12  # source pixels on a side


def random_arguments(operator, case, dtype, device):
    """As `_verify.inputs` has them, made on the device, but for offsets, which have to lead to the same place of a crop
    as of the whole, where coordinates in float32 are half a pixel apart."""
    generator = torch.Generator(device).manual_seed(0)
    arguments = {}
    for name, value in meta_arguments(operator, case).items():
        arguments[name] = torch.empty(value.shape, dtype=dtype, device=device).uniform_(-0.9, 0.9, generator=generator)
    if "offsets" in arguments:
        arguments["offsets"].mul_(2).round_().div_(2)
    arguments["grad_output"] = arguments.pop("grad_output")  # the last one
    return arguments


def crop_of(value, case, rows, columns):
    """Of the last image, what belongs to these source pixels."""
    s = value.shape[2] // case.height
    return value[-1:, :, s * rows.start : s * rows.stop, s * columns.start : s * columns.stop]


def check_crops(operator, case, dtype, device):
    """Output and gradients of the whole, beside eager PyTorch's of its first, last and middle pixels."""
    arguments = random_arguments(operator, case, dtype, device)
    found = _verify.results(_verify.function(operator, case, eager=False), arguments)
    twin = _verify.function(operator, case, eager=True)
    margin = case.kernel_size // 2 + 2  # so far a crop sees, with offsets of less than a pixel
    for top, left in [(0, 0), (-1, -1), (0, -1), (case.height // 2, case.width // 2)]:
        rows, columns, inner = [], [], []
        for start, size, parts in ((top, case.height, rows), (left, case.width, columns)):
            start = size - CROP if start < 0 else start
            parts.append(slice(start, start + CROP))
            inner.append(slice(margin if start else 0, CROP - (margin if start + CROP < size else 0)))
        crops = {name: crop_of(value, case, *rows, *columns) for name, value in arguments.items()}
        truth = _verify.results(twin, {name: value.double() for name, value in crops.items()})
        eager = _verify.results(twin, crops)
        kernel = {name: crop_of(value, case, *rows, *columns) for name, value in found.items()}
        whole = replace(case, height=CROP, width=CROP)
        parts = (
            {name: crop_of(value, whole, *inner) for name, value in each.items()} for each in (truth, eager, kernel)
        )
        for name, comparison in _verify.comparisons(*parts).items():
            assert comparison.passed, f"{name} at {top}, {left}: {comparison}"


def needs_memory(device, gigabytes):
    if device.type == "cpu" or torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs a GPU with {gigabytes} GB of free memory")


@pytest.fixture
def freed():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("operator", ("expand_kernels", *long("dlu_upsample", "carafe", "carafe_upsample")))
def test_crops(operator, device):
    """On a small map, to see that what the next test does is right, and that it can fail."""
    case = Case("", batch=2, channels=4, height=13, width=14, kernel_size=3)
    check_crops(operator, case, torch.bfloat16, device)
    with pytest.raises(AssertionError, match="output at -1, -1"):
        check_crops_of_wrong_results(operator, case, device)


def check_crops_of_wrong_results(operator, case, device):
    """The last pixel is lost."""
    results = _verify.results

    def wrong(call, arguments):
        found = results(call, arguments)
        if arguments["grad_output"].shape[2] == case.scale_factor * case.height:
            found["output"][-1, -1, -1, -1] = 0
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_verify, "results", wrong)
        check_crops(operator, case, torch.float64, device)


@pytest.mark.large
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("an image", channels=144, height=2**12, width=2**12, kernel_size=7),  # features, masks, output
        Case("images", batch=600, channels=64, height=256, width=256, kernel_size=7),
        Case("a column", channels=16, height=2**23, width=17, kernel_size=3),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_more_than_32_bits(operator, case, dtype, device, freed):
    needs_memory(device, 80)
    check_crops(operator, case, dtype, device)


@pytest.mark.large
@pytest.mark.parametrize("method", _checks.CAM_METHODS)
def test_maps_of_more_than_32_bits(method, device, freed):
    """Three images, of which the last one's map is held against that of a loop over its channels."""
    needs_memory(device, 40)
    shape = 3, 64, 2**12, 2**12
    generator = torch.Generator(device).manual_seed(0)
    activations, gradients = (
        torch.empty(shape, dtype=torch.float16, device=device).normal_(generator=generator) for _ in range(2)
    )
    found = dlu_triton.class_activation_parts(activations.relu_(), gradients, method, relu=False)
    expected = torch.zeros(shape[2:], dtype=torch.float64, device=device)
    for a, g in zip(activations[-1], gradients[-1], strict=True):  # every method is a sum over the channels
        one = reference.class_activation_parts(a[None, None].double(), g[None, None].double(), method, relu=False)
        expected += one.raw[0, 0]
    torch.testing.assert_close(found.raw[-1, 0].double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# ---------------------------------------------------------------------------------------------------------------
# Out of memory
# ---------------------------------------------------------------------------------------------------------------


class Failure:
    """Lets so many steps succeed, and the next one fail."""

    def __init__(self, error):
        self.error, self.left, self.made = error, math.inf, []

    def step(self):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def allocates(self, make):
        def allocate(*args, **kwargs):
            self.step()
            tensor = make(*args, **kwargs)
            self.made.append(weakref.ref(tensor))
            return tensor

        return allocate

    def launches(self, launch):
        def run(*args, **kwargs):
            self.step()
            return launch(*args, **kwargs)

        return run


@pytest.mark.parametrize("cause", ("memory", "launch"))
@pytest.mark.parametrize(
    "operator", ("dlu_upsample", _verify.CAM, *long("expand_kernels", "carafe", "carafe_upsample"))
)
def test_calls_that_fail_leave_nothing(operator, cause, device, monkeypatch):
    """Whichever allocation or launch fails, forward or backward: the error is what it was, no tensor stays, and the
    same call succeeds afterwards."""
    if operator == _verify.CAM:
        case = _verify.CAMCase("", "xgradcam", channels=3, height=33, width=65, size=(5, 6))
    else:
        case = Case("", channels=4, height=2, width=3, kernel_size=3, groups=2)
    arguments = _verify.inputs(operator, case, torch.float32, device)
    call = _verify.function(operator, case, eager=False)
    with deterministic():
        expected = _verify.results(call, arguments)
        failure = Failure(torch.OutOfMemoryError("no memory") if cause == "memory" else RuntimeError("no launch"))
        if cause == "memory":
            for name in ("empty", "empty_like"):
                monkeypatch.setattr(torch, name, failure.allocates(getattr(torch, name)))
        else:
            launcher, method = (interpreter.GridExecutor, "__call__") if INTERPRETED else (triton.JITFunction, "run")
            launch = failure.launches(getattr(launcher, method))
            monkeypatch.setattr(launcher, method, lambda self, *args, **kwargs: launch(self, *args, **kwargs))
        for steps in itertools.count():
            _launch.forget_launches()
            failure.left = steps
            failure.made.clear()
            try:
                _verify.results(call, arguments)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                assert error is failure.error  # noqa: PT017  # which the last turn does not raise
                failure.error.__traceback__ = None
            else:
                break
            gc.collect()
            assert [made() for made in failure.made if made() is not None] == []
            assert torch.are_deterministic_algorithms_enabled()
            failure.left = math.inf
            for name, value in _verify.results(call, arguments).items():
                assert torch.equal(value, expected[name]), (name, steps)
        assert steps >= 2


@pytest.mark.parametrize("operator", _verify.OPERATORS)
def test_no_memory_of_a_gpu(operator, device, freed):
    """An output of terabytes, of an image that is given many times."""
    if device.type == "cpu":
        pytest.skip("needs a GPU; a CPU may promise memory that it does not have")
    case = Case("", channels=64, height=64, width=64, scale_factor=16)
    arguments = random_arguments(operator, case, torch.bfloat16, device)
    call = _verify.function(operator, case, eager=False)
    expected = _verify.results(call, arguments)
    many = [value.expand(10**5, -1, -1, -1) for name, value in arguments.items() if name != "grad_output"]
    with pytest.raises(torch.OutOfMemoryError):
        call(*many)
    assert torch.equal(_verify.results(call, arguments)["output"], expected["output"])
