"""DMG images made by bytes: blocks of every kind that begin anywhere, both places of tables, and damage."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.formats.dmg import FORMAT
from tapfs.kernel import codec_libraries
from tapfs.testing import hostile
from tapfs.testing.subject import Subject
from tests.dmg_images import ADC, BZIP2, IGNORED, LZFSE, LZMA, PACK, RAW, SECTOR, ZERO, ZLIB, image

CHOICE = random.Random(1)


def content(sectors: int, seed: int) -> bytes:
    """Text that packs well, or noise, or both by turns."""
    if seed % 3 == 0:
        return random.Random(seed).randbytes(sectors * SECTOR)
    return (b"some text of %d, " % seed * sectors * 40 + bytes(sectors * SECTOR))[: sectors * SECTOR]


def parts(kind: int) -> tuple[list[tuple[int, list[tuple[int, bytes]]]], bytes]:
    """Partitions with blocks of a kind, of many lengths and at odd sectors, and the bytes of the disk."""
    blocks = [(kind, content(sectors, i)) for i, sectors in enumerate((512, 512, 100, 7, 512, 2048, 1, 60))]
    blocks.insert(3, (ZERO, bytes(3000 * SECTOR)))
    blocks.insert(5, (IGNORED, bytes(5 * SECTOR)))
    first = [(kind, content(40, 1))]
    length = sum(len(each) for _, each in blocks) // SECTOR
    last = [(kind, content(33, 5))]
    disk = b"".join(each for _, each in [*first, *blocks, *last])
    return [(0, first), (40, blocks), (40 + length, last)], disk


def written(folder: Path, data: bytes) -> Path:
    path = folder / "disk.dmg"
    path.write_bytes(data)
    return path


def lzfse(kind: int, data: bytes) -> bytes:
    pack: Callable[[bytes], bytes] = import_module("liblzfse").compress
    return pack(data) if kind == LZFSE else data


@pytest.mark.parametrize("resources", [False, True], ids=["property list", "resource fork"])
@pytest.mark.parametrize("kind", [RAW, ADC, ZLIB, BZIP2, LZMA], ids=["raw", "adc", "zlib", "bzip2", "lzma"])
def test_blocks_of_every_kind_that_begin_anywhere(tmp_path: Path, kind: int, resources: bool) -> None:  # noqa: FBT001
    made, disk = parts(kind)
    path = written(tmp_path, image(made, resources=resources))
    with tapfs.open(path) as opened:
        assert opened.format_name == "dmg"
        assert opened.size == len(disk)
        for offset in (0, 13, 40 * SECTOR - 1, 8 << 20, len(disk) - 5000):
            length = min(300_000, opened.size - offset)
            if length > 0:
                assert opened.read(offset, length) == disk[offset : offset + length]
        assert opened.read(0, opened.size) == disk
    report = tapfs.check(path)
    assert (report.corruptions, report.findings) == (0, [])


def test_lzfse_by_the_library_of_a_package(tmp_path: Path) -> None:
    made, disk = parts(LZFSE)
    with tapfs.open(written(tmp_path, image(made, pack=lzfse))) as opened:
        assert opened.read(0, opened.size) == disk


def _no_library(_codec: int, _path: bytes) -> int:
    return -errno.ENOPKG


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process the library may be loaded already.
    monkeypatch.setattr(codec_libraries, "lib", SimpleNamespace(tapfs_codec_library=_no_library))
    with pytest.raises(ImageError, match=r"packed with bzip2, and the library .* install libbz2") as caught:
        codec_libraries.load_codec(codec_libraries.Codec.BZIP2, str(tmp_path))
    assert caught.value.kind is ErrorKind.UNSUPPORTED


def test_tables_in_any_order(tmp_path: Path) -> None:
    made, disk = parts(ZLIB)
    with tapfs.open(written(tmp_path, image(made[::-1]))) as opened:
        assert opened.read(0, opened.size) == disk


def test_what_no_block_has_is_zeros(tmp_path: Path) -> None:
    made = [(10, [(ZLIB, content(20, 1))]), (100, [(RAW, content(5, 3))])]
    with tapfs.open(written(tmp_path, image(made, sectors=120))) as opened:
        expected = bytearray(120 * SECTOR)
        expected[10 * SECTOR : 30 * SECTOR] = content(20, 1)
        expected[100 * SECTOR : 105 * SECTOR] = content(5, 3)
        assert opened.read(0, opened.size) == bytes(expected)


@pytest.mark.parametrize(
    ("made", "kind", "message"),
    [
        ([(0, [(ZLIB, content(4, 1))]), (2, [(ZLIB, content(4, 1))])], ErrorKind.CORRUPT, "two blocks have sector 2"),
        ([(0, [(ZLIB, content(4, 1)), (BZIP2, content(4, 1))])], ErrorKind.UNSUPPORTED, "by bzip2 and zlib at once"),
        ([(0, [(0x80000009, content(4, 1))])], ErrorKind.UNSUPPORTED, "of the unknown kind 0x80000009"),
        ([(1 << 60, [(ZLIB, content(4, 1))])], ErrorKind.CORRUPT, "ends at sector"),
        ([(0, [(ZLIB, b"")])], ErrorKind.CORRUPT, None),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, made: list[tuple[int, list[tuple[int, bytes]]]], kind: ErrorKind, message: str | None
) -> None:
    path = written(tmp_path, image(made))
    if message is None:
        with tapfs.open(path) as opened:
            assert opened.size == 0
        return
    with pytest.raises(ImageError, match=message) as caught:
        tapfs.open(path)
    assert caught.value.kind is kind


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [(4, 5, "version 5"), (60, 3, "one of 3 segments"), (28, 1 << 30, "data fork"), (220, 1 << 30, "property list")],
)
def test_a_damaged_trailer_is_refused_by_its_field(tmp_path: Path, at: int, value: int, message: str) -> None:
    made, _ = parts(ZLIB)
    path = written(tmp_path, image(made, damage=lambda trailer: struct.pack_into(">I", trailer, at, value)))
    with pytest.raises(ImageError, match=message):
        tapfs.open(path, format="dmg")


def test_a_trailer_with_padding_behind_it(tmp_path: Path) -> None:
    made, disk = parts(ZLIB)
    for padding in (1, 511):
        with tapfs.open(written(tmp_path, image(made) + bytes(padding))) as opened:
            assert opened.format_name == "dmg"
            assert opened.read(0, opened.size) == disk


def test_a_payload_that_unpacks_to_less_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    made = [(0, [(ZLIB, content(8, 1))])]
    path = written(tmp_path, image(made, pack=lambda _, data: PACK[ZLIB](data[:1024])))
    with tapfs.open(path) as opened:
        assert opened.read(0, 1024) == content(8, 1)[:1024]
        for _ in range(2):
            with pytest.raises(ImageError) as caught:
                opened.read(1024, 512)
            assert caught.value.kind is ErrorKind.CORRUPT


def test_plain_bytes_that_end_inside_a_sector_are_refused_and_no_zeros(tmp_path: Path) -> None:
    made = [(0, [(RAW, content(2, 3))])]
    with tapfs.open(written(tmp_path, image(made, pack=lambda _, data: data[:SECTOR]))) as opened:
        assert opened.read(0, opened.size) == content(2, 3)[:SECTOR] + bytes(SECTOR)
    with pytest.raises(ImageError, match="has 700 plain bytes for 2 sectors") as caught:
        tapfs.open(written(tmp_path, image(made, pack=lambda _, data: data[:700])))
    assert caught.value.kind is ErrorKind.CORRUPT


def test_a_table_that_counts_fewer_blocks_than_it_has_is_refused_and_no_zeros(tmp_path: Path) -> None:
    data = bytearray(image([(0, [(RAW, content(2, 3))])], resources=True))
    data[data.index(b"mish") + 203] = 2  # the comment and the block, and not the end
    with pytest.raises(ImageError, match="and no end among them") as caught:
        tapfs.open(written(tmp_path, bytes(data)))
    assert caught.value.kind is ErrorKind.CORRUPT


def test_a_block_that_says_that_it_is_the_end_before_others_is_refused_and_no_zeros(tmp_path: Path) -> None:
    data = bytearray(image([(0, [(RAW, content(2, 3)), (RAW, content(2, 6))])], resources=True))
    at = data.index(b"mish") + 204 + 40
    data[at : at + 4] = b"\xff" * 4
    with pytest.raises(ImageError, match="block 1 of a table of 4 says that it is the end") as caught:
        tapfs.open(written(tmp_path, bytes(data)))
    assert caught.value.kind is ErrorKind.CORRUPT


def test_a_check_compares_the_data(tmp_path: Path) -> None:
    made, _ = parts(BZIP2)
    whole = bytearray(image(made))
    whole[1000] ^= 1
    report = tapfs.check(written(tmp_path, bytes(whole)))
    assert report.corruptions == 1
    assert "CRC-32" in report.findings[0].message


def test_damaged_images_never_surprise() -> None:
    images = [image(parts(kind)[0], resources=kind == ADC) for kind in (ZLIB, ADC)]
    assert hostile.run(Subject(FORMAT, images=images), 0, 120) == "120 images"


def test_an_overlay_over_a_dmg(tmp_path: Path) -> None:
    made, disk = parts(ZLIB)
    path = written(tmp_path, image(made))
    with tapfs.open(path, temporary=True) as opened:
        opened.write(300_001, b"mine")
        expected = disk[:300_001] + b"mine" + disk[300_005:]
        assert opened.read(0, opened.size) == expected
