"""Device code of the upsampling operators.

The reassembly of a tile is one small matrix product. A tile of M output pixels reaches a window of Q source
pixels; `_band` spreads the k*k taps of every output pixel over that window, and then

    output [M, C] = band [M, Q] @ features [Q, C]                     forward
    grad_features [Q, C] = band^T [Q, M] @ grad_output [M, C]         summed over the output tiles that reach Q
    grad_band [M, Q] = grad_output [M, C] @ features^T [C, Q]         its k*k entries per row are the mask gradient

CARAFE reads its taps from `masks`; DLU samples them from the normalised kernel space at the learned offsets. Both
arrive as a five-dimensional view, (batch, group, tap, y, x), and every kernel below serves both: `offsets_ptr` is
None for CARAFE.

Addresses are 64-bit, masks keep every access inside its tensor, and sampling coordinates are clamped before they
become integers, so no value of an input can lead outside.
"""

import triton
import triton.language as tl

# Sizes that vary from call to call select no new compilation by themselves; strides do, by their alignment to 16.
_SIZES = ["height", "width", "tiles_h", "tiles_w", "groups", "slices", "blocks", "channels_per_program"]


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
def _pixel_offsets(rows, cols, stride_h, stride_w):
    return rows.to(tl.int64) * stride_h + cols.to(tl.int64) * stride_w


# ---------------------------------------------------------------------------------------------------------------
# Taps: loading, sampling, and the adjoint of sampling
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_taps(pixel_ptrs, stride_t, valid, KERNEL: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr):
    """k*k taps at each pixel, zero beyond: [M, TAPS]."""
    taps = tl.arange(0, TAPS)
    mask = valid[:, None] & (taps < KERNEL * KERNEL)[None, :]
    return tl.load(pixel_ptrs[:, None] + taps.to(tl.int64)[None, :] * stride_t, mask=mask, other=0.0).to(ACC)


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
    low = low.to(tl.int32)
    return low, tl.minimum(low + 1, size - 1), fraction, inside


@triton.jit
def _offset_pointers(
    offsets_ptr, stride_n, stride_c, stride_h, stride_w, image, group, rows, cols, SCALE: tl.constexpr
):  # fmt: skip
    """Pointers to dx and dy of each output pixel: channel 2*group (+1) of the pixel-shuffled offsets. [M], [M]"""
    channel = 2 * group * SCALE * SCALE + rows % SCALE * SCALE + cols % SCALE
    dx_ptrs = offsets_ptr + image * stride_n + _pixel_offsets(rows // SCALE, cols // SCALE, stride_h, stride_w)
    dx_ptrs += channel.to(tl.int64) * stride_c
    return dx_ptrs, dx_ptrs + tl.full([], SCALE * SCALE, tl.int64) * stride_c


@triton.jit
def _sampling_point(
    offsets_ptr, stride_n, stride_c, stride_h, stride_w,
    image, group, rows, cols, valid, height, width, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Cells (y0, y1, x0, x1), fractions (fy, fx) and freedom (moves_y, moves_x) of each output pixel's sample."""
    dx_ptrs, dy_ptrs = _offset_pointers(
        offsets_ptr, stride_n, stride_c, stride_h, stride_w, image, group, rows, cols, SCALE
    )
    dx = tl.load(dx_ptrs, mask=valid, other=0.0).to(ACC)
    dy = tl.load(dy_ptrs, mask=valid, other=0.0).to(ACC)
    y0, y1, fy, moves_y = _clamped_coordinate((rows // SCALE).to(ACC) + dy, height)
    x0, x1, fx, moves_x = _clamped_coordinate((cols // SCALE).to(ACC) + dx, width)
    return y0, y1, x0, x1, fy, fx, moves_y, moves_x


@triton.jit
def _load_corner(space_ptr, stride_t, stride_h, stride_w, y, x, TAPS: tl.constexpr, ACC: tl.constexpr):
    """Normalised kernels at (y, x). Stored padded to TAPS and always inside, so no mask splits the loads."""
    pixel_ptrs = space_ptr + _pixel_offsets(y, x, stride_h, stride_w)
    return tl.load(pixel_ptrs[:, None] + tl.arange(0, TAPS)[None, :] * stride_t).to(ACC)


@triton.jit
def _sample_taps(
    space_ptr, stride_t, stride_h, stride_w, y0, y1, x0, x1, fy, fx, TAPS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Bilinear sample of the kernel space: [M, TAPS]."""
    taps = _load_corner(space_ptr, stride_t, stride_h, stride_w, y0, x0, TAPS, ACC) * ((1 - fy) * (1 - fx))[:, None]
    taps += _load_corner(space_ptr, stride_t, stride_h, stride_w, y0, x1, TAPS, ACC) * ((1 - fy) * fx)[:, None]
    taps += _load_corner(space_ptr, stride_t, stride_h, stride_w, y1, x0, TAPS, ACC) * (fy * (1 - fx))[:, None]
    taps += _load_corner(space_ptr, stride_t, stride_h, stride_w, y1, x1, TAPS, ACC) * (fy * fx)[:, None]
    return taps


@triton.jit
def _taps(
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    image, group, rows, cols, valid, height, width,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reassembly kernels of the given output pixels: read from the masks, or sampled at the offsets. [M, TAPS]"""
    kernels_ptr += image * stride_kn + group.to(tl.int64) * stride_kg
    if offsets_ptr is None:
        pixel_ptrs = kernels_ptr + _pixel_offsets(rows, cols, stride_kh, stride_kw)
        taps = _load_taps(pixel_ptrs, stride_kt, valid, KERNEL, TAPS, ACC)
    else:
        y0, y1, x0, x1, fy, fx, _, _ = _sampling_point(
            offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
            image, group, rows, cols, valid, height, width, SCALE, ACC,
        )  # fmt: skip
        taps = _sample_taps(kernels_ptr, stride_kt, stride_kh, stride_kw, y0, y1, x0, x1, fy, fx, TAPS, ACC)
    return taps


@triton.jit
def _scatter_corner(grad_space_ptr, stride_t, stride_h, stride_w, y, x, grad, mask, TAPS: tl.constexpr):
    """Atomic, into zeros: offsets are unbounded, so any output may reach any cell."""
    pixel_ptrs = grad_space_ptr + _pixel_offsets(y, x, stride_h, stride_w)
    tl.atomic_add(pixel_ptrs[:, None] + tl.arange(0, TAPS)[None, :] * stride_t, grad, mask=mask, sem="relaxed")


@triton.jit
def _sampling_adjoint(
    grad_taps,  # [M, TAPS]
    space_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_space_ptr,  # laid out as the kernel space; None when it is not asked for
    grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,  # likewise
    image, group, rows, cols, valid, height, width,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scatter the gradient of sampled taps into the kernel space, and store that of the offsets."""
    y0, y1, x0, x1, fy, fx, moves_y, moves_x = _sampling_point(
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        image, group, rows, cols, valid, height, width, SCALE, ACC,
    )  # fmt: skip
    kernels = image * stride_kn + group.to(tl.int64) * stride_kg
    if grad_offsets_ptr is not None:
        space_ptr += kernels
        # What each corner of the kernel space would contribute: [M] each.
        c00 = tl.sum(grad_taps * _load_corner(space_ptr, stride_kt, stride_kh, stride_kw, y0, x0, TAPS, ACC), axis=1)
        c01 = tl.sum(grad_taps * _load_corner(space_ptr, stride_kt, stride_kh, stride_kw, y0, x1, TAPS, ACC), axis=1)
        c10 = tl.sum(grad_taps * _load_corner(space_ptr, stride_kt, stride_kh, stride_kw, y1, x0, TAPS, ACC), axis=1)
        c11 = tl.sum(grad_taps * _load_corner(space_ptr, stride_kt, stride_kh, stride_kw, y1, x1, TAPS, ACC), axis=1)
        dx_ptrs, dy_ptrs = _offset_pointers(
            grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw, image, group, rows, cols, SCALE
        )
        grad_dx = tl.where(moves_x, (c01 - c00) * (1 - fy) + (c11 - c10) * fy, 0.0)
        grad_dy = tl.where(moves_y, (c10 - c00) * (1 - fx) + (c11 - c01) * fx, 0.0)
        tl.store(dx_ptrs, grad_dx.to(grad_offsets_ptr.dtype.element_ty), mask=valid)
        tl.store(dy_ptrs, grad_dy.to(grad_offsets_ptr.dtype.element_ty), mask=valid)
    if grad_space_ptr is not None:
        grad_space_ptr += kernels
        mask = valid[:, None] & (tl.arange(0, TAPS) < KERNEL * KERNEL)[None, :]
        w00, w01, w10, w11 = (1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx
        _scatter_corner(grad_space_ptr, stride_kt, stride_kh, stride_kw, y0, x0, grad_taps * w00[:, None], mask, TAPS)
        _scatter_corner(grad_space_ptr, stride_kt, stride_kh, stride_kw, y0, x1, grad_taps * w01[:, None], mask, TAPS)
        _scatter_corner(grad_space_ptr, stride_kt, stride_kh, stride_kw, y1, x0, grad_taps * w10[:, None], mask, TAPS)
        _scatter_corner(grad_space_ptr, stride_kt, stride_kh, stride_kw, y1, x1, grad_taps * w11[:, None], mask, TAPS)


@triton.jit
def _band(taps, rows, cols, window_rows, window_cols, SCALE: tl.constexpr, KERNEL: tl.constexpr):
    """Spread taps [M, TAPS] of output pixels over source pixels [Q]: the weight of each on each, [M, Q]."""
    u = window_rows[None, :] - (rows // SCALE)[:, None] + KERNEL // 2
    v = window_cols[None, :] - (cols // SCALE)[:, None] + KERNEL // 2
    reached = (u >= 0) & (u < KERNEL) & (v >= 0) & (v < KERNEL)
    return tl.where(reached, tl.gather(taps, tl.where(reached, u * KERNEL + v, 0), axis=1), 0.0)


# ---------------------------------------------------------------------------------------------------------------
# Softmax over the taps, into and out of the gather-friendly layout
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _softmax_taps(pixel_ptrs, stride_t, valid, KERNEL: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr):
    """Softmax over the k*k logits of each pixel, zero in the padding: [P, TAPS]."""
    logits = _load_taps(pixel_ptrs, stride_t, valid, KERNEL, TAPS, ACC)
    real = (tl.arange(0, TAPS) < KERNEL * KERNEL)[None, :]
    largest = tl.max(tl.where(real, logits, float("-inf")), axis=1)
    powers = tl.where(real, tl.exp(logits - largest[:, None]), 0.0)
    return powers / tl.sum(powers, axis=1)[:, None]


@triton.jit(do_not_specialize=_SIZES)
def softmax_forward(
    logits_ptr, stride_ln, stride_lg, stride_lt, stride_lh, stride_lw,
    space_ptr, stride_sn, stride_sg, stride_st, stride_sh, stride_sw,
    height, width, groups, blocks,
    KERNEL: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Kernel-space logits -> normalised kernels, taps innermost and padded to TAPS with zeros."""
    block, plane = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, group = (plane // groups).to(tl.int64), (plane % groups).to(tl.int64)
    pixel = block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    valid = pixel < height.to(tl.int64) * width
    rows, cols = pixel // width, pixel % width
    logit_ptrs = logits_ptr + image * stride_ln + group * stride_lg + _pixel_offsets(rows, cols, stride_lh, stride_lw)
    space = _softmax_taps(logit_ptrs, stride_lt, valid, KERNEL, TAPS, ACC)  # [P, TAPS]
    space_ptrs = space_ptr + image * stride_sn + group * stride_sg + _pixel_offsets(rows, cols, stride_sh, stride_sw)
    space_ptrs = space_ptrs[:, None] + tl.arange(0, TAPS)[None, :] * stride_st
    tl.store(space_ptrs, space.to(space_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=_SIZES)
def softmax_backward(
    logits_ptr, stride_ln, stride_lg, stride_lt, stride_lh, stride_lw,
    grad_space_ptr, stride_sn, stride_sg, stride_st, stride_sh, stride_sw,
    grad_logits_ptr, stride_gn, stride_gg, stride_gt, stride_gh, stride_gw,
    height, width, groups, blocks,
    KERNEL: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """grad_logits = S * (grad_S - sum(S * grad_S)), with S recomputed from the logits."""
    block, plane = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, group = (plane // groups).to(tl.int64), (plane % groups).to(tl.int64)
    pixel = block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    valid = pixel < height.to(tl.int64) * width
    rows, cols = pixel // width, pixel % width
    logit_ptrs = logits_ptr + image * stride_ln + group * stride_lg + _pixel_offsets(rows, cols, stride_lh, stride_lw)
    space = _softmax_taps(logit_ptrs, stride_lt, valid, KERNEL, TAPS, ACC)  # [P, TAPS]
    space_ptrs = grad_space_ptr + image * stride_sn + group * stride_sg
    space_ptrs += _pixel_offsets(rows, cols, stride_sh, stride_sw)
    grad = _load_taps(space_ptrs, stride_st, valid, KERNEL, TAPS, ACC)  # [P, TAPS]
    grad = space * (grad - tl.sum(space * grad, axis=1)[:, None])
    taps = tl.arange(0, TAPS)
    grad_ptrs = grad_logits_ptr + image * stride_gn + group * stride_gg
    grad_ptrs += _pixel_offsets(rows, cols, stride_gh, stride_gw)
    tl.store(
        grad_ptrs[:, None] + taps.to(tl.int64)[None, :] * stride_gt,
        grad.to(grad_logits_ptr.dtype.element_ty),
        mask=valid[:, None] & (taps < KERNEL * KERNEL)[None, :],
    )


# ---------------------------------------------------------------------------------------------------------------
# Sampling alone: expand_kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def sample_forward(
    space_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    masks_ptr, stride_mn, stride_mg, stride_mt, stride_mh, stride_mw,
    height, width, tiles_h, tiles_w, groups,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write the sampled kernels of one output tile and group."""
    group = tl.program_id(0) % groups
    image, tile_y, tile_x = _unravel(tl.program_id(0) // groups, tiles_h, tiles_w)
    rows, cols = _tile_pixels(tile_y * BLOCK_H, tile_x * BLOCK_W, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < height * SCALE) & (cols < width * SCALE)
    taps = _taps(
        space_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        image, group, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, ACC,
    )  # [M, TAPS]  # fmt: skip
    index = tl.arange(0, TAPS)
    mask_ptrs = masks_ptr + image * stride_mn + group.to(tl.int64) * stride_mg
    mask_ptrs += _pixel_offsets(rows, cols, stride_mh, stride_mw)
    tl.store(
        mask_ptrs[:, None] + index.to(tl.int64)[None, :] * stride_mt,
        taps.to(masks_ptr.dtype.element_ty),
        mask=valid[:, None] & (index < KERNEL * KERNEL)[None, :],
    )


@triton.jit(do_not_specialize=_SIZES)
def sample_backward(
    grad_masks_ptr, stride_mn, stride_mg, stride_mt, stride_mh, stride_mw,
    space_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_space_ptr,
    grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
    height, width, tiles_h, tiles_w, groups,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the sampled kernels -> gradients of the normalised kernel space and of the offsets."""
    group = tl.program_id(0) % groups
    image, tile_y, tile_x = _unravel(tl.program_id(0) // groups, tiles_h, tiles_w)
    rows, cols = _tile_pixels(tile_y * BLOCK_H, tile_x * BLOCK_W, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < height * SCALE) & (cols < width * SCALE)
    pixel_ptrs = grad_masks_ptr + image * stride_mn + group.to(tl.int64) * stride_mg
    pixel_ptrs += _pixel_offsets(rows, cols, stride_mh, stride_mw)
    _sampling_adjoint(
        _load_taps(pixel_ptrs, stride_mt, valid, KERNEL, TAPS, ACC),
        space_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        grad_space_ptr,
        grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
        image, group, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, ACC,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Reassembly
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def reassemble_forward(
    features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    output_ptr, stride_yn, stride_yc, stride_yh, stride_yw,
    height, width, tiles_h, tiles_w, groups, channels_per_group, slices, channels_per_program,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One output tile, group and slice of channels. The band is built once and serves every channel block."""
    part, tile = tl.program_id(0) % (groups * slices), tl.program_id(0) // (groups * slices)
    group, first_channel = part // slices, part % slices * channels_per_program
    image, tile_y, tile_x = _unravel(tile, tiles_h, tiles_w)
    rows, cols = _tile_pixels(tile_y * BLOCK_H, tile_x * BLOCK_W, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < height * SCALE) & (cols < width * SCALE)
    window_y = tile_y * BLOCK_H // SCALE - KERNEL // 2
    window_x = tile_x * BLOCK_W // SCALE - KERNEL // 2
    taps = _taps(
        kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        image, group, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, ACC,
    )  # [M, TAPS]  # fmt: skip

    features_ptr += image * stride_xn + group.to(tl.int64) * channels_per_group * stride_xc
    output_ptr += image * stride_yn + group.to(tl.int64) * channels_per_group * stride_yc
    output_ptrs = (output_ptr + _pixel_offsets(rows, cols, stride_yh, stride_yw))[:, None]
    last_channel = tl.minimum(first_channel + channels_per_program, channels_per_group)
    for block in range(first_channel, last_channel, BLOCK_C):
        channels = block + tl.arange(0, BLOCK_C)  # [C]
        present = (channels < channels_per_group)[None, :]
        channels = channels.to(tl.int64)[None, :]
        output = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], ACC)  # [M, C]
        # Usually one turn, whose band the compiler builds before the loop over the channels.
        for first in range(0, WINDOW_H * WINDOW_W, BLOCK_Q):
            window_rows, window_cols, window_valid = _window_pixels(
                window_y, window_x, first, WINDOW_H, WINDOW_W, BLOCK_Q, height, width
            )  # [Q]
            band = _band(taps, rows, cols, window_rows, window_cols, SCALE, KERNEL).to(ROUND).to(OPERAND)  # [M, Q]
            pixel_ptrs = (features_ptr + _pixel_offsets(window_rows, window_cols, stride_xh, stride_xw))[:, None]
            features = tl.load(
                pixel_ptrs + channels * stride_xc, mask=window_valid[:, None] & present, other=0.0
            )  # [Q, C]
            output = tl.dot(band, features.to(OPERAND), output, input_precision=PRECISION, out_dtype=ACC)
        tl.store(
            output_ptrs + channels * stride_yc,
            output.to(output_ptr.dtype.element_ty),
            mask=valid[:, None] & present,
        )


@triton.jit(do_not_specialize=_SIZES)
def reassemble_backward_features(
    grad_output_ptr, stride_yn, stride_yc, stride_yh, stride_yw,
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,
    height, width, tiles_h, tiles_w, groups, channels_per_group, slices,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
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
                image, group, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, ACC,
            )  # [M, TAPS]  # fmt: skip
            band = _band(taps, rows, cols, source_rows, source_cols, SCALE, KERNEL).to(ROUND).to(OPERAND)  # [M, Q]
            pixel_ptrs = (grad_output_ptr + _pixel_offsets(rows, cols, stride_yh, stride_yw))[:, None]
            grad_output = tl.load(pixel_ptrs + channels * stride_yc, mask=valid[:, None] & present, other=0.0)  # [M, C]
            grad_features = tl.dot(
                tl.trans(band), grad_output.to(OPERAND), grad_features, input_precision=PRECISION, out_dtype=ACC
            )
    grad_features_ptr += image * stride_xn + group.to(tl.int64) * channels_per_group * stride_xc
    pixel_ptrs = (grad_features_ptr + _pixel_offsets(source_rows, source_cols, stride_xh, stride_xw))[:, None]
    tl.store(
        pixel_ptrs + channels * stride_xc,
        grad_features.to(grad_features_ptr.dtype.element_ty),
        mask=((source_rows < height) & (source_cols < width))[:, None] & present,
    )


@triton.jit(do_not_specialize=_SIZES)
def reassemble_backward_kernels(
    grad_output_ptr, stride_yn, stride_yc, stride_yh, stride_yw,
    features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,
    grad_masks_ptr, stride_mn, stride_mg, stride_mt, stride_mh, stride_mw,  # CARAFE; None for DLU
    space_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,  # DLU from here on; None for CARAFE
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_space_ptr,
    grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
    height, width, tiles_h, tiles_w, groups, channels_per_group,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one output tile's kernels; stored as mask gradient, or taken on through the sampling."""
    group = tl.program_id(0) % groups
    image, tile_y, tile_x = _unravel(tl.program_id(0) // groups, tiles_h, tiles_w)
    rows, cols = _tile_pixels(tile_y * BLOCK_H, tile_x * BLOCK_W, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < height * SCALE) & (cols < width * SCALE)
    window_y = tile_y * BLOCK_H // SCALE - KERNEL // 2
    window_x = tile_x * BLOCK_W // SCALE - KERNEL // 2
    features_ptr += image * stride_xn + group.to(tl.int64) * channels_per_group * stride_xc
    grad_output_ptr += image * stride_yn + group.to(tl.int64) * channels_per_group * stride_yc
    output_ptrs = (grad_output_ptr + _pixel_offsets(rows, cols, stride_yh, stride_yw))[:, None]
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
        pixel_ptrs = (features_ptr + _pixel_offsets(window_rows, window_cols, stride_xh, stride_xw))[:, None]
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
            grad_band = tl.dot(
                grad_output.to(OPERAND), tl.trans(features.to(OPERAND)), grad_band,
                input_precision=PRECISION, out_dtype=ACC,
            )  # fmt: skip
        here = real & (pixel >= first) & (pixel < first + BLOCK_Q)
        grad_taps += tl.where(here, tl.gather(grad_band, tl.where(here, pixel - first, 0), axis=1), 0.0)
    if grad_masks_ptr is not None:
        mask_ptrs = grad_masks_ptr + image * stride_mn + group.to(tl.int64) * stride_mg
        mask_ptrs += _pixel_offsets(rows, cols, stride_mh, stride_mw)
        tl.store(
            mask_ptrs[:, None] + index.to(tl.int64)[None, :] * stride_mt,
            grad_taps.to(grad_masks_ptr.dtype.element_ty),
            mask=valid[:, None] & real,
        )
    else:
        _sampling_adjoint(
            grad_taps,
            space_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
            offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
            grad_space_ptr,
            grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
            image, group, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, ACC,
        )  # fmt: skip
