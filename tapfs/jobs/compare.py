"""Compare two disks: find the first byte in which a guest would read a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tapfs.jobs.pipeline import WINDOW_BYTES, BufferPool, in_order
from tapfs.kernel.engine import first_difference
from tapfs.kernel.ranges import Ranges, nothing, union
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from tapfs.jobs.sources import Source


class Difference(NamedTuple):
    """The first byte that differs, or, with `offset` None, sizes that differ and had to be equal."""

    offset: int | None


def compare(
    left: Source, right: Source, *, strict: bool = False, progress: Callable[[int, int], None] | None = None
) -> Difference | None:
    """The first difference between two disks, or None if a guest reads the same from both.

    Where one is longer its excess must read as zeros; with `strict` the sizes must be equal.
    Ranges that both are known to read as zeros are not read. Raises ImageError when either
    cannot be read.
    """
    if strict and left.size != right.size:
        return Difference(None)
    total = max(left.size, right.size)
    buffers = BufferPool(2 * WINDOW_BYTES)

    def examine(ranges: Ranges) -> tuple[int, int | None]:
        return ranges.until, _difference_in(left, right, ranges, buffers)

    for until, found in in_order(unequal_candidates(left, right), examine, workers=2, ahead=4):
        if found is not None:
            return Difference(found)
        if progress is not None:
            progress(until, total)
    return None


def unequal_candidates(left: Source, right: Source, offset: int = 0, end: int | None = None) -> Iterator[Ranges]:
    """The ranges in ``[offset, end)`` that are not known to be zeros in both; without `end` to that of the longer disk.

    They come in lists of at most two windows of bytes.
    """
    end = max(left.size, right.size) if end is None else end
    span = WINDOW_BYTES
    while offset < end:
        of_left = _data_in(left, offset, min(offset + span, end))
        of_right = _data_in(right, offset, of_left.until)
        both = union(of_left, of_right)
        # The map of one disk is not walked much further than that of the other, or it would be walked again and again.
        span = max(2 * (both.until - offset), WINDOW_BYTES)
        offset = both.until
        if both.count:
            yield both


def _data_in(image: Source, offset: int, end: int) -> Ranges:
    """Up to a window of data in the range, which may lie past the disk's own end."""
    inside = min(end, image.size)
    if offset >= inside:
        return nothing(end)
    ranges = image.disk_map.data_ranges(offset, inside, most_bytes=WINDOW_BYTES)
    if ranges.until == inside:
        ranges.until = end
    return ranges


def _difference_in(left: Source, right: Source, ranges: Ranges, buffers: BufferPool) -> int | None:
    a, b = buffers.take(), buffers.take()
    try:
        left.read_ranges(ranges, a)
        right.read_ranges(ranges, b)
        with memoryview(a) as a_view, memoryview(b) as b_view:
            found = first_difference(a_view[: ranges.packed], b_view[: ranges.packed])
        return None if found is None else ranges.place(found)
    finally:
        buffers.give_back(a)
        buffers.give_back(b)
