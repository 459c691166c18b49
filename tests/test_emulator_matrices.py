"""Matrix instructions of the emulator: their layouts, by the formulas of the PTX ISA, and products in whole numbers."""

import numpy as np
import pytest
from conftest import INTERPRETED
from emulator.findings import EmulationError
from emulator.handwritten import run

if INTERPRETED:
    pytest.skip("checks compiled kernels: --emulate sm_90, or on a GPU", allow_module_level=True)

rng = np.random.default_rng(0)
STORED = {"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}


def stored(x: np.ndarray, kind: str) -> np.ndarray:
    """Small whole numbers as the bytes of a type."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) if kind == "bf16" else x.astype(STORED[kind])


def loads(name: str, registers: list[str], at: str, width: int) -> str:
    """Into registers of a thread, from its row of an array."""
    bits, each = 8 * width, f"mad.wide.u32 %d0, %thread, {len(registers) * width}, %{name};"
    return each + "".join(f"{at}.b{bits} {r}, [%d0+{n * width}];" for n, r in enumerate(registers))


def stores(name: str, registers: list[str], width: int) -> str:
    each = f"mad.wide.u32 %d0, %thread, {len(registers) * width}, %{name};"
    return each + "".join(f"st.global.b{8 * width} [%d0+{n * width}], {r};" for n, r in enumerate(registers))


def named(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{n}" for n in range(count)]


# --------------------------------------------------------------------------- mma (9.7.14, figures of the fragments)


def element_a(kind: str, rows: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of A's element i of a lane: of 16 bits two by two along k, then down, then along k."""
    group, t = lane // 4, lane % 4
    if kind in ("f16", "bf16"):
        return group + i // 2 % 2 * 8, 2 * t + i % 2 + i // 4 * 8
    return (group, t + 4 * i) if rows == 8 else (group + i % 2 * 8, t + i // 2 * 4)


def element_b(kind: str, lane: int, i: int) -> tuple[int, int]:
    group, t = lane // 4, lane % 4
    return (2 * t + i % 2 + i // 2 * 8, group) if kind in ("f16", "bf16") else (t + 4 * i, group)


def element_c(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + i // 2 % 2 * 8, 2 * (lane % 4) + i % 2 + i // 4 * 8


MMA = [
    ("f16", "f32", 16, 16), ("bf16", "f32", 16, 16), ("f16", "f16", 16, 16), ("f16", "f32", 16, 8),
    ("bf16", "f32", 16, 8), ("f16", "f16", 16, 8), ("tf32", "f32", 16, 8), ("tf32", "f32", 16, 4), ("f64", "f64", 8, 4),
    ("f64", "f64", 16, 4), ("f64", "f64", 16, 8), ("f64", "f64", 16, 16),
]  # fmt: skip


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(("kind", "kind_c", "rows", "depth"), MMA)
def test_mma(kind, kind_c, rows, depth, chained):
    """D = A B + C, and with the same A and B again on top."""
    a, b, c = rng.integers(-4, 5, (rows, depth)), rng.integers(-4, 5, (depth, 8)), rng.integers(-4, 5, (rows, 8))
    of_a = [[element_a(kind, rows, lane, i) for i in range(rows * depth // 32)] for lane in range(32)]
    of_b = [[element_b(kind, lane, i) for i in range(depth * 8 // 32)] for lane in range(32)]
    of_c = [[element_c(lane, i) for i in range(rows * 8 // 32)] for lane in range(32)]
    fragments = [
        stored(np.array([[matrix[each] for each in lane] for lane in places]), each)
        for matrix, places, each in ((a, of_a, kind), (b, of_b, kind), (c, of_c, kind_c))
    ]
    width = 8 if kind == "f64" else 4
    names = [named(prefix, x.shape[1] * x.itemsize // width) for prefix, x in zip("uvw", fragments, strict=True)]
    d = np.zeros_like(fragments[2])
    text = f".reg .b{8 * width} {', '.join(each for registers in names for each in registers)};"
    for argument, registers in zip("abc", names, strict=True):
        text += loads(argument, registers, "ld.global", width)
    u, v, w = (f"{{{', '.join(each)}}}" for each in names)
    mma = f"mma.sync.aligned.m{rows}n8k{depth}.row.col.{kind_c}.{kind}.{kind}.{kind_c} {w}, {u}, {v}, {w};"
    text += mma * (1 + chained) + stores("d", names[2], width)
    run(text, a=fragments[0], b=fragments[1], c=fragments[2], d=d)
    expected = (1 + chained) * (a @ b) + c
    assert (d == np.array([[expected[each] for each in lane] for lane in of_c])).all()


def test_tf32_reads_ten_bits():
    """A's low 13 bits are not read."""
    out, ones = np.zeros((32, 4), np.float32), "{%r1, %r1, %r1, %r1}, {%r2, %r2}, {%r3, %r3, %r3, %r3}"
    text = "mov.b32 %r1, 0x3F801FFF; mov.b32 %r2, 0x3F800000; mov.b32 %r3, 0;"
    text += f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%r4, %r5, %r6, %r7}}, {ones};"
    run(text + stores("out", named("%r", 8)[4:], 4), out=out)
    assert (out == 8).all()


# ------------------------------------------------------------------------------------- ldmatrix, stmatrix (9.7.14.5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Lane 8 m + r names row r of matrix m; register m has elements 2 (lane % 4) and the next of row lane / 4."""
    image = rng.integers(0, 2**16, (32, 8), np.uint16)
    out, back = np.zeros((32, count, 2), np.uint16), np.zeros((32, 8), np.uint16)
    trans, held = ".trans" if transposed else "", "{" + ", ".join(named("%r", 12)[4 : 4 + count]) + "}"
    row = "mad.wide.u32 %d0, %thread, 16, %{}; mul.lo.u32 %r0, %thread, 48; add.u32 %r0, %r0, %shared;"
    text = row.format("image") + "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d0];"
    text += "st.shared.v4.b32 [%r0], {%r4, %r5, %r6, %r7}; bar.sync 0;"
    text += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {held}, [%r0];"
    text += stores("out", named("%r", 12)[4 : 4 + count], 4)
    text += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r0+16], {held}; bar.sync 0;"
    text += f"setp.lt.u32 %p0, %thread, {8 * count}; @%p0 ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r0+16];"
    text += row.format("back") + "@%p0 st.global.v4.b32 [%d0], {%r4, %r5, %r6, %r7};"
    run(text, shared=32 * 48, image=image, out=out, back=back)
    for lane in range(32):
        for m in range(count):
            matrix = image[8 * m : 8 * m + 8]
            matrix = matrix.T if transposed else matrix
            assert out[lane, m].tolist() == matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()
    assert (back[: 8 * count] == image[: 8 * count]).all()


# ------------------------------------------------------------------------------------------------ wgmma (9.7.15.5)

SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes: bits 62 and 63 of a descriptor
SIZE = 32768  # bytes for each operand


def place(r: int, k: int, itemsize: int, swizzle: int, across: bool, leading: int, stride: int) -> int:
    """The byte of element (r, k), by the figures of the canonical layouts; `across`: rows r follow each other.

    Without swizzle, 8 x 16 bytes are a core matrix without gap. Else 8 rows of `swizzle` bytes are one, in which
    16-byte chunks change places by the number of the row: the chunk's exclusive or with its place in 128 bytes.
    """
    along, down = (r, k) if across else (k, r)
    byte = along * itemsize
    if not swizzle:
        near, far = (stride, leading) if across else (leading, stride)
        return byte % 16 + down % 8 * 16 + byte // 16 * near + down // 8 * far
    chunk = byte % swizzle // 16 ^ down % 8 // (128 // swizzle)
    return byte % 16 + chunk * 16 + down % 8 * swizzle + byte // swizzle * leading + down // 8 * stride


def image_of(x: np.ndarray, kind: str, swizzle: int, across: bool) -> tuple[np.ndarray, int]:
    """The bytes of a matrix [r, k] in shared memory, and its descriptor without the address; the rest is 0xFF: NaN."""
    raw = stored(x, kind)
    itemsize, (rows, depth) = raw.itemsize, raw.shape
    core = 8 * (swizzle or 16)
    along, down = (rows, depth) if across else (depth, rows)
    cores_along = -(-along * itemsize // (swizzle or 16))
    if swizzle or not across:
        leading, stride = core * (down // 8 if across else 1), core if across else core * cores_along
    else:
        leading, stride = core * cores_along, core
    image = np.full(SIZE, 0xFF, np.uint8)
    for r in range(rows):
        for k in range(depth):
            at = place(r, k, itemsize, swizzle, across, leading, stride)
            assert (image[at : at + itemsize] == 0xFF).all()
            image[at : at + itemsize] = raw[r, k : k + 1].view(np.uint8)
    return image, leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[swizzle] << 62


def product(a_descriptor, b_descriptor, images, kind, columns, flags, fragment=None, c=None) -> np.ndarray:
    """[128, columns / 2]: the accumulators of each thread."""
    depth = 8 if kind == "tf32" else 16
    d = np.zeros((128, columns // 2), np.float32)
    accumulators = named("w", columns // 2)
    text = f".reg .b32 {', '.join(accumulators)};"
    for start in range(0, 2 * SIZE, 16 * 128):
        text += f"mad.wide.u32 %d0, %thread, 16, %images; ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d0+{start}];"
        text += f"mad.lo.u32 %r0, %thread, 16, %shared; st.shared.v4.b32 [%r0+{start}], {{%r1, %r2, %r3, %r4}};"
    text += "fence.proxy.async.shared::cta; bar.sync 0; shr.u32 %r0, %shared, 4; cvt.u64.u32 %d1, %r0;"
    text += f"or.b64 %d2, %d1, {a_descriptor}; add.u64 %d3, %d1, {SIZE // 16}; or.b64 %d3, %d3, {b_descriptor};"
    arguments, left = {}, "%d2"
    if fragment is not None:
        text += loads("fragment", named("%r", 8)[4:], "ld.global", 4)
        arguments["fragment"], left = fragment, "{%r4, %r5, %r6, %r7}"
    if c is not None:
        text += loads("c", accumulators, "ld.global", 4)
        arguments["c"] = c
    else:
        text += "".join(f"mov.b32 {each}, 0f7FC00000;" for each in accumulators)  # must not be read
    text += "setp.ne.s32 %p0, 1, " + ("0;" if c is not None else "1;") + "wgmma.fence.sync.aligned;"
    text += f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind} {{{', '.join(accumulators)}}},"
    text += f"{left}, %d3, {'%p0' if flags is None or c is not None else '0'}, 1, 1"
    text += "".join(f", {int(each)}" for each in flags or ()) + ";"
    text += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" + stores("d", accumulators, 4)
    run(text, threads=128, shared=2 * SIZE, images=images, d=d, **arguments)
    return d


def accumulated(expected: np.ndarray) -> np.ndarray:
    """By thread: warps have 16 rows each, in the layout of mma with more columns."""
    found = np.zeros((128, expected.shape[1] // 2), np.float32)
    for thread in range(128):
        for i in range(found.shape[1]):
            row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
            found[thread, i] = expected[row, i // 4 * 8 + 2 * (thread % 4) + i % 2]
    return found


COLUMNS = {"f16": (8, 256), "bf16": (16, 64), "tf32": (8, 16, 32, 128)}
WGMMA = [
    (kind, columns, swizzle, a_across, b_across)
    for kind, sizes in COLUMNS.items()
    for columns in sizes
    for swizzle in SWIZZLES
    for a_across, b_across in ((False, False), (True, False), (False, True), (True, True))
    if columns < 128 or swizzle == 128
    if kind != "tf32" or not (a_across or b_across)  # rows of 32 bits cannot follow each other
    if not b_across or columns * 2 >= (swizzle or 16)
]


@pytest.mark.parametrize(("kind", "columns", "swizzle", "a_across", "b_across"), WGMMA)
def test_wgmma(kind, columns, swizzle, a_across, b_across):
    depth = 8 if kind == "tf32" else 16
    a, b = rng.integers(-4, 5, (64, depth)), rng.integers(-4, 5, (columns, depth))
    (left, a_fields), (right, b_fields) = image_of(a, kind, swizzle, a_across), image_of(b, kind, swizzle, b_across)
    flags = None if kind == "tf32" else (a_across, b_across)
    found = product(a_fields, b_fields, np.r_[left, right], kind, columns, flags)
    assert (found == accumulated(a @ b.T)).all()
    c = accumulated(rng.integers(-4, 5, (64, columns)))
    found = product(a_fields, b_fields, np.r_[left, right], kind, columns, flags, c=c)
    assert (found == accumulated(a @ b.T) + c).all()
    for other in set(SWIZZLES) - {swizzle} if columns < 128 else ():  # is noticed: other values, or unwritten memory
        wrong = b_fields & ~(3 << 62) | SWIZZLES[other] << 62
        try:
            found = product(a_fields, wrong, np.r_[left, right], kind, columns, flags)
        except EmulationError:
            continue
        assert (found != accumulated(a @ b.T)).any()


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_wgmma_with_a_in_registers(kind):
    depth = 8 if kind == "tf32" else 16
    a, b = rng.integers(-4, 5, (64, depth)), rng.integers(-4, 5, (64, depth))
    right, fields = image_of(b, kind, 0, False)
    places = [[element_a(kind, 16, lane, i) for i in range(16 * depth // 32)] for lane in range(32)]
    rows = [[a[16 * warp + r, k] for r, k in lane] for warp in range(4) for lane in places]
    fragment = stored(np.array(rows), kind)
    images = np.r_[np.zeros(SIZE, np.uint8), right]
    found = product(0, fields, images, kind, 64, None if kind == "tf32" else (False,), fragment=fragment)
    assert (found == accumulated(a @ b.T)).all()
