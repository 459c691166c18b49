"""Small Triton kernels, compiled for real and run by the emulator, against torch."""

import emulator
import fuzz
import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRETED

if INTERPRETED:
    pytest.skip("checks compiled kernels: --emulate sm_90, or on a GPU", allow_module_level=True)


@pytest.fixture(params=("sm_80", "sm_90"))
def target(request):
    with emulator.running(request.param) as report:
        yield request.param
    assert not report.findings, str(report)


@triton.jit
def _add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=mask) + tl.load(y_ptr + at, mask=mask), mask=mask)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8]
)
@pytest.mark.parametrize("n", [1, 127, 1000, 4096])
def test_add(target, n, dtype):
    x, y = (torch.randn(n) * 9).to(dtype), (torch.randn(n) * 9).to(dtype)
    out = torch.empty_like(x)
    _add[(triton.cdiv(n, 256),)](x, y, out, n, BLOCK=256)
    assert torch.equal(out, x + y)


@triton.jit
def _divide(x_ptr, y_ptr, q_ptr, r_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(q_ptr + at, x // y)
    tl.store(r_ptr + at, x % y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_division_truncates(target, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-30000, 30000, (1024,), generator=generator).to(dtype)
    y = torch.randint(1, 90, (1024,), generator=generator).to(dtype) * torch.where(
        torch.arange(1024) % 2 == 0, 1, -1
    ).to(dtype)
    q, r = torch.empty_like(x), torch.empty_like(x)
    _divide[(1,)](x, y, q, r, BLOCK=1024)
    assert torch.equal(q, torch.div(x, y, rounding_mode="trunc"))
    assert torch.equal(r, torch.fmod(x, y))


@triton.jit
def _softmax(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + at, mask=at < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * n + at, e / tl.sum(e, axis=0), mask=at < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [5, 100, 777])
def test_softmax(target, n, dtype):
    x = torch.randn(7, n).to(dtype)
    out = torch.empty(7, n)
    _softmax[(7,)](x, out, n, BLOCK=1024)
    torch.testing.assert_close(out, torch.softmax(x.float(), 1), rtol=1e-5, atol=1e-7)


@triton.jit
def _reduce(x_ptr, sums_ptr, most_ptr, where_ptr, scan_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(sums_ptr + tl.arange(0, COLUMNS), tl.sum(x, axis=0))
    tl.store(most_ptr + tl.arange(0, ROWS), tl.max(x, axis=1))
    tl.store(where_ptr + tl.arange(0, ROWS), tl.argmin(x, axis=1))
    tl.store(scan_ptr + at, tl.cumsum(x, axis=1))


@pytest.mark.parametrize("shape", [(32, 64), (8, 256), (128, 4)])
def test_reductions(target, shape):
    x = torch.randint(-50, 50, shape).float() + torch.rand(shape) / 1024
    x = torch.round(x * 64) / 64
    rows, columns = shape
    sums, most, where, scan = (
        torch.empty(columns),
        torch.empty(rows),
        torch.empty(rows, dtype=torch.int32),
        torch.empty(shape),
    )
    _reduce[(1,)](x, sums, most, where, scan, *shape)
    assert torch.equal(sums, x.sum(0))
    assert torch.equal(most, x.amax(1))
    assert torch.equal(scan, x.cumsum(1))
    assert torch.equal(x.gather(1, where.long()[:, None])[:, 0], x.amin(1))


@triton.jit
def _gather(x_ptr, i_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PICKS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    x = tl.load(x_ptr + rows * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    i = tl.load(i_ptr + rows * PICKS + tl.arange(0, PICKS)[None, :])
    tl.store(out_ptr + rows * PICKS + tl.arange(0, PICKS)[None, :], tl.gather(x, i, axis=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_gather(target, dtype):
    x, i = torch.randn(64, 32).to(dtype), torch.randint(0, 32, (64, 16), dtype=torch.int32)
    out = torch.empty(64, 16, dtype=dtype)
    _gather[(1,)](x, i, out, 64, 32, 16)
    assert torch.equal(out, x.gather(1, i.long()))


@triton.jit
def _atomics(x_ptr, out_ptr, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + at % BINS, tl.load(x_ptr + at, mask=at < n), mask=at < n, sem="relaxed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
@pytest.mark.parametrize("bins", [1, 7, 64, 256])
def test_atomic_add(target, dtype, bins):
    x = torch.randint(-100, 100, (1000,)).to(dtype)
    out = torch.zeros(bins, dtype=dtype)
    _atomics[(4,)](x, out, 1000, bins, BLOCK=256)
    expected = torch.zeros(bins, dtype=dtype).index_add_(0, torch.arange(1000) % bins, x)
    assert torch.equal(out, expected)


@triton.jit
def _dot(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr, sam, sak, sbk, sbn,
         ACC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    acc = tl.zeros([M, N], ACC)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        a = tl.load(a_ptr + m * sam + k[None, :] * sak)
        b = tl.load(b_ptr + k[:, None] * sbk + n * sbn)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(c_ptr + m * N + n, acc)


DOTS = [  # type, precision, bound of errors in units of sqrt(K)
    (torch.float16, "tf32", 1e-5), (torch.bfloat16, "tf32", 1e-5), (torch.float32, "tf32", 1e-2),
    (torch.float32, "tf32x3", 1e-5), (torch.float32, "ieee", 1e-5), (torch.float64, "ieee", 6e-14),
]  # fmt: skip
SHAPES = [  # M, N, K, step in K, whether A and B are transposed
    *((64, 32, 64, 32, a, b) for a in (False, True) for b in (False, True)), (16, 16, 32, 32, False, False),
    (128, 64, 128, 64, False, True), (64, 128, 16, 16, True, False),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "precision", "bound"), DOTS)
@pytest.mark.parametrize(("M", "N", "K", "step", "a_transposed", "b_transposed"), SHAPES)
def test_dot(target, dtype, precision, bound, M, N, K, step, a_transposed, b_transposed):
    if precision == "ieee":
        M, N, K, step = min(M, 64), min(N, 32), min(K, 64), min(step, 32)  # larger ones take long to compile
    generator = torch.Generator().manual_seed(0)
    a = torch.randn((K, M) if a_transposed else (M, K), generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn((N, K) if b_transposed else (K, N), generator=generator, dtype=torch.float64).to(dtype)
    a, b = a.T if a_transposed else a, b.T if b_transposed else b
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    c = torch.empty(M, N, dtype=acc)
    _dot[(1,)](a, b, c, M, N, K, step, *a.stride(), *b.stride(), ACC=tl.float64 if acc == torch.float64 else tl.float32,
               PRECISION=precision, num_stages=1)  # fmt: skip
    error = (c.double() - a.double() @ b.double()).abs().max()
    assert error <= bound * K**0.5
    if precision == "tf32" and dtype == torch.float32:
        assert error > 1e-4


@triton.jit
def _collatz(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Each program loops as often as its number asks."""
    n = tl.load(x_ptr + tl.program_id(0))
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(0, n):
        total += step * tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


def test_loops_of_data(target):
    n = torch.tensor([0, 5, 1, 17, 3], dtype=torch.int32)
    out = torch.empty(5, 64, dtype=torch.int32)
    _collatz[(5,)](n, out, BLOCK=64)
    assert torch.equal(out, (n * (n - 1) // 2)[:, None].int() * torch.arange(64).int())


@triton.jit
def _steps(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """A reduction, thus barriers, in a loop that programs leave at other times."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + at)
    count = 0
    while tl.sum(x, axis=0) > 10:
        x = x // 2
        count += 1
    tl.store(out_ptr + tl.program_id(0), count)


def test_barriers_in_a_loop(target):
    x = torch.randint(0, 1000, (6, 256), dtype=torch.int32)
    out = torch.empty(6, dtype=torch.int32)
    _steps[(6,)](x, out, BLOCK=256)
    expected = []
    for row in x:
        count = 0
        while row.sum() > 10:
            row, count = row // 2, count + 1
        expected.append(count)
    assert out.tolist() == expected


@triton.jit
def _special(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.where(x < y, x, y))
    tl.store(out_ptr + BLOCK + at, tl.minimum(x, y))
    tl.store(out_ptr + 2 * BLOCK + at, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 3 * BLOCK + at, tl.abs(x))
    tl.store(out_ptr + 4 * BLOCK + at, tl.floor(x))
    tl.store(out_ptr + 5 * BLOCK + at, tl.exp(x))
    tl.store(out_ptr + 6 * BLOCK + at, tl.fma(x, y, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(target, dtype):
    values = torch.tensor(
        [0.0, -0.0, 1.5, -2.5, float("nan"), float("inf"), -float("inf"), 1e30, 1e-42, 88.0, -100.0, 0.3]
    )
    values = values.to(dtype)
    x, y = values.repeat(12)[:128], values.repeat_interleave(12)[:128]
    out = torch.empty(7, 128, dtype=dtype)
    _special[(1,)](x, y, out, BLOCK=128)
    expected = torch.stack([
        torch.where(x < y, x, y), torch.fmin(x, y), torch.maximum(x, y), x.abs(), x.floor(), x.double().exp().to(dtype),
        torch.addcmul(x, x, y) if dtype == torch.float64 else (x.double() * y.double() + x.double()).float(),
    ])  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=3e-6 if dtype == torch.float32 else 1e-14, atol=0, equal_nan=True)


@triton.jit
def _convert(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


SHORT, WHOLE = (torch.float16, torch.bfloat16), (torch.int32, torch.int64)
CONVERSIONS = [
    *((source, to) for source in (*SHORT, torch.float32) for to in (*SHORT, torch.float32, *WHOLE, torch.int16)),
    *((source, to) for source in (torch.float64, *WHOLE) for to in (torch.float32, *WHOLE, torch.int16)),
    (torch.int32, torch.float16),
]  # others take two steps


@pytest.mark.parametrize(("source", "to"), CONVERSIONS)
def test_conversions(target, source, to):
    x = (torch.randn(1024) * 300).to(source)
    out = torch.empty(1024, dtype=to)
    _convert[(4,)](x, out, BLOCK=256)
    assert torch.equal(out, x.to(to))


def test_rounding_to_bfloat16(target):
    """To nearest, ties to even, of all upper halves with three lower ones."""
    high = torch.arange(0, 2**16, 7, dtype=torch.int64)
    bits = torch.cat([(high << 16) + low for low in (0x7FFF, 0x8000, 0x8001)]).to(torch.int64)
    x = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    x = x[: len(x) // 256 * 256].contiguous()
    out = torch.empty(len(x), dtype=torch.bfloat16)
    _convert[(len(x) // 256,)](x, out, BLOCK=256)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()], x.to(torch.bfloat16)[~x.isnan()])


@triton.jit
def _strided(x_ptr, out_ptr, stride, n):
    at = tl.arange(0, 128)
    x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * stride + at, mask=at < n)
    tl.store(out_ptr + tl.program_id(0) * 128 + at, x, mask=at < n)


def test_views_and_64_bit_strides(target):
    whole = torch.arange(5 * 300).reshape(5, 300).float()
    x = whole[:, 3:103]
    out = torch.zeros(5, 128)
    _strided[(5,)](x, out, x.stride(0), 100)
    assert torch.equal(out[:, :100], x)


def test_random_cases(monkeypatch):
    """`fuzz.py` passes two right cases and reports a wrong one."""
    with emulator.running("sm_90") as report:
        assert not fuzz.wrong(0, report)
        assert not fuzz.wrong(3, report)
        assert {name for name, _ in report.stores} >= {"cam_finish", "reassemble_backward_features"}
        monkeypatch.setattr(fuzz._verify, "SLACK", dict.fromkeys(fuzz._verify.SLACK, -1e30))
        assert fuzz.wrong(0, report).startswith("seed 0: class_activation_map torch.bfloat16")
