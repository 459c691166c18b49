"""Bad values and bad layouts: no address outside of an argument, and damage that stays where README says."""

import addresses
import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRETED

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
