"""File systems and other contents of partitions, known by their superblocks.

Each probe takes the fields from the format's published description and answers in the words
of blkid, so that what `tapfs info` shows is what the host would say.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise

from tapfs.partitions.bitlocker import bitlocker
from tapfs.partitions.fat import exfat, vfat
from tapfs.partitions.ntfs import ntfs
from tapfs.partitions.reader import Reader
from tapfs.partitions.table import FileSystem, uuid_text
from tapfs.partitions.udf import udf

#: Contents that are themselves a disk, or a part of one.
VOLUMES = frozenset({"crypto_LUKS", "BitLocker", "LVM2_member", "linux_raid_member"})

#: The offsets that the second header of LUKS 2 may have, which depend on the size of the first.
_LUKS2_SECOND = tuple(0x4000 << doublings for doublings in range(9))


def identify(window: Reader) -> list[FileSystem]:
    """All file systems whose signatures are there. It is one, if the program that made it wiped the older ones.

    A volume that holds another disk (LUKS, BitLocker, LVM, RAID) is alone: what else shows itself lies in the
    volume or was there before. UDF hides the ISO 9660 of a disc that has both.
    """
    found = [each for probe in _PROBES if (each := probe(window)) is not None]
    if found and found[0].type in VOLUMES:
        return found[:1]
    types = {each.type for each in found}
    return [each for each in found if each.type != "iso9660" or "udf" not in types]


def _ext(disk: Reader) -> FileSystem | None:
    """ext2, 3 and 4: the kernel's Documentation/filesystems/ext4/super.rst."""
    block = disk.read(1024, 1024)
    if block[56:58] != b"\x53\xef" or len(block) < 1024:
        return None
    log_block_size = int.from_bytes(block[24:28], "little")
    if log_block_size > 6 or not int.from_bytes(block[4:8], "little"):
        return None
    compatible, incompatible, read_only = struct.unpack_from("<III", block, 92)
    has_journal = compatible & 0x4
    if incompatible & 0x8:
        kind = "jbd"  # an external journal
    elif incompatible & ~(0x2 | 0x4 | 0x10) or read_only & ~0x7:
        kind = "ext4"
    else:
        kind = "ext3" if has_journal else "ext2"
    return FileSystem(kind, _text(block[120:136]), _uuid(block[104:120]))


def _xfs(disk: Reader) -> FileSystem | None:
    """XFS Algorithms & Data Structures, "Superblocks"."""
    block = disk.read(0, 120)
    if not block.startswith(b"XFSB") or len(block) < 120:
        return None
    block_size = int.from_bytes(block[4:8], "big")
    if not 512 <= block_size <= 65536:
        return None
    return FileSystem("xfs", _text(block[108:120]), _uuid(block[32:48]))


def _btrfs(disk: Reader) -> FileSystem | None:
    """Btrfs's on-disk format, "Superblock": it names its own place."""
    block = disk.read(0x10000, 0x22B)
    if block[64:72] != b"_BHRfS_M" or len(block) < 0x22B or int.from_bytes(block[48:56], "little") != 0x10000:
        return None
    return FileSystem("btrfs", _text(block[0x12B:0x22B]), _uuid(block[32:48]))


def _swap(disk: Reader) -> FileSystem | None:
    """Swap space: the signature ends the first page, whatever size a page has on the machine that made it."""
    for page in (4096, 8192, 16384, 32768, 65536):
        if disk.read(page - 10, 10) == b"SWAPSPACE2":
            header = disk.read(1024, 48)
            if int.from_bytes(header[:4], "little") == 1 or int.from_bytes(header[:4], "big") == 1:
                return FileSystem("swap", _text(header[28:44]), _uuid(header[12:28]))
    return None


def _iso9660(disk: Reader) -> FileSystem | None:
    """ECMA-119, 8.4: the primary volume descriptor. blkid makes the UUID of a volume's date."""
    block = disk.read(32768, 2048)
    if block[:6] != b"\x01CD001" or len(block) < 2048:
        return None
    modified, created = block[830:846], block[813:829]
    date = (modified if modified.strip(b"0\0") else created).decode("ascii", "replace")
    cuts = (0, 4, 6, 8, 10, 12, 14, 16)
    parts = [date[start:end] for start, end in pairwise(cuts)]
    return FileSystem("iso9660", _text(block[40:72]), "-".join(parts) if date.isdigit() else None)


def _lvm2(disk: Reader) -> FileSystem | None:
    """A physical volume of LVM2: a label with its own sector and CRC, in one of the first four sectors."""
    for sector in range(4):
        label = disk.read(sector * 512, 512)
        if label[:8] != b"LABELONE" or label[24:32] != b"LVM2 001" or len(label) < 512:
            continue
        from zlib import crc32  # few disks are such volumes

        own, crc, start = struct.unpack_from("<QII", label, 8)
        # LVM starts its CRC at f597a6cf and inverts neither end.
        if own != sector or crc32(label[20:], 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF != crc or start > 480:
            continue
        name = label[start : start + 32].decode("ascii", "replace")
        cuts = (0, 6, 10, 14, 18, 22, 26, 32)
        return FileSystem("LVM2_member", None, "-".join(name[a:b] for a, b in pairwise(cuts)))
    return None


def _luks(disk: Reader) -> FileSystem | None:
    """LUKS 1 and 2: the LUKS On-Disk Format Specification.

    Version 2 has a second header, which may be all that mkswap or mkfs have left of it.
    """
    header = disk.read(0, 208)
    version = int.from_bytes(header[6:8], "big")
    if not header.startswith(b"LUKS\xba\xbe") or version not in {1, 2} or len(header) < 208:
        second = next((found for offset in _LUKS2_SECOND if (found := _second_luks2(disk, offset))), None)
        if second is None:
            return None
        version, header = 2, second
    return FileSystem("crypto_LUKS", _text(header[24:72]) if version == 2 else None, _text(header[168:208]))


def _second_luks2(disk: Reader, offset: int) -> bytes | None:
    """The second header of LUKS 2, if it is at this offset; it says so itself."""
    header = disk.read(offset, 264)
    whole = len(header) == 264 and header.startswith(b"SKUL\xba\xbe\x00\x02")
    return header if whole and int.from_bytes(header[256:264], "big") == offset else None


def _raid(disk: Reader) -> FileSystem | None:
    """A member of a Linux software RAID, version 1.1 or 1.2 (the start shows; 0.90 and 1.0 stand at the end)."""
    for offset in (0, 4096):
        block = disk.read(offset, 64)
        if block[:8] == b"\xfc\x4e\x2b\xa9\x01\x00\x00\x00" and len(block) == 64:
            return FileSystem("linux_raid_member", _text(block[32:64]), _uuid(block[16:32]))
    return None


def _squashfs(disk: Reader) -> FileSystem | None:
    """Squashfs 4: the kernel's Documentation/filesystems/squashfs.rst."""
    block = disk.read(0, 96)
    if not block.startswith(b"hsqs") or len(block) < 96 or int.from_bytes(block[28:30], "little") != 4:
        return None
    return FileSystem("squashfs")


_PROBES: tuple[Callable[[Reader], FileSystem | None], ...] = (
    _luks,
    bitlocker,
    _lvm2,
    _raid,
    _swap,
    _ext,
    _xfs,
    _btrfs,
    vfat,
    exfat,
    ntfs,
    udf,
    _iso9660,
    _squashfs,
)


def _text(field: bytes) -> str | None:
    """A label: ended by a zero, padded with spaces in some formats; None if there is none."""
    return field.partition(b"\0")[0].decode("utf-8", "replace").rstrip(" ") or None


def _uuid(field: bytes) -> str | None:
    return uuid_text(field) if any(field) else None
