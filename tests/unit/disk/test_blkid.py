"""Contents that only libblkid knows, named as the blkid program names them; and hosts without libblkid."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs.disk import blkid
from tapfs.partitions.table import DiskContents, FileSystem
from tests.conftest import Ran
from tests.unit.partitions.test_file_systems import blkid as program
from tests.unit.partitions.test_tables import MIB, partitioned

#: What is made, of how many MiB, by which command (the file comes last).
MADE = {
    "f2fs": (64, ["mkfs.f2fs", "-q", "-l", "größe x"]),
    "jfs": (32, ["mkfs.jfs", "-q", "-L", "jlabel"]),
    "nilfs2": (160, ["mkfs.nilfs2", "-q", "-L", "nlabel"]),
    "reiserfs": (64, ["mkfs.reiserfs", "-qff", "-l", "rlabel"]),
    "bcache": (16, ["make-bcache", "-B"]),
    "minix": (16, ["mkfs.minix"]),
    "bfs": (4, ["mkfs.bfs", "-V", "vname", "-F", "fname"]),
}


def contents(path: Path) -> DiskContents:
    with tapfs.open(path, format="raw") as image:
        return image.contents()


def assert_like_program(path: Path) -> FileSystem:
    found = contents(path).file_system
    assert found is not None
    assert tuple(found) == program(path)
    return found


@pytest.mark.parametrize("name", MADE)
def test_like_the_program(tmp_path: Path, name: str) -> None:
    size, command = MADE[name]
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, size * MIB)
    subprocess.run([*command, path], check=True, capture_output=True)
    assert assert_like_program(path).type == name


@pytest.mark.parametrize("command", [["mkfs.erofs"], ["mkfs.cramfs", "-n", "clabel"]])
def test_archives_like_the_program(tmp_path: Path, command: list[str]) -> None:
    source, path = tmp_path / "source", tmp_path / "archive"
    source.mkdir()
    (source / "file").write_text("content")
    names = [path, source] if "mkfs.erofs" in command else [source, path]
    subprocess.run([*command, *names], check=True, capture_output=True)
    assert_like_program(path)


def test_the_end_of_a_disk_like_the_program(tmp_path: Path) -> None:
    """A member of a RAID of version 1.0, whose superblock stands at the end."""
    path = tmp_path / "disk"
    size = 100 * MIB + 512
    place = (size // 512 - 16 & ~7) * 512
    superblock = bytearray(256)
    struct.pack_into("<II8x16s32s", superblock, 0, 0xA92B4EFC, 1, bytes(range(16)), b"host:array")
    struct.pack_into("<Q", superblock, 144, place // 512)
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(place)
        file.write(superblock)
    assert assert_like_program(path).type == "linux_raid_member"


def test_a_zfs_like_the_program(tmp_path: Path) -> None:
    """The ring of uberblocks of a label, from the "ZFS On-Disk Specification"."""
    path = tmp_path / "disk"
    disk = bytearray(64 * MIB)
    for label in (0, 256 << 10, len(disk) - (512 << 10), len(disk) - (256 << 10)):
        for index in range(128):
            struct.pack_into("<QQQQQ", disk, label + (128 << 10) + index * 1024, 0x00BAB10C, 5000, index, 7, 8)
    path.write_bytes(disk)
    assert assert_like_program(path).type == "zfs_member"


def test_in_a_partition(tmp_path: Path, tapfs: Callable[..., Ran]) -> None:
    disk = partitioned(tmp_path / "disk", "label: gpt\nsize=40M\nsize=4M\n")
    first = contents(disk).table.partitions[0]
    part = tmp_path / "part"
    part.write_bytes(bytes(first.size))
    subprocess.run(["mkfs.jfs", "-q", "-L", "inside", part], check=True, capture_output=True)
    with disk.open("r+b") as file:
        file.seek(first.start)
        file.write(part.read_bytes())
    found = [partition.file_system for partition in contents(disk).table.partitions]
    assert [each and tuple(each) for each in found] == [program(part), None]
    assert "jfs 'inside'" in tapfs("info", disk).out


def test_a_host_without_libblkid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names what tapfs knows by itself, and nothing else is different."""
    monkeypatch.setattr(blkid, "_LIBRARY", "libblkid-that-is-not-there.so.1")
    blkid._loaded.cache_clear()
    try:
        path = tmp_path / "disk"
        path.write_bytes(b"no file system".ljust(4 * MIB, b"x"))
        assert contents(path).file_system is None
        assert contents(path).table.notes == []
        subprocess.run(["mkfs.ext4", "-qF", path], check=True)
        found = contents(path).file_system
        assert found is not None
        assert found.type == "ext4"
    finally:
        blkid._loaded.cache_clear()


def test_it_is_not_asked_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_asked(*_: object) -> list[FileSystem]:
        raise AssertionError

    monkeypatch.setattr(blkid, "identify_file", not_asked)
    empty = tmp_path / "empty"
    empty.write_bytes(bytes(4 * MIB))
    assert contents(empty).file_system is None
    subprocess.run(["mkfs.ext4", "-qF", empty], check=True)
    assert contents(empty).file_system is not None


def test_several_at_once_are_told(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 64 * MIB)
    subprocess.run(["mkfs.jfs", "-q", path], check=True, capture_output=True)
    jfs = path.read_bytes()[0x8000 : 0x8000 + 4096]
    subprocess.run(["mkfs.f2fs", "-q", "-f", path], check=True, capture_output=True)
    with path.open("r+b") as file:
        file.seek(0x8000)
        file.write(jfs)
    assert program(path) is None
    found = contents(path)
    assert found.file_system is None
    (note,) = found.table.notes
    assert {"jfs", "f2fs"} <= set(note.replace(",", "").split())


def test_a_disk_of_any_size(tmp_path: Path) -> None:
    """The copy is as sparse as the disk is large."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(1 << 42)
        file.write(b"something")
    assert contents(path).file_system is None
    for size in (1, 511, MIB - 1, MIB, MIB + 1, 2 * MIB + 1):
        assert blkid.identify(lambda _, length: b"x" * length, size) == []
