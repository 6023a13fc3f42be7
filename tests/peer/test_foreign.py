"""Files in formats of other readers, and archives, are refused by name; real disks are raw."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.peer.test_convert import qemu

Run = Callable[..., Ran]
MIB = 1 << 20

#: The words before and after the image.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "info": (["info"], []),
    "info --json": (["info", "--json"], []),
    "map": (["map"], []),
    "check": (["check"], []),
    "repair": (["repair"], []),
    "repair --dry-run": (["repair", "-n"], []),
    "convert": (["convert", "-O", "qcow"], ["new"]),
    "convert from a parent": (["convert", "-O", "qcow", "-b", "disk.raw", "-F", "raw"], ["new"]),
    "compare": (["compare", "disk.raw"], []),
    "compare the other way": (["compare"], ["disk.raw"]),
    "mount": (["mount"], ["folder"]),
    "mount --rw": (["mount", "--rw"], ["folder"]),
    "mount --files": (["mount", "--files"], ["folder"]),
    "mount --temp": (["mount", "--temp"], ["folder"]),
    "mount --overlay": (["mount", "--overlay", "new"], ["folder"]),
    "create -b": (["create", "-f", "qcow", "new", "-b"], []),
    "convert -b": (["convert", "-f", "raw", "-O", "qcow", "disk.raw", "new", "-b"], []),
}


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk of 8 MiB with a partition table and an ext4. Not to be changed."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    path.touch()
    os.truncate(path, 8 * MIB)
    subprocess.run(["sfdisk", "-q", path], input=b"start=2048\n", check=True)
    subprocess.run(["mkfs.ext4", "-qF", "-E", f"offset={MIB}", path, "7M"], check=True)
    return path


@pytest.fixture(scope="session")
def image(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An empty disk of 8 MiB in a format that qemu-img reads and tapfs does not, and what tapfs calls it.

    It lies in a folder with `disk.raw`. bochs/iodev/hdimage: redolog_header_t, version 2, a catalogue without extents.
    """
    folder = tmp_path_factory.mktemp("foreign")
    path = folder / "image"
    extents, extent_bytes = 8, MIB
    head = struct.pack("<32s16s16s", b"Bochs Virtual HD Image", b"Redolog", b"Growing")
    head += struct.pack("<IIIIIIQ", 0x00020000, 512, extents, extent_bytes // 512 // 8, extent_bytes, 0, 8 * MIB)
    path.write_bytes(head.ljust(512, b"\0") + b"\xff" * 4 * extents + bytes(512 - 4 * extents))
    (folder / "disk.raw").symlink_to(disk)
    (folder / "folder").mkdir()
    assert qemu_format(path) == "bochs"
    return path, "a Bochs image"


def qemu_format(path: Path) -> str:
    """The format as qemu-img recognises it."""
    said: dict[str, str] = json.loads(qemu("qemu-img", "info", "--output=json", path))
    return said["format"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_command_refuses_it(tapfs: Run, image: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, what = image
    monkeypatch.chdir(path.parent)
    before = contents(path.parent)
    for before_image, after_image in COMMANDS.values():
        code, out, err = tapfs(*before_image, "image", *after_image)
        assert code == 12, before_image
        if "--json" in before_image:
            out = "" if set(json.loads(out)) == {"version", "error"} else out
        assert out == "", before_image
        assert f"image: is {what}, which tapfs does not read; make a raw or qcow image of it with qemu-img" in err
        assert "raw" in err.rpartition(" or say ")[2], "how to take it as it is"
    assert contents(path.parent) == before


def test_said_to_be_raw_it_is(tapfs: Run, image: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = image
    monkeypatch.chdir(path.parent)
    size = path.stat().st_size
    assert "raw" in tapfs("info", "-f", "raw", "image").out
    assert tapfs("map", "-f", "raw", "image").code == 0
    assert tapfs("compare", "-f", "raw", "-F", "raw", "image", "image").code == 0
    assert tapfs("convert", "-f", "raw", "-O", "qcow", "image", "new").code == 0
    assert tapfs("convert", "-O", "raw", "new", "again").code == 0
    again = (path.parent / "again").read_bytes()
    assert again[:size] == path.read_bytes()
    assert not any(again[size:])
    assert tapfs("create", "--force", "-f", "qcow", "-b", "image", "-F", "raw", "new").code == 0
    assert tapfs("compare", "--backing-format", "raw", "-F", "raw", "new", "image").code == 0
    for name in ("new", "again"):
        (path.parent / name).unlink()


def test_a_parent_of_qemus_making(tapfs: Run, image: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A qcow header has no word for the format of the parent, whatever -F said."""
    path, what = image
    monkeypatch.chdir(path.parent)
    kind = qemu_format(path)
    qemu("qemu-img", "create", "-q", "-u", "-f", "qcow", "-b", "image", "-F", kind, "over", 8 * MIB)
    before = contents(path.parent)
    for words in (
        ["map", "over"],
        ["convert", "-O", "raw", "over", "new"],
        ["compare", "over", "over"],
        ["mount", "--rw", "over", "folder"],
    ):
        code, out, err = tapfs(*words)
        assert (code, out) == (12, ""), words
        assert f"image: is {what}, which tapfs does not read" in err
    assert contents(path.parent) == before
    (path.parent / "over").unlink()


ARCHIVERS: dict[str, tuple[list[str], str]] = {
    "lzma": (["xz", "-c", "--format=lzma", "disk.raw"], "an LZMA file"),
    "lz4": (["lz4", "-q", "-c", "disk.raw"], "an LZ4 file"),
    "old lz4": (["lz4", "-q", "-l", "-c", "disk.raw"], "an LZ4 file"),
    "zip": (["zip", "-q", "-", "disk.raw"], "a ZIP archive"),
    "GNU tar": (["tar", "-c", "disk.raw"], "a tar archive"),
    "old tar": (["tar", "-c", "--format=v7", "disk.raw"], "a tar archive"),
    "pax": (["tar", "-c", "--format=pax", "disk.raw"], "a tar archive"),
    "ntfsclone": (["ntfsclone", "-q", "-s", "-O", "-", "ntfs.raw"], "an ntfsclone image"),
    "partly qcow": (["head", "-c", "7", "disk.qcow2"], "a qcow image of an unknown version"),
}


@pytest.mark.parametrize("name", ARCHIVERS)
def test_files_that_hold_an_image(tapfs: Run, tmp_path: Path, disk: Path, name: str) -> None:
    words, what = ARCHIVERS[name]
    (tmp_path / "disk.raw").write_bytes(disk.read_bytes())
    if name == "ntfsclone":
        make(tmp_path / "ntfs.raw", 8, ["mkfs.ntfs", "-FqQ"])
    qemu("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", MIB)
    with (tmp_path / "archive").open("wb") as archive:
        subprocess.run(words, cwd=tmp_path, check=True, stdout=archive, stderr=subprocess.DEVNULL)
    for command in ("info", "map", "check", "repair"):
        code, out, err = tapfs(command, tmp_path / "archive")
        assert (code, out) == (12, "")
        assert f"is {what}, " in err


@pytest.mark.parametrize(
    "words", [["gzip", "-c"], ["bzip2", "-c"], ["xz", "-c"], ["xz", "-c", "-T2"], ["zstd", "-q", "-c"]]
)
def test_files_that_are_an_image_packed(tapfs: Run, tmp_path: Path, disk: Path, words: list[str]) -> None:
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, tmp_path / "disk.qcow2")
    with (tmp_path / "packed").open("wb") as packed:
        subprocess.run([*words, tmp_path / "disk.qcow2"], check=True, stdout=packed)
    assert tapfs("compare", "-f", "raw", disk, tmp_path / "packed").code == 0


def make(path: Path, size_mib: int, command: list[str], script: bytes = b"") -> None:
    """A sparse file, and what a command makes of it."""
    path.touch()
    os.truncate(path, size_mib * MIB)
    if command:
        subprocess.run([*command, path], check=True, capture_output=True, input=script)


GPT = b"label: gpt\nstart=1MiB, size=4MiB\n"
#: Valid raw disks: MiB, the command that makes one in a file of that size (which comes last), what it reads from its
#: input. 0 MiB: the command makes the file `disk` itself, of `folder`.
RAW: dict[str, tuple[int, list[str], bytes]] = {
    "nothing": (0, [], b""),
    "zeros": (3, [], b""),
    "mbr": (16, ["sfdisk", "-q"], b"label: dos\nstart=2048\n"),
    "mbr, logical": (16, ["sfdisk", "-q"], b"label: dos\n,4MiB\n,,E\n,2MiB\n"),
    "mbr, bootable": (16, ["sfdisk", "-q"], b"label: dos\n,,c,*\n"),
    "mbr of no partition": (16, ["sfdisk", "-q"], b"label: dos\n"),
    "gpt": (16, ["sfdisk", "-q"], GPT),
    "sgi": (16, ["sfdisk", "-q"], b"label: sgi\n"),
    "sun": (16, ["sfdisk", "-q"], b"label: sun\n"),
    "ext2": (8, ["mkfs.ext2", "-qF"], b""),
    "ext3": (16, ["mkfs.ext3", "-qF"], b""),
    "ext4": (16, ["mkfs.ext4", "-qF"], b""),
    "xfs": (300, ["mkfs.xfs", "-q"], b""),
    "btrfs": (120, ["mkfs.btrfs", "-q"], b""),
    "fat12": (2, ["mkfs.vfat"], b""),
    "fat16": (20, ["mkfs.vfat", "-F16"], b""),
    "fat32": (64, ["mkfs.vfat", "-F32"], b""),
    "exfat": (32, ["mkfs.exfat"], b""),
    "ntfs": (32, ["mkfs.ntfs", "-FqQ"], b""),
    "swap": (4, ["mkswap"], b""),
    "minix": (4, ["mkfs.minix"], b""),
    "iso9660": (0, ["xorriso", "-as", "mkisofs", "-quiet", "-o", "disk", "folder"], b""),
    "squashfs": (0, ["mksquashfs", "folder", "disk", "-quiet", "-no-progress"], b""),
}
#: Valid raw disks whose makers are no packages of the tests: their first sectors, from their descriptions.
BYTES: dict[str, bytes] = {
    "lvm": bytes(512) + b"LABELONE\1\0\0\0\0\0\0\0" + bytes(8) + b"LVM2 001" + bytes(480),
    "luks 1": b"LUKS\xba\xbe\0\1aes" + bytes(600),
    "luks 2": b"LUKS\xba\xbe\0\2" + bytes(600),
    "md raid": bytes(4096) + b"\xfc\x4e\x2b\xa9\1\0\0\0" + bytes(600),
    "bsd": bytes(512) + b"\x57\x45\x56\x82" + bytes(600),
    "apple map": b"ER\2\0" + bytes(508) + b"PM\0\0" + bytes(508),
    "grub": b"\xeb\x63\x90" + bytes(443) + b"\0" * 64 + b"\x55\xaa" + b"GRUB",
    "bitlocker": b"\xeb\x58\x90-FVE-FS-" + bytes(499) + b"\x55\xaa",
    "zfs": bytes(16384) + b"\0\0\0\0\0\xba\xb1\x0c" + bytes(1000),
    "text": b"hello\n" * 1000,
    "a wallet of noise": random.Random(1).randbytes(70_001),
    "noise, one byte": b"\x1f",
    "a kernel": b"\x7fELF\2\1\1" + bytes(1000),
    "odd length": b"disk" * 1001 + b"!",
}


def said_of(tapfs: Run, path: Path) -> None:
    """A guess that it is raw is good enough to read, without a word."""
    code, out, err = tapfs("info", path)
    assert (code, err) == (0, "")
    assert re.search("^format: +raw$", out, re.MULTILINE)
    assert tapfs("map", "--json", path).err == ""
    assert tapfs("compare", path, path) == (0, "Images are identical.\n", "")


@pytest.mark.parametrize("name", RAW)
def test_a_disk_is_raw(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    size, command, script = RAW[name]
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/file").write_text("content")
    if size or not command:
        make(Path("disk"), size, command, script)
    else:
        subprocess.run(command, check=True, capture_output=True)
    said_of(tapfs, Path("disk"))


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_a_disk_are_raw(tapfs: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "disk").write_bytes(BYTES[name])
    said_of(tapfs, tmp_path / "disk")
