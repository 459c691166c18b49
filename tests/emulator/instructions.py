"""What each instruction does, as lines of Python. Unknown modifiers and forms are errors: nothing is skipped.

Sections are those of the PTX ISA 8.7.
"""

from collections.abc import Callable

from .codegen import HANDLERS, Compiler, Handler
from .parse import Addr, Imm, Instr, Not, PTXError, Reg, Sink, Vec
from .tensorcore import PER_REGISTER

TYPES = {
    "s8": "i1", "u8": "u1", "b8": "u1", "s16": "i2", "u16": "u2", "b16": "u2", "s32": "i4", "u32": "u4", "b32": "u4",
    "s64": "i8", "u64": "u8", "b64": "u8", "f16": "f2", "f32": "f4", "f64": "f8", "pred": "b1", "bf16": "u2",
    "f16x2": "u4", "bf16x2": "u4", "s16x2": "u4", "u16x2": "u4", "f32x2": "u8", "tf32": "u4",
}  # fmt: skip
SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}

# How numbers are loaded to be computed with, and saved: short ones in float64, to be rounded once.
LOAD = {
    "f16": "{}.astype(f8)", "bf16": "S.bf16_to_f32({}).astype(f8)", "f32x2": "S.pair({})",
    **{kind: f"S.halves({{}}, {kind!r})" for kind in ("f16x2", "bf16x2", "s16x2", "u16x2")},
}  # fmt: skip
SAVE = {
    "f16": ("u2", "S.to_f16({})"), "bf16": ("u2", "S.f64_to_bf16({})"), "f32x2": ("u8", "S.from_pair({})"),
    **{kind: ("u4", f"S.from_halves({{}}, {kind!r})") for kind in ("f16x2", "bf16x2", "s16x2", "u16x2")},
}  # fmt: skip


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


def type_of(instr: Instr, *allowed: str) -> str:
    """The last part of the opcode; those before must be allowed."""
    for modifier in instr.parts[1:-1]:
        if modifier not in allowed:
            raise PTXError(f"modifier .{modifier}")
    return instr.parts[-1]


def unguarded(c: Compiler) -> None:
    if c.guard is not None:
        raise PTXError("a guard")


def items(operand: object) -> list:
    return list(operand.items) if isinstance(operand, Vec) else [operand]


def predicate(c: Compiler, operand: object) -> str:
    return f"(~{c.get(operand.reg, 'b1')})" if isinstance(operand, Not) else c.get(operand, "b1")


def number(c: Compiler, operand: object, type_: str, instr: Instr) -> str:
    """To compute with."""
    value = c.get(operand, TYPES[type_])
    if "ftz" in instr.parts and type_ == "f32":
        return f"S.ftz({value})"
    return LOAD.get(type_, "{}").format(value)


def single(type_: str) -> None:
    """Not two numbers in a register."""
    if type_.endswith("x2"):
        raise PTXError(f"type .{type_}")


def assign_number(c: Compiler, target: object, type_: str, value: str, instr: Instr) -> None:
    if "ftz" in instr.parts and type_ == "f32":
        value = f"S.ftz({value})"
    if "sat" in instr.parts:
        value = f"S.saturated({value})"
    kind, save = SAVE.get(type_, (TYPES[type_], "{}"))
    c.assign(target, kind, save.format(value))


# ------------------------------------------------------------------------------- arithmetic (9.7.1, 9.7.3 to 9.7.5)


@handles("add", "sub", "mul", "div", "rem", "min", "max", "and", "or", "xor", "fma")
def _arithmetic(c: Compiler, instr: Instr) -> None:
    name, mixed = instr.parts[0], instr.parts[-2] == "f32"  # with operands of 16 bits, of sm_100 and later
    type_ = type_of(instr, "rn", "lo", "hi", "wide", "ftz", "sat", "full", "approx", "NaN", *["f32"] * mixed)
    target, *operands = instr.operands
    if type_ not in LOAD and type_ not in ("f32", "f64"):
        _integers(c, instr, type_, target, *operands)
        return
    values = [number(c, each, type_, instr) for each in operands]
    if mixed:
        values[-1], type_ = c.get(operands[-1], "f4"), "f32"
    if name in ("min", "max"):
        value = values[0]
        for each in values[1:]:  # three of sm_100 and later
            value = f"S.f{name}({value}, {each}, {'NaN' in instr.parts})"
    elif name == "fma":
        function = {"f32": "fma32", "f32x2": "fma32", "f64": "fma64"}.get(type_, "fma_odd")
        value = f"S.{function}({', '.join(values)})"
    elif name == "div" and "rn" not in instr.parts:
        value = f"S.div_{'full' if 'full' in instr.parts else 'approx'}({', '.join(values)})"
    else:
        x, y = values
        value = f"{x} {SYMBOLS[name]} {y}"
        value = f"({value}).astype(f4)" if mixed else value
    assign_number(c, target, type_, value, instr)


def _integers(c: Compiler, instr: Instr, type_: str, target: object, a: object, b: object) -> None:
    name, kind = instr.parts[0], TYPES[type_]
    if not set(instr.parts[1:-1]) <= {"lo", "hi", "wide"}:
        raise PTXError("modifiers of integers")
    if "wide" in instr.parts:
        c.assign(target, doubled(kind), product(c, a, b, kind))
    elif "hi" in instr.parts:
        c.assign(target, kind, high(c, a, b, kind))
    elif name in ("div", "rem"):
        c.assign(target, kind, f"S.{name}({c.get(a, kind)}, {c.get(b, kind)})")
    elif name in ("min", "max"):
        c.assign(target, kind, f"S.np.{name}imum({c.get(a, kind)}, {c.get(b, kind)})")
    else:
        kind = kind if kind == "b1" else "u" + kind[1]  # wraps alike
        c.assign(target, kind, f"{c.get(a, kind)} {SYMBOLS[name]} {c.get(b, kind)}")


def doubled(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1]))


def product(c: Compiler, a: object, b: object, kind: str) -> str:
    """Of twice the width."""
    return " * ".join(widened(c, each, kind) for each in (a, b))


def widened(c: Compiler, operand: object, kind: str) -> str:
    wide, bits = doubled(kind), 8 * int(kind[1])
    if isinstance(operand, Imm):
        value = operand.value & (1 << bits) - 1
        return c.constant(value - (value >> bits - 1 << bits if kind[0] == "i" else 0), wide)
    return c.memoised(f"wide{kind}", [operand], f"{c.get(operand, kind)}.astype({wide})")


def high(c: Compiler, a: object, b: object, kind: str) -> str:
    """The upper half of a product."""
    if kind[1] == "8":
        return f"S.mulhi_{kind}({c.get(a, kind)}, {c.get(b, kind)})"
    return f"(({product(c, a, b, kind)}) >> {doubled(kind)}({8 * int(kind[1])})).astype({kind})"


@handles("mad")
def _mad(c: Compiler, instr: Instr) -> None:
    kind = TYPES[type_of(instr, "lo", "hi", "wide")]
    target, a, b, d = instr.operands
    if "wide" in instr.parts:
        kind, value = doubled(kind), product(c, a, b, kind)
    elif "hi" in instr.parts:
        value = high(c, a, b, kind)
    else:
        kind = "u" + kind[1]
        value = f"{c.get(a, kind)} * {c.get(b, kind)}"
    c.assign(target, kind, f"{value} + {c.get(d, kind)}")


@handles("abs", "neg", "not", "popc", "clz", "brev", "copysign")
def _bits(c: Compiler, instr: Instr) -> None:
    name, type_ = instr.parts[0], type_of(instr, "ftz")
    target, *operands = instr.operands
    kind = TYPES[type_]
    if type_ in ("f16", "bf16", "f16x2", "bf16x2"):
        bits, ones = ("u4", 0x10001) if type_.endswith("x2") else ("u2", 1)
        change = f"& {bits}({0x7FFF * ones})" if name == "abs" else f"^ {bits}({0x8000 * ones})"
        c.assign(target, bits, f"{c.get(operands[0], bits)} {change}")
        return
    single(type_)
    values = [number(c, each, type_, instr) for each in operands]
    if name == "copysign":  # the sign of a, the magnitude of b
        c.assign(target, kind, f"S.np.copysign({values[1]}, {values[0]})")
    elif name in ("popc", "clz", "brev"):
        c.assign(target, kind if name == "brev" else "u4", f"S.{name}({values[0]})")
    elif name == "abs":
        c.assign(target, kind, f"S.np.abs({values[0]})")
    else:
        c.assign(target, kind, f"{'~' if name == 'not' else '-'}{values[0]}")


@handles("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh")
def _special_function(c: Compiler, instr: Instr) -> None:
    """In float64, then rounded."""
    type_ = type_of(instr, "approx", "ftz", "rn")
    target, a = instr.operands
    if type_ not in ("f32", "f64"):
        raise PTXError(f"type .{type_}")
    value = f"S.{instr.parts[0]}({number(c, a, type_, instr)}.astype(f8)).astype({TYPES[type_]})"
    assign_number(c, target, type_, value, instr)


@handles("testp")
def _testp(c: Compiler, instr: Instr) -> None:
    target, a = instr.operands
    test = {"finite": "S.np.isfinite({})", "infinite": "S.np.isinf({})", "number": "~S.np.isnan({})",
            "notanumber": "S.np.isnan({})"}[instr.parts[1]]  # fmt: skip
    c.assign(target, "b1", test.format(c.get(a, TYPES[instr.parts[-1]])))


# ------------------------------------------------------------------------- bits, selection (9.7.2, 9.7.6 to 9.7.8)


@handles("shl", "shr")
def _shift(c: Compiler, instr: Instr) -> None:
    kind = TYPES[type_of(instr)]
    target, a, n = instr.operands
    c.assign(target, kind, f"S.{instr.parts[0]}({c.get(a, kind)}, {c.get(n, 'u4')})")


@handles("shf")
def _funnel(c: Compiler, instr: Instr) -> None:
    _, direction, mode, _ = instr.parts
    target, *operands = instr.operands
    values = ", ".join(c.get(each, "u4") for each in operands)
    c.assign(target, "u4", f"S.shf_{direction}({values}, {({'wrap': True, 'clamp': False})[mode]})")


@handles("bfe", "bfi")
def _field(c: Compiler, instr: Instr) -> None:
    kind = TYPES[type_of(instr)]
    target, *numbers, start, length = instr.operands
    values = ", ".join(c.get(each, kind) for each in numbers)
    c.assign(target, kind, f"S.{instr.parts[0]}({values}, {c.get(start, 'u4')}, {c.get(length, 'u4')})")


@handles("lop3", "prmt")
def _bytes(c: Compiler, instr: Instr) -> None:
    if type_of(instr) != "b32":
        raise PTXError("type")
    target, a, b, d, *table = instr.operands
    values = [c.get(each, "u4") for each in (a, b, d)] + [str(each.value) for each in table]
    c.assign(target, "u4", f"S.{instr.parts[0]}({', '.join(values)})")


@handles("selp")
def _selp(c: Compiler, instr: Instr) -> None:
    kind = TYPES[type_of(instr)]
    target, a, b, p = instr.operands
    c.assign(target, kind, f"sel({c.get(p, 'b1')}, {c.get(a, kind)}, {c.get(b, kind)})")


COMPARE = {
    "eq": "{x} == {y}", "ne": "{x} != {y}", "lt": "{x} < {y}", "le": "{x} <= {y}", "gt": "{x} > {y}",
    "ge": "{x} >= {y}", "lo": "{x} < {y}", "ls": "{x} <= {y}", "hi": "{x} > {y}", "hs": "{x} >= {y}",
}  # fmt: skip
COMPARE_FLOATS = {
    **COMPARE, "ne": "({x} < {y}) | ({x} > {y})", "equ": "~(({x} < {y}) | ({x} > {y}))", "neu": "{x} != {y}",
    "ltu": "~({x} >= {y})", "leu": "~({x} > {y})", "gtu": "~({x} <= {y})", "geu": "~({x} < {y})",
    "num": "({x} == {x}) & ({y} == {y})", "nan": "({x} != {x}) | ({y} != {y})",
}  # fmt: skip


@handles("setp")
def _setp(c: Compiler, instr: Instr) -> None:
    _, compare, *combine, type_ = (part for part in instr.parts if part != "ftz")
    target, a, b, *more = instr.operands
    if len(combine) != len(more):
        raise PTXError("operands")
    single(type_)
    x, y = (number(c, each, type_, instr) for each in (a, b))
    table = COMPARE_FLOATS if type_ in LOAD or type_ in ("f32", "f64") else COMPARE
    test = c.new(table[compare].format(x=x, y=y))
    first, second = target if isinstance(target, tuple) else (target, Sink())
    with_p = "".join(f" {SYMBOLS[each]} {predicate(c, p)}" for each, p in zip(combine, more, strict=True))
    for each, value in ((second, f"~{test}"), (first, test)):
        if not isinstance(each, Sink):
            c.assign(each, "b1", value + with_p)
    c.garbage.append(test)


@handles("mov")
def _mov(c: Compiler, instr: Instr) -> None:
    type_ = type_of(instr)
    target, source = instr.operands
    if isinstance(target, Vec):
        wide, bits = f"u{int(type_[1:]) // 8}", int(type_[1:]) // len(target.items)
        whole = c.new(c.get(source, wide))
        for index, item in enumerate(target.items):
            if not isinstance(item, Sink):
                c.assign(item, f"u{bits // 8}", f"({whole} >> {wide}({bits * index})).astype(u{bits // 8})")
        c.garbage.append(whole)
    elif isinstance(source, Vec):
        wide, bits = f"u{int(type_[1:]) // 8}", int(type_[1:]) // len(source.items)
        parts = [f"{c.get(item, f'u{bits // 8}')}.astype({wide})" for item in source.items]
        c.assign(target, wide, " | ".join(f"({part} << {wide}({bits * n}))" for n, part in enumerate(parts)))
    else:
        kind = TYPES[type_]
        if isinstance(source, Reg) and target.type != "pred":  # as it is there already
            kind = next((each for each in c.env.get(source, ()) if each != "matrix"), kind)
        if isinstance(source, Imm) and not source.float_bits:
            kind = kind.replace("f", "u")
        c.assign(target, kind, c.get(source, kind))


@handles("cvta")
def _cvta(c: Compiler, instr: Instr) -> None:
    if "global" not in instr.parts:
        raise PTXError("generic addresses")
    target, a = instr.operands
    c.assign(target, "u8", c.get(a, "u8"))


# ------------------------------------------------------------------------------------------------ conversions (9.7.9)


FLOATS = {("f16", "f32", ""), ("bf16", "f32", ""), ("f16", "f64", ""), ("f32", "f64", ""), ("f32", "f32", ""),
          ("f64", "f32", "rn")}  # fmt: skip


@handles("cvt")
def _cvt(c: Compiler, instr: Instr) -> None:
    *modifiers, to, source = instr.parts[1:]
    target, a, *low = instr.operands
    roundings = [each for each in modifiers if each not in ("ftz", "sat")]
    rounding = roundings[0] if len(roundings) == 1 else ""
    integers = [each[0] in "su" for each in (source, to)]
    form = f"{rounding} of {'integer' if integers[0] else source} to {'integer' if integers[1] else to}"
    if len(roundings) > 1 or (any(integers) and "sat" in modifiers):
        raise PTXError(form)
    if to in ("f16x2", "bf16x2"):
        if modifiers != ["rn"] or source != "f32":
            raise PTXError(form)
        high_, low_ = (f"S.to_{to[:-2]}({c.get(each, 'f4')})" for each in (a, *low))
        c.assign(target, "u4", f"S.pack({high_}, {low_})")
        return
    if low:
        raise PTXError("operands")
    single(source)
    value, kind = number(c, a, source, instr), TYPES[to]
    if all(integers) and not rounding:
        c.assign(target, kind, f"{value}.astype({kind})")
    elif integers == [False, True] and rounding in ("rni", "rzi", "rmi", "rpi"):
        c.assign(target, kind, f"S.to_int({value}, {rounding[1]!r}, {kind})")
    elif integers == [True, False] and rounding == "rn" and (to in ("f32", "f64") or source[1:] in ("8", "16", "32")):
        assign_number(c, target, to, f"{value}.astype({'f8' if to in LOAD else kind})", instr)
    elif to == source and rounding in ("rni", "rzi", "rmi", "rpi"):
        assign_number(c, target, to, f"S.ROUND[{rounding[1]!r}]({value})", instr)
    elif (to, source) == ("tf32", "f32") and rounding == "rna":
        c.assign(target, "u4", f"S.f32_to_tf32({value})")
    elif (to, source) == ("bf16", "f32") and rounding == "rz":
        c.assign(target, "u2", f"S.f32_to_bf16_rz({value})")
    elif source == "f32" and to in ("f16", "bf16") and rounding == "rn":
        c.assign(target, "u2", f"S.to_{to}({value})")
    elif (source, to, rounding) in FLOATS:
        assign_number(c, target, to, f"{value}.astype({kind})", instr)
    else:
        raise PTXError(form)


# ------------------------------------------------------------------------------------------ memory (9.7.9, 9.7.13)

ORDER = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "cta", "gpu", "sys")
CACHE = ("nc", "ca", "cg", "cs", "cv", "wb", "wt", "lu", "L1__evict_first", "L1__evict_last", "L1__no_allocate",
         "L1__evict_normal", "L1__evict_unchanged", "L2__cache_hint")  # fmt: skip
SPACES = ("global", "param", "shared", "shared__cta")


def space_of(instr: Instr) -> str:
    found = [part for part in instr.parts if part in SPACES]
    if not found:
        raise PTXError("generic addresses, or a space")
    return found[0].removesuffix("__cta")


def address_of(c: Compiler, address: object, kind: str) -> str:
    if not isinstance(address, Addr):
        raise PTXError("an address in brackets")
    if isinstance(address.base, str):
        if address.base not in c.kernel.shared or kind != "u4":
            raise PTXError(f"address of {address.base}")
        return f"X.shared_address({address.base!r}, u4)"
    return c.get(address.base, kind)


def vector(operand: object, instr: Instr) -> list:
    found = items(operand)
    if len(found) != next((int(part[1]) for part in instr.parts if part in ("v2", "v4", "v8")), 1):
        raise PTXError(f"{len(found)} registers")
    return found


def olds(c: Compiler, registers: list, kind: str) -> str:
    """What registers keep where an access is not active."""
    known = [isinstance(each, Reg) and c.guard is not None for each in registers]
    values = [c.get(each, kind) if old else f"{kind}(0)" for each, old in zip(registers, known, strict=True)]
    return f"({', '.join(values)},)"


@handles("ld", "st")
def _memory(c: Compiler, instr: Instr) -> None:
    space, type_ = space_of(instr), type_of(instr, "v2", "v4", *SPACES, *ORDER, *CACHE)
    loading = instr.parts[0] == "ld"
    registers, address = instr.operands[:2] if loading else instr.operands[1::-1]  # a cache policy may follow
    registers, kind = vector(registers, instr), f"u{TYPES[type_][1]}"
    if space == "param":
        if address.offset or len(registers) > 1:
            raise PTXError("a part of a parameter")
        c.assign(registers[0], TYPES[type_], f"X.param({address.base!r}).astype({kind}).view({TYPES[type_]})")
        return
    memory, base = ("shared", "u4") if space == "shared" else ("memory", "u8")
    base = address_of(c, address, base)
    if not loading:
        values = ", ".join(c.get(each, kind) for each in registers)
        arguments = f"{base}, {address.offset}, {kind[1]}, ({values},), {c.active()}, {c.site(instr)}"
        c.emit(f"X.{memory}.store({arguments})")
        return
    active, old = c.active(), olds(c, registers, kind)
    results = [c.new() for _ in registers]
    arguments = f"{base}, {address.offset}, {kind[1]}, {len(registers)}, {active}, {old}, {c.site(instr)}"
    c.emit(f"{', '.join(results)}, = X.{memory}.load({arguments})")
    guard, c.guard = c.guard, None  # the guard is in `active`
    for each, name in zip(registers, results, strict=True):
        if isinstance(each, Reg) and c.canonical(each) != kind:
            extended = TYPES[type_] if type_[0] == "s" else kind
            c.assign(each, extended, f"{name}.view({extended})")
        elif isinstance(each, Reg):
            c.define(each, {kind: name})
    c.guard = guard


ATOMIC = {
    "add": "add", "min": "minimum", "max": "maximum", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
}  # fmt: skip


@handles("atom", "red")
def _atomic(c: Compiler, instr: Instr) -> None:
    if space_of(instr) != "global":
        raise PTXError("atomic operations on other than global memory")
    type_ = type_of(instr, "global", "v2", "v4", "v8", *ORDER, *ATOMIC)
    operation = next(part for part in instr.parts if part in ATOMIC)
    *target, address, values = instr.operands
    values, kind = vector(values, instr), TYPES[type_]
    targets = items(target[0]) if target else []
    wanted = any(each in c.read_anywhere for each in targets)
    names = ", ".join(c.get(each, "u" + kind[1]) for each in values)
    old = olds(c, targets if wanted else [Sink()] * len(values), "u" + kind[1])
    results = [c.new() for _ in values]
    arguments = f"{address_of(c, address, 'u8')}, {address.offset}, {kind}, ({names},), {c.active()}, {old}"
    c.emit(f"{', '.join(results)}, = X.memory.atomic(S.np.{ATOMIC[operation]}, {arguments}, {c.site(instr)}, {wanted})")
    for each, name in zip(targets, results, strict=False):
        if isinstance(each, Reg):
            c.define(each, {"u" + kind[1]: name})


@handles("fence", "membar")
def _fence(c: Compiler, instr: Instr) -> None:
    if instr.opcode in ("fence.proxy.async.shared::cta", "fence.proxy.async"):
        c.emit("X.shared.fence(mask)")
    elif instr.parts[:2] == ["fence", "proxy"]:
        raise PTXError("a proxy fence")


# ------------------------------------------------------------------------------------- matrices (9.7.14 and 9.7.15)


@handles("ldmatrix", "stmatrix")
def _rows(c: Compiler, instr: Instr) -> None:
    unguarded(c)
    if type_of(instr, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared__cta") != "b16":
        raise PTXError("type")
    loading, trans = instr.parts[0] == "ldmatrix", "trans" in instr.parts
    registers, address = instr.operands if loading else instr.operands[::-1]
    registers = items(registers)
    if f"x{len(registers)}" not in instr.parts:
        raise PTXError(f"{len(registers)} registers")
    base = f"{address_of(c, address, 'u4')}, {address.offset}"
    if loading:
        results = [c.new() for _ in registers]
        arguments = f"{base}, {len(registers)}, {trans}, lanes, mask, {c.site(instr)}"
        c.emit(f"{', '.join(results)}, = X.ldmatrix({arguments})")
        for each, name in zip(registers, results, strict=True):
            c.define(each, {"u4": name})
    else:
        names = ", ".join(c.get(each, "u4") for each in registers)
        c.emit(f"X.stmatrix({base}, ({names},), {trans}, lanes, mask, {c.site(instr)})")


@handles("mma")
def _mma(c: Compiler, instr: Instr) -> None:
    unguarded(c)
    _, sync, aligned, shape, row, column, kind_d, kind, other, kind_c = instr.parts
    rows, columns, depth = (int(each) for each in shape[1:].replace("n", " ").replace("k", " ").split())
    if (sync, aligned, row, column, columns) != ("sync", "aligned", "row", "col", 8):
        raise PTXError("a form of mma")
    if kind != other or kind_d != kind_c or kind not in PER_REGISTER or kind_c not in ("f16", "f32", "f64"):
        raise PTXError("types of mma")
    d, a, b, before = map(items, instr.operands)
    raw = "u8" if kind == "f64" else "u4"
    names = [", ".join(c.get(each, raw) for each in fragment) for fragment in (a, b)]
    left = c.memoised(f"A{kind}{rows}{depth}", a, f"T.fragment_a({kind!r}, {rows}, {depth}, X.lanes, {names[0]})")
    right = c.memoised(f"B{kind}{depth}", b, f"T.fragment_b({kind!r}, {depth}, X.lanes, {names[1]})")
    matrix = c.matrix(before, kind_c, rows, columns)
    c.define_matrix(d, c.new(f"X.mma({left}, {right}, {matrix}, mask, {c.site(instr)})"), kind_d)


@handles("wgmma")
def _wgmma(c: Compiler, instr: Instr) -> None:
    unguarded(c)
    form = instr.parts[1]
    if form == "fence":  # of registers: see `inflight`
        return
    if form in ("commit_group", "wait_group"):
        left = "".join(f"{each.value}, " for each in instr.operands)
        c.emit(f"X.shared.{form[:-6]}({left}mask, {c.site(instr)})")
        return
    columns, depth = (int(each) for each in instr.parts[4].removeprefix("m64n").split("k"))
    accumulator, kind, other = instr.parts[5:]
    if accumulator != "f32" or kind != other or kind not in ("bf16", "f16", "tf32"):
        raise PTXError("types of wgmma")
    d, a, b, scale_d, *scales = instr.operands
    registers, flags = items(d), [each.value for each in scales[2:]]
    if [each.value for each in scales[:2]] != [1, 1] or len(registers) != columns // 2:
        raise PTXError("scales or registers of wgmma")
    site = c.site(instr)
    if isinstance(a, Vec):
        names = ", ".join(c.get(each, "u4") for each in a.items)
        left = c.memoised(f"A{kind}{depth}", items(a), f"T.fragment_a({kind!r}, 16, {depth}, X.lanes, {names})")
    else:
        left = f"X.descriptor({c.get(a, 'u8')}, 64, {depth}, {kind!r}, {bool(flags and flags.pop(0))}, mask, {site})"
    right = f"X.descriptor({c.get(b, 'u8')}, {columns}, {depth}, {kind!r}, {bool(flags and flags[0])}, mask, {site})"
    before, scale = "None", "True"
    if not isinstance(scale_d, Imm) or scale_d.value:
        before = c.matrix(registers, "f32", 16, columns)
    if isinstance(scale_d, Reg):
        scale = c.get(scale_d, "b1")
    c.define_matrix(registers, c.new(f"X.wgmma({left}, {right}, {before}, {scale}, {columns})"), "f32")


# ------------------------------------------------------------------------------------------------ warps (9.7.9, 9.7.13)


@handles("shfl", "redux", "vote", "bar")
def _warp(c: Compiler, instr: Instr) -> None:
    """shfl.sync, redux.sync, vote.sync and bar.warp.sync, by whole warps; other barriers end a block."""
    unguarded(c)
    name, *parts = instr.parts
    if parts[0] != ("warp" if name == "bar" else "sync"):
        raise PTXError("without .sync")
    end = f"{c.get(instr.operands[-1], 'u4')}, mask, {c.site(instr)}"
    if name == "bar":
        c.emit(f"X.warps({end})")
    elif name == "redux":
        kind = TYPES[parts[-1]]
        c.assign(instr.operands[0], kind, f"X.redux({parts[1]!r}, {c.get(instr.operands[1], kind)}, {end})")
    elif name == "vote":
        kind = "u4" if parts[1] == "ballot" else "b1"
        c.assign(instr.operands[0], kind, f"X.vote({parts[1]!r}, {predicate(c, instr.operands[1])}, {end})")
    else:
        target, a, b, clamp, _ = instr.operands
        first, second = target if isinstance(target, tuple) else (target, Sink())
        value, good = c.new(), c.new()
        values = ", ".join(c.get(each, "u4") for each in (a, b, clamp))
        c.emit(f"{value}, {good} = X.shfl({parts[1]!r}, {values}, {end})")
        if isinstance(second, Reg):
            c.assign(second, "b1", good)
        c.define(first, {"u4": value})
        c.garbage.append(good)


@handles("griddepcontrol")
def _nothing(c: Compiler, instr: Instr) -> None:
    """What orders launches, which run one after the other here."""
