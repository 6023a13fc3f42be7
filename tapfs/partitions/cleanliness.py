"""Tell whether a file system was unmounted cleanly, from its superblock and its log.

A read-only mount replays no journal. It then shows a file system without the changes that only the
journal has, so a user has to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

from tapfs.errors import ImageError
from tapfs.partitions.fat import exfat_is_dirty, fat_is_dirty
from tapfs.partitions.ntfs import ntfs_is_dirty
from tapfs.partitions.reader import Reader
from tapfs.partitions.xfs_log import xfs_log_is_dirty


class Unclean(StrEnum):
    """What a file system that was not unmounted cleanly needs."""

    #: Changes are in its journal alone. A mount that can write replays them.
    REPLAY = "replay"
    #: Nothing is known of what was in progress. A checker (fsck, chkdsk) finds it.
    CHECK = "check"


def unclean(disk: Reader, type_name: str) -> Unclean | None:
    """What a file system of blkid's type needs, as far as can be told; None if nothing.

    Never raises: what cannot be read is not told here, for the mount will meet it.
    """
    look = _LOOKS.get(type_name)
    try:
        return None if look is None else look(disk)
    except ImageError:
        return None


#: Fields of the superblock of ext2, 3 and 4 (the kernel's Documentation/filesystems/ext4/super.rst).
_EXT_STATE_AT, _EXT_CLEANLY_UNMOUNTED = 1024 + 58, 0x1
_EXT_FEATURES_AT, _EXT_RECOVER = 1024 + 96, 0x4
_EXT_COMPATIBLE_AT, _EXT_HAS_JOURNAL = 1024 + 92, 0x4

#: The address of the log tree, which holds what was synced after the last commit (Btrfs's on-disk format).
_BTRFS_LOG_ROOT_AT = 0x10000 + 96


def _ext(disk: Reader) -> Unclean | None:
    if _number(disk, _EXT_FEATURES_AT, 4) & _EXT_RECOVER:
        return Unclean.REPLAY
    # With a journal the state stays clean while it is mounted.
    has_journal = _number(disk, _EXT_COMPATIBLE_AT, 4) & _EXT_HAS_JOURNAL
    unmounted = _number(disk, _EXT_STATE_AT, 2) & _EXT_CLEANLY_UNMOUNTED
    return None if unmounted or has_journal else Unclean.CHECK


def _xfs(disk: Reader) -> Unclean | None:
    return Unclean.REPLAY if xfs_log_is_dirty(disk) else None


def _btrfs(disk: Reader) -> Unclean | None:
    return Unclean.REPLAY if _number(disk, _BTRFS_LOG_ROOT_AT, 8) else None


def _vfat(disk: Reader) -> Unclean | None:
    return Unclean.CHECK if fat_is_dirty(disk) else None


def _exfat(disk: Reader) -> Unclean | None:
    return Unclean.CHECK if exfat_is_dirty(disk) else None


def _ntfs(disk: Reader) -> Unclean | None:
    return Unclean.CHECK if ntfs_is_dirty(disk) else None


_LOOKS: Mapping[str, Callable[[Reader], Unclean | None]] = {
    "ext2": _ext,
    "ext3": _ext,
    "ext4": _ext,
    "xfs": _xfs,
    "btrfs": _btrfs,
    "vfat": _vfat,
    "exfat": _exfat,
    "ntfs": _ntfs,
}


def _number(disk: Reader, offset: int, length: int) -> int:
    return int.from_bytes(disk.read(offset, length), "little")
