"""The items of metadata that change with the parent: a new parent locator, another one, or none.

What changes is a list of ``(host offset, bytes)``, for one entry of the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.rounding import round_up
from tapfs.formats.vhdx.metadata import (
    COUNT_AT,
    DISK_ID,
    ENTRIES_AT,
    ENTRY,
    FILE_PARAMETERS,
    HAS_PARENT,
    LOCATOR,
    MAX_ENTRIES,
    REQUIRED,
    TABLE_BYTES,
    USER,
    Item,
    item_place,
    read_items,
)

if TYPE_CHECKING:
    from tapfs.driver import HostFile

#: The offset of the flags in the file parameters.
_FLAGS_AT = 4

Changes = list[tuple[int, bytes]]


def with_locator(file: HostFile, region: Range, locator: bytes, disk_id: bytes) -> Changes:
    """What changes where the image gets this parent locator, and the identity of its parent's disk.

    Raises ImageError: out_of_bounds where the metadata have no room, corrupt.
    """
    items = read_items(file, region)
    index = _locator_index(items)
    at = _room_for(len(locator), items, index, region, file.path)
    changes: Changes = [(at, locator), (item_place(file, region, DISK_ID).offset, disk_id)]
    flags = REQUIRED
    if index is None:
        index = len(items)
        changes.append((region.offset + COUNT_AT, (index + 1).to_bytes(2, "little")))
    else:
        flags = items[index].flags
    entry = ENTRY.pack(LOCATOR, at - region.offset, len(locator), flags)
    return [*changes, (_entry_at(region, index), entry), _flags(file, region, has_parent=True)]


def without_locator(file: HostFile, region: Range) -> Changes:
    """What changes where the image has no parent any more. Raises ImageError(corrupt)."""
    items = read_items(file, region)
    index = _locator_index(items)
    changes: Changes = []
    if index is not None:
        start, stop = _entry_at(region, index), _entry_at(region, len(items))
        behind = file.read(start + ENTRY.size, stop - start - ENTRY.size)
        changes.append((start, behind.ljust(stop - start, b"\0")))
        changes.append((region.offset + COUNT_AT, (len(items) - 1).to_bytes(2, "little")))
    return [*changes, _flags(file, region, has_parent=False)]


def _flags(file: HostFile, region: Range, *, has_parent: bool) -> tuple[int, bytes]:
    at = item_place(file, region, FILE_PARAMETERS).offset + _FLAGS_AT
    flags = int.from_bytes(file.read(at, 4), "little")
    return at, (flags | HAS_PARENT if has_parent else flags & ~HAS_PARENT).to_bytes(4, "little")


def _entry_at(region: Range, index: int) -> int:
    return region.offset + ENTRIES_AT + index * ENTRY.size


def _locator_index(items: list[Item]) -> int | None:
    """Where in the table the parent locator stands."""
    found = (index for index, item in enumerate(items) if item.name == LOCATOR and not item.flags & USER)
    return next(found, None)


def _room_for(length: int, items: list[Item], index: int | None, region: Range, path: str) -> int:
    """The host offset for a locator: behind all items, or where the old one is, if it is no longer than that."""
    if index is None and len(items) == MAX_ENTRIES:
        message = f"the table of the metadata has {MAX_ENTRIES} items, and no room for a parent locator"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="rebase")
    end = max((item.place.end for item in items if item.place.length), default=region.offset + TABLE_BYTES)
    behind = round_up(end, 8)
    if behind + length <= region.end:
        return behind
    if index is not None and length <= items[index].place.length:
        return items[index].place.offset
    message = f"the metadata have no room for a parent locator of {length} bytes"
    raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="rebase", remedy="give a shorter name")
