"""Runs a compiled kernel over a grid: blocks in chunks, lanes in lockstep, the lowest program counter first."""

import marshal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import counters, instructions, semantics, tensorcore  # noqa: F401  `instructions` fills those of `codegen`
from .codegen import EXIT, Compiler, namespace
from .findings import Report
from .memory import SHARED_BASE, THREAD_BITS, GlobalMemory, Region, SharedMemory
from .parse import Addr, Kernel, PTXError, Reg, parse, registers

u4, u8, i4, i8 = np.uint32, np.uint64, np.int32, np.int64
POISON = 0xA5A5A5A5A5A5A5A5  # in registers that nothing was written to


@dataclass
class Options:
    shared_races: bool = True  # and reads of shared memory that was never written
    global_races: bool = True
    lanes: int = 8192  # of a chunk
    shuffle: int | None = None  # seed of the order of blocks, and of lanes that store or add to one place
    apart: int = 0  # 1 or -1: between barriers warps run one after the other, the first or the last one first
    # Which blocks run, from the kernel's name and their number; None for all.
    choose: Callable[[str, int], Sequence[int] | None] = lambda name, blocks: None
    counters: bool = False  # of performance, see counters.py


class Program:
    """A kernel, parsed and compiled to Python."""

    def __init__(self, text: str) -> None:
        kernel = parse(text)
        compiler = Compiler(kernel)
        source = compiler.compile()
        self.text, self.name, self.params = text, kernel.name, kernel.params
        self.shared, self.threads = kernel.shared, kernel.threads
        self.sites = [str(instr) for instr in compiler.sites]
        self.granule, self.uses_wgmma, self.constants = compiler.granule, compiler.uses_wgmma, compiler.constants
        self.blocks = len(kernel.blocks)
        self.counted = [counters.described(block) for block in kernel.blocks]
        ends = {block.index: block.terminator for block in kernel.blocks if block.terminator}
        self.barriers = {index: str(end) for index, end in ends.items() if end.parts[0] in ("bar", "barrier")}
        self.written = written_parameters(kernel)
        self.initial = [
            np.bool_(True) if reg.type == "pred" else np.array(POISON, u8).astype(f"u{int(reg.type[1:]) // 8}")[()]
            for reg in compiler.numbers
        ]
        self.code = compile(source, f"<{kernel.name}, from PTX>", "exec", dont_inherit=True)
        self._link()

    def _link(self) -> None:
        names = namespace(self.constants)
        exec(self.code, names)
        self.functions = [names[f"block_{index}"] for index in range(self.blocks)]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "functions": None, "code": marshal.dumps(self.code)}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.code = marshal.loads(state["code"])
        self._link()


def written_parameters(kernel: Kernel) -> set[str] | None:
    """Names of parameters from which the addresses of stores are derived; None if that is not known."""
    sources: dict[Reg, set] = {}
    stores, moves = [], []
    for instr in (instr for block in kernel.blocks for instr in block.instrs):
        name = instr.parts[0]
        if name == "ld":
            found = instr.operands[1].base if "param" in instr.parts else None
            for reg in registers(instr.operands[0]):
                sources.setdefault(reg, set()).add(found)
        elif name in ("st", "red", "atom") and "global" in instr.parts:
            stores.append(next(operand for operand in instr.operands if isinstance(operand, Addr)).base)
        elif instr.operands and isinstance(instr.operands[0], Reg):
            moves.append((instr.operands[0], [reg for each in instr.operands[1:] for reg in registers(each)]))
    before = -1
    while before != (before := sum(map(len, sources.values()))):
        for target, others in moves:
            sources.setdefault(target, set()).update(*(sources.get(other, ()) for other in others))
    pointers = {name for name, type_ in kernel.params if type_ == "u64"}
    names = [sources.get(base, set()) & pointers for base in stores]
    return set().union(*names) if all(names) else None


class Machine:
    """The state of one chunk of blocks; what the functions made by `codegen` know as X."""

    def __init__(self, launch: "Launch", first: int, numbers: np.ndarray) -> None:
        """`numbers` are those of the blocks, of which `first` ran before."""
        self.launch, self.first, self.numbers = launch, first, numbers
        self.program, self.options = launch.program, launch.options
        self.blocks, self.threads = len(numbers), launch.threads
        self.lanes = self.blocks * self.threads
        self.block_index = np.repeat(np.arange(self.blocks), self.threads)
        self.thread = np.tile(np.arange(self.threads), self.blocks)
        number, (gx, gy, gz) = np.repeat(numbers, self.threads), launch.grid
        special = {
            "ctaid": (number % gx, number // gx % gy, number // (gx * gy)), "nctaid": (gx, gy, gz),
            "tid": (self.thread, 0, 0), "ntid": (self.threads, 1, 1),
        }  # fmt: skip
        for name, values in special.items():
            for axis, value in zip("xyz", values, strict=True):
                setattr(self, f"special_{name}_{axis}", np.asarray(value).astype(u4)[()])
        self.special_laneid, self.special_warpid = (self.thread % 32).astype(u4), (self.thread // 32).astype(u4)
        self.epoch = np.ones(self.blocks, i8)
        self._owner = (first + 1 + self.block_index) << 40 | self.thread
        self._stamp()
        self.memory, self.functions, shared_memory = launch.memory, self.program.functions, SharedMemory
        self.memory.launch = self
        if launch.counters is not None:
            self.functions, shared_memory = launch.counters.functions(self.functions), counters.CountingSharedMemory
        self.shared = shared_memory(self, launch.shared, self.program.granule)
        self.merge = semantics.merge

    def _stamp(self) -> None:
        """After barriers: who touches memory from now on."""
        epochs = np.repeat(self.epoch, self.threads)
        self.toucher = self._owner | epochs << THREAD_BITS
        self.toucher32 = (epochs << THREAD_BITS | self.thread).astype(i4)

    # ------------------------------------------------------------------------------------------------ lanes

    def order(self, count: int) -> np.ndarray | None:
        """The order in which lanes store or add to one place; None: by their numbers."""
        return None if self.launch.random is None else self.launch.random.permutation(count)

    def lanes_in(self, mask):
        return None if mask is None else np.flatnonzero(mask)

    def active(self, mask, p):
        """None for all lanes, False for none, or the numbers of the active ones."""
        if not p.ndim:
            return self.lanes_in(mask) if p else False
        found = np.flatnonzero(p if mask is None else p & mask)
        return None if len(found) == self.lanes else found if len(found) else False

    def lanes_of(self, value, active, kind) -> np.ndarray:
        """Values of the active lanes as an array."""
        if not value.ndim:
            return np.full(self.lanes if active is None else len(active), value, kind)
        return value if active is None else value.take(active)

    def merged(self, olds, active, values: list) -> list:
        """Old values, with those of active lanes replaced."""
        if active is None:
            return values
        out = [np.full(self.lanes, old).astype(new.dtype) for old, new in zip(olds, values, strict=True)]
        for each, new in zip(out, values, strict=True):
            each[active] = new
        return out

    def drop(self, registers: list, dead: list[int]) -> None:
        for number in dead:
            registers[number] = None

    def branch(self, p, negated: bool, taken: int, other: int, mask):
        p = ~p if negated else p
        if not p.ndim:
            return taken if p else other
        count = np.count_nonzero(p if mask is None else p & mask)
        if count == 0:
            return other
        return taken if count == (self.lanes if mask is None else np.count_nonzero(mask)) else np.where(p, taken, other)

    # ------------------------------------------------------------------------------------------------ findings

    def block_named(self, number: int) -> tuple[int, int, int]:
        """The coordinates of the block that ran so many blocks after the first."""
        gx, gy, _ = self.launch.grid
        block = int(self.launch.blocks[number])
        return block % gx, block // gx % gy, block // (gx * gy)

    def report(self, kind: str, site, lane: int, detail: str) -> None:
        where = self.program.sites[site] if isinstance(site, int) else site
        block, launch = self.block_named(self.first + int(self.block_index[lane])), self.launch
        thread = f"block {block} of {launch.grid}, thread {int(self.thread[lane])}"
        launch.report.add(kind, launch.name, where, f"{thread}: {detail}")

    def stored(self, argument: str) -> None:
        self.launch.report.stores.add((self.launch.name, argument))

    def hazard(self, site: int, what: str, mask) -> None:
        self.report("AsyncHazard", site, 0 if mask is None else int(np.flatnonzero(mask)[0]), what)

    def trap(self, site: int, lanes) -> None:
        if lanes is not False:
            self.report("BarrierError", site, 0 if lanes is None else int(lanes[0]), "trap")

    def together(self, count: int, mask, site: int) -> None:
        """Lanes in groups of so many must all be here, or none."""
        here = mask.reshape(-1, count).sum(axis=1) if mask is not None else np.array(count)
        apart = np.flatnonzero((here != 0) & (here != count))
        if len(apart):
            what = f"{here[apart[0]]} of {count} lanes of a {'warp' if count == 32 else 'warpgroup'} are here"
            self.report("BarrierError", site, count * int(apart[0]), what)

    # ------------------------------------------------------------------------------------------------ instructions

    def param(self, name: str):
        return self.launch.values[name]

    def shared_address(self, name: str, kind):
        return kind(SHARED_BASE + self.launch.shared_variables[name])

    def warps(self, members, mask, site: int) -> None:
        if members.ndim or int(members) != 0xFFFFFFFF:
            raise PTXError(f"a part of a warp; {self.program.sites[site]}")
        self.together(32, mask, site)

    def shfl(self, mode: str, a, b, c, members, mask, site: int):
        self.warps(members, mask, site)
        return semantics.shfl(mode, a, b, c, self.lanes)

    def redux(self, operation: str, a, members, mask, site: int):
        self.warps(members, mask, site)
        return semantics.redux(operation, a, self.lanes)

    def vote(self, mode: str, p, members, mask, site: int):
        self.warps(members, mask, site)
        return semantics.vote(mode, p, self.lanes)

    def ldmatrix(self, address, offset: int, count: int, transposed: bool, lanes, mask, site: int):
        self.together(32, mask, site)
        rows = self.shared.load_rows(address, offset, count, lanes, site)
        return self.merged([u4(0)] * count, lanes, tensorcore.from_rows(rows, count, transposed))

    def stmatrix(self, address, offset: int, registers, transposed: bool, lanes, mask, site: int) -> None:
        self.together(32, mask, site)
        rows = tensorcore.to_rows([self.lanes_of(each, lanes, u4) for each in registers], transposed)
        self.shared.store_rows(address, offset, len(registers), rows, lanes, site)

    def mma(self, a, b, c, mask, site: int):
        self.together(32, mask, site)
        return tensorcore.multiply_add(a, b, c)

    def descriptor(self, value, rows: int, depth: int, kind: str, transposed: bool, mask, site: int):
        """A matrix in shared memory for every warpgroup, as float64; of inactive ones it is zero."""
        self.together(128, mask, site)
        groups = np.arange(0, self.lanes, 128)
        groups = groups if mask is None else groups[mask[groups]]
        value = np.broadcast_to(value, (self.lanes,)).reshape(-1, 128)
        if (value != value[:, :1])[groups // 128].any():
            self.report("AsyncHazard", site, int(groups[0]), "descriptors differ within a warpgroup")
        width = 4 if kind == "tf32" else 2
        at = tensorcore.addresses(value[groups // 128, 0], rows, depth, width, transposed)
        out = np.zeros((self.lanes // 128, rows, depth))
        out[groups // 128] = tensorcore.numbers(self.shared.matrix(at, width, groups, site), kind)
        return out

    def wgmma(self, a, b, before, scale_d, columns: int):
        """`before` is None where it is not to be read at all."""
        groups, depth = self.lanes // 128, b.shape[2]
        product = np.matmul(a.reshape(groups, 64, depth), b.swapaxes(1, 2)).reshape(groups * 4, 16, columns)
        if before is not None:
            scale = np.broadcast_to(scale_d, (self.lanes,)).reshape(-1, 32)[:, :1, None]
            product = product + np.where(scale, before, np.float32(0))
        return product.astype(np.float32)

    # ------------------------------------------------------------------------------------------------ scheduling

    def run(self) -> None:
        registers, counter = list(self.program.initial), 0
        if self.options.apart:
            counter = np.zeros(self.lanes, i8)
        while type(counter) is int and counter != EXIT:  # all lanes together
            following = self.functions[counter](registers, self, None)
            if counter in self.program.barriers:
                self.epoch += 1
                self._stamp()
            counter = following
        if type(counter) is not int:
            self._run_divergent(registers, counter.astype(i8))

    def _run_divergent(self, registers: list, counters: np.ndarray) -> None:
        barriers = self.program.barriers
        waiting = np.full(self.lanes, -1)  # the block whose barrier a lane is at
        turn = self.options.apart * (self.thread // 32) << 32
        while True:
            runnable = np.where((waiting >= 0) | (counters == EXIT), np.iinfo(i8).max, counters + turn)
            mask = runnable == runnable.min()
            counter = int(counters[mask][0])
            if runnable[mask][0] == np.iinfo(i8).max:
                if (waiting >= 0).any():
                    lane = int(np.flatnonzero(waiting >= 0)[0])
                    self.report("BarrierError", barriers[int(waiting[lane])], lane, "waits for threads that never come")
                return
            following = self.functions[counter](registers, self, None if mask.all() else mask)
            counters = np.where(mask, following, counters)
            if counter in barriers:
                waiting = np.where(mask, counter, waiting)
                self._barrier(waiting, counters)

    def _barrier(self, waiting: np.ndarray, counters: np.ndarray) -> None:
        """Lets go the blocks that are at a barrier as a whole."""
        blocks = waiting.reshape(self.blocks, -1)
        here, gone = blocks >= 0, (counters == EXIT).reshape(self.blocks, -1) & (blocks < 0)
        arrived = (here | gone).all(axis=1) & here.any(axis=1)
        apart = here.any(axis=1) & (blocks.max(axis=1) != np.where(here, blocks, EXIT).min(axis=1))
        wrong = ((apart, "threads wait at different barriers"),
                 (arrived & gone.any(axis=1), "some threads have exited before this barrier"))  # fmt: skip
        for bad, what in wrong:
            if bad.any():
                lane = int(np.flatnonzero(bad)[0]) * self.threads
                barrier = self.program.barriers[int(blocks[bad].max())]
                self.report("BarrierError", barrier, lane, what)
        if arrived.any():
            blocks[arrived] = -1
            self.epoch[arrived] += 1
            self._stamp()


class Launch:
    """One launch: arguments, memory and report."""

    def __init__(self, program: Program, name: str, grid: Sequence[int], threads: int, shared: int,
                 arguments: Sequence[tuple[str, object]], report: Report, options: Options) -> None:  # fmt: skip
        """`arguments`: (name, value) of each parameter; tensors and None are pointers, others bits of the type."""
        self.program, self.name, self.grid, self.threads = program, name, tuple(grid), threads
        self.shared, self.report, self.options = shared, report, options
        if program.threads not in (None, threads):
            raise PTXError(f"{threads} threads where the kernel requires {program.threads}")
        if len(arguments) != len(program.params):
            raise PTXError(f"{len(arguments)} arguments for {len(program.params)} parameters")
        self.shared_variables, end = {}, 0
        for variable, (align, size) in program.shared.items():
            self.shared_variables[variable] = -(-end // align) * align if size else 0
            end = self.shared_variables[variable] + size if size else end
        regions, self.values, written = [], {}, set()
        for (parameter, type_), (argument, value) in zip(program.params, arguments, strict=True):
            if hasattr(value, "data_ptr"):
                if program.written is None or parameter in program.written:
                    written.add(len(regions))
                regions.append(Region(len(regions), argument, value, options.counters))
                value = regions[-1].address
            self.values[parameter] = np.dtype(f"u{max(1, int(type_.lstrip('usbf')) // 8)}").type(value or 0)
        self.random = None
        if options.shuffle is not None:  # another order for each launch of a report
            self.random = np.random.default_rng((options.shuffle, report.launches.total()))
        self.counters, memory = None, GlobalMemory
        if options.counters:
            sizes = {region.name: region.tensor.numel() * region.itemsize for region in regions}
            self.counters = counters.Counters(name, self.grid, threads, program, list(sizes), sizes)
            report.counters.append(self.counters)
            memory = counters.CountingGlobalMemory
        self.memory = memory(self, regions, written)

    def run(self) -> None:
        total = int(np.prod(self.grid))
        size = max(1, self.options.lanes // self.threads)
        chosen = self.options.choose(self.name, total)
        self.blocks = np.arange(total) if chosen is None else np.asarray(chosen)  # in the order in which they run
        if self.random is not None:
            self.random.shuffle(self.blocks)
            size = max(1, int(self.random.integers(1, size + 1)))
        self.report.launches[self.name] += 1
        with np.errstate(all="ignore"):
            for first in range(0, len(self.blocks), size):
                blocks = self.blocks[first : first + size]
                Machine(self, first, blocks).run()
                if self.counters is not None:
                    self.counters.blocks += len(blocks)
                    self.counters.close()
