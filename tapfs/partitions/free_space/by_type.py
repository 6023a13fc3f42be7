"""The free space of whatever file system a partition has, by the word that blkid uses for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from tapfs.extent import Range
from tapfs.partitions.free_space.ext import ext_free_ranges
from tapfs.partitions.free_space.fat import fat_free_ranges
from tapfs.partitions.free_space.ntfs import ntfs_free_ranges
from tapfs.partitions.free_space.refusal import unknown
from tapfs.partitions.free_space.swap import swap_free_ranges
from tapfs.partitions.free_space.xfs import xfs_free_ranges
from tapfs.partitions.reader import Reader

#: The name that blkid has for swap space.
SWAP = "swap"

_READERS: Mapping[str, Callable[[Reader], Iterator[Range]]] = {
    "ext2": ext_free_ranges,
    "ext3": ext_free_ranges,
    "ext4": ext_free_ranges,
    "xfs": xfs_free_ranges,
    "ntfs": ntfs_free_ranges,
    "vfat": fat_free_ranges,
    SWAP: swap_free_ranges,
}

#: Software RAID of Linux with its superblock behind the data: magic number, and in the first 64 KiB before the end.
_RAID_MAGIC = 0xA92B4EFC
_OLD_RAID_ALIGNMENT, _NEW_RAID_ALIGNMENT, _NEW_RAID_BACK = 64 << 10, 4 << 10, 8 << 10


def free_ranges(disk: Reader, type_name: str) -> Iterator[Range]:
    """The free ranges of a file system, ascending, not touching, in bytes of the partition that it fills.

    Nothing is to be given up of it before the iterator has ended without an error once: only then all records agree.
    Raises ImageError: unsupported for what is not understood in full or was not unmounted cleanly, corrupt for what
    contradicts itself, and what the disk raises. The message names the reason, and no file.
    """
    reader = _READERS.get(type_name)
    if reader is None:
        raise unknown(f"tapfs does not read the free space of {type_name}")
    if _is_raid_member(disk):
        raise unknown("it is a part of a software RAID, whose other disks nobody has looked at")
    return reader(disk)


def _is_raid_member(disk: Reader) -> bool:
    """Whether a superblock of md, of version 0.90 or 1.0, lies at the end: the start is a file system's then."""
    old = disk.size // _OLD_RAID_ALIGNMENT * _OLD_RAID_ALIGNMENT - _OLD_RAID_ALIGNMENT
    new = (disk.size - _NEW_RAID_BACK) // _NEW_RAID_ALIGNMENT * _NEW_RAID_ALIGNMENT
    magic = _RAID_MAGIC.to_bytes(4, "little")
    # Version 0.90 is written in the byte order of its machine.
    return disk.read(old, 4) in {magic, magic[::-1]} or disk.read(new, 4) == magic
