"""NTFS: its boot sector, which is kin to that of FAT, and the record that describes the volume."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tapfs.partitions.fat import boot_sector
from tapfs.partitions.reader import Reader
from tapfs.partitions.table import FileSystem

NAME = b"NTFS    "

_VOLUME_RECORD = 3
_VOLUME_NAME, _VOLUME_INFORMATION = 0x60, 0x70
_END = 0xFFFFFFFF
_BLOCK = 512

#: In $VOLUME_INFORMATION: where its flags are, and the one that a mount sets and an unmount clears.
_FLAGS_AT, _DIRTY = 10, 0x0001


def ntfs(disk: Reader) -> FileSystem | None:
    """NTFS; the label is the $VOLUME_NAME attribute of the fourth record of the master file table."""
    sector = boot_sector(disk)
    record = _volume_record(disk)
    if sector is None or record is None:
        return None
    label = _attribute(record, _VOLUME_NAME).decode("utf-16-le", "replace") or None
    return FileSystem("ntfs", label, f"{int.from_bytes(sector[72:80], 'little'):016X}")


def ntfs_is_dirty(disk: Reader) -> bool:
    """Whether the volume is marked as in use, or as one that chkdsk is to look at."""
    information = _attribute(_volume_record(disk) or b"", _VOLUME_INFORMATION)
    return bool(int.from_bytes(information[_FLAGS_AT : _FLAGS_AT + 2], "little") & _DIRTY)


def _volume_record(disk: Reader) -> bytes | None:
    """The record that describes the volume; empty if it is damaged, None if this is no NTFS."""
    sector = boot_sector(disk)
    if sector is None or sector[3:11] != NAME:
        return None
    sector_size, per_cluster = struct.unpack_from("<HB", sector, 11)
    table, record_clusters = struct.unpack_from("<Q8xb", sector, 0x30)
    cluster = sector_size * (per_cluster if per_cluster <= 0x80 else 1 << min(256 - per_cluster, 31))
    record_size = record_clusters * cluster if record_clusters > 0 else 1 << min(-record_clusters, 31)
    if sector_size not in {512, 1024, 2048, 4096} or not cluster or record_size not in {1024, 2048, 4096}:
        return None
    record = disk.read(table * cluster + _VOLUME_RECORD * record_size, record_size)
    return _fixed_up(record) if record.startswith(b"FILE") else b""


def _attribute(record: bytes, wanted: int) -> bytes:
    """The value of an attribute that lies in the record; empty if it is not there."""
    for kind, start, end in _attributes(record):
        if kind == wanted:
            return record[start:end]
    return b""


def _attributes(record: bytes) -> Iterator[tuple[int, int, int]]:
    """Type of each attribute that lies in the record, and start and end of its value."""
    at = int.from_bytes(record[20:22], "little")
    while at + 24 <= len(record):
        kind, length, elsewhere = struct.unpack_from("<II?", record, at)
        if kind == _END or length < 24:
            break
        if not elsewhere:
            size, start = struct.unpack_from("<IH", record, at + 16)
            yield kind, at + start, at + start + size
        at += length


def _fixed_up(record: bytes) -> bytes:
    """A record with the last two bytes of each 512, which stand in its update sequence, put back."""
    start, count = struct.unpack_from("<HH", record, 4) if len(record) >= 8 else (0, 0)
    fixed = bytearray(record)
    for block in range(1, min(count, len(record) // _BLOCK + 1)):
        original = record[start + 2 * block :][:2]
        if len(original) == 2:
            fixed[block * _BLOCK - 2 : block * _BLOCK] = original
    return bytes(fixed)
