"""Image formats and archives that tapfs does not read are named and never taken for raw disks.

Each sample holds what its format's description puts where the description puts it. What qemu-img and archivers write
themselves is in tests/peer/test_foreign.py.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as tapfs_package
from tapfs.disk import foreign, probe
from tapfs.errors import ErrorKind, ImageError
from tapfs.testing.model import MemoryFile
from tests.conftest import Ran

Run = Callable[..., Ran]
DISK = random.Random(7).randbytes(4096)


def tar(**options: Any) -> bytes:
    """A tar archive with a disk in it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        member = tarfile.TarInfo("Ref:41/00000000")
        member.size = len(DISK)
        archive.addfile(member, io.BytesIO(DISK))
    return stream.getvalue()


def old_tar() -> bytes:
    """A tar archive of 1979: no magic, a sum of six digits, a zero and a blank."""
    data = bytearray(tar(format=tarfile.USTAR_FORMAT))
    data[257:512] = bytes(255)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def zipped() -> bytes:
    """A ZIP archive with a disk in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("disk.raw", DISK)
    return stream.getvalue()


def alone(content: bytes) -> bytes:
    """The .lzma of LZMA Utils."""
    return lzma.compress(content, format=lzma.FORMAT_ALONE)


#: UDIFResourceFile: signature, version and length, all big-endian.

#: A disk of which the last bytes say what it is.
ENCRYPTED_DMG = DISK + b"cdsaencr"

SAMPLES: dict[str, list[bytes]] = {
    # docs/interop/qcow2: magic and version, both big-endian.
    "qcow-later": [b"QFI\xfb\0\0\0\4" + bytes(1000), b"QFI\xfb"],
    # bochs/iodev/hdimage: redolog_header_t.
    "bochs": [b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing" + bytes(1000)],
    # What `bximage -func=create -imgmode=sparse -hd=40M` of Debian writes.
    "bochs-sparse": [
        bytes.fromhex("ce8a4602 02000000 00800000 fc040000 00e07d02 00000000".replace(" ", "")).ljust(1024, b"\0")
    ],
    # The preamble of create_compressed_fs.
    "cloop": [b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n" + bytes(1000)],
    # Linux' arch/um/drivers/cow_user.c.
    "cow": [b"OOOM\0\0\0\2" + bytes(1000), b"OOOM\0\0\0\3" + bytes(1000), b"MOOO\1\0\0\0" + bytes(1000)],
    # libmodi, "Mac OS disk image types": trailer; encrypted in version 2 and 1; sparse image.
    "dmg-encrypted": [b"encrcdsa\0\0\0\2" + bytes(1000), ENCRYPTED_DMG],
    "sparseimage": [b"sprs\0\0\0\3" + bytes(4092)],
    # What readers of ASIF found: "shdw", version 1, header of 512 bytes, all big-endian.
    "asif": [b"shdw" + struct.pack(">II", 1, 512) + bytes(1000)],
    # libewf's documentation of EWF and EWF2.
    "ewf2": [b"EVF2\x0d\x0a\x81\0\2\1" + bytes(1000)],
    "ewf-logical": [b"LVF\x09\x0d\x0a\xff\0\1\1\0\0\0" + bytes(1000), b"LEF2\x0d\x0a\x81\0\2\1" + bytes(1000)],
    # afflib.h: AF_HEADER.
    "aff": [b"AFF10\r\n\0AFF\0" + bytes(1000)],
    "ad1": [b"ADSEGMENTEDFILE\0" + bytes(1000), b"ADCRYPT\0" + bytes(1000)],
    # Proxmox' vma_spec.txt: magic and version, both big-endian.
    "vma": [b"VMA\0\0\0\0\1" + bytes(1000)],
    # Android's sparse_format.h: the magic is little-endian.
    "android-sparse": [struct.pack("<IHHHH", 0xED26FF3A, 1, 0, 28, 12) + bytes(1000)],
    "chd": [b"MComprHD\0\0\0\x7c\0\0\0\5" + bytes(1000)],
    "partclone": [b"partclone-image\0" + b"0.3.23" + bytes(1000)],
    "partimage": [b"PaRtImAgE-VoLuMe" + bytes(1000)],
    "ntfsclone": [b"\0ntfsclone-image\x0a\1" + bytes(1000)],
    "ffu": [struct.pack("<I", 32) + b"SignedImage " + bytes(1000)],
    "wim": [b"MSWIM\0\0\0" + struct.pack("<II", 208, 0x10D00) + bytes(1000)],
    "gzip": [gzip.compress(DISK)],
    "xz": [lzma.compress(DISK)],
    # RFC 8878: a frame; a skippable frame before it.
    "zstd": [b"\x28\xb5\x2f\xfd\x24\0\1\0\0" + bytes(20), b"\x50\x2a\x4d\x18\4\0\0\0\0\0\0\0" + bytes(20)],
    "bzip2": [bz2.compress(DISK), bz2.compress(b""), bz2.compress(DISK, 1)],
    # LZ4 Frame Format Description: frame and legacy frame.
    "lz4": [b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(20), b"\x02\x21\x4c\x18" + bytes(20)],
    "lzma": [alone(DISK), lzma.compress(DISK, format=lzma.FORMAT_ALONE, preset=9)],
    "lzip": [b"LZIP\1\x0c" + bytes(30)],
    "lzop": [b"\x89LZO\0\r\n\x1a\n\x10\x40" + bytes(40)],
    "compress": [b"\x1f\x9d\x90" + DISK, b"\x1f\x9d\x0c" + DISK],
    # APPNOTE.TXT: a member, an empty archive, a part of several.
    "zip": [zipped(), b"PK\5\6" + bytes(18), b"PK\7\x08" + bytes(40)],
    "7z": [b"7z\xbc\xaf\x27\x1c\0\4" + bytes(40)],
    "rar": [b"Rar!\x1a\x07\0" + bytes(40), b"Rar!\x1a\x07\1\0" + bytes(40)],
    # A machine without a disk.
    "machine": [
        b'.encoding = "UTF-8"\nconfig.version = "8"\nvirtualHW.version = "19"\n',
        b'<?xml version="1.0"?><Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"/>',
        b'<?xml version="1.0"?><VirtualBox version="1.16-linux"><Machine/></VirtualBox>',
    ],
    "tar": [
        tar(format=tarfile.USTAR_FORMAT),
        tar(format=tarfile.GNU_FORMAT),
        tar(format=tarfile.PAX_FORMAT),
        old_tar(),
    ],
}
EACH = [pytest.param(name, data, id=f"{name}-{at}") for name in SAMPLES for at, data in enumerate(SAMPLES[name])]


def partition_table(data: bytes) -> bytes:
    """The bytes with a valid partition table in their first sector."""
    entry = struct.pack("<B3sB3sII", 0x80, bytes(3), 0x83, bytes(3), 2048, 4096)
    return data[:446].ljust(446, b"\1") + entry + bytes(48) + b"\x55\xaa" + data[512:].ljust(2048, b"\1")


def found(data: bytes) -> str:
    return probe.detect(MemoryFile(data)).name


def test_every_format_of_the_table_has_a_sample() -> None:
    assert [each.name for each in foreign.TABLE] == list(SAMPLES)


def test_a_format_that_is_read_has_left_the_table() -> None:
    assert not {each.name for each in foreign.TABLE} & set(probe.format_names())


@pytest.mark.parametrize(("name", "data"), EACH)
def test_it_is_named(name: str, data: bytes) -> None:
    assert found(data) == name


@pytest.mark.parametrize("name", [each.name for each in foreign.TABLE if not each.packed])
def test_it_is_refused_unless_it_is_said_to_be_raw(tapfs: Run, tmp_path: Path, name: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(SAMPLES[name][0])
    known = next(each for each in foreign.TABLE if each.name == name)
    for words in (["info", image], ["check", image], ["convert", "-O", "raw", image, tmp_path / "out"]):
        code, out, err = tapfs(*words)
        assert (code, out) == (12, "")
        assert err.startswith(f"tapfs: error: {image}: is {known.what}, ")
        assert known.remedy in err
        assert "say -f raw to take its bytes as they are" in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ImageError) as raised:
        tapfs_package.open(image)
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    assert tapfs("convert", "-f", "raw", "-O", "raw", image, tmp_path / "out") == (0, "", "")
    assert (tmp_path / "out").read_bytes() == SAMPLES[name][0]
    with tapfs_package.open(image, format="raw", writable=True) as disk:
        assert disk.size == len(SAMPLES[name][0])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        bytes(1 << 20),
        b"QFI",
        b"KDM",
        b"\x1f\x8b",
        b"\x1f\x8b\x08",
        b"\x1f\x8b\x08\xe0" + bytes(600),  # a reserved flag
        b"\x1f\x9d\x88" + bytes(600),  # codes of eight bits
        b"BZh9" + bytes(600),
        b"]" + bytes(600),
        b"]\0\0\x90\0" + b"\xff" * 8 + b"\0" + bytes(600),  # no dictionary of XZ Utils
        b"]\0\0\x80\0" + b"\xff" * 8 + b"\1" + bytes(600),
        b"conectix"[1:] + bytes(600),
        bytes(600) + b"koly" + bytes(508),
        b"\xca\xfe\xba\xbe" + bytes(600),  # a class file of Java
        b"#!/bin/sh\necho\n" + bytes(600),
        tar()[:100] + b"x" + tar()[101:257] + bytes(300),  # neither magic nor sum
        b"version=1\n# Disk DescriptorFile\n",
    ],
)
def test_what_is_none_of_them_is_raw(data: bytes) -> None:
    assert found(data) == "raw"


@pytest.mark.parametrize("name", ["gzip", "compress", "lzma"])
def test_a_boot_sector_may_begin_like_a_short_signature(name: str) -> None:
    data = SAMPLES[name][0]
    assert found(partition_table(data)) == "raw"
    # 55 aa alone is nothing: a compressed file has it once in 65536.
    assert found(data[:510].ljust(510, b"\1") + b"\x55\xaa" + data[512:]) == name


@pytest.mark.parametrize("name", ["bochs", "cloop", "xz", "zip"])
def test_a_long_signature_counts_although_there_is_a_partition_table(name: str) -> None:
    assert found(partition_table(SAMPLES[name][0])) == name


@pytest.mark.parametrize("name", ["dmg-encrypted"])
def test_a_trailer_counts_although_there_is_a_partition_table(name: str) -> None:
    assert found(partition_table(b"") + SAMPLES[name][-1]) == name


def test_a_few_sectors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    original = MemoryFile.read

    def counted(self: MemoryFile, offset: int, length: int) -> bytes:
        read.append((offset, length))
        return original(self, offset, length)

    monkeypatch.setattr(MemoryFile, "read", counted)
    assert found(b"x" * (1 << 20)) == "raw"
    assert sum(length for _, length in read) <= 8192
    assert len(read) <= 2


def test_an_overlay_over_one(tapfs: Run, tmp_path: Path) -> None:
    """A header that names a parent without its format, which is what qemu-img writes for qcow version 1."""
    parent, overlay = tmp_path / "parent", tmp_path / "overlay"
    parent.write_bytes(bytes(4096))
    assert tapfs("create", "-f", "qcow", "-b", parent, overlay).code == 0
    parent.write_bytes(SAMPLES["bochs"][0].ljust(4096, b"\0"))
    for words in (["map", overlay], ["convert", "-O", "raw", overlay, tmp_path / "out"], ["compare", overlay, overlay]):
        code, _, err = tapfs(*words)
        assert code == 12
        assert f"{parent}: is a Bochs image" in err
        assert "say --backing-format raw" in err
    with pytest.raises(ImageError, match="is a Bochs image"):
        tapfs_package.open(overlay, writable=True)
    assert not (tmp_path / "out").exists()
    with tapfs_package.open(overlay, backing_formats=["raw"]) as disk:
        assert disk.read(0, 5) == b"Bochs"


def test_creating_an_overlay_over_one(tapfs: Run, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.write_bytes(ENCRYPTED_DMG)
    code, _, err = tapfs("create", "-f", "qcow", "-b", parent, tmp_path / "overlay")
    assert code == 12
    assert "say -F raw" in err
    code, _, err = tapfs("create", "-f", "qcow", "-b", parent, "-F", "dmg2", tmp_path / "overlay")
    assert code == 12
    assert f"{parent}: unknown format 'dmg2'" in err
    assert os.listdir(tmp_path) == ["parent"]
    assert tapfs("create", "-f", "qcow", "-b", parent, "-F", "raw", tmp_path / "overlay") == (0, "", "")


def test_the_second_image_of_a_comparison_has_its_own_remedy(tapfs: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(SAMPLES["zip"][0])
    code, _, err = tapfs("compare", "-f", "raw", tmp_path / "a", tmp_path / "b")
    assert code == 12
    assert "or say -F raw to take" in err
    assert tapfs("compare", "-f", "raw", "-F", "raw", tmp_path / "a", tmp_path / "b").code == 0


def test_the_target_of_a_copy_into_an_existing_disk(tapfs: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(512))
    for before in (SAMPLES["bochs"][0].ljust(2048, b"\0"), ENCRYPTED_DMG, SAMPLES["zip"][0].ljust(2048, b"\0")):
        target.write_bytes(before)
        code, out, err = tapfs("convert", "-n", source, target)
        assert (code, out) == (12, "")
        assert "or say -O raw to take its bytes as they are" in err
        assert target.read_bytes() == before
    target.write_bytes(b"x" * 512)
    code, _, err = tapfs("convert", "-n", source, target)
    assert code == 16
    assert err.endswith("a guess is not enough to write to it; say -O raw if it is one\n")
    assert tapfs("convert", "-n", "-O", "raw", source, target) == (0, "", "")
    assert target.read_bytes() == bytes(512)


def test_the_tools_of_blktap(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """img2qcow takes raw disks: a container, or a qcow image, is none."""
    from tapfs.cli.blktap_tools import img2qcow

    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(SAMPLES["bochs"][0])
    assert img2qcow([str(target), str(source)]) == 12
    assert f"{source}: is a Bochs image" in capfd.readouterr().err
    tapfs_package.create(source, "qcow", 1 << 20, overwrite=True)
    assert img2qcow([str(target), str(source)]) == 12
    assert f"{source}: is a qcow image, not a raw disk" in capfd.readouterr().err
    assert not target.exists()
    source.write_bytes(DISK)
    assert img2qcow([str(target), str(source)]) == 0


def test_the_name_of_a_ram_disk_says_that_it_is_raw(tapfs: Run, ram_name: str) -> None:
    """What is in one is its users' business; the file behind it is a file like any."""
    assert tapfs("create", "-f", "ram", ram_name, "64K").code == 0
    with tapfs_package.open(ram_name, writable=True) as disk:
        disk.write(0, SAMPLES["bochs"][0])
    assert "ram" in tapfs("info", ram_name).out
    behind = Path("/dev/shm", "tapfs.ram." + ram_name.removeprefix("ram:"))  # noqa: S108
    assert tapfs("info", behind).code == 12
