"""The map of a unit of which a driver cannot map all: what it can is mapped, the rest is marked as broken.

The engine's cache takes whole map units, of qcow2 for example 512 entries of an L2 table. One entry that cannot be
true must cost its own cluster and no other. So the unit is halved until the pieces that the driver refuses are small.
"""

from __future__ import annotations

from tapfs.driver import Driver
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, clip, merge

#: The kinds of errors by which a driver may refuse a part of a disk; any other is an error of the whole.
PASSABLE = frozenset({ErrorKind.CORRUPT, ErrorKind.DENIED})

#: The pieces of a unit are not made smaller than this part of it, so that a unit of nothing but faults has an end.
_PIECES = 4096


def unit_around_faults(driver: Driver, wanted: int) -> list[Extent]:
    """The map of the unit that holds byte `wanted` of the disk, BROKEN where the driver has none.

    Raises the driver's ImageError if it has none at `wanted` itself.
    """
    geometry = driver.geometry
    unit, granule = geometry.map_unit, geometry.granule
    piece = max(granule, geometry.packed_unit)
    while unit // piece > _PIECES:
        piece *= 2
    start = wanted // unit * unit
    end = min(start + unit, geometry.virtual_size)
    at = start + (wanted - start) // piece * piece
    driver.map(at, min(piece, end - at))
    return list(merge(_pieces(driver, start, end, piece)))


def _pieces(driver: Driver, start: int, end: int, piece: int) -> list[Extent]:
    granule = driver.geometry.granule
    length = -(-(end - start) // granule) * granule
    try:
        return list(clip(driver.map(start, end - start), start, length))
    except ImageError as error:
        if error.kind not in PASSABLE:
            raise
    if end - start <= piece:
        return [Extent(start, length, Kind.BROKEN)]
    middle = start + max(piece, (end - start) // 2 // piece * piece)
    return _pieces(driver, start, middle, piece) + _pieces(driver, middle, end, piece)
