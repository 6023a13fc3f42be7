"""Unclean file systems are told: flags as the checkers of each type read them, and rings of XFS."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.partitions.cleanliness import Unclean, unclean
from tapfs.partitions.reader import Reader
from tests.unit.partitions.test_tables import MIB


def state(path: Path, kind: str) -> Unclean | None:
    with path.open("rb", buffering=0) as file:

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        return unclean(Reader(read, path.stat().st_size), kind)


def patch(path: Path, offset: int, change: Callable[[int], int], length: int = 1) -> None:
    """Change a little-endian number in a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        value = change(int.from_bytes(file.read(length), "little"))
        file.seek(offset)
        file.write(value.to_bytes(length, "little"))


def made(path: Path, size_mib: int, *command: str) -> Path:
    path.write_bytes(b"")
    os.truncate(path, size_mib * MIB)
    subprocess.run([*command, path], check=True, capture_output=True)
    return path


def said(*command: object) -> str:
    """What a checker says."""
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("width", "size", "at"), [(16, 20, 37), (32, 64, 65), (12, 2, 37)])
def test_fat_in_use_by_the_boot_sector(tmp_path: Path, width: int, size: int, at: int) -> None:
    path = made(tmp_path / "disk", size, "mkfs.vfat", f"-F{width}")
    assert state(path, "vfat") is None
    patch(path, at, lambda value: value | 1)
    assert state(path, "vfat") is Unclean.CHECK
    assert "Dirty bit is set" in said("fsck.fat", "-n", path)


@pytest.mark.parametrize(("width", "size", "bit"), [(16, 20, 0x8000), (32, 64, 0x08000000)])
def test_fat_in_use_by_the_table(tmp_path: Path, width: int, size: int, bit: int) -> None:
    """Windows clears a bit of the second entry."""
    path = made(tmp_path / "disk", size, "mkfs.vfat", f"-F{width}")
    reserved = int.from_bytes(path.read_bytes()[14:16], "little")
    patch(path, reserved * 512 + width // 8, lambda value: value & ~bit, width // 8)
    assert state(path, "vfat") is Unclean.CHECK


def test_exfat_in_use(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", 32, "mkfs.exfat")
    assert state(path, "exfat") is None
    patch(path, 106, lambda value: value | 2, 2)
    assert state(path, "exfat") is Unclean.CHECK
    patch(path, 106, lambda _: 1, 2)  # the second FAT is the one in use: no more is said
    assert state(path, "exfat") is None


def test_ntfs_in_use(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", 32, "mkfs.ntfs", "-FqQ", "-L", "label")
    assert state(path, "ntfs") is None
    disk = path.read_bytes()
    volume = disk.index("label".encode("utf-16-le"))  # its record, which the mirror of the table repeats
    mirrored = disk.index("label".encode("utf-16-le"), volume + 1)
    for name in (volume, mirrored):
        information = disk.index(b"\x70\0\0\0\x28\0\0\0", name)
        patch(path, information + 24 + 10, lambda value: value | 1, 2)
    assert state(path, "ntfs") is Unclean.CHECK
    assert "DIRTY" in said("ntfsinfo", "-fm", path)


def test_ext2_in_use(tmp_path: Path) -> None:
    path = made(tmp_path / "disk", 8, "mkfs.ext2", "-qF")
    assert state(path, "ext2") is None
    patch(path, 1024 + 58, lambda value: value & ~1, 2)
    assert state(path, "ext2") is Unclean.CHECK
    assert "not clean" in said("dumpe2fs", "-h", path)


def test_a_disk_that_cannot_be_read_is_not_called_unclean() -> None:
    def read(_offset: int, _length: int) -> bytes:
        raise ImageError(ErrorKind.IO, "broken")

    for kind in ("ext4", "xfs", "btrfs", "vfat", "exfat", "ntfs", "f2fs"):
        assert unclean(Reader(read, 64 * MIB), kind) is None


# Logs of XFS. The ring has 256 blocks of 512 bytes, from block 8 of 4096 of the second group on.

_GROUP_BLOCKS, _LOG_AT, _RING = 100, (100 + 8) * 4096, 256
_UNMOUNT, _START, _COMMIT = 0x20, 0x01, 0x02


def operation(flags: int, region: bytes = b"") -> bytes:
    return struct.pack(">IIBBH", 7, len(region), 0x69, flags, 0) + region


def buffer_change(place: int) -> list[bytes]:
    """A transaction that changes one buffer."""
    item = struct.pack("<HHHHqII", 0x123C, 2, 0x9000, 1, place, 1, 7)
    header = struct.pack("<IIII", 0x5452414E, 42, 7, 2)
    return [operation(_START), operation(0, header), operation(0, item), operation(0, bytes(384)), operation(_COMMIT)]


UNMOUNT = [operation(_UNMOUNT, b"nU" + bytes(6))]
SUPERBLOCK, ELSEWHERE = buffer_change(0), buffer_change(64)


class Ring:
    """A log being written from block `head` on, in the second turn; what is ahead is of the first turn."""

    def __init__(self, head: int, buffer_size: int = 32 << 10) -> None:
        self.blocks = [struct.pack(">I", 1 if number >= head else 2).ljust(512, b"\0") for number in range(_RING)]
        self.head = head
        self.cycle = 2
        self.buffer_size = buffer_size

    def put(self, block: bytes, *, first: bool = False) -> None:
        mark = b"" if first else struct.pack(">I", self.cycle)
        self.blocks[self.head] = (mark + block[len(mark) :]).ljust(512, b"\0")
        self.head += 1
        if self.head == _RING:
            self.head, self.cycle = 0, self.cycle + 1

    def write(self, operations: list[bytes], oldest: int | None = None) -> int:
        """A record; the result is its first block."""
        start = self.head
        data = b"".join(operations)
        data += bytes(-len(data) % 512)
        own = self.cycle << 32 | start
        header = struct.pack(">IIII", 0xFEEDBABE, self.cycle, 2, len(data))
        header += struct.pack(">QQIII", own, own if oldest is None else oldest, 0, 0, len(operations))
        header = header.ljust(300, b"\0") + struct.pack(">I", 1) + bytes(16) + struct.pack(">I", self.buffer_size)
        self.put(header, first=True)
        for _ in range(1, self.buffer_size >> 15):
            self.put(b"")
        for at in range(0, len(data), 512):
            self.put(data[at : at + 512])
        return start

    def state(self) -> Unclean | None:
        superblock = bytearray(512)
        struct.pack_into(">4sI40xQ", superblock, 0, b"XFSB", 4096, 1 << 7 | 8)
        struct.pack_into(">IIII", superblock, 84, _GROUP_BLOCKS, 2, 0, _RING * 512 // 4096)
        superblock[124] = 7
        disk = bytes(superblock).ljust(_LOG_AT, b"\0") + b"".join(self.blocks) + bytes(4096)
        return unclean(Reader(lambda offset, length: disk[offset : offset + length], len(disk)), "xfs")


#: The blocks at which a ring of 256 is interesting: its start and end, and records around both.
PLACES = [*range(7), 100, *range(_RING - 6, _RING)]


@pytest.mark.parametrize("head", PLACES)
@pytest.mark.parametrize("buffer_size", [32 << 10, 256 << 10])
def test_xfs_log_wherever_its_head_is(head: int, buffer_size: int) -> None:
    ring = Ring(head, buffer_size)
    ring.write(ELSEWHERE)
    assert ring.state() is Unclean.REPLAY
    ring.write(UNMOUNT)
    assert ring.state() is None
    ring.write(ELSEWHERE)
    assert ring.state() is Unclean.REPLAY


@pytest.mark.parametrize("head", PLACES)
def test_xfs_that_is_frozen_needs_no_replay(head: int) -> None:
    """Two records with the superblock alone, the first of which is the oldest that is needed."""
    ring = Ring(head)
    changed = ring.write(ELSEWHERE)
    first = ring.write(SUPERBLOCK, changed)
    assert ring.state() is Unclean.REPLAY
    ring.write(SUPERBLOCK, first)
    assert ring.state() is None
    ring.write(ELSEWHERE, first)
    assert ring.state() is Unclean.REPLAY


def test_xfs_log_of_noise_never_fails() -> None:
    random_ = random.Random(7)
    for _ in range(300):
        ring = Ring(random_.randrange(_RING), random_.choice([0, 1, 32 << 10, 256 << 10]))
        for _ in range(3):
            ring.write(random_.choice([UNMOUNT, SUPERBLOCK, ELSEWHERE]), random_.getrandbits(64))
        for _ in range(20):
            number, at = random_.randrange(_RING), random_.randrange(512)
            block = bytearray(ring.blocks[number])
            block[at] = random_.getrandbits(8)
            ring.blocks[number] = bytes(block)
        assert ring.state() in {None, Unclean.REPLAY}
