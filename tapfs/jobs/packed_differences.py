"""Write what differs between two disks into an image that reads as one of them, packed: `rebase -c`, `convert -c -B`.

Threads read, compare and pack; the caller's thread appends, in the order of the disk. Zeros come last, by ordinary
writes, because the stream of packed units and those do not go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tapfs.extent import Range
from tapfs.jobs.compare import unequal_candidates
from tapfs.jobs.copying import CopyOptions
from tapfs.jobs.pace import Pace
from tapfs.jobs.pipeline import BufferPool
from tapfs.jobs.range_copy import Run, Window, difference, each_in_order, window_bytes, windows, write_hiding
from tapfs.kernel.engine import compress

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.jobs.sources import Source


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


def append_differences(
    source: Source,
    other: Source | None,
    target: Image,
    runs: Iterable[Run],
    pace: Pace,
    progress: Callable[[int, int], None],
    *,
    threads: int | None = None,
) -> int:
    """Have `target` hold the bytes of `source` in the runs wherever `other` has others; how many bytes were written.

    `other` None is a disk of zeros. The runs are aligned to packed units of which `target` itself holds nothing; it
    may be `source` or `other`, too. Raises ImageError(unsupported) for an image that takes no packed units any more.
    """
    stream = target.packed_appender()
    unit, codec = stream.granule, stream.codec
    buffers = BufferPool(window_bytes(unit))

    def prepare(window: Window) -> _Packed:
        found = difference(source, other, window, unit, buffers)
        contents = [(at, piece.ljust(unit, b"\0")) for at, piece in found.segments.pieces(unit)]
        buffers.give_back(found.buffer)
        units = [_Unit(at, content, compress(codec, content, unit)[0]) for at, content in contents]
        return _Packed(window.until, units, found.zeros)

    zeros: list[Range] = []
    count = 0
    for packed in each_in_order(windows(runs, unit), prepare, threads):
        for each in packed.units:
            if each.payload is None:
                stream.write_plain(each.offset, each.content)
            else:
                stream.write_compressed(each.offset, each.payload)
            count += unit
            pace.moved(unit)
        zeros += packed.zeros
        progress(packed.until, target.size)
    stream.finish()
    return count + sum(write_hiding(target, each) for each in zeros)


def pack_over_parent(
    source: Source, target: Image, progress: Callable[[int, int], None], options: CopyOptions | None = None
) -> None:
    """Pack what `source` has otherwise than the parent of `target`, a new image that holds nothing yet."""
    options = options or CopyOptions()
    unit = target.layers[0].driver.geometry.packed_unit
    runs = _candidates(source, target, unit)
    append_differences(source, target, target, runs, Pace(options.rate), progress, threads=options.workers)


def _candidates(source: Source, target: Image, unit: int) -> Iterator[Run]:
    """What is not known to be zeros in both, in whole units."""
    start = end = 0
    for ranges in unequal_candidates(source, target):
        for offset, length in ranges:
            first, last = offset // unit * unit, min(-(-(offset + length) // unit) * unit, target.size)
            if first > end:
                if end > start:
                    yield Run(start, end - start)
                start = first
            end = max(end, last)
            if end - start >= window_bytes(unit):
                yield Run(start, end - start)
                start = end
    if end > start:
        yield Run(start, end - start)
