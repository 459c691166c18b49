"""Values of PTX instructions, as numpy functions over all lanes.

A value is an array with one element per lane, or a numpy scalar where all lanes are known to agree. Sections are those
of the PTX ISA, chapter 9.7 "Instructions".
"""

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

where = np.where


def sel(p, a, b):
    """a where p, else b."""
    if p.ndim:
        return where(p, a, b)
    return a if p else b


def merge(mask, new, old):
    """New values in active lanes; where there is no old one, no other lane has one that it will read."""
    return new if old is None else where(mask, new, old)


# ------------------------------------------------------------------------------------------------ integers (9.7.1)


def div(a, b):
    """Truncates; by zero it gives all ones, as hardware does (the ISA leaves it open), and INT_MIN / -1 wraps."""
    if a.dtype.itemsize < 8:
        quotient = np.trunc(a.astype(f8) / b)
        return where(b == 0, -1.0, quotient).astype(i8).astype(a.dtype)
    one = a.dtype.type(1)
    safe = where(b == 0, one, b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a - quotient * safe != 0) & ((a < 0) != (safe < 0)))
    return where(b == 0, ~(one ^ one), quotient)


def rem(a, b):
    return where(b == 0, a, a - div(a, b) * b)


def mulhi_u8(a, b):
    mask = u8(0xFFFFFFFF)
    s = u8(32)
    a0, a1, b0, b1 = a & mask, a >> s, b & mask, b >> s
    low, mid1, mid2 = a0 * b0, a1 * b0, a0 * b1
    carry = ((low >> s) + (mid1 & mask) + (mid2 & mask)) >> s
    return a1 * b1 + (mid1 >> s) + (mid2 >> s) + carry


def mulhi_i8(a, b):
    high = mulhi_u8(a.view(u8), b.view(u8)).view(i8)
    return high - where(a < 0, b, i8(0)) - where(b < 0, a, i8(0))


def shl(a, n):
    """9.7.8: shifts by the width or more give zero."""
    bits = u4(a.dtype.itemsize * 8)
    moved = a << np.minimum(n, bits - u4(1)).astype(a.dtype)
    return moved if n.ndim == 0 and n < bits else where(n >= bits, a ^ a, moved)


def shr(a, n):
    """The same, or for signed numbers the sign."""
    bits = u4(a.dtype.itemsize * 8)
    moved = a >> np.minimum(n, bits - u4(1)).astype(a.dtype)
    return moved if a.dtype.kind == "i" or (n.ndim == 0 and n < bits) else where(n >= bits, a ^ a, moved)


def bfe(a, start, length):
    """9.7.1.21: bits beyond the last are zero, or of signed numbers the sign."""
    bits = u4(a.dtype.itemsize * 8)
    left = bits - np.minimum(length & u4(0xFF), bits)
    return shr(shl(shr(a, start & u4(0xFF)), left), left)


def bfi(a, b, start, length):
    """9.7.1.22: the low bits of a into b."""
    start, length = start & u4(0xFF), length & u4(0xFF)
    field = shl(~shl(~(a ^ a), length), start)
    return (b & ~field) | (shl(a, start) & field)


def popc(a):
    return np.bitwise_count(a).astype(u4)


def clz(a):
    bits = a.dtype.itemsize * 8
    count = np.zeros(np.shape(a), u4)
    left = a
    for step in (32, 16, 8, 4, 2, 1):
        if step >= bits:
            continue
        empty = (left >> a.dtype.type(bits - step)) == 0
        count = count + where(empty, u4(step), u4(0))
        left = where(empty, left << a.dtype.type(step), left)
    return count + where(left == 0, u4(1), u4(0)).astype(u4)


def brev(a):
    bits = a.dtype.itemsize * 8
    kind = a.dtype.type
    result = a & kind(0)
    for bit in range(bits):
        result = result | (((a >> kind(bit)) & kind(1)) << kind(bits - 1 - bit))
    return result


def prmt(a, b, c):
    """9.7.8.7, the default mode: each nibble of c picks a byte of {b, a}, or its sign."""
    if c.ndim == 0 and c in (0x5410, 0x7632):
        return (a & u4(0xFFFF)) | (b << u4(16)) if c == 0x5410 else (a >> u4(16)) | (b & u4(0xFFFF0000))
    result = u4(0)
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    for place in range(4):
        nibble = (c >> u4(4 * place)) & u4(15)
        byte = ((both >> ((nibble & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        sign = where(byte >= 128, u4(255), u4(0))
        result = result | (where(nibble >= 8, sign, byte) << u4(8 * place))
    return result


def shf_l(a, b, n, wrap):
    n = (n & u4(31)) if wrap else np.minimum(n, u4(32))
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    return ((both << n.astype(u8)) >> u8(32)).astype(u4)


def shf_r(a, b, n, wrap):
    n = (n & u4(31)) if wrap else np.minimum(n, u4(32))
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    return (both >> n.astype(u8)).astype(u4)


def lop3(a, b, c, table):
    result = a & a.dtype.type(0)
    for bit in range(8):
        if table >> bit & 1:
            result = result | ((a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c))
    return result


# ------------------------------------------------------------------------------------------- floating point (9.7.3)


def ftz(x):
    """Subnormal float32 become zero of the same sign."""
    small = np.abs(x) < f4(1.1754943508222875e-38)
    return where(small, np.copysign(f4(0), x), x) if small.any() else x


def fma32(a, b, c):
    return fma_odd(a.astype(f8), b, c).astype(f4)


def fma_odd(a, b, c):
    """In float64, where the product of shorter numbers is exact; a sum that is not becomes that neighbour whose last
    bit is odd, so that rounding it again to a shorter type is as rounding once."""
    product = a * b
    total = product + c
    other = total - product
    error = (product - (total - other)) + (c - other)
    even = (error != 0) & np.isfinite(error) & (total.view(u8) & u8(1) == 0)
    return where(even, np.nextafter(total, where(error > 0, np.inf, -np.inf)), total) if even.any() else total


def _two_product(a, b):
    """Dekker: the rounded product and its error."""
    split = f8(134217729.0)
    product = a * b
    big = split * a
    a_high = big - (big - a)
    a_low = a - a_high
    big = split * b
    b_high = big - (big - b)
    b_low = b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def fma64(a, b, c):
    """Product and sum with their errors, added at the end: double-double, so rounded twice at most in rare ties."""
    product, error = _two_product(a, b)
    total = product + c
    other = total - product
    rest = (product - (total - other)) + (c - other)
    result = total + (rest + error)
    bad = ~np.isfinite(result)
    return where(bad, a * b + c, result) if bad.any() else result


def div_approx(a, b):
    """9.7.3.8: a times the reciprocal, so rounded twice, and zero for divisors above 2^126."""
    return a * where(np.abs(b) > f4(2**126), f4(0), rcp(b.astype(f8)).astype(f4))


def div_full(a, b):
    """The same after scaling, for divisors of any size."""
    size = np.abs(b)
    scale = where(size > f4(2**126), f4(0.25), where(size < f4(2**-126), f4(2**24), f4(1)))
    return (a * scale) * rcp((b * scale).astype(f8)).astype(f4)


def fmin(a, b, nan=False):
    """9.7.3: the operand that is a number, or NaN; -0 is below +0."""
    return _zeros(a, b, (np.minimum if nan else np.fmin)(a, b), -1)


def fmax(a, b, nan=False):
    """9.7.3: the operand that is a number, or NaN; +0 is above -0."""
    return _zeros(a, b, (np.maximum if nan else np.fmax)(a, b), 1)


def _zeros(a, b, found, sign):
    if found.dtype.kind != "f":
        return found
    differ = (a == b) & (np.signbit(a) != np.signbit(b))
    return where(differ, np.copysign(a, sign), found) if differ.any() else found


def saturated(x):
    return where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1) + x.dtype.type(0))


ex2, lg2, sqrt, sin, cos, tanh = np.exp2, np.log2, np.sqrt, np.sin, np.cos, np.tanh


def rcp(x):
    return 1 / x


def rsqrt(x):
    return 1 / np.sqrt(x)


# ---------------------------------------------------------------------------------------------- conversions (9.7.9)


def bf16_to_f32(x):
    return (x.astype(u4) << u4(16)).view(f4)


def to_bf16(x):
    """To nearest even; NaN becomes 0x7fff."""
    bits = x.view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    return where(np.isnan(x), u2(0x7FFF), rounded)


def f32_to_bf16_rz(x):
    return where(np.isnan(x), u2(0x7FFF), (x.view(u4) >> u4(16)).astype(u2))


def to_f16(x):
    return where(np.isnan(x), u2(0x7FFF), x.astype(f2).view(u2))


def f64_to_bf16(x):
    """In one rounding: to odd in float32 first, which keeps what decides the second."""
    near = x.astype(f4)
    wrong = (near.astype(f8) != x) & np.isfinite(near)
    above = np.abs(near.astype(f8)) > np.abs(x)
    bits = where(wrong, (near.view(u4) - above.astype(u4)) | u4(1), near.view(u4))
    return to_bf16(bits.view(f4))


def halves(x, kind):
    """Both numbers of 16 bits in a register, as float64: low, then high."""
    pair = np.stack([x.astype(u2), (x >> u4(16)).astype(u2)])
    pair = pair if x.ndim else pair[:, None]
    if kind in ("s16x2", "u16x2"):
        return pair.view(i2) if kind == "s16x2" else pair
    return pair.view(f2).astype(f8) if kind == "f16x2" else bf16_to_f32(pair).astype(f8)


def from_halves(x, kind):
    pair = to_f16(x) if kind == "f16x2" else f64_to_bf16(x) if kind == "bf16x2" else x.view(u2)
    return pack(pair[1], pair[0]) if pair.shape[1] > 1 else pack(pair[1, 0], pair[0, 0])


def pair(x):
    """Both float32 of a 64-bit register: [lanes, 2]."""
    return np.ascontiguousarray(np.atleast_1d(x)).view(f4).reshape(-1, 2)


def from_pair(x):
    bits = np.ascontiguousarray(x.astype(f4)).view(u8).ravel()
    return bits if len(bits) > 1 else bits[0]


def pack(high, low):
    return (high.astype(u4) << u4(16)) | low.astype(u4)


def f32_to_tf32(x):
    """cvt.rna: to nearest, ties away from zero."""
    bits = x.view(u4)
    return where(np.isfinite(x), (bits + u4(0x1000)) & u4(0xFFFFE000), bits)


ROUND = {"n": np.rint, "z": np.trunc, "m": np.floor, "p": np.ceil}


def to_int(x, direction, kind):
    """Float to integer: saturates, NaN becomes 0."""
    info = np.iinfo(kind)
    x = ROUND[direction](x.astype(f8))
    if info.bits == 64:
        inside = where(np.isnan(x) | (x >= float(info.max)) | (x < float(info.min)), 0.0, x).astype(kind)
        return where(x >= float(info.max), kind(info.max), where(x < float(info.min), kind(info.min), inside))
    return np.clip(np.nan_to_num(x, nan=0.0), info.min, info.max).astype(i8).astype(kind)


# ---------------------------------------------------------------------------------------------------------- warps


_LANES = np.arange(32)


def shfl(mode, a, b, c, lanes):
    """9.7.9.6 shfl.sync: source lanes by mode; returns the values and whether the source was in range."""
    a = np.broadcast_to(a, (lanes,)).reshape(-1, 32)
    if b.ndim == 0 and c.ndim == 0:
        clamp, segment = int(c) & 31, (int(c) >> 8) & 31
        source, good = _source(mode, _LANES, int(b) & 31, clamp, segment)
        return np.take(a, source, axis=1).reshape(-1), np.tile(good, a.shape[0])
    b = np.broadcast_to(b, (lanes,)).reshape(-1, 32).astype(i8) & 31
    c = np.broadcast_to(c, (lanes,)).reshape(-1, 32).astype(i8)
    source, good = _source(mode, _LANES[None, :], b, c & 31, (c >> 8) & 31)
    return np.take_along_axis(a, source, axis=1).reshape(-1), good.reshape(-1)


def _source(mode, lane, b, clamp, segment):
    most = (lane & segment) | (clamp & ~segment)
    least = lane & segment
    if mode == "up":
        source = lane - b
        good = source >= most
    elif mode == "down":
        source = lane + b
        good = source <= most
    elif mode == "bfly":
        source = lane ^ b
        good = source <= most
    else:
        source = least | (b & ~segment & 31)
        good = source <= most
    return where(good, source, lane), good


REDUX = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def redux(operation, a, lanes):
    a = np.broadcast_to(a, (lanes,)).reshape(-1, 32)
    return np.repeat(REDUX[operation].reduce(a, axis=1, dtype=a.dtype), 32)


def vote(mode, p, lanes):
    p = np.broadcast_to(p, (lanes,)).reshape(-1, 32)
    if mode == "ballot":
        return np.repeat((p.astype(u8) << _LANES.astype(u8)).sum(axis=1).astype(u4), 32)
    found = p.all(axis=1) if mode == "all" else p.any(axis=1) if mode == "any" else (p == p[:, :1]).all(axis=1)
    return np.repeat(found, 32)
