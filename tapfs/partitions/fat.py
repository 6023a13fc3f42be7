"""FAT (Microsoft's FAT specification, 1.03) and exFAT (Microsoft, 2019), whose boot sector is kin to that of FAT."""

from __future__ import annotations

import struct

from tapfs.partitions.reader import Reader
from tapfs.partitions.table import FileSystem
from tapfs.records import NamedTuple

_SIGNATURE = b"\x55\xaa"
#: Bytes per sector, sectors per cluster, reserved sectors, FATs, root entries, sectors, media,
#: sectors of a FAT; then, after the geometry, sectors (32 bits), those of a FAT32, its root cluster.
_BPB = struct.Struct("<11xHBHBHHBH8xII4xI")
_DIRECTORY_ENTRY = 32
_VOLUME_LABEL, _LONG_NAME = 0x08, 0x0F
_NO_NAME = "NO NAME"
#: The first byte 0xE5 marks a free entry, so a name that starts with it has 0x05 there.
_KANJI, _KANJI_STAND_IN = b"\xe5", 0x05
#: So much of the root directory is looked through for the label.
_MAX_DIRECTORY_BYTES = 64 << 10

#: The byte of the boot sector that has the flag of a mount in progress, and that flag.
_STATE_OF_FAT12_AND_16, _STATE_OF_FAT32, _IN_USE = 37, 65, 0x01
#: The bit of the second entry of the table that an unmount sets.
_UNMOUNTED_FAT16, _UNMOUNTED_FAT32 = 0x8000, 0x0800_0000
#: Fewer clusters than this make a FAT12.
_FIRST_FAT16 = 4085

_EXFAT = b"EXFAT   "
_EXFAT_LABEL = 0x83
_EXFAT_DIRTY = 0x02


class FatParameters(NamedTuple):
    """The fields of the boot sector that FAT and its kin have; sizes in sectors but for that of a sector."""

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
        """The size of one table."""
        return self.fat_sectors16 or self.fat_sectors32

    @property
    def clusters(self) -> int:
        """The number of clusters, which tells FAT12 from FAT16."""
        return ((self.sectors16 or self.sectors32) - self._before_clusters) // self.sectors_per_cluster

    @property
    def data_start(self) -> int:
        """The first byte of the first cluster."""
        return self._before_clusters * self.sector_size

    @property
    def _before_clusters(self) -> int:
        root = -(-self.root_entries * _DIRECTORY_ENTRY // self.sector_size)
        return self.reserved + self.fats * self.fat_sectors + root

    @property
    def plausible(self) -> bool:
        """Whether a FAT can be so."""
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
    sector = boot_sector(disk)
    return sector is not None and (sector[3:11] in {b"NTFS    ", _EXFAT} or _parameters(sector).plausible)


def vfat(disk: Reader) -> FileSystem | None:
    """FAT12, FAT16 or FAT32; the label is that of the root directory, else the boot sector's."""
    sector = boot_sector(disk)
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
    """The exFAT of sections 3.1 and 7.3 of its specification."""
    sector = boot_sector(disk)
    if sector is None or sector[3:11] != _EXFAT or any(sector[11:64]):
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


def fat_parameters(sector: bytes) -> FatParameters | None:
    """What the boot sector of a FAT says; None if it is none."""
    parameters = _parameters(sector)
    return parameters if parameters.plausible else None


def fat_is_dirty(disk: Reader) -> bool:
    """Whether a FAT is marked as in use: in the boot sector, where Linux does it, or in the table itself (6.2)."""
    sector = boot_sector(disk)
    if sector is None or not (parameters := _parameters(sector)).plausible:
        return False
    if sector[_STATE_OF_FAT12_AND_16 if parameters.fat_sectors16 else _STATE_OF_FAT32] & _IN_USE:
        return True
    width = 4 if parameters.fat_sectors32 and not parameters.fat_sectors16 else 2
    if width == 2 and parameters.clusters < _FIRST_FAT16:
        return False  # FAT12 has no bits for it
    second = disk.read(parameters.reserved * parameters.sector_size + width, width)
    unmounted = _UNMOUNTED_FAT32 if width == 4 else _UNMOUNTED_FAT16
    return len(second) == width and not int.from_bytes(second, "little") & unmounted


def exfat_is_dirty(disk: Reader) -> bool:
    """Whether an exFAT is marked as in use (3.1.13.2)."""
    sector = boot_sector(disk)
    return sector is not None and sector[3:11] == _EXFAT and bool(sector[106] & _EXFAT_DIRTY)


def _root_label(disk: Reader, parameters: FatParameters) -> str | None:
    after_fats = parameters.reserved + parameters.fats * parameters.fat_sectors
    if parameters.fat_sectors16:
        offset, length = after_fats, parameters.root_entries * _DIRECTORY_ENTRY
    else:  # the first cluster of it will do: labels are written first
        offset = after_fats + (parameters.root_cluster - 2) * parameters.sectors_per_cluster
        length = parameters.sectors_per_cluster * parameters.sector_size
    for entry in _directory(disk, offset * parameters.sector_size, length):
        attributes = entry[11]
        if entry[0] != _KANJI[0] and attributes & _LONG_NAME != _LONG_NAME and attributes & _VOLUME_LABEL:
            label = _text(_KANJI + entry[1:11] if entry[0] == _KANJI_STAND_IN else entry[:11])
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


def boot_sector(disk: Reader) -> bytes | None:
    """The first sector, if it has the signature of those that boot."""
    sector = disk.read(0, 512)
    return sector if len(sector) == 512 and sector[510:] == _SIGNATURE else None


def _parameters(sector: bytes) -> FatParameters:
    return FatParameters(*_BPB.unpack_from(sector))


def _text(field: bytes) -> str | None:
    return field.partition(b"\0")[0].decode("cp437").rstrip(" ") or None


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
