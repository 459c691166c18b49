"""Device code of the class activation maps.

`cam_partial_maps` reads both planes of some channels once, weighs the channels, and adds their weighted planes up;
`cam_finish` adds these partial maps in a fixed order, then ReLU, resize and normalisation; large maps are added by a
launch of their own. Where a plane does not fit one program, `cam_channels` finds the weights in a launch before them.
"""

import triton
import triton.language as tl

# Sizes that vary from call to call select no new compilation by themselves. `pixels` does by its alignment, as the
# stride of a channel does: masks on it then leave loads whole.
_SIZES = [
    "channels", "width_a", "width_g", "classes", "tiles", "slices", "blocks_per_program",
    "height", "width", "out_height", "out_width", "outputs_per_program",
]  # fmt: skip


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # keeps NaN


@triton.jit
def _ratio(numerator, denominator):
    """The quotient, and zero where the denominator is zero."""
    return tl.where(denominator == 0, 0.0, numerator / tl.where(denominator == 0, 1.0, denominator))


@triton.jit
def _pixel_offsets(pixels, width, stride_h, stride_w):
    """A plane whose rows follow each other is one run of pixels, and has no `stride_h`."""
    if stride_h is None:
        return pixels.to(tl.int64) * stride_w
    else:
        return (pixels // width).to(tl.int64) * stride_h + (pixels % width).to(tl.int64) * stride_w


@triton.jit
def _load_planes(
    planes_ptr, stride_c, offsets, first, channels, pixels, valid, LOAD: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_C planes from channel `first` on, zero beyond the last channel and pixel: [P, C].

    LOAD "run" reads planes of neighbouring channels that follow each other as one run of memory, whatever the alignment
    of a plane; "rows" reads pixels with their channels innermost. Both deal the values out through shared memory, one
    channel to a thread, so that sums over a plane are within threads. "plain" leaves them where they were read.
    """
    index = tl.arange(0, BLOCK_P * BLOCK_C)
    if LOAD == "run":
        run_ptr = planes_ptr + first.to(tl.int64) * pixels
        count = BLOCK_C if EXACT else min(channels - first, BLOCK_C)
        values = tl.load(run_ptr + index, mask=index < count * pixels, other=0.0)
        p, c = index // BLOCK_C, index % BLOCK_C
        # The last element of the run is beyond every plane, and zero, unless all pixels are valid.
        values = tl.gather(values, tl.where(p < pixels, c * pixels + p, BLOCK_P * BLOCK_C - 1), 0)
        return values.to(ACC).reshape(BLOCK_P, BLOCK_C)
    else:
        channel = first + tl.arange(0, BLOCK_C)
        mask = valid[:, None]
        if not EXACT:
            mask = mask & (channel < channels)[None, :]
        ptrs = planes_ptr + offsets[:, None] + channel.to(tl.int64)[None, :] * stride_c
        values = tl.load(ptrs, mask=mask, other=0.0)
        if LOAD == "rows":
            values = tl.gather(values.reshape(BLOCK_P * BLOCK_C), index, 0).reshape(BLOCK_P, BLOCK_C)
        return values.to(ACC)


@triton.jit
def _sum_of_plane(x, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """[P, C] -> [C], in two steps: the interpreter adds up in a row, which loses digits over a long plane."""
    return tl.sum(tl.sum(x.reshape(BLOCK_P // 16, 16, BLOCK_C), 1), 0)


@triton.jit
def _terms(a, g, total, METHOD: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """What is summed over a plane: for the weight of its channel, or the shares of its pixels in the map. [P, C]"""
    if METHOD == "gradcam":
        return g
    elif METHOD == "gradcam++":
        square = g * g
        cubes = tl.where(square == 0, 0.0, total[None, :] * square * g)  # padding adds nothing to an infinite plane
        return _relu(g) * _ratio(square, 2 * square + cubes + tl.full([], EPS, ACC))
    elif METHOD == "layercam":
        return _relu(g) * a
    elif METHOD == "elementwise":
        return _relu(g * a)
    else:
        return g * a


@triton.jit
def _weight(summed, total, pixels, METHOD: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """Weights of the channels, from the terms summed over each plane and the sums of the activations. [C]"""
    if METHOD == "gradcam":
        return summed / tl.full([], pixels, ACC)
    elif METHOD == "xgradcam":
        return _ratio(summed, total + tl.full([], EPS, ACC))
    else:
        return summed


@triton.jit
def _store_channels(
    weights_ptr, contributions_ptr, cancellation_ptr, image, k, classes, channel, channels,
    weight, contribution, total, magnitude, WEIGHS: tl.constexpr,
):  # fmt: skip
    """All three are contiguous: (N, K, C), (N, K, C) and (N, C)."""
    inside = channel < channels
    place = (image * classes + k) * channels + channel
    if WEIGHS:
        tl.store(weights_ptr + place, weight, mask=inside)
    tl.store(contributions_ptr + place, contribution, mask=inside)
    cancellation = tl.where(magnitude == 0, 1.0, _ratio(tl.abs(total), magnitude))
    # A product of truth values, one of them of all channels, would be no mask to the interpreter of Triton 3.9.
    first = channel < tl.where(k == 0, channels, 0)
    tl.store(cancellation_ptr + image * channels + channel, cancellation, mask=first)


@triton.jit(do_not_specialize=_SIZES)
def cam_partial_maps(
    activations_ptr, stride_an, stride_ac, stride_ah, stride_aw, width_a,
    gradients_ptr, stride_gn, stride_gk, stride_gc, stride_gh, stride_gw, width_g,
    given_ptr, stride_wn, stride_wk, stride_wc,
    weights_ptr, contributions_ptr, cancellation_ptr, partials_ptr,
    channels, pixels, classes, tiles, slices, blocks_per_program,
    METHOD: tl.constexpr, WEIGHS: tl.constexpr, EPS: tl.constexpr, LOAD_A: tl.constexpr, LOAD_G: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add up the weighted planes of a slice of the channels, at one tile of pixels: (N, K, slices, pixels).

    `given_ptr` holds weights of the caller; else they come from the gradients, and the tile is the whole plane unless
    the method weighs every pixel by itself. The classes of an image are neighbours, so that they share its activations
    in the cache.
    """
    program = tl.program_id(0)
    k = program % classes
    channel_slice = program // classes % slices
    tile = program // classes // slices % tiles
    image = (program // classes // slices // tiles).to(tl.int64)

    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)  # [P]
    valid = p < pixels
    activation_offsets = _pixel_offsets(p, width_a, stride_ah, stride_aw)  # [P]
    gradient_offsets = _pixel_offsets(p, width_g, stride_gh, stride_gw)  # [P]
    activations_ptr += image * stride_an
    if gradients_ptr is not None:
        gradients_ptr += image * stride_gn + k.to(tl.int64) * stride_gk

    summed = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    first_block = channel_slice * blocks_per_program
    for block in range(first_block, min(first_block + blocks_per_program, tl.cdiv(channels, BLOCK_C))):
        first = block * BLOCK_C
        channel = first + tl.arange(0, BLOCK_C)  # [C]
        a = _load_planes(
            activations_ptr, stride_ac, activation_offsets, first, channels, pixels, valid,
            LOAD_A, EXACT, BLOCK_C, BLOCK_P, ACC,
        )  # fmt: skip
        if given_ptr is not None:
            weight_ptrs = given_ptr + image * stride_wn + k.to(tl.int64) * stride_wk + channel.to(tl.int64) * stride_wc
            weight = tl.load(weight_ptrs, mask=channel < channels, other=0.0).to(ACC)
            summed += weight[None, :] * a
        else:
            g = _load_planes(
                gradients_ptr, stride_gc, gradient_offsets, first, channels, pixels, valid,
                LOAD_G, EXACT, BLOCK_C, BLOCK_P, ACC,
            )  # fmt: skip
            total = tl.sum(a, 0)  # [C]
            terms = _terms(a, g, total, METHOD, EPS, ACC)
            # Lanes may hold sums that differ in the last bit, but always the same lane stores an element.
            contribution = tl.sum(terms, 0)
            weight = contribution
            if WEIGHS:
                weight = _weight(contribution, total, pixels, METHOD, EPS, ACC)
                contribution = weight * total
                terms = weight[None, :] * a
            summed += terms
            if contributions_ptr is not None:
                _store_channels(
                    weights_ptr, contributions_ptr, cancellation_ptr, image, k, classes, channel, channels,
                    weight, contribution, total, tl.sum(tl.abs(a), 0), WEIGHS,
                )  # fmt: skip
    partial = ((image * classes + k) * slices + channel_slice) * pixels
    tl.store(partials_ptr + partial + p, tl.sum(summed, 1), mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def cam_channels(
    activations_ptr, stride_an, stride_ac, stride_ah, stride_aw, width_a,
    gradients_ptr, stride_gn, stride_gk, stride_gc, stride_gh, stride_gw, width_g,
    weights_ptr, contributions_ptr, cancellation_ptr,
    channels, pixels, classes, slices,
    METHOD: tl.constexpr, WEIGHS: tl.constexpr, EPS: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weights, contributions and cancellation of BLOCK_C channels whose planes are too large for one program."""
    program = tl.program_id(0)
    k = program % classes
    first_channel = program // classes % slices * BLOCK_C
    channel = first_channel + tl.arange(0, BLOCK_C)  # [C]
    image = (program // classes // slices).to(tl.int64)
    activations_ptr += image * stride_an
    gradients_ptr += image * stride_gn + k.to(tl.int64) * stride_gk

    total = tl.zeros([BLOCK_C], ACC)
    if METHOD == "gradcam++":  # its terms need the sum over the whole plane
        sums = tl.zeros([BLOCK_P, BLOCK_C], ACC)
        for first in range(0, pixels, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)  # [P]
            offsets = _pixel_offsets(p, width_a, stride_ah, stride_aw)
            sums += _load_planes(
                activations_ptr, stride_ac, offsets, first_channel, channels, pixels, p < pixels,
                "plain", EXACT, BLOCK_C, BLOCK_P, ACC,
            )  # fmt: skip
        total = _sum_of_plane(sums, BLOCK_C, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    magnitudes = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    summed = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    for first in range(0, pixels, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)  # [P]
        offsets = _pixel_offsets(p, width_a, stride_ah, stride_aw)
        a = _load_planes(
            activations_ptr, stride_ac, offsets, first_channel, channels, pixels, p < pixels,
            "plain", EXACT, BLOCK_C, BLOCK_P, ACC,
        )  # fmt: skip
        offsets = _pixel_offsets(p, width_g, stride_gh, stride_gw)
        g = _load_planes(
            gradients_ptr, stride_gc, offsets, first_channel, channels, pixels, p < pixels,
            "plain", EXACT, BLOCK_C, BLOCK_P, ACC,
        )  # fmt: skip
        sums += a
        magnitudes += tl.abs(a)
        summed += _terms(a, g, total, METHOD, EPS, ACC)
    total = _sum_of_plane(sums, BLOCK_C, BLOCK_P)
    contribution = _sum_of_plane(summed, BLOCK_C, BLOCK_P)
    weight = contribution
    if WEIGHS:
        weight = _weight(contribution, total, pixels, METHOD, EPS, ACC)
        contribution = weight * total
    _store_channels(
        weights_ptr, contributions_ptr, cancellation_ptr, image, k, classes, channel, channels,
        weight, contribution, total, _sum_of_plane(magnitudes, BLOCK_C, BLOCK_P), WEIGHS,
    )  # fmt: skip


@triton.jit
def _divide(a, b, ACC: tl.constexpr):
    """Correctly rounded: x / x is 1, and a resize to the same size is none."""
    if ACC == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _source(i, size, out_size, ACC: tl.constexpr):
    """Pixels below and above output i, and its fraction between them, with half-pixel centres as `F.interpolate`."""
    scale = _divide(size.to(ACC), out_size.to(ACC), ACC)
    position = tl.maximum(scale * (i.to(ACC) + 0.5) - 0.5, 0.0)
    limit = size - 1
    low = tl.minimum(position.to(tl.int32), limit)
    return low, tl.minimum(low + 1, limit), position - low.to(ACC)


@triton.jit
def _load_raw(raw_ptr, y, x, width, valid, RELU: tl.constexpr):
    raw = tl.load(raw_ptr + y.to(tl.int64) * width + x, mask=valid, other=0.0)
    return _relu(raw) if RELU else raw


@triton.jit
def _map_pixels(
    raw_ptr, y, x, valid, height, width, out_height, out_width,
    RELU: tl.constexpr, RESIZE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pixels (y, x) of the map before its normalisation. [O]"""
    if RESIZE:
        y0, y1, fy = _source(y, height, out_height, ACC)
        x0, x1, fx = _source(x, width, out_width, ACC)
        above = _load_raw(raw_ptr, y0, x0, width, valid, RELU)
        above += fx * (_load_raw(raw_ptr, y0, x1, width, valid, RELU) - above)  # in this form constants stay constant
        below = _load_raw(raw_ptr, y1, x0, width, valid, RELU)
        below += fx * (_load_raw(raw_ptr, y1, x1, width, valid, RELU) - below)
        return above + fy * (below - above)
    else:
        return _load_raw(raw_ptr, y, x, width, valid, RELU)


@triton.jit
def _corner(index, size, out_size, ACC: tl.constexpr):
    """The last output before source pixel index // 2, or for odd numbers the first one from there on."""
    boundary = (index // 2).to(ACC)
    first = tl.ceil((boundary + 0.5) * _divide(out_size.to(ACC), size.to(ACC), ACC) - 0.5)
    first = tl.minimum(first, out_size.to(ACC)).to(tl.int32)  # half a pixel beyond may be beyond 32 bits
    return tl.minimum(tl.maximum(first - 1 + index % 2, 0), out_size - 1)


@triton.jit(do_not_specialize=_SIZES)
def cam_finish(
    partials_ptr, raw_ptr, map_ptr,
    slices, height, width, out_height, out_width, tiles, outputs_per_program,
    RELU: tl.constexpr, RESIZE: tl.constexpr, NORMALIZE: tl.constexpr, CORNERS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial maps -> raw map and map, of which a program writes `outputs_per_program` pixels.

    Without `map_ptr` the raw map alone. Without `partials_ptr` the raw map is there already. Else a program adds up
    what it reads: with resize or normalisation the whole raw map, of which all programs of a map write the same values.
    """
    program = tl.program_id(0)
    tile = program % tiles
    cam = (program // tiles).to(tl.int64)
    pixels, outputs = height * width, out_height * out_width
    raw_ptr += cam * pixels
    start = tile * outputs_per_program
    stop = start + min(outputs_per_program, outputs - start)  # never beyond 32 bits

    if partials_ptr is not None:
        first_pixel, last_pixel = 0, pixels
        if not (RESIZE or NORMALIZE):
            first_pixel, last_pixel = start, stop
        for first in range(first_pixel, last_pixel, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)  # [P]
            raw = tl.zeros([BLOCK_P], ACC)
            for first_slice in range(0, slices, BLOCK_S):
                s = first_slice + tl.arange(0, BLOCK_S)  # [S]
                mask = (s < slices)[:, None] & (p < last_pixel)[None, :]
                ptrs = partials_ptr + (cam * slices + s)[:, None] * pixels + p[None, :]
                raw += tl.sum(tl.load(ptrs, mask=mask, other=0.0), 0)
            tl.store(raw_ptr + p, raw, mask=p < last_pixel)
        tl.debug_barrier()  # the raw map is read back below, by other threads of the program

    if map_ptr is not None:
        map_ptr += cam * outputs
        if NORMALIZE:
            # A resized map is bilinear between source pixels, so its extremes are among the outputs next to them.
            columns, candidates = out_width, outputs
            if CORNERS:
                columns = 2 * (width + 1)
                candidates = 2 * (height + 1) * columns
            lowest = tl.full([BLOCK_O], float("inf"), ACC)
            highest = tl.full([BLOCK_O], float("-inf"), ACC)
            unordered = tl.zeros([BLOCK_O], tl.int32)  # minimum and maximum drop NaN
            for first in range(0, candidates, BLOCK_O):
                index = first + tl.arange(0, BLOCK_O)  # [O]
                valid = index < candidates
                y, x = index // columns, index % columns
                if CORNERS:
                    y, x = _corner(y, height, out_height, ACC), _corner(x, width, out_width, ACC)
                value = _map_pixels(raw_ptr, y, x, valid, height, width, out_height, out_width, RELU, RESIZE, ACC)
                unordered += (valid & (value != value)).to(tl.int32)
                lowest = tl.minimum(lowest, tl.where(valid, value, float("inf")))
                highest = tl.maximum(highest, tl.where(valid, value, float("-inf")))
            low, high = tl.min(lowest, 0), tl.max(highest, 0)
            span = tl.where(tl.max(unordered, 0) > 0, float("nan"), high - low)
        for first in range(start, stop, BLOCK_O):
            index = first + tl.arange(0, BLOCK_O)  # [O]
            valid = index < stop
            y, x = index // out_width, index % out_width
            value = _map_pixels(raw_ptr, y, x, valid, height, width, out_height, out_width, RELU, RESIZE, ACC)
            if NORMALIZE:
                value = tl.where(span == 0, 0.0, _divide(value - low, tl.where(span == 0, 1.0, span), ACC))
                # The extremes are exact up to rounding.
                value = tl.where(value < 0, 0.0, tl.where(value > 1, 1.0, value))
            tl.store(map_ptr + index, value, mask=valid)
