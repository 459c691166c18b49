"""Every instruction of the emulator against Python's integers and exact fractions, rounded once."""

import functools
import math
import operator
import random
import re
from fractions import Fraction

import numpy as np
import pytest
from conftest import INTERPRETED
from emulator import codegen
from emulator.handwritten import run
from emulator.parse import PTXError

if INTERPRETED:
    pytest.skip("checks compiled kernels: --emulate sm_90, or on a GPU", allow_module_level=True)

# ------------------------------------------------------------------------------------------------ types and values

FORMATS = {"f16": (16, 11, 15), "bf16": (16, 8, 127), "f32": (32, 24, 127), "f64": (64, 53, 1023)}  # bits, p, emax
INTEGERS = "s16 u16 s32 u32 s64 u64"
random.seed(0)


def bits_of(type_: str) -> int:
    return FORMATS[type_][0] if type_ in FORMATS else 1 if type_ == "pred" else int(type_[1:])


def halves_of(type_: str) -> str | None:
    return type_[:-2] if type_.endswith("x2") else None


def encode(value, type_: str) -> int:
    """The bits of a number: integers wrap, fractions are rounded once, to nearest and even."""
    if half := halves_of(type_):
        return encode(value[0], half) | encode(value[1], half) << bits_of(half)
    if type_ not in FORMATS:
        return int(value) % (1 << bits_of(type_))
    bits, precision, emax = FORMATS[type_]
    if isinstance(value, Fraction) and value:
        exponent = max(math.floor(math.log2(abs(value.numerator))) - math.floor(math.log2(value.denominator)), 1 - emax)
        while exponent > 1 - emax and abs(value) < Fraction(2) ** exponent:
            exponent -= 1
        while abs(value) >= Fraction(2) ** (exponent + 1):
            exponent += 1
        quantum = Fraction(2) ** (exponent - precision + 1)
        count = round(value / quantum)
        sign, count = count < 0 or (count == 0 and value < 0), abs(count)
        found = count + ((exponent + emax - 1) << (precision - 1))  # the leading bit counts as an exponent
        return sign << (bits - 1) | min(found, (2 * emax + 1) << (precision - 1))
    value = float(value)
    if math.isfinite(value) and value:
        return encode(Fraction(value), type_)
    exponent = 0 if not value else (2 * emax + 1) << (precision - 1)
    return (math.copysign(1, value) < 0) << (bits - 1) | exponent | (math.isnan(value) << (precision - 2))


def decode(bits: int, type_: str):
    """The number: an int or a float, or of packed types two."""
    if half := halves_of(type_):
        return decode(bits % (1 << bits_of(half)), half), decode(bits >> bits_of(half), half)
    if type_ not in FORMATS:
        return bits - (1 << bits_of(type_)) if type_[0] == "s" and bits >> (bits_of(type_) - 1) else bits
    width, precision, emax = FORMATS[type_]
    exponent, fraction = bits >> (precision - 1) & (2 * emax + 1), bits & ((1 << (precision - 1)) - 1)
    sign = -1.0 if bits >> (width - 1) else 1.0
    if exponent == 2 * emax + 1:
        return math.nan if fraction else sign * math.inf
    return sign * math.ldexp(fraction + ((exponent > 0) << (precision - 1)), max(exponent, 1) - emax - precision + 1)


@functools.cache
def values(type_: str) -> list[int]:
    """Bits worth trying."""
    if half := halves_of(type_):
        low = values(half)
        return [one | other << bits_of(half) for one, other in zip(low, low[5:] + low[:5], strict=True)]
    if type_ == "pred":
        return [0, 1]
    width = bits_of(type_)
    if type_ not in FORMATS:
        some = [0, 1, 2, 3, 5, 31, 32, 64, -1, -2, -7, 1 << (width - 1), (1 << (width - 1)) - 1, 0x5A5A5A5A5A5A5A5A]
        return [each % (1 << width) for each in [*some, *(random.getrandbits(width) for _ in range(4))]]
    _, precision, emax = FORMATS[type_]
    one = (emax) << (precision - 1)
    infinity = (2 * emax + 1) << (precision - 1)
    least = 1 << (precision - 1)
    positive = [0, 1, least - 1, least, one - 1, one, one + 1, infinity - 1, infinity]
    numbers = [encode(each, type_) for each in (1.5, -2.5, 3, 0.1, -0.3, 100, -77.7, 2000)]
    return [*positive, *(each | 1 << (width - 1) for each in positive), *numbers, infinity | 1 << (precision - 2)]


def exact(function):
    """A formula, exactly where its arguments are finite, else in float64."""

    def evaluate(*arguments):
        with np.errstate(all="ignore"):
            rough = float(function(*map(np.float64, arguments)))
        if not all(map(math.isfinite, arguments)):
            return rough
        try:
            return function(*map(Fraction, arguments)) or rough  # whose zero has a sign
        except ZeroDivisionError:
            return rough

    return evaluate


def flushed(function):
    """Of float32: subnormal arguments and results become zeros."""

    def flush(x):
        return x if not math.isfinite(x) or abs(x) >= 2**-126 else math.copysign(0.0, x)

    def evaluate(*arguments):
        found = function(*map(flush, arguments))
        if isinstance(found, bool):
            return found
        return flush(decode(encode(found, "f32"), "f32"))

    return evaluate


def saturated(function):
    def evaluate(*arguments):
        found = function(*arguments)
        return 0.0 if found != found else min(max(0.0, found), 1.0)

    return evaluate


def smaller(a, b):
    """That which is a number; -0 below +0."""
    if a != a or b != b:
        return b if a != a else a
    return min(a, b, key=lambda x: (x, math.copysign(1, x)))


def larger(a, b):
    return -smaller(-a, -b)


def strict(function):
    """NaN if there is one."""
    return lambda *arguments: math.nan if any(x != x for x in arguments) else function(*arguments)


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shifted(bits, left=False):
    def evaluate(a, n):
        return a << min(n, bits) if left else a >> min(n, bits)

    return evaluate


def field(bits, signed):
    """bfe: bits beyond the last are its sign, or zero."""

    def evaluate(a, start, length):
        start, length = start & 255, length & 255
        a %= 1 << bits
        if not length:
            return 0
        sign = a >> min(start + length - 1, bits - 1) & 1 if signed else 0
        a |= sign * (((1 << 600) - 1) << bits)
        found = a >> start & ((1 << length) - 1)
        return found | sign * (((1 << 600) - 1) << length)

    return evaluate


def inserted(a, b, start, length):
    start, length = start & 255, length & 255
    mask = ((1 << length) - 1) << start
    return (b & ~mask) | (a << start & mask)


def permuted(a, b, selector):
    both, found = a | b << 32, 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = both >> 8 * (nibble & 7) & 255
        found |= ((255 if byte >> 7 else 0) if nibble & 8 else byte) << 8 * place
    return found


def logical(table):
    def evaluate(a, b, c):
        found = 0
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1
            found |= (table >> index & 1) << bit
        return found

    return evaluate


def to_integer(direction, type_):
    def evaluate(x):
        low, high = decode(1 << (bits_of(type_) - 1), type_), (1 << (bits_of(type_) - 1)) - 1
        if type_[0] == "u":
            low, high = 0, (1 << bits_of(type_)) - 1
        if x != x:
            return 0
        if math.isinf(x):
            return high if x > 0 else low
        return min(max(ROUNDED[direction](Fraction(x)), low), high)

    return evaluate


ROUNDED = {"n": round, "z": math.trunc, "m": math.floor, "p": math.ceil}


def to_whole(direction):
    return lambda x: x if not math.isfinite(x) else math.copysign(float(ROUNDED[direction](Fraction(x))), x)


def near(function):
    """Approximate: computed in float64, compared with two units in the last place."""

    def evaluate(x):
        with np.errstate(all="ignore"):
            return float(function(np.float64(x)))

    evaluate.near = True
    return evaluate


def to_tf32(x):
    """To nearest, ties away from zero, with ten bits."""
    if not math.isfinite(x) or not x:
        return x
    quantum = Fraction(2) ** (max(math.frexp(x)[1] - 1, -126) - 10)
    return math.copysign(float(math.floor(abs(Fraction(x)) / quantum + Fraction(1, 2)) * quantum), x)


def truncated(x):
    return decode(encode(x, "f32") >> 16, "bf16")


# ------------------------------------------------------------------------------------------------ the instructions

ADD, SUB, MUL, DIV = (exact(f) for f in (operator.add, operator.sub, operator.mul, operator.truediv))
FMA = exact(lambda a, b, c: a * b + c)
COMPARE = {"eq": operator.eq, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
ORDERED = {**COMPARE, "ne": lambda a, b: a < b or a > b, "num": lambda a, b: a == a and b == b}
UNORDERED = {
    "equ": lambda a, b: not (a < b or a > b), "neu": operator.ne, "ltu": lambda a, b: not a >= b,
    "leu": lambda a, b: not a > b, "gtu": lambda a, b: not a <= b, "geu": lambda a, b: not a < b,
    "nan": lambda a, b: a != a or b != b,
}  # fmt: skip
ROWS: list[tuple] = []  # instruction, type of d, types of a, b and c, what it computes


def row(instruction: str, result: str, arguments: str, function, types: str = "T") -> None:
    """One for each type, which stands where T does; D is of double width."""
    for type_ in types.split():
        width = str(2 * int(type_[1:])) if type_[1:].isdigit() else ""

        def put(text: str, type_=type_, width=width) -> str:
            return re.sub(r"\bT\b", type_, re.sub(r"\bD\b", type_[0] + width, text))

        chosen = function(type_) if getattr(function, "of_type", False) else function
        ROWS.append((put(instruction), put(result), put(arguments).split(), chosen))


def of_type(function):
    function.of_type = True
    return function


for name, function in {"add": operator.add, "sub": operator.sub, "mul.lo": operator.mul}.items():
    row(f"{name}.T d, a, b", "T", "T T", function, INTEGERS)
for name, function in {"min": min, "max": max}.items():
    row(f"{name}.T d, a, b", "T", "T T", function, INTEGERS + " s16x2 u16x2")
    row(f"{name}.T d, a, b", "T", "T T", smaller if name == "min" else larger, "f16 bf16 f32 f64 f16x2 bf16x2")
    row(f"{name}.NaN.T d, a, b", "T", "T T", strict(smaller if name == "min" else larger), "f16 bf16 f32 f16x2 bf16x2")
    row(f"{name}.ftz.f32 d, a, b", "f32", "f32 f32", flushed(smaller if name == "min" else larger))
    three = smaller if name == "min" else larger
    row(f"{name}.f32 d, a, b, c", "f32", "f32 f32 f32", lambda a, b, c, f=three: f(f(a, b), c))
    row(f"{name}.NaN.f32 d, a, b, c", "f32", "f32 f32 f32", strict(lambda a, b, c, f=three: f(f(a, b), c)))
row("add.T d, a, b", "T", "T T", operator.add, "s16x2 u16x2")
row("add.s32 d, a, -5", "s32", "s32", lambda a: a - 5)
row("sub.s64 d, 7, a", "s64", "s64", lambda a: 7 - a)
row("div.T d, a, b", "T", "T T", quotient, INTEGERS)
row("rem.T d, a, b", "T", "T T", lambda a, b: a - quotient(a, b) * b, INTEGERS)
row("mul.wide.T d, a, b", "D", "T T", operator.mul, "s16 u16 s32 u32")
row("mul.wide.s32 d, a, -3", "s64", "s32", lambda a: -3 * a)
row("mul.hi.T d, a, b", "T", "T T", of_type(lambda t: lambda a, b: a * b >> bits_of(t)), INTEGERS)
row("mad.lo.T d, a, b, c", "T", "T T T", lambda a, b, c: a * b + c, INTEGERS)
row("mad.wide.T d, a, b, c", "D", "T T D", lambda a, b, c: a * b + c, "s16 u16 s32 u32")
row("mad.hi.T d, a, b, c", "T", "T T T", of_type(lambda t: lambda a, b, c: (a * b >> bits_of(t)) + c), INTEGERS)
for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
    row(f"{name}.T d, a, b", "T", "T T", function, "b16 b32 b64 pred")
row("not.T d, a", "T", "T", lambda a: ~a, "b16 b32 b64")
row("not.pred d, a", "pred", "pred", lambda a: not a)
row("neg.T d, a", "T", "T", lambda a: -a, "s16 s32 s64")
row("abs.T d, a", "T", "T", abs, "s16 s32 s64")
row("popc.T d, a", "u32", "T", lambda a: a.bit_count(), "b32 b64")
row("clz.T d, a", "u32", "T", of_type(lambda t: lambda a: bits_of(t) - a.bit_length()), "b32 b64")
row("brev.T d, a", "T", "T", of_type(lambda t: lambda a: int(f"{a:0{bits_of(t)}b}"[::-1], 2)), "b32 b64")
row("shl.T d, a, b", "T", "T u32", of_type(lambda t: shifted(bits_of(t), left=True)), "b16 b32 b64")
row("shr.T d, a, b", "T", "T u32", of_type(lambda t: shifted(bits_of(t))), INTEGERS)
for amount in (3, 32, 64):
    row(f"shl.T d, a, {amount}", "T", "T", lambda a, n=amount: a << n, "b16 b32 b64")
    row(f"shr.T d, a, {amount}", "T", "T", lambda a, n=amount: a >> n, INTEGERS)
for mode, count in {"wrap": lambda n: n & 31, "clamp": lambda n: min(n, 32)}.items():
    row(f"shf.l.{mode}.b32 d, a, b, c", "b32", "b32 b32 u32", lambda a, b, n, f=count: (b << 32 | a) << f(n) >> 32)
    row(f"shf.r.{mode}.b32 d, a, b, c", "b32", "b32 b32 u32", lambda a, b, n, f=count: (b << 32 | a) >> f(n))
row("bfe.T d, a, b, c", "T", "T u32 u32", of_type(lambda t: field(bits_of(t), t[0] == "s")), "s32 u32 s64 u64")
row("bfe.T d, a, 5, 9", "T", "T", of_type(lambda t: lambda a: field(bits_of(t), t[0] == "s")(a, 5, 9)), "s32 u32 s64")
row("bfe.T d, a, 30, 9", "T", "T", of_type(lambda t: lambda a: field(bits_of(t), t[0] == "s")(a, 30, 9)), "s32 u32")
row("bfi.T d, a, b, c, 7", "T", "T T u32", lambda a, b, s: inserted(a, b, s, 7),
    "b32 b64")  # fmt: skip
row("bfi.T d, a, b, 40, c", "T", "T T u32", lambda a, b, n: inserted(a, b, 40, n),
    "b32 b64")  # fmt: skip
for table in (0x00, 0xFF, 0xE8, 0x96, 0x1B):
    row(f"lop3.b32 d, a, b, c, {table}", "b32", "b32 b32 b32", logical(table))
row("prmt.b32 d, a, b, c", "b32", "b32 b32 b32", permuted)
for selector in (0x5410, 0x7632, 0x3340, 0xBA98):
    row(f"prmt.b32 d, a, b, {selector}", "b32", "b32 b32", lambda a, b, s=selector: permuted(a, b, s))
row("selp.T d, a, b, c", "T", "T T pred", lambda a, b, c: a if c else b, "b16 s16 b32 u32 b64 f32 f64")

for name, function in {"add": ADD, "sub": SUB, "mul": MUL}.items():
    row(f"{name}.T d, a, b", "T", "T T", function, "f16 bf16 f32 f64 f16x2 bf16x2 f32x2")
    row(f"{name}.rn.T d, a, b", "T", "T T", function, "f32 f64 f16 f32x2")
    row(f"{name}.ftz.f32 d, a, b", "f32", "f32 f32", flushed(function))
    row(f"{name}.sat.f32 d, a, b", "f32", "f32 f32", saturated(function))
for name, function in {"add": ADD, "sub": SUB}.items():
    row(f"{name}.rn.f32.T d, a, b", "f32", "T f32", function, "f16 bf16")
row("mul.f32 d, a, 0f40490FDB", "f32", "f32", lambda a: MUL(a, decode(0x40490FDB, "f32")))
row("add.f64 d, a, 0dBFE0000000000000", "f64", "f64", lambda a: ADD(a, -0.5))
row("div.rn.T d, a, b", "T", "T T", DIV, "f32 f64")
row("div.rn.ftz.f32 d, a, b", "f32", "f32 f32", flushed(DIV))
row("fma.rn.T d, a, b, c", "T", "T T T", FMA, "f16 bf16 f32 f16x2 bf16x2 f32x2")
row("fma.rn.ftz.f32 d, a, b, c", "f32", "f32 f32 f32", flushed(FMA))
row("fma.rn.sat.f32 d, a, b, c", "f32", "f32 f32 f32", saturated(FMA))
row("fma.rn.f32.T d, a, b, c", "f32", "T T f32", FMA, "f16 bf16")
row("abs.T d, a", "T", "T", lambda a: math.fabs(a), "f16 bf16 f32 f64 f16x2 bf16x2")
row("neg.T d, a", "T", "T", lambda a: -a, "f16 bf16 f32 f64 f16x2 bf16x2")
row("abs.ftz.f32 d, a", "f32", "f32", flushed(abs))
row("neg.ftz.f32 d, a", "f32", "f32", flushed(operator.neg))
row("copysign.T d, a, b", "T", "T T", lambda a, b: math.copysign(b, a), "f32 f64")
row("testp.finite.T d, a", "pred", "T", math.isfinite, "f32 f64")
row("testp.infinite.T d, a", "pred", "T", math.isinf, "f32 f64")
row("testp.number.T d, a", "pred", "T", lambda a: a == a, "f32 f64")
row("testp.notanumber.T d, a", "pred", "T", math.isnan, "f32 f64")
for name, function in {
    "ex2.approx": np.exp2, "lg2.approx": np.log2, "rcp.approx": lambda x: 1 / x, "sqrt.approx": np.sqrt,
    "rsqrt.approx": lambda x: 1 / np.sqrt(x), "sin.approx": np.sin, "cos.approx": np.cos, "tanh.approx": np.tanh,
    "rcp.rn": lambda x: 1 / x, "sqrt.rn": np.sqrt,
}.items():  # fmt: skip
    row(f"{name}.f32 d, a", "f32", "f32", near(function))
    if "tanh" not in name:
        row(f"{name}.ftz.f32 d, a", "f32", "f32", flushed(near(function)))
row("rcp.rn.f64 d, a", "f64", "f64", lambda a: DIV(1.0, a))
row("sqrt.rn.f64 d, a", "f64", "f64", near(np.sqrt))
row("rsqrt.approx.f64 d, a", "f64", "f64", near(lambda x: 1 / np.sqrt(x)))

for name, function in COMPARE.items():
    row(f"setp.{name}.T d, a, b", "pred", "T T", function, INTEGERS if name != "eq" else "b16 b32 b64 s32 u32")
for name, function in UNSIGNED.items():
    row(f"setp.{name}.T d, a, b", "pred", "T T", function, "u32 u64")
row("setp.ne.T d, a, b", "pred", "T T", operator.ne, "b16 b32 b64 s16 u16")
for name, function in {**ORDERED, **UNORDERED}.items():
    row(f"setp.{name}.T d, a, b", "pred", "T T", function, "f16 bf16 f32 f64")
    row(f"setp.{name}.ftz.f32 d, a, b", "pred", "f32 f32", flushed(function))
for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
    row(f"setp.lt.{name}.s32 d, a, b, c", "pred", "s32 s32 pred", lambda a, b, c, f=function: f(a < b, bool(c)))
    row(f"setp.lt.{name}.s32 d, a, b, !c", "pred", "s32 s32 pred", lambda a, b, c, f=function: f(a < b, not c))
    row(f"setp.geu.{name}.f32 _|d, a, b, c", "pred", "f32 f32 pred", lambda a, b, c, f=function: f(a < b, bool(c)))
row("setp.gt.u32 _|d, a, b", "pred", "u32 u32", lambda a, b: not a > b)

SIZES = "s8 u8 s16 u16 s32 u32 s64 u64"
for source in SIZES.split():
    row(f"cvt.T.{source} d, a", "T", source, lambda a: a, SIZES)
    row(f"cvt.rn.T.{source} d, a", "T", source, lambda a: Fraction(a), "f32 f64")
for source in ["s8", "u8", "s16", "u16", "s32", "u32"]:
    row(f"cvt.rn.f16.{source} d, a", "f16", source, lambda a: Fraction(a))
for source in ["s16", "u16"]:
    row(f"cvt.rn.bf16.{source} d, a", "bf16", source, lambda a: Fraction(a))
for direction in ROUNDED:
    for source in FORMATS:
        row(f"cvt.r{direction}i.T.{source} d, a", "T", source, of_type(lambda t, r=direction: to_integer(r, t)), SIZES)
    row(f"cvt.r{direction}i.T.T d, a", "T", "T", to_whole(direction), "f16 f32 f64")
    row(f"cvt.r{direction}i.ftz.f32.f32 d, a", "f32", "f32", flushed(to_whole(direction)))
row("cvt.f32.T d, a", "f32", "T", lambda a: a, "f16 bf16 f32")
row("cvt.f64.T d, a", "f64", "T", lambda a: a, "f16 f32")
row("cvt.ftz.f64.f32 d, a", "f64", "f32", flushed(lambda a: a))
row("cvt.rn.T.f32 d, a", "T", "f32", lambda a: a, "f16 bf16")
row("cvt.rn.f32.f64 d, a", "f32", "f64", lambda a: a)
row("cvt.rz.bf16.f32 d, a", "bf16", "f32", truncated)
row("cvt.rna.tf32.f32 d, a", "f32", "f32", to_tf32)
row("cvt.ftz.f32.f32 d, a", "f32", "f32", flushed(lambda a: a))
row("cvt.sat.f32.f32 d, a", "f32", "f32", saturated(lambda a: a))
row("cvt.sat.f32.f16 d, a", "f32", "f16", saturated(lambda a: a))
row("cvt.rn.T.f32 d, a, b", "T", "f32 f32", lambda a, b: (b, a), "f16x2 bf16x2")

row("mov.T d, a", "T", "T", lambda a: a, "b16 u16 b32 u32 s32 f32 b64 u64 f64 pred")
row("mov.b32 d, 0f3F800000", "f32", "b32", lambda a: 1.0)
row("mov.f32 d, 0d3FF8000000000000", "f32", "b32", lambda a: 1.5)
row("mov.u32 d, -2", "s32", "b32", lambda a: -2)
row("mov.b32 d, {a, b}", "b32", "b16 b16", lambda a, b: a | b << 16)
row("mov.b64 d, {a, b}", "b64", "b32 b32", lambda a, b: a | b << 32)
row("mov.b64 d, {a, b, a, a}", "b64", "b16 b16", lambda a, b: a | b << 16 | a << 32 | a << 48)
row("mov.b32 {d, _}, a", "b16", "b32", lambda a: a)
row("mov.b32 {_, d}, a", "b16", "b32", lambda a: a >> 16)
row("mov.b64 {_, d}, a", "b32", "b64", lambda a: a >> 32)
row("cvta.to.global.u64 d, a", "b64", "b64", lambda a: a)
row("cvta.global.u64 d, a", "b64", "b64", lambda a: a)
row("bar.warp.sync -1; mov.b32 d, a", "b32", "b32", lambda a: a)
for hint in ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "membar.gl", "fence.acq_rel.gpu"):
    row(f"{hint}; mov.b32 d, a", "b32", "b32", lambda a: a)


def register(type_: str) -> str:
    return "pred" if type_ == "pred" else f"b{max(16, encoded_bits(type_))}"


def encoded_bits(type_: str) -> int:
    return 2 * bits_of(halves_of(type_)) if halves_of(type_) else max(8, bits_of(type_))


def body(instruction: str, result: str, arguments: list[str], constants: list[int] | None) -> str:
    """d by the instruction, and e by it in odd threads alone."""
    lines, names = [], "abc"
    lines.append(f".reg .{register(result)} d, e; mad.wide.u32 %d0, %block, 128, 0; cvt.u64.u32 %d1, %thread;")
    lines.append("add.s64 %d0, %d0, %d1; and.b32 %r0, %thread, 1; setp.ne.b32 %p0, %r0, 0;")
    for number, (name, type_) in enumerate(zip(names, arguments, strict=False)):
        bits, kind = encoded_bits(type_), register(type_)
        lines.append(f".reg .{kind} {name};")
        if constants is not None:
            constant = constants[number]
            lines.append(f"setp.ne.s32 {name}, {constant}, 0;" if kind == "pred" else f"mov.{kind} {name}, {constant};")
            continue
        target = "%h0" if kind == "pred" else name
        lines.append(f"mad.lo.s64 %d2, %d0, {bits // 8}, %x{number}; ld.global.b{bits} {target}, [%d2];")
        if kind == "pred":
            lines.append(f"setp.ne.b16 {name}, %h0, 0;")
    kind = register(result)
    lines.append("setp.ne.s32 e, 1, 0;" if kind == "pred" else f"mov.{kind} e, 77;")
    lines.append(f"{instruction};")
    *before, last = instruction.split("; ")
    lines.append("; ".join([*before, "@%p0 " + re.sub(r"\bd\b", "e", last)]) + ";")
    for name in "de":
        bits, stored = encoded_bits(result), name
        if kind == "pred":
            stored = "%h1"
            lines.append(f"selp.b16 %h1, 1, 0, {name};")
        lines.append(f"mad.lo.s64 %d2, %d0, {bits // 8}, %{name}; st.global.b{bits} [%d2], {stored};")
    return "\n".join(lines)


def words(bits: list[int], type_: str) -> np.ndarray:
    return np.array(bits, f"u{encoded_bits(type_) // 8}")


def same(found: int, expected: int, type_: str, units: int) -> bool:
    """The same bits, or both NaN; or for approximate instructions as near as that."""
    if half := halves_of(type_):
        bits = bits_of(half)
        low = same(found % (1 << bits), expected % (1 << bits), half, units)
        return low and same(found >> bits, expected >> bits, half, units)
    one, other = decode(found, type_), decode(expected, type_)
    return found == expected or (one != one and other != other) or (one == one and abs(found - expected) <= units)


@pytest.mark.parametrize(("instruction", "result", "arguments", "function"), ROWS, ids=[row[0] for row in ROWS])
def test_values(instruction, result, arguments, function):
    """Of arrays, of constants, and where a guard leaves some lanes as they were."""
    whole = re.match(r"div\.[su]|rem\.", instruction) is not None
    cases = [()]
    for type_ in arguments:
        cases = [(*case, each) for case in cases for each in values(type_)]
    cases = [case for case in cases if not (whole and case[1] == 0)]  # which the ISA leaves open
    cases = random.Random(0).sample(cases, min(len(cases), 384))
    cases += cases[:1] * (-len(cases) % 128)
    numbers = [tuple(decode(bits, type_) for bits, type_ in zip(case, arguments, strict=True)) for case in cases]
    packed = halves_of(result) is not None and halves_of(arguments[0]) is not None
    lifted = (lambda *pairs: tuple(function(*each) for each in zip(*pairs, strict=True))) if packed else function
    expected = [encode(lifted(*each), result) for each in numbers]
    units = 2 if "approx" in instruction else 1 if "sqrt.rn" in instruction else 0

    def check(text: str, expected: list[int], **inputs) -> None:
        lanes = len(expected)
        d, e = (words([0] * lanes, result) for _ in range(2))
        report = run(text, threads=128, blocks=lanes // 128, **inputs, d=d, e=e)
        assert not report.findings
        for lane in range(lanes):
            kept = 1 if result == "pred" else 77
            for found, wanted in ((d, expected[lane]), (e, expected[lane] if lane % 2 else kept)):
                assert same(int(found[lane]), wanted, result, units), (
                    f"{numbers[lane % len(numbers)]}: {int(found[lane]):#x}, not {wanted:#x}"
                )

    columns = zip(*cases, strict=True)
    inputs = {f"x{n}": words(list(bits), t) for n, (bits, t) in enumerate(zip(columns, arguments, strict=True))}
    check(body(instruction, result, arguments, None), expected, **inputs)
    for chosen in (0, len(cases) // 2):
        text = body(instruction, result, arguments, list(cases[chosen]))
        check(text, [expected[chosen]] * 128, **inputs)


# ------------------------------------------------------------------------------------------------ division, somehow


def test_division_by_reciprocals():
    """Two roundings: x / x is not always 1; divisors of any size with `full`, those above 2^126 give 0 without."""
    random.seed(1)
    some = [encode(random.uniform(1, 2) * 2.0 ** random.randint(-148, 126), "f32") for _ in range(512)]
    a, b = words(some, "f32"), words(some[7:] + some[:7], "f32")
    x, y = a.view(np.float32).astype(float), b.view(np.float32).astype(float)
    text = "mad.wide.u32 %d0, %thread, 4, 0; add.s64 %d1, %a, %d0; add.s64 %d2, %b, %d0; add.s64 %d3, %out, %d0;"
    text += "ld.global.b32 %r1, [%d1]; ld.global.b32 %r2, [%d2]; INSTRUCTION; st.global.b32 [%d3], %r3;"

    def divided(instruction: str) -> np.ndarray:
        out = np.zeros(512, np.float32)
        run(text.replace("INSTRUCTION", instruction), threads=512, a=a, b=b, out=out)
        return out.astype(float)

    found = divided("div.full.f32 %r3, %r1, %r1")
    assert (found != 1).any()
    assert abs(found - 1).max() <= 2**-22
    with np.errstate(over="ignore"):
        true = (x / y).astype(np.float32).astype(float)
    full, approximate = divided("div.full.f32 %r3, %r1, %r2"), divided("div.approx.f32 %r3, %r1, %r2")
    normal = (abs(true) > 2**-126) & (abs(true) < 2.0**127)
    assert (abs(full[normal] - true[normal]) <= 2**-22 * abs(true[normal])).all()
    assert (full[true == math.inf] == math.inf).all()
    inside = normal & (y >= 2**-126) & (y <= 2.0**126)
    assert (abs(approximate[inside] - true[inside]) <= 2**-22 * abs(true[inside])).all()
    assert (approximate[y > 2.0**126] == 0).all()


# ------------------------------------------------------------------------------------------------ memory

STORED = [("b8", 1), ("u8", 1), ("s8", 1), ("b16", 2), ("s16", 2), ("u16", 2), ("b32", 4), ("f32", 4), ("s32", 4),
          ("b64", 8), ("u64", 8), ("f64", 8)]  # fmt: skip


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("type_", "width"), STORED)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_loads_and_stores(space, type_, width, count):
    """There and back, with guards; a narrow load is extended by its sign or by zeros."""
    if width * count > 16:
        return  # no such form
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, 32 * width * count, np.uint8).view(f"u{width}")
    out, wide = np.zeros_like(x), np.zeros(32 * count, np.int32)
    vector = f".v{count}" if count > 1 else ""
    size = max(16, 8 * width)
    names = ", ".join(f"v{n}" for n in range(count))
    held = f"{{{names}}}" if count > 1 else names
    text = f".reg .b{size} {names}; mul.lo.u32 %r0, %thread, {width * count}; cvt.u64.u32 %d0, %r0;"
    text += "add.s64 %d1, %x, %d0; add.s64 %d2, %out, %d0; setp.lt.u32 %p0, %thread, 20; add.u32 %r1, %shared, %r0;"
    text += "".join(f"mov.b{size} v{n}, {n};" for n in range(count))
    text += f"@%p0 ld.global{vector}.{type_} {held}, [%d1];"
    if space == "shared":
        text += f"st.shared{vector}.{type_} [%r1+16], {held}; ld.shared{vector}.{type_} {held}, [%r1+16];"
    text += f"@%p0 st.global{vector}.{type_} [%d2], {held};"
    if size <= 32:
        sign = "s" if type_[0] in "sf" else "u"
        text += f"mad.wide.u32 %d3, %thread, {4 * count}, %wide;"
        text += "".join(f"cvt.s32.{sign}{size} %r2, v{n}; st.global.b32 [%d3+{4 * n}], %r2;" for n in range(count))
    run(text, shared=1024, x=x, out=out, wide=wide)
    lanes = np.arange(32) < 20
    assert (out.reshape(32, count)[lanes] == x.reshape(32, count)[lanes]).all()
    assert not out.reshape(32, count)[~lanes].any()
    if size <= 32:
        signed = x.view(f"i{width}") if type_[0] in "sf" else x
        assert (wide.reshape(32, count)[lanes] == signed.reshape(32, count)[lanes].astype(np.int32)).all()
        assert (wide.reshape(32, count)[~lanes] == np.arange(count)).all()


@pytest.mark.parametrize("qualifiers", ["ca", "cg", "L1::evict_first", "nc.L1::no_allocate", "relaxed.gpu", "volatile"])
def test_qualifiers_of_loads(qualifiers):
    out = np.zeros(32, np.int32)
    order = f"{qualifiers}.global" if qualifiers.startswith(("relaxed", "volatile")) else f"global.{qualifiers}"
    text = f"mad.wide.u32 %d0, %thread, 4, %x; ld.{order}.b32 %r0, [%d0];"
    text += "mad.wide.u32 %d0, %thread, 4, %out; st.global.wt.b32 [%d0], %r0;"
    run(text, x=np.arange(32, dtype=np.int32), out=out)
    assert (out == np.arange(32)).all()


ATOMIC = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


@pytest.mark.parametrize("returns", [True, False])
@pytest.mark.parametrize(("operation", "type_"), [
    *(("add", t) for t in ("f32", "f64", "u32", "s32", "u64")),
    *((o, t) for o in ("min", "max") for t in ("s32", "u32")),
    *((o, t) for o in ("and", "or", "xor") for t in ("b32", "b64")),
])  # fmt: skip
def test_atomics(operation, type_, returns):
    """Of all threads but eight to four places; what an atomic returns is what its place held before, in some order."""
    kind = np.dtype({"s": "i", "f": "f"}.get(type_[0], "u") + str(int(type_[1:]) // 8))
    value = (np.arange(64) * 7 % 64 + (1 if operation == "add" or kind.kind == "u" else -20)).astype(kind)
    place, old = np.full(4, 5, kind), np.zeros(64, kind)
    width, bits = kind.itemsize, type_[1:]
    text = f".reg .b{bits} v, w; mad.wide.u32 %d0, %thread, {width}, %x; ld.global.b{bits} v, [%d0]; mov.b{bits} w, 0;"
    text += f"and.b32 %r0, %thread, 3; mad.wide.u32 %d1, %r0, {width}, %place; setp.lt.u32 %p0, %thread, 56;"
    form = f"global.gpu.acq_rel.{operation}.{type_}"
    text += f"@%p0 atom.{form} w, [%d1], v;" if returns else f"@%p0 red.{form} [%d1], v;"
    text += f"mad.wide.u32 %d0, %thread, {width}, %old; st.global.b{bits} [%d0], w;"
    run(text, threads=64, x=value, place=place, old=old, shuffle=3)
    for each in range(4):
        mine = np.arange(56) % 4 == each
        assert place[each] == ATOMIC[operation].reduce(value[:56][mine], initial=kind.type(5))
        if returns and operation == "add":
            steps, held = list(zip(old[:56][mine].tolist(), value[:56][mine].tolist(), strict=True)), 5
            while steps:
                step = next(each for each in steps if each[0] == held)
                steps.remove(step)
                held += step[1]
    assert not old[56:].any()
    assert returns or not old.any()


@pytest.mark.parametrize("count", [2, 4])
def test_vectors_are_added_atomically(count):
    place = np.zeros((2, count), np.float32)
    text = f"and.b32 %r0, %thread, 1; mad.wide.u32 %d0, %r0, {4 * count}, %place; cvt.rn.f32.u32 %r1, %thread;"
    olds, values = (
        ", ".join(each[:count]) for each in (["%r2", "%r3", "%r4", "%r5"], ["%r1", "0f3F800000", "%r1", "%r1"])
    )
    text += f"atom.global.gpu.relaxed.add.v{count}.f32 {{{olds}}}, [%d0], {{{values}}};"
    run(text, place=place)
    assert place.tolist() == [[240, 16, 240, 240][:count], [256, 16, 256, 256][:count]]


# ------------------------------------------------------------------------------------------------ warps


def exchanged(instruction: str, x: np.ndarray, threads: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """%r3 and %p1 of an instruction of %r1 and %r2, the thread's elements of both columns of x."""
    out, good = np.zeros(threads, np.uint32), np.zeros(threads, np.uint32)
    text = "mad.wide.u32 %d0, %thread, 8, %x; ld.global.v2.b32 {%r1, %r2}, [%d0]; setp.ne.s32 %p0, %r1, 0;"
    text += f"setp.ne.s32 %p1, 0, 0; mov.b32 %r3, 0; {instruction}; selp.b32 %r4, 1, 0, %p1;"
    text += "mad.wide.u32 %d0, %thread, 4, %out; st.global.b32 [%d0], %r3;"
    text += "mad.wide.u32 %d0, %thread, 4, %good; st.global.b32 [%d0], %r4;"
    run(text, threads=threads, x=x, out=out, good=good)
    return out, good


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("amount", [0, 1, 5, 16, 31, "%r2"])
def test_shuffles(mode, width, amount):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 32, (64, 2)).astype(np.uint32)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    out, good = exchanged(f"shfl.sync.{mode}.b32 %r3|%p1, %r1, {amount}, {clamp}, -1", x)
    for lane in range(64):
        n, own, start = (int(x[lane, 1]) if amount == "%r2" else amount), lane % 32, lane % 32 // width * width
        source = {"up": own - n, "down": own + n, "bfly": own ^ n, "idx": start + n % width}[mode]
        inside = start <= source if mode == "up" else source < start + width
        assert good[lane] == inside
        assert out[lane] == x[lane // 32 * 32 + (source if inside else own), 0]


@pytest.mark.parametrize(("operation", "type_"), [
    *((o, t) for o in ("add", "min", "max") for t in ("u32", "s32")), *((o, "b32") for o in ("and", "or", "xor")),
])  # fmt: skip
def test_reductions_of_a_warp(operation, type_):
    x = np.random.default_rng(2).integers(0, 2**32, (64, 2), np.uint32)
    out, _ = exchanged(f"redux.sync.{operation}.{type_} %r3, %r1, -1", x)
    kind = np.int32 if type_ == "s32" else np.uint32
    for warp in range(2):
        expected = ATOMIC[operation].reduce(x[32 * warp : 32 * warp + 32, 0].view(kind), dtype=kind)
        assert (out[32 * warp : 32 * warp + 32] == expected.astype(np.uint32)).all()


def test_votes():
    x = np.ones((96, 2), np.uint32)
    x[32:64, 0] = np.arange(32) % 3 == 0
    x[64:, 0] = 0
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    out, _ = exchanged("vote.sync.ballot.b32 %r3, %p0, -1", x, 96)
    assert out[::32].tolist() == [2**32 - 1, ballot, 0]
    for mode, expected in {"all": [1, 0, 0], "any": [1, 1, 0], "uni": [1, 0, 1]}.items():
        assert exchanged(f"vote.sync.{mode}.pred %p1, %p0, -1", x, 96)[1][::32].tolist() == expected
    assert exchanged("vote.sync.all.pred %p1, !%p0, -1", x, 96)[1][::32].tolist() == [0, 0, 1]


def test_special_registers():
    names = ["tid.x", "tid.y", "ntid.x", "ctaid.x", "nctaid.x", "nctaid.z", "laneid", "warpid"]
    out = np.zeros((3, 64, len(names)), np.int32)
    text = f"mad.lo.u32 %r0, %block, 64, %thread; mad.wide.u32 %d0, %r0, {4 * len(names)}, %out;"
    text += "".join(f"mov.u32 %r1, %{name}; st.global.b32 [%d0+{4 * n}], %r1;" for n, name in enumerate(names))
    run(text, threads=64, blocks=3, out=out)
    for block in range(3):
        for thread in range(64):
            assert out[block, thread].tolist() == [thread, 0, 64, block, 3, 1, thread % 32, thread // 32]


# ------------------------------------------------------------------------------------------------ completeness

ELSEWHERE = {  # tested above, or in test_emulator_matrices.py
    "ld", "st", "atom", "red", "shfl", "redux", "vote", "mma", "ldmatrix", "stmatrix", "wgmma",
}  # fmt: skip
UNKNOWN = [
    "frobnicate.b32 %r1, %r2", "cp.async.ca.shared.global [%shared], [%d0], 16", "cp.async.wait_all",
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%shared], [%d0, {%r1, %r2}], [%r3]",
    "mbarrier.init.shared::cta.b64 [%shared], 1", "tcgen05.wait::ld.sync.aligned", "barrier.cluster.arrive",
    "ld.b32 %r1, [%d0]", "st.b32 [%d0], %r1", "ld.local.b32 %r1, [%r2]", "ld.shared::cluster.b32 %r1, [%r2]",
    "atom.shared.add.u32 %r1, [%shared], 1", "atom.global.gpu.relaxed.exch.b32 %r1, [%d0], 1",
    "atom.global.gpu.relaxed.cas.b32 %r1, [%d0], 1, 2", "add.sat.s32 %r1, %r2, %r3", "add.rz.f32 %r1, %r2, %r3",
    "cvt.rn.satfinite.e4m3x2.f32 %h1, %r2, %r3", "cvt.rz.f32.f64 %r1, %d1", "cvt.rz.f16.f32 %h1, %r1",
    "ex2.approx.f16 %h1, %h2", "prmt.b32.f4e %r1, %r2, %r3, %r4", "set.lt.u32.s32 %r1, %r2, %r3", "cnot.b32 %r1, %r2",
    "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r7}, {%r1,%r2,%r3,%r4}",
    "fence.proxy.tensormap::generic.acquire.gpu [%d0], 128", "call (), f, ()", "bar.arrive 1, 64", "@%p0 bar.sync 0",
    "setp.lt.f16x2 %p1, %r1, %r2", "abs.s16x2 %r1, %r2",
    "shfl.sync.up.b32 %r1, %r2, 1, 31, 15", "shfl.up.b32 %r1, %r2, 1, 31", "mov.u32 %r1, %clock", "bar.sync 1, 32",
]  # fmt: skip


def test_every_instruction_is_tested():
    tested = {part.lstrip().split(".")[0] for instruction, *_ in ROWS for part in instruction.split(";")}
    assert tested | ELSEWHERE == set(codegen.HANDLERS)


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_what_is_unknown_is_named(instruction):
    with pytest.raises(PTXError, match=re.escape(" ".join(instruction.split())[:40])):
        run(f"{instruction};")
