"""The map of a unit where metadata was laid over the host files: guest data does not lie in what only drivers see.

A journal that waits and a salvage (`LocalFiles.lay_over`) change what drivers read, and the engine reads the files
themselves. So data in such a place cannot be true. It costs the granules that it lies in and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer


def around_patch(layer: Layer, extents: list[Extent], wanted: int) -> list[Extent]:
    """The extents, BROKEN where guest data lies in what was laid over the files of a layer.

    Raises ImageError(corrupt) if that is so at byte `wanted` of the disk.
    """
    if not layer.files.patched:
        return extents
    hidden = {number: layer.files.hidden_ranges(number) for number in range(len(layer.files))}
    found = [piece for extent in extents for piece in _pieces(layer, extent, hidden[extent.file])]
    for piece, extent in found:
        if piece.kind is Kind.BROKEN and piece.offset <= wanted < piece.end:
            file = layer.files[extent.file]
            place = extent.host_offset + (0 if extent.kind is Kind.COMPRESSED else piece.offset - extent.offset)
            what = "the image's journal" if layer.files.salvage is None else "a table that was rebuilt"
            stop = place + (extent.host_length if extent.kind is Kind.COMPRESSED else piece.end - piece.offset)
            problem = "behind the end of the file" if stop > file.size() else f"where {what} has metadata"
            raise ImageError(
                ErrorKind.CORRUPT,
                f"guest data {problem}",
                path=file.path,
                offset=place,
                op="map",
                remedy="run tapfs repair on a copy, which replays the journal" if layer.files.salvage is None else None,
            )
    return [piece for piece, _ in found]


def _pieces(layer: Layer, extent: Extent, hidden: list[tuple[int, int]]) -> Iterator[tuple[Extent, Extent]]:
    """The parts of an extent, those that cannot be true BROKEN; each with the extent."""
    geometry = layer.driver.geometry
    if extent.kind is Kind.COMPRESSED:
        yield _packed(extent, hidden), extent
        return
    if extent.kind is not Kind.DATA:
        yield extent, extent
        return
    shift = extent.offset - extent.host_offset
    last = min(extent.end, geometry.virtual_size)
    bad = sorted(
        (max(start + shift, extent.offset), min(stop + shift, last))
        for start, stop in hidden
        if start + shift < last and extent.offset < stop + shift
    )
    at = extent.offset
    for start, end in bad:
        first = max(at, start // geometry.granule * geometry.granule)
        stop = min(-(-end // geometry.granule) * geometry.granule, extent.end)
        if first >= stop:
            continue
        if at < first:
            yield _part(extent, at, first), extent
        yield Extent(first, stop - first, Kind.BROKEN), extent
        at = stop
    if at < extent.end:
        yield _part(extent, at, extent.end), extent


def _packed(extent: Extent, hidden: list[tuple[int, int]]) -> Extent:
    """A packed extent: what an entry says of its length is the most that it may have, and the file may end before."""
    start, end = extent.host_offset, extent.host_offset + extent.host_length
    for first, stop in hidden:
        if start < stop and first < end:
            if first <= start:
                return Extent(extent.offset, extent.length, Kind.BROKEN)
            end = first
    return extent._replace(host_length=end - start)


def _part(extent: Extent, start: int, stop: int) -> Extent:
    return extent._replace(offset=start, length=stop - start, host_offset=extent.host_offset + start - extent.offset)
