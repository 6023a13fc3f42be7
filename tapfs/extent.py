"""Extents: what a driver's map is made of, and the laws that every map obeys.

All offsets and lengths are bytes, all ranges are half open. A map answers a request
``[offset, offset + length)`` with extents that are ascending and contiguous and cover the
request; they may reach beyond it at both ends.

"Zero" is not "unallocated": a ZERO extent reads as zeros whatever lies below, an
UNALLOCATED one reads as the backing disk, or as zeros where there is none or it has ended.
"Allocated" is not "writable in place": only ``in_place`` says that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import TypeVar

from tapfs.records import NamedTuple

_Run = TypeVar("_Run")


class Kind(IntEnum):
    """Where the bytes of an extent come from. The engine's C enum has the same values.

    BROKEN stands only between the core and the engine's map cache, and no driver answers with it: an entry there
    cannot be true. Whoever wants these bytes is told of a map that is missing, and the driver says what is wrong.
    """

    DATA = 0
    ZERO = 1
    UNALLOCATED = 2
    COMPRESSED = 3
    BROKEN = 4


class Range(NamedTuple):
    """``[offset, offset + length)`` of a disk, in bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


class Extent(NamedTuple):
    """A run of the virtual disk whose bytes all come from the same place.

    DATA: byte ``offset + i`` of the disk is byte ``host_offset + i`` of host file ``file``.
    COMPRESSED: a part of one packed unit (`Geometry.packed_unit`), which begins at a multiple of that size; its
    payload is ``[host_offset, host_offset + host_length)``. ``host_length`` is 0 for every other kind. Of a unit with
    a length of its own (`Packing.own_units`) ``skip`` bytes lie before the extent.
    """

    offset: int
    length: int
    kind: Kind
    file: int = 0
    host_offset: int = 0
    host_length: int = 0
    in_place: bool = False
    skip: int = 0

    @property
    def end(self) -> int:
        """The first byte of the virtual disk after this extent."""
        return self.offset + self.length


def joinable(left: Extent, right: Extent) -> bool:
    """Whether `right` continues `left` so that both are one extent."""
    if left.end != right.offset or left.kind != right.kind or left.in_place != right.in_place:
        return False
    if left.kind == Kind.DATA:
        return left.file == right.file and left.host_offset + left.length == right.host_offset
    return left.kind != Kind.COMPRESSED


def merge(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same map with as few extents as possible."""
    return merge_runs(extents, _joined)


def _joined(left: Extent, right: Extent) -> Extent | None:
    return left._replace(length=left.length + right.length) if joinable(left, right) else None


def merge_runs(runs: Iterable[_Run], join: Callable[[_Run, _Run], _Run | None]) -> Iterator[_Run]:
    """The same runs with those made one that `join` joins; it answers None for two that stay."""
    current: _Run | None = None
    for run in runs:
        joined = run if current is None else join(current, run)
        if joined is None and current is not None:
            yield current
        current = run if joined is None else joined
    if current is not None:
        yield current


def without(ranges: Iterable[tuple[int, int]], taken: Iterable[Range]) -> Iterator[Range]:
    """What of the ranges ``(offset, length)`` lies in none of the `taken` ones.

    Both ascend, and neither overlap themselves. A taken one may go on from one range into the next.
    """
    rest = iter(taken)
    current = next(rest, None)
    for start, length in ranges:
        at, end = start, start + length
        while current is not None and current.offset < end:
            if at < current.offset:
                yield Range(at, current.offset - at)
            at = max(at, current.end)
            if current.end > end:
                break
            current = next(rest, None)
        if at < end:
            yield Range(at, end - at)


def clip(extents: Iterable[Extent], offset: int, length: int) -> Iterator[Extent]:
    """The parts of `extents` inside ``[offset, offset + length)``.

    A COMPRESSED extent keeps its payload: the engine reads a part of a unit by
    decompressing the whole of it, so a clipped one is for reporting only.
    """
    end = offset + length
    for extent in extents:
        start = max(extent.offset, offset)
        stop = min(extent.end, end)
        if start >= stop:
            continue
        if start == extent.offset and stop == extent.end:
            yield extent
            continue
        before = start - extent.offset
        shift = before if extent.kind == Kind.DATA else 0
        skip = extent.skip + before if extent.kind == Kind.COMPRESSED else 0
        yield extent._replace(offset=start, length=stop - start, host_offset=extent.host_offset + shift, skip=skip)
