"""Windows of a disk that threads of the engine read and pack ahead, and the units that they give."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tapfs.driver import Codec
from tapfs.errors import from_os_error
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.window_reader import WindowThreads
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData
    from tapfs.kernel.engine import EngineDisk
    from tapfs.kernel.ranges import Ranges


class HostRun(NamedTuple):
    """Bytes that follow one another in a host file. Those of plain granules begin at `offset` of the disk."""

    host_offset: int
    data: memoryview
    offset: int | None


class PackedUnits:
    """The granules with data of a window, in the order of the disk.

    `lengths` are those of their payloads, 0 for a granule that does not shrink. The memory is a room's.
    """

    __slots__ = ("_granule", "_packed", "_plain", "_starts", "lengths", "offsets")

    def __init__(self, units: CData, count: int, granule: int, plain: mmap.mmap, packed: mmap.mmap) -> None:
        numbers = ffi.unpack(ffi.cast("uint64_t *", units), 3 * count)
        self.offsets = numbers[::3]
        self._starts = numbers[1::3]
        self.lengths = numbers[2::3]
        self._granule = granule
        self._plain, self._packed = plain, packed

    def each(self) -> Iterator[tuple[int, bytes | None, memoryview]]:
        """Of each its offset, its payload (None: it does not shrink), and the memory of either."""
        with memoryview(self._plain) as plain, memoryview(self._packed) as packed:
            for offset, start, length in zip(self.offsets, self._starts, self.lengths, strict=True):
                if length:
                    payload = packed[start : start + length]
                    yield offset, bytes(payload), payload
                else:
                    yield offset, None, plain[start : start + self._granule]

    def runs(self, places: Sequence[int]) -> Iterator[HostRun]:
        """Them all, each at its place in the host file; what follows one another there and in memory is one run."""
        with memoryview(self._plain) as plain, memoryview(self._packed) as packed:
            host = first = stop = 0
            guest: int | None = None
            for place, offset, start, length in zip(places, self.offsets, self._starts, self.lengths, strict=True):
                done = stop - first
                follows = start == stop and place == host + done and (guest is None) == (length != 0)
                if not follows or (guest is not None and offset != guest + done):
                    if done:
                        yield HostRun(host, (packed if guest is None else plain)[first:stop], guest)
                    host, first, guest = place, start, None if length else offset
                stop = start + (length or self._granule)
            if stop > first:
                yield HostRun(host, (packed if guest is None else plain)[first:stop], guest)

    @property
    def length(self) -> int:
        """Bytes of all of them as they are written."""
        return sum(self.lengths) + self._granule * self.lengths.count(0)


class PackingRoom:
    """Memory for one window of at most `size` bytes: what is read, what comes of it, and the list of units."""

    __slots__ = ("_memory", "_units", "_window", "granule", "packed", "plain")

    def __init__(self, codec: Codec, granule: int, size: int) -> None:
        self.granule = granule
        self.plain = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.packed = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._units = ffi.new("tapfs_packed_unit[]", size // granule)
        self._window = ffi.new("tapfs_window *", {"codec": codec, "granule": granule, "units": self._units})
        self._memory: tuple[CData, CData] | None = None

    def begin(self, ranges: Ranges) -> CData:
        """The window of these ranges, whole granules that the room holds."""
        if len(self.plain) < ranges.packed or ranges.packed % self.granule:
            raise ValueError(f"{ranges.packed} bytes in granules of {self.granule} for a room of {len(self.plain)}")
        plain = ffi.from_buffer("uint8_t[]", self.plain, require_writable=True)
        packed = ffi.from_buffer("uint8_t[]", self.packed, require_writable=True)
        self._memory = plain, packed
        self._window.ranges, self._window.range_count = ranges.array, ranges.count
        self._window.buffer, self._window.packed = plain, packed
        return self._window

    def end(self) -> None:
        """Nobody works in the room any more."""
        for memory in self._memory or ():
            ffi.release(memory)
        self._memory = None

    @property
    def is_packed(self) -> bool:
        """Whether the window was read and packed; else `pack` is to be called, once somebody has filled `plain`."""
        return bool(self._window.outcome.status == lib.TAPFS_DONE)

    def pack(self, ranges: Ranges) -> None:
        """Pack the ranges, whose bytes are in `plain` one behind the other. Raises ImageError."""
        window = self.begin(ranges)
        try:
            lib.tapfs_pack_window(window)
        finally:
            self.end()
        if window.outcome.status != lib.TAPFS_DONE:
            error = OSError(window.outcome.error, os.strerror(window.outcome.error))
            raise from_os_error(error, path=None, op="compress")

    def units(self) -> PackedUnits:
        """What the window gave; valid until the room is used again."""
        return PackedUnits(self._units, self._window.unit_count, self.granule, self.plain, self.packed)


class WindowPacker(WindowThreads):
    """Reads and packs windows of at most `capacity` at a time, in order, by `threads` threads besides the caller's.

    One thread uses it, in a `with`; the disk outlives it.
    """

    def __init__(self, disk: EngineDisk, *, threads: int, capacity: int) -> None:
        self._added: deque[tuple[Ranges, PackingRoom]] = deque()
        super().__init__(disk, threads=threads, capacity=capacity)

    def _let_go(self) -> None:
        while self._added:
            self._added.popleft()[1].end()

    def __len__(self) -> int:
        return len(self._added)

    def add(self, ranges: Ranges, room: PackingRoom) -> None:
        """Have the ranges read and packed in the room."""
        if not self._add(room.begin(ranges)):
            room.end()
            raise ValueError("one window too many")
        self._added.append((ranges, room))

    def take(self) -> tuple[Ranges, PackingRoom]:
        """The window that was added first, once the engine has done what it could; see `PackingRoom.is_packed`."""
        self._take()
        ranges, room = self._added.popleft()
        room.end()
        return ranges, room
