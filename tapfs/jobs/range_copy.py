"""Copy chosen ranges of one disk into another: what an overlay holds into its base, or what a parent held into it.

Threads read and look for zeros; the caller's thread writes, in the order of the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from tapfs.extent import Range, without
from tapfs.jobs.copying import ZERO_GRANULE
from tapfs.jobs.pipeline import WINDOW_BYTES, BufferPool, in_order, processors
from tapfs.jobs.zero_data import write_zero_data
from tapfs.kernel.ranges import MAX_RANGES, Ranges, ranges_of
from tapfs.kernel.segments import find_segments
from tapfs.kernel.writes import Segments
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    import mmap

    from tapfs.disk.image import Image
    from tapfs.jobs.pace import Pace
    from tapfs.jobs.sources import Source

#: Zeros are looked for in pieces of at most so many bytes.
_LARGEST_ZERO_GRANULE = 64 << 10
#: So many zeros are written at a time, so that the progress is seen and the copy can be ended.
_ZERO_WINDOW_BYTES = 1 << 30
#: Windows that wait to be written while each thread prepares another one.
_WAITING = 2

_Result = TypeVar("_Result")


class Run(NamedTuple):
    """A range that is to be copied; `zero`: it is known to read as zeros."""

    offset: int
    length: int
    zero: bool = False


class Window(NamedTuple):
    """Runs that are copied together: those to be read, those of zeros, and where the next window begins."""

    ranges: Ranges
    zeros: list[Range]
    until: int


class Prepared(NamedTuple):
    """A window that was read, and what of it is to be written; the buffer holds the segments."""

    until: int
    buffer: mmap.mmap
    segments: Segments
    zeros: list[Range]


def windows(runs: Iterable[Run], unit: int = 1) -> Iterator[Window]:
    """Ascending runs in windows of bounded size. A long run is cut, at multiples of `unit`."""
    size = window_bytes(unit)
    ranges: list[Range] = []
    zeros: list[Range] = []
    packed = until = 0
    for run in runs:
        offset, end = run.offset, run.offset + run.length
        while offset < end:
            room = _ZERO_WINDOW_BYTES if run.zero else size - packed
            stop = end if end - offset <= room else (offset + room) // unit * unit
            full = stop <= offset
            if not full:
                (zeros if run.zero else ranges).append(Range(offset, stop - offset))
                packed += 0 if run.zero else stop - offset
                offset = until = stop
            if full or offset < end or len(ranges) + len(zeros) == MAX_RANGES:
                yield Window(ranges_of(ranges, until), zeros, until)
                ranges, zeros, packed = [], [], 0
    if ranges or zeros:
        yield Window(ranges_of(ranges, until), zeros, until)


def window_bytes(unit: int) -> int:
    """The most bytes of data in a window whose runs are cut at multiples of `unit`."""
    return -(-WINDOW_BYTES // unit) * unit


def overwrite(
    source: Image,
    target: Image,
    runs: Iterable[Run],
    pace: Pace,
    progress: Callable[[int, int], None],
    *,
    threads: int | None = None,
) -> int:
    """Make the runs of `target` read as in `source`, zeros included; how many bytes of data were written.

    `threads` read, None for as many as there are processors.
    """
    granule = min(max(target.granule, ZERO_GRANULE), _LARGEST_ZERO_GRANULE)
    buffers = BufferPool(WINDOW_BYTES)

    def prepare(window: Window) -> Prepared:
        buffer = buffers.take()
        source.read_ranges(window.ranges, buffer)
        segments, _ = find_segments(window.ranges, buffer, granule)
        zeros = [*window.zeros, *without(window.ranges, segments.ranges())]
        return Prepared(window.until, buffer, segments, zeros)

    return _written(target, buffers, each_in_order(windows(runs), prepare, threads), pace, progress, _write_zeros)


def write_differences(
    old: Image, new: Image | None, target: Image, runs: Iterable[Run], pace: Pace, progress: Callable[[int, int], None]
) -> int:
    """Have `target` hold the bytes of `old` in the runs wherever `new` has others; how many bytes of data were written.

    `new` None is a disk of zeros. The runs are aligned to the granule of the target, which reads as `old`. Zeros
    are written by `write_hiding`.
    """
    unit = target.granule
    buffers = BufferPool(window_bytes(unit))
    prepared = each_in_order(windows(runs, unit), lambda window: difference(old, new, window, unit, buffers))
    return _written(target, buffers, prepared, pace, progress, write_hiding)


def difference(old: Source, new: Source | None, window: Window, unit: int, buffers: BufferPool) -> Prepared:
    """What of a window `new` has otherwise than `old`; its bytes are those of `old`. None is a disk of zeros."""
    buffer = buffers.take()
    old.read_ranges(window.ranges, buffer)
    if new is None:
        segments, _ = find_segments(window.ranges, buffer, unit)
        return Prepared(window.until, buffer, segments, [])
    below = buffers.take()
    try:
        new.read_ranges(window.ranges, below)
        segments, zeros = find_segments(window.ranges, buffer, unit, below)
    finally:
        buffers.give_back(below)
    return Prepared(window.until, buffer, segments, zeros)


def each_in_order(
    found: Iterable[Window], prepare: Callable[[Window], _Result], threads: int | None = None
) -> Iterator[_Result]:
    """Each window, prepared by threads, in order."""
    workers = threads or processors()
    return in_order(found, prepare, workers=workers, ahead=workers + _WAITING)


def write_hiding(target: Image, zeros: Range) -> int:
    """Write zeros that stay when the target gets another parent; how many of them are data.

    They are data where the target has no parent, because its entries for zeros show a later one.
    """
    if len(target.layers) > 1:
        target.write_zeroes(zeros.offset, zeros.length, hide=True)
        return 0
    write_zero_data(target, zeros)
    return zeros.length


def _write_zeros(target: Image, zeros: Range) -> int:
    target.write_zeroes(zeros.offset, zeros.length)
    return 0


def _written(
    target: Image,
    buffers: BufferPool,
    prepared: Iterable[Prepared],
    pace: Pace,
    progress: Callable[[int, int], None],
    write_zeros: Callable[[Image, Range], int],
) -> int:
    count = 0
    for until, buffer, segments, zeros in prepared:
        target.write_segments(segments)
        moved = segments.length + sum(write_zeros(target, each) for each in zeros)
        buffers.give_back(buffer)
        count += moved
        pace.moved(moved)
        progress(until, target.size)
    return count
