"""Ranges of a disk as the engine's arrays: where it has data, what two disks have, and their bytes in one buffer.

A range costs no Python object: a list of them is made, joined, cut and read by one call each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tapfs.extent import Range
from tapfs.kernel._engine import ffi, lib

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData
    from tapfs.kernel.engine import Buffer, EngineDisk, Outcome

#: Ranges that one call brings at most, and looks at the map that it may take, which bounds how long it lasts.
MAX_RANGES = 1024
LOOKUPS = 8192

#: More bytes than any disk has.
UNBOUNDED = 1 << 63


class Ranges:
    """Ascending ranges of a disk, in bytes. All that they describe lies before `until`, where the next ones begin.

    `packed` bytes hold what is read of them, one range behind the other.
    """

    __slots__ = ("array", "count", "packed", "until")

    def __init__(self, array: CData, count: int, until: int) -> None:
        self.array = array
        self.count = count
        self.until = until
        self.packed = sum(ffi.unpack(ffi.cast("uint64_t *", array), 2 * count)[1::2])

    def __iter__(self) -> Iterator[Range]:
        for number in range(self.count):
            yield Range(self.array[number].offset, self.array[number].length)

    def place(self, at: int) -> int:
        """The offset in the disk of byte `at` of the packed bytes."""
        for offset, length in self:
            if at < length:
                return offset + at
            at -= length
        raise IndexError(at)


def ranges_of(ranges: Sequence[Range], until: int) -> Ranges:
    """Ranges that somebody else than the engine knows; they ascend, and no two overlap."""
    return Ranges(ffi.new("tapfs_range[]", list(ranges)), len(ranges), until)


def cut(ranges: Ranges, size: int) -> Iterator[Ranges]:
    """The same in lists of at most `size` bytes each."""
    part: list[Range] = []
    room = size
    for whole in ranges:
        at = whole.offset
        while at < whole.end:
            step = min(whole.end - at, room)
            part.append(Range(at, step))
            at, room = at + step, room - step
            if room == 0:
                yield ranges_of(part, at)
                part, room = [], size
    if part:
        yield ranges_of(part, ranges.until)


def nothing(until: int) -> Ranges:
    """No ranges before `until`."""
    return Ranges(ffi.new("tapfs_range[]", 0), 0, until)


def data_ranges(
    disk: EngineDisk,
    offset: int,
    end: int,
    *,
    gap: int = 0,
    align: int = 1,
    most_bytes: int = UNBOUNDED,
    most: int = MAX_RANGES,
    lookups: int = LOOKUPS,
) -> tuple[Ranges, Outcome]:
    """The first ranges in ``[offset, end)`` that are not known to be zeros, and how the engine came to its end.

    See `tapfs_data_ranges` in engine/engine.h for `gap`, `align` and `most_bytes`. It ends early with a map that is
    missing, and after bounded work. Raises ImageError.
    """
    ranges = ffi.new("tapfs_range[]", most)
    outcome = ffi.new("tapfs_outcome *")
    count = lib.tapfs_data_ranges(
        disk.handle, offset, end - offset, gap, align, most_bytes, lookups, ranges, most, outcome
    )
    ended = disk.finished(outcome)
    return Ranges(ranges, count, offset + ended.done), ended


def union(left: Ranges, right: Ranges) -> Ranges:
    """What either has before the first `until` of the two."""
    until = min(left.until, right.until)
    ranges = ffi.new("tapfs_range[]", left.count + right.count)
    count = lib.tapfs_union_ranges(left.array, left.count, right.array, right.count, until, ranges)
    return Ranges(ranges, count, until)


def read_ranges(disk: EngineDisk, ranges: Ranges, buffer: Buffer, done: int) -> Outcome:
    """Read the ranges into `buffer`, all but its first `done` bytes; `Outcome.done` counts those that are there then.

    What lies past the end of the disk reads as zeros. Raises ImageError.
    """
    outcome = ffi.new("tapfs_outcome *")
    with ffi.from_buffer(buffer, require_writable=True) as target:
        if len(target) < ranges.packed:
            raise ValueError(f"a buffer of {len(target)} bytes is too small for {ranges.packed}")
        lib.tapfs_read_ranges(disk.handle, ranges.array, ranges.count, done, target, outcome)
    return disk.finished(outcome)


def clone_ranges(target: EngineDisk, source: EngineDisk, ranges: Ranges) -> int:
    """Have a plain disk share the ranges with another disk's files: 0, or the errno for which it cannot."""
    return lib.tapfs_clone_ranges(target.handle, source.handle, ranges.array, ranges.count)
