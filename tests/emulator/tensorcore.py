"""Tensor-core instructions: mma.sync, ldmatrix, stmatrix and wgmma (PTX ISA 9.7.14 to 9.7.15).

Products and sums are formed in float64 and rounded once per instruction to the accumulator's type. Hardware adds up
with fewer bits and truncates, so it is off by a few more units in the last place.
"""

from functools import cache

import numpy as np

f2, f4, f8, u2, u4, u8 = np.float16, np.float32, np.float64, np.uint16, np.uint32, np.uint64


@cache
def a_map(rows: int, depth: int, per_register: int) -> np.ndarray:
    """Where element (i, k) of A is among the elements that the lanes of a warp hold, lane by lane.

    `per_register` elements of a 32-bit register follow each other along k: 2 of 16 bits, else 1.
    Figures "MMA .m16n8k16 fragment layout for matrix A" and so on: groups of 8 rows and 4 lanes, registers first down,
    then along k.
    """
    i, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    span = 4 * per_register
    lane = (i % 8) * 4 + (k % span) // per_register
    register = (i // 8) + (rows // 8) * (k // span)
    count = rows // 8 * depth // span
    return (lane * (count * per_register) + register * per_register + k % per_register).ravel()


@cache
def b_map(depth: int, per_register: int) -> np.ndarray:
    """The same of element (k, j) of B, with 8 columns."""
    k, j = np.meshgrid(np.arange(depth), np.arange(8), indexing="ij")
    span = 4 * per_register
    lane = j * 4 + (k % span) // per_register
    count = depth // span
    return (lane * (count * per_register) + k // span * per_register + k % per_register).ravel()


@cache
def c_map(rows: int, columns: int) -> np.ndarray:
    """The same of element (i, j) of C and D; wgmma's has more columns, in blocks of 8."""
    i, j = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    lane = (i % 8) * 4 + (j % 8) // 2
    element = (j // 8) * (2 * rows // 8) + (i // 8) * 2 + j % 2
    return (lane * (rows * columns // 32) + element).ravel()


@cache
def c_inverse(rows: int, columns: int) -> np.ndarray:
    inverse = np.empty(rows * columns, np.int64)
    inverse[c_map(rows, columns)] = np.arange(rows * columns)
    return inverse


def _stacked(registers, lanes: int) -> np.ndarray:
    """[warps, 32 * registers], the registers of a lane next to each other."""
    out = np.empty((lanes, len(registers)), registers[0].dtype)
    for index, register in enumerate(registers):
        out[:, index] = register
    return out.reshape(lanes // 32, -1)


def numbers(raw: np.ndarray, kind: str) -> np.ndarray:
    """Operand bits as float64, at the precision that the tensor cores see."""
    if kind == "bf16":
        return (raw.view(u2).astype(u4) << u4(16)).view(f4).astype(f8)
    if kind == "f16":
        return raw.view(f2).astype(f8)
    if kind == "tf32":
        return (raw & u4(0xFFFFE000)).view(f4).astype(f8)  # the low 13 bits are not read
    if kind == "f64":
        return raw.view(f8)
    raise NotImplementedError(f"operands of type {kind}")


PER_REGISTER = {"bf16": 2, "f16": 2, "tf32": 1, "f64": 1}


def fragment_a(kind: str, rows: int, depth: int, lanes: int, *registers) -> np.ndarray:
    values = numbers(_stacked(registers, lanes), kind)
    return values.take(a_map(rows, depth, PER_REGISTER[kind]), axis=1).reshape(-1, rows, depth)


def fragment_b(kind: str, depth: int, lanes: int, *registers) -> np.ndarray:
    values = numbers(_stacked(registers, lanes), kind)
    return values.take(b_map(depth, PER_REGISTER[kind]), axis=1).reshape(-1, depth, 8)


def fragment_c(kind: str, rows: int, columns: int, lanes: int, *registers) -> np.ndarray:
    """[warps, rows, columns] in the accumulator's type."""
    raw = _stacked(registers, lanes)
    values = raw.view({"f32": f4, "f64": f8, "f16": f2}[kind])
    return values.take(c_map(rows, columns), axis=1).reshape(-1, rows, columns)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (np.matmul(a, b) + c).astype(c.dtype)


def spread(matrix: np.ndarray) -> np.ndarray:
    """The registers of a C or D matrix, [registers, lanes]."""
    warps, rows, columns = matrix.shape
    values = matrix.reshape(warps, -1).take(c_inverse(rows, columns), axis=1)
    values = values.reshape(warps * 32, rows * columns // 32)
    if matrix.dtype == f2:
        values = values.view(u4)
    return np.ascontiguousarray(values.T)


# ---------------------------------------------------------------------------------------------- ldmatrix, stmatrix


def from_rows(rows: np.ndarray, count: int, transposed: bool) -> list[np.ndarray]:
    """Registers of `count` 8 x 8 matrices of 16 bits, from [warps, count, 8, 8] (9.7.14.5 ldmatrix)."""
    if transposed:
        rows = rows.swapaxes(-1, -2)
    rows = np.ascontiguousarray(rows)
    pairs = rows.view(u4).reshape(-1, count, 32)
    return [np.ascontiguousarray(pairs[:, index]).reshape(-1) for index in range(count)]


def to_rows(registers: list[np.ndarray], transposed: bool) -> np.ndarray:
    """[warps, count, 8, 8] of 16 bits, for stmatrix (9.7.14.6)."""
    pairs = np.stack([register.reshape(-1, 32) for register in registers], axis=1)
    rows = np.ascontiguousarray(pairs).view(u2).reshape(-1, len(registers), 8, 8)
    return rows.swapaxes(-1, -2) if transposed else rows


# ----------------------------------------------------------------------------------------------------------- wgmma

SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor


@cache
def _pattern(rows: int, depth: int, itemsize: int, transposed: bool, mode: int) -> tuple[np.ndarray, ...]:
    """Of element (row, k): bytes, multiples of the leading offset and multiples of the stride offset.

    The canonical layouts of 9.7.15.5.1 "Shared Memory Matrix Layout", as CUTLASS's `make_gmma_desc` writes them, with
    T elements to 16 bytes and swizzles of B bytes:
      K-major:   ((8, m), (T, 2k)) : rows B apart and groups of 8 by the stride offset; k without gap (without swizzle:
                 16 bytes, then by the leading offset)
      MN-major:  ((T, B/16, m), (8, k)) : B bytes without gap and then by the leading offset; k B apart and groups of 8
                 by the stride offset (without swizzle: the two offsets change places)
    """
    r, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    width = SWIZZLE_BYTES[mode]
    unit = 16 // itemsize
    if not transposed:
        if mode:
            return r % 8 * width + k * itemsize, 0 * r, r // 8
        return r % 8 * 16 + k % unit * itemsize, k // unit, r // 8
    across = width // itemsize
    within = r % across * itemsize + k % 8 * width
    if mode:
        return within, r // across, k // 8
    return within, k // 8, r // across


def addresses(descriptors: np.ndarray, rows: int, depth: int, itemsize: int, transposed: bool) -> np.ndarray:
    """Shared addresses of a matrix by descriptor (9.7.15.5.1.2 "Matrix Descriptor Format"), [descriptors, rows, depth].

    Swizzles exchange bits of the address: 128 bytes 4-6 with 7-9, 64 bytes 4-5 with 7-8, 32 bytes 4 with 7.
    """
    d = descriptors.astype(np.int64)
    start, leading, stride = (d & 0x3FFF) << 4, (d >> 16 & 0x3FFF) << 4, (d >> 32 & 0x3FFF) << 4
    base, mode = (descriptors >> u8(49)).astype(np.int64) & 7, (descriptors >> u8(62)).astype(np.int64)
    if (base != 0).any():
        raise NotImplementedError(f"a wgmma descriptor's base offset must be 0, got {base[base != 0][0]}")
    if (mode != mode[0]).any():
        raise NotImplementedError(f"wgmma descriptors must have one swizzle, got {sorted({*mode.tolist()})}")
    mode = int(mode[0])
    within, by_leading, by_stride = _pattern(rows, depth, itemsize, transposed, mode)
    at = start[:, None, None] + within + by_leading * leading[:, None, None] + by_stride * stride[:, None, None]
    bits = {0: 0, 1: 7, 2: 3, 3: 1}[mode]
    return at ^ ((at >> 7 & bits) << 4)
