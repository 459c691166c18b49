"""What is wrong must be found, each kind of it, and named: faults are raised, races reported."""

import re

import emulator
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRETED
from emulator.findings import (
    AsyncHazard,
    BarrierError,
    GlobalRace,
    Misaligned,
    OutOfBounds,
    ReplicaConflict,
    SharedRace,
    UninitialisedShared,
)  # fmt: skip
from emulator.handwritten import run

if INTERPRETED:
    pytest.skip("checks compiled kernels: --emulate sm_90, or on a GPU", allow_module_level=True)


@pytest.fixture(params=("sm_80", "sm_90"))
def report(request):
    with emulator.running(request.param) as report:
        yield report


# ------------------------------------------------------------------------------------------------ compiled kernels


@triton.jit
def _copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit(do_not_specialize=["stride"])
def _strided(x_ptr, out_ptr, stride):
    at = tl.arange(0, 64)
    tl.store(out_ptr + at * stride, tl.load(x_ptr + at))


def test_a_read_past_the_end(report):
    message = r"_copy: block \(3, 0, 0\) of \(4, 1, 1\), thread \d+: byte 4000 of x_ptr.*PTX line.*_findings\.py:\d+"
    with pytest.raises(OutOfBounds, match=message):
        _copy[(4,)](torch.zeros(1000), torch.zeros(1024), 1001, BLOCK=256)


def test_a_write_past_the_end(report):
    with pytest.raises(OutOfBounds, match=r"out_ptr.*outside of its storage"):
        _copy[(4,)](torch.zeros(1024), torch.zeros(1000), 1024, BLOCK=256)


def test_a_write_before_the_start(report):
    with pytest.raises(OutOfBounds, match="in its storage"):
        _strided[(1,)](torch.zeros(64), torch.zeros(256)[128:], -1)


def test_between_the_elements_of_a_view(report):
    x, out = torch.zeros(64), torch.zeros(64, 4)
    _strided[(1,)](x, out[:, 1], 4)
    with pytest.raises(OutOfBounds, match="between the elements"):
        _strided[(1,)](x, out[:32, 1], 1)


@pytest.mark.parametrize("rows", [3, 2**21 + 1])  # listed, and worked out
def test_gaps_of_views(rows):
    view = torch.zeros(rows * 8).as_strided((rows, 2, 3), (8, 4, 1))
    for element in range(8):
        text = f"ld.global.b32 %r0, [%x+{4 * (element + 8 * (rows - 2))}];"
        if element in (3, 7):
            with pytest.raises(OutOfBounds, match="between the elements"):
                run(text, x=view)
        else:
            run(text, x=view)


@triton.jit
def _aligned(x_ptr, out_ptr, shift, BLOCK: tl.constexpr):
    """Promises a multiple of 16 that `shift` need not be."""
    at = tl.max_contiguous(tl.multiple_of(shift + tl.arange(0, BLOCK), 16), BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + at))


def test_a_broken_promise_of_alignment(report):
    x, out = torch.arange(2048.0), torch.zeros(1024)
    _aligned[(1,)](x, out, 32, BLOCK=1024)
    assert torch.equal(out, x[32:1056])
    with pytest.raises(Misaligned, match=r"x_ptr.*16 bytes, is not a multiple of 16"):
        _aligned[(1,)](x, out, 3, BLOCK=1024)


def test_a_tensor_less_aligned_than_the_one_compiled_for(report):
    x, out = torch.arange(1025.0), torch.zeros(1024)
    compiled = _copy[(4,)](x[:1024], out, 1024, BLOCK=256)
    _copy[(4,)](x[1:], out, 1024, BLOCK=256)  # Triton compiles again
    assert torch.equal(out, x[1:])
    with pytest.raises(Misaligned):
        compiled[4, 1, 1](x[1:], out, 1024, 256)


@triton.jit
def _everybody(out_ptr, SAME: tl.constexpr):
    value = tl.program_id(0) * 0 + 7 if SAME else tl.program_id(0)
    tl.store(out_ptr + tl.arange(0, 32), value)


def test_programs_that_write_to_one_place(report):
    out = torch.zeros(32, dtype=torch.int32)
    _everybody[(3,)](out, SAME=True)
    assert not report.findings
    _everybody[(3,)](out, SAME=False)
    assert report.of("GlobalRace")
    report.raises.add("GlobalRace")
    with pytest.raises(GlobalRace):
        _everybody[(3,)](out, SAME=False)


@triton.jit
def _read_back(out_ptr, copy_ptr, BARRIER: tl.constexpr):
    """Every program stores the same to all, and reads it back, reversed: what other warps have stored."""
    at = tl.arange(0, 128)
    tl.store(out_ptr + at, at * at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(copy_ptr + tl.program_id(0) * 128 + at, tl.load(out_ptr + 127 - at))


@pytest.mark.parametrize("programs", [1, 3, 70])  # in one chunk, and in several
@pytest.mark.parametrize("shuffle", [None, 1, 2])
def test_what_was_stored_may_be_read_back(programs, shuffle):
    out, copy = torch.zeros(128, dtype=torch.int32), torch.zeros(programs, 128, dtype=torch.int32)
    with emulator.running("sm_90", shuffle=shuffle, lanes=4096) as report:
        _read_back[(programs,)](out, copy, BARRIER=True)
        assert not report.findings
        assert torch.equal(copy[-1], torch.arange(127, -1, -1, dtype=torch.int32) ** 2)
        _read_back[(programs,)](out, copy, BARRIER=False)
        assert report.of("GlobalRace")


# ------------------------------------------------------------------------------------------------ global memory

HERE = "mad.wide.u32 %d0, %thread, 4, %x;"  # the thread's own element
FIRST = HERE + "setp.eq.u32 %p0, %block, 0;"  # the first block does what follows `@%p0`, the other what follows `@!%p0`
SET, GET, ADD = "st.global.b32 [%d0], 5;", "ld.global.b32 %r0, [%d0];", "red.global.add.u32 [%d0], 1;"
CHANGE = "st.global.b32 [%d0], 6;"
# An element of both warps; the first one does what follows `@%p0`.
SHARING = "and.b32 %r1, %thread, 31; mad.wide.u32 %d0, %r1, 4, %x; setp.lt.u32 %p0, %thread, 32;"
GLOBAL = {  # what two blocks of 64 threads do, and whether it is a race
    "other bits": (HERE + "st.global.b32 [%d0], %block;", True),
    "equal bits": (HERE + SET, False),
    "equal bits, read before by the other": (f"{FIRST} @!%p0 {GET} {SET}", True),
    "stored by one, read by the other": (f"{FIRST} @%p0 {SET} @!%p0 {GET}", True),
    "what was there, stored by one, read by the other": (f"{FIRST} @%p0 st.global.b32 [%d0], 0; @!%p0 {GET}", True),
    "each reads back its own": (HERE + SET + GET, False),
    "one reads back its own, then the other stores it": (f"{FIRST} @%p0 {SET} @%p0 {GET} @!%p0 {SET}", False),
    "one reads back its own, then the other changes it": (f"{FIRST} @%p0 {SET} @%p0 {GET} @!%p0 {CHANGE}", True),
    "equal bits, then others": (f"{FIRST} {SET} @!%p0 {CHANGE}", True),
    "equal bits, then others, read by who stored the equal ones": (f"{FIRST} {SET} @!%p0 {CHANGE} @%p0 {GET}", True),
    "one changes its own, then the other stores the same": (f"{FIRST} @%p0 {SET} @%p0 {CHANGE} @!%p0 {CHANGE}", True),
    "one changes its own and reads it back": (f"{FIRST} @%p0 {SET} @%p0 {CHANGE} @%p0 {GET}", False),
    "equal bits of warps, read back by one": (f"{SHARING} {SET} @!%p0 {GET}", True),
    "additions": (HERE + ADD, False),
    "additions and stores": (f"{FIRST} @%p0 {ADD} @!%p0 {SET}", True),
    "stores and additions": (f"{FIRST} @%p0 {SET} @!%p0 {ADD}", True),
    "additions and loads": (f"{FIRST} @%p0 {ADD} @!%p0 {GET}", True),
    "loads and additions": (f"{FIRST} @%p0 {GET} @!%p0 {ADD}", True),
    "loads": (HERE + GET, False),
    "other places": (HERE + "mad.wide.u32 %d0, %block, 256, %d0; st.global.b32 [%d0], %block;", False),
}  # fmt: skip
OTHER = HERE + "xor.b32 %r1, %thread, 32; mad.wide.u32 %d1, %r1, 4, %x;"  # an element of the other warp
WARPS = {  # the same of two warps of one block
    "read by another warp": (OTHER + "st.global.b32 [%d0], %thread; ld.global.b32 %r0, [%d1];", True),
    "read by another warp after a barrier": (
        OTHER + "st.global.b32 [%d0], %thread; bar.sync 0; ld.global.b32 %r0, [%d1];", False),
    "stored by another warp": (OTHER + "ld.global.b32 %r0, [%d0]; st.global.b32 [%d1], %thread;", True),
    "stored by another warp after a barrier": (
        OTHER + "ld.global.b32 %r0, [%d0]; bar.sync 0; st.global.b32 [%d1], %thread;", False),
    "other bits of warps": (
        "and.b32 %r1, %thread, 31; mad.wide.u32 %d0, %r1, 4, %x; st.global.b32 [%d0], %thread;", True),
    "equal bits of warps, then others": (f"{SHARING} {SET} @!%p0 {CHANGE}", True),
    "equal bits of warps, then others after a barrier": (f"{SHARING} {SET} bar.sync 0; @!%p0 {CHANGE}", False),
    "one changes its own, then the other warp stores the same": (
        f"{SHARING} @%p0 {SET} @%p0 {CHANGE} @!%p0 {CHANGE}", True),
    "one changes its own, then the other warp stores the same after a barrier": (
        f"{SHARING} @%p0 {SET} @%p0 {CHANGE} bar.sync 0; @!%p0 {CHANGE}", False),
    "additions and loads after a barrier": (
        OTHER + "red.global.add.u32 [%d0], 1; bar.sync 0; ld.global.b32 %r0, [%d1];", False),
}  # fmt: skip


@pytest.mark.parametrize("lanes", [64, 8192])  # blocks one after the other, and together
@pytest.mark.parametrize("case", GLOBAL)
def test_races_of_blocks(case, lanes):
    text, race = GLOBAL[case]
    report = run(text, threads=64, blocks=2, lanes=lanes, x=np.zeros(128, np.int32))
    assert {each.kind for each in report.findings.values()} == ({"GlobalRace"} if race else set())


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("case", WARPS)
def test_races_of_warps(case, blocks):
    text, race = WARPS[case]
    if blocks == 2:  # each on its own elements
        text = "mad.wide.u32 %d5, %block, 256, %x; mov.b64 %x, %d5;" + text
    report = run(text, threads=64, blocks=blocks, x=np.zeros(64 * blocks, np.int32))
    assert bool(report.of("GlobalRace")) == race
    assert len(report.findings) == race


def test_nobody_rereads_what_another_block_has_changed():
    report = run(f"{FIRST} {SET} @!%p0 {CHANGE} @%p0 {GET}", blocks=2, x=np.zeros(32, np.int32))
    store, load = (each.message for each in report.findings.values())
    assert "written here, written by several blocks" in store
    assert "read here, written by block (1, 0, 0)" in load


def test_other_bits_of_lanes_are_found_in_any_order():
    for seed in range(20):
        text = "setp.lt.u32 %p0, %thread, 2; @%p0 st.global.b32 [%x], %thread;"
        assert run(text, shuffle=seed, x=np.zeros(1, np.int32)).of("ReplicaConflict")


def test_the_last_of_1024_threads():
    """What all have read, it writes."""
    last = "setp.eq.u32 %p0, %thread, 1023;"
    assert run(f"{last} ld.global.b32 %r0, [%x]; @%p0 st.global.b32 [%x], 5;", 1024, x=np.zeros(1, np.int32)).findings
    store = "st.shared.b32 [%shared], 7; bar.sync 0; ld.shared.b32 %r5, [%shared];"
    with pytest.raises(SharedRace, match="written here, read by several warps"):
        wrong(f"{store} {last} @%p0 st.shared.b32 [%shared], 8;", threads=1024)


def test_wide_and_narrow_accesses_race():
    """A block stores 16 bytes, the other loads one of them."""
    text = "setp.eq.u32 %p0, %block, 0; @%p0 st.global.v4.b32 [%x], {1, 1, 1, 1}; @!%p0 ld.global.b8 %r0, [%x+13];"
    assert run(text, blocks=2, x=np.zeros(16, np.uint8)).of("GlobalRace")
    text = text.replace("13", "16")
    assert not run(text, blocks=2, x=np.zeros(32, np.uint8)).findings


def test_lanes_that_store_other_values_to_one_place():
    assert run("st.global.b32 [%x], %thread;", x=np.zeros(1, np.int32)).of("ReplicaConflict")
    assert not run("st.global.b32 [%x], 7;", x=np.zeros(1, np.int32)).findings
    with pytest.raises(ReplicaConflict, match="other values"):
        wrong("st.shared.b32 [%shared], %thread;", threads=32)
    wrong("st.shared.b32 [%shared], 7;", threads=32)


def test_views_of_one_storage_race():
    x = torch.zeros(64)
    text = f"{FIRST} mad.wide.u32 %d1, %thread, 4, %y; @%p0 {SET} @!%p0 ld.global.b32 %r0, [%d1];"
    assert run(text, blocks=2, x=x[:32], y=x[16:48]).of("GlobalRace")
    assert not run(text, blocks=2, x=x[:32], y=x[32:]).findings


# ------------------------------------------------------------------------------------------------ shared memory

MINE = "shl.b32 %r1, %thread, 2; add.u32 %r2, %shared, %r1; xor.b32 %r3, %r1, 256; add.u32 %r4, %shared, %r3;"
STORE, LOAD = "st.shared.b32 [%r2], %thread;", "ld.shared.b32 %r5, [%r4];"  # the other's place is of another warp


def wrong(text: str, shared: int = 512, threads: int = 128, **options) -> np.ndarray:
    """%r5 of each thread."""
    out = np.zeros(threads, np.int32)
    text = f"mov.b32 %r5, 0; {MINE} {text} mad.wide.u32 %d9, %thread, 4, %out; st.global.b32 [%d9], %r5;"
    report = run(text, threads=threads, shared=shared, out=out, **options)
    for each in report.findings.values():
        raise emulator.findings.KINDS[each.kind](each.message)
    return out


WARP1 = "shr.u32 %r6, %thread, 5; setp.eq.u32 %p1, %r6, 1;"
SET0, SET1 = "@%p0 st.shared.b32 [%shared], 1;", "@%p1 st.shared.b32 [%shared], 1;"
CHANGE1 = "@%p1 st.shared.b32 [%shared], 2;"
WARP0, SHUFFLE = "setp.lt.u32 %p0, %thread, 32;", "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;"
HALF = "setp.lt.u32 %p0, %thread, 16; @%p0 bra $L1; bra $L2; $L1:"  # of a warp does what follows, up to $L2
SHARED = [
    (SharedRace, STORE + LOAD, "read here, written by thread"),
    (SharedRace, STORE + "bar.sync 0;" + LOAD + "st.shared.b32 [%r2], 5;", "written here, read by"),
    (SharedRace, "and.b32 %r6, %r1, 127; add.u32 %r6, %r6, %shared; st.shared.b32 [%r6], %thread;", "by the same"),
    (SharedRace, "bar.sync 0; st.shared.b32 [%r2], 1; st.shared.b32 [%r4], 2;", "written here, written by"),
    (SharedRace, f"st.shared.v2.b32 [%shared], {{1, 1}}; {WARP0} @!%p0 ld.shared.b8 %r5, [%shared+7];", "read here"),
    (SharedRace, WARP0 + WARP1 + SET0 + SET1 + CHANGE1, "written here, written by several warps"),
    (SharedRace, WARP0 + WARP1 + CHANGE1 + SET1 + SET0, "written here, other bits written by thread"),
    (UninitialisedShared, WARP0 + "@%p0 " + STORE + "bar.sync 0;" + LOAD, "never written"),
    (UninitialisedShared, "ld.shared.b32 %r5, [%r2];", "never written"),
    (OutOfBounds, "st.shared.b32 [%r2+4], 1;", "outside of its 512 bytes"),
    (OutOfBounds, "st.shared.b32 [%r2+-4], 1;", "byte -4"),
    (OutOfBounds, "ld.shared.b32 %r5, [%r2+1048576];", "outside of its 512 bytes"),
    (Misaligned, "st.shared.b32 [%r2+2], 1;", "not a multiple of 4"),
    (Misaligned, "st.shared.v2.b32 [%r2], {1, 1};", "not a multiple of 8"),
    (BarrierError, WARP0 + "@%p0 ret; bar.sync 0;", "exited"),
    (BarrierError, WARP0 + "@%p0 bra $L1; bar.sync 0; bra $L2; $L1: bar.sync 0; $L2:", "different"),
    (BarrierError, f"{HALF} {SHUFFLE} $L2:", "16 of 32 lanes"),
    (BarrierError, f"{HALF} bar.warp.sync -1; $L2:", "16 of 32 lanes"),
    (BarrierError, "trap;", "trap"),
    (BarrierError, "setp.eq.u32 %p0, %thread, 9; @%p0 trap;", "thread 9: trap"),
]  # fmt: skip
FINE = [
    STORE + "bar.sync 0;" + LOAD + STORE,  # of the bits that are there
    STORE + "bar.sync 0;" + LOAD,
    STORE + "ld.shared.b32 %r5, [%r2];",  # its own
    "st.shared.b32 [%shared], 7; bar.sync 0; st.shared.b32 [%shared], 7;",  # the same of all
    WARP0 + WARP1 + SET0 + SET1 + "bar.sync 0;" + CHANGE1,
    WARP0 + WARP1 + CHANGE1 + SET1 + "bar.sync 0;" + SET0,
    f"{WARP0} @%p0 bra $L1; bra $L2; $L1: {SHUFFLE} $L2:",
    "setp.eq.u32 %p0, %thread, 999; @%p0 trap;",
    "setp.lt.u32 %p0, %thread, 40; @%p0 bra $L1; mov.b32 %r5, 1; $L1: bar.sync 0;",  # apart, and together again
]


@pytest.mark.parametrize(("kind", "text", "message"), SHARED, ids=[f"{row[0].__name__}: {row[1]}" for row in SHARED])
def test_shared_memory_and_barriers(kind, text, message):
    with pytest.raises(kind, match=re.escape(message)):
        wrong(text)


@pytest.mark.parametrize("text", FINE)
def test_what_is_fine(text):
    wrong(text)


def test_matrices_race():
    store = "mad.lo.u32 %r6, %thread, 16, %shared;"
    store += "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r6], {%r1, %r1, %r1, %r1};"
    load = "xor.b32 %r7, %thread, 64; mad.lo.u32 %r6, %r7, 16, %shared;"
    load += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r8, %r9, %r10, %r11}, [%r6];"
    wrong(store + "bar.sync 0;" + load, shared=2048)
    with pytest.raises(SharedRace):
        wrong(store + load, shared=2048)
    with pytest.raises(UninitialisedShared):
        wrong("bar.sync 0;" + load, shared=2048)
    with pytest.raises(Misaligned):
        wrong(store.replace("[%r6]", "[%r6+8]"), shared=4096)
    with pytest.raises(BarrierError):
        wrong(HALF + store + "$L2:", shared=2048)


@pytest.mark.parametrize("apart", [1, -1])
def test_warps_may_run_one_after_the_other(apart):
    """Then a missing barrier shows in what is read: of one of each pair of warps it is the old value."""
    before = "st.shared.b32 [%r2], 1000; bar.sync 0;"
    found = wrong(before + STORE + LOAD, shared_races=False, apart=apart)
    late = (np.arange(128) < 64) if apart == 1 else (np.arange(128) >= 64)
    assert (found == np.where(late, 1000, np.arange(128) ^ 64)).all()
    assert (wrong(before + STORE + "bar.sync 0;" + LOAD, apart=apart) == np.arange(128) ^ 64).all()


# ------------------------------------------------------------------------------------------------ wgmma

FILL = "".join(f"st.shared.b32 [%r2+{512 * i}], 0x3c003c00;" for i in range(4))
WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r5,%r21,%r22,%r23}, %d4, %d4, 1, 1, 1, 0, 0;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
FIELDS = 8 << 16 | 16 << 32  # no swizzle: 128 bytes between k-blocks, 256 between rows of 8


def wgmma(fill=FILL, proxy="fence.proxy.async.shared::cta;", barrier="bar.sync 0;", fence="wgmma.fence.sync.aligned;",
          descriptor=f"or.b64 %d4, %d4, {FIELDS};", product=WGMMA, between="", commit=COMMIT, flying="",
          wait=WAIT, after="", **options) -> np.ndarray:  # fmt: skip
    text = fill + proxy + barrier + "cvt.u64.u32 %d4, %shared; shr.u64 %d4, %d4, 4;" + descriptor
    text += "".join(f"add.s32 %r{n}, %thread, 0; sub.s32 %r{n}, %r{n}, %thread;" for n in (5, 21, 22, 23))
    return wrong(text + fence + product + between + commit + flying + wait + after, shared=2048, **options)


WRONG = [
    (AsyncHazard, {"proxy": ""}, "without fence.proxy.async"),
    (AsyncHazard, {"flying": "st.shared.b32 [%r2], 0;"}, "still reads"),
    (AsyncHazard, {"between": COMMIT + WGMMA, "wait": f"{WAIT[:-2]}1; bar.sync 0; st.shared.b32 [%r2], 0; {WAIT}"},
     "still reads"),
    (AsyncHazard, {"proxy": f"fence.proxy.async; bar.sync 0; st.shared.b32 [%shared], 0x3c003c00; {WARP0}"
                            "@!%p0 bra $L1; fence.proxy.async; $L1:"}, "without fence.proxy.async"),
    (AsyncHazard, {"wait": ""}, "reads %r5, an accumulator"),
    (AsyncHazard, {"commit": ""}, "reads %r5, an accumulator"),
    (AsyncHazard, {"wait": "wgmma.wait_group.sync.aligned 1;"}, "reads %r5, an accumulator"),
    (AsyncHazard, {"flying": "add.s32 %r30, %r21, 1;"}, "reads %r21"),
    (AsyncHazard, {"flying": "mov.b32 %r22, 1;"}, "writes %r22"),
    (AsyncHazard, {"fence": ""}, "uses"),
    (AsyncHazard, {"fence": "wgmma.fence.sync.aligned; add.s32 %r21, %r21, 0;"}, "uses %r21 without a wgmma.fence"),
    (AsyncHazard, {"descriptor": "cvt.u64.u32 %d5, %thread; or.b64 %d4, %d4, %d5;"}, "descriptors differ"),
    (SharedRace, {"barrier": ""}, "read here by wgmma"),
    (SharedRace, {"after": "st.shared.b32 [%r2], 0;"}, "written here, read by several warps"),
    (UninitialisedShared, {"fill": "st.shared.b32 [%r2], 0x3c003c00;"}, "read by wgmma"),
    (OutOfBounds, {"descriptor": f"or.b64 %d4, %d4, {FIELDS | 1 << 45};"}, "outside"),
    (BarrierError, {"commit": f"{WARP0} @%p0 bra $L1; {COMMIT} $L1:"}, "96 of 128 lanes"),
    (BarrierError, {"wait": f"{WARP0} @%p0 bra $L1; {WAIT} $L1:"}, "96 of 128 lanes"),
    (BarrierError, {"product": "setp.lt.u32 %p0, %thread, 32; @%p0 bra $L1;" + WGMMA + "$L1:"}, "96 of 128 lanes"),
]  # fmt: skip


def test_wgmma_with_all_its_fences():
    assert (wgmma().view(np.float32) == 16).all()
    wgmma(after="bar.sync 0; st.shared.b32 [%r2], 0;")
    assert (wgmma(between=COMMIT + WGMMA).view(np.float32) == 32).all()


@pytest.mark.parametrize(("kind", "changes", "message"), WRONG, ids=[f"{row[2]}: {min(row[1])}" for row in WRONG])
def test_wgmma_is_fenced(kind, changes, message):
    with pytest.raises(kind, match=re.escape(message)):
        wgmma(**changes)


@pytest.mark.parametrize("lanes", [128, 8192])  # blocks one after the other, and together
def test_blocks_wait_for_their_own_wgmma(lanes):
    """The first block waits, then the other overwrites an operand, before or after it has waited, too."""
    apart = "setp.ne.u32 %p0, %block, 0; @%p0 bra $L1;" + WAIT + "bra $L2; $L1:{} $L2:"
    change = "bar.sync 0; st.shared.b32 [%r2], 0;"
    assert (wgmma(wait=apart.format(WAIT + change), blocks=2, lanes=lanes).view(np.float32) == 16).all()
    with pytest.raises(AsyncHazard, match="still reads"):
        wgmma(wait=apart.format(change + WAIT), blocks=2, lanes=lanes)


@pytest.mark.parametrize("lanes", [128, 8192])
def test_blocks_fence_their_own_stores(lanes):
    """Also what all their warps have stored."""
    apart = "setp.ne.u32 %p0, %block, 0; @%p0 bra $L1; fence.proxy.async.shared::cta; bra $L2; $L1:{} $L2:"
    fill = FILL + "st.shared.b32 [%shared], 0x3c003c00;"
    wgmma(fill=fill, proxy=apart.format("fence.proxy.async.shared::cta;"), blocks=2, lanes=lanes)
    with pytest.raises(AsyncHazard, match="stored without fence"):
        wgmma(fill=fill, proxy=apart.format(""), blocks=2, lanes=lanes)


# ------------------------------------------------------------------------------------------------ driver


def test_tensors_elsewhere_are_refused():
    with pytest.raises(ValueError, match="x must be on the CPU, got a tensor on meta"):
        run(GET, x=torch.zeros(4, device="meta"))


@triton.jit
def _tickets(count_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(count_ptr, 1))


def test_a_seed_gives_launches_their_orders_again():
    """Each launch has an order of its own."""

    def orders(seed: int) -> list[list[int]]:
        found = []
        with emulator.running("sm_90", shuffle=seed):
            for _ in range(2):
                count, out = torch.zeros(1, dtype=torch.int32), torch.zeros(50, dtype=torch.int32)
                _tickets[(50,)](count, out)
                found.append(out.tolist())
        return found

    first, other = orders(3), orders(4)
    assert first == orders(3)
    assert all(sorted(each) == list(range(50)) for each in first + other)
    assert len({tuple(each) for each in (*first, *other, range(50))}) == 5


@pytest.mark.parametrize("target", ["sm_70", "90", "gfx942"])
def test_unknown_targets(target):
    with pytest.raises(ValueError, match=f"target must be one of sm_75, .* got '{target}'"), emulator.running(target):
        pass


def test_a_report_is_of_its_time():
    out = torch.zeros(32, dtype=torch.int32)
    with emulator.running("sm_90") as outer:
        with emulator.running("sm_80") as inner:
            _everybody[(3,)](out, SAME=False)
        _everybody[(2,)](out, SAME=True)
    assert inner.of("GlobalRace")
    assert not outer.findings
    assert outer.stores == {("_everybody", "out_ptr")}
    assert (outer.launches.total(), inner.launches.total()) == (1, 1)
    assert str(outer) == "1 launches of 1 kernels, no finding"


def test_some_of_the_blocks():
    out = np.zeros(100, np.int32)
    text = "mad.wide.u32 %d0, %block, 4, %out; st.global.b32 [%d0], 1;"
    run(text, blocks=100, choose=lambda name, total: [0, total - 1], out=out)
    assert out.tolist() == [1, *[0] * 98, 1]
