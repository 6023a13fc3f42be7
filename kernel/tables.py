"""Tables of a format for the engine: their layout and places, from a driver's description to the engine's structure."""

from __future__ import annotations

import os
from array import array

from tapfs.errors import from_os_error
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import EngineDisk
from tapfs.tables import GuardedPlaces, TableLayout

#: Fields of a layout that the engine's structure holds in another shape.
_OF_THEIR_OWN = frozenset({"rules", "bitmap", "reserved"})


def set_tables(disk: EngineDisk, layer: int, layout: TableLayout, places: array[int]) -> None:
    """Have the engine read the maps of a layer from its tables; `places` are those of all map units, in order.

    Before any request. Raises ImageError(io) for a layout that the engine cannot read.
    """
    table = ffi.new("tapfs_table *")
    for name in layout.__match_args__:
        if name not in _OF_THEIR_OWN:
            setattr(table, name, getattr(layout, name))
    table.rule_count = len(layout.rules)
    for index, rule in enumerate(layout.rules):
        kind = lib.TAPFS_RULE_ASK if rule.kind is None else rule.kind
        table.rules[index].mask, table.rules[index].value, table.rules[index].kind = rule.mask, rule.value, kind
    if layout.bitmap is not None:
        for part in layout.bitmap.__match_args__:
            setattr(table.bitmap, part, getattr(layout.bitmap, part))
    for index, (start, end) in enumerate(layout.reserved):
        table.reserved_start[index], table.reserved_end[index] = start, end
    with ffi.from_buffer("uint64_t[]", places) as words:
        result = lib.tapfs_disk_set_tables(disk.handle, layer, table, words, len(places))
    _check(result, "describe the tables")


def set_places(disk: EngineDisk, layer: int, first: int, places: array[int], host_size: int) -> None:
    """The places of the tables of the map units from `first` on, and the length of the host files, from now on."""
    with ffi.from_buffer("uint64_t[]", places) as words:
        result = lib.tapfs_disk_set_places(disk.handle, layer, first, words, len(places), host_size)
    _check(result, "say where the tables are")


def guard(disk: EngineDisk, places: GuardedPlaces) -> None:
    """Have no write in place go over these places of the top layer's first file, from now on."""
    ranges = ffi.new("tapfs_range[]", [(start, stop - start) for start, stop in places.ranges])
    count, size = len(places.places), places.size
    # An error keeps this frame, and the driver changes its array again: the hold on it ends here.
    with ffi.from_buffer("uint64_t[]", places.places) as words:
        result = lib.tapfs_disk_guard(disk.handle, 0, ranges, len(ranges), words, count, size)
    _check(result, "guard the metadata")


def _check(result: int, op: str) -> None:
    if result < 0:
        raise from_os_error(OSError(-result, os.strerror(-result)), path=None, op=op)
