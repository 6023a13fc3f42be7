"""File systems named as blkid names them, made by their own tools."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.partitions.test_tables import MIB, look_at, partitioned

#: What is made, of how many MiB, by which command (the file comes last).
MADE = {
    "ext2": (8, ["mkfs.ext2", "-qF", "-L", "second"]),
    "ext3": (16, ["mkfs.ext3", "-qF"]),
    "ext4": (16, ["mkfs.ext4", "-qF", "-L", "größe x"]),
    "journal": (16, ["mkfs.ext4", "-qF", "-O", "journal_dev"]),
    "xfs": (300, ["mkfs.xfs", "-q", "-L", "xfs-label"]),
    "btrfs": (120, ["mkfs.btrfs", "-q", "-L", "a label"]),
    "fat12": (2, ["mkfs.vfat", "-n", "SMALL"]),
    "fat16": (20, ["mkfs.vfat", "-F16", "-n", "SIX TEEN"]),
    "fat32": (64, ["mkfs.vfat", "-F32", "-n", "BIG"]),
    "fat of 4096": (300, ["mkfs.vfat", "-F32", "-S4096", "-n", "SECTORS"]),
    "fat without a label": (64, ["mkfs.vfat", "-F32"]),
    "exfat": (32, ["mkfs.exfat", "-L", "ex label"]),
    "exfat without a label": (32, ["mkfs.exfat"]),
    "ntfs": (32, ["mkfs.ntfs", "-FqQ", "-L", "nt label"]),
    "ntfs of 64k": (64, ["mkfs.ntfs", "-FqQ", "-c65536", "-L", "x" * 32]),
    "udf": (16, ["mkudffs", "-b", "512", "-l", "größe x"]),
    "udf of 2048": (16, ["mkudffs", "-b", "2048", "-l", "日本"]),
    "udf of 4096": (16, ["mkudffs", "-b", "4096"]),
    "udf by windows": (16, ["mkudffs", "-b", "512", "--fullvsid=01234567xyzw9999UDF"]),
    "swap": (4, ["mkswap", "-L", "swapped"]),
    "swap of 64k": (4, ["mkswap", "-p65536"]),
}

LUKS_NOTE = (
    "the disk is encrypted with LUKS, and tapfs shows it so: cryptsetup opens it,"
    " and format='luks' does if the image is raw"
)

#: The label of a physical volume (pvcreate of LVM 2.03 on 8 MiB), without the zeros after it.
LVM2 = bytes.fromhex(
    "4c4142454c4f4e45010000000000000080cc8473200000004c564d3220303031"
    "644a37386e51615a303359464936334d4572494130516c457851796162735473"
    "0000800000000000000010000000000000000000000000000000000000000000"
    "0000000000000000001000000000000000f00f00000000000000000000000000"
    "00000000000000000200000000000000"
)


def blkid(path: Path) -> tuple[str | None, ...] | None:
    """What blkid says of a file: type, label, UUID; None if nothing."""
    words = ["blkid", "--probe", "--output", "udev", path]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    if "ID_FS_TYPE" not in found:
        return None
    label = found.get("ID_FS_LABEL_ENC")
    if label is not None:
        label = label.encode().decode("unicode_escape").encode("latin-1").decode().rstrip()
    return found["ID_FS_TYPE"], label, found.get("ID_FS_UUID")


def assert_like_blkid(path: Path, notes: Sequence[str] = ()) -> None:
    contents = look_at(path)
    assert contents.file_system is not None
    assert tuple(contents.file_system) == blkid(path)
    assert contents.table.scheme is None
    assert contents.table.notes == list(notes)


@pytest.mark.parametrize("name", MADE)
def test_like_blkid(tmp_path: Path, name: str) -> None:
    size, command = MADE[name]
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, size * MIB)
    subprocess.run([*command, path], check=True, capture_output=True)
    assert_like_blkid(path)


def test_archives_like_blkid(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("content")
    iso, squashfs = tmp_path / "iso", tmp_path / "squashfs"
    made_iso = ["xorriso", "-as", "mkisofs", "-quiet", "-V", "ISO_LABEL", "-o", iso, source]
    subprocess.run(made_iso, check=True, capture_output=True)
    subprocess.run(["mksquashfs", source, squashfs, "-quiet"], check=True, capture_output=True)
    assert_like_blkid(iso)
    assert_like_blkid(squashfs)


@pytest.mark.parametrize("more", [[], ["-r", "-J"]])
def test_udf_beside_iso9660_like_blkid(tmp_path: Path, more: list[str]) -> None:
    """A disc with the structures of both is UDF: its ISO 9660 side may be a text file that says so."""
    source, disc = tmp_path / "source", tmp_path / "disc"
    source.mkdir()
    (source / "README.TXT").write_text("This disc needs an operating system that reads UDF.")
    made = ["genisoimage", "-quiet", "-udf", *more, "-V", "BRIDGE", "-o", disc, source]
    subprocess.run(made, check=True, capture_output=True)
    assert_like_blkid(disc)
    found = look_at(disc).file_system
    assert found is not None
    assert found.type == "udf"
    with disc.open("r+b") as file:  # without its anchors nothing leads to the rest of UDF
        for block in (256, disc.stat().st_size // 2048 - 1):
            file.seek(block * 2048)
            file.write(bytes(2048))
    found = look_at(disc).file_system
    assert found is not None
    assert (found.type, found.label) == ("iso9660", "BRIDGE")


def test_a_physical_volume_like_blkid(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes((bytes(512) + LVM2).ljust(8 * MIB, b"\0"))
    assert_like_blkid(path)


@pytest.mark.parametrize("version", [1, 2])
def test_encrypted_like_blkid(tmp_path: Path, version: int) -> None:
    """The fields that LUKS has in the clear, from its specification."""
    uuid = b"0b365c84-1eee-4189-9864-09b5091ab880"
    head = bytearray(8 * MIB)
    head[:8] = b"LUKS\xba\xbe" + version.to_bytes(2, "big")
    if version == 2:
        head[24:29] = b"vault"
    head[168 : 168 + len(uuid)] = uuid
    path = tmp_path / "disk"
    path.write_bytes(head)
    assert_like_blkid(path, [LUKS_NOTE])


@pytest.mark.parametrize("offset", [0x4000, 0x400000])
def test_encrypted_under_swap_like_blkid(tmp_path: Path, offset: int) -> None:
    """Swap space made over LUKS 2, whose second header is still there."""
    uuid = b"0b365c84-1eee-4189-9864-09b5091ab880"
    path = tmp_path / "disk"
    path.write_bytes(bytes(8 * MIB))
    subprocess.run(["mkswap", path], check=True, capture_output=True)
    header = bytearray(512)
    header[:8] = b"SKUL\xba\xbe\0\2"
    header[24:29] = b"vault"
    header[168 : 168 + len(uuid)] = uuid
    header[256:264] = offset.to_bytes(8, "big")
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(header)
    assert_like_blkid(path, [LUKS_NOTE])


def test_a_fat_label_that_starts_with_e5(tmp_path: Path) -> None:
    """It is written with 05 in that place, because E5 marks a free entry (blkid shows the 05)."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * MIB))
    subprocess.run(["mkfs.vfat", "-n", "EABEL", path], check=True, capture_output=True)
    path.write_bytes(path.read_bytes().replace(b"EABEL      \x08", b"\x05\xe5BEL      \x08"))
    found = look_at(path).file_system
    assert found is not None
    assert found.label == "\N{GREEK SMALL LETTER SIGMA}" * 2 + "BEL"


def test_nothing_like_blkid(tmp_path: Path, sample: Path) -> None:
    empty = tmp_path / "disk"
    empty.write_bytes(bytes(MIB))
    for path in (empty, sample):
        assert blkid(path) is None
        assert look_at(path).file_system is None


def test_in_partitions(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", "label: gpt\nsize=20M\nsize=4M\nsize=5M\n")
    first, second, third = look_at(disk).table.partitions
    for partition, command in ((first, ["mkfs.ext4", "-qF", "-L", "root"]), (second, ["mkswap", "-L", "swap"])):
        part = tmp_path / "part"
        part.write_bytes(bytes(partition.size))
        subprocess.run([*command, part], check=True, capture_output=True)
        with disk.open("r+b") as file:
            file.seek(partition.start)
            file.write(part.read_bytes())
    assert third.file_system is None
    found = [partition.file_system for partition in look_at(disk).table.partitions]
    assert [each and (each.type, each.label) for each in found] == [("ext4", "root"), ("swap", "swap"), None]


@pytest.mark.parametrize("name", [name for name in MADE if name.split()[0] not in {"journal", "swap", "udf"}])
def test_what_is_longer_than_its_disk_is_told(tmp_path: Path, name: str) -> None:
    """As the first file of a split image is. The whole one has no such note, see test_like_blkid."""
    size, command = MADE[name]
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, size * MIB)
    subprocess.run([*command, path], check=True, capture_output=True)
    os.truncate(path, size * MIB - 65536)
    contents = look_at(path)
    assert contents.file_system is not None
    (note,) = contents.table.notes
    said = re.fullmatch(r"the (\w+) of the disk has (\d+) bytes, and the disk (\d+): the image was cut, or .*", note)
    assert said is not None
    assert (said[1], int(said[3])) == (contents.file_system.type, size * MIB - 65536)
    assert size * MIB - 65536 < int(said[2]) <= size * MIB


def test_two_at_once_are_told(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 16 * MIB)
    subprocess.run(["mkfs.ext4", "-qF", path], check=True)
    with path.open("r+b") as file:
        file.write(b"hsqs".ljust(28, b"\0") + b"\4\0")
    contents = look_at(path)
    assert contents.file_system is None
    assert contents.table.notes == ["the disk has the signatures of ext4 and squashfs"]


BITLOCKER_NOTE = (
    "the disk is encrypted with BitLocker, and tapfs shows it so: dislocker or cryptsetup's bitlkOpen opens it"
)
_WHOLE = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")
_USED_SPACE_ONLY = bytes.fromhex("3b4da89280dd0e4d9e4eb1e3284eaed8")
_METADATA_AT = 3 * MIB


@pytest.mark.parametrize("kind", ["whole", "used space only", "to go", "vista"])
def test_bitlocker_like_blkid(tmp_path: Path, kind: str) -> None:
    """The metadata lie in the middle of the volume; To Go has the boot sector of a FAT32 that Windows XP can read."""
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 64 * MIB)
    if kind == "to go":
        subprocess.run(["mkfs.vfat", "-F32", "-n", "BIG", path], check=True, capture_output=True)
    place = _METADATA_AT.to_bytes(8, "little")
    boot = {
        "whole": {0: b"\xeb\x58\x90-FVE-FS-", 160: _WHOLE + place},
        "used space only": {0: b"\xeb\x58\x90-FVE-FS-", 160: _USED_SPACE_ONLY + place},
        "to go": {0: b"\xeb\x58\x90MSWIN4.1", 424: _WHOLE + place},
        "vista": {0: b"\xeb\x52\x90-FVE-FS-", 11: b"\x00\x02\x08", 56: (_METADATA_AT // 4096).to_bytes(8, "little")},
    }[kind]
    with path.open("r+b") as file:
        for offset, field in boot.items():
            file.seek(offset)
            file.write(field)
        assert look_at(path).file_system != ("BitLocker", None, None)
        file.seek(_METADATA_AT)
        file.write(b"-FVE-FS-\x3a\0\2\0")
    assert_like_blkid(path, [BITLOCKER_NOTE])
