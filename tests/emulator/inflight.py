"""Registers of asynchronous wgmma, by data flow (PTX ISA 9.7.15.6 and 9.7.15.7).

While a wgmma has not been waited for, its accumulators may not be read, and none of its registers written. Registers
that other instructions than `mov` have accessed need a `wgmma.fence` before the next wgmma that has them.
"""

from dataclasses import dataclass, field

from .parse import Instr, Kernel, Reg, Vec, operands_of

START = Reg("the start of the kernel", "")


@dataclass
class State:
    flying: dict[Reg, tuple[int, bool]] = field(default_factory=dict)  # groups committed since; an accumulator?
    loose: set[Reg] = field(default_factory=set)  # accessed since the last wgmma.fence

    def join(self, other: "State | None") -> "State":
        """Where ways meet: the fewest groups, and what is loose on any."""
        if other is None:
            return State(dict(self.flying), set(self.loose))
        flying = dict(other.flying)
        for reg, (age, accumulates) in self.flying.items():
            have = flying.get(reg, (age, accumulates))
            flying[reg] = min(age, have[0]), accumulates or have[1]
        return State(flying, self.loose | other.loose)


def hazards(kernel: Kernel) -> dict[int, str]:
    """What is wrong with instructions, by their id, on some way that leads to them."""
    products = [i for block in kernel.blocks for i in block.instrs if i.parts[:2] == ["wgmma", "mma_async"]]
    if not products:
        return {}
    registers = {reg for instr in products for reg in _registers(instr)}
    found: dict[int, str] = {}
    states: list[State | None] = [None] * len(kernel.blocks)
    states[0], todo = State(loose={START}), [0]
    while todo:
        block = kernel.blocks[todo.pop()]
        state = states[block.index].join(None)
        for instr in block.instrs:
            _step(instr, state, registers, found)
        for following in block.successors:
            joined = state.join(states[following])
            if joined != states[following]:
                states[following] = joined
                todo.append(following)
    return found


def _registers(instr: Instr) -> list[Reg]:
    """Accumulators, and the fragment of A if it is in registers."""
    return [reg for each in instr.operands[:2] if isinstance(each, Vec) for reg in each.items if isinstance(reg, Reg)]


def _step(instr: Instr, state: State, registers: set[Reg], found: dict[int, str]) -> None:
    flying, form = state.flying, instr.parts[1:2]
    reads, writes = operands_of(instr)
    if instr.parts[0] != "wgmma":
        for reg in writes & flying.keys():
            found[id(instr)] = f"writes {reg.name}, which a wgmma that was not waited for uses"
    elif form == ["fence"]:
        state.loose.clear()
    elif form == ["commit_group"]:
        for reg, (age, accumulates) in flying.items():
            flying[reg] = age + 1, accumulates
    elif form == ["wait_group"]:
        for reg in [reg for reg, (age, _) in flying.items() if age > instr.operands[0].value]:
            del flying[reg]
    else:
        accumulators = set(instr.operands[0].items)
        for reg in state.loose & {START, *_registers(instr)}:
            found[id(instr)] = f"uses {reg.name} without a wgmma.fence since"
        reads -= accumulators
        for reg in _registers(instr):
            flying[reg] = 0, reg in accumulators or flying.get(reg, (0, False))[1]
    for reg in reads & flying.keys():
        if flying[reg][1]:
            found[id(instr)] = f"reads {reg.name}, an accumulator of a wgmma that was not waited for"
    if instr.parts[0] not in ("wgmma", "mov"):  # LLVM puts copies and zeros behind fences, and ptxas where it likes
        state.loose |= (reads | writes) & registers
