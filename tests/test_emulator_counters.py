"""Counters of kernels whose counts are known by hand."""

import emulator
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRETED
from emulator.handwritten import run

if INTERPRETED:
    pytest.skip("checks compiled kernels: --emulate sm_90, or on a GPU", allow_module_level=True)


def counted(body: str, *tensors, threads: int = 32, shared: int = 0, blocks: int = 1):
    body = "mov.u32 %r1, %thread; mov.u32 %r2, %block;" + body
    report = run(body, threads, blocks, shared, counters=True, **dict(zip(("x", "out"), tensors, strict=True)))
    (found,) = report.counters
    return found


def loads(stride: int, offset: int = 0, kind: str = "b32", registers: str = "%r3", threads: int = 32):
    body = f"""
    mul.wide.u32 %d3, %r1, {stride};
    add.s64 %d3, %x, %d3;
    ld.global.{kind} {registers}, [%d3+{offset}];
    """
    return counted(body, torch.zeros(4096), torch.zeros(4), threads=threads).total("ld.global")


def test_a_coalesced_load():
    found = loads(4)
    assert (found.requests, found.lanes, found.sectors, found.lines, found.tags) == (1, 32, 4, 1, 1)
    assert (found.used, found.fewest) == (128, 4)


def test_every_other_element():
    found = loads(8)
    assert (found.sectors, found.lines, found.used, found.fewest) == (8, 2, 128, 4)


def test_eight_bytes_a_lane():
    found = loads(8, kind="v2.b32", registers="{%r3, %r4}")
    assert (found.sectors, found.lines, found.used, found.fewest) == (8, 2, 256, 8)


def test_sixteen_bytes_a_lane():
    found = loads(16, kind="v4.b32", registers="{%r3, %r4, %r5, %r6}")
    assert (found.sectors, found.lines, found.tags, found.used) == (16, 4, 1, 512)


def test_a_misaligned_base():
    found = loads(4, offset=16)
    assert (found.sectors, found.lines, found.fewest) == (5, 2, 4)


def test_a_line_of_its_own_for_each_lane():
    found = loads(128)
    assert (found.sectors, found.lines, found.tags, found.used, found.fewest) == (32, 32, 8, 128, 4)


def test_one_address():
    found = loads(0)
    assert (found.requests, found.sectors, found.lines, found.used, found.fewest) == (1, 1, 1, 4, 1)


def test_several_warps_are_several_requests():
    found = loads(0, threads=128)
    assert (found.requests, found.sectors, found.used) == (4, 4, 16)


def test_guards():
    body = """
    mul.wide.u32 %d3, %r1, 4;
    add.s64 %d3, %x, %d3;
    setp.lt.u32 %p1, %r1, 40;
    @%p1 ld.global.b32 %r3, [%d3];
    setp.lt.u32 %p2, %r1, 8;
    @%p2 st.global.b32 [%d3], %r1;
    """
    found = counted(body, torch.zeros(64), torch.zeros(4), threads=64)
    load, store = found.total("ld.global"), found.total("st.global")
    assert (load.requests, load.lanes, load.sectors, load.fewest) == (2, 40, 5, 5)
    assert (store.requests, store.lanes, store.sectors) == (1, 8, 1)
    counts = found.instructions()
    assert (counts["ld.global"], counts["st.global"], counts["integer"]) == (2, 2, 8)  # issued by both warps


def test_reuse_within_a_block_and_between_blocks():
    body = """
    mul.wide.u32 %d3, %r1, 4;
    add.s64 %d3, %x, %d3;
    ld.global.b32 %r3, [%d3];
    ld.global.b32 %r4, [%d3];
    mul.wide.u32 %d4, %r2, 128;
    add.s64 %d5, %out, %d4;
    red.global.gpu.relaxed.add.u32 [%d5], %r1;
    """
    found = counted(body, torch.zeros(64), torch.zeros(256), blocks=8)
    assert found.total("ld.global").sectors == 8 * 2 * 4
    assert found.by_block["ld.global"] == {"x": 8 * 4, "out": 0}
    assert found.total("atomic").sectors == 8
    assert found.blocks == 8


def exchanged(row: int, kind: str = "b32", registers: str = "%r3"):
    """Each lane writes a word of its own row, then reads along it."""
    body = f"""
    mov.u32 %r10, memory;
    mad.lo.u32 %r11, %r1, {row}, %r10;
    st.shared.b32 [%r11], %r1;
    st.shared.b32 [%r11+4], %r1;
    st.shared.b32 [%r11+8], %r1;
    st.shared.b32 [%r11+12], %r1;
    bar.sync 0;
    ld.shared.{kind} {registers}, [%r11];
    """
    return counted(body, torch.zeros(4), torch.zeros(4), shared=32 * row + 16)


def test_a_transpose_in_shared_memory():
    store = exchanged(128).total("st.shared")
    assert (store.requests, store.wavefronts, store.least) == (4, 4 * 32, 4)
    assert exchanged(128).total("ld.shared").wavefronts == 32
    assert exchanged(132, "b32").total("ld.shared").wavefronts == 1
    padded = exchanged(144)  # 36 words: eight rows meet all banks once by fours
    assert padded.total("st.shared").wavefronts == 4 * 4
    assert padded.instructions()["barrier"] == 1


def test_wide_shared_accesses():
    four = exchanged(144, "v4.b32", "{%r3, %r4, %r5, %r6}").total("ld.shared")
    assert (four.wavefronts, four.least) == (4, 4)
    four = exchanged(128, "v4.b32", "{%r3, %r4, %r5, %r6}").total("ld.shared")
    assert (four.wavefronts, four.least) == (32, 4)
    two = exchanged(144, "v2.b32", "{%r3, %r4}").total("ld.shared")
    assert (two.wavefronts, two.least) == (4, 2)
    together = exchanged(16, "v4.b32", "{%r3, %r4, %r5, %r6}").total("ld.shared")
    assert (together.wavefronts, together.least, together.used) == (4, 4, 512)


@pytest.mark.parametrize(("row", "each"), [(16, 1), (64, 4), (128, 8), (144, 1)])
def test_matrices(row, each):
    """Eight rows of 16 bytes: one wavefront if they meet all banks."""
    body = f"""
    mov.u32 %r10, memory;
    mad.lo.u32 %r11, %r1, {row}, %r10;
    st.shared.v4.b32 [%r11], {{%r1, %r1, %r1, %r1}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r11];
    """
    found = counted(body, torch.zeros(4), torch.zeros(4), shared=32 * row).total("ldmatrix")
    assert (found.requests, found.wavefronts, found.least) == (1, 4 * each, 4)


def test_one_word_for_all():
    body = """
    mov.u32 %r10, memory;
    st.shared.b32 [%r10], %r2;
    bar.sync 0;
    ld.shared.b32 %r3, [%r10];
    """
    found = counted(body, torch.zeros(4), torch.zeros(4), shared=16).total("ld.shared")
    assert (found.wavefronts, found.least, found.used) == (1, 1, 4)


def test_divergent_warps_and_loops():
    body = """
    mov.u32 %r3, 0;
$loop:
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p1, %r3, 5;
    @%p1 bra $loop;
    setp.ge.u32 %p2, %r1, 48;
    @%p2 bra $end;
    mul.lo.u32 %r4, %r3, %r3;
$end:
    """
    found = counted(body, torch.zeros(4), torch.zeros(4), threads=64, blocks=3)
    counts = found.instructions()
    warps = 6
    assert counts["integer"] == warps * (2 * 5 + 1 + 1)  # the second warp has half of its lanes at the product
    assert counts["branch"] == warps * (5 + 1 + 1)


@triton.jit
def _multiply(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    out = tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at))
    tl.store(out_ptr + at, out)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_operations_of_tensor_cores(target):
    x, out = torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    with emulator.running(target, counters=True) as report:
        _multiply[(1,)](x, x, out, N=64)
    (found,) = report.counters
    assert found.flops() == {"bf16": 2 * 64**3}
    assert found.by_block["st.global"]["out_ptr"] == 64 * 64 * 4 // 32
    assert "test_emulator_counters.py" in next(iter(found.by_location("st.global")))[1]
    products = {source: count for (kind, source), count in found.by_source().items() if "mma" in kind}
    assert any("test_emulator_counters.py" in source for source in products)
    shape = {"sm_80": (16, 8, 16), "sm_90": (64, 64, 16)}[target]
    warps = 4 if target == "sm_90" else 1  # of a product
    assert products == dict.fromkeys(products, warps * 64**3 // np.prod(shape))
    if target == "sm_90":
        assert found.wgmma_bytes == 2 * 64 * 64 * 2  # both operands, once


def test_nothing_is_counted_unless_asked():
    x, out = torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    with emulator.running("sm_80") as report:
        _multiply[(1,)](x, x, out, N=64)
    assert report.counters == []
    np.testing.assert_allclose(out, x.float() @ x.float(), rtol=1e-2, atol=1e-1)
