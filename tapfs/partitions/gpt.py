"""GUID partition tables (UEFI specification, chapter 5), from the primary header or the backup."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from tapfs.partitions.reader import Reader
from tapfs.partitions.table import Partition, PartitionTable, uuid_text
from tapfs.partitions.type_names import GPT_TYPES
from tapfs.records import dataclass

#: Logical sector sizes there are; the header stands in the second sector, so it tells.
SECTOR_SIZES = (512, 4096)

_SIGNATURE = b"EFI PART"
#: Signature, revision, header size, its CRC, own sector, sector of the other header, first and
#: last usable sector, GUID of the disk, sector, number, size and CRC of the entries.
_HEADER = struct.Struct("<8sIII4xQQQQ16sQIII")
_CRC_AT = 16
#: Type GUID, own GUID, first and last sector, attributes, name.
_ENTRY = struct.Struct("<16s16sQQQ72s")
#: A table of more bytes is not looked at; the usual one has 16 KiB.
_MAX_TABLE_BYTES = 1 << 20
_LEGACY_BOOT = 1 << 2


@dataclass(frozen=True, slots=True)
class _Header:
    sector_size: int
    other_sector: int
    disk_guid: bytes
    entry_size: int
    entries: bytes


def read_gpt(disk: Reader, sector_sizes: Sequence[int] = SECTOR_SIZES) -> PartitionTable | None:
    """The table of the primary header, else of the backup at the end of the disk; None if both are invalid."""
    for sector_size in sector_sizes:
        header = _read_header(disk, sector_size, 1)
        if header is not None:
            table = _table(disk, header)
            _look_at_backup(disk, header, table)
            return table
    for sector_size in sector_sizes:
        header = _read_header(disk, sector_size, disk.size // sector_size - 1)
        if header is not None:
            table = _table(disk, header)
            table.note("the primary GPT is damaged; this is the backup at the end of the disk")
            return table
    return None


def stated_size(disk: Reader) -> int:
    """Bytes of the disk that a primary table was made for, whose backup stands in the last sector; 0 without one."""
    found = (_read_header(disk, sector_size, 1) for sector_size in SECTOR_SIZES)
    return max(((header.other_sector + 1) * header.sector_size for header in found if header is not None), default=0)


def _read_header(disk: Reader, sector_size: int, sector: int) -> _Header | None:
    """The header in that sector if it and its entries are whole."""
    found = disk.read(sector * sector_size, sector_size)
    if len(found) < sector_size or not found.startswith(_SIGNATURE):
        return None
    _, _, length, crc, own, other, _, _, guid, entries_at, count, entry_size, entries_crc = _HEADER.unpack_from(found)
    if not _HEADER.size <= length <= sector_size or own != sector:
        return None
    from zlib import crc32  # most disks have no GPT

    if crc32(found[:_CRC_AT] + bytes(4) + found[_CRC_AT + 4 : length]) != crc:
        return None
    if entry_size < _ENTRY.size or entry_size % 8 or not 0 < count * entry_size <= _MAX_TABLE_BYTES:
        return None
    entries = disk.read(entries_at * sector_size, count * entry_size)
    if len(entries) < count * entry_size or crc32(entries) != entries_crc:
        return None
    return _Header(sector_size, other, guid, entry_size, entries)


def _look_at_backup(disk: Reader, header: _Header, table: PartitionTable) -> None:
    last = disk.size // header.sector_size - 1
    if _read_header(disk, header.sector_size, header.other_sector) is None:
        table.note("the backup GPT is missing or damaged")
    elif header.other_sector != last:
        table.note("the backup GPT is not at the end of the disk: the disk has grown")


def _table(disk: Reader, header: _Header) -> PartitionTable:
    table = PartitionTable("gpt", header.sector_size, _guid(header.disk_guid))
    for index in range(len(header.entries) // header.entry_size):
        entry = _ENTRY.unpack_from(header.entries, index * header.entry_size)
        kind, own, first, last, attributes, name = entry
        if not any(kind):
            continue
        if last < first:
            table.note(f"partition {index + 1} ends before it starts and is left out")
            continue
        type_guid = _guid(kind)
        partition = Partition(
            number=index + 1,
            start=first * header.sector_size,
            size=(last - first + 1) * header.sector_size,
            type=type_guid,
            type_name=GPT_TYPES.get(type_guid),
            name=_name(name),
            uuid=_guid(own),
            bootable=attributes & _LEGACY_BOOT != 0,
        )
        table.add(partition, disk.size)
    table.clip(disk.size)
    return table


def _name(field: bytes) -> str | None:
    """36 UTF-16 units, ended by a zero."""
    return field.decode("utf-16-le", "replace").partition("\0")[0] or None


def _guid(field: bytes) -> str:
    """As it is written: the first three groups are little-endian."""
    return uuid_text(field[3::-1] + field[5:3:-1] + field[7:5:-1] + field[8:])
