"""Reads the machine code of compiled NVIDIA kernels: what it uses, and what a warp executes."""

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia

TENSOR_CORE = re.compile(r"(?:H|D|Q|UTCH|UTCQ)G?MMA")


def dump(kernel, option: str) -> str:
    """What cuobjdump prints of a compiled kernel."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


class Instruction(NamedTuple):
    address: int
    guarded: bool  # by a predicate
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where it jumps to."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        ends = self.opcode.startswith(("BRA", "EXIT")) and not self.guarded
        return not ends or re.match(r"\s*!?U?P\d", self.operands) is not None


def instructions(sass: str) -> list[Instruction]:
    pattern = r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"
    return [
        Instruction(int(address, 16), guard != "", opcode, operands)
        for address, guard, opcode, operands in re.findall(pattern, sass, re.MULTILINE)
    ]


class Program:
    """A kernel as basic blocks, by the address of their first instruction."""

    def __init__(self, code: list[Instruction]) -> None:
        known = {each.address for each in code}
        starts = {code[0].address}
        for each, following in zip(code, [*code[1:], None], strict=True):
            if each.target in known:
                starts.add(each.target)
            if following is not None and each.opcode.startswith(("BRA", "EXIT")):
                starts.add(following.address)
        self.entry = code[0].address
        self.blocks: dict[int, list[Instruction]] = {}
        for each in code:
            if each.address in starts:
                block = self.blocks[each.address] = []
            block.append(each)
        addresses = list(self.blocks)
        self.successors = {}
        for address, following in zip(addresses, [*addresses[1:], None], strict=True):
            last = self.blocks[address][-1]
            after = [last.target] if last.target in self.blocks else []
            if last.falls_through and following is not None:
                after.append(following)
            self.successors[address] = after
        self.loops = self._back_edges()

    def _back_edges(self) -> set[tuple[int, int]]:
        """(last block, first block) of every loop."""
        found, open_, done = set(), [], set()

        def leave_or_enter(start: int) -> None:
            stack = [(start, iter(self.successors[start]))]
            open_.append(start)
            while stack:
                address, rest = stack[-1]
                for after in rest:
                    if after in open_:
                        found.add((address, after))
                    elif after not in done:
                        open_.append(after)
                        stack.append((after, iter(self.successors[after])))
                        break
                else:
                    stack.pop()
                    done.add(open_.pop())

        leave_or_enter(self.entry)
        return found

    def shortest(self, start: int, end: int | None) -> Counter[str] | None:
        """Opcodes on the shortest way from one block to another, or to the end; loops are not taken again."""
        ways: dict[int, tuple[int, tuple[int, ...]]] = {start: (len(self.blocks[start]), (start,))}
        queue = [(ways[start][0], start)]
        while queue:
            length, address = heapq.heappop(queue)
            if length > ways[address][0]:
                continue
            ends = any(each.opcode.startswith("EXIT") for each in self.blocks[address])
            if address == end or (end is None and ends):
                return Counter(each.opcode for step in ways[address][1] for each in self.blocks[step])
            for after in self.successors[address]:
                longer = length + len(self.blocks[after])
                if (address, after) not in self.loops and (after not in ways or longer < ways[after][0]):
                    ways[after] = (longer, (*ways[address][1], after))
                    heapq.heappush(queue, (longer, after))
        return None

    def _shortest_by(self, start: int, opcode: str) -> Counter[str]:
        if not opcode:
            return self.shortest(start, None)
        found = []
        for address, block in self.blocks.items():
            if any(each.opcode.startswith(opcode) for each in block):
                there, back = self.shortest(start, address), self.shortest(address, None)
                if there is not None and back is not None:
                    there.subtract(each.opcode for each in block)
                    found.append(there + back)
        return min(found, key=Counter.total)

    def turns(self) -> list[int]:
        """Instructions of a turn of each loop that multiplies matrices, the fewest first."""
        return sorted(body.total() for body in self._products().values())

    def _products(self) -> dict[tuple[int, int], Counter[str]]:
        """Loops that multiply matrices, and the opcodes of a turn."""
        bodies = {loop: self.shortest(loop[1], loop[0]) for loop in self.loops}
        return {
            loop: body
            for loop, body in bodies.items()
            if body is not None and any(TENSOR_CORE.match(opcode) for opcode in body)
        }

    def executed_by_step(self, turns: int, opcode: str) -> Counter[str]:
        """Opcodes that a warp executes in a turn of a loop around the shortest one that multiplies matrices, which it
        takes for so many turns, on the shortest way by an instruction of that kind. Unless the inner loop is unrolled.
        """
        bodies = self._products()
        inner = min(bodies, key=lambda loop: bodies[loop].total())
        found = []
        for last, first in self.loops:
            if (
                (last, first) == inner
                or self.shortest(first, inner[1]) is None
                or self.shortest(inner[0], last) is None
            ):
                continue
            for address, block in self.blocks.items():
                if any(each.opcode.startswith(opcode) for each in block):
                    parts = (
                        self.shortest(first, inner[1]),
                        self.shortest(inner[0], address),
                        self.shortest(address, last),
                    )
                    if None not in parts:
                        total = sum(parts, Counter())
                        for twice in (inner[0], inner[1], address):
                            total.subtract(each.opcode for each in self.blocks[twice])
                        found.append(total)
        total = min(found, key=Counter.total)
        for name, count in bodies[inner].items():
            total[name] += turns * count
        return total

    def executed(self, turns: int, by: str = "") -> Counter[str]:
        """Opcodes that a warp executes which takes the shortest loop that multiplies matrices for so many turns, and
        after it the shortest way by an instruction of that kind."""
        bodies = self._products()
        if not bodies:  # unrolled
            return self.shortest(self.entry, None)
        (last, first), body = min(bodies.items(), key=lambda item: item[1].total())
        before, after = self.shortest(self.entry, first), self._shortest_by(last, by)
        before.subtract(each.opcode for each in self.blocks[first])
        after.subtract(each.opcode for each in self.blocks[last])
        total = before + after
        for opcode, count in body.items():
            total[opcode] += turns * count
        return total


def longest_loop(code: list[Instruction]) -> int:
    """Instructions between a jump back and where it goes."""
    jumps = [(each.target, each.address) for each in code if each.target is not None and each.target < each.address]
    return max((sum(start <= each.address <= end for each in code) for start, end in jumps), default=0)
