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

# Arguments that vary from call to call, which, like strides, select no new compilation.
_SIZES = ["height", "width", "output_height", "output_width", "tiles_h", "tiles_w", "groups", "slices", "blocks"]


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
def _pixel_offsets(rows, cols, stride_h, stride_w, INDEX: tl.constexpr):
    return rows.to(INDEX) * stride_h + cols.to(INDEX) * stride_w


@triton.jit
def _unsigned(offsets):
    """Offsets are never negative where they are used; unsigned ones take fewer instructions to become addresses."""
    return offsets.to(tl.uint32) if offsets.dtype == tl.int32 else offsets


@triton.jit
def _load(pointers, mask):
    """`mask` is None where all is present."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


# ---------------------------------------------------------------------------------------------------------------
# Taps: loading, sampling, and the adjoint of sampling
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_taps(
    plane_ptr, pixel_offsets, stride_t, valid, KERNEL: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """k*k taps at each pixel, zero beyond: [M, TAPS]."""
    taps = tl.arange(0, TAPS)
    offsets = pixel_offsets[:, None] + taps.to(pixel_offsets.dtype)[None, :] * stride_t
    return _load(plane_ptr + _unsigned(offsets), _both(valid, taps < KERNEL * KERNEL)).to(ACC)


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
def _sum_of_products(a, b):
    """Sums over the taps of a * b, [M, TAPS] both: [M], the same bits in all lanes that hold one.

    Without + 0.0 the compiler fuses a product with the first addition of the sum. Each lane then leaves another product
    unrounded, and lanes differ.
    """
    return tl.sum(a * b + 0.0, axis=1)


@triton.jit
def _softmax_adjoint(taps, grad_taps):
    """Gradient of the logits from the taps, their softmax, and the gradient of these: [M, TAPS]."""
    return taps * (grad_taps - _sum_of_products(taps, grad_taps)[:, None])


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
    dx = _load(dx_ptrs, valid).to(ACC)
    dy = _load(dy_ptrs, valid).to(ACC)
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
def _once(x):
    """x, computed once and exchanged between threads, where the compiler would compute it again in each layout."""
    return tl.reshape(tl.cumsum(tl.reshape(x, [x.shape[0], 1]), axis=1), [x.shape[0]])


@triton.jit
def _fixed_point(largest, count_bits, INVERSE: tl.constexpr):
    """Two powers of two, one after the other since their product may pass the exponents, by which gradients become
    64-bit integers, or sums of these again gradients: the sum of 2^count_bits numbers, none beyond `largest`, times
    their weights in [0, 1], stays below 2^62. NaN for the way back where `largest` is not finite.
    """
    if largest.dtype == tl.float64:
        BITS: tl.constexpr = tl.int64
        MANTISSA: tl.constexpr = 52
        BIAS: tl.constexpr = 1023
    else:
        BITS: tl.constexpr = tl.int32
        MANTISSA: tl.constexpr = 23
        BIAS: tl.constexpr = 127
    field = (largest.to(BITS, bitcast=True) >> MANTISSA) & (2 * BIAS + 1)  # 2^(field - BIAS) <= largest, and not twice
    power = 61 - count_bits + BIAS - 1 - field
    first, second = power >> 1, power - (power >> 1)
    if INVERSE:
        first, second = -first, -second
    first = ((first + BIAS) << MANTISSA).to(largest.dtype, bitcast=True)
    second = ((second + BIAS) << MANTISSA).to(largest.dtype, bitcast=True)
    if INVERSE:
        first = tl.where(field == 2 * BIAS + 1, float("nan"), first)
    return first, second


@triton.jit
def _add_to_cells(
    plane_ptr, y, x, height, width, gradients, present, count_bits,
    KERNEL: tl.constexpr, TAPS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Add gradients [P, TAPS] to the kernels at (y, x), by atomic additions into zeros: offsets are unbounded, so any
    output may reach any cell. Where `count_bits` is given, as integers, whose sums do not depend on their order.
    """
    offsets = _cell_offsets(y, x, width, TAPS, INDEX)
    fours = tl.arange(0, TAPS) // 4 < (KERNEL * KERNEL + 3) // 4  # as many as sm_90 adds at a time
    mask = present[:, None] & fours[None, :]
    if count_bits is None:
        tl.atomic_add(plane_ptr + offsets, gradients, mask=mask, sem="relaxed")
    else:
        whole = gradients.to(tl.int64)  # truncated, by less than a unit
        tl.atomic_add(plane_ptr + offsets, whole, mask=mask, sem="relaxed")
        if gradients.dtype == tl.float64:  # what 62 bits leave of 53 and the distance from the largest
            rest = (gradients - whole.to(tl.float64)) * (tl.full([], 1, tl.int64) << (61 - count_bits)).to(tl.float64)
            plane_ptr += height.to(tl.int64) * width * TAPS
            tl.atomic_add(plane_ptr + offsets, rest.to(tl.int64), mask=mask, sem="relaxed")


@triton.jit
def _cell_weights(start, low, high, fraction, inside, CELLS: tl.constexpr):
    """Weights of CELLS cells from `start` on, along one axis, in samples between `low` and `high`: [CELLS, M]."""
    cells = (start + tl.arange(0, CELLS))[:, None]
    low, high = tl.where(inside, low, start - 1)[None, :], tl.where(inside, high, start - 1)[None, :]
    return tl.where(cells == low, 1 - fraction[None, :], tl.where(cells == high, fraction[None, :], 0.0))


@triton.jit
def _sampling_adjoint(
    grad_taps,  # [M, TAPS]
    space_ptr,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_space_ptr, largest_ptr, count_bits,  # None when not asked for; see `_fixed_point` for the last two
    grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,  # None when they are not asked for
    image, group, groups, y, x, rows, cols, valid, height, width,
    SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    CELLS: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradient of a tile's sampled taps to that of the kernel space, and store that of the offsets, which is
    zero where outputs are cut off: there `valid` is not, and the gradient of the taps is zero."""
    y0, y1, x0, x1, fy, fx, moves_y, moves_x = _sampling_point(
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        image, group, rows, cols, valid, height, width, SCALE, ACC, INDEX,
    )  # fmt: skip
    if grad_offsets_ptr is not None:
        plane_ptr = _space_plane(space_ptr, image, group, groups, height, width, TAPS)
        # What each corner of the kernel space would contribute: [M] each.
        c00 = _sum_of_products(grad_taps, _load_corner(plane_ptr, y0, x0, width, TAPS, ACC, INDEX))
        c01 = _sum_of_products(grad_taps, _load_corner(plane_ptr, y0, x1, width, TAPS, ACC, INDEX))
        c10 = _sum_of_products(grad_taps, _load_corner(plane_ptr, y1, x0, width, TAPS, ACC, INDEX))
        c11 = _sum_of_products(grad_taps, _load_corner(plane_ptr, y1, x1, width, TAPS, ACC, INDEX))
        dx_ptrs, dy_ptrs = _offset_pointers(
            grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw, image, group, rows, cols, SCALE, INDEX
        )
        grad_dx = tl.where(moves_x & valid, (c01 - c00) * (1 - fy) + (c11 - c10) * fy, 0.0)
        grad_dy = tl.where(moves_y & valid, (c10 - c00) * (1 - fx) + (c11 - c01) * fx, 0.0)
        present = (rows < height * SCALE) & (cols < width * SCALE)
        tl.store(dx_ptrs, grad_dx.to(grad_offsets_ptr.dtype.element_ty), mask=present)
        tl.store(dy_ptrs, grad_dy.to(grad_offsets_ptr.dtype.element_ty), mask=present)
    if grad_space_ptr is not None:
        y0, x0, fy, fx = _once(y0), _once(x0), _once(fy), _once(fx)
        y1, x1 = tl.minimum(y0 + 1, height - 1), tl.minimum(x0 + 1, width - 1)
        if largest_ptr is None:
            plane_ptr = _space_plane(grad_space_ptr, image, group, groups, height, width, TAPS)
        else:
            LIMBS: tl.constexpr = 2 if ACC == tl.float64 else 1
            plane_ptr = _space_plane(grad_space_ptr, image, group, groups, height, width, LIMBS * TAPS)
            first, second = _fixed_point(tl.load(largest_ptr + image * groups + group), count_bits, False)
            grad_taps = grad_taps * first * second  # before products, whose TF32 parts lose digits of tiny values
            # The last tap of the first cell is padding: it counts programs that saw NaN, for `softmax_backward`.
            unknown = tl.max((valid & ((fy != fy) | (fx != fx))).to(tl.int64), axis=0)
            tl.atomic_add(plane_ptr + TAPS - 1, unknown, mask=unknown > 0, sem="relaxed")
        # Outputs whose points stay in a window of cells around the tile are summed by a matrix product first, so that
        # each cell takes one addition instead of four for each output.
        apart = valid
        if CELLS > 0:
            window_y = y // SCALE - (CELLS - BLOCK_H // SCALE) // 2
            window_x = x // SCALE - (CELLS - BLOCK_W // SCALE) // 2
            inside = (y0 >= window_y) & (y1 < window_y + CELLS) & (x0 >= window_x) & (x1 < window_x + CELLS)
            inside &= valid & (fy == fy) & (fx == fx)
            total = tl.zeros([BLOCK_H * BLOCK_W], ACC) + tl.sum(grad_taps)
            # Or the product would spread what is not finite. No product is fused into this sum: all lanes agree on it.
            inside &= tl.abs(total) < float("inf")
            apart = valid & ~inside
            if tl.max(inside.to(tl.int32), axis=0) > 0:
                weights_y = _cell_weights(window_y, y0, y1, fy, inside, CELLS)  # [CELLS, M]
                weights_x = _cell_weights(window_x, x0, x1, fx, inside, CELLS)  # [CELLS, M]
                weights = weights_y[:, None, :] * weights_x[None, :, :]
                weights = tl.reshape(weights, [CELLS * CELLS, BLOCK_H * BLOCK_W])  # [Q, M]
                sums = tl.zeros([CELLS * CELLS, TAPS], ACC)
                sums = _multiply_add(weights, grad_taps, sums, PRECISION, ACC)  # [Q, TAPS]
                cells = tl.arange(0, CELLS * CELLS)
                cells_y, cells_x = window_y + cells // CELLS, window_x + cells % CELLS
                # By the largest weight: lanes may differ in the last bit of a sum of products.
                touched = (tl.max(weights, axis=1) > 0) & (cells_y >= 0) & (cells_y < height)
                touched &= (cells_x >= 0) & (cells_x < width)
                _add_to_cells(
                    plane_ptr, cells_y, cells_x, height, width, sums, touched, count_bits, KERNEL, TAPS, INDEX
                )
        if tl.max(apart.to(tl.int32), axis=0) > 0:
            for corner in tl.static_range(4):
                corner_y, weight_y = y1 if corner // 2 else y0, fy if corner // 2 else 1 - fy
                corner_x, weight_x = x1 if corner % 2 else x0, fx if corner % 2 else 1 - fx
                gradients = grad_taps * (weight_y * weight_x)[:, None]  # [M, TAPS]
                _add_to_cells(
                    plane_ptr, corner_y, corner_x, height, width, gradients, apart, count_bits, KERNEL, TAPS, INDEX
                )


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
    """a @ b + c. "tf32x3", of float32, is three TF32 products and as accurate as float32 for values of at least 2^-112;
    below, TF32 cannot hold the low parts. Triton's own form of it takes more instructions, to keep an infinite operand
    apart from others, which the zeros of a band prevent anyway."""
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
    zeros_ptr,  # None, or what gradients of as many kernels will be added to
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
    if zeros_ptr is not None:
        zeros = tl.zeros([BLOCK_P, TAPS], zeros_ptr.dtype.element_ty)
        LIMBS: tl.constexpr = 2 if zeros_ptr.dtype.element_ty == tl.int64 and ACC == tl.float64 else 1
        zeros_ptr = _space_plane(zeros_ptr, image, group, groups, height, width, LIMBS * TAPS)
        for _ in tl.static_range(LIMBS):
            tl.store(zeros_ptr + space_offsets, zeros, mask=valid[:, None])
            zeros_ptr += height.to(tl.int64) * width * TAPS


@triton.jit(do_not_specialize=[
    *_SIZES, "count_bits", *(f"stride_{name}" for name in ("ln", "lg", "lt", "lh", "lw", "gn", "gg", "gt", "gh", "gw"))
])  # fmt: skip
def softmax_backward(
    logits_ptr, stride_ln, stride_lg, stride_lt, stride_lh, stride_lw,
    grad_space_ptr, largest_ptr, count_bits,  # None, or integers as `_fixed_point` has them
    grad_logits_ptr, stride_gn, stride_gg, stride_gt, stride_gh, stride_gw,
    height, width, groups, blocks,
    TAPS_INNER: tl.constexpr, GRAD_TAPS_INNER: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Gradient of the normalised kernels -> gradient of the logits, whose softmax is computed again."""
    block, plane = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, group = (plane // groups).to(tl.int64), (plane % groups).to(tl.int64)
    pixels = block.to(INDEX) * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    valid = pixels < height.to(INDEX) * width
    logits_ptr += image * stride_ln + group * stride_lg
    offsets = _plane_offsets(pixels, stride_lh, 1 if TAPS_INNER == "w" else stride_lw, width, INDEX)
    stride_lt = 1 if TAPS_INNER == "t" else stride_lt
    space = _softmax(_load_taps(logits_ptr, offsets, stride_lt, valid, KERNEL, TAPS, ACC), KERNEL, TAPS)  # [P, TAPS]
    space_offsets = _unsigned(pixels[:, None] * TAPS + tl.arange(0, TAPS)[None, :])
    if largest_ptr is None:
        grad_space_ptr = _space_plane(grad_space_ptr, image, group, groups, height, width, TAPS)
        grad = tl.load(grad_space_ptr + space_offsets, mask=valid[:, None], other=0.0)  # [P, TAPS]
    else:
        first, second = _fixed_point(tl.load(largest_ptr + plane), count_bits, True)
        LIMBS: tl.constexpr = 2 if ACC == tl.float64 else 1
        grad_space_ptr = _space_plane(grad_space_ptr, image, group, groups, height, width, LIMBS * TAPS)
        first = tl.where(tl.load(grad_space_ptr + TAPS - 1) == 0, first, float("nan"))  # see `_sampling_adjoint`
        grad = tl.load(grad_space_ptr + space_offsets, mask=valid[:, None], other=0).to(ACC)  # [P, TAPS]
        if LIMBS == 2:
            grad_space_ptr += height.to(tl.int64) * width * TAPS
            rest = tl.load(grad_space_ptr + space_offsets, mask=valid[:, None], other=0).to(ACC)
            grad += rest / (tl.full([], 1, tl.int64) << (61 - count_bits)).to(ACC)
        grad = grad * first * second
    grad = tl.where((tl.arange(0, TAPS) < KERNEL * KERNEL)[None, :], grad, 0.0)
    grad = _softmax_adjoint(space, grad).to(grad_logits_ptr.dtype.element_ty)
    grad_logits_ptr += image * stride_gn + group * stride_gg
    offsets = _plane_offsets(pixels, stride_gh, 1 if GRAD_TAPS_INNER == "w" else stride_gw, width, INDEX)
    stride_gt = 1 if GRAD_TAPS_INNER == "t" else stride_gt
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
    height, width, output_height, output_width, tiles_h, tiles_w, groups,
    TAPS_INNER: tl.constexpr, SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Write the sampled kernels of one output tile and group."""
    group = tl.program_id(0) % groups
    image, tile_y, tile_x = _unravel(tl.program_id(0) // groups, tiles_h, tiles_w)
    rows, cols = _tile_pixels(tile_y * BLOCK_H, tile_x * BLOCK_W, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < output_height) & (cols < output_width)
    taps = _taps(
        space_ptr, 0, 0, 0, 0, 0,
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        image, group, groups, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, False, ACC, INDEX,
    )  # [M, TAPS]  # fmt: skip
    masks_ptr += image * stride_mn + group.to(tl.int64) * stride_mg
    pixel_offsets = _pixel_offsets(rows, cols, stride_mh, 1 if TAPS_INNER == "w" else stride_mw, INDEX)
    stride_mt = 1 if TAPS_INNER == "t" else stride_mt
    _store_taps(masks_ptr, pixel_offsets, stride_mt, taps.to(masks_ptr.dtype.element_ty), valid, KERNEL, TAPS)


@triton.jit(do_not_specialize=[
    *_SIZES, "count_bits",
    *(f"stride_{name}" for name in ("mn", "mg", "mt", "mh", "mw", "on", "oc", "oh", "ow", "gn", "gc", "gh", "gw")),
])  # fmt: skip
def sample_backward(
    grad_masks_ptr, stride_mn, stride_mg, stride_mt, stride_mh, stride_mw,
    space_ptr,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_space_ptr, largest_ptr, count_bits,
    grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
    height, width, output_height, output_width, tiles_h, tiles_w, groups,
    TAPS_INNER: tl.constexpr, SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, CELLS: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the sampled kernels -> gradients of the normalised kernel space and of the offsets."""
    group = tl.program_id(0) % groups
    image, tile_y, tile_x = _unravel(tl.program_id(0) // groups, tiles_h, tiles_w)
    y, x = tile_y * BLOCK_H, tile_x * BLOCK_W
    rows, cols = _tile_pixels(y, x, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < output_height) & (cols < output_width)
    grad_masks_ptr += image * stride_mn + group.to(tl.int64) * stride_mg
    pixel_offsets = _pixel_offsets(rows, cols, stride_mh, 1 if TAPS_INNER == "w" else stride_mw, INDEX)
    stride_mt = 1 if TAPS_INNER == "t" else stride_mt
    _sampling_adjoint(
        _load_taps(grad_masks_ptr, pixel_offsets, stride_mt, valid, KERNEL, TAPS, ACC),
        space_ptr,
        offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
        grad_space_ptr, largest_ptr, count_bits,
        grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
        image, group, groups, y, x, rows, cols, valid, height, width,
        SCALE, KERNEL, TAPS, BLOCK_H, BLOCK_W, CELLS, ACC, INDEX, SUM_PRECISION,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Reassembly
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _both(first, second):
    """The mask [A, B] of two masks [A] and [B], either of which is None where all is present."""
    if first is None:
        mask = None if second is None else second[None, :]
    elif second is None:
        mask = first[:, None]
    else:
        mask = first[:, None] & second[None, :]
    return mask


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
        features = _load(
            features_ptr + image * stride_n * UNIT + _unsigned(offsets), None if present is None else present[None, :]
        )
    elif INNER == "w" and ALIGNED:
        pairs, last = x // 2 + index // 2 % (WINDOW_W // 2), width // 2 - 1
        shift = tl.where(pairs < 0, -2 * pairs, tl.where(pairs < last, 0, 2 * (last - pairs)))
        offsets = (rows * (stride_h // 2 * 2) + cols + shift)[:, None] + channels * (stride_c // 2 * 2)
        features = _load(
            features_ptr + image * (stride_n // 2 * 2) + _unsigned(offsets),
            None if present is None else present[None, :],
        )
    elif INNER == "w":  # masks here: from clamped columns the compiler would not see that neighbours are neighbours
        offsets = (rows * stride_h + cols)[:, None] + channels * stride_c
        mask = _both((cols >= 0) & (cols < width), present)
        features = tl.load(features_ptr + image * stride_n + offsets, mask=mask, other=0.0)
    else:
        offsets = (rows * stride_h + inside * stride_w)[:, None] + channels * stride_c
        features = _load(
            features_ptr + image * stride_n + _unsigned(offsets), None if present is None else present[None, :]
        )
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
    window_y, window_x, image, group, part, y, x, height, width, output_height, output_width,
    groups, channels_per_group, blocks_per_program,
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
            image, y, x, output_height, output_width, channels_in_all, channels, present,
            CHANNELS_LAST, ALIGNED, LONG_RUN if ALIGNED == 2 else SHORT_RUN, BLOCK_H, BLOCK_W, INDEX,
        )  # fmt: skip


@triton.jit(do_not_specialize=[
    *_SIZES, "blocks_per_program", "channels_per_group", "aligned", "stride_xn", "stride_xc", "stride_xh", "stride_xw",
    "stride_kn", "stride_kg", "stride_kt", "stride_kh", "stride_kw", "stride_on", "stride_oc", "stride_oh", "stride_ow",
])  # fmt: skip
def reassemble_forward(
    features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    output_ptr,
    height, width, output_height, output_width, tiles_h, tiles_w, groups, channels_per_group, slices,
    blocks_per_program, aligned,
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
    valid = (rows < output_height) & (cols < output_width)
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
                    height, width, output_height, output_width, groups, channels_per_group, blocks_per_program,
                    INNER, copy, UNIT, RUN, CHANNELS_LAST, SCALE, KERNEL, TAPS,
                    BLOCK_H, BLOCK_W, WINDOW_H, WINDOW_W, BLOCK_Q, BLOCK_C, LONG_RUN, SHORT_RUN,
                    INDEX, ACC, OPERAND, PRECISION,
                )  # fmt: skip


@triton.jit
def _map_offsets(
    rows, cols, channels, stride_c, stride_h, stride_w,
    INNER: tl.constexpr, UNIT: tl.constexpr, INDEX: tl.constexpr, SIGNED: tl.constexpr = False,
):  # fmt: skip
    """Offsets [P, C] of pixels [P] and channels [C] in a map whose strides are in UNITs, but for the innermost one.

    SIGNED where pixels may be before the first.
    """
    rows, cols, channels = rows.to(INDEX), cols.to(INDEX), channels.to(INDEX)[None, :]
    if INNER == "c":
        offsets = ((rows * stride_h + cols * stride_w) * UNIT)[:, None] + channels
    elif INNER == "w":
        offsets = (rows * stride_h * UNIT + cols)[:, None] + channels * stride_c * UNIT
    else:
        offsets = (rows * stride_h + cols * stride_w)[:, None] + channels * stride_c
    return offsets if SIGNED else _unsigned(offsets)


@triton.jit
def _channel_offset(channel, stride_c, INNER: tl.constexpr, UNIT: tl.constexpr):
    """Offset of a 64-bit channel in a map as `_map_offsets` has it."""
    return channel * stride_c * (UNIT if INNER == "w" else 1)


@triton.jit
def _output_pointers(map_ptr, y, x, stride_h, stride_w, INNER: tl.constexpr, UNIT: tl.constexpr):
    """Where pixel (y, x), perhaps outside, of an image of a map is, to add offsets of `_map_offsets` to."""
    y, x = y.to(tl.int64), x.to(tl.int64)
    return map_ptr + (y * stride_h * UNIT + x * (1 if INNER == "w" else stride_w * UNIT))


@triton.jit
def _pieces_inside(start, size, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """The first of PIECES blocks from `start` on that reaches into [0, size), and how many do."""
    first = tl.maximum(-start, 0) // BLOCK
    last = tl.minimum((tl.maximum(size - start, 0) + BLOCK - 1) // BLOCK, PIECES)
    return first, tl.maximum(last - first, 0)


@triton.jit
def _gather_strip(
    grad_output_ptr, stride_yc, stride_yh, stride_yw,  # of one image
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_features_ptr, stride_xc, stride_xh, stride_xw,  # of one image
    above, below,  # [C, Q], of the step before
    image, group, groups, strip_y, strip_x, first_step, last_step, channels, present,
    height, width, output_height, output_width,
    MASKED: tl.constexpr, INNER: tl.constexpr, UNIT: tl.constexpr, GRAD_INNER: tl.constexpr, GRAD_UNIT: tl.constexpr,
    TAPS_INNER: tl.constexpr, LOGITS: tl.constexpr, SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    STEP_H: tl.constexpr, STRIP_W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    PIECES_H: tl.constexpr, PIECES_W: tl.constexpr, BLOCK_C: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of steps of a strip, STEP_H rows each.

    Outputs of STEP_H source rows reach the rows `above` and `below` their middle, as many each; after a step `above`
    is complete, and `below` is what the next one goes on with.
    """
    RADIUS: tl.constexpr = KERNEL // 2
    target_rows, target_cols = _tile_pixels(0, 0, STEP_H, STRIP_W)  # [Q]
    target_offsets = _map_offsets(
        target_rows, target_cols, channels, stride_xc, stride_xh, stride_xw, GRAD_INNER, GRAD_UNIT, INDEX
    )  # [Q, C]  # fmt: skip
    piece_rows, piece_cols = _tile_pixels(0, 0, BLOCK_H, BLOCK_W)  # [M]
    piece_offsets = _map_offsets(piece_rows, piece_cols, channels, stride_yc, stride_yh, stride_yw, INNER, UNIT, INDEX)
    output_width = output_width // UNIT * UNIT if INNER == "w" else output_width
    for step in range(first_step, last_step):
        source_y, source_x = strip_y + (step - 1) * STEP_H + RADIUS, strip_x - RADIUS
        if MASKED:
            first_y, pieces_h = _pieces_inside(source_y * SCALE, output_height, BLOCK_H, PIECES_H)
            first_x, pieces_w = _pieces_inside(source_x * SCALE, output_width, BLOCK_W, PIECES_W)
        else:
            first_y, pieces_h, first_x, pieces_w = 0, PIECES_H, 0, PIECES_W
        for piece in range(0, pieces_h * pieces_w):
            piece_y, piece_x = (first_y + piece // pieces_w) * BLOCK_H, (first_x + piece % pieces_w) * BLOCK_W
            y, x = source_y * SCALE + piece_y, source_x * SCALE + piece_x
            rows, cols = y + piece_rows, x + piece_cols
            valid = (rows >= 0) & (rows < output_height) & (cols >= 0) & (cols < output_width) if MASKED else None
            taps = _taps(
                kernels_ptr, stride_kn, stride_kg,
                1 if TAPS_INNER == "t" else stride_kt, stride_kh, 1 if TAPS_INNER == "w" else stride_kw,
                offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
                image, group, groups, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, LOGITS, ACC, INDEX,
            ).to(ROUND)  # [M, TAPS]  # fmt: skip
            taps = tl.where(_both(valid, tl.arange(0, TAPS) < KERNEL * KERNEL), taps, 0.0)  # no NaN out of reach
            if (BLOCK_H % SCALE == 0 or SCALE % BLOCK_H == 0) and (BLOCK_W % SCALE == 0 or SCALE % BLOCK_W == 0):
                first_rows, first_cols = piece_rows // SCALE, piece_cols // SCALE  # the same in every piece
                reach_rows, reach_cols = target_rows - piece_y // SCALE, target_cols - piece_x // SCALE + 2 * RADIUS
            else:
                first_rows, first_cols = (piece_y + piece_rows) // SCALE, (piece_x + piece_cols) // SCALE
                reach_rows, reach_cols = target_rows, target_cols + 2 * RADIUS
            grad_output = _output_pointers(
                grad_output_ptr, y, x, stride_yh, stride_yw, INNER, UNIT
            ) + piece_offsets  # [M, C]  # fmt: skip
            grad_output = tl.trans(_load(grad_output, _both(valid, present)).to(OPERAND))  # [C, M]
            band = _band(taps, first_rows, first_cols, reach_rows, reach_cols, KERNEL, TAPS).to(OPERAND)  # [M, Q]
            above = _multiply_add(grad_output, band, above, PRECISION, ACC)
            band = _band(taps, first_rows, first_cols, reach_rows + STEP_H, reach_cols, KERNEL, TAPS).to(OPERAND)
            below = _multiply_add(grad_output, band, below, PRECISION, ACC)
        if step > 0:
            y = strip_y + (step - 1) * STEP_H
            pointers = _output_pointers(
                grad_features_ptr, y, strip_x, stride_xh, stride_xw, GRAD_INNER, GRAD_UNIT
            ) + tl.trans(target_offsets)  # fmt: skip
            gradients = above.to(grad_features_ptr.dtype.element_ty)
            if MASKED:
                grad_width = width // GRAD_UNIT * GRAD_UNIT if GRAD_INNER == "w" else width
                valid = (y + target_rows < height) & (strip_x + target_cols < grad_width)
                tl.store(pointers, gradients, mask=_both(present, valid))
            elif present is None:
                tl.store(pointers, gradients)
            else:
                tl.store(pointers, gradients, mask=present[:, None])
        above = below
        below = tl.zeros([BLOCK_C, STEP_H * STRIP_W], ACC)
    return above, below


@triton.jit(do_not_specialize=[
    *_SIZES, "channels_per_group", "steps", "stride_yn", "stride_yc", "stride_yh", "stride_yw",
    "stride_kn", "stride_kg", "stride_kt", "stride_kh", "stride_kw", "stride_on", "stride_oc", "stride_oh", "stride_ow",
    "stride_xn", "stride_xc", "stride_xh", "stride_xw",
])  # fmt: skip
def reassemble_backward_features(
    grad_output_ptr, stride_yn, stride_yc, stride_yh, stride_yw,  # in UNITs
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,  # in GRAD_UNITs
    height, width, output_height, output_width, tiles_h, tiles_w, groups, channels_per_group, slices, steps,
    INNER: tl.constexpr, UNIT: tl.constexpr, GRAD_INNER: tl.constexpr, GRAD_UNIT: tl.constexpr, RUN: tl.constexpr,
    TAPS_INNER: tl.constexpr, LOGITS: tl.constexpr, SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    STEP_H: tl.constexpr, STRIP_W: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    PIECES_H: tl.constexpr, PIECES_W: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr, ROUND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A strip of `steps` x STEP_H rows and STRIP_W columns of source pixels, of one group and block of channels,
    gathered from every output pixel that read it.

    Programs go backwards: what the gradient of the kernels read last may still be in the cache.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    part, tile = program % (groups * slices), program // (groups * slices)
    group, block = part // slices, part % slices * BLOCK_C
    image, tile_y, tile_x = _unravel(tile, tiles_h, tiles_w)
    channels_per_group = channels_per_group // RUN * RUN  # so says the compiler's analysis
    present = block // RUN + tl.arange(0, BLOCK_C) // RUN < channels_per_group // RUN  # [C]
    present = None if RUN == BLOCK_C else present
    channels = group * channels_per_group + block + tl.arange(0, BLOCK_C)  # [C]
    strip_y, strip_x = tile_y * steps * STEP_H, tile_x * STRIP_W
    # Steps whose outputs are inside the map as a whole need no masks.
    RADIUS: tl.constexpr = KERNEL // 2
    first = tl.maximum(2 * STEP_H - 1 - RADIUS - strip_y, 0) // STEP_H
    last = tl.maximum(STEP_H - RADIUS + output_height // SCALE - strip_y, 0) // STEP_H
    last = tl.minimum(tl.maximum(first, last), steps + 1)
    columns_inside = (strip_x >= RADIUS) & ((strip_x - RADIUS) * SCALE + PIECES_W * BLOCK_W <= output_width)
    first = tl.where(columns_inside, first, steps + 1)
    last = tl.where(columns_inside, last, steps + 1)
    above = tl.zeros([BLOCK_C, STEP_H * STRIP_W], ACC)  # [C, Q]
    below = tl.zeros([BLOCK_C, STEP_H * STRIP_W], ACC)  # [C, Q]
    for part in tl.static_range(3):
        above, below = _gather_strip(
            grad_output_ptr + image * stride_yn * UNIT, stride_yc, stride_yh, stride_yw,
            kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,
            offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
            grad_features_ptr + image * stride_xn * GRAD_UNIT, stride_xc, stride_xh, stride_xw,
            above, below, image, group, groups, strip_y, strip_x,
            0 if part == 0 else first if part == 1 else last, first if part == 0 else last if part == 1 else steps + 1,
            channels, present, height, width, output_height, output_width,
            part != 1, INNER, UNIT, GRAD_INNER, GRAD_UNIT, TAPS_INNER, LOGITS, SCALE, KERNEL, TAPS,
            STEP_H, STRIP_W, BLOCK_H, BLOCK_W, PIECES_H, PIECES_W, BLOCK_C, INDEX, ACC, ROUND, OPERAND, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=[
    *_SIZES, "channels_per_group", "stride_xn", "stride_xc", "stride_xh", "stride_xw",
    *(f"stride_{name}" for name in ("yn", "yc", "yh", "yw", "kn", "kg", "kt", "kh", "kw", "mn", "mg", "mt", "mh")),
    *(f"stride_{name}" for name in ("mw", "on", "oc", "oh", "ow", "gn", "gc", "gh", "gw")),
])  # fmt: skip
def reassemble_backward_kernels(
    grad_output_ptr, stride_yn, stride_yc, stride_yh, stride_yw,  # in GRAD_UNITs
    features_ptr, stride_xn, stride_xc, stride_xh, stride_xw,  # in UNITs
    kernels_ptr, stride_kn, stride_kg, stride_kt, stride_kh, stride_kw,  # None for masks
    grad_kernels_ptr, stride_mn, stride_mg, stride_mt, stride_mh, stride_mw,  # of masks or logits; None for DLU
    offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
    grad_space_ptr,
    grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
    height, width, output_height, output_width, tiles_h, tiles_w, groups, channels_per_group,
    INNER: tl.constexpr, UNIT: tl.constexpr, GRAD_INNER: tl.constexpr, GRAD_UNIT: tl.constexpr,
    RUN: tl.constexpr, TAPS_INNER: tl.constexpr, GRAD_TAPS_INNER: tl.constexpr,
    LOGITS: tl.constexpr, SCALE: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, CELLS: tl.constexpr, INDEX: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one output tile's kernels; stored, or taken on through softmax or sampling first."""
    group = tl.program_id(0) % groups
    image, tile_y, tile_x = _unravel(tl.program_id(0) // groups, tiles_h, tiles_w)
    y, x = tile_y * BLOCK_H, tile_x * BLOCK_W
    rows, cols = _tile_pixels(y, x, BLOCK_H, BLOCK_W)  # [M]
    valid = (rows < output_height) & (cols < output_width)
    window_y, window_x = y // SCALE - KERNEL // 2, ((x // SCALE - KERNEL // 2) >> 1) * 2  # no remainder below zero
    # Outputs outside are replaced by others inside, in whole runs: this takes no masks, and they are not stored.
    inside_rows = tl.where(rows < output_height, rows, output_height - 1)
    if GRAD_INNER == "w":
        last = output_width // GRAD_UNIT - 1
        run = x // GRAD_UNIT + tl.arange(0, BLOCK_H * BLOCK_W) // GRAD_UNIT % (BLOCK_W // GRAD_UNIT)
        inside_cols = cols + tl.where(run < last, 0, (last - run) * GRAD_UNIT)
    else:
        inside_cols = tl.where(cols < output_width, cols, output_width - 1)
    channels_per_group = channels_per_group // RUN * RUN  # so says the compiler's analysis
    channels = tl.arange(0, BLOCK_C)  # [C]
    output_offsets = _map_offsets(
        inside_rows, inside_cols, channels, stride_yc, stride_yh, stride_yw, GRAD_INNER, GRAD_UNIT, INDEX
    )  # [M, C]  # fmt: skip
    first_channel = (group * channels_per_group).to(tl.int64)
    grad_output_ptr += image * stride_yn * GRAD_UNIT
    features_ptr += image * stride_xn * UNIT
    # Where in the window each tap of each output is; what is beyond the last tap is zero in the kernels, or not stored.
    tap = tl.where(tl.arange(0, TAPS) < KERNEL * KERNEL, tl.arange(0, TAPS), 0)
    corner = (rows // SCALE - KERNEL // 2 - window_y) * WINDOW_W + (cols // SCALE - KERNEL // 2 - window_x)
    pixel = corner[:, None] + (tap // KERNEL * WINDOW_W + tap % KERNEL)[None, :]  # [M, TAPS]
    grad_taps = tl.zeros([BLOCK_H * BLOCK_W, TAPS], ACC)  # [M, TAPS]
    for first in range(0, WINDOW_H * WINDOW_W, BLOCK_Q):
        index = first + tl.arange(0, BLOCK_Q)  # [Q]
        window_rows, window_cols = window_y + index // WINDOW_W, window_x + index % WINDOW_W
        inside = (window_rows >= 0) & (window_rows < height) & (index < WINDOW_H * WINDOW_W)
        inside &= (window_cols >= 0) & (window_cols < (width // UNIT * UNIT if INNER == "w" else width))
        window_offsets = _map_offsets(
            window_rows, window_cols, channels, stride_xc, stride_xh, stride_xw, INNER, UNIT, INDEX, SIGNED=True
        )  # [Q, C]  # fmt: skip
        grad_band = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_Q], ACC)  # [M, Q]
        # None of a tile that is cut off as a whole.
        last_channel = tl.where((y < output_height) & (x < output_width), channels_per_group, 0)
        for block in range(0, last_channel, BLOCK_C):
            present = block // RUN + channels // RUN < channels_per_group // RUN
            present = None if RUN == BLOCK_C else present
            pointers = features_ptr + _channel_offset(first_channel + block, stride_xc, INNER, UNIT) + window_offsets
            features = _load(pointers, _both(inside, present)).to(OPERAND)  # [Q, C]
            pointers = (
                grad_output_ptr
                + _channel_offset(first_channel + block, stride_yc, GRAD_INNER, GRAD_UNIT)
                + output_offsets
            )
            grad_output = _load(pointers, None if present is None else present[None, :]).to(OPERAND)  # [M, C]
            grad_band = _multiply_add(grad_output, tl.trans(features), grad_band, PRECISION, ACC)
        if WINDOW_H * WINDOW_W <= BLOCK_Q:
            grad_taps = tl.gather(grad_band, pixel, axis=1)
        else:
            here = (pixel >= first) & (pixel < first + BLOCK_Q)
            grad_taps += tl.where(here, tl.gather(grad_band, tl.where(here, pixel - first, 0), axis=1), 0.0)
    if grad_kernels_ptr is None:
        _sampling_adjoint(
            tl.where(valid[:, None], grad_taps, 0.0),
            kernels_ptr,
            offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
            grad_space_ptr, None, None,
            grad_offsets_ptr, stride_gn, stride_gc, stride_gh, stride_gw,
            image, group, groups, y, x, rows, cols, valid, height, width,
            SCALE, KERNEL, TAPS, BLOCK_H, BLOCK_W, CELLS, ACC, INDEX, SUM_PRECISION,
        )  # fmt: skip
    else:
        if LOGITS:
            taps = _taps(
                kernels_ptr, stride_kn, stride_kg,
                1 if TAPS_INNER == "t" else stride_kt, stride_kh, 1 if TAPS_INNER == "w" else stride_kw,
                offsets_ptr, stride_on, stride_oc, stride_oh, stride_ow,
                image, group, groups, rows, cols, valid, height, width, SCALE, KERNEL, TAPS, LOGITS, ACC, INDEX,
            )  # [M, TAPS]  # fmt: skip
            grad_taps = tl.where(valid[:, None], _softmax_adjoint(taps, grad_taps), 0.0)
            valid = (rows < height * SCALE) & (cols < width * SCALE)  # also where outputs are cut off
        stride_mt, stride_mw = 1 if GRAD_TAPS_INNER == "t" else stride_mt, 1 if GRAD_TAPS_INNER == "w" else stride_mw
        if LOGITS:
            pixel_offsets, stride_mt = _shuffled(rows, cols, stride_mt, stride_mh, stride_mw, SCALE, INDEX)
        else:
            pixel_offsets = _pixel_offsets(rows, cols, stride_mh, stride_mw, INDEX)
        grad_kernels_ptr += image * stride_mn + group.to(tl.int64) * stride_mg
        grad_taps = grad_taps.to(grad_kernels_ptr.dtype.element_ty)
        _store_taps(grad_kernels_ptr, pixel_offsets, stride_mt, grad_taps, valid, KERNEL, TAPS)
