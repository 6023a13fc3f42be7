"""MBR partition tables, with the chain of logical partitions, numbered as the Linux kernel does.

A table is the four entries of 16 bytes at byte 446 of a sector that ends in 55 aa. It counts in sectors
of the disk that it was made on, and nothing on the disk says how large these were. 512 bytes are assumed.
"""

from __future__ import annotations

import struct

from tapfs.partitions.reader import Reader
from tapfs.partitions.table import MAX_PARTITIONS, Partition, PartitionTable
from tapfs.partitions.type_names import MBR_TYPES
from tapfs.records import NamedTuple

SECTOR = 512

#: All tables, and their signatures, are in the first bytes of a sector of any size.
_TABLE_BYTES = 512
_SIGNATURE = b"\x55\xaa"
_ENTRIES_AT = 446
_DISK_SIGNATURE_AT = 440
#: Boot indicator, CHS of the start, type, CHS of the end, first sector, number of sectors.
_ENTRY = struct.Struct("<B3xB3xII")

_PROTECTIVE = 0xEE
_EXTENDED = {0x05, 0x0F, 0x85}
_BOOT_INDICATORS = {0x00, 0x80}
_FIRST_LOGICAL = 5
#: So many tables without a partition in a row end the chain, as in the kernel.
_MAX_EMPTY_TABLES = 100


class Entry(NamedTuple):
    """One entry of a table as it stands there: `sectors` sectors from sector `start`."""

    boot_indicator: int
    type: int
    start: int
    sectors: int

    @property
    def extended(self) -> bool:
        """Whether it holds further tables."""
        return self.type in _EXTENDED


def read_entries(disk: Reader, offset: int) -> list[Entry] | None:
    """The four entries of the table in the sector at `offset`; None if there is none."""
    sector = disk.read(offset, _TABLE_BYTES)
    if len(sector) < _TABLE_BYTES or sector[-2:] != _SIGNATURE:
        return None
    return [Entry(*fields) for fields in _ENTRY.iter_unpack(sector[_ENTRIES_AT : _ENTRIES_AT + 4 * _ENTRY.size])]


def end_of_entries(entries: list[Entry]) -> int:
    """The byte at which the last partition of a table ends, also one that reaches past the end of the disk."""
    used = [entry for entry in entries if entry.type and entry.boot_indicator in _BOOT_INDICATORS]
    return max(((entry.start + entry.sectors) * SECTOR for entry in used), default=0)


def is_protective(entries: list[Entry]) -> bool:
    """Whether the table says that a GPT follows."""
    return any(entry.type == _PROTECTIVE for entry in entries)


def read_mbr(disk: Reader, entries: list[Entry], sector_size: int = SECTOR) -> PartitionTable | None:
    """The partitions of the table in the first sector, whose `entries` these are, in sectors of so many bytes.

    None if that is no table: no partition in it, or something that is never a boot indicator.
    """
    if any(entry.boot_indicator not in _BOOT_INDICATORS for entry in entries) or not any(
        entry.sectors for entry in entries
    ):
        return None
    signature = int.from_bytes(disk.read(_DISK_SIGNATURE_AT, 4), "little")
    table = PartitionTable("mbr", sector_size, f"{signature:08x}")
    for number, entry in enumerate(entries, 1):
        if entry.sectors:
            table.add(_partition(table, number, entry, entry.start), disk.size)
    number = _FIRST_LOGICAL
    for entry in entries:
        if entry.extended and entry.sectors:
            number = _add_logical(disk, table, number, entry)
    table.clip(disk.size)
    return table


def _add_logical(disk: Reader, table: PartitionTable, number: int, container: Entry) -> int:
    """Follow a chain of tables; the result is the next free number.

    Partitions count from their own table, links from the container's start.
    """
    sector_size = table.sector_size or SECTOR
    at, span = container.start, container.sectors
    seen: set[int] = set()
    empty = 0
    while empty < _MAX_EMPTY_TABLES:
        if at in seen:
            table.note("the chain of logical partitions comes back to itself and is cut there")
            break
        seen.add(at)
        entries = read_entries(disk, at * sector_size)
        if entries is None:
            table.note(f"the chain of logical partitions is broken at sector {at}")
            break
        empty += 1
        for slot, entry in enumerate(entries):
            if not entry.sectors or entry.extended or (slot > 1 and not _plausible(entry, at, span, container)):
                continue
            if number > MAX_PARTITIONS:
                table.note("there are too many logical partitions; the rest is left out")
                return number
            table.add(_partition(table, number, entry, at + entry.start), disk.size)
            number += 1
            empty = 0
        link = next((entry for entry in entries if entry.extended and entry.sectors), None)
        if link is None:
            break
        at, span = container.start + link.start, link.sectors
    return number


def _plausible(entry: Entry, at: int, span: int, container: Entry) -> bool:
    """Entries 3 and 4 of a chained table may hold garbage: the kernel takes them only inside the container."""
    end = at + entry.start + entry.sectors
    return entry.start + entry.sectors <= span and end <= container.start + container.sectors


def _partition(table: PartitionTable, number: int, entry: Entry, start: int) -> Partition:
    sector_size = table.sector_size or SECTOR
    return Partition(
        number=number,
        start=start * sector_size,
        size=entry.sectors * sector_size,
        type=f"{entry.type:02x}",
        type_name=MBR_TYPES.get(entry.type),
        uuid=f"{table.uuid}-{number:02x}",
        bootable=entry.boot_indicator & 0x80 != 0,
        container=entry.extended,
    )
