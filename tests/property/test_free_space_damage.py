"""Damage of what tells free space: a reader says what is true or refuses, and never calls free what is in use."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tapfs.errors import ImageError
from tapfs.extent import Range
from tapfs.partitions.free_space.by_type import free_ranges
from tapfs.partitions.reader import Reader
from tests import filled_file_systems as filled
from tests.filled_file_systems import MIB

#: Kind of file system, how it is made, and whether all that tells free space has checksums.
KINDS: dict[str, tuple[str, Callable[[Path], Path], bool]] = {
    "ext4": ("ext4", lambda path: filled.make_ext(path, 32 * MIB, "-b", "1024"), True),
    "ext4 of meta groups": (
        "ext4",
        lambda path: filled.make_ext(path, 32 * MIB, "-b", "1024", "-O", "meta_bg,^resize_inode,bigalloc"),
        True,
    ),
    "ext3": ("ext3", lambda path: filled.make_ext(path, 16 * MIB, "-b", "1024", kind="ext3"), False),
    "xfs": ("xfs", lambda path: filled.make_xfs_of_prototype(path, 300 * MIB), True),
    "xfs of version 4": ("xfs", lambda path: filled.make_xfs_of_prototype(path, 300 * MIB, "-m", "crc=0"), False),
    "ntfs": ("ntfs", lambda path: filled.make_ntfs(path, 16 * MIB), False),
    "fat16": ("vfat", lambda path: filled.make_fat(path, 16 * MIB, "-F", "16", "-s", "4"), False),
    "fat32": ("vfat", lambda path: filled.make_fat(path, 48 * MIB, "-F", "32"), False),
}


class Damaged:
    """A file system with changes over it, which notes what is read of it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = path.stat().st_size
        self.changes: dict[int, int] = {}
        self.read_ranges: list[Range] = []

    def __call__(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        self.read_ranges.append(Range(offset, length))
        found = bytearray(os.pread(self._descriptor, length, offset))
        for at, value in self.changes.items():
            if offset <= at < offset + length:
                found[at - offset] = value
        return bytes(found)

    def byte(self, at: int) -> int:
        return os.pread(self._descriptor, 1, at)[0]

    def free(self, kind: str) -> list[Range] | None:
        """The free ranges, or None if they are not told."""
        try:
            return list(free_ranges(Reader(self, self.size), kind))
        except ImageError:
            return None

    def close(self) -> None:
        os.close(self._descriptor)


def within(found: list[Range], right: list[Range]) -> bool:
    """Whether each range lies in one of the right ones."""
    return all(any(each.offset >= other.offset and each.end <= other.end for other in right) for each in found)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_of_a_damaged_file_system_is_true(tmp_path: Path, kind: str) -> None:
    type_name, make, summed = KINDS[kind]
    damaged = Damaged(make(tmp_path / "disk"))
    right = damaged.free(type_name)
    assert right
    looked_at = damaged.read_ranges
    choice = random.Random(kind)
    told = 0
    for round_number in range(150):
        damaged.changes = {}
        # One bit where only counts and copies guard; any bytes where checksums do.
        count = choice.choice((1, 1, 2, 16)) if summed else 1
        place = choice.choice(looked_at)
        start = place.offset + choice.randrange(place.length)
        for at in range(start, min(start + count, damaged.size)):
            old = damaged.byte(at)
            damaged.changes[at] = choice.randrange(256) if summed and count > 1 else old ^ 1 << choice.randrange(8)
        found = damaged.free(type_name)
        if found is not None:
            told += 1
            # A bitmap of NTFS without checksum may call in use what is free, and never the other way.
            same = found == right if type_name != "ntfs" else within(found, right)
            assert same, (round_number, damaged.changes)
    damaged.close()
    assert told < 150  # most of what was damaged counts


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_at_all_are_no_more_than_an_error(tmp_path: Path, kind: str) -> None:
    """Whole pieces of noise and zeros, and numbers at their limits, wherever a reader looks."""
    type_name, make, _ = KINDS[kind]
    damaged = Damaged(make(tmp_path / "disk"))
    damaged.free(type_name)
    looked_at = damaged.read_ranges
    choice = random.Random(kind)
    for _ in range(150):
        damaged.changes = {}
        for _ in range(choice.randrange(1, 5)):
            place = choice.choice(looked_at[: choice.choice((2, 10, len(looked_at)))])
            start = place.offset + choice.randrange(place.length) // 4 * 4
            fill = choice.choice((None, 0, 0xFF, 0x80))
            for at in range(start, min(start + choice.choice((1, 2, 4, 8, 64)), damaged.size)):
                damaged.changes[at] = choice.randrange(256) if fill is None else fill
        damaged.read_ranges = []
        damaged.free(type_name)
    damaged.close()
