"""Write what differs between two parents into an image over the first of them, packed: `tapfs rebase -c`.

Threads read, compare and pack; the caller's thread appends, in the order of the disk. Zeros come last, by ordinary
writes, because the stream of packed units and those do not go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from tapfs.extent import Range
from tapfs.jobs.pipeline import BufferPool
from tapfs.jobs.range_copy import Run, Window, difference, each_in_order, window_bytes, windows, write_hiding
from tapfs.kernel.engine import compress

if TYPE_CHECKING:
    from tapfs.disk.image import Image


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
        found = difference(old, new, window, unit, buffers)
        contents = [(at, piece.ljust(unit, b"\0")) for at, piece in found.segments.pieces(unit)]
        buffers.give_back(found.buffer)
        units = [_Unit(at, content, compress(codec, content, unit)[0]) for at, content in contents]
        return _Packed(window.until, units, found.zeros)

    zeros: list[Range] = []
    count = 0
    for packed in each_in_order(windows(runs, unit), prepare):
        for each in packed.units:
            if each.payload is None:
                stream.write_plain(each.offset, each.content)
            else:
                stream.write_compressed(each.offset, each.payload)
            count += unit
        zeros += packed.zeros
        progress(packed.until, old.size)
    stream.finish()
    return count + sum(write_hiding(old, each) for each in zeros)
