"""The laws of maps, as `tapfs.extent` states them, for any driver and any range."""

from __future__ import annotations

from itertools import pairwise

from tapfs.driver import Driver
from tapfs.extent import Extent, Kind, clip, joinable
from tapfs.testing.subject import require


def check_map(driver: Driver, offset: int, length: int) -> list[Extent]:
    """The map of a range inside the disk. Raises ViolationError where it breaks a law."""
    geometry = driver.geometry
    extents = driver.map(offset, length)
    where = f"map({offset}, {length})"
    require(bool(extents), f"{where} is empty")
    require(extents[0].offset <= offset, f"{where} begins at {extents[0].offset}")
    require(extents[-1].end >= offset + length, f"{where} ends at {extents[-1].end}")
    granule = geometry.granule
    last = -(-geometry.virtual_size // granule) * granule
    require(
        extents[-1].end <= last, f"{where} reaches to {extents[-1].end}, past the last granule, which ends at {last}"
    )
    for extent in extents:
        require(extent.length > 0, f"{where} has an empty extent at {extent.offset}")
        require(extent.kind in tuple(Kind)[: Kind.BROKEN], f"{where} has an extent of kind {extent.kind!r}")
        if extent.kind is Kind.COMPRESSED:
            require(extent.host_length > 0, f"{where}: the compressed extent at {extent.offset} has no payload")
            require(not extent.in_place, f"{where}: the compressed extent at {extent.offset} is in place")
        else:
            require(extent.host_length == 0, f"{where}: the extent at {extent.offset} has a payload")
        if extent.kind in (Kind.DATA, Kind.COMPRESSED):
            require(extent.host_offset >= 0, f"{where}: the extent at {extent.offset} is at {extent.host_offset}")
    for left, right in pairwise(extents):
        require(left.end == right.offset, f"{where}: {left.end} is followed by {right.offset}")
        require(not joinable(left, right), f"{where}: the extents at {left.offset} and {right.offset} are one")
    return extents


def check_split(driver: Driver, offset: int, length: int) -> None:
    """Two maps of the halves say what the map of the whole says."""
    middle = offset + length // 2
    if not offset < middle < offset + length:
        return
    whole = check_map(driver, offset, length)
    for start, part in ((offset, middle - offset), (middle, offset + length - middle)):
        asked = _told(check_map(driver, start, part), start, part)
        require(
            asked == _told(whole, start, part),
            f"map({start}, {part}) differs from that part of map({offset}, {length})",
        )


def _told(extents: list[Extent], offset: int, length: int) -> list[Extent]:
    """What extents say of a range; where no bytes are read from, the host offset says nothing."""
    told = clip(extents, offset, length)
    return [each if each.kind in (Kind.DATA, Kind.COMPRESSED) else each._replace(host_offset=0) for each in told]
