"""Copy what differs from what a target reads as already, through the target's ordinary writes.

Threads read and look for zeros; the caller's thread writes, in the order of the disk. Where the engine can read by
itself, the threads are the engine's (`kernel/src/copying`): those of Python give each other the interpreter's lock.
A list of ranges is an array of the engine all the way, so a thousand small pieces of data cost as many calls as one
large piece. Where the target is one plain file, the thread that reads a piece writes it, too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, Self

from tapfs.disk.image import Image
from tapfs.extent import Range
from tapfs.jobs.early_writeback import EarlyWriteback
from tapfs.jobs.pace import Pace
from tapfs.jobs.pipeline import WINDOW_BYTES, BufferPool, in_order, processors
from tapfs.kernel.ranges import clone_ranges, cut, ranges_of
from tapfs.kernel.segments import find_segments
from tapfs.kernel.window_reader import WindowReader
from tapfs.kernel.writes import Segments, window_segments
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    import mmap

    from tapfs.jobs.sources import Source
    from tapfs.kernel.ranges import Ranges

#: Zeros are looked for in pieces of at least this many bytes: smaller holes save no space on the host.
ZERO_GRANULE = 4096
#: In a target of larger granules zeros are looked for in pieces of so many bytes.
_LARGEST_ZERO_GRANULE = 64 << 10
#: A gap between two pieces of data up to this long is read rather than zeroed by itself, if zeros are written too.
_GAP_BYTES = 64 << 10
#: So many zeros are written at a time, so that the progress is seen and the copy can be ended.
_ZERO_WINDOW_BYTES = 1 << 30
#: Of a run of zeros that would be more windows than this, each is longer.
_MOST_ZERO_WINDOWS = 1 << 12
_SECTOR = 512
#: A window that goes through the target's driver, which is asked once for all of it.
_WINDOW_BYTES = 2 * WINDOW_BYTES
#: A window that goes straight into a plain file, and the pieces of it, of which one is written at a time. A thread
#: takes as long to wake for its turn as the host takes to write 150 KiB, so with smaller ones nobody writes for long.
_STRAIGHT_WINDOW_BYTES = 8 << 20
_STRAIGHT_PIECE_BYTES = 2 << 20
#: Segments that are as long on average are written back early. Shorter ones lie apart in the files of most formats: to
#: bring their pages to the disk beside the thread that writes took a third longer than by the barrier at the end.
_DENSE_BYTES = 64 << 10
#: Windows that wait to be written while each thread prepares another one.
_WAITING = 2
#: At most so many of those that wait are written together.
_TOGETHER = 4


class Baseline(Enum):
    """What the target reads as before anything is copied."""

    #: A new image without a parent.
    ZEROS = "zeros"
    #: A new image over a parent: only what differs from the parent is written.
    PARENT = "parent"
    #: An existing disk: zeros are written too.
    ANYTHING = "anything"


class CopyOptions(NamedTuple):
    """How a copy is made, but for what is copied.

    `rate` bounds the bytes a second, `workers` the threads that read. `sparse_bytes`: zeros are looked for in pieces of
    so many bytes, None: of the usual size; 0: they are not looked for, and all of the disk is written.
    """

    rate: int | None = None
    workers: int | None = None
    sparse_bytes: int | None = None


class _Prepared(NamedTuple):
    """The disk up to `until`: what of it is to be written, and the buffers that hold it (none where nothing is)."""

    until: int
    buffers: tuple[mmap.mmap, ...]
    segments: Segments
    zeros: list[Range]

    @classmethod
    def of(
        cls, ranges: Ranges, segments: Segments, buffer: mmap.mmap | None = None, zeros: list[Range] | None = None
    ) -> Self:
        """The same of one window."""
        return cls(ranges.until, () if buffer is None else (buffer,), segments, zeros or [])


class Copy:
    """One copy of a whole disk into another that is at least as large."""

    def __init__(self, source: Source, target: Image, baseline: Baseline, options: CopyOptions | None = None) -> None:
        options = options or CopyOptions()
        self._source = source
        self._pace = Pace(options.rate)
        self._workers = min(options.workers or processors(), processors())
        #: Whether all of the disk is written, whatever it holds.
        self._full = options.sparse_bytes == 0
        self._target = target
        self._baseline = baseline
        #: The bytes behind the end of the image on the target stay as they are.
        self._end = source.size if target.is_device else target.size
        self._granule = max(target.granule, ZERO_GRANULE)
        if baseline is not Baseline.PARENT:
            # Zeros inside a large granule stay holes of its place, which is new and reads as zeros.
            self._granule = min(self._granule, _LARGEST_ZERO_GRANULE)
        if options.sparse_bytes:
            self._granule = max(options.sparse_bytes // _SECTOR * _SECTOR, target.granule, _SECTOR)
        #: Segments that are as long on average lie together in the target's file, unless that is plain.
        self._dense_bytes = min(target.granule if target.granule >= ZERO_GRANULE else _DENSE_BYTES, _DENSE_BYTES)
        #: Whether the target's file may share what the source's files have.
        self._shares = baseline is Baseline.ZEROS and not self._full and target.whole_file() is not None
        #: Whether the engine copies without the target's write path: a plain file has all bytes in place.
        self._straight = (
            (baseline is Baseline.ZEROS and not self._full and options.rate is None)
            and (isinstance(source, Image) and not source.is_fetched)
            and (target.whole_file() is not None and self._granule <= _STRAIGHT_PIECE_BYTES)
        )
        #: Where a rate is bounded, bytes go one window after the other.
        self._together = _TOGETHER if options.rate is None else 1
        # What differs from a parent comes as the ranges of two disks, of a smaller window each.
        self._buffers = BufferPool(_WINDOW_BYTES)

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Copy it, but for a flush. `progress` is told the bytes of the disk that are done, and of how many."""
        with EarlyWriteback(self._target.engine_disk) as writeback:
            done = self._copy(writeback, progress)
        if self._baseline is Baseline.ANYTHING:
            self._zero(done, self._end, progress)

    def _copy(self, writeback: EarlyWriteback, progress: Callable[[int, int], None]) -> int:
        """Copy the data; the offset behind the last of it."""
        done = 0
        for prepared in self._prepared():
            if prepared.segments.count:
                self._target.write_segments(prepared.segments)
            self._pace.moved(prepared.segments.length)
            if prepared.segments.length >= self._dense_bytes * prepared.segments.count:
                writeback.wrote(prepared.segments.length)
            if self._baseline is Baseline.ANYTHING:
                self._zero_between(done, prepared.segments, prepared.until, progress)
            for offset, length in prepared.zeros:
                self._target.write_zeroes(offset, length)
            for buffer in prepared.buffers:
                self._buffers.give_back(buffer)
            done = prepared.until
            progress(done, self._end)
        return done

    def _prepared(self) -> Iterator[_Prepared]:
        """The windows of the source in order, read and searched."""
        windows, ahead = self._ranges(), self._workers + _WAITING
        source = self._source
        if self._straight and isinstance(source, Image):
            yield from self._copied(source, windows, ahead)
            return
        if not isinstance(source, Image) or source.is_fetched or self._full or self._baseline is Baseline.PARENT:
            yield from in_order(windows, self._prepare, workers=self._workers, ahead=ahead)
            return
        while self._shares and (ranges := next(windows, None)) is not None:
            yield self._prepare(ranges)
        with WindowReader(source.engine_disk, self._granule, threads=self._workers - 1, capacity=ahead) as reader:
            self._fill(reader, windows, ahead)
            while reader:
                taken = [self._taken(reader)]
                while reader.ready and len(taken) < self._together:
                    taken.append(self._taken(reader))
                self._fill(reader, windows, ahead)  # so that threads read while this is written
                yield _joined(taken)

    def _fill(self, reader: WindowReader, windows: Iterator[Ranges], ahead: int) -> None:
        """Have so many windows read ahead, if there are."""
        while len(reader) < ahead and (ranges := next(windows, None)) is not None:
            reader.add(ranges, self._buffers.take())

    def _copied(self, source: Image, windows: Iterator[Ranges], ahead: int) -> Iterator[_Prepared]:
        """The windows of the source in order, once they are in the target, and what is to be written of others."""
        buffers = BufferPool(_STRAIGHT_PIECE_BYTES)
        target = self._target.engine_disk
        with WindowReader(
            source.engine_disk, self._granule, threads=self._workers - 1, capacity=ahead, target=target
        ) as copier:
            for ranges in windows:
                if self._shares and self._share(ranges):
                    while copier:
                        yield from self._ended(copier, buffers)
                    yield _Prepared.of(ranges, Segments.none())
                    continue
                copier.add(ranges, buffers.take())
                if len(copier) == ahead:
                    yield from self._ended(copier, buffers)
            while copier:
                yield from self._ended(copier, buffers)

    def _ended(self, copier: WindowReader, buffers: BufferPool) -> Iterator[_Prepared]:
        """The next window; what of it the engine could not copy by itself is read with the help of the driver."""
        ranges, buffer, segments = copier.take()
        buffers.give_back(buffer)
        if segments is not None:
            yield _Prepared.of(ranges, segments)
            return
        for part in cut(ranges, _WINDOW_BYTES):
            yield self._prepare(part)

    def _taken(self, reader: WindowReader) -> _Prepared:
        """The next window; what the engine could not read by itself is read with the help of the driver."""
        ranges, buffer, segments = reader.take()
        if segments is None:
            self._source.read_ranges(ranges, buffer)
            segments, _ = find_segments(ranges, buffer, self._granule)
        return _Prepared.of(ranges, segments, buffer)

    def _ranges(self) -> Iterator[Ranges]:
        if self._full:
            for offset in range(0, self._source.size, _WINDOW_BYTES):
                stop = min(offset + _WINDOW_BYTES, self._source.size)
                yield ranges_of([Range(offset, stop - offset)], stop)
            return
        if self._baseline is Baseline.PARENT:
            from tapfs.jobs.compare import unequal_candidates

            yield from unequal_candidates(self._source, self._target)
            return
        gap = _GAP_BYTES if self._baseline is Baseline.ANYTHING else ZERO_GRANULE - 1
        yield from data_windows(self._source, _STRAIGHT_WINDOW_BYTES if self._straight else _WINDOW_BYTES, gap=gap)

    def _prepare(self, ranges: Ranges) -> _Prepared:
        if self._shares and self._share(ranges):
            return _Prepared.of(ranges, Segments.none())
        buffer = self._buffers.take()
        self._source.read_ranges(ranges, buffer)
        if self._full:
            (whole,) = ranges
            with window_segments(whole.offset, buffer, [(0, whole.length)]) as segments:
                return _Prepared.of(ranges, segments, buffer)
        if self._baseline is not Baseline.PARENT:
            segments, zeros = find_segments(ranges, buffer, self._granule)
            return _Prepared.of(ranges, segments, buffer, zeros)
        below = self._buffers.take()
        try:
            self._target.read_ranges(ranges, below)
            segments, zeros = find_segments(ranges, buffer, self._target.granule, below)
        finally:
            self._buffers.give_back(below)
        return _Prepared.of(ranges, segments, buffer, zeros)

    def _share(self, ranges: Ranges) -> bool:
        """Whether the target has the ranges without a copy; no more is tried where the host cannot do it at all."""
        if not isinstance(self._source, Image):
            self._shares = False
            return False
        error = clone_ranges(self._target.engine_disk, self._source.engine_disk, ranges)
        if error not in (0, errno.EINVAL):  # EINVAL: these ranges lie across blocks of the host
            self._shares = False
        return error == 0

    def _zero_between(self, start: int, segments: Segments, end: int, progress: Callable[[int, int], None]) -> None:
        """Make everything in ``[start, end)`` that is in no segment read as zeros."""
        for offset, length in segments.ranges():
            self._zero(start, offset, progress)
            start = offset + length
        self._zero(start, end, progress)

    def _zero(self, start: int, end: int, progress: Callable[[int, int], None]) -> None:
        most = max(_ZERO_WINDOW_BYTES, (end - start) // _MOST_ZERO_WINDOWS)
        while start < end:
            stop = min(end, start - start % most + most)
            self._target.write_zeroes(start, stop - start)
            progress(stop, self._end)
            start = stop


def _joined(parts: list[_Prepared]) -> _Prepared:
    """Windows that follow one another as one, so that the target's driver is asked once for all of them."""
    if len(parts) == 1:
        return parts[0]
    buffers = tuple(buffer for part in parts for buffer in part.buffers)
    segments = Segments.joined([part.segments for part in parts])
    return _Prepared(parts[-1].until, buffers, segments, [zeros for part in parts for zeros in part.zeros])


def data_windows(source: Source, size: int, *, gap: int = 0, align: int = 1) -> Iterator[Ranges]:
    """The data of the disk in lists of ranges of `size` bytes; see `Image.data_ranges` for `gap` and `align`."""
    offset = 0
    while offset < source.size:
        ranges = source.disk_map.data_ranges(offset, source.size, gap=gap, align=align, most_bytes=size)
        offset = ranges.until
        if ranges.count:
            yield ranges
