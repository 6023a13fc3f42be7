"""Tables that only a word of the user explains (MBR in large sectors), and tables that are noticed but not read."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tapfs.partitions.contents import disk_contents
from tapfs.partitions.table import DiskContents
from tests.conftest import Ran
from tests.unit.partitions.test_tables import MIB, as_sfdisk, partitioned


def look_at(path: Path, sector_size: int | None = None) -> DiskContents:
    disk = path.read_bytes()
    return disk_contents(lambda offset, length: disk[offset : offset + length], len(disk), sector_size=sector_size)


def partition_table_type(path: Path) -> str:
    """What blkid says of the disk."""
    words = ["blkid", "--probe", "-o", "value", "-s", "PTTYPE", path]
    return subprocess.run(words, check=False, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def large_sectors(tmp_path: Path) -> tuple[Path, list[dict[str, object]]]:
    """A disk with an MBR made on a device of 4096-byte sectors, logical partitions too; and what sfdisk reads there."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(128 * MIB)
    script = "label: dos\nstart=256, size=5120\nstart=6144, size=10240, type=5\nstart=6400, size=1024\nsize=1024\n"
    loop = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", "4096", path], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["sfdisk", "-q", "--no-reread", loop], input=script, text=True, check=True)
        table = json.loads(subprocess.run(["sfdisk", "--json", loop], check=True, capture_output=True).stdout)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    command = ["mkfs.ext4", "-qF", "-L", "large", "-E", f"offset={MIB}", path, "20M"]
    subprocess.run(command, check=True, capture_output=True)
    return path, table["partitiontable"]["partitions"]


def test_an_mbr_in_large_sectors_like_sfdisk(large_sectors: tuple[Path, list[dict[str, object]]]) -> None:
    path, expected = large_sectors
    contents = look_at(path, 4096)
    assert contents.table.sector_size == 4096
    ours = [(each["start"], each["size"]) for each in as_sfdisk(contents)]
    assert len(ours) == 4
    assert [ours[0], *ours[2:]] == [(each["start"], each["size"]) for each in (expected[0], *expected[2:])]
    (first, *_) = contents.table.partitions
    assert first.start == MIB
    assert first.file_system is not None
    assert first.file_system.label == "large"
    assert contents.table.notes == []


def test_large_sectors_are_noticed(
    large_sectors: tuple[Path, list[dict[str, object]]], tapfs: Callable[..., Ran]
) -> None:
    path, _ = large_sectors
    note = look_at(path).table.notes[-1]
    assert note.startswith("partition 1 would be ext4 with sectors of 4096 bytes")
    assert note.endswith("say sector_size=4096")
    assert "--sector-size 4096" in tapfs("info", path).out
    shown = tapfs("info", "--sector-size", "4096", path).out
    assert "mbr, sectors of 4096 bytes" in shown
    assert "20 MiB at 1 MiB, Linux, ext4 'large'" in shown
    assert tapfs("info", "--sector-size", "100", path).code == 64


@pytest.mark.parametrize(("said", "scheme"), [(512, "gpt"), (4096, None)])
def test_a_gpt_is_read_in_the_sectors_that_are_said(tmp_path: Path, said: int, scheme: str | None) -> None:
    disk = partitioned(tmp_path / "disk", "label: gpt\nsize=4M\n")
    assert look_at(disk, said).table.scheme == scheme


def test_a_gpt_without_its_mbr_is_told(tmp_path: Path) -> None:
    """Linux shows no partitions of such a disk."""
    disk = partitioned(tmp_path / "disk", "label: gpt\nsize=4M\n")
    data = disk.read_bytes()
    for gone in (512, MIB):  # the MBR alone, and the primary table with it
        disk.write_bytes(bytes(gone) + data[gone:])
        contents = look_at(disk)
        assert contents.table.scheme is None
        (note,) = contents.table.notes
        assert "has a GPT, but no MBR that announces it" in note
    subprocess.run(["mkfs.ext4", "-qF", disk], check=True)  # what is left of a GPT at the end means nothing then
    assert look_at(disk).table.notes == []


@pytest.mark.parametrize(("label", "words"), [("sun", "a Sun disk label"), ("sgi", "an SGI volume header")])
def test_labels_of_other_systems_are_told(tmp_path: Path, label: str, words: str) -> None:
    disk = partitioned(tmp_path / "disk", f"label: {label}\nsize=16M\n")
    assert partition_table_type(disk) == label
    contents = look_at(disk)
    assert contents.table.scheme is None
    (note,) = contents.table.notes
    assert note.startswith(f"the disk has {words}, which tapfs does not read")
    data = bytearray(disk.read_bytes())
    data[100] ^= 0xFF  # the checksum is wrong now
    disk.write_bytes(data)
    assert look_at(disk).table.notes == []


def mac() -> bytes:
    """The first two sectors of a disk with an Apple partition map of one entry."""
    entry = struct.pack(">HHIII32s32s", 0x504D, 0, 1, 1, 63, b"Apple", b"Apple_partition_map")
    return struct.pack(">HHI", 0x4552, 512, 8192).ljust(512, b"\0") + entry.ljust(512, b"\0")


def test_an_apple_map_is_told(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(mac().ljust(8 * MIB, b"\0"))
    assert partition_table_type(disk) == "mac"
    (note,) = look_at(disk).table.notes
    assert note.startswith("the disk has an Apple partition map, which")


def test_an_amiga_disk_is_told(tmp_path: Path) -> None:
    block = bytearray(512)
    struct.pack_into(">4sIIII", block, 0, b"RDSK", 64, 0, 7, 512)
    total = sum(word for (word,) in struct.iter_unpack(">I", block[:256]))
    struct.pack_into(">I", block, 8, -total & 0xFFFFFFFF)
    disk = tmp_path / "disk"
    disk.write_bytes((bytes(1024) + block).ljust(8 * MIB, b"\0"))
    (note,) = look_at(disk).table.notes
    assert "an Amiga rigid disk block" in note


def test_a_bsd_label_is_told(tmp_path: Path) -> None:
    """The BSDs make a partition of the MBR theirs and divide it by a label of their own, or label the whole disk."""
    disk = partitioned(tmp_path / "disk", "label: dos\nstart=2048, size=32768, type=a5\nsize=4M\n")
    words = "b\ny\nn\na\n\n\nw\n"
    subprocess.run(["fdisk", disk], input=words, text=True, check=True, capture_output=True)
    (note,) = look_at(disk).table.notes
    assert note.startswith("partition 1 has a BSD disklabel, which tapfs does not read")
    disk.write_bytes(disk.read_bytes()[2048 * 512 :])
    (note,) = look_at(disk).table.notes
    assert note.startswith("the disk has a BSD disklabel, which")
