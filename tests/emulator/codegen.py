"""Basic blocks to Python functions that compute all lanes at once with numpy.

A block becomes `def block_N(R, X, mask)`: R holds the registers that live across blocks, X is the `Machine`, mask the
active lanes (None for all). Values of inactive lanes are computed too and dropped when the block's results are stored
to R; memory is only touched by active lanes. The function returns the next block, or an array of next blocks.
"""

from collections.abc import Callable

import numpy as np

from . import inflight, semantics, tensorcore
from .parse import Block, Imm, Instr, Kernel, PTXError, Reg, Sink, Special, Sym, operands_of

EXIT = 1 << 30
BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned", "barrier.cta.sync.aligned")  # of the whole block
Handler = Callable[["Compiler", Instr], None]
HANDLERS: dict[str, Handler] = {}  # by the first part of the opcode; filled by `instructions`


class _Matrix:
    """The registers of a C or D matrix, which stays a matrix until somebody wants one of them."""

    def __init__(self, name: str, regs: list[Reg], kind: str) -> None:
        self.name, self.regs, self.kind = name, regs, kind
        self.spread: str | None = None  # the name of its registers, once there is one
        self.live = set(regs)


class Compiler:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.numbers: dict[Reg, int] = {}  # places in R
        self.sites: list[Instr] = []  # instructions that may have to be named
        self.constants: dict[str, object] = {}
        self.constant_names: dict[tuple, str] = {}
        every = [instr for block in kernel.blocks for instr in block.instrs]
        self.uses_wgmma = any(instr.parts[0] == "wgmma" for instr in every)
        shared = [i.parts[-1] for i in every if i.parts[0] in ("ld", "st") and "shared" in i.opcode]
        self.granule = min([4, *(int(type_[1:]) // 8 for type_ in shared)])  # bytes of the smallest access

    # ------------------------------------------------------------------------------------------------ names and values

    def number(self, reg: Reg) -> int:
        return self.numbers.setdefault(reg, len(self.numbers))

    def constant(self, value: int, kind: str) -> str:
        """A numpy scalar of the module's namespace with these bits."""
        if (value, kind) not in self.constant_names:
            size = int(kind[1])
            bits = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            name = self.constant_names[value, kind] = f"K{len(self.constants)}"
            self.constants[name] = np.bool_(value & 1) if kind == "b1" else np.frombuffer(bits, kind)[0]
        return self.constant_names[value, kind]

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def new(self, expression: str = "") -> str:
        """A new name, of an expression if there is one."""
        self.counter += 1
        if expression:
            self.emit(f"v{self.counter} = {expression}")
        return f"v{self.counter}"

    def canonical(self, reg: Reg) -> str:
        return "b1" if reg.type == "pred" else f"u{int(reg.type[1:]) // 8}"

    def get(self, operand: object, kind: str) -> str:
        """The name of a value as this numpy type; bits are kept, and those above the type's width dropped."""
        if isinstance(operand, Imm):
            value = operand.value
            if kind[0] == "f" and not operand.float_bits:
                raise PTXError("an integer where a floating-point number belongs")
            if operand.float_bits == 64 and kind == "f4":
                value = int(np.float32(np.frombuffer(value.to_bytes(8, "little"), "f8")[0]).view("u4"))
            return self.constant(value, kind)
        if isinstance(operand, Special):
            return f"X.special_{operand.name[1:].replace('.', '_')}.astype({kind})"
        if isinstance(operand, Sym) and operand.name in self.kernel.shared:
            return f"X.shared_address({operand.name!r}, {kind})"
        if not isinstance(operand, Reg):
            raise PTXError(f"operand {operand}")
        if operand not in self.env:
            self.env[operand] = {self.canonical(operand): self.new(f"R[{self.number(operand)}]")}
        names = self.env[operand]
        if "matrix" in names:
            matrix, index = names.pop("matrix")
            matrix.spread = matrix.spread or self.new(f"T.spread({matrix.name})")
            names[{"f32": "f4", "f64": "f8", "f16": "u4"}[matrix.kind]] = self.new(f"{matrix.spread}[{index}]")
        if kind not in names:
            if operand.type == "pred" or kind == "b1" or int(kind[1]) > int(self.canonical(operand)[1]):
                raise PTXError(f"{operand.name}, {operand.type}, as {kind}")
            have, name = next(iter(names.items()))
            if have[1] != kind[1]:
                name, have = f"{self.get(operand, 'u' + have[1])}.astype(u{kind[1]})", "u" + kind[1]
            names[kind] = self.new(name if have == kind else f"{name}.view({kind})")
        return names[kind]

    def assign(self, operand: object, kind: str, expression: str) -> None:
        """Assign; lanes where the guard is false keep the old value. Wider registers get the sign, or zeros."""
        if isinstance(operand, Sink):
            self.emit(expression)
            return
        if not isinstance(operand, Reg):
            raise PTXError(f"assignment to {operand}")
        want = self.canonical(operand)
        if (kind == "b1") != (want == "b1") or int(kind[1]) > int(want[1]):
            raise PTXError(f"{operand.name}, {operand.type}, is assigned {kind}")
        if kind[1] != want[1]:
            kind, have = ("i" if kind[0] == "i" else "u") + want[1], expression
            expression = f"({have}).astype({kind})"
        if self.guard is not None:
            expression = f"sel({self.guard_value()}, {expression}, {self.get(operand, kind)})"
        self.define(operand, {kind: self.new(expression)})

    def define(self, reg: Reg, names: dict) -> None:
        self.forget(reg)
        self.env[reg] = names

    def forget(self, reg: Reg) -> None:
        """Drop the names of a register that is dead or about to change."""
        names = self.env.pop(reg, {})
        self.versions[reg] = self.versions.get(reg, 0) + 1
        self.garbage += [name for key, name in names.items() if key != "matrix"]
        self.garbage += [self.memo.pop(key) for key in self.memo_of.pop(reg, ()) if key in self.memo]
        matrix = self.matrices.pop(reg, None)
        if matrix is not None:
            matrix.live.discard(reg)
            if not matrix.live:
                self.garbage += [name for name in (matrix.name, matrix.spread) if name]

    def memoised(self, what: str, regs: list, expression: str) -> str:
        """The name of an expression of registers, evaluated once while they do not change."""
        key = (what, tuple((reg, self.versions.get(reg, 0)) if isinstance(reg, Reg) else reg for reg in regs))
        if key not in self.memo:
            self.memo[key] = self.new(expression)
            for reg in regs:
                if isinstance(reg, Reg):
                    self.memo_of.setdefault(reg, set()).add(key)
        return self.memo[key]

    def matrix(self, regs: list, kind: str, rows: int, columns: int) -> str:
        """C: the matrix that its registers still are, or one made of them."""
        found = self.matrices.get(regs[0])
        if found is not None and found.regs == regs and all(self.matrices.get(reg) is found for reg in regs):
            return found.name
        names = ", ".join(self.get(reg, {"f32": "f4", "f64": "f8", "f16": "u4"}[kind]) for reg in regs)
        return f"T.fragment_c({kind!r}, {rows}, {columns}, X.lanes, {names})"

    def define_matrix(self, regs: list, name: str, kind: str) -> None:
        matrix = _Matrix(name, list(regs), kind)
        for index, reg in enumerate(regs):
            self.define(reg, {"matrix": (matrix, index)})
        self.matrices |= dict.fromkeys(regs, matrix)

    def guard_value(self) -> str:
        guard, negated = self.guard
        name = self.get(guard, "b1")
        return self.memoised("not", [guard], f"~{name}") if negated else name

    def active(self) -> str:
        """The active lanes of an instruction that touches memory: None for all, False for none, or their numbers."""
        if self.guard is None:
            return "lanes"
        guard, negated = self.guard
        return self.memoised(f"active{negated}", [guard], f"X.active(mask, {self.guard_value()})")

    def site(self, instr: Instr) -> int:
        self.sites.append(instr)
        return len(self.sites) - 1

    # ------------------------------------------------------------------------------------------------ blocks

    def compile(self) -> str:
        """Python source of all blocks."""
        uses = [_uses(block) for block in self.kernel.blocks]
        live = _liveness(self.kernel.blocks, uses)
        self.hazards = inflight.hazards(self.kernel)
        self.read_anywhere = {reg for block in self.kernel.blocks for i in block.all() for reg in operands_of(i)[0]}
        functions = []
        for block in self.kernel.blocks:
            self.block(block, *uses[block.index], live[block.index])
            functions.append(f"def block_{block.index}(R, X, mask):\n    " + "\n    ".join(self.lines) + "\n")
        return "\n".join(functions)

    def block(self, block: Block, upward: set[Reg], written: set[Reg], live: set[Reg]) -> None:
        """The lines of a block's function.

        `env` has the names of registers' values by numpy type, `memo` those of expressions of them, `matrices` what
        accumulators still are, and `garbage` names to delete after the instruction.
        """
        self.counter, self.guard = 0, None
        self.env: dict[Reg, dict] = {}
        self.versions: dict[Reg, int] = {}
        self.memo: dict[tuple, str] = {}
        self.memo_of: dict[Reg, set] = {}
        self.matrices: dict[Reg, _Matrix] = {}
        self.garbage: list[str] = []
        self.lines = ["lanes = X.lanes_in(mask)"]
        keep = live & written
        last = {reg: n for n, instr in enumerate(block.all()) for reg in set().union(*operands_of(instr))}
        for position, instr in enumerate(block.instrs):
            self.guard = None if instr.guard is None else (instr.guard, instr.negated)
            try:
                if id(instr) in self.hazards:
                    self.emit(f"X.hazard({self.site(instr)}, {self.hazards[id(instr)]!r}, mask)")
                if instr.parts[0] not in HANDLERS:
                    raise PTXError("unknown instruction")
                HANDLERS[instr.parts[0]](self, instr)
            except (PTXError, KeyError, IndexError, ValueError, AttributeError) as error:
                raise PTXError(f"not emulated ({type(error).__name__}: {error}): {instr}") from error
            for reg in set().union(*operands_of(instr)):
                if last[reg] == position and reg not in keep:
                    self.forget(reg)
            if self.garbage:
                self.emit(f"del {', '.join(dict.fromkeys(self.garbage))}")
                self.garbage = []
        self.guard = None
        end = block.terminator
        condition = self.get(end.guard, "b1") if end is not None and end.guard is not None else None
        kept = [(self.number(reg), self.get(reg, self.canonical(reg))) for reg in sorted(keep, key=self.number)]
        dead = sorted(self.number(reg) for reg in upward - live)
        self.emit("if mask is None:")
        self.lines += [f"    R[{number}] = {name}" for number, name in kept]
        self.emit(f"    X.drop(R, {dead})")
        self.emit("else:")
        self.lines += [f"    R[{number}] = X.merge(mask, {name}, R[{number}])" for number, name in kept] or ["    pass"]
        kind = "" if end is None else end.parts[0]
        if kind in ("bar", "barrier") and (condition or end.opcode not in BARRIERS or end.operands != [Imm(0)]):
            raise PTXError(f"a form of barrier; {end}")
        if kind == "trap":
            lanes = "lanes" if condition is None else f"X.active(mask, {'~' * end.negated}{condition})"
            self.emit(f"X.trap({self.site(end)}, {lanes})")
        if condition is None or kind == "trap":
            self.emit(f"return {block.successors[0] if block.successors else EXIT}")
        else:
            taken = block.successors[0] if kind == "bra" else EXIT
            self.emit(f"return X.branch({condition}, {end.negated}, {taken}, {block.successors[-1]}, mask)")


def _uses(block: Block) -> tuple[set[Reg], set[Reg]]:
    """Registers read before they are written, and those written."""
    upward, written = set(), set()
    for instr in block.all():
        reads, writes = operands_of(instr)
        if instr.guard is not None:
            reads = reads | writes  # lanes that are not active keep the old value
        upward |= reads - written
        written |= writes
    return upward, written


def _liveness(blocks: list[Block], uses: list[tuple[set, set]]) -> list[set[Reg]]:
    """Registers that are read after each block."""
    live_in, live_out = [set(upward) for upward, _ in uses], [set() for _ in blocks]
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            out = set().union(*(live_in[each] for each in block.successors))
            if len(out) != len(live_out[block.index]):
                live_out[block.index] = out
                live_in[block.index] = uses[block.index][0] | (out - uses[block.index][1])
                changed = True
    return live_out


def namespace(constants: dict) -> dict:
    """What the functions know besides their arguments."""
    kinds = {f"{kind}{size}": np.dtype(f"{kind}{size}").type for kind in "uif" for size in (2, 4, 8)}
    return {"S": semantics, "T": tensorcore, "sel": semantics.sel, "u1": np.uint8, "i1": np.int8, **kinds, **constants}
