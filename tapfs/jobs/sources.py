"""The disk that a copy reads: an image, a part of one, several one behind the other, or one that cannot all be read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tapfs.disk.image import Image
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.jobs.pipeline import WINDOW_BYTES
from tapfs.kernel.ranges import Ranges, ranges_of
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from tapfs.kernel.engine import Buffer

#: Every disk of several begins at a multiple of this, as qemu-img has it.
_SECTOR = 512
#: A range that cannot be read is narrowed down to pieces of so many bytes.
_SALVAGED_BYTES = 512


class Mapped(Protocol):
    """The map of a disk as a copy goes through it."""

    def data_ranges(self, offset: int, end: int, *, gap: int = 0, align: int = 1, most_bytes: int) -> Ranges:
        """See :meth:`tapfs.disk.disk_map.DiskMap.data_ranges`."""
        ...


class Source(Protocol):
    """A disk that is read; an `Image` is one."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def path(self) -> str:
        """The name for messages."""
        ...

    @property
    def disk_map(self) -> Mapped:
        """The map."""
        ...

    def read_ranges(self, ranges: Ranges, buffer: Buffer) -> None:
        """Read ranges into a writable buffer, one behind the other. Past the end of the disk there are zeros."""
        ...


class Joined:
    """Disks one behind the other: a :class:`Source`. They stay the caller's."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = list(sources)
        self._starts: list[int] = []
        end = 0
        for source in self._sources:
            start = -(-end // _SECTOR) * _SECTOR
            self._starts.append(start)
            end = start + source.size
        self._size = end

    @property
    def size(self) -> int:
        """Bytes of all disks and of the zeros that fill their last sectors."""
        return self._size

    @property
    def path(self) -> str:
        """The name of the first image."""
        return self._sources[0].path

    @property
    def disk_map(self) -> Joined:
        """The map."""
        return self

    def data_ranges(self, offset: int, end: int, *, gap: int = 0, align: int = 1, most_bytes: int) -> Ranges:
        """The data of the disk that `offset` lies in; see :meth:`Mapped.data_ranges`."""
        for source, start in zip(self._sources, self._starts, strict=True):
            if offset < start:  # in what fills the last sector of the disk before
                return ranges_of([], start) if align == 1 else ranges_of([Range(offset, align)], offset + align)
            if offset < start + source.size:
                local_end = min(end, start + source.size) - start
                found = source.disk_map.data_ranges(offset - start, local_end, gap=gap, most_bytes=most_bytes)
                moved = [Range(start + at, length) for at, length in found]
                if align == 1:
                    return ranges_of(moved, start + found.until)
                return _widened(moved, offset, start + found.until, align, most_bytes)
        return ranges_of([], end)

    def read_ranges(self, ranges: Ranges, buffer: Buffer) -> None:
        """Read ranges, each from the disks that it lies in."""
        with memoryview(buffer) as view:
            view[: ranges.packed] = bytes(ranges.packed)
            for source, start in zip(self._sources, self._starts, strict=True):
                _read_clipped(source, ranges, view, Range(start, source.size), -start)


def one_disk(sources: Sequence[Source]) -> Source:
    """The only one of the disks, or all of them one behind the other."""
    return sources[0] if len(sources) == 1 else Joined(sources)


class Part:
    """Bytes ``[start, start + size)`` of a disk: a :class:`Source`. The disk stays the caller's."""

    def __init__(self, source: Source, start: int, size: int) -> None:
        if not 0 <= start <= start + size <= source.size:
            message = f"[{start}, {start + size}) reaches outside the disk of {source.size} bytes"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=source.path, op="access")
        self._source = source
        self._start = start
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of the part."""
        return self._size

    @property
    def path(self) -> str:
        """The name for messages."""
        return self._source.path

    @property
    def disk_map(self) -> Part:
        """The map."""
        return self

    def data_ranges(self, offset: int, end: int, *, gap: int = 0, align: int = 1, most_bytes: int) -> Ranges:
        """See :class:`Mapped`."""
        start = self._start
        last = start + min(end, self._size)
        found = self._source.disk_map.data_ranges(offset + start, last, gap=gap, most_bytes=max(1, most_bytes))
        moved = [Range(at - start, length) for at, length in found]
        if align == 1:
            return ranges_of(moved, found.until - start)
        return _widened(moved, offset, found.until - start, align, most_bytes)

    def read_ranges(self, ranges: Ranges, buffer: Buffer) -> None:
        """Read ranges; past the end of the part there are zeros."""
        with memoryview(buffer) as view:
            view[: ranges.packed] = bytes(ranges.packed)
            _read_clipped(self._source, ranges, view, Range(0, self._size), self._start)


def _read_clipped(source: Source, ranges: Ranges, view: memoryview, there: Range, shift: int) -> None:
    """Fill in what of the ranges lies in `there`, whose bytes a disk has `shift` bytes further behind."""
    mine: list[Range] = []
    packed_at = at = 0
    for offset, length in ranges:
        low, high = max(offset, there.offset), min(offset + length, there.end)
        if low < high:
            if not mine:
                packed_at = at + low - offset
            mine.append(Range(low + shift, high - low))
        at += length
    if mine:  # they follow one another in the buffer
        total = sum(each.length for each in mine)
        source.read_ranges(ranges_of(mine, mine[-1].end), view[packed_at : packed_at + total])


def _widened(found: Sequence[Range], offset: int, until: int, align: int, most_bytes: int) -> Ranges:
    """Ranges from `offset` on, in whole multiples of `align` and of at most `most_bytes` in all."""
    wide: list[Range] = []
    room = most_bytes
    for each in found:
        start, stop = each.offset // align * align, -(-each.end // align) * align
        if wide and start < wide[-1].end:
            start = wide[-1].end
        if stop - start > room:
            return ranges_of(wide, start) if wide else ranges_of([Range(start, room)], start + room)
        if start < stop:
            wide.append(Range(start, stop - start))
            room -= stop - start
    last = max(until // align * align, wide[-1].end if wide else 0)
    if last <= offset:  # the disk ends before a whole unit does
        return ranges_of([Range(offset, align)], offset + align)
    return ranges_of(wide, last)


class Salvaged:
    """A disk of which what cannot be read reads as zeros: a :class:`Source`. `lost` has these ranges.

    Errors of the host, and damage of the image, are passed over; all others are raised.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._granule = max(_SALVAGED_BYTES, _least_granule(source) if isinstance(source, Image) else 0)
        self._lock = threading.Lock()
        self._lost: list[tuple[Range, ImageError]] = []

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._source.size

    @property
    def path(self) -> str:
        """The name for messages."""
        return self._source.path

    @property
    def disk_map(self) -> Salvaged:
        """The map."""
        return self

    @property
    def lost(self) -> list[tuple[Range, ImageError]]:
        """What could not be read, ascending, neighbours joined; each with the first error that was met there."""
        joined: list[tuple[Range, ImageError]] = []
        for found, error in sorted(self._lost, key=lambda each: each[0]):
            if joined and found.offset <= joined[-1][0].end:
                last, first = joined.pop()
                joined.append((Range(last.offset, max(last.end, found.end) - last.offset), first))
            else:
                joined.append((found, error))
        return joined

    def data_ranges(self, offset: int, end: int, *, gap: int = 0, align: int = 1, most_bytes: int) -> Ranges:
        """What has no map is taken for data, which the reading of it will show."""
        try:
            return self._source.disk_map.data_ranges(offset, end, gap=gap, align=align, most_bytes=most_bytes)
        except ImageError as error:
            _require_passable(error)
        step = min(most_bytes, max(align, WINDOW_BYTES // align * align), end - offset)
        return ranges_of([Range(offset, step)], offset + step)

    def read_ranges(self, ranges: Ranges, buffer: Buffer) -> None:
        """Read ranges; what cannot be read is narrowed down."""
        try:
            self._source.read_ranges(ranges, buffer)
        except ImageError as error:
            _require_passable(error)
        else:
            return
        with memoryview(buffer) as view:
            at = 0
            for each in ranges:
                self._read(each, view[at : at + each.length])
                at += each.length

    def _read(self, wanted: Range, view: memoryview) -> None:
        at, step = wanted.offset, wanted.length
        while at < wanted.end:
            step = min(step, wanted.end - at)
            part = view[at - wanted.offset : at - wanted.offset + step]
            try:
                self._source.read_ranges(ranges_of([Range(at, step)], at + step), part)
            except ImageError as error:
                _require_passable(error)
                found = self._after(Range(at, step), error)
                if not found.lost:
                    step = found.end - at
                    continue
                step = min(found.end, wanted.end) - at
                view[at - wanted.offset : at - wanted.offset + step] = bytes(step)
                with self._lock:
                    self._lost.append((Range(at, step), error))
            at += step
            step *= 2

    def _after(self, failed: Range, error: ImageError) -> _Next:
        """What is known of a range whose reading has failed: from its start on it is lost, or to be read in parts."""
        if error.kind is ErrorKind.CORRUPT and isinstance(self._source, Image):
            broken, until = self._source.disk_map.look(failed.offset)
            if broken or until < failed.end:
                return _Next(broken, until)
        # A map that is right leads to data that is not, by the granule. What a host cannot read is smaller.
        least = self._granule if error.kind is ErrorKind.CORRUPT else _SALVAGED_BYTES
        if failed.length > least or failed.offset // least < (failed.end - 1) // least:
            return _Next(False, _middle(failed, least))
        return _Next(True, failed.end)


class _Next(NamedTuple):
    """The range from where a reading has failed to `end`, which is `lost`, or is read next."""

    lost: bool
    end: int


def _middle(whole: Range, least: int) -> int:
    """Where to divide a range: at a multiple of the smallest piece."""
    middle = (whole.offset + whole.length // 2) // least * least
    if middle <= whole.offset:
        middle = min(whole.end, whole.offset // least * least + least)
    return middle


def _least_granule(image: Image) -> int:
    """The smallest piece, in bytes, that any image of the chain maps on its own; 0 where none has a map."""
    mapped = [layer.driver.geometry for layer in image.layers if not layer.driver.geometry.identity]
    return min((geometry.granule for geometry in mapped), default=0)


def _require_passable(error: ImageError) -> None:
    if error.kind not in {ErrorKind.IO, ErrorKind.CORRUPT}:
        raise error
