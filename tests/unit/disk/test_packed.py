"""An image behind gzip, bzip2, xz or Zstandard is opened as what it holds, and only as far as it is read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
import subprocess
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest
import zstandard

import tapfs as api
from tapfs import ErrorKind, ImageError
from tapfs.host.file import LocalFile
from tapfs.host.packed.file import unpacked
from tests import dmg_images

KIB = 1 << 10
MIB = 1 << 20
SIZE = 4 * MIB + 512
UNIT = 256 * KIB


def xz_blocks(content: bytes) -> bytes:
    """A stream of blocks that each hold 256 KiB, by xz itself."""
    words = ["xz", "-c", f"--block-size={UNIT}"]
    return subprocess.run(words, input=content, capture_output=True, check=True).stdout


def xz_streams(content: bytes) -> bytes:
    return lzma.compress(content[:MIB]) + lzma.compress(content[MIB:])


def seekable_zstd(content: bytes) -> bytes:
    """Frames that each hold 256 KiB, and the table of them (Zstandard Seekable Format)."""
    parts = [content[at : at + UNIT] for at in range(0, len(content), UNIT)]
    frames = [zstandard.ZstdCompressor().compress(part) for part in parts]
    entries = b"".join(struct.pack("<II", len(frame), len(part)) for frame, part in zip(frames, parts, strict=True))
    table = entries + struct.pack("<IBI", len(frames), 0, 0x8F92EAB1)
    return b"".join(frames) + struct.pack("<II", 0x184D2A5E, len(table)) + table


KINDS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip of two members": ("gzip", lambda content: gzip.compress(content[:MIB]) + gzip.compress(content[MIB:])),
    "bzip2": ("bzip2", bz2.compress),
    "xz": ("xz", lzma.compress),
    "xz with padding": ("xz", lambda content: lzma.compress(content) + bytes(8)),
    "xz of blocks": ("xz", xz_blocks),
    "xz of streams": ("xz", xz_streams),
    "xz of streams with padding": (
        "xz",
        lambda content: lzma.compress(content[:MIB]) + bytes(4) + xz_blocks(content[MIB:]),
    ),
    "zstd": ("zstd", zstandard.ZstdCompressor().compress),
    "zstd of frames": ("zstd", seekable_zstd),
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """The bytes of a disk, and a qcow2 image of it."""
    drawn = random.Random(17)
    content = bytearray(SIZE)
    for at in range(0, SIZE - 100 * KIB, 300 * KIB):
        content[at : at + 90 * KIB] = drawn.randbytes(90 * KIB)
    folder = tmp_path_factory.mktemp("packed")
    (folder / "disk.raw").write_bytes(content)
    api.convert(folder / "disk.raw", folder / "disk.qcow2", format="raw", target_format="qcow2")
    return bytes(content), folder / "disk.qcow2"


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_image_is_its_contents(kind: str, image: tuple[bytes, Path], tmp_path: Path) -> None:
    content, plain = image
    packed = tmp_path / "disk"
    packed.write_bytes(KINDS[kind][1](plain.read_bytes()))
    with api.open(packed) as disk:
        assert disk.read(SIZE - 600, 600) == content[-600:]
        assert disk.read(0, SIZE) == content
    assert api.info(packed)["format"] == "qcow2"
    with pytest.raises(ImageError, match="is only read") as raised:
        api.open(packed, writable=True, format="qcow2")
    assert raised.value.kind is ErrorKind.READ_ONLY
    with api.open(packed, format="raw") as bytes_as_they_are:
        assert bytes_as_they_are.read(0, 6) == packed.read_bytes()[:6]


@pytest.mark.parametrize("kind", ["xz of blocks", "zstd of frames", "xz"])
def test_what_is_not_read_is_not_unpacked(kind: str, image: tuple[bytes, Path], tmp_path: Path) -> None:
    """A file that can be unpacked in parts is unpacked where it is read, any other up to there."""
    plain = image[1].read_bytes()
    packed = tmp_path / "disk"
    packed.write_bytes(KINDS[kind][1](plain))
    at = len(plain) - UNIT - 1000 if kind != "xz" else 1000
    with closing(unpacked(LocalFile.open(str(packed), writable=False), KINDS[kind][0])) as file:
        assert file.presence is not None
        assert file.presence.blocks.count(1) == 0
        assert file.read(at, 600) == plain[at : at + 600]
        assert file.presence.blocks.count(1) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_an_error_and_never_other_bytes(kind: str, image: tuple[bytes, Path], tmp_path: Path) -> None:
    content, plain = image
    sound = KINDS[kind][1](plain.read_bytes())
    drawn = random.Random(23)
    packed = tmp_path / "disk"
    for number in range(25):
        damaged = bytearray(sound)
        if number % 2:
            damaged[drawn.randrange(6, len(sound))] ^= 1 << drawn.randrange(8)
        else:
            del damaged[drawn.randrange(20, len(sound)) :]
        packed.write_bytes(damaged)
        with suppress(ImageError), api.open(packed) as disk:
            # A date and a flag have no checksum; a frame of Zstandard has one where that was asked for.
            assert disk.read(0, SIZE) == content or ("zstd" in kind and number % 2)


def test_a_packed_parent_is_opened_as_its_contents(image: tuple[bytes, Path], tmp_path: Path) -> None:
    content, plain = image
    (tmp_path / "base.xz").write_bytes(lzma.compress(plain.read_bytes()))
    api.create(tmp_path / "overlay", "qcow2", backing="base.xz", backing_format="qcow2")
    with api.open(tmp_path / "overlay", writable=True) as disk:
        disk.write(5000, b"changed")
        assert disk.read(0, SIZE) == content[:5000] + b"changed" + content[5007:]


def test_an_apple_image_that_begins_with_packed_data_is_one(image: tuple[bytes, Path], tmp_path: Path) -> None:
    """The library's reader is asked last: what a driver claims by the end of the file is the driver's."""
    content = image[0][:MIB]
    packed = tmp_path / "disk.dmg"
    packed.write_bytes(dmg_images.image([(0, [(dmg_images.BZIP2, content)])]))
    assert packed.read_bytes()[:3] == b"BZh"
    with api.open(packed) as disk:
        assert disk.read(0, MIB) == content
