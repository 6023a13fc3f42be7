"""FAT (Microsoft's FAT specification, 1.03) and NTFS and exFAT, whose boot sectors are kin to it."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tapfs.partitions.reader import Reader
from tapfs.partitions.table import FileSystem

_SIGNATURE = b"\x55\xaa"
#: Bytes per sector, sectors per cluster, reserved sectors, FATs, root entries, sectors, media,
#: sectors of a FAT; then, after the geometry, sectors (32 bits), those of a FAT32, its root cluster.
_BPB = struct.Struct("<11xHBHBHHBH8xII4xI")
_DIRECTORY_ENTRY = 32
_VOLUME_LABEL, _LONG_NAME = 0x08, 0x0F
_NO_NAME = "NO NAME"
#: So much of the root directory is looked through for the label.
_MAX_DIRECTORY_BYTES = 64 << 10

_EXFAT_LABEL = 0x83
_NTFS_VOLUME_RECORD = 3
_NTFS_VOLUME_NAME = 0x60
_NTFS_END = 0xFFFFFFFF
_NTFS_BLOCK = 512


class _Parameters(NamedTuple):
    sector_size: int
    sectors_per_cluster: int
    reserved: int
    fats: int
    root_entries: int
    sectors16: int
    media: int
    fat_sectors16: int
    sectors32: int
    fat_sectors32: int
    root_cluster: int

    @property
    def fat_sectors(self) -> int:
        return self.fat_sectors16 or self.fat_sectors32

    @property
    def plausible(self) -> bool:
        return (
            self.sector_size in {512, 1024, 2048, 4096}
            and _is_power_of_two(self.sectors_per_cluster)
            and self.reserved > 0
            and self.fats in {1, 2}
            and (self.media == 0xF0 or self.media >= 0xF8)
            and self.fat_sectors > 0
            and (self.sectors16 or self.sectors32) > self.reserved
        )


def looks_like_boot_sector(disk: Reader) -> bool:
    """Whether the first sector is that of a FAT, NTFS or exFAT file system."""
    sector = _boot_sector(disk)
    return sector is not None and (sector[3:11] in {b"NTFS    ", b"EXFAT   "} or _parameters(sector).plausible)


def vfat(disk: Reader) -> FileSystem | None:
    """FAT12, FAT16 or FAT32; the label is that of the root directory, else the boot sector's."""
    sector = _boot_sector(disk)
    if sector is None or not (parameters := _parameters(sector)).plausible:
        return None
    # FAT32 has 28 bytes more before what both have: a signature of 29 (or 28: no label), serial number, label.
    extended = sector[38:] if parameters.fat_sectors16 else sector[66:]
    serial = f"{int.from_bytes(extended[1:5], 'little'):08X}" if extended[0] in {0x28, 0x29} else None
    boot_label = _text(extended[5:16]) if extended[0] == 0x29 else None
    return FileSystem(
        "vfat",
        _root_label(disk, parameters) or (None if boot_label == _NO_NAME else boot_label),
        None if serial is None else f"{serial[:4]}-{serial[4:]}",
    )


def exfat(disk: Reader) -> FileSystem | None:
    """The exFAT of Microsoft's specification (2019), section 3.1 and 7.3."""
    sector = _boot_sector(disk)
    if sector is None or sector[3:11] != b"EXFAT   " or any(sector[11:64]):
        return None
    heap, root = struct.unpack_from("<I4xI", sector, 88)
    serial = int.from_bytes(sector[100:104], "little")
    sector_shift, cluster_shift = sector[108], sector[109]
    if not 9 <= sector_shift <= 12 or cluster_shift > 25 - sector_shift or root < 2:
        return None
    directory = (heap << sector_shift) + ((root - 2) << (sector_shift + cluster_shift))
    label = None
    for entry in _directory(disk, directory, 1 << (sector_shift + cluster_shift)):
        if entry[0] == _EXFAT_LABEL:
            label = entry[2 : 2 + 2 * min(entry[1], 11)].decode("utf-16-le", "replace")
    return FileSystem("exfat", label or None, f"{serial >> 16:04X}-{serial & 0xFFFF:04X}")


def ntfs(disk: Reader) -> FileSystem | None:
    """NTFS: the label is the $VOLUME_NAME attribute of the fourth record of the MFT."""
    sector = _boot_sector(disk)
    if sector is None or sector[3:11] != b"NTFS    ":
        return None
    sector_size, per_cluster = struct.unpack_from("<HB", sector, 11)
    mft, record_clusters = struct.unpack_from("<Q8xb", sector, 0x30)
    cluster = sector_size * (per_cluster if per_cluster <= 0x80 else 1 << min(256 - per_cluster, 31))
    record_size = record_clusters * cluster if record_clusters > 0 else 1 << min(-record_clusters, 31)
    if sector_size not in {512, 1024, 2048, 4096} or not cluster or record_size not in {1024, 2048, 4096}:
        return None
    record = disk.read(mft * cluster + _NTFS_VOLUME_RECORD * record_size, record_size)
    return FileSystem("ntfs", _ntfs_label(_fixed_up(record)), f"{int.from_bytes(sector[72:80], 'little'):016X}")


def _ntfs_label(record: bytes) -> str | None:
    if not record.startswith(b"FILE"):
        return None
    at = int.from_bytes(record[20:22], "little")
    while at + 24 <= len(record):
        kind, length, resident = struct.unpack_from("<II?", record, at)
        if kind == _NTFS_END or length < 24:
            break
        if kind == _NTFS_VOLUME_NAME and not resident:  # the field says "non-resident"
            size, start = struct.unpack_from("<IH", record, at + 16)
            return record[at + start :][:size].decode("utf-16-le", "replace") or None
        at += length
    return None


def _fixed_up(record: bytes) -> bytes:
    """A record with the last two bytes of each 512, which stand in its update sequence, put back."""
    start, count = struct.unpack_from("<HH", record, 4) if len(record) >= 8 else (0, 0)
    fixed = bytearray(record)
    for block in range(1, min(count, len(record) // _NTFS_BLOCK + 1)):
        original = record[start + 2 * block :][:2]
        if len(original) == 2:
            fixed[block * _NTFS_BLOCK - 2 : block * _NTFS_BLOCK] = original
    return bytes(fixed)


def _root_label(disk: Reader, parameters: _Parameters) -> str | None:
    after_fats = parameters.reserved + parameters.fats * parameters.fat_sectors
    if parameters.fat_sectors16:
        offset, length = after_fats, parameters.root_entries * _DIRECTORY_ENTRY
    else:  # the first cluster of it will do: labels are written first
        offset = after_fats + (parameters.root_cluster - 2) * parameters.sectors_per_cluster
        length = parameters.sectors_per_cluster * parameters.sector_size
    for entry in _directory(disk, offset * parameters.sector_size, length):
        attributes = entry[11]
        if entry[0] != 0xE5 and attributes & _LONG_NAME != _LONG_NAME and attributes & _VOLUME_LABEL:
            label = _text(entry[:11])
            return None if label == _NO_NAME else label
    return None


def _directory(disk: Reader, offset: int, length: int) -> list[bytes]:
    """The entries of a directory up to its end mark."""
    found = disk.read(offset, min(length, _MAX_DIRECTORY_BYTES))
    entries = [
        found[at : at + _DIRECTORY_ENTRY] for at in range(0, len(found) - _DIRECTORY_ENTRY + 1, _DIRECTORY_ENTRY)
    ]
    end = next((index for index, entry in enumerate(entries) if entry[0] == 0), len(entries))
    return entries[:end]


def _boot_sector(disk: Reader) -> bytes | None:
    sector = disk.read(0, 512)
    return sector if len(sector) == 512 and sector[510:] == _SIGNATURE else None


def _parameters(sector: bytes) -> _Parameters:
    return _Parameters(*_BPB.unpack_from(sector))


def _text(field: bytes) -> str | None:
    return field.partition(b"\0")[0].decode("cp437").rstrip(" ") or None


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
