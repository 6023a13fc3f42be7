"""The files that damaged ranges of a disk belong to, in each partition; and the ranges that an image cannot map.

Nothing is mounted and nothing is written. What a reader of a file system does not understand is told with the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range, merge_runs, without
from tapfs.partitions.owners.by_type import Owners, owners_of
from tapfs.partitions.reader import Reader

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.findings import CheckReport

#: Pieces in which a map is looked at: the span grows where all is well, and shrinks down to a granule where not.
_FIRST_SPAN = 64 << 20
#: Ranges that are kept; a disk without a table would have as many as clusters.
_MOST_RANGES = 10_000


class DamagedPart(NamedTuple):
    """One partition, file system or gap of a disk, and what of the ranges lies in it, in bytes of the disk.

    `partition`: its number, None for the whole disk, or for what lies in none. `type`: of its file system, if known.
    """

    partition: int | None
    type: str | None
    found: Owners


def files_in(image: Image, ranges: Iterable[Range], *, sector_size: int | None = None) -> list[DamagedPart]:
    """The owners of ranges of a disk, in the order of its partitions. `sector_size` as for `Image.contents`.

    Raises the ImageError of the disk but for io and corrupt, which become notes.
    """
    wanted = joined_ranges(ranges, image.size)
    contents = image.contents(sector_size=sector_size)
    disk = Reader(image.read, image.size)
    notes = list(contents.table.notes)
    parts: list[DamagedPart] = []
    rest = wanted
    places: list[tuple[int | None, int, int, str | None]] = [
        (each.number, each.start, each.size, None if each.file_system is None else each.file_system.type)
        for each in contents.table.partitions
        if not each.container
    ]
    if contents.file_system is not None and not places:
        places.append((None, 0, image.size, contents.file_system.type))
    for number, start, size, kind in places:
        inside = [Range(each.offset - start, each.length) for each in _within(wanted, start, size)]
        rest = [piece for each in rest for piece in _outside(each, start, start + size)]
        if not inside:
            continue
        if kind is None:
            found = Owners([], inside, ["nothing in it shows what it is"])
        else:
            found = owners_of(disk.window(start, min(size, image.size - start)), kind, inside)
        moved = [owner._replace(range=_moved(owner.range, start)) for owner in found.owners]
        unowned = [_moved(each, start) for each in found.unowned]
        parts.append(DamagedPart(number, kind, Owners(moved, unowned, found.notes)))
    if rest:
        parts.append(DamagedPart(None, None, Owners([], rest, notes)))
    return parts


def unreadable_ranges(image: Image) -> list[Range]:
    """The ranges of a disk whose place the image cannot tell, because its metadata is damaged."""
    found: list[Range] = []
    granule = max(image.granule, 512)
    offset, span = 0, _FIRST_SPAN
    while offset < image.size and len(found) < _MOST_RANGES:
        end = min(offset + span, image.size)
        try:
            until = image.disk_map.data_ranges(offset, end, most_bytes=end - offset).until
        except ImageError as error:
            if error.kind not in {ErrorKind.IO, ErrorKind.CORRUPT}:
                raise
            if end - offset > granule:
                span = max((end - offset) // 2 // granule * granule, granule)
                continue
            found.append(Range(offset, end - offset))
            offset = end
        else:
            offset = until
            span = min(span * 2, _FIRST_SPAN)
    return joined_ranges(found, image.size)


def ranges_of_findings(image: Image, report: CheckReport, unreadable: Sequence[Range]) -> list[Range]:
    """The ranges of the disk whose bytes lie in the clusters of the image file that a check has found at fault.

    What is `unreadable` has no place there.
    """
    places = sorted({found.host_offset for found in report.findings if found.host_offset is not None})
    if not places:
        return []
    granule = max(image.granule, 1)
    found: list[Range] = []
    readable = without([(0, image.size)], unreadable)
    for extent in chain.from_iterable(image.extents(*each) for each in readable):
        if extent.host_offset is None or extent.depth or len(found) >= _MOST_RANGES:
            continue
        for place in places:
            inside = place - extent.host_offset
            if 0 <= inside < extent.length:
                start = extent.offset + inside // granule * granule
                found.append(Range(start, min(granule, extent.end - start)))
    return joined_ranges(found, image.size)


def joined_ranges(ranges: Iterable[Range], end: int) -> list[Range]:
    """Ranges in their order, neighbours and what overlaps joined, and cut off at the end of the disk."""
    cut = (Range(each.offset, min(each.end, end) - each.offset) for each in ranges if each.offset < end)
    return list(merge_runs(sorted(each for each in cut if each.length > 0), _joined))


def _joined(left: Range, right: Range) -> Range | None:
    return Range(left.offset, max(left.end, right.end) - left.offset) if left.end >= right.offset else None


def _within(ranges: Sequence[Range], start: int, size: int) -> Iterator[Range]:
    for each in ranges:
        low, high = max(each.offset, start), min(each.end, start + size)
        if low < high:
            yield Range(low, high - low)


def _outside(each: Range, start: int, end: int) -> Iterator[Range]:
    if each.offset < min(each.end, start):
        yield Range(each.offset, min(each.end, start) - each.offset)
    if max(each.offset, end) < each.end:
        low = max(each.offset, end)
        yield Range(low, each.end - low)


def _moved(each: Range, by: int) -> Range:
    return Range(each.offset + by, each.length)
