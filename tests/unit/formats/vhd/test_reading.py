"""Reading a VHD that grows: bitmaps in both orders, batmaps, tables that are too large, impossible places."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.formats.vhd import FORMAT
from tapfs.formats.vhd.bitmap import sector_runs, set_bits
from tapfs.testing.model import MemoryFile, ModelDisk, read_extents
from tests.vhd_images import Block, Vhd, by_bytes, differencing, summed

CHOICE = random.Random(1)
SOME = tuple(sector not in {0, 5, 6, 31} for sector in range(32))
IMAGE = Vhd(blocks={0: Block(CHOICE.randbytes(16384), SOME), 4: Block(CHOICE.randbytes(16384))})


def opened(content: bytes, **request: Any) -> Any:
    return FORMAT.open(MemoryFile(content), OpenRequest(**request))


def whole(content: bytes, parent: bytes = b"") -> bytes:
    file = MemoryFile(content)
    driver = FORMAT.open(file, OpenRequest())
    return read_extents(driver, file, 0, driver.geometry.virtual_size, parent)


def test_a_sector_without_its_bit_reads_as_zeros_whatever_its_bytes_are() -> None:
    read = whole(IMAGE.content())
    assert read == by_bytes(IMAGE.content())
    data = IMAGE.blocks[0].data
    for sector, present in enumerate(SOME):
        piece = slice(sector * 512, sector * 512 + 512)
        assert read[piece] == (data[piece] if present else bytes(512))
    report = opened(IMAGE.content()).check()
    assert report.corruptions == 0
    assert "QEMU shows the bytes" in report.findings[0].message


def test_the_map_has_the_sectors_of_a_block() -> None:
    extents = opened(IMAGE.content(), writable=True).map(0, 16384)
    assert [(each.offset, each.length, each.kind) for each in extents[:5]] == [
        (0, 512, Kind.UNALLOCATED),
        (512, 2048, Kind.DATA),
        (2560, 1024, Kind.UNALLOCATED),
        (3584, 24 * 512, Kind.DATA),
        (31 * 512, 512, Kind.UNALLOCATED),
    ]
    assert extents[1].in_place
    assert not extents[0].in_place


@pytest.mark.parametrize("block_size", [4096, 16384, 1 << 21, 1 << 23])
def test_block_sizes(block_size: int) -> None:
    sectors = block_size // 512
    some = tuple(CHOICE.random() < 0.9 for _ in range(sectors))
    data = CHOICE.randbytes(block_size)
    image = Vhd(size=3 * block_size - 512, block_size=block_size, blocks={1: Block(data, some), 2: Block(data)})
    assert whole(image.content()) == by_bytes(image.content())


def test_a_differencing_image_shows_its_parent_sector_by_sector() -> None:
    content = differencing().content()
    for length in (0, 40_000, 100_000):
        parent = CHOICE.randbytes(length)
        assert whole(content, parent) == by_bytes(content, parent)
    assert whole(content, CHOICE.randbytes(40_000))[40_000:49152].count(0) == 9152


def test_tapdisk_0_1_had_the_other_order_of_bits() -> None:
    image = replace(IMAGE, creator=b"tap\0", creator_version=1, old_bitmaps=True)
    assert whole(image.content()) == whole(IMAGE.content())
    with pytest.raises(ImageError, match="another order of bits") as caught:
        opened(image.content(), writable=True)
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert whole(replace(image, creator_version=0x10000).content()) != whole(IMAGE.content())


FULL = Vhd(
    creator=b"tap\0",
    creator_version=0x10003,
    blocks={2: Block(CHOICE.randbytes(16384), (False,) * 32)},
    batmap=(False, False, True),
)


def test_a_block_that_the_batmap_calls_full_has_no_bitmap_to_read() -> None:
    assert whole(FULL.content())[32768:49152] == FULL.blocks[2].data
    report = opened(FULL.content()).check()
    assert [finding.message for finding in report.findings] == ["block 2 lacks sectors and the batmap calls it full"]


@pytest.mark.parametrize(
    ("changes", "trusted"),
    [
        ({}, True),
        ({"creator_version": 0x10002}, True),
        ({"creator_version": 0x10001}, True),
        ({"creator_version": 0x10001, "signed_batmap": True}, True),
        ({"signed_batmap": True}, False),
        ({"creator": b"win "}, False),
    ],
)
def test_whose_batmap_is_trusted(changes: dict[str, Any], *, trusted: bool) -> None:
    image = replace(FULL, batmap=(True, False, True), **changes)
    assert (whole(image.content())[32768:49152] == FULL.blocks[2].data) == trusted


def test_a_batmap_is_made_anew_from_the_bitmaps() -> None:
    content = bytearray(FULL.content())
    file = MemoryFile(bytes(content))
    file.apply_all(list(opened(bytes(content), lenient=True).repair()))
    assert not whole(bytes(file.data))[32768:49152].strip(b"\0")
    assert opened(bytes(file.data)).check().corruptions == 0
    content[content.index(b"tdbatmap") + 24] ^= 1
    report = opened(bytes(content)).check()
    assert report.findings[0].message == "the checksum of tapdisk's batmap is wrong: it is ignored"


def test_a_disk_with_tapdisks_key_is_refused() -> None:
    content = bytearray(FULL.content())
    content[content.index(b"tdbatmap") + 29] = 1
    with pytest.raises(ImageError, match="encrypted by tapdisk"):
        opened(bytes(content))


def test_a_table_may_have_more_entries_than_the_disk() -> None:
    image = replace(IMAGE, spare_entries=1000)
    assert whole(image.content()) == whole(IMAGE.content())
    content = bytearray(image.content())
    content[1536 + 4 * 500 : 1536 + 4 * 501] = bytes(4)  # nobody's
    assert whole(bytes(content)) == whole(IMAGE.content())
    assert opened(bytes(content), writable=True).check().corruptions == 0


@pytest.mark.parametrize("place", [0, 1, 2, 3, 1 << 31, 0xFFFFFFFE, 60])
def test_a_block_at_an_impossible_place(place: int) -> None:
    content = bytearray(IMAGE.content())
    content[1536 + 4 : 1540 + 4] = place.to_bytes(4, "big")
    driver = opened(bytes(content))
    with pytest.raises(ImageError, match="block 1: ") as caught:
        driver.map(0, 16384 * 3)
    assert (caught.value.kind, caught.value.offset) == (ErrorKind.CORRUPT, 1540)
    assert driver.check().corruptions >= 1
    with pytest.raises(ImageError, match="the image can only be read"):
        opened(bytes(content), writable=True)


def test_two_blocks_at_one_place_are_found() -> None:
    content = bytearray(IMAGE.content())
    content[1536 + 8 : 1536 + 12] = content[1536:1540]
    report = opened(bytes(content)).check()
    assert "block 2 overlaps block 0" in [finding.message for finding in report.findings]
    assert not opened(bytes(content), lenient=True).repair()


def test_blocks_behind_the_end_of_the_disk_are_not_leaked_and_not_written_over() -> None:
    """The size of the disk may be what is wrong. A larger table alone is usual: xapi reserves room to grow."""
    spare = Vhd(size=2 * 16384, blocks={0: Block(CHOICE.randbytes(16384))}, spare_entries=9)
    assert opened(spare.content()).check().findings == []
    opened(spare.content(), writable=True)
    behind = replace(spare, blocks={**spare.blocks, 4: Block(CHOICE.randbytes(16384))})
    (finding,) = opened(behind.content()).check().findings
    assert finding.severity == "leak"
    assert "1 blocks behind the end of the disk have places" in finding.message
    assert not opened(behind.content(), lenient=True).repair()
    file = MemoryFile(behind.content())
    disk = ModelDisk(FORMAT.open(file, OpenRequest(writable=True)), file)
    disk.write(16384, bytes(range(256)) * 64)
    disk.end()
    assert behind.blocks[4].data in bytes(file.data)
    assert disk.read(16384, 256) == bytes(range(256))


def test_the_last_block_may_end_with_the_disk() -> None:
    """Its bytes up to the disk's end must be there: what is missing is no zeros."""
    image = Vhd(size=5 * 16384 + 1536, blocks={5: Block(CHOICE.randbytes(16384))})
    content = image.content()[:-512]
    start = len(content) - 16384
    whole_disk = whole(content)
    assert whole(content[: start + 1536]) == whole_disk
    with pytest.raises(ImageError, match="past the end of the file"):
        whole(content[: start + 1024])


def test_bytes_of_the_last_block_behind_the_disk_are_not_leaked() -> None:
    blocks = {5: Block(CHOICE.randbytes(16384)), 0: Block(CHOICE.randbytes(16384))}
    image = Vhd(size=5 * 16384 + 1536, blocks=blocks, gap=3584)
    assert opened(image.content()).check().findings == []
    cut = image.content()[: image.content().index(blocks[5].data) + 1536]
    assert opened(cut + image.footer()).check().corruptions == 1, "the other block lay behind it"
    alone = replace(image, blocks={5: blocks[5]}, gap=0).content()
    cut = alone[: alone.index(blocks[5].data) + 1536] + image.footer()
    assert opened(cut).check().findings == []


def patched(offset: int, data: bytes) -> bytes:
    """The image with other bytes in its dynamic header, and the right checksum."""
    header = bytearray(IMAGE.content()[512:1536])
    header[offset : offset + len(data)] = data
    return IMAGE.content()[:512] + summed(bytes(header), 36) + IMAGE.content()[1536:]


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (0, b"x", "does not begin with its cookie"),
        (16, bytes.fromhex("7fffffffffffffff"), "past the end of the file"),
        (28, b"\xff\xff\xff\xff", "past the end of the file"),
        (28, b"\0\0\0\1", "has 6 blocks, the block allocation table 1"),
        (32, b"\0\0\0\0", "block_size is 0"),
        (32, b"\0\0\x30\0", "block_size is 12288"),
        (32, b"\x20\0\0\0", "block_size is 536870912"),
    ],
)
def test_impossible_headers(offset: int, data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        opened(patched(offset, data))


def test_an_empty_run_ends_at_the_next_block() -> None:
    driver = opened(IMAGE.content())
    assert driver.empty_run(0, driver.size) is None
    assert driver.empty_run(20_000, driver.size) == Extent(20_000, 4 * 16384 - 20_000, Kind.UNALLOCATED)
    assert driver.empty_run(20_000, 30_000) == Extent(20_000, 10_000, Kind.UNALLOCATED)
    assert driver.empty_run(5 * 16384, driver.size) == Extent(5 * 16384, 1536, Kind.UNALLOCATED)


def test_runs_of_bits() -> None:
    for _ in range(200):
        count = CHOICE.choice([8, 32, 4096])
        raw = bytearray(CHOICE.randbytes(count // 8))
        first, stop = sorted(CHOICE.sample(range(count + 1), 2))
        bits = [bool(raw[at // 8] & 0x80 >> at % 8) for at in range(count)]
        found = [run.present for run in sector_runs(raw, first, stop) for _ in range(run.first, run.stop)]
        assert found == bits[first:stop]
        set_bits(raw, first, stop)
        bits[first:stop] = [True] * (stop - first)
        assert [bool(raw[at // 8] & 0x80 >> at % 8) for at in range(count)] == bits
