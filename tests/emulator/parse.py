"""PTX text to instructions and basic blocks.

Of the PTX ISA (8.7) this takes what Triton's compiler writes: one `.entry`, registers in scopes, labels, `.loc` lines,
guards (`@%p`), vector operands in braces and addresses in brackets (sections 4 "Syntax" and 6 "Operands").
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field


class PTXError(Exception):
    """PTX that the emulator does not know, or that is wrong."""


@dataclass(frozen=True)
class Reg:
    """A virtual register; `type` is pred, b16, b32 or b64."""

    name: str
    type: str


@dataclass(frozen=True)
class Imm:
    """A constant: the bits, or an integer of unlimited size."""

    value: int
    float_bits: int = 0  # 32 or 64 where it was written as 0f... or 0d...


@dataclass(frozen=True)
class Vec:
    items: tuple


@dataclass(frozen=True)
class Addr:
    """[base + offset]; the base is a register, or the name of a parameter or variable."""

    base: object
    offset: int


@dataclass(frozen=True)
class Special:
    """A special register, such as %tid.x (section 10)."""

    name: str


@dataclass(frozen=True)
class Sym:
    """A label, or the address of a variable."""

    name: str


@dataclass(frozen=True)
class Sink:
    """The operand `_`, which drops a result."""


@dataclass(frozen=True)
class Not:
    """!p."""

    reg: Reg


@dataclass
class Instr:
    """One instruction. `parts` is the opcode split at its dots."""

    opcode: str
    parts: list[str]
    operands: list
    guard: Reg | None
    negated: bool
    line: int  # of the PTX text
    text: str
    location: str  # source line by .loc

    def __str__(self) -> str:
        return f"PTX line {self.line}: `{self.text[:160]}` ({self.location})"


@dataclass
class Block:
    """Instructions that are entered only at the first and left only at the last."""

    index: int
    instrs: list[Instr] = field(default_factory=list)
    terminator: Instr | None = None  # bra, ret, exit, trap or bar.sync
    successors: list[int] = field(default_factory=list)  # of a guarded branch: taken, then not taken

    def all(self) -> list[Instr]:
        return [*self.instrs, *([self.terminator] if self.terminator else [])]


@dataclass
class Kernel:
    name: str
    params: list[tuple[str, str]]  # name and type, as in ("k_param_0", "u64")
    blocks: list[Block]
    threads: int | None  # .reqntid
    shared: dict[str, tuple[int, int]]  # alignment and size of shared variables; size 0 for the launch's own


TERMINATORS = ("bra", "ret", "exit", "trap", "bar", "barrier")
WRITES_NOTHING = {*TERMINATORS, "st", "stmatrix", "red", "fence", "membar", "griddepcontrol"}


def registers(operand: object) -> set[Reg]:
    if isinstance(operand, Reg):
        return {operand}
    if isinstance(operand, Not):
        return {operand.reg}
    if isinstance(operand, Addr):
        return registers(operand.base)
    items = operand.items if isinstance(operand, Vec) else operand if isinstance(operand, tuple) else ()
    return set().union(*map(registers, items))


def operands_of(instr: Instr) -> tuple[set[Reg], set[Reg]]:
    """Registers that an instruction reads, and those that it writes."""
    every = [registers(operand) for operand in instr.operands]
    reads, writes = set().union(*every[1:]), set().union(*every[:1])
    if instr.parts[0] == "wgmma":
        reads, writes = reads | writes, writes if instr.parts[1] == "mma_async" else set()
    elif instr.parts[0] in WRITES_NOTHING:
        reads, writes = reads | writes, set()
    return reads | registers(instr.guard), writes


def _statements(text: str, files: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    """(line, source location, statement); labels and braces of scopes are statements, too."""
    location, pending, start = "", "", 0
    for number, raw in enumerate(text.split("\n"), 1):
        code, _, comment = raw.partition("//")
        rest, words = code.strip(), code.replace(",", " ").split()
        if not pending and words and words[0] in (".loc", ".pragma"):
            if words[0] == ".loc":
                location = comment.strip() or f"{files.get(words[1], words[1])}:{words[2]}:{words[3]}"
            continue
        while rest:
            found = None if pending else re.match(r"[{}]|[$\w]+:(?!:)", rest)
            if found:
                yield number, location, found[0]
                rest = rest[found.end() :].strip()
                continue
            start = start if pending else number
            statement, end, rest = rest.partition(";")
            pending, rest = f"{pending}{statement} ", rest.strip()
            if end:
                if pending.strip():
                    yield start, location, " ".join(pending.split())
                pending = ""


class _Scopes:
    """Registers by name; those of inner scopes hide those of outer ones."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Reg]] = []
        self.count = 0

    def enter(self) -> None:
        self.count += 1
        self.scopes.append({})

    def declare(self, type_: str, names: str) -> None:
        for name in names.replace(" ", "").split(","):
            stem, _, count = name.rstrip(">").partition("<")
            for each in [f"{stem}{i}" for i in range(int(count))] if count else [name]:
                unique = each if len(self.scopes) == 1 else f"{each}@{self.count}"
                self.scopes[-1][each] = Reg(unique, type_ if type_ == "pred" else "b" + type_[1:])

    def operand(self, text: str) -> object:
        text = text.strip()
        if text[:1] == "{":
            return Vec(tuple(self.operand(each) for each in text[1:-1].split(",")))
        if text[:1] == "[":
            found = re.match(r"([%\w$.@]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?$", text[1:-1].strip())
            if not found:
                raise PTXError(f"address {text!r}")
            base = self.operand(found[1])
            offset = int((found[2] or found[3] or "0").replace(" ", ""), 0)
            return Addr(base.name if isinstance(base, Sym) else base, offset)
        if text == "_":
            return Sink()
        if "|" in text:
            return tuple(self.operand(each) for each in text.split("|"))
        if text[:1] == "!":
            return Not(self.operand(text[1:]))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if re.match(r"%(n?tid|n?ctaid)\.[xyz]$|%(laneid|warpid)$", text):
            return Special(text)
        if re.match(r"0[fF][0-9a-fA-F]{8}$|0[dD][0-9a-fA-F]{16}$", text):
            return Imm(int(text[2:], 16), 32 if text[1] in "fF" else 64)
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return Imm(int(text.rstrip("U"), 0))
        if re.match(r"-?\d+\.\d*([eE][-+]?\d+)?$", text):
            return Imm(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
        if re.match(r"[A-Za-z_$][\w$]*$", text):
            return Sym(text)
        raise PTXError(f"operand {text!r}")

    def instruction(self, text: str, line: int, location: str) -> Instr:
        guard, opcode, arguments = re.match(r"(?:@(!?\S+) )?(\S+) ?(.*)$", text).groups()
        try:
            operands = [self.operand(each) for each in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{[])+", arguments)]
            condition = self.operand(guard.lstrip("!")) if guard else None
        except PTXError as error:
            raise PTXError(f"PTX line {line}: {error} in `{text}`") from None
        parts = opcode.replace("::", "__").split(".")
        return Instr(opcode, parts, operands, condition, bool(guard) and guard[0] == "!", line, text, location)


def parse(text: str) -> Kernel:
    """The one kernel of a PTX module."""
    head = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)", text)
    if head is None or len(re.findall(r"^\s*(?:\.visible\s+|\.weak\s+)?\.(?:entry|func)\b", text, re.M)) != 1:
        raise PTXError("not one function, a kernel")
    declared = [re.sub(r"//.*", "", each).split() for each in head[2].split(",")]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    variables = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text)
    scopes, items = _Scopes(), []  # instructions, and labels as strings
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]+)"', text, re.M))
    body = "\n" * text.count("\n", 0, head.end()) + text[head.end() :]
    for line, location, statement in _statements(body, files):
        if statement == "{":
            scopes.enter()
        elif statement == "}":
            scopes.scopes.pop()
            if not scopes.scopes:
                break
        elif statement.endswith(":"):
            items.append(statement[:-1])
        elif declaration := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement):
            scopes.declare(*declaration.groups())
        elif statement[0] == ".":
            raise PTXError(f"PTX line {line}: `{statement}`")
        else:
            items.append(scopes.instruction(statement, line, location))
    else:
        raise PTXError("the kernel does not end")
    return Kernel(
        head[1],
        [(words[-1], words[1].lstrip(".")) for words in declared if words],
        _blocks(items),
        int(threads[1]) if threads else None,
        {name: (int(align), int(size or 0)) for align, name, size in variables},
    )


def _blocks(items: list) -> list[Block]:
    blocks, at = [Block(0)], {}
    targets = {item.operands[0].name for item in items if isinstance(item, Instr) and item.parts[0] == "bra"}
    for item in items:
        if isinstance(item, str) and item not in targets:
            continue
        if blocks[-1].terminator or (isinstance(item, str) and blocks[-1].instrs):
            blocks.append(Block(len(blocks)))
        if isinstance(item, str):
            at[item] = len(blocks) - 1
        elif item.parts[0] in TERMINATORS and not item.opcode.startswith("bar.warp"):
            blocks[-1].terminator = item
        else:
            blocks[-1].instrs.append(item)
    for block in blocks:
        end, following = block.terminator, block.index + 1
        if end is not None and end.parts[0] == "bra":
            block.successors.append(at[end.operands[0].name])
        if end is None or end.parts[0] in ("bar", "barrier") or end.guard is not None:
            block.successors.append(following)
    if max(blocks[-1].successors, default=0) >= len(blocks):
        raise PTXError("control runs past the end of the kernel")
    return blocks
