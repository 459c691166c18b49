"""Global and shared memory of a launch, with every access checked.

Global memory is the storage of the tensors that a kernel was launched on. Each has an address of its own making, far
from those of the others and as aligned as the real one, so a wrong address is known to be of that tensor.

Where `active` stands, it is the lanes that touch memory: None for all, False for none, or their numbers.
"""

import ctypes
import mmap
from dataclasses import dataclass

import numpy as np

i4, i8, u4, u8 = np.int32, np.int64, np.uint32, np.uint64
TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
REGION_BITS = 46  # of the distance between two tensors, which is larger than any tensor
SHARED_BASE = 1024  # where the window of a block starts; sm_90 reserves the first KiB too
THREAD_BITS = 11  # of a toucher; numbers of threads are below 1024
SEVERAL = 2047  # in place of a thread's number: several warps


def zeros(count: int, kind: type) -> np.ndarray:
    """Of memory that is committed where it is touched, if it is much."""
    if count < 1 << 24:
        return np.zeros(count, kind)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, count * np.dtype(kind).itemsize, flags=flags), kind)


def chosen(active, here):
    """The lanes of a part of the active ones; of all where `here` is None."""
    return active if here is None else here if active is None else active[here]


def first(flags: np.ndarray) -> int:
    return int(np.flatnonzero(flags)[0])


def granules(at: np.ndarray, now: np.ndarray, size: int, granule: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The granules that accesses of `size` bytes reach, those who reach them, and how many are of one access."""
    count = max(1, size // granule)
    index = at // granule
    if count > 1:
        index, now = (index[:, None] + np.arange(count)).ravel(), np.repeat(now, count)
    return index, now, count


class Bytes:
    """Memory, by words of each width."""

    def __init__(self, raw: np.ndarray) -> None:
        self.views = {width: raw[: len(raw) // width * width].view(kind) for width, kind in TYPES.items()}

    def take(self, at: np.ndarray, width: int, count: int) -> list[np.ndarray]:
        index = at // width
        return [self.views[width].take(index + n if n else index) for n in range(count)]

    def put(self, at: np.ndarray, values: list[np.ndarray], order: np.ndarray | None) -> None:
        """Lane after lane, or in this order."""
        width = values[0].itemsize
        index = at // width
        for n, value in enumerate(values):
            if order is None:
                self.views[width][index + n] = value
            else:
                self.views[width][index[order] + n] = value[order]

    def holds(self, at: np.ndarray, values: list[np.ndarray], kind: str = "") -> np.ndarray:
        """Which lanes' values are there; as numbers of this type any two NaN are alike."""
        found = np.ones(len(at), bool)
        for value, have in zip(values, self.take(at, values[0].itemsize, len(values)), strict=True):
            alike = have == value
            found &= alike | (np.isnan(have.view(kind)) & np.isnan(value.view(kind))) if kind else alike
        return found


class Region(Bytes):
    """A tensor as kernels see it."""

    def __init__(self, index: int, name: str, tensor, allocated: bool = False) -> None:
        """`allocated`: at a multiple of 4096 bytes, as allocations on a GPU are at one of 512 at least."""
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got a tensor on {tensor.device}")
        storage = tensor.untyped_storage()
        self.name, self.tensor, self.itemsize = name, tensor, tensor.element_size()
        start, size, pointer = storage.data_ptr(), storage.nbytes(), tensor.data_ptr()
        begin = start & ~15
        self.key, self.total = start, start - begin + size
        raw = (ctypes.c_uint8 * self.total).from_address(begin) if self.total else b""
        super().__init__(np.frombuffer(raw, np.uint8))
        self.address = ((index + 1) << REGION_BITS) + (1 << (REGION_BITS - 1))
        self.address += pointer - start if allocated and start % 16 == 0 else pointer % 4096
        self.origin = self.address - (pointer - begin)  # of the bytes
        self.storage = range(self.address - (pointer - start), self.address - (pointer - start) + size)
        axes = [(s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s]
        extent = 1 + sum(s * (n - 1) for s, n in axes) if tensor.numel() else 0
        self.low, self.high = self.address, self.address + extent * self.itemsize
        self.axes = sorted(axes, reverse=True) or None if extent != tensor.numel() else None  # of a view with gaps
        self.holes = None  # the elements of gaps, if they are few enough to be listed
        if self.axes and extent < 1 << 24:
            places = np.zeros(1, i8)
            for stride, size in self.axes:
                places = (places[:, None] + np.arange(size) * stride).ravel()
            self.holes = np.ones(extent, bool)
            self.holes[places] = False
            self.axes = self.axes if self.holes.any() else None

    def offset(self, address: np.ndarray) -> np.ndarray:
        return (address - u8(self.origin)).view(i8)

    def in_hole(self, element: np.ndarray) -> np.ndarray:
        if self.holes is not None:
            return self.holes.take(element)
        outside = np.zeros(len(element), bool)
        for stride, size in self.axes:
            outside |= element // stride >= size
            element = element % stride
        return outside | (element != 0)

    def __str__(self) -> str:
        t = self.tensor
        return f"{self.name}, {t.dtype} of shape {tuple(t.shape)} and strides {t.stride()}"


class Shadow:
    """Who touched each granule of memory: by plain stores, by loads, by atomic operations.

    A race is a plain store and any other access of the same granule, where the two are of different blocks of a launch,
    or of different warps of a block without a barrier between them. The order in which they ran does not matter. There
    are two exceptions:

    - Two stores of the same bits are no race, so all blocks may store one value. If one of them stores other bits
      there, before or after, it races with all the others.
    - A block may load what it has stored itself, also where other blocks have stored the same bits.

    A toucher is (block + 1) << 40 | epoch << 11 | thread, where blocks are counted in the order in which they run, and
    an epoch is the time between two barriers of a block. Several warps in one epoch are thread 2047.
    """

    SEVERAL_BLOCKS = 0x7FFFFF << 40

    def __init__(self, granule: int, count: int) -> None:
        self.granule, self.granules = granule, count
        self.writes, self.replaced = zeros(count, i8), zeros(count, i8)  # of the bits that are there; of others before
        self.atomics, self.reads = zeros(count, i8), zeros(count, i8)
        self.rereads = zeros(count, i8)  # by blocks that had stored there themselves
        self.chunk = self.own = None

    def share(self, machine, at: np.ndarray, *touchers: np.ndarray) -> None:
        """Several blocks have stored the bits that are there, and may load them: `own` has the touchers of each."""
        if self.chunk is not machine:
            self.chunk, self.own = machine, zeros(machine.blocks * self.granules, i8)
        for toucher in touchers:
            slot = (toucher >> 40) - 1 - machine.first
            here = (slot >= 0) & (slot < machine.blocks)  # others have ended, or are SEVERAL_BLOCKS
            self.note(self.own, (slot * self.granules + at)[here], toucher[here])

    def replace(self, machine, at: np.ndarray, before: np.ndarray) -> None:
        """The bits that these have stored are there no longer: nobody may load them."""
        self.note(self.replaced, at, before)
        if self.chunk is machine:
            self.own.reshape(machine.blocks, self.granules)[:, at] = 0

    def allowed(self, machine, at: np.ndarray, now: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Which of these loads read what their own block has stored, also after the stores `before`."""
        last = np.where(before >> 40 == now >> 40, before, 0)
        if self.chunk is machine:
            last = np.where(last == 0, self.own.take(((now >> 40) - 1 - machine.first) * self.granules + at), last)
        return (last != 0) & ~self.conflicts(last, now)

    @staticmethod
    def conflicts(before: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Another block; or the same block and epoch and another warp."""
        differs = before ^ now
        return (before != 0) & ((differs >= 1 << 40) | ((differs < 1 << THREAD_BITS) & (differs >= 32)))

    def note(self, state: np.ndarray, at: np.ndarray, now: np.ndarray) -> None:
        """Add to those who touched it in one way."""
        before = state.take(at)
        new = np.where((before >> THREAD_BITS == now >> THREAD_BITS) & ((before ^ now) >= 32), now | SEVERAL, now)
        new = np.where((before != 0) & (before >> 40 != now >> 40), self.SEVERAL_BLOCKS, new)
        state[at] = new
        after = state.take(at)
        lost = (after ^ new) >= 32
        if lost.any():  # several touchers of one place in one instruction: the greatest is that of the most
            both = np.where(after[lost] >> 40 == new[lost] >> 40, new[lost] | SEVERAL, self.SEVERAL_BLOCKS)
            order = np.argsort(at[lost], kind="stable")
            places, both = at[lost][order], both[order]
            starts = np.flatnonzero(np.r_[True, places[1:] != places[:-1]])
            state[places[starts]] = np.maximum.reduceat(both, starts)


@dataclass
class Touch:
    """An access of a region: the granules, by whom, how many of one lane, the lanes, and by which instruction."""

    region: Region
    shadow: Shadow
    index: np.ndarray
    now: np.ndarray
    count: int
    lanes: np.ndarray | None
    site: int


class GlobalMemory:
    def __init__(self, launch, regions: list[Region], written: set[int]) -> None:
        """`written` has the numbers of the regions that the kernel may store to."""
        self.launch, self.regions = launch, regions
        self.shadows: dict[int, Shadow] = {}
        for key in {r.key for n, r in enumerate(regions) if n in written}:
            alike = [r for r in regions if r.key == key]
            granule = min(r.itemsize for r in alike)
            if launch.options.global_races:
                self.shadows[key] = Shadow(granule, -(-alike[0].total // granule))

    # ------------------------------------------------------------------------------------------------ checks

    def addresses(self, address: np.ndarray, offset: int, active) -> np.ndarray:
        address = self.launch.lanes_of(address, active, u8)
        return address + u8(offset & 0xFFFFFFFFFFFFFFFF) if offset else address

    def find(self, address: np.ndarray, lanes, size: int, site: int) -> list[tuple[Region, np.ndarray | None]]:
        """The regions of these addresses, after all checks, with the positions of each (None for all)."""
        low, high = int(address.min()), int(address.max())
        if size > 1 and int(np.bitwise_or.reduce(address)) & (size - 1):
            wrong = first(address & u8(size - 1))
            self.fail("Misaligned", address, lanes, wrong, size, site, f"is not a multiple of {size}")
        if low >> REGION_BITS != high >> REGION_BITS:
            numbers, found = address >> u8(REGION_BITS), []
            for number in np.unique(numbers):
                here = np.flatnonzero(numbers == number)
                found.append((self.find(address[here], chosen(lanes, here), size, site)[0][0], here))
            return found
        number = (low >> REGION_BITS) - 1
        if not 0 <= number < len(self.regions):
            self.fail("OutOfBounds", address, lanes, 0, size, site, "comes from no argument")
        region = self.regions[number]
        if low < region.low or high + size > region.high:
            wrong = first((address < u8(region.low)) | (address > u8(max(region.high - size, 0))))
            inside = int(address[wrong]) in region.storage and int(address[wrong]) + size - 1 in region.storage
            where = "the view, though in its storage" if inside else "its storage"
            self.fail("OutOfBounds", address, lanes, wrong, size, site, f"is outside of {where}")
        if region.axes is not None:
            offset = (address - u8(region.address)).view(i8)
            element = offset // region.itemsize
            bad = (offset % region.itemsize) > max(0, region.itemsize - size)
            for each in range(max(1, size // region.itemsize)):
                bad |= region.in_hole(element + each)
            if bad.any():
                self.fail(
                    "OutOfBounds", address, lanes, first(bad), size, site, "lies between the elements of the view"
                )
        return [(region, None)]

    def fail(self, kind: str, address, lanes, position: int, size: int, site: int, why: str) -> None:
        at = int(address[position])
        number = (at >> REGION_BITS) - 1
        place = f"address {at:#x}"
        if 0 <= number < len(self.regions):
            place = f"byte {at - self.regions[number].address} of {self.regions[number]}"
        lane = position if lanes is None else int(lanes[position])
        self.launch.report(kind, site, lane, f"{place}, accessed with {size} bytes, {why}")

    # ------------------------------------------------------------------------------------------------ accesses

    def load(self, address, offset: int, width: int, count: int, active, olds, site: int):
        """`count` values of `width` bytes each; lanes that are not active keep the old ones."""
        if active is False:
            return olds
        address = self.addresses(address, offset, active)
        values = None
        for region, here in self.find(address, active, width * count, site):
            at = region.offset(address if here is None else address[here])
            parts = region.take(at, width, count)
            self.read(region, at, width * count, chosen(active, here), site)
            if here is None:
                values = parts
                continue
            values = values or [np.empty(len(address), TYPES[width]) for _ in parts]
            for value, part in zip(values, parts, strict=True):
                value[here] = part
        return self.launch.merged(olds, active, values)

    def store(self, address, offset: int, width: int, values, active, site: int) -> None:
        if active is False:
            return
        address = self.addresses(address, offset, active)
        size = width * len(values)
        values = [self.launch.lanes_of(value, active, TYPES[width]) for value in values]
        for region, here in self.find(address, active, size, site):
            self.launch.stored(region.name)
            at = region.offset(address if here is None else address[here])
            parts = values if here is None else [value[here] for value in values]
            same = region.holds(at, parts) if region.key in self.shadows else None
            region.put(at, parts, self.launch.order(len(at)))
            if same is not None:
                self.write(region, at, size, chosen(active, here), same, region.holds(at, parts), site)

    def atomic(self, operation, address, offset: int, kind, values, active, olds, site: int, wanted: bool):
        """Lane after lane; the old values if they are wanted. Vectors are atomic element by element."""
        if active is False:
            return olds
        address = self.addresses(address, offset, active)
        width, size = np.dtype(kind).itemsize, np.dtype(kind).itemsize * len(values)
        values = [self.launch.lanes_of(value, active, TYPES[width]).view(kind) for value in values]
        results = [np.empty(len(address), TYPES[width]) for _ in values]
        for region, here in self.find(address, active, size, site):
            self.launch.stored(region.name)
            positions = np.arange(len(address)) if here is None else here
            at = region.offset(address[positions])
            order = self.launch.order(len(at))
            positions, places = (positions, at) if order is None else (positions[order], at[order])
            view = region.views[width].view(kind)
            for n, (value, result) in enumerate(zip(values, results, strict=True)):
                index, value = places // width + n, value[positions]
                if not wanted:
                    operation.at(view, index, value)
                    continue
                old = np.empty(len(value), kind)
                for position, (place, each) in enumerate(zip(index.tolist(), value, strict=True)):
                    old[position] = view[place]
                    view[place] = operation(view[place], each)
                result[positions] = old.view(TYPES[width])
            self.add(region, at, size, chosen(active, here), site)
        return self.launch.merged(olds, active, results) if wanted else olds

    # ------------------------------------------------------------------------------------------------ races

    def touch(self, region: Region, at: np.ndarray, size: int, lanes, site: int) -> Touch | None:
        shadow = self.shadows.get(region.key)
        if shadow is None:
            return None
        now = self.launch.toucher if lanes is None else self.launch.toucher.take(lanes)
        return Touch(region, shadow, *granules(at, now, size, shadow.granule), lanes, site)

    def read(self, region, at, size: int, lanes, site: int) -> None:
        touch = self.touch(region, at, size, lanes, site)
        if touch is None:
            return
        shadow, index, now = touch.shadow, touch.index, touch.now
        self.conflict(touch, shadow.atomics, False, "read here, added to atomically")
        before = shadow.writes.take(index)
        if before.any():
            own = shadow.allowed(self.launch, index, now, before)
            self.race("GlobalRace", touch, before, Shadow.conflicts(before, now) & ~own, "read here, written")
            shadow.note(shadow.rereads, index[own], now[own])
            index, now = index[~own], now[~own]
        shadow.note(shadow.reads, index, now)

    def write(self, region, at, size: int, lanes, same: np.ndarray, kept: np.ndarray, site: int) -> None:
        """`same`: lanes that wrote what was there; `kept`: lanes whose values are there now."""
        touch = self.touch(region, at, size, lanes, site)
        shadow, index, now = touch.shadow, touch.index, touch.now
        same, kept = np.repeat(same, touch.count), np.repeat(kept, touch.count)
        before = shadow.writes.take(index)
        self.race("GlobalRace", touch, before, Shadow.conflicts(before, now) & ~same, "written here, written")
        self.conflict(touch, shadow.replaced, False, "written here, other bits written")
        self.conflict(touch, shadow.reads, False, "written here, read")
        self.conflict(touch, shadow.rereads, same, "written here, read")
        self.conflict(touch, shadow.atomics, False, "written here, added to atomically")
        other = (before != 0) & ~same
        if other.any():
            shadow.replace(self.launch, index[other], before[other])
            before = np.where(same, before, 0)
            shadow.writes[index] = before
        if not kept.all():  # of lanes that store to one place in one instruction, all must store the same
            shadow.writes[index[kept]] = now[kept]
            after = shadow.writes.take(index)
            warp = (after ^ now) < 32
            self.race("ReplicaConflict", touch, after, ~kept & warp, "written here, written")
            self.race("GlobalRace", touch, after, ~kept & ~warp, "written here, written")
            shadow.writes[index] = before
        shadow.note(shadow.writes, index, now)
        several = shadow.writes.take(index) == Shadow.SEVERAL_BLOCKS
        if several.any():
            shadow.share(self.launch, index[several], before[several], now[several])

    def add(self, region, at, size: int, lanes, site: int) -> None:
        touch = self.touch(region, at, size, lanes, site)
        if touch is None:
            return
        shadow = touch.shadow
        self.conflict(touch, shadow.writes, False, "added to atomically here, written")
        self.conflict(touch, shadow.reads, False, "added to atomically here, read")
        self.conflict(touch, shadow.rereads, False, "added to atomically here, read")
        shadow.note(shadow.atomics, touch.index, touch.now)

    def conflict(self, touch: Touch, state: np.ndarray, allowed, what: str) -> None:
        before = state.take(touch.index)
        if before.any():
            self.race("GlobalRace", touch, before, Shadow.conflicts(before, touch.now) & ~np.bool_(allowed), what)

    def race(self, kind: str, touch: Touch, before: np.ndarray, bad: np.ndarray, what: str) -> None:
        if not bad.any():
            return
        position = first(bad)
        byte = int(touch.index[position]) * touch.shadow.granule + touch.region.origin - touch.region.address
        who, other = "several blocks", int(before[position])
        if other != Shadow.SEVERAL_BLOCKS:
            thread = "several threads" if other & SEVERAL == SEVERAL else f"thread {other & SEVERAL}"
            who = f"block {self.launch.block_named((other >> 40) - 1)}, {thread}"
        lane = position // touch.count
        lane = lane if touch.lanes is None else int(touch.lanes[lane])
        detail = f"byte {byte} of {touch.region}, {what} by {who} ({int(bad.sum())} such granules)"
        self.launch.report(kind, touch.site, lane, detail)


class SharedMemory(Bytes):
    """Shared memory of the blocks of a chunk. Granules are as small as the kernel's smallest access.

    Touchers are epoch << 11 | thread, or 0 for nobody. A store of the bits that are there already is no race, since
    several warps may hold one element; it is one if another warp stored other bits before, in the same epoch.
    """

    def __init__(self, launch, size: int, granule: int) -> None:
        self.launch, self.size, self.granule = launch, size, granule
        self.stride = max(16, (size + 15) // 16 * 16)
        super().__init__(np.zeros(launch.blocks * self.stride, np.uint8))
        count = launch.blocks * self.stride // granule
        self.writes, self.replaced, self.reads = (np.zeros(count, i4) for _ in range(3))  # as of `Shadow`
        self.unfenced = np.zeros(count, bool)  # written, and not yet fenced for wgmma
        self.in_flight = np.zeros(count, bool)  # read by a wgmma that was not waited for
        self.committed = np.zeros(launch.lanes // 128, i8)  # groups of wgmma, of each warpgroup
        # What is read by a wgmma that was not waited for: a row of granules for each warpgroup, which, in its group.
        self.flying: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.base = (launch.block_index * self.stride).astype(i8)  # of each lane

    # ------------------------------------------------------------------------------------------------ accesses

    def place(self, at: np.ndarray, size: int, active, site: int) -> np.ndarray:
        """Places in `views` of these bytes of a block, after the checks of bounds and alignment."""
        if size > 1 and int(np.bitwise_or.reduce(at)) & (size - 1):
            self.fail("Misaligned", at, active, first(at & (size - 1)), size, site, f"is not a multiple of {size}")
        if int(at.min()) < 0 or int(at.max()) + size > self.size:
            wrong = first((at < 0) | (at + size > self.size))
            self.fail("OutOfBounds", at, active, wrong, size, site, f"is outside of its {self.size} bytes")
        return at + (self.base if active is None else self.base.take(active))

    def offsets(self, address, offset: int, active) -> np.ndarray:
        return self.launch.lanes_of(address, active, u4).astype(i8) + (offset - SHARED_BASE)

    def fail(self, kind: str, at, active, position: int, size: int, site: int, why: str) -> None:
        lane = position if active is None else int(active[position])
        detail = f"byte {int(at[position])} of shared memory, accessed with {size} bytes, {why}"
        self.launch.report(kind, site, lane, detail)

    def load(self, address, offset: int, width: int, count: int, active, olds, site: int):
        if active is False:
            return olds
        at = self.place(self.offsets(address, offset, active), width * count, active, site)
        self.read(at, width * count, active, site)
        return self.launch.merged(olds, active, self.take(at, width, count))

    def store(self, address, offset: int, width: int, values, active, site: int) -> None:
        if active is False:
            return
        at = self.place(self.offsets(address, offset, active), width * len(values), active, site)
        values = [self.launch.lanes_of(value, active, TYPES[width]) for value in values]
        self.write(at, values, active, site)

    def rows(self, address, offset: int, count: int, active) -> tuple[np.ndarray, np.ndarray | None]:
        """Bytes of the rows of `count` 8 x 8 matrices, of 16 bytes each, and the lanes that name them."""
        at = self.offsets(address, offset, active)
        if count == 4:
            return at, active
        lanes = np.arange(self.launch.lanes) if active is None else active
        return tuple(each.reshape(-1, 32)[:, : 8 * count].ravel() for each in (at, lanes))

    def load_rows(self, address, offset: int, count: int, active, site: int) -> np.ndarray:
        at, lanes = self.rows(address, offset, count, active)
        at = self.place(at, 16, lanes, site)
        self.read(at, 16, lanes, site)
        words = np.stack(self.take(at, 8, 2), axis=1)
        return words.view(np.uint16).reshape(-1, count, 8, 8)  # [warps, count, 8, 8]

    def store_rows(self, address, offset: int, count: int, rows: np.ndarray, active, site: int) -> None:
        at, lanes = self.rows(address, offset, count, active)
        words = np.ascontiguousarray(rows).view(u8).reshape(-1, 2)
        self.write(self.place(at, 16, lanes, site), [words[:, 0], words[:, 1]], lanes, site)

    # ------------------------------------------------------------------------------------------------ races

    def touched(self, at: np.ndarray, size: int, lanes) -> tuple[np.ndarray, np.ndarray, int]:
        now = self.launch.toucher32 if lanes is None else self.launch.toucher32.take(lanes)
        return granules(at, now, size, self.granule)

    @staticmethod
    def conflicts(before: np.ndarray, now: np.ndarray) -> np.ndarray:
        differs = before ^ now
        return (differs < 1 << THREAD_BITS) & (differs >= 32) & (before != 0)

    def note(self, state: np.ndarray, index: np.ndarray, now: np.ndarray, before: np.ndarray) -> None:
        """Add to those `before` who touched it in one way."""
        new = np.where(self.conflicts(before, now), now | SEVERAL, now)
        state[index] = new
        lost = (state.take(index) ^ new) >= 32
        state[index[lost]] = new[lost] | SEVERAL

    def read(self, at, size: int, lanes, site: int) -> None:
        if not self.launch.options.shared_races:
            return
        index, now, _ = self.touched(at, size, lanes)
        before = self.writes.take(index)
        self.race("UninitialisedShared", at, lanes, before == 0, size, site, "is read and was never written")
        self.race("SharedRace", at, lanes, self.conflicts(before, now), size, site, "read here, written", before)
        self.note(self.reads, index, now, self.reads.take(index))

    def write(self, at, values: list[np.ndarray], lanes, site: int) -> None:
        size = values[0].itemsize * len(values)
        if not self.launch.options.shared_races:
            self.put(at, values, self.launch.order(len(at)))
            return
        index, now, count = self.touched(at, size, lanes)
        before, read = self.writes.take(index), self.reads.take(index)
        again, late = (before ^ now) < 1 << THREAD_BITS, self.conflicts(read, now)  # in this epoch
        if again.any() or late.any():
            other, replaced = ~np.repeat(self.holds(at, values), count), self.replaced.take(index)
            for bad, what, whose in (
                (self.conflicts(before, now) & other, "written here, written", before),
                (self.conflicts(replaced, now), "written here, other bits written", replaced),
                (late & other, "written here, read", read),
            ):
                self.race("SharedRace", at, lanes, bad, size, site, what, whose)
            changed = again & other
            self.note(self.replaced, index[changed], before[changed], replaced[changed])
        if self.launch.program.uses_wgmma:
            flying = self.in_flight.take(index)
            self.race("AsyncHazard", at, lanes, flying, size, site, "written here while a wgmma still reads it")
            self.unfenced[index] = True
        self.note(self.writes, index, now, before)
        self.put(at, values, self.launch.order(len(at)))
        lost = ~self.holds(at, values)
        if lost.any() and values[0].itemsize > 1:  # NaN may differ, as here its bits are not those of a GPU
            lost &= ~self.holds(at, values, f"f{values[0].itemsize}")
        if lost.any():  # of lanes that store to one place, all must store the same
            apart = (self.writes.take(at // self.granule) ^ now[::count]) >= 32
            kept = self.take(at, values[0].itemsize, len(values))
            pair = [" ".join(f"{int(each[first(lost)]):#x}" for each in parts) for parts in (values, kept)]
            what = f"other values stored by the same instruction, {' and '.join(pair)}"
            self.race("ReplicaConflict", at, lanes, lost & ~apart, size, site, what)
            self.race("SharedRace", at, lanes, lost & apart, size, site, what)

    def race(self, kind: str, at, lanes, bad, size: int, site: int, what: str, before=None) -> None:
        if not bad.any():
            return
        position = first(bad)
        if before is not None:
            thread = int(before[position]) & SEVERAL
            what += f" by {'several warps' if thread == SEVERAL else f'thread {thread}'} without a barrier between"
        self.fail(kind, at % self.stride, lanes, position // max(1, len(bad) // len(at)), size, site, what)

    # ------------------------------------------------------------------------------------------------ wgmma

    def fence(self, mask) -> None:
        """fence.proxy.async: after a barrier, wgmma can read what these threads have written.

        Where several warps have stored, their threads are not known: all threads of the block must be here.
        """
        if mask is None:
            self.unfenced[:] = False
            return
        written = np.flatnonzero(self.unfenced)
        block, thread = written // (self.stride // self.granule), self.writes.take(written) & SEVERAL
        masks = mask.reshape(self.launch.blocks, -1)
        several = thread == SEVERAL
        fenced = np.where(several, masks.all(axis=1)[block], masks[block, np.where(several, 0, thread)])
        self.unfenced[written[fenced]] = False

    def matrix(self, address: np.ndarray, width: int, lanes: np.ndarray, site: int) -> np.ndarray:
        """Elements at these shared addresses, [warpgroups, rows, k], read by wgmma of the warpgroups' first lanes."""
        groups = np.repeat(lanes, address[0].size)
        at = self.place((address - SHARED_BASE).ravel(), width, groups, site)
        if self.launch.options.shared_races:
            index, now, _ = self.touched(at, width, groups)
            before = self.writes.take(index)
            here = (at, groups)
            self.race("UninitialisedShared", *here, before == 0, width, site, "is read by wgmma and was never written")
            early = before >> THREAD_BITS == now >> THREAD_BITS
            self.race("SharedRace", *here, early, width, site, "read here by wgmma, written", before)
            unfenced, what = self.unfenced.take(index), "wgmma reads what was stored without fence.proxy.async"
            self.race("AsyncHazard", *here, unfenced, width, site, what)
            self.in_flight[index] = True
            self.flying.append((index.reshape(len(lanes), -1), lanes // 128, self.committed[lanes // 128]))
        return self.take(at, width, 1)[0].reshape(address.shape)

    def warpgroups(self, mask, site: int) -> np.ndarray:
        """Which warpgroups are here, as a whole."""
        self.launch.together(128, mask, site)
        return np.ones(len(self.committed), bool) if mask is None else mask[::128]

    def commit(self, mask, site: int) -> None:
        self.committed += self.warpgroups(mask, site)

    def wait(self, left: int, mask, site: int) -> None:
        """All groups of these warpgroups except the last `left` are done: their warps have read, as of now."""
        here, flying, self.flying = self.warpgroups(mask, site), self.flying, []
        for index, warpgroups, numbers in flying:
            done = here[warpgroups] & (numbers < self.committed[warpgroups] - left)
            read = index[done]
            self.in_flight[read] = False
            epoch = self.launch.epoch.take(read // (self.stride // self.granule))
            self.reads[read] = (epoch << THREAD_BITS).astype(i4) | SEVERAL
            if not done.all():
                self.flying.append((index[~done], warpgroups[~done], numbers[~done]))
        for index, _, _ in self.flying:
            self.in_flight[index] = True
