"""The length that a file system says it has. One that is longer than its disk shows that the image is not whole."""

from __future__ import annotations

from collections.abc import Callable

from tapfs.partitions.reader import Reader

_SECTOR_BYTES_AT = 11


def stated_length(window: Reader, type_name: str) -> int:
    """The bytes of the file system of blkid's type in `window`, 0 where its superblock does not say.

    Raises the ImageError of the disk.
    """
    asked = _LENGTHS.get(type_name)
    return 0 if asked is None else asked(window)


def _ext(window: Reader) -> int:
    """Documentation/filesystems/ext4/super.rst of the kernel: blocks, of which 32 bits more with the feature 64bit."""
    block = window.read(1024, 1024)
    count = _little(block, 4, 4)
    if _little(block, 96, 4) & 0x80:
        count |= _little(block, 336, 4) << 32
    return count << (10 + min(_little(block, 24, 4), 6))


def _xfs(window: Reader) -> int:
    """XFS Algorithms & Data Structures, "Superblocks": sb_dblocks."""
    block = window.read(0, 16)
    return int.from_bytes(block[4:8], "big") * int.from_bytes(block[8:16], "big")


def _btrfs(window: Reader) -> int:
    """Btrfs's on-disk format, "Superblock": the length of this device; that of the file system may be of several."""
    return _little(window.read(0x10000, 0x22B), 201 + 8, 8)


def _ntfs(window: Reader) -> int:
    """The sectors in the boot sector; one more, which holds a copy of it, is not counted."""
    boot = window.read(0, 512)
    return _little(boot, _SECTOR_BYTES_AT, 2) * _little(boot, 40, 8)


def _vfat(window: Reader) -> int:
    """Microsoft's FAT specification: BPB_TotSec16, or BPB_TotSec32 where that is 0."""
    boot = window.read(0, 512)
    return _little(boot, _SECTOR_BYTES_AT, 2) * (_little(boot, 19, 2) or _little(boot, 32, 4))


def _exfat(window: Reader) -> int:
    """Microsoft's exFAT specification: VolumeLength, and the shift of its sectors."""
    boot = window.read(0, 512)
    return _little(boot, 72, 8) << min(_little(boot, 108, 1), 12)


def _squashfs(window: Reader) -> int:
    """Documentation/filesystems/squashfs.rst of the kernel: bytes_used."""
    return _little(window.read(0, 96), 40, 8)


_LENGTHS: dict[str, Callable[[Reader], int]] = {
    "ext2": _ext,
    "ext3": _ext,
    "ext4": _ext,
    "xfs": _xfs,
    "btrfs": _btrfs,
    "ntfs": _ntfs,
    "vfat": _vfat,
    "exfat": _exfat,
    "squashfs": _squashfs,
}


def _little(block: bytes, offset: int, length: int) -> int:
    return int.from_bytes(block[offset : offset + length], "little")
