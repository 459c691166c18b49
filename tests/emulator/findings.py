"""What is wrong with a kernel: exceptions for faults, and a report of all findings."""

from collections import Counter
from dataclasses import dataclass, field


class EmulationError(Exception):
    """A kernel did what a GPU faults on, or what the PTX ISA leaves undefined."""


class OutOfBounds(EmulationError):
    """An access outside of the elements of an argument, or of a block's shared memory."""


class Misaligned(EmulationError):
    """An address that is not a multiple of the bytes that one lane accesses."""


class UninitialisedShared(EmulationError):
    """A read of shared memory that nothing has been written to."""


class SharedRace(EmulationError):
    """Two warps, without a barrier between them, reached the same shared memory, and one of them wrote other bits."""


class GlobalRace(EmulationError):
    """Two blocks, or two warps without a barrier between them, reached the same memory, and one of them wrote.

    `memory.Shadow` has the rule, and what is no race.
    """


class ReplicaConflict(EmulationError):
    """Lanes of one warp wrote other values to one place in one instruction: which of them stays is undefined.

    Triton has several lanes hold the same element and store it. They differ by a rounding where LLVM contracts
    `a * b + shuffled(a * b)` to an fma, which rounds one of the products: not the same one in both lanes.
    """


class AsyncHazard(EmulationError):
    """A wgmma was not fenced from what its registers or shared memory are used for besides."""


class BarrierError(EmulationError):
    """Divergent barriers, deadlocks, and warp-wide instructions without their whole warp."""


KINDS = {kind.__name__: kind for kind in EmulationError.__subclasses__()}


@dataclass
class Finding:
    kind: str
    message: str
    count: int = 0


@dataclass
class Report:
    """Findings of all launches, one for each kind and PTX line; kinds in `raises` are raised as they are found."""

    raises: set[str] = field(default_factory=lambda: set(KINDS) - {"GlobalRace", "ReplicaConflict"})
    findings: dict[tuple, Finding] = field(default_factory=dict)
    launches: Counter = field(default_factory=Counter)
    stores: set[tuple[str, str]] = field(default_factory=set)  # kernels, with arguments that they stored or added to
    counters: list = field(default_factory=list)  # of each launch, where `Options.counters` asks for them

    def add(self, kind: str, kernel: str, where: str, detail: str) -> None:
        found = self.findings.setdefault((kind, kernel, where), Finding(kind, f"{kernel}: {detail}; {where}"))
        found.count += 1
        if kind in self.raises:
            raise KINDS[kind](f"{kernel}: {detail}; {where}")

    def counts(self) -> dict[tuple, int]:
        return {key: each.count for key, each in self.findings.items()}

    def since(self, before: dict[tuple, int]) -> list[str]:
        """Messages of the findings whose counts have grown since `before`."""
        return [each.message for key, each in self.findings.items() if each.count > before.get(key, 0)]

    def of(self, kind: str) -> list[Finding]:
        return [finding for finding in self.findings.values() if finding.kind == kind]

    def __str__(self) -> str:
        found = "findings:" if self.findings else "no finding"
        lines = [f"{self.launches.total()} launches of {len(self.launches)} kernels, {found}"]
        return "\n".join(lines + [f"{each.kind} x{each.count}: {each.message}" for each in self.findings.values()])
