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
    start, end, piece = _unit(driver, wanted)
    at = start + (wanted - start) // piece * piece
    driver.map(at, min(piece, end - at))
    return list(merge(_pieces(driver, start, end, piece)))


def unit_with_faults(driver: Driver, wanted: int) -> list[Extent]:
    """The map of the unit that holds byte `wanted` of the disk, BROKEN where the driver has none, there, too."""
    return list(merge(_pieces(driver, *_unit(driver, wanted))))


def _unit(driver: Driver, wanted: int) -> tuple[int, int, int]:
    """The start and end of the unit, and the length of the smallest pieces that it is divided into."""
    geometry = driver.geometry
    unit, granule = geometry.map_unit, geometry.granule
    piece = max(granule, geometry.packed_unit)
    while unit // piece > _PIECES:
        piece *= 2
    start = wanted // unit * unit
    return start, min(start + unit, geometry.virtual_size), piece


def _pieces(driver: Driver, start: int, end: int, piece: int) -> list[Extent]:
    granule = driver.geometry.granule
    length = -(-(end - start) // granule) * granule
    try:
        return list(clip(driver.map(start, end - start), start, length))
    except ImageError as error:
        if error.kind not in PASSABLE:
            raise
    if end - start <= piece or _is_one_fault(driver, start, end, piece):
        return [Extent(start, length, Kind.BROKEN)]
    middle = start + max(piece, (end - start) // 2 // piece * piece)
    return _pieces(driver, start, middle, piece) + _pieces(driver, middle, end, piece)


def _is_one_fault(driver: Driver, start: int, end: int, piece: int) -> bool:
    """Whether one entry of a table is what is wrong with the first and the last piece, and so with all between."""
    last = start + (end - start - 1) // piece * piece
    first = _fault(driver, start, piece)
    return first is not None and first == _fault(driver, last, end - last)


def _fault(driver: Driver, start: int, length: int) -> tuple[str, int] | None:
    """What the driver says of the place on the host that is wrong in a range; None: nothing, or no place."""
    try:
        driver.map(start, length)
    except ImageError as error:
        if error.kind not in PASSABLE:
            raise
        return None if error.offset is None else (error.message, error.offset)
    return None
