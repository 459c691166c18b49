"""Performance counters of a launch: with `Options.counters` each launch leaves a `Counters` in `report.counters`.

They count what PTX says, by rules of the hardware that are written down here, and nothing of time:

- An instruction counts once for every warp that reaches it with an active lane. A guard does not change this (it is
  issued all the same), but memory is only requested by warps with a lane whose guard holds.
- Global memory: a request is an instruction of one warp. It touches 32-byte sectors and 128-byte lines, each counted
  once per request; `used` are the distinct bytes that its lanes name, and `fewest` the sectors that these would fill.
  `tags` is ceil(lines / 4): the tag stage of GV100 and later is said to resolve four lines of four sectors a clock.
- What passes from L2 to L1: the distinct sectors of each block, as if its L1 lost nothing and shared nothing with other
  blocks. Stores and atomics are written through: the sectors of each request.
- Shared memory: 32 banks of 4 bytes. A request of up to 4 bytes a lane is one group of 32 lanes, of 8 bytes two of 16,
  of 16 bytes four of 8, an 8 x 8 matrix of ldmatrix or stmatrix one of 8 rows. A group takes as many wavefronts as a
  bank has distinct words in it; the least is one. What wgmma reads through descriptors is counted in bytes, apart.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .memory import REGION_BITS, GlobalMemory, SharedMemory
from .parse import Block, Instr

i8, u8 = np.int64, np.uint64
SECTOR, BANKS = 32, 32
KEY = 48  # bits of a sector's number
FLOAT = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "tf32", "f32x2"}
CLASSES = {
    "special": "ex2 lg2 rcp sqrt rsqrt sin cos tanh", "shuffle": "shfl redux vote", "barrier": "bar barrier",
    "fence": "fence membar", "branch": "bra ret exit trap", "move": "mov cvta", "atomic": "atom red",
    "ldmatrix": "ldmatrix", "stmatrix": "stmatrix", "mma": "mma",
}  # fmt: skip
CLASS = {name: kind for kind, names in CLASSES.items() for name in names.split()}


def class_of(instr: Instr) -> str:
    name, parts = instr.parts[0], instr.parts
    if name in ("ld", "st"):
        return "param" if "param" in parts else f"{name}.{'global' if 'global' in parts else 'shared'}"
    if name == "wgmma":
        return "wgmma" if parts[1] == "mma_async" else "wgmma order"
    if instr.opcode.startswith("bar.warp"):
        return "other"
    if name == "div" and parts[-1] in FLOAT:
        return "special"
    if name == "cvt":
        return "conversion" if {parts[-1], parts[-2]} & FLOAT else "integer"
    return CLASS.get(name, "fp" if parts[-1] in FLOAT else "integer")


def flops_of(instr: Instr) -> int:
    """Operations of a matrix product, for one warp."""
    if class_of(instr) not in ("mma", "wgmma"):
        return 0
    m, n, k = map(int, re.search(r"\.m(\d+)n(\d+)k(\d+)\.", instr.opcode).groups())
    return 2 * m * n * k // (4 if instr.parts[0] == "wgmma" else 1)


def described(block: Block) -> list[tuple[int, str, int, str, str]]:
    """(PTX line, class, flops of a warp, source line, text) of each instruction."""
    return [(each.line, class_of(each), flops_of(each), each.location, each.text[:96]) for each in block.all()]


@dataclass
class Access:
    """What the instructions of one PTX line requested of memory."""

    line: int
    kind: str
    location: str
    text: str
    region: str = ""
    size: int = 0  # bytes of a lane
    requests: int = 0
    lanes: int = 0
    sectors: int = 0
    lines: int = 0
    tags: int = 0
    used: int = 0
    fewest: int = 0
    wavefronts: int = 0
    least: int = 0

    def add(self, other: "Access") -> None:
        for name in ("requests", "lanes", "sectors", "lines", "tags", "used", "fewest", "wavefronts", "least"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Counters:
    """Of one launch."""

    name: str
    grid: tuple[int, ...]
    threads: int
    program: object
    regions: list[str]
    sizes: dict[str, int]  # bytes of the arguments, without gaps
    blocks: int = 0  # that were run
    accesses: dict[int, Access] = field(default_factory=dict)  # by site
    by_block: dict[str, Counter] = field(default_factory=dict)  # distinct sectors of each block, added up: kind, region
    wgmma_bytes: int = 0  # of shared memory, by descriptors
    pending: dict[str, list[np.ndarray]] = field(default_factory=dict)  # sectors of a chunk's blocks, by kind

    def __post_init__(self) -> None:
        self.reached = np.zeros(self.program.blocks, i8)  # warps, by basic block

    # ------------------------------------------------------------------------------------------------ counting

    def functions(self, functions: list[Callable]) -> list[Callable]:
        """Those of basic blocks, with the warps that reach them counted."""

        def counting(number: int, function: Callable) -> Callable:
            def run(registers, machine, mask):
                warps = machine.lanes // 32 if mask is None else mask.reshape(-1, 32).any(axis=1).sum()
                self.reached[number] += warps
                return function(registers, machine, mask)

            return run

        return [counting(number, function) for number, function in enumerate(functions)]

    def access(self, site: int, kind: str) -> Access:
        if site not in self.accesses:
            line, code, location = re.match(r"PTX line (\d+): `(.*)` \((.*)\)$", self.program.sites[site]).groups()
            self.accesses[site] = Access(int(line), kind, location, code)
        return self.accesses[site]

    def globally(self, kind: str, address: np.ndarray, lanes: np.ndarray, size: int, site: int, machine) -> None:
        found = self.access(site, kind)
        warps, count = (lanes >> 5).astype(u8), machine.lanes // 32
        sectors = np.unique(warps << u8(KEY) | address >> u8(5))
        used = np.bincount((np.unique(warps << u8(56) | address) >> u8(56)).astype(i8), minlength=count) * size
        lines = np.unique(sectors >> u8(2))
        per_request = np.bincount((lines >> u8(KEY - 2)).astype(i8), minlength=count)
        found.size, found.requests = size, found.requests + np.count_nonzero(used)
        found.lanes += len(lanes)
        found.sectors += len(sectors)
        found.lines += len(lines)
        found.tags += int(((per_request + 3) // 4).sum())
        found.used += int(used.sum())
        found.fewest += int(((used + SECTOR - 1) // SECTOR).sum())
        region = (int(address[0]) >> REGION_BITS) - 1
        found.region = self.regions[region] if 0 <= region < len(self.regions) else "?"
        block = (sectors >> u8(KEY)) // u8(machine.threads // 32)
        self.pending.setdefault(kind, []).append(block << u8(KEY) | sectors & u8((1 << KEY) - 1))

    def close(self) -> None:
        """A chunk of blocks has ended."""
        for kind, parts in self.pending.items():
            sectors = np.unique(np.concatenate(parts)) & u8((1 << KEY) - 1)
            regions = np.bincount((sectors >> u8(REGION_BITS - 5)).astype(i8) - 1, minlength=len(self.regions))
            counter = self.by_block.setdefault(kind, Counter())
            for name, count in zip(self.regions, regions.tolist(), strict=False):
                counter[name] += count
        self.pending = {}

    def share(self, kind: str, at: np.ndarray, lanes: np.ndarray, size: int, group: int, site: int) -> None:
        """A request of shared memory, by groups of lanes."""
        found = self.access(site, kind)
        words = at.astype(i8)[:, None] // 4 + np.arange(max(1, size // 4))
        keys = np.unique((lanes // group)[:, None] << 32 | words)
        slots = np.bincount((keys >> 32) * BANKS + keys % BANKS)
        slots = np.pad(slots, (0, -len(slots) % BANKS)).reshape(-1, BANKS).max(axis=1)
        found.size, found.lanes = size, found.lanes + len(lanes)
        found.requests += len(np.unique(lanes // 32))
        found.used += 4 * len(keys)
        found.wavefronts += int(slots.sum())
        found.least += int(np.count_nonzero(slots))

    # ------------------------------------------------------------------------------------------------ results

    def by_source(self) -> Counter:
        """Warp instructions by class and source line."""
        found = Counter()
        for reached, block in zip(self.reached.tolist(), self.program.counted, strict=True):
            for _, kind, _, location, _ in block:
                found[kind, location] += reached
        return found

    def instructions(self) -> Counter:
        """Warp instructions by class."""
        found = Counter()
        for (kind, _), count in self.by_source().items():
            found[kind] += count
        return found

    def flops(self) -> dict[str, int]:
        """Of matrix products, by type of the operands."""
        found = Counter()
        for reached, block in zip(self.reached.tolist(), self.program.counted, strict=True):
            for _, _, flops, _, text in block:
                if flops and reached:
                    found[re.search(r"\.(tf32|bf16|f16|f64)\b", text.replace(".f32.", ".", 1))[1]] += flops * reached
        return dict(found)

    def total(self, *kinds: str) -> Access:
        """Sums over PTX lines."""
        found = Access(0, "+".join(kinds), "", "")
        for each in self.accesses.values():
            if each.kind in kinds:
                found.add(each)
        return found

    def by_location(self, *kinds: str) -> dict[tuple[str, str, str, int], Access]:
        """Sums over PTX lines that come from the same source line, to the same argument, of the same size."""
        found: dict[tuple, Access] = {}
        for each in self.accesses.values():
            if each.kind in kinds:
                key = each.kind, each.location, each.region, each.size
                new = Access(each.line, each.kind, each.location, each.text, each.region, each.size)
                found.setdefault(key, new).add(each)
        return found


def _lanes(machine, active) -> np.ndarray:
    return np.arange(machine.lanes) if active is None else active


class CountingGlobalMemory(GlobalMemory):
    def _count(self, kind: str, address, offset: int, size: int, active, site: int) -> None:
        if active is not False:
            address, lanes = self.addresses(address, offset, active), _lanes(self.launch, active)
            self.launch.launch.counters.globally(kind, address, lanes, size, site, self.launch)

    def load(self, address, offset, width, count, active, olds, site):
        self._count("ld.global", address, offset, width * count, active, site)
        return super().load(address, offset, width, count, active, olds, site)

    def store(self, address, offset, width, values, active, site):
        self._count("st.global", address, offset, width * len(values), active, site)
        super().store(address, offset, width, values, active, site)

    def atomic(self, operation, address, offset, kind, values, active, olds, site, wanted):
        self._count("atomic", address, offset, np.dtype(kind).itemsize * len(values), active, site)
        return super().atomic(operation, address, offset, kind, values, active, olds, site, wanted)


class CountingSharedMemory(SharedMemory):
    def _count(self, kind: str, address, offset: int, size: int, active, site: int) -> None:
        if active is not False:
            at, lanes = self.offsets(address, offset, active), _lanes(self.launch, active)
            self.launch.launch.counters.share(kind, at, lanes, size, max(8, 32 // max(1, size // 4)), site)

    def load(self, address, offset, width, count, active, olds, site):
        self._count("ld.shared", address, offset, width * count, active, site)
        return super().load(address, offset, width, count, active, olds, site)

    def store(self, address, offset, width, values, active, site):
        self._count("st.shared", address, offset, width * len(values), active, site)
        super().store(address, offset, width, values, active, site)

    def _rows(self, kind: str, address, offset: int, count: int, active, site: int) -> None:
        at, lanes = self.rows(address, offset, count, active)
        self.launch.launch.counters.share(kind, at, _lanes(self.launch, lanes), 16, 8, site)

    def load_rows(self, address, offset, count, active, site):
        self._rows("ldmatrix", address, offset, count, active, site)
        return super().load_rows(address, offset, count, active, site)

    def store_rows(self, address, offset, count, rows, active, site):
        self._rows("stmatrix", address, offset, count, active, site)
        super().store_rows(address, offset, count, rows, active, site)

    def matrix(self, address, width, lanes, site):
        self.launch.launch.counters.wgmma_bytes += address.size * width
        return super().matrix(address, width, lanes, site)
