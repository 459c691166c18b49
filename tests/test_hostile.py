"""Bad values and bad layouts: no address outside of an argument, and damage that stays where docs/promises.md says."""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import addresses
import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRETED, ON_CPU
from selection import long
from test_deterministic import deterministic

import dlu_triton
from dlu_triton import _launch, _verify, reference
from dlu_triton._verify import Case

by_name = {"ids": lambda value: getattr(value, "name", None) or str(value).removeprefix("torch.")}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="addresses are those of the interpreter")


# ---------------------------------------------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _index(start, stride_h, stride_w, width, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    return start + lane // width * stride_h + lane % width * stride_w


@triton.jit
def copy(
    x_ptr, y_ptr, start, read, written, width, stride_xh, stride_xw, stride_yh, stride_yw,
    BLOCK: tl.constexpr, ATOMIC: tl.constexpr = False,
):  # fmt: skip
    """The first `read` elements of x, and zeros, are written to the first `written` ones of y."""
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + _index(start, stride_xh, stride_xw, width, BLOCK), mask=lane < read, other=0.0)
    y_ptrs = y_ptr + _index(start, stride_yh, stride_yw, width, BLOCK)
    if ATOMIC:
        tl.atomic_add(y_ptrs, x, mask=lane < written)
    else:
        tl.store(y_ptrs, x, mask=lane < written)


@triton.jit
def other_argument(x_ptr, y_ptr, distance):
    tl.store(y_ptr, tl.load(x_ptr + distance))


@triton.jit
def wider(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr.to(tl.pointer_type(tl.float64))).to(tl.float32))


@triton.jit
def swap(x_ptr, places_ptr):
    tl.atomic_cas(x_ptr + tl.load(places_ptr), 0, 1)


def run_copy(x, y, start=0, read=6, written=6, **constants):
    copy[(1,)](x, y, start, read, written, x.shape[1], *x.stride(), *y.stride(), BLOCK=8, **constants)


@interpreted
@pytest.mark.parametrize("atomic", (False, True))
def test_right_addresses_pass_and_change_no_result(atomic):
    for x in (torch.randn(2, 3), torch.randn(3, 2).T, torch.randn(5, 7)[1::2, 1::2], torch.randn(2, 1).expand(2, 3)):
        y = torch.zeros(4, 7)[::2, 1:4]
        with addresses.checked() as stores:
            run_copy(x, y, ATOMIC=atomic)
        assert torch.equal(y, x)
        assert stores == {("copy", "y_ptr")}


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": 7}, r"copy loads offset 6 of x_ptr, torch\.float32 of shape \(2, 3\) and strides \(3, 1\), and"),
        ({"written": 8}, r"copy stores offset 6 of y_ptr, .* and 2 of 8 lanes lie outside"),
        ({"written": 8, "ATOMIC": True}, r"copy adds atomically to offset 6 of y_ptr"),
        ({"start": -1}, r"copy loads offset -1 of x_ptr"),
        ({"start": 2**33}, r"copy loads offset 8589934592 of x_ptr"),
    ],
)
def test_addresses_outside_are_found(change, message):
    """Whatever is there: both are in the middle of a larger storage."""
    x, y = (torch.zeros(100)[40:46].view(2, 3) for _ in range(2))
    with addresses.checked(), pytest.raises(addresses.AddressError, match=message):
        run_copy(x, y, **change)
    assert not y.any()


@interpreted
def test_addresses_in_gaps_and_in_other_arguments_are_found():
    storage = torch.zeros(100)
    x, y = storage[:20].view(4, 5)[::2, 1:4], storage[20:26].view(2, 3)
    with addresses.checked():
        run_copy(x, y)
        with pytest.raises(addresses.AddressError, match=r"offset 3 of x_ptr, .* and 1 of 4 lanes"):
            copy[(1,)](x, y, 0, 4, 4, 4, *x.stride(), *y.stride(), BLOCK=4)
        with pytest.raises(addresses.AddressError, match=r"other_argument loads offset 20 of x_ptr"):
            other_argument[(1,)](storage[:4], storage[20:24], 20)
        with pytest.raises(addresses.AddressError, match=r"wider loads float64 in x_ptr, torch\.float32"):
            wider[(1,)](storage[:4], storage[20:24])
        with pytest.raises(addresses.AddressError, match=r"swap swaps atomically offset 4 of x_ptr"):
            swap[(1,)](torch.zeros(4, dtype=torch.int32), torch.tensor([4]))
    run_copy(x, y, read=6)  # and unchecked again


@interpreted
def test_elements_of_a_view(device):
    """Nested strides by division, overlapping ones by a list: as `as_strided` has them."""
    for shape, strides in (
        ((2, 3, 4), (12, 4, 1)), ((2, 3, 4), (1, 8, 2)), ((3, 4), (0, 2)), ((3, 4), (2, 1)), ((3, 3), (3, 2)), ((), ()),
        ((2, 1, 3), (5, 100, 1)), ((2, 0), (1, 1)), ((2, 3, 2), (7, 0, 3)),
    ):  # fmt: skip
        view = torch.zeros(100).as_strided(shape, strides)
        marked = torch.zeros(100, dtype=torch.bool)
        marked.as_strided(shape, strides).fill_(True)
        places = torch.arange(-20, 100)
        expected = torch.cat([torch.zeros(20, dtype=torch.bool), marked])
        held = addresses.Argument("x_ptr", view, 1, view.data_ptr()).holds(4 * places.numpy())
        assert torch.equal(torch.from_numpy(held), expected), (shape, strides)


# ---------------------------------------------------------------------------------------------------------------
# Where the damage of upsampling ends
# ---------------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


class Reach:
    """What depends on an element of an argument, by the definition alone: masks over output and gradients, by name."""

    def __init__(self, operator, case, arguments):
        self.operator, self.case, self.arguments = operator, case, arguments
        self.taps, self.radius = case.kernel_size**2, case.kernel_size // 2
        shapes = {name: value.shape for name, value in arguments.items()}
        shapes["output"] = shapes.pop("grad_output")
        self.found = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}

    def mark(self, name, index):
        if name in self.found:
            self.found[name][index] = True

    def group(self, channel):
        """That of a channel of the features, or of the upsampled kernels where these are the output."""
        width = self.taps if self.operator == "expand_kernels" else self.case.channels // self.case.groups
        return channel // width

    def channels(self, group):
        width = self.found["output"].shape[1] // self.case.groups
        return slice(group * width, (group + 1) * width)

    def sources(self, y, x):
        """Source pixels that the kernel of an output at source pixel (y, x) weighs."""
        return slice(max(y - self.radius, 0), y + self.radius + 1), slice(max(x - self.radius, 0), x + self.radius + 1)

    def pixels(self):
        return product(
            range(self.case.scale_factor * self.case.height), range(self.case.scale_factor * self.case.width)
        )

    def cells(self, image, group, row, column, offsets=None):
        """Pairs of source cells that an output samples, and whether its point moves, along y and along x."""
        s = self.case.scale_factor
        offsets = self.arguments["offsets"] if offsets is None else offsets
        shifts = offsets[image].view(-1, s, s, *offsets.shape[2:])[:, row % s, column % s, row // s, column // s]
        found = []
        for pixel, axis, size in ((row, 1, self.case.height), (column, 0, self.case.width)):
            shift = shifts[2 * group + axis]
            position = (pixel // s + shift.to(torch.promote_types(shift.dtype, torch.float32))).item()
            low = 0 if math.isnan(position) else int(min(max(position, 0), size - 1))
            found.append(((low, min(low + 1, size - 1)), 0 < position < size - 1))
        return found

    def mark_gradients_of_kernels(self, image, group, row, column, tap=slice(None)):
        """What follows from the gradient of a tap, or all, of the kernel of an output."""
        s, g, t = self.case.scale_factor, self.case.groups, self.taps
        if "masks" in self.found:
            self.found["masks"].view(-1, g, t, *self.found["masks"].shape[2:])[image, group, tap, row, column] = True
        elif "logits" in self.found:
            h, w = self.case.height, self.case.width
            of_outputs = self.found["logits"].view(-1, g, t, s, s, h, w)
            of_outputs[image, group, :, row % s, column % s, row // s, column // s] = True
        else:
            (cells_y, moves_y), (cells_x, moves_x) = self.cells(image, group, row, column)
            of_groups = self.found["kernel_space"].view(-1, g, t, *self.found["kernel_space"].shape[2:])
            for y, x in product(cells_y, cells_x):
                of_groups[image, group, :, y, x] = True
            self.mark_offsets(image, group, row, column, moves_y, moves_x)

    def mark_offsets(self, image, group, row, column, moves_y, moves_x):
        s, offsets = self.case.scale_factor, self.found["offsets"]
        for axis, moves in ((0, moves_x), (1, moves_y)):
            offsets[image, ((2 * group + axis) * s + row % s) * s + column % s, row // s, column // s] |= moves

    def mark_kernel(self, image, group, row, column):
        """What follows from the whole kernel of an output, but for the gradients of what it was made from."""
        self.mark("output", (image, self.channels(group), row, column))
        s = self.case.scale_factor
        self.mark("features", (image, self.channels(group), *self.sources(row // s, column // s)))

    def of(self, name, place):
        image, channel, y, x = place
        s, r, t = self.case.scale_factor, self.radius, self.taps
        if name == "features":
            rows, columns = self.sources(y, x)
            for i, j in product(range(s * rows.start, min(s * rows.stop, s * self.case.height)),
                                range(s * columns.start, min(s * columns.stop, s * self.case.width))):  # fmt: skip
                self.mark("output", (image, channel, i, j))
                tap = (y - i // s + r) * self.case.kernel_size + x - j // s + r
                self.mark_gradients_of_kernels(image, self.group(channel), i, j, tap)
        elif name == "grad_output":
            self.mark("features", (image, channel, *self.sources(y // s, x // s)))
            self.mark_gradients_of_kernels(image, self.group(channel), y, x)
        elif name == "masks":
            group, tap = divmod(channel, t)
            source = y // s + tap // self.case.kernel_size - r, x // s + tap % self.case.kernel_size - r
            if 0 <= source[0] < self.case.height and 0 <= source[1] < self.case.width:
                self.mark("output", (image, self.channels(group), y, x))
                self.mark("features", (image, self.channels(group), *source))
        elif name == "logits":
            group, i, j = channel // (t * s * s), channel // s % s, channel % s
            self.mark_kernel(image, group, y * s + i, x * s + j)
            self.mark_gradients_of_kernels(image, group, y * s + i, x * s + j)
        elif name == "kernel_space":
            group = channel // t
            self.found["kernel_space"][image, group * t : (group + 1) * t, y, x] = True
            for row, column in self.pixels():
                (cells_y, moves_y), (cells_x, moves_x) = self.cells(image, group, row, column)
                if y in cells_y and x in cells_x:
                    self.mark_kernel(image, group, row, column)
                    self.mark_offsets(image, group, row, column, moves_y, moves_x)
        else:
            group, row, column = channel // (2 * s * s), y * s + channel // s % s, x * s + channel % s
            self.mark_kernel(image, group, row, column)
            self.mark_gradients_of_kernels(image, group, row, column)
            self.found["offsets"][image, channel, y, x] = False  # a point that does not move has no gradient


def loaded(tile, case, row, column):
    """Rows and columns of the source that the forward program of an output loads, as slices that may reach outside."""
    s, radius = case.scale_factor, case.kernel_size // 2
    y, x = row // tile.BLOCK_H * tile.BLOCK_H // s - radius, column // tile.BLOCK_W * tile.BLOCK_W // s - radius
    pixels = _launch.cdiv(tile.WINDOW_H * tile.WINDOW_W, tile.BLOCK_Q) * tile.BLOCK_Q  # the last piece may be larger
    return slice(y, y + _launch.cdiv(pixels, tile.WINDOW_W)), slice(x // 2 * 2, x // 2 * 2 + tile.WINDOW_W)


def gathered(strip, case, row, column):
    """Rows, and ranges of columns, of the source whose gradients take an output into a product."""
    s, radius = case.scale_factor, case.kernel_size // 2
    first = (row // s - radius) // strip.STEP_H * strip.STEP_H
    columns = [
        slice(start, start + strip.STRIP_W)
        for start in range(0, case.width, strip.STRIP_W)
        if 0 <= column - (start - radius) * s < strip.PIECES_W * strip.BLOCK_W
    ]
    return slice(max(first, 0), first + 2 * strip.STEP_H), columns


def spread(operator, case, dtype, channels_last, name, place, found):
    """Add what kernels reach beyond the definition: zeros of a tile's matrix product times what is not finite."""
    image, channel, y, x = place
    if operator == "expand_kernels":
        return
    if name == "features":
        tile, _ = _launch.forward_tile(case.scale_factor, case.kernel_size, dtype.itemsize, channels_last)
        for row, column in product(*(range(size) for size in found["output"].shape[2:])):
            rows, columns = loaded(tile, case, row, column)
            inside = columns.start <= x < columns.stop
            found["output"][image, channel, row, column] |= inside and rows.start <= y < rows.stop
    elif name == "grad_output":
        strip = _launch.gather_tile(case.scale_factor, case.kernel_size, dtype.itemsize, channels_last).strip
        rows, columns = gathered(strip, case, y, x)
        for each in columns:
            found["features"][image, channel, rows, each] = True


def results(operator, case, arguments, path):
    found = _verify.results(_verify.function(operator, case, eager=False), arguments)
    return {name: value.to("cpu") for name, value in found.items()}


def assert_same(name, found, expected, dtype):
    """Bitwise, but for sums by atomic additions; tiles are added up in another way where a value is not finite."""
    if name == "kernel_space":
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-5 if dtype != torch.float64 else 1e-13}
        torch.testing.assert_close(found, expected, **tolerance, msg=lambda message: f"{name}: {message}")
    else:
        assert torch.equal(found, expected), name


def assert_untouched(found, clean, touched, dtype):
    for name, value in found.items():
        assert_same(name, value[~touched[name]], clean[name][~touched[name]], dtype)


def places(operator, case, name, shape):
    """A corner, the middle, and the last element of a tile, in groups and channels of their own, of the first image."""
    _, c, h, w = shape
    edge = 7 if name in ("grad_output", "masks") else 3
    inside = min(edge, h - 1), edge
    if name == "masks":  # the taps that weigh the pixel itself, and beside it
        middle = case.kernel_size**2 // 2
        return (0, middle, 0, 0), (0, c - case.kernel_size**2 + middle, h // 2, w // 2), (0, middle + 1, *inside)
    return (0, 0, 0, 0), (0, c - 1, h // 2, w // 2), (0, c // 2 - 1, *inside)


@cache
def clean_results(operator, case, dtype, path, kernels, repeatable):
    arguments = _verify.inputs(operator, case, dtype, path)
    with deterministic(repeatable):
        return results(operator, case, arguments, path)


def damage(operator, case, dtype, name, values, path, repeatable=False):
    """Run with bad values at `places`; nothing else may be touched, and each has to show where it reaches."""
    arguments = _verify.inputs(operator, case, dtype, path)
    kernels = _launch.runs_kernels(arguments["grad_output"])
    clean = clean_results(operator, case, dtype, path, kernels, repeatable)
    hurt = {each: value.clone() for each, value in arguments.items()}
    at = places(operator, case, name, hurt[name].shape)
    for place, value in zip(at, values, strict=True):
        hurt[name][place] = value
    reach = Reach(operator, case, {each: value.cpu() for each, value in hurt.items()})
    for place, value in zip(at, values, strict=True):
        if name != "offsets" or math.isnan(value):
            reach.of(name, place)
    expected = {each: value.clone() for each, value in reach.found.items()}
    if name == "offsets":  # what the points sampled before, too
        before = Reach(operator, case, {each: value.cpu() for each, value in arguments.items()})
        for place in at:
            before.of(name, place)
            before.found[name][place] = True
            reach.of(name, place)
            reach.found[name][place] = True
        for each, value in before.found.items():
            reach.found[each] |= value
    allowed = {each: value.clone() for each, value in expected.items()}
    if kernels:
        for place in at:
            spread(operator, case, dtype, case.channels_last, name, place, allowed)
            spread(operator, case, dtype, case.channels_last, name, place, reach.found)
    if repeatable and name != "kernel_space" and "kernel_space" in expected:
        taps = case.kernel_size**2
        of_groups = [found["kernel_space"].unflatten(1, (case.groups, taps)) for found in (expected, allowed)]
        of_groups.append(reach.found["kernel_space"].unflatten(1, (case.groups, taps)))
        for found in of_groups:
            found |= of_groups[0].any((2, 3, 4), keepdim=True).clone()
    with deterministic(repeatable):
        found = results(operator, case, hurt, path)
    for each, value in found.items():
        assert value[expected[each]].isfinite().logical_not().all(), f"{each} hides a bad value of {name}"
        assert value[~allowed[each]].isfinite().all(), f"{name} spreads to {each} beyond its reach"
    assert_untouched(found, clean, reach.found, dtype)


DAMAGED = [
    (operator, name)
    for operator in _verify.OPERATORS
    for name in _verify.inputs(operator, Case("", height=1, width=1), torch.float32, "cpu")
]
SMALL = Case("", channels=4, groups=2, height=4, width=12)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")  # of the interpreter
@pytest.mark.parametrize("dtype", (torch.float32, *long(torch.bfloat16)), **by_name)
@pytest.mark.parametrize(("operator", "name"), DAMAGED)
def test_damage_ends_where_the_definition_or_the_tile_does(operator, name, dtype, path):
    """Other groups and channels, and pixels out of reach, stay bitwise as they are without bad values."""
    logits = name in ("logits", "kernel_space")  # minus infinity is no bad value there
    damage(operator, SMALL, dtype, name, (NAN, INF, NAN if logits else -INF), path)


SCALES_AND_KERNELS = (
    (1, 3), (1, 5), (2, 1), (2, 3), (2, 5), (2, 7), (2, 9), (3, 3), (3, 5), (3, 9), (4, 5), (5, 3), (7, 3),
    (8, 5), (16, 5),
)  # fmt: skip


def tiled(s, k, channels_last):
    """A map of several tiles along both axes."""
    name = f"scale {s}, kernel {k}, {'channels_last' if channels_last else 'NCHW'}"
    height, width = _launch.cdiv(24 if s < 4 else 40, s) + 2, _launch.cdiv(72 if s < 4 else 80, s) + 1
    return Case(
        name, channels=4, groups=2, height=height, width=width, scale_factor=s, kernel_size=k,
        channels_last=channels_last,
    )  # fmt: skip


TILED = [tiled(s, k, last) for s, k in SCALES_AND_KERNELS for last in (False, True)]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("dtype", _verify.DTYPES, **by_name)
@pytest.mark.parametrize("case", TILED, **by_name)
@pytest.mark.parametrize("name", ("features", "grad_output"))
def test_damage_at_tiles_of_all_shapes(name, case, dtype, device):
    for values in ((NAN, INF, -INF), (-INF, NAN, INF)):
        damage("carafe", case, dtype, name, values, device)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("dtype", _verify.DTYPES, **by_name)
@pytest.mark.parametrize("case", [
    replace(SMALL, scale_factor=3, height=4, width=11, kernel_size=3), replace(SMALL, channels_last=True), SMALL,
    replace(SMALL, scale_factor=1, kernel_size=7), replace(SMALL, height=8, width=9, reach=30.0),
], ids=("scale 3", "channels_last", "small", "scale 1", "far"))  # fmt: skip
@pytest.mark.parametrize(("operator", "name"), DAMAGED)
def test_damage_of_all_types(operator, name, case, dtype, path):
    damage(operator, case, dtype, name, (NAN, INF if name == "offsets" else NAN, NAN), path)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("name", ("features", "offsets", "grad_output"))
def test_damage_where_sums_repeat_themselves(name, device):
    """The gradient of a kernel space is NaN in the whole image and group, in no other."""
    case = replace(SMALL, channels=2, width=9, kernel_size=3)
    damage("dlu_upsample", case, torch.float32, name, (NAN, NAN, NAN), device, repeatable=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("value", (NAN, *long(INF, -INF, 1e30)), ids=str)
@pytest.mark.parametrize(("operator", "name"), DAMAGED)
def test_nothing_but_bad_values_in_an_image(operator, name, value, path):
    """The other image stays as it is, and no address is outside."""
    case = replace(SMALL, batch=2, channels=2, height=3, width=5, kernel_size=3)
    arguments = _verify.inputs(operator, case, torch.float32, path)
    clean = results(operator, case, arguments, path)
    arguments[name][0] = value
    for each, found in results(operator, case, arguments, path).items():
        assert_same(each, found[1], clean[each][1], torch.float32)


# ---------------------------------------------------------------------------------------------------------------
# Values that are finite, and what they give
# ---------------------------------------------------------------------------------------------------------------


def extremes(dtype, kernels):
    info = torch.finfo(dtype)
    # Twins round the gradients of sampled kernels to half precision on the way.
    huge = 1e30 if dtype != torch.float16 else 6e4 if kernels else 5e3
    return huge, -huge, info.smallest_normal / 4


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:underflow encountered")
@pytest.mark.parametrize("dtype", (torch.float32, *long(torch.float16)), **by_name)
@pytest.mark.parametrize(("operator", "name"), [each for each in DAMAGED if each[1] != "offsets"])
def test_extreme_values_reach_what_depends_on_them(operator, name, dtype, path):
    """And there they give what float64 gives, up to rounding, or to infinity what is past the type."""
    case = replace(SMALL, width=9, kernel_size=3)
    arguments = _verify.inputs(operator, case, dtype, path)
    clean = results(operator, case, arguments, path)
    hurt = {each: value.clone() for each, value in arguments.items()}
    at = places(operator, case, name, hurt[name].shape)
    for place, value in zip(at, extremes(dtype, _launch.runs_kernels(hurt[name])), strict=True):
        hurt[name][place] = value
    reach = Reach(operator, case, {each: value.cpu() for each, value in hurt.items()})
    for place in at:
        reach.of(name, place)
    found = results(operator, case, hurt, path)
    assert_untouched(found, clean, reach.found, dtype)
    exact = {each: value.double() for each, value in hurt.items()}
    truth = _verify.results(_verify.function(operator, case, eager=True), exact)
    for each, expected in truth.items():
        expected, largest = expected.cpu(), torch.finfo(dtype).max
        beyond = expected.abs() > 0.99 * largest
        bound = 64 * torch.finfo(dtype).eps * expected[~beyond].abs().max()
        assert ((found[each].double() - expected)[~beyond].abs() <= bound).all(), each
        assert not found[each][beyond].isnan().any(), each


@pytest.mark.parametrize("dtype", (torch.float16, *long(torch.float64, torch.float32, torch.bfloat16)), **by_name)
@pytest.mark.parametrize("operator", ("dlu_upsample", "expand_kernels"))
def test_offsets_hold_to_the_border(operator, dtype, path):
    """Infinite, huge and merely large ones are the same, bitwise, in outputs and gradients; none moves with them."""
    case = replace(SMALL, batch=2, width=5, kernel_size=3, reach=0.7)
    arguments = _verify.inputs(operator, case, dtype, path)
    s = case.scale_factor
    at = [(0, 0, 0, 0), (0, 2 * s * s - 1, 2, 2), (1, 2 * s * s, 3, 4), (1, 4 * s * s - 1, 1, 0)]
    for place, sign in zip(at, (1, -1, -1, 1), strict=True):
        arguments["offsets"][place] = 99 * sign
    expected = results(operator, case, arguments, path)
    for value in (INF, 6e4 if dtype == torch.float16 else 1e30, torch.finfo(dtype).max):
        for place, sign in zip(at, (1, -1, -1, 1), strict=True):
            arguments["offsets"][place] = value * sign
        for name, found in results(operator, case, arguments, path).items():
            assert_same(name, found, expected[name], dtype)
    assert all(expected["offsets"][place] == 0 for place in at)
    assert all(value.isfinite().all() for value in expected.values())


@pytest.mark.parametrize("dtype", (torch.float32, *long(torch.float64, torch.float16, torch.bfloat16)), **by_name)
@pytest.mark.parametrize("operator", ("dlu_upsample", "expand_kernels"))
def test_offsets_of_nearly_nothing(operator, dtype, path):
    """Minus zero is zero; a denormal one inside the image gives the same kernel, and moves as zero does."""
    case = replace(SMALL, height=3, width=4, kernel_size=3, reach=0.0)
    arguments = _verify.inputs(operator, case, dtype, path)
    expected = results(operator, case, arguments, path)
    arguments["offsets"] *= -0.0
    for name, found in results(operator, case, arguments, path).items():
        assert_same(name, found, expected[name], dtype)
    arguments["offsets"][..., 1:-1, 1:-1] = torch.finfo(dtype).smallest_normal / 4
    for name, found in results(operator, case, arguments, path).items():
        torch.testing.assert_close(found, expected[name], msg=name)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", (torch.float32, *long(torch.float64, torch.float16, torch.bfloat16)), **by_name)
@pytest.mark.parametrize(("operator", "name"), [each for each in DAMAGED if each[1] in ("logits", "kernel_space")])
def test_taps_of_minus_infinity_are_left_out(operator, name, dtype, path):
    """They weigh nothing and get no gradient; all of them are NaN."""
    case = replace(SMALL, height=3, width=4, kernel_size=3)
    arguments = _verify.inputs(operator, case, dtype, path)
    step = arguments[name].shape[1] // 18  # channels of a tap
    left_out = torch.zeros_like(arguments[name], dtype=torch.bool)
    left_out[:, 0 : 4 * step] = True
    left_out[:, -step:, 1, 2] = True
    arguments[name][left_out] = -INF
    found = results(operator, case, arguments, path)
    assert not found[name][left_out.cpu()].any()
    exact = {each: value.double() for each, value in arguments.items()}
    truth = _verify.results(_verify.function(operator, case, eager=True), exact)
    for each, expected in truth.items():
        assert found[each].isfinite().all(), each
        expected = expected.cpu()
        bound = 16 * torch.finfo(dtype).eps * expected.abs().max()
        assert ((found[each].double() - expected).abs() <= bound).all(), each
    arguments[name][:, : 9 * step, 1, 1] = -INF
    found = results(operator, case, arguments, path)
    assert found[name][:, : 9 * step, 1, 1].isnan().all()
    assert found[name][:, 9 * step :].isfinite().all()


@pytest.mark.parametrize("dtype", _verify.DTYPES, **by_name)
def test_denormals_are_not_flushed(dtype, device):
    if dtype == torch.bfloat16 and INTERPRETED:
        pytest.skip("the interpreter does not store them in bfloat16")
    features = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = (features * torch.finfo(dtype).smallest_normal / 16).to(device, dtype)
    masks = torch.zeros(1, 9, 8, 12, dtype=dtype, device=device)
    masks[:, 4] = 1
    output = dlu_triton.carafe(features, masks, 3, 1, 2)
    assert output.any()
    # The least that TF32 holds, as docs/promises.md says.
    least = 2.0**-136 if dtype == torch.float32 and not INTERPRETED else 0.0
    expected = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(output, expected, rtol=0, atol=least)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
def test_largest_float32_features(device):
    """The promised share of the largest number: beyond it, parts for the tensor cores are infinite, and no number
    spreads before it."""
    if _launch.precision(torch.float32) != "tf32x3":
        pytest.skip("no parts are taken")
    share = float(re.search(r"within (\S+)% of the largest number", PROMISES)[1]) / 100
    case = replace(SMALL, channels=2, groups=1, height=2, width=3, kernel_size=3)
    arguments = _verify.inputs("carafe", case, torch.float32, device)
    del arguments["grad_output"]
    arguments["masks"] = arguments["masks"].abs() / 16  # no sum overflows
    largest = torch.finfo(torch.float32).max
    for factor, finite in ((1 - share, True), (1.0, False)):
        arguments["features"][0, 0, 1, 1] = factor * largest
        output = dlu_triton.carafe(*arguments.values(), 3, 1, 2)
        assert output[0, 0].isfinite().all() == finite
        assert output[0, 1].isfinite().all()
    assert share < 2**-11  # no more than the rounding to eleven bits takes


def test_masks_beyond_the_image(path):
    """Twins multiply them by the zeros there, as the definition does; kernels leave them out."""
    case = replace(SMALL, height=3, width=4, kernel_size=3)
    arguments = _verify.inputs("carafe", case, torch.float32, path)
    clean = results("carafe", case, arguments, path)
    arguments["masks"][0, 0, 0, 0] = NAN  # the first tap of the corner
    found = results("carafe", case, arguments, path)
    if not _launch.runs_kernels(arguments["masks"]):
        assert found["output"][0, :2, 0, 0].isnan().all()
        found["output"][0, :2, 0, 0] = clean["output"][0, :2, 0, 0]
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name


# ---------------------------------------------------------------------------------------------------------------
# Numbers of docs/promises.md
# ---------------------------------------------------------------------------------------------------------------

PROMISES = " ".join(Path(__file__).parents[1].joinpath("docs", "promises.md").read_text().split())
WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
SETTINGS = list(product(range(1, 17), (1, 3, 5, 7, 9), (2, 4, 8), (False, True)))


def test_promises_have_the_reach_of_features():
    """Along an axis: outputs of a tile beside one that loads it, and source pixels beyond the window of that."""
    outputs, rows_beyond, columns_beyond = 0, 0, 0
    for s, k, itemsize, last in SETTINGS:
        tile, _ = _launch.forward_tile(s, k, itemsize, last)
        outputs = max(outputs, tile.BLOCK_H - 1, tile.BLOCK_W - 1)
        case = Case("", scale_factor=s, kernel_size=k)
        for number in range(2 * s):  # tiles begin at all parts of a source pixel, even and odd
            y, x = number * tile.BLOCK_H, number * tile.BLOCK_W
            rows, columns = loaded(tile, case, y, x)
            reached = [(y // s - k // 2, (y + tile.BLOCK_H - 1) // s + k // 2)]
            reached.append((x // s - k // 2, (x + tile.BLOCK_W - 1) // s + k // 2))
            beyond = [
                max(a - each.start, each.stop - 1 - b) for each, (a, b) in zip((rows, columns), reached, strict=True)
            ]
            rows_beyond, columns_beyond = max(rows_beyond, beyond[0]), max(columns_beyond, beyond[1])
    said = re.search(r"up to (\d+) output pixels, and (\w+) rows or (\w+) columns of the source beyond", PROMISES)
    assert (outputs, rows_beyond, columns_beyond) == (int(said[1]), WORDS[said[2]], WORDS[said[3]])


def test_promises_have_the_reach_of_gradients():
    farthest = 0
    for s, k, itemsize, last in SETTINGS:
        strip = _launch.gather_tile(s, k, itemsize, last).strip
        case = Case("", scale_factor=s, kernel_size=k, width=64)
        for y, x in product((20 + i for i in range(strip.STEP_H)), (20 + i for i in range(strip.STRIP_W))):
            for column in {x * s, x * s + s - 1}:
                rows, columns = gathered(strip, case, y * s, column)
                farthest = max(farthest, y - rows.start, rows.stop - 1 - y)
                farthest = max(farthest, *(max(x - each.start, each.stop - 1 - x) for each in columns))
    assert farthest == int(re.search(r"in its channel, by up to (\d+) source pixels", PROMISES)[1])


# ---------------------------------------------------------------------------------------------------------------
# Class activation maps
# ---------------------------------------------------------------------------------------------------------------

METHODS = ("xgradcam", "gradcam", "gradcam++", "hirescam", "layercam", "elementwise")
WEIGHING = METHODS[:3]
PLANES = {"small": (5, 7), "large": (70, 61)}


def planes(size, dtype, device, n=2, k=3, c=4):
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(n, c, *size, generator=generator, dtype=torch.float64).abs() + 0.1
    gradients = torch.randn(n, k, c, *size, generator=generator, dtype=torch.float64)
    gradients[..., 0, 1] = 0
    return activations.to(device, dtype), gradients.to(device, dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("value", (NAN, INF, -INF), ids=str)
@pytest.mark.parametrize("name", ("activations", "gradients"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", ("small", *long("large")))
def test_damage_of_maps(size, method, name, value, path):
    """It stays in its image, that of a gradient in its class too, and in its pixel where no weight sums it."""
    dtype = torch.float32
    activations, gradients = planes(PLANES[size], dtype, path, c=2 if size == "large" else 4)
    clean = dlu_triton.class_activation_parts(activations, gradients, method)
    place = (1, 1, 2, 3) if name == "activations" else (1, 2, 1, 2, 3)
    {"activations": activations, "gradients": gradients}[name][place] = value
    found = dlu_triton.class_activation_parts(activations, gradients, method)
    maps = (1,) if name == "activations" else (1, 2)
    summed = method in WEIGHING and (method, name) != ("gradcam", "activations")
    expected = {
        each: torch.zeros_like(part, dtype=torch.bool) for each, part in found._asdict().items() if part is not None
    }
    pixels = (slice(None), slice(None)) if summed else (2, 3)
    every = () if len(maps) == 2 else (slice(None),)
    for each in ("raw", "map"):
        expected[each][(*maps, *every, *pixels)] = True
    expected["contributions"][(*maps, *every, 1)] = True
    if summed:
        expected["weights"][(*maps, *every, 1)] = True
    if name == "activations":
        expected["cancellation"][1, 1] = True
    for each, touched in expected.items():
        part = getattr(found, each)
        assert torch.equal(part[~touched], getattr(clean, each)[~touched]), each
        if math.isnan(value):
            assert part[touched].isnan().all(), each
    eager = reference.class_activation_parts(activations, gradients, method)
    for each in expected:
        assert torch.equal(getattr(found, each).isfinite(), getattr(eager, each).isfinite()), each


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("resize", (None, (9, 12)), ids=str)
@pytest.mark.parametrize("dtype", _verify.DTYPES, **by_name)
def test_damage_of_weights_and_of_normalised_maps(dtype, resize, path):
    """NaN keeps through ReLU and makes its normalised map NaN, which has neither minimum nor maximum, and no other."""
    activations, gradients = planes((5, 7), dtype, path)
    weights = gradients.sum((3, 4))
    clean = dlu_triton.weighted_activation_map(activations, weights, size=resize, normalize=True)
    weights[0, 1, 2] = NAN
    maps = dlu_triton.weighted_activation_map(activations, weights, size=resize, normalize=True)
    assert maps[0, 1].isnan().all()
    maps[0, 1] = clean[0, 1]
    assert torch.equal(maps, clean)
    clean = dlu_triton.class_activation_map(activations, gradients, "hirescam", size=resize, normalize=True)
    for value in (NAN, INF):
        activations[1, 1, 2, 3] = value
        maps = dlu_triton.class_activation_map(activations, gradients, "hirescam", size=resize, normalize=True)
        assert torch.equal(maps[0], clean[0])
        assert math.isinf(value) or maps[1].isnan().all()
        eager = reference.class_activation_map(activations, gradients, "hirescam", size=resize, normalize=True)
        if math.isnan(value) or resize is None:  # kernels take differences of neighbours, which of infinities are NaN
            assert torch.equal(maps.isfinite(), eager.isfinite())


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", (NAN, INF), ids=str)
def test_dead_channel_without_eps(value, path):
    """A quotient whose denominator is zero is zero, whatever is above it: dead channels weigh nothing."""
    activations, gradients = planes((5, 7), torch.float32, path)
    activations[0, 1] = 0
    clean = dlu_triton.class_activation_parts(activations, gradients, eps=0.0)
    gradients[0, 2, 1, 3, 3] = value
    found = dlu_triton.class_activation_parts(activations, gradients, eps=0.0)
    assert not found.weights[0, :, 1].any()
    for name, part in found._asdict().items():
        assert torch.equal(part, getattr(clean, name)), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), **by_name)
def test_maps_of_huge_and_tiny_activations(dtype, method, path):
    """What float64 gives; a channel of tiny ones is not dead."""
    activations, gradients = planes((5, 7), dtype, path)
    activations[0, 1] *= 6e3 if dtype == torch.float16 else 1e18
    # A GPU does not promise to divide by float32 denormals.
    activations[1, 2] *= torch.finfo(dtype).smallest_normal * (4 if path.type == "cuda" else 0.25)
    found = dlu_triton.class_activation_parts(activations, gradients, method)
    expected = reference.class_activation_parts(activations.double(), gradients.double(), method)
    for name, part in found._asdict().items():
        if part is not None:
            torch.testing.assert_close(part.double(), getattr(expected, name), rtol=1e-3, atol=1e-3, msg=name)
    assert (found.cancellation > 0).all()


# ---------------------------------------------------------------------------------------------------------------
# Which arguments kernels write to, and a GPU's own checks
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ON_CPU, reason="a GPU shows no addresses")
def test_kernels_store_to_their_results_alone(checked_addresses):
    case = Case("", channels=2, height=2, width=3, kernel_size=3)
    for operator in _verify.OPERATORS:
        results(operator, case, _verify.inputs(operator, case, torch.float32, "cpu"), "cpu")
    dlu_triton.class_activation_parts(*planes((3, 4), torch.float32, "cpu"))
    dlu_triton.class_activation_parts(*planes(PLANES["large"], torch.float32, "cpu", n=1, k=1, c=8))
    channels = [(kernel, f"{name}_ptr") for kernel in ("cam_partial_maps", "cam_channels")
                for name in ("weights", "contributions", "cancellation")]  # fmt: skip
    assert checked_addresses == {
        ("softmax_forward", "space_ptr"), ("softmax_forward", "zeros_ptr"), ("softmax_backward", "grad_logits_ptr"),
        ("sample_forward", "masks_ptr"), ("sample_backward", "grad_space_ptr"),
        ("sample_backward", "grad_offsets_ptr"), ("reassemble_forward", "output_ptr"),
        ("reassemble_backward_features", "grad_features_ptr"), ("reassemble_backward_kernels", "grad_kernels_ptr"),
        ("reassemble_backward_kernels", "grad_space_ptr"), ("reassemble_backward_kernels", "grad_offsets_ptr"),
        *channels, ("cam_partial_maps", "partials_ptr"), ("cam_finish", "raw_ptr"), ("cam_finish", "map_ptr"),
    }  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, of the CUDA toolkit")
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_compute_sanitizer_finds_nothing(tool):
    """In compiled kernels, with each tensor in an allocation of its own."""
    selected = "test_nothing_but_bad_values_in_an_image or test_damage_of_maps or test_offsets_hold_to_the_border"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    process = subprocess.run(
        [*command, sys.executable, "-m", "pytest", "-q", __file__, "-k", f"({selected}) and not eager"],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-4000:]
