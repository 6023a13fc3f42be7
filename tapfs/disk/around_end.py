"""The map of a unit in a file that was cut: of what lies over the end of the file the part that is there is data.

Only a chain that is opened for what is left of it (`OpenOptions.cut`) has such a map. Its drivers map what the end of
the file cuts, and what lies behind the end is BROKEN here, so that a read of it is an error and not zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer

#: The part that is there is read in whole pieces of so many bytes.
_SECTOR = 512


def around_end(layer: Layer, extents: list[Extent], wanted: int) -> list[Extent]:
    """The extents, BROKEN where data of the disk lies behind the end of its file.

    Raises ImageError(corrupt) if that is so at byte `wanted` of the disk.
    """
    if not layer.files.cut:
        return extents
    found: list[Extent] = []
    for extent in extents:
        for piece in _pieces(layer, extent):
            if piece.kind is Kind.BROKEN and piece.offset <= wanted < piece.end:
                file = layer.files[extent.file]
                place = extent.host_offset + piece.offset - extent.offset
                message = f"the file was cut: it ends at {file.size():#x}, and data of the disk lies behind that"
                raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=place, op="map")
            found.append(piece)
    return found


def _pieces(layer: Layer, extent: Extent) -> Iterator[Extent]:
    geometry = layer.driver.geometry
    if extent.kind is Kind.DATA:
        there = layer.files[extent.file].size() - extent.host_offset
        if there < min(extent.end, geometry.virtual_size) - extent.offset:
            sector = max(_SECTOR, 0 if geometry.cipher is None else geometry.cipher.sector_bytes)
            there = max(0, there // sector * sector)
            if there:
                yield extent._replace(length=there)
            yield Extent(extent.offset + there, extent.length - there, Kind.BROKEN)
            return
    yield extent
