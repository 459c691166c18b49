"""Device code of the upsampling operators.

The reassembly of a tile is one small matrix product. A tile of M output pixels reaches a window of Q source
pixels; `_band` spreads the k*k taps of every output pixel over that window, and then

    output [M, C] = band [M, Q] @ features [Q, C]                     forward
    grad_features [Q, C] = band^T [Q, M] @ grad_output [M, C]         summed over the output tiles that reach Q
    grad_band [M, Q] = grad_output [M, C] @ features^T [C, Q]         its k*k entries per row are the mask gradient

Every kernel below serves three sources of taps: CARAFE's masks; the logits of CARAFE's encoder, which are shuffled
and normalised on the way (`LOGITS`); and for DLU the normalised kernel space, sampled at the learned offsets, stored
as (batch, group, y, x, tap) with padded taps. Masks and logits arrive as a five-dimensional view, (batch, group, tap,
y, x), with `offsets_ptr` None.

Offsets inside an image are of type INDEX, 64-bit where an image is that large; those of images always are. Masks and
clamped indices keep every access inside its tensor, and sampling coordinates are clamped before they become integers,
so no value of an input can lead outside.
"""

import triton
import triton.language as tl

# Arguments that vary from call to call select no new compilation; strides do, by their alignment, where not listed too.
_SIZES = ["height", "width", "tiles_h", "tiles_w", "groups", "slices", "blocks", "blocks_per_program"]


# ---------------------------------------------------------------------------------------------------------------
# Where things are
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _unravel(tile, tiles_h, tiles_w):
    """Linear tile number -> (image, tile row, tile column)."""
    return (tile // (tiles_h * tiles_w)).to(tl.int64), tile // tiles_w % tiles_h, tile % tiles_w


@triton.jit
def _tile_pixels(y, x, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows and columns of the BLOCK_H x BLOCK_W pixels whose first is (y, x)."""
    index = tl.arange(0, BLOCK_H * BLOCK_W)  # [M]
    return y + index // BLOCK_W, x + index % BLOCK_W


@triton.jit
def _window_pixels(y, x, first, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_Q: tl.constexpr, height, width):
    """Rows, columns and validity of BLOCK_Q pixels, from `first` on, of the window that starts at pixel (y, x)."""
    index = first + tl.arange(0, BLOCK_Q)  # [Q]
    rows = y + index // WINDOW_W
    cols = x + index % WINDOW_W
    valid = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width) & (index < WINDOW_H * WINDOW_W)
    return rows, cols, valid


@triton.jit
def _pixel_offsets(rows, cols, stride_h, stride_w, INDEX: tl.constexpr):
    return rows.to(INDEX) * stride_h + cols.to(INDEX) * stride_w


@triton.jit
def _unsigned(offsets):
    """Offsets are never negative where they are used; unsigned ones take fewer instructions to become addresses."""
    return offsets.to(tl.uint32) if offsets.dtype == tl.int32 else offsets


# ---------------------------------------------------------------------------------------------------------------
# Taps: loading, sampling, and the adjoint of sampling
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_taps(
    plane_ptr, pixel_offsets, stride_t, valid, KERNEL: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """k*k taps at each pixel, zero beyond: [M, TAPS]."""
    taps = tl.arange(0, TAPS)
    mask = valid[:, None] & (taps < KERNEL * KERNEL)[None, :]
    offsets = pixel_offsets[:, None] + taps.to(pixel_offsets.dtype)[None, :] * stride_t
    return tl.load(plane_ptr + _unsigned(offsets), mask=mask, other=0.0).to(ACC)


@triton.jit
def _store_taps(plane_ptr, pixel_offsets, stride_t, values, valid, KERNEL: tl.constexpr, TAPS: tl.constexpr):
    """Where `_load_taps` reads; `values` [M, TAPS] are of the pointer's type."""
    taps = tl.arange(0, TAPS)
    offsets = pixel_offsets[:, None] + taps.to(pixel_offsets.dtype)[None, :] * stride_t
    tl.store(plane_ptr + _unsigned(offsets), values, mask=valid[:, None] & (taps < KERNEL * KERNEL)[None, :])


@triton.jit
def _softmax(logits, KERNEL: tl.constexpr, TAPS: tl.constexpr):
    """Softmax over the k*k logits of each pixel, zero in the padding: [M, TAPS]."""
    real = (tl.arange(0, TAPS) < KERNEL * KERNEL)[None, :]
    largest = tl.max(tl.where(real, logits, float("-inf")), axis=1)
    powers = tl.where(real, tl.exp(logits - largest[:, None]), 0.0)
    return powers / tl.sum(powers, axis=1)[:, None]


@triton.jit
def _softmax_adjoint(taps, grad_taps):
    """Gradient of the logits from the taps, their softmax, and the gradient of these: [M, TAPS]."""
    return taps * (grad_taps - tl.sum(taps * grad_taps, axis=1)[:, None])


@triton.jit
def _shuffled(rows, cols, stride_t, stride_h, stride_w, SCALE: tl.constexpr, INDEX: tl.constexpr):
    """Offsets of output pixels in logits that are yet to be pixel-shuffled, and the stride between their taps."""
    part = rows % SCALE * SCALE + cols % SCALE
    pixel_offsets = _pixel_offsets(rows // SCALE, cols // SCALE, stride_h, stride_w, INDEX)
    return pixel_offsets + part.to(INDEX) * stride_t, tl.full([], SCALE * SCALE, INDEX) * stride_t


@triton.jit
def _clamped_coordinate(position, size):
    """Source cells below and above a coordinate, its fraction, and whether it moves with its offset.

    The border takes a coordinate at or beyond it, and its gradient is zero there. A NaN addresses cell 0 and keeps
    its fraction NaN, so in the forward it reaches its own output pixel and no other.
    """
    limit = (size - 1).to(position.dtype)
    inside = (position > 0) & (position < limit)
    clamped = tl.where(inside, position, tl.where(position >= limit, limit, 0.0))
    low = tl.floor(clamped)
    fraction = tl.where(position == position, clamped - low, position)
    low = tl.minimum(low.to(tl.int32), size - 1)  # float32 rounds sizes beyond 2^24, perhaps up
    return low, tl.minimum(low + 1, size - 1), fraction, inside


@triton.jit
def _offset_pointers(
    offsets_ptr, stride_n, stride_c, stride_h, stride_w,
    image, group, rows, cols, SCALE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Pointers to dx and dy of each output pixel: channel 2*group (+1) of the pixel-shuffled offsets. [M], [M]"""
    pixel_offsets, next_channel = _shuffled(rows, cols, stride_c, stride_h, stride_w, SCALE, INDEX)
    offsets_ptr += image * stride_n + 2 * group.to(tl.int64) * next_channel
    dx_ptrs = offsets_ptr + _unsigned(pixel_offsets)
    return dx_ptrs, dx_ptrs + next_channel


@triton.jit
def _sampling_point(
    offsets_ptr, stride_n, stride_c, stride_h, stride_w,
    image, group, rows, cols, valid, height, width, SCALE: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Cells (y0, y1, x0, x1), fractions (fy, fx) and freedom (moves_y, moves_x) of each output pixel's sample."""
    dx_ptrs, dy_ptrs = _offset_pointers(
        offsets_ptr, stride_n, stride_c, stride_h, stride_w, image, group, rows, cols, SCALE, INDEX
    )
    dx = tl.load(dx_ptrs, mask=valid, other=0.0).to(ACC)
    dy = tl.load(dy_ptrs, mask=valid, other=0.0).to(ACC)
    y0, y1, fy, moves_y = _clamped_coordinate((rows // SCALE).to(ACC) + dy, height)
    x0, x1, fx, moves_x = _clamped_coordinate((cols // SCALE).to(ACC) + dx, width)
    return y0, y1, x0, x1, fy, fx, moves_y, moves_x


@triton.jit
def _space_plane(space_ptr, image, group, groups, height, width, TAPS: tl.constexpr):
    """The normalised kernels of one image and group, or their gradient: (y, x, tap), without gaps."""
    return space_ptr + (image * groups + group) * (height.to(tl.int64) * width) * TAPS


@triton.jit
def _cell_offsets(y, x, width, TAPS: tl.constexpr, INDEX: tl.constexpr):
    """Offsets of the padded taps of cells (y, x) in a plane of the kernel space: [M, TAPS]."""
    cells = y.to(INDEX) * width + x
    return _unsigned(cells[:, None] * TAPS + tl.arange(0, TAPS)[None, :])


@triton.jit
def _load_corner(plane_ptr, y, x, width, TAPS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr):
    """Normalised kernels at (y, x). Stored padded to TAPS and always inside, so no mask splits the loads."""
    return tl.load(plane_ptr + _cell_offsets(y, x, width, TAPS, INDEX)).to(ACC)


@triton.jit
def _sample_taps(
    plane_ptr, y0, y1, x0, x1, fy, fx, width, TAPS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """Bilinear sample of the kernel space: [M, TAPS]."""
    taps = _load_corner(plane_ptr, y0, x0, width, TAPS, ACC, INDEX) * ((1 - fy) * (1 - fx))[:, None]
    taps += _load_corner(plane_ptr, y0, x1, width, TAPS, ACC, INDEX) * ((1 - fy) * fx)[:, None]
    taps += _load_corner(plane_ptr, y1, x0, width, TAPS, ACC, INDEX) * (fy * (1 - fx))[:, None]
    taps += _load_corner(plane_ptr, y1, x1, width, TAPS, ACC, INDEX) * (fy * fx)[:, None]
    return taps


@triton.jit
def _taps(
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,  # no strides for the kernel space
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    image, group, groups, rows, cols, valid, height, width,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr, LOGITS: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Reassembly kernels of the given output pixels, read, normalised or sampled: [M, TAPS]."""
    if offsets_ptr is not None:
        y0, y1, x0, x1, fy, fx, _, _ = _sampling_point(
            offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
            image, group, rows, cols, valid, height, width, SCALE, ACC, INDEX,
        )  # fmt: skip
        plane_ptr = _space_plane(kernels_ptr, image, group, groups, height, width, TAPS)
        taps = _sample_taps(plane_ptr, y0, y1, x0, x1, fy, fx, width, TAPS, ACC, INDEX)
    else:
        kernels_ptr += image * stride_kn + group.to(tl.int64) * stride_kg
        if LOGITS:
            pixel_offsets, stride_kt = _shuffled(rows, cols, stride_kt, stride_kh, stride_kw, SCALE, INDEX)
            taps = _softmax(_load_taps(kernels_ptr, pixel_offsets, stride_kt, valid, KERNEL, TAPS, ACC), KERNEL, TAPS)
        else:
            pixel_offsets = _pixel_offsets(rows, cols, stride_kh, stride_kw, INDEX)
            taps = _load_taps(kernels_ptr, pixel_offsets, stride_kt, valid, KERNEL, TAPS, ACC)
    return taps


@triton.jit
def _scatter_corner(plane_ptr, y, x, width, grad, mask, TAPS: tl.constexpr, INDEX: tl.constexpr):
    """Atomic, into zeros: offsets are unbounded, so any output may reach any cell."""
    tl.atomic_add(plane_ptr + _cell_offsets(y, x, width, TAPS, INDEX), grad, mask=mask, sem="relaxed")


@triton.jit
def _sampling_adjoint(
    grad_taps,  # [M, TAPS]
    space_ptr,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_space_ptr,  # laid out as the kernel space; None when it is not asked for
    grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,  # likewise
    image, group, groups, rows, cols, valid, height, width,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Scatter the gradient of sampled taps into the kernel space, and store that of the offsets."""
    y0, y1, x0, x1, fy, fx, moves_y, moves_x = _sampling_point(
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        image, group, rows, cols, valid, height, width, SCALE, ACC, INDEX,
    )  # fmt: skip
    if grad_offsets_ptr is not None:
        plane_ptr = _space_plane(space_ptr, image, group, groups, height, width, TAPS)
        # What each corner of the kernel space would contribute: [M] each.
        c00 = tl.sum(grad_taps * _load_corner(plane_ptr, y0, x0, width, TAPS, ACC, INDEX), axis=1)
        c01 = tl.sum(grad_taps * _load_corner(plane_ptr, y0, x1, width, TAPS, ACC, INDEX), axis=1)
        c10 = tl.sum(grad_taps * _load_corner(plane_ptr, y1, x0, width, TAPS, ACC, INDEX), axis=1)
        c11 = tl.sum(grad_taps * _load_corner(plane_ptr, y1, x1, width, TAPS, ACC, INDEX), axis=1)
        dx_ptrs, dy_ptrs = _offset_pointers(
            grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw, image, group, rows, cols, SCALE, INDEX
        )
        grad_dx = tl.where(moves_x, (c01 - c00) * (1 - fy) + (c11 - c10) * fy, 0.0)
        grad_dy = tl.where(moves_y, (c10 - c00) * (1 - fx) + (c11 - c01) * fx, 0.0)
        tl.store(dx_ptrs, grad_dx.to(grad_offsets_ptr.dtype.element_ty), mask=valid)
        tl.store(dy_ptrs, grad_dy.to(grad_offsets_ptr.dtype.element_ty), mask=valid)
    if grad_space_ptr is not None:
        plane_ptr = _space_plane(grad_space_ptr, image, group, groups, height, width, TAPS)
        mask = valid[:, None] & (tl.arange(0, TAPS) < KERNEL * KERNEL)[None, :]
        w00, w01, w10, w11 = (1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx
        _scatter_corner(plane_ptr, y0, x0, width, grad_taps * w00[:, None], mask, TAPS, INDEX)
        _scatter_corner(plane_ptr, y0, x1, width, grad_taps * w01[:, None], mask, TAPS, INDEX)
        _scatter_corner(plane_ptr, y1, x0, width, grad_taps * w10[:, None], mask, TAPS, INDEX)
        _scatter_corner(plane_ptr, y1, x1, width, grad_taps * w11[:, None], mask, TAPS, INDEX)


@triton.jit
def _band(taps, rows, cols, window_rows, window_cols, KERNEL: tl.constexpr, TAPS: tl.constexpr):
    """Spread taps [M, TAPS] over source pixels [Q]: the weight of each of them in each output, [M, Q].

    `rows` and `cols` are the first source pixel that an output reads. Where it does not reach, it takes the last tap,
    which is padding and zero (NaN where a NaN offset has made all taps NaN).
    """
    u = window_rows[None, :] - rows[:, None]
    v = window_cols[None, :] - cols[:, None]
    reached = (u >= 0) & (u < KERNEL) & (v >= 0) & (v < KERNEL)
    return tl.gather(taps, tl.where(reached, u * KERNEL + v, TAPS - 1), axis=1)


@triton.jit
def _tf32_parts(x):
    """x as the nearest TF32, and what that leaves."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _multiply_add(a, b, c, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ b + c. "tf32x3", of float32, is three TF32 products and as accurate as float32; Triton's own form of it takes
    more instructions, to keep an infinite operand apart from others, which the zeros of a band prevent anyway."""
    if PRECISION == "tf32x3":
        a_high, a_low = _tf32_parts(a)
        b_high, b_low = _tf32_parts(b)
        c = tl.dot(a_low, b_high, c, input_precision="tf32", out_dtype=ACC)
        c = tl.dot(a_high, b_low, c, input_precision="tf32", out_dtype=ACC)
        c = tl.dot(a_high, b_high, c, input_precision="tf32", out_dtype=ACC)
    else:
        c = tl.dot(a, b, c, input_precision=PRECISION, out_dtype=ACC)
    return c


# ---------------------------------------------------------------------------------------------------------------
# Softmax over the taps, into and out of the gather-friendly layout
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _plane_offsets(pixels, stride_h, stride_w, width, INDEX: tl.constexpr):
    """Offsets of pixels by number. `stride_h` is None where rows follow each other: neighbours then stay neighbours."""
    if stride_h is None:
        offsets = pixels.to(INDEX) * stride_w
    else:
        offsets = _pixel_offsets(pixels // width, pixels % width, stride_h, stride_w, INDEX)
    return offsets


@triton.jit(
    do_not_specialize=[*_SIZES, "stride_ln", "stride_lg", "stride_lt", "stride_lh", "stride_lw"],
)
def softmax_forward(
    logits_ptr, stride_ln, stride_lg, stride_lt, stride_lh, stride_lw,
    space_ptr,
    height, width, groups, blocks,
    TAPS_INNER: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Kernel-space logits -> normalised kernels, taps innermost and padded to TAPS with zeros."""
    block, plane = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, group = (plane // groups).to(tl.int64), (plane % groups).to(tl.int64)
    pixels = block.to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    valid = pixels < height.to(INDEX) * width
    logits_ptr += image * stride_ln + group * stride_lg
    offsets = _plane_offsets(pixels, stride_lh, 1 if TAPS_INNER == "w" else stride_lw, width, INDEX)
    stride_lt = 1 if TAPS_INNER == "t" else stride_lt
    logits = _load_taps(logits_ptr, offsets, stride_lt, valid, KERNEL, TAPS, ACC)  # [P, TAPS]
    space_ptr = _space_plane(space_ptr, image, group, groups, height, width, TAPS)
    space_offsets = _unsigned(pixels[:, None] * TAPS + tl.arange(0, TAPS)[None, :])
    space = _softmax(logits, KERNEL, TAPS).to(space_ptr.dtype.element_ty)  # [P, TAPS]
    tl.store(space_ptr + space_offsets, space, mask=valid[:, None])


@triton.jit(do_not_specialize=_SIZES)
def softmax_backward(
    logits_ptr, stride_ln, stride_lg, stride_lt, stride_lh, stride_lw,
    grad_space_ptr,
    grad_logits_ptr, stride_gn, stride_gg, stride_gt, stride_gh, stride_gw,
    height, width, groups, blocks,
    KERNEL: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Gradient of the normalised kernels -> gradient of the logits, whose softmax is computed again."""
    block, plane = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, group = (plane // groups).to(tl.int64), (plane % groups).to(tl.int64)
    pixels = block.to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    valid = pixels < height.to(INDEX) * width
    logits_ptr += image * stride_ln + group * stride_lg
    offsets = _plane_offsets(pixels, stride_lh, stride_lw, width, INDEX)
    space = _softmax(_load_taps(logits_ptr, offsets, stride_lt, valid, KERNEL, TAPS, ACC), KERNEL, TAPS)  # [P, TAPS]
    grad_space_ptr = _space_plane(grad_space_ptr, image, group, groups, height, width, TAPS)
    grad = _load_taps(grad_space_ptr, pixels * TAPS, 1, valid, KERNEL, TAPS, ACC)  # [P, TAPS]
    grad = _softmax_adjoint(space, grad).to(grad_logits_ptr.dtype.element_ty)
    grad_logits_ptr += image * stride_gn + group * stride_gg
    offsets = _plane_offsets(pixels, stride_gh, stride_gw, width, INDEX)
    _store_taps(grad_logits_ptr, offsets, stride_gt, grad, valid, KERNEL, TAPS)


# ---------------------------------------------------------------------------------------------------------------
# Sampling alone: expand_kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[*_SIZES, *(f"stride_{name}" for name in ("on", "oc", "oh", "ow", "mn", "mg", "mt", "mh", "mw"))]
)
def sample_forward(
    space_ptr,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    masks_ptr, stride_mn, stride_mg, stride_mt, stride_mh, stride_mw,
    height, width, tiles_h, tiles_w, groups,
    TAPS_INNER: tl.constexpr, SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write the sampled kernels of one output tile and group."""
    group = tl.program_id(0) % groups
    image, tile_y, tile_x = _unravel(tl.program_id(0) // groups, tiles_h, tiles_w)
    rows, cols = _tile_pixels(tile_y * BLOCK_H, tile_x * BLOCK_W, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < height * SCALE) & (cols < width * SCALE)
    taps = _taps(
        space_ptr, 0, 0, 0, 0, 0,
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        image, group, groups, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, False, ACC, INDEX,
    )  # [M, TAPS]  # fmt: skip
    masks_ptr += image * stride_mn + group.to(tl.int64) * stride_mg
    pixel_offsets = _pixel_offsets(rows, cols, stride_mh, 1 if TAPS_INNER == "w" else stride_mw, INDEX)
    stride_mt = 1 if TAPS_INNER == "t" else stride_mt
    _store_taps(masks_ptr, pixel_offsets, stride_mt, taps.to(masks_ptr.dtype.element_ty), valid, KERNEL, TAPS)


@triton.jit(do_not_specialize=_SIZES)
def sample_backward(
    grad_masks_ptr, stride_mn, stride_mg, stride_mt, stride_mh, stride_mw,
    space_ptr,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_space_ptr,
    grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
    height, width, tiles_h, tiles_w, groups,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Gradient of the sampled kernels -> gradients of the normalised kernel space and of the offsets."""
    group = tl.program_id(0) % groups
    image, tile_y, tile_x = _unravel(tl.program_id(0) // groups, tiles_h, tiles_w)
    rows, cols = _tile_pixels(tile_y * BLOCK_H, tile_x * BLOCK_W, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < height * SCALE) & (cols < width * SCALE)
    grad_masks_ptr += image * stride_mn + group.to(tl.int64) * stride_mg
    pixel_offsets = _pixel_offsets(rows, cols, stride_mh, stride_mw, INDEX)
    _sampling_adjoint(
        _load_taps(grad_masks_ptr, pixel_offsets, stride_mt, valid, KERNEL, TAPS, ACC),
        space_ptr,
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        grad_space_ptr,
        grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
        image, group, groups, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, ACC, INDEX,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Reassembly
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _both(first, second):
    """The mask [A, B] of two masks [A] and [B], either of which is None where all is present."""
    if first is None:
        mask = second[None, :]
    elif second is None:
        mask = first[:, None]
    else:
        mask = first[:, None] & second[None, :]
    return mask


@triton.jit
def _load_present(ptr, offsets, present):
    """`present` [C] is None where all channels are."""
    if present is None:
        values = tl.load(ptr + _unsigned(offsets))
    else:
        values = tl.load(ptr + _unsigned(offsets), mask=present[None, :], other=0.0)
    return values


@triton.jit
def _load_window(
    features_ptr, stride_n, stride_c, stride_h, stride_w,  # in UNITs, but for that of the innermost axis
    image, y, x, first, height, width, channels, present,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, UNIT: tl.constexpr,
    WINDOW_W: tl.constexpr, BLOCK_Q: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Features of BLOCK_Q pixels, from `first` on, of the window that starts at (y, x): [Q, C].

    Pixels outside the image are replaced by their nearest neighbours inside: this takes no masks, and the band gives
    them no weight, nor those that follow the window where it fills no whole piece. ALIGNED rows are read in pairs of
    columns.
    """
    index = first + tl.arange(0, BLOCK_Q)  # [Q]
    # By comparisons, not minima, which would hide from the compiler that neighbours have the same row.
    rows = y + index // WINDOW_W
    rows = tl.where(rows < 0, 0, tl.where(rows < height, rows, height - 1)).to(INDEX)
    channels = channels.to(INDEX)[None, :]
    cols = x + index % WINDOW_W
    inside = tl.where(cols < 0, 0, tl.where(cols < width, cols, width - 1)).to(INDEX)
    if INNER == "c":
        offsets = ((rows * stride_h + inside * stride_w) * UNIT)[:, None] + channels
        features = _load_present(features_ptr + image * stride_n * UNIT, offsets, present)
    elif INNER == "w" and ALIGNED:
        pairs, last = x // 2 + index // 2 % (WINDOW_W // 2), width // 2 - 1
        shift = tl.where(pairs < 0, -2 * pairs, tl.where(pairs < last, 0, 2 * (last - pairs)))
        offsets = (rows * (stride_h // 2 * 2) + cols + shift)[:, None] + channels * (stride_c // 2 * 2)
        features = _load_present(features_ptr + image * (stride_n // 2 * 2), offsets, present)
    elif INNER == "w":  # masks here: from clamped columns the compiler would not see that neighbours are neighbours
        offsets = (rows * stride_h + cols)[:, None] + channels * stride_c
        mask = _both((cols >= 0) & (cols < width), present)
        features = tl.load(features_ptr + image * stride_n + offsets, mask=mask, other=0.0)
    else:
        offsets = (rows * stride_h + inside * stride_w)[:, None] + channels * stride_c
        features = _load_present(features_ptr + image * stride_n, offsets, present)
    return features


@triton.jit
def _store_tile(
    output_ptr, values, image, y, x, height, width, channels_in_all, channels, present,
    CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Outputs [C, M] of the tile at (y, x); `height` and `width` are those of the output, which has no gaps.

    VECTOR divides the width if it is ALIGNED, which outputs with channels last never are.
    """
    index = tl.arange(0, BLOCK_H * BLOCK_W)  # [M]
    rows, cols = (y + index // BLOCK_W).to(INDEX), x + index % BLOCK_W
    channels = channels.to(INDEX)[:, None]
    if ALIGNED:  # runs are inside or not as a whole
        inside = (rows < height) & (x // VECTOR + index // VECTOR % (BLOCK_W // VECTOR) < width // VECTOR)
        width = width // VECTOR * VECTOR
    else:
        inside = (rows < height) & (cols < width)
    pixels = rows * width + cols  # [M]
    if CHANNELS_LAST:
        offsets = (pixels * channels_in_all)[None, :] + channels
    else:
        offsets = pixels[None, :] + channels * (height.to(INDEX) * width)
    output_ptr += image * channels_in_all * height * width
    tl.store(output_ptr + _unsigned(offsets), values, mask=_both(present, inside))


@triton.jit
def _reassemble_channels(
    features_ptr, stride_xn, stride_xc, stride_xh, stride_xw, output_ptr,
    taps,  # [M, TAPS]
    rows, cols,  # [M], of the first source pixel that each output reads, in the window
    window_y, window_x, image, group, part, y, x, height, width, groups, channels_per_group, blocks_per_program,
    INNER: tl.constexpr, ALIGNED: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, LONG_RUN: tl.constexpr, SHORT_RUN: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one tile at (y, x), for the channels of one part of a group."""
    first_channel = part * blocks_per_program * BLOCK_C
    channels_per_group = channels_per_group // RUN * RUN  # so says the compiler's analysis
    channels_in_all = groups * channels_per_group
    last_channel = tl.minimum(first_channel + blocks_per_program * BLOCK_C, channels_per_group)
    for block in range(first_channel, last_channel, BLOCK_C):
        channels = group * channels_per_group + block + tl.arange(0, BLOCK_C)  # [C]
        # In runs, for the compiler to see that neighbours are present or not together.
        present = block // RUN + tl.arange(0, BLOCK_C) // RUN < channels_per_group // RUN
        present = None if RUN == BLOCK_C else present
        output = tl.zeros([BLOCK_C, BLOCK_H * BLOCK_W], ACC)  # [C, M]: fewer registers than [M, C]
        for first in tl.static_range(0, WINDOW_H * WINDOW_W, BLOCK_Q):
            # The compiler builds the bands before the loop over the channels.
            index = first + tl.arange(0, BLOCK_Q)  # [Q]
            window_rows, window_cols = index // WINDOW_W, index % WINDOW_W
            inside = (window_y + window_rows >= 0) & (window_y + window_rows < height)
            inside &= (window_x + window_cols >= 0) & (window_x + window_cols < width)
            window_rows = tl.where(inside, window_rows, WINDOW_H + BLOCK_H)  # out of reach
            band = _band(taps, rows, cols, window_rows, window_cols, KERNEL, TAPS).to(OPERAND)  # [M, Q]
            features = _load_window(
                features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,
                image, window_y, window_x, first, height, width, channels, present,
                INNER, ALIGNED, UNIT, WINDOW_W, BLOCK_Q, INDEX,
            ).to(OPERAND)  # [Q, C]  # fmt: skip
            output = _multiply_add(tl.trans(features), tl.trans(band), output, PRECISION, ACC)
        _store_tile(
            output_ptr, output.to(output_ptr.dtype.element_ty),
            image, y, x, height * SCALE, width * SCALE, channels_in_all, channels, present,
            CHANNELS_LAST, ALIGNED, LONG_RUN if ALIGNED == 2 else SHORT_RUN, BLOCK_H, BLOCK_W, INDEX,
        )  # fmt: skip


@triton.jit(do_not_specialize=[
    *_SIZES, "channels_per_group", "aligned", "stride_xn", "stride_xc", "stride_xh", "stride_xw",
    "stride_kn", "stride_kg", "stride_kt", "stride_kh", "stride_kw", "stride_on", "stride_oc", "stride_oh", "stride_ow",
])  # fmt: skip
def reassemble_forward(
    features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    output_ptr,
    height, width, tiles_h, tiles_w, groups, channels_per_group, slices, blocks_per_program, aligned,
    INNER: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    TAPS_INNER: tl.constexpr, LOGITS: tl.constexpr, SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, LONG_RUN: tl.constexpr, SHORT_RUN: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One output tile, group and slice of channels. The band is built once and serves every channel block.

    INNER and TAPS_INNER name the axis of features and taps whose stride is one ("c" or "w"; "t" or "w"; "" if none is),
    UNIT what divides the other strides of the features, and RUN what divides the channels of a group: facts that hold
    for all sizes of a model's maps, so that none compiles anything anew. `aligned` is no constant: 0, or 1 where
    columns can be read in pairs, and so outputs written in runs of SHORT_RUN, or 2 where these may be of LONG_RUN.
    """
    # Unsigned, which divides in half the instructions.
    program, parts = tl.program_id(0).to(tl.uint32), (groups * slices).to(tl.uint32)
    part, tile = program % parts, program // parts
    group, part = (part // slices.to(tl.uint32)).to(tl.int32), (part % slices.to(tl.uint32)).to(tl.int32)
    tile_x, tile = (tile % tiles_w.to(tl.uint32)).to(tl.int32), tile // tiles_w.to(tl.uint32)
    tile_y, image = (tile % tiles_h.to(tl.uint32)).to(tl.int32), (tile // tiles_h.to(tl.uint32)).to(tl.int64)
    y, x = tile_y * BLOCK_H, tile_x * BLOCK_W
    rows, cols = _tile_pixels(y, x, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < height * SCALE) & (cols < width * SCALE)
    taps = _taps(
        kernels_ptr, stride_kn, stride_kg,
        1 if TAPS_INNER == "t" else stride_kt, stride_kh, 1 if TAPS_INNER == "w" else stride_kw,
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        image, group, groups, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, LOGITS, ACC, INDEX,
    ).to(ROUND)  # [M, TAPS]  # fmt: skip

    window_y, window_x = y // SCALE - KERNEL // 2, ((x // SCALE - KERNEL // 2) >> 1) * 2  # no remainder below zero
    if BLOCK_H % SCALE == 0 and BLOCK_W % (2 * SCALE) == 0:  # then it is the same in every tile
        local = tl.arange(0, BLOCK_H * BLOCK_W)
        rows, cols = local // BLOCK_W // SCALE, local % BLOCK_W // SCALE + KERNEL // 2 % 2
    else:
        rows, cols = rows // SCALE - KERNEL // 2 - window_y, cols // SCALE - KERNEL // 2 - window_x

    # Copies of the loop instead of branches inside, which would cost conversions between their layouts.
    for copy in tl.static_range(3 if INNER == "w" else 1):
        if copy != 1 or SHORT_RUN < LONG_RUN:  # noqa: SIM102, the other condition is no constant
            if aligned == copy:
                _reassemble_channels(
                    features_ptr, stride_xn, stride_xc, stride_xh, stride_xw, output_ptr,
                    taps, rows, cols, window_y, window_x, image, group, part, y, x,
                    height, width, groups, channels_per_group, blocks_per_program,
                    INNER, copy, UNIT, RUN, CHANNELS_LAST, SCALE, KERNEL, TAPS,
                    BLOCK_H, BLOCK_W, WINDOW_H, WINDOW_W, BLOCK_Q, BLOCK_C, LONG_RUN, SHORT_RUN,
                    INDEX, ACC, OPERAND, PRECISION,
                )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def reassemble_backward_features(
    grad_output_ptr, stride_yn, stride_yc, stride_yh, stride_yw,
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,
    height, width, tiles_h, tiles_w, groups, channels_per_group, slices,
    LOGITS: tl.constexpr, SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of source pixels, group and channel block, gathered from every output pixel that read it."""
    part, tile = tl.program_id(0) % (groups * slices), tl.program_id(0) // (groups * slices)
    group, block = part // slices, part % slices * BLOCK_C
    image, tile_y, tile_x = _unravel(tile, tiles_h, tiles_w)
    source_rows, source_cols = _tile_pixels(tile_y * TILE_H, tile_x * TILE_W, TILE_H, TILE_W)  # [Q]
    channels = block + tl.arange(0, BLOCK_C)  # [C]
    present = (channels < channels_per_group)[None, :]
    channels = channels.to(tl.int64)[None, :]

    grad_output_ptr += image * stride_yn + group.to(tl.int64) * channels_per_group * stride_yc
    first_row = tl.maximum(tile_y * TILE_H - KERNEL // 2, 0) * SCALE
    first_col = tl.maximum(tile_x * TILE_W - KERNEL // 2, 0) * SCALE
    last_row = tl.minimum(tile_y * TILE_H + TILE_H + KERNEL // 2, height) * SCALE
    last_col = tl.minimum(tile_x * TILE_W + TILE_W + KERNEL // 2, width) * SCALE
    grad_features = tl.zeros([TILE_H * TILE_W, BLOCK_C], ACC)  # [Q, C]
    for y in range(first_row, last_row, BLOCK_H):
        for x in range(first_col, last_col, BLOCK_W):
            rows, cols = _tile_pixels(y, x, BLOCK_H, BLOCK_W)  # [M]
            valid = (rows < last_row) & (cols < last_col)
            taps = _taps(
                kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
                offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
                image, group, groups, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, LOGITS, ACC, INDEX,
            ).to(ROUND)  # [M, TAPS]  # fmt: skip
            taps = tl.where((tl.arange(0, TAPS) < KERNEL * KERNEL)[None, :], taps, 0.0)  # no NaN out of reach
            first_rows, first_cols = rows // SCALE - KERNEL // 2, cols // SCALE - KERNEL // 2
            band = _band(taps, first_rows, first_cols, source_rows, source_cols, KERNEL, TAPS).to(OPERAND)  # [M, Q]
            pixel_ptrs = (grad_output_ptr + _pixel_offsets(rows, cols, stride_yh, stride_yw, tl.int64))[:, None]
            grad_output = tl.load(pixel_ptrs + channels * stride_yc, mask=valid[:, None] & present, other=0.0)  # [M, C]
            grad_features = _multiply_add(tl.trans(band), grad_output.to(OPERAND), grad_features, PRECISION, ACC)
    grad_features_ptr += image * stride_xn + group.to(tl.int64) * channels_per_group * stride_xc
    pixel_ptrs = (grad_features_ptr + _pixel_offsets(source_rows, source_cols, stride_xh, stride_xw, tl.int64))[:, None]
    tl.store(
        pixel_ptrs + channels * stride_xc,
        grad_features.to(grad_features_ptr.dtype.element_ty),
        mask=((source_rows < height) & (source_cols < width))[:, None] & present,
    )


@triton.jit(do_not_specialize=_SIZES)
def reassemble_backward_kernels(
    grad_output_ptr, stride_yn, stride_yc, stride_yh, stride_yw,
    features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,  # None for masks
    grad_kernels_ptr, stride_mn, stride_mg, stride_mt, stride_mh, stride_mw,  # of masks or logits; None for DLU
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_space_ptr,
    grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
    height, width, tiles_h, tiles_w, groups, channels_per_group,
    LOGITS: tl.constexpr, SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one output tile's kernels; stored, or taken on through softmax or sampling first."""
    group = tl.program_id(0) % groups
    image, tile_y, tile_x = _unravel(tl.program_id(0) // groups, tiles_h, tiles_w)
    rows, cols = _tile_pixels(tile_y * BLOCK_H, tile_x * BLOCK_W, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < height * SCALE) & (cols < width * SCALE)
    window_y = tile_y * BLOCK_H // SCALE - KERNEL // 2
    window_x = tile_x * BLOCK_W // SCALE - KERNEL // 2
    features_ptr += image * stride_xn + group.to(tl.int64) * channels_per_group * stride_xc
    grad_output_ptr += image * stride_yn + group.to(tl.int64) * channels_per_group * stride_yc
    output_ptrs = (grad_output_ptr + _pixel_offsets(rows, cols, stride_yh, stride_yw, tl.int64))[:, None]
    index = tl.arange(0, TAPS)
    real = (index < KERNEL * KERNEL)[None, :]
    u = (rows // SCALE - KERNEL // 2 - window_y)[:, None] + (index // KERNEL)[None, :]
    v = (cols // SCALE - KERNEL // 2 - window_x)[:, None] + (index % KERNEL)[None, :]
    pixel = u * WINDOW_W + v  # where in the window each tap of each output is: [M, TAPS]
    grad_taps = tl.zeros([BLOCK_H * BLOCK_W, TAPS], ACC)  # [M, TAPS]
    for first in range(0, WINDOW_H * WINDOW_W, BLOCK_Q):
        window_rows, window_cols, window_valid = _window_pixels(
            window_y, window_x, first, WINDOW_H, WINDOW_W, BLOCK_Q, height, width
        )  # [Q]
        pixel_ptrs = (features_ptr + _pixel_offsets(window_rows, window_cols, stride_xh, stride_xw, tl.int64))[:, None]
        grad_band = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_Q], ACC)  # [M, Q]
        for block in range(0, channels_per_group, BLOCK_C):
            channels = block + tl.arange(0, BLOCK_C)  # [C]
            present = (channels < channels_per_group)[None, :]
            channels = channels.to(tl.int64)[None, :]
            features = tl.load(
                pixel_ptrs + channels * stride_xc, mask=window_valid[:, None] & present, other=0.0
            )  # [Q, C]
            grad_output = tl.load(
                output_ptrs + channels * stride_yc, mask=valid[:, None] & present, other=0.0
            )  # [M, C]
            grad_band = _multiply_add(
                grad_output.to(OPERAND), tl.trans(features.to(OPERAND)), grad_band, PRECISION, ACC
            )
        here = real & (pixel >= first) & (pixel < first + BLOCK_Q)
        grad_taps += tl.where(here, tl.gather(grad_band, tl.where(here, pixel - first, 0), axis=1), 0.0)
    if grad_kernels_ptr is None:
        _sampling_adjoint(
            grad_taps,
            kernels_ptr,
            offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
            grad_space_ptr,
            grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
            image, group, groups, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, ACC, INDEX,
        )  # fmt: skip
    else:
        if LOGITS:
            taps = _taps(
                kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
                offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
                image, group, groups, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, LOGITS, ACC, INDEX,
            )  # [M, TAPS]  # fmt: skip
            grad_taps = _softmax_adjoint(taps, grad_taps)
            pixel_offsets, stride_mt = _shuffled(rows, cols, stride_mt, stride_mh, stride_mw, SCALE, INDEX)
        else:
            pixel_offsets = _pixel_offsets(rows, cols, stride_mh, stride_mw, INDEX)
        grad_kernels_ptr += image * stride_mn + group.to(tl.int64) * stride_mg
        grad_taps = grad_taps.to(grad_kernels_ptr.dtype.element_ty)
        _store_taps(grad_kernels_ptr, pixel_offsets, stride_mt, grad_taps, valid, KERNEL, TAPS)
