"""Writes of many runs at once: what the engine writes in place, what lacks places, and what goes to reserved places.

The arrays of this module are the engine's own structures, so that a run costs no more than its numbers.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tapfs.errors import from_os_error
from tapfs.extent import Kind, Range
from tapfs.kernel._engine import ffi, lib

if TYPE_CHECKING:
    from tapfs.driver import Placement
    from tapfs.kernel._engine import CData
    from tapfs.kernel.engine import Buffer, EngineDisk, Outcome

#: Ranges that lack places and are reserved together, at most.
_MAX_GAPS = 1024


class Segments:
    """Runs of bytes for the disk, which ascend and do not overlap.

    Each is ``(offset, length, data)`` with a pointer to memory that stays as it is while the segments are used.
    """

    __slots__ = ("array", "count", "end", "length", "offset")

    def __init__(self, runs: Sequence[tuple[int, int, CData]]) -> None:
        self.array = ffi.new("tapfs_segment[]", runs)
        self.count = len(runs)
        #: Bytes of all runs.
        self.length = sum(length for _, length, _ in runs)
        #: The first byte of the first run, and the first byte after the last one.
        self.offset = runs[0][0] if runs else 0
        self.end = runs[-1][0] + runs[-1][1] if runs else 0

    @classmethod
    def none(cls) -> Segments:
        """No runs."""
        return cls(())

    @classmethod
    def of_array(cls, array: CData, count: int) -> Segments:
        """The first `count` of a `tapfs_segment[]` that the engine has filled."""
        segments = cls(())
        segments.array, segments.count = array, count
        ranges = segments.ranges()
        segments.length = sum(length for _, length in ranges)
        segments.offset = ranges[0].offset if ranges else 0
        segments.end = ranges[-1].end if ranges else 0
        return segments

    @classmethod
    def joined(cls, parts: Sequence[Segments]) -> Segments:
        """The runs of all parts, of which each lies behind the one before it."""
        parts = [part for part in parts if part.count]
        if len(parts) == 1:
            return parts[0]
        segments = cls(())
        segments.count = sum(part.count for part in parts)
        segments.array = ffi.new("tapfs_segment[]", segments.count)
        at = 0
        for part in parts:
            ffi.memmove(segments.array + at, part.array, part.count * ffi.sizeof("tapfs_segment"))
            at += part.count
        segments.length = sum(part.length for part in parts)
        segments.offset = parts[0].offset if parts else 0
        segments.end = parts[-1].end if parts else 0
        return segments

    def ranges(self) -> list[Range]:
        """Where they belong."""
        numbers = ffi.unpack(ffi.cast("uint64_t *", self.array), 3 * self.count)
        return [Range(offset, length) for offset, length in zip(numbers[::3], numbers[1::3], strict=True)]

    def pieces(self, size: int) -> Iterator[tuple[int, bytes]]:
        """Where each piece of a run belongs, and a copy of its bytes: `size` of them, or fewer at the end of a run."""
        for index, (offset, length) in enumerate(self.ranges()):
            data = self.array[index].data
            for at in range(0, length, size):
                yield offset + at, bytes(ffi.buffer(data + at, min(size, length - at)))


@contextmanager
def window_segments(offset: int, buffer: Buffer, runs: Iterable[tuple[int, int]]) -> Generator[Segments]:
    """Runs ``(start, length)`` of a buffer, whose first byte belongs at `offset` of the disk."""
    with ffi.from_buffer("uint8_t[]", buffer) as data:
        yield Segments([(offset + start, length, data + start) for start, length in runs])


class Gaps:
    """Ranges of whole granules that a write cannot reach in place; they ascend, and no two touch."""

    __slots__ = ("array", "capacity", "count")

    def __init__(self, segments: Segments, granule: int) -> None:
        # Between two gaps of one segment there is a granule that is none.
        self.capacity = min(_MAX_GAPS, segments.count + segments.length // (2 * granule) + 1)
        self.array = ffi.new("tapfs_range[]", self.capacity)
        self.count = 0

    def ranges(self) -> list[Range]:
        """What was noted so far."""
        numbers = ffi.unpack(ffi.cast("uint64_t *", self.array), 2 * self.count)
        return [Range(offset, length) for offset, length in zip(numbers[::2], numbers[1::2], strict=True)]


def write_in_place(engine: EngineDisk, segments: Segments, done: int, gaps: Gaps) -> Outcome:
    """Write all but the first `done` bytes of the segments in place, and note what is not in place.

    `Outcome.done` counts the bytes of all segments that are written or noted. Without MISS it is less than all only
    where there was no more room for gaps.
    """
    outcome = ffi.new("tapfs_outcome *")
    gaps.count = lib.tapfs_write_segments(
        engine.handle, segments.array, segments.count, done, gaps.array, gaps.count, gaps.capacity, outcome
    )
    return engine.finished(outcome)


class Places:
    """The placements of a reservation, as the engine takes them."""

    __slots__ = ("array", "count")

    def __init__(self, placements: Sequence[Placement]) -> None:
        # A Placement has its fields in the order of tapfs_placement.
        self.array = ffi.new("tapfs_placement[]", placements)
        self.count = len(placements)


def write_reserved(engine: EngineDisk, segments: Segments, gaps: Gaps, places: Places, done: int) -> Outcome:
    """Write what the segments have in reserved places that cover the gaps; `done` of the places are done already.

    What the segments leave open in a place is filled. `Outcome.done` counts the places that are done.
    """
    outcome = ffi.new("tapfs_outcome *")
    lib.tapfs_write_reserved(
        engine.handle,
        segments.array,
        segments.count,
        gaps.array,
        gaps.count,
        places.array,
        places.count,
        done,
        outcome,
    )
    return engine.finished(outcome)


def patch_placed(engine: EngineDisk, placements: Sequence[Placement]) -> None:
    """Have the cached map of layer 0 say that the ranges of the placements are in place there."""
    # In the order of tapfs_extent; one call with tuples is far quicker than assigning field by field.
    extents = [
        (offset, length, host_offset, 0, file, 0, Kind.DATA, True)
        for offset, length, host_offset, file, _, _ in placements
    ]
    result = lib.tapfs_disk_patch(engine.handle, 0, ffi.new("tapfs_extent[]", extents), len(extents))
    if result < 0:
        raise from_os_error(OSError(-result, os.strerror(-result)), path=None, op="change a map")
