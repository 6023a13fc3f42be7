"""Give every cluster of a range of a qcow2 disk its place (`tapfs resize --preallocation`).

The range was just added to the disk and reads as zeros. Its clusters get places at the end of the file, which read as
zeros there; before an entry leads to one, what of it lay inside the file before is zeroed, and space that was asked for
is taken. So a crash leaves some of the range without places, and all of it reads as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.driver import Placement
from tapfs.extent import Kind, Range, clip
from tapfs.formats.preallocation import FALLOC, FULL, METADATA, space_stages
from tapfs.formats.qcow2.writer import WritableQcow2Driver
from tapfs.formats.rounding import round_up
from tapfs.plan import Grow, Plan, Step, plan

#: Metadata in memory that is worth a flush.
_FLUSH_BYTES = 4 << 20
#: So much of the disk is placed at a time.
_PIECE_BYTES = 1 << 30


def preallocations(image: WritableQcow2Driver) -> tuple[str, ...]:
    """The modes that the image can have: without zeros of its own the new disk of a cipher would be noise."""
    if image.encryption is not None:
        return (FULL,)
    if image.data_number:  # in a raw data file every cluster has its place; elsewhere it may hold anything
        return (METADATA, FALLOC, FULL) if image.header.has_raw_data_file else (FULL,)
    return METADATA, FALLOC, FULL


def preallocate(image: WritableQcow2Driver, mode: str, start: int, stop: int) -> Iterator[Plan]:
    """The plans for ``[start, stop)`` of the disk, which reads as zeros and ends at `stop`."""
    if image.data_number:
        yield plan(*space_stages(mode, image.data_number, start, stop - start))
        return
    size = image.header.cluster_size
    at, end = round_up(start, size), round_up(stop, size)
    while at < end:
        length = min(_PIECE_BYTES, end - at)
        inside = min(at + length, image.size) - at
        for extent in list(clip(image.map(at, inside), at, length)):
            # A part of a cluster with subclusters takes the whole of it.
            first, last = extent.offset // size * size, round_up(extent.end, size)
            if extent.kind in (Kind.UNALLOCATED, Kind.ZERO) and first >= at:
                yield from _placed(image, mode, Range(first, last - first))
                at = max(at, last)
            else:
                at = max(at, round_up(extent.end, size))
        if image.unflushed_bytes > _FLUSH_BYTES:
            yield from image.flushed_plan()
    yield from image.flushed_plan()


def _placed(image: WritableQcow2Driver, mode: str, wanted: Range) -> Iterator[Plan]:
    pieces = list(image.pieces(wanted.offset, wanted.length, used=False))
    image.require_runs(pieces)
    image.keep_tables(pieces)
    place = image.space.take_tail(wanted.length, alignment=image.header.cluster_size)
    image.ensure_counts(place, wanted.length)
    # What lies inside the file as it is may hold anything.
    stale = min(max(0, image.file.size() - place), wanted.length)
    grown: list[Step] = [Grow(0, place + wanted.length)]
    yield plan(
        grown, *space_stages(FULL, 0, place, stale), *space_stages(mode, 0, place + stale, wanted.length - stale)
    )
    image.link([Placement(wanted.offset, wanted.length, place, fresh=True)])
    image.note_growth()
    image.take_metadata()
