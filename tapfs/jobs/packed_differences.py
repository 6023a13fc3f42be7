"""Write what differs between two parents into an image over the first of them, packed: `tapfs rebase -c`.

Threads read, compare and pack; the caller's thread appends, in the order of the disk. Zeros come last, by ordinary
writes, because the stream of packed units and those do not go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tapfs.extent import Range
from tapfs.jobs.pipeline import BufferPool, in_order, processors
from tapfs.jobs.range_copy import Run, Window, window_bytes, windows
from tapfs.kernel.engine import compress
from tapfs.kernel.segments import find_segments

if TYPE_CHECKING:
    from tapfs.disk.image import Image

#: Windows that wait to be appended while each thread packs another one.
_WAITING = 2


class _Unit(NamedTuple):
    """A packed unit with data: where it is in the disk, its bytes, and its payload, None if it did not shrink."""

    offset: int
    content: bytes
    payload: bytes | None


class _Packed(NamedTuple):
    """A window that was read and packed."""

    until: int
    units: list[_Unit]
    zeros: list[Range]


def append_differences(old: Image, new: Image | None, runs: Iterable[Run], progress: Callable[[int, int], None]) -> int:
    """Have `old` hold its bytes in the runs wherever `new` has others, packed; how many bytes of data were written.

    The runs are aligned to packed units of which `old` itself holds nothing. Raises ImageError(unsupported) for an
    image that takes no packed units any more.
    """
    stream = old.packed_appender()
    unit, codec = stream.granule, stream.codec
    buffers = BufferPool(window_bytes(unit))

    def prepare(window: Window) -> _Packed:
        buffer, below = buffers.take(), buffers.take() if new is not None else None
        try:
            old.read_ranges(window.ranges, buffer)
            if new is not None and below is not None:
                new.read_ranges(window.ranges, below)
            segments, zeros = find_segments(window.ranges, buffer, unit, below)
            places = _places(window)
            with memoryview(buffer) as view:
                contents = [
                    (at, bytes(view[places(at) : places(at) + min(unit, offset + length - at)]).ljust(unit, b"\0"))
                    for offset, length in segments.ranges()
                    for at in range(offset, offset + length, unit)
                ]
        finally:
            buffers.give_back(buffer)
            if below is not None:
                buffers.give_back(below)
        units = [_Unit(at, content, compress(codec, content, unit)[0]) for at, content in contents]
        return _Packed(window.until, units, zeros)

    zeros: list[Range] = []
    count = 0
    for packed in _in_order(windows(runs, unit), prepare):
        for each in packed.units:
            if each.payload is None:
                stream.write_plain(each.offset, each.content)
            else:
                stream.write_compressed(each.offset, each.payload)
            count += unit
        zeros += packed.zeros
        progress(packed.until, old.size)
    stream.finish()
    return count + _write_zeros(old, zeros)


def _in_order(found: Iterable[Window], prepare: Callable[[Window], _Packed]) -> Iterator[_Packed]:
    workers = processors()
    return in_order(found, prepare, workers=workers, ahead=workers + _WAITING)


def _places(window: Window) -> Callable[[int], int]:
    """Where in the buffer of a window, which holds the ranges one behind the other, a byte of the disk is."""
    starts: list[tuple[int, int, int]] = []
    packed = 0
    for offset, length in window.ranges:
        starts.append((offset, offset + length, packed - offset))
        packed += length

    def place(at: int) -> int:
        return at + next(shift for start, stop, shift in starts if start <= at < stop)

    return place


def _write_zeros(target: Image, zeros: Iterable[Range]) -> int:
    """Write zeros as the target has them; as data where its own entries for zeros would show a later parent."""
    written = 0
    for offset, length in zeros:
        if len(target.layers) > 1:
            target.write_zeroes(offset, length)
        else:
            target.write(offset, bytes(length))
            written += length
    return written
