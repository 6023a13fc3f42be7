"""Blocks of every state, chunks, sectors of 4096 bytes and parents, as the map shows them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import Driver, OpenRequest
from tapfs.extent import Extent, Kind
from tapfs.formats.vhdx import FORMAT
from tapfs.tables import ABSENT
from tapfs.testing.model import MemoryFile, read_extents
from tests.vhdx_images import (
    BAT_AT,
    BLOCKS_AT,
    METADATA_AT,
    MIB,
    NOT_PRESENT,
    PARENT_GUID,
    PARTIAL,
    PRESENT,
    UNDEFINED,
    UNMAPPED,
    ZERO,
    Image,
    named_parent,
)

NOISE = (bytes(range(1, 251)) * 5000)[:MIB]


def opened(data: bytes | bytearray) -> Driver:
    return FORMAT.open(MemoryFile(bytes(data)), OpenRequest())


def kinds(driver: Driver) -> list[tuple[int, Kind]]:
    return [(extent.length, extent.kind) for extent in driver.map(0, driver.geometry.virtual_size)]


def test_every_state_of_a_block_without_parent() -> None:
    blocks = dict(enumerate([(NOT_PRESENT, b""), (UNDEFINED, b""), (ZERO, b""), (UNMAPPED, b""), (PRESENT, NOISE)]))
    driver = opened(Image(5 * MIB, blocks=blocks).build())
    assert kinds(driver) == [(MIB, Kind.UNALLOCATED), (3 * MIB, Kind.ZERO), (MIB, Kind.DATA)]


def test_every_state_of_a_block_over_a_parent() -> None:
    states = [(NOT_PRESENT, b""), (UNDEFINED, b""), (ZERO, b""), (UNMAPPED, b""), (PRESENT, NOISE), (PARTIAL, NOISE)]
    image = Image(6 * MIB, blocks=dict(enumerate(states)), sectors={5: [0, 1, 9, 2047]}, parent=named_parent("p.vhdx"))
    data = image.build()
    driver = opened(data)
    rest = [(2 * 512, Kind.DATA), (7 * 512, Kind.UNALLOCATED), (512, Kind.DATA)]
    rest += [(2037 * 512, Kind.UNALLOCATED), (512, Kind.DATA)]
    assert kinds(driver)[:2] == [(MIB, Kind.UNALLOCATED), (3 * MIB, Kind.ZERO)]
    # The first sectors of the partial block stand behind the bitmap of the chunk, or join the block before.
    assert sum(length for length, kind in kinds(driver) if kind is Kind.DATA) == MIB + 4 * 512
    assert kinds(driver)[-4:] == rest[1:]
    below = bytes(b"p" * (6 * MIB))
    read = read_extents(driver, MemoryFile(bytes(data)), 0, 6 * MIB, below)
    assert read[:MIB] == below[:MIB]
    assert read[MIB : 4 * MIB] == bytes(3 * MIB)
    assert read[4 * MIB : 5 * MIB] == NOISE[:MIB]
    for sector in range(2048):
        at = sector * 512
        source = NOISE if sector in {0, 1, 9, 2047} else below
        assert read[5 * MIB + at : 5 * MIB + at + 512] == source[at : at + 512]


@pytest.mark.parametrize(("sector", "block"), [(512, MIB), (512, 32 * MIB), (4096, MIB), (4096, 256 * MIB)])
def test_the_entries_of_sector_bitmaps_are_left_out(sector: int, block: int) -> None:
    image = Image(40 << 30, block=block, sector=sector)
    entries = {number: number for number in (0, image.chunk - 1, image.chunk) if number < (40 << 30) // block}
    data = image.build()
    assert image.chunk * block == sector << 23
    for number in entries:
        at = image.entry_at(number)
        data[at : at + 8] = struct.pack("<Q", (BLOCKS_AT + number % 3 * MIB) | PRESENT)
    driver = FORMAT.open(LongFile(bytes(data)), OpenRequest())
    for number in entries:
        (extent, *_) = [each for each in driver.map(number * block, 1) if each.end > number * block]
        assert extent == Extent(number * block, block, Kind.DATA, host_offset=BLOCKS_AT + number % 3 * MIB)
    assert driver.geometry.sector_size == sector


class LongFile(MemoryFile):
    """A file with a hole behind its bytes, in which large blocks are whole."""

    def size(self) -> int:
        return 1 << 40


def test_the_bitmap_of_a_later_chunk_and_large_sectors() -> None:
    chunk = (1 << 23) * 4096 // (64 * MIB)
    image = Image(
        (chunk + 2) * 64 * MIB,
        block=64 * MIB,
        sector=4096,
        blocks={chunk + 1: (PARTIAL, b"data" * 1024 * 3)},
        sectors={chunk + 1: [0, 2]},
        parent=named_parent("p.vhdx"),
    )
    driver = opened(image.build())
    start = (chunk + 1) * 64 * MIB
    found = [each for each in driver.map(start, 3 * 4096) if each.kind is Kind.DATA]
    assert [(each.offset - start, each.length) for each in found] == [(0, 4096), (8192, 4096)]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (4, "state 4 is unknown"),
        (5, "state 5 is unknown"),
        (7 | BLOCKS_AT, "there is no parent"),
        (6, "inside the header section"),
        (6 | BAT_AT, "overlaps metadata"),
        (6 | METADATA_AT, "overlaps metadata"),
        (6 | MIB, "overlaps metadata"),
        (6 | 1 << 45, "past the end of the file"),
        (6 | 1 << 63, "past the end of the file"),
        (6 | 1 << 10 | BLOCKS_AT, "reserved bits"),
    ],
)
def test_impossible_entries_are_refused_with_their_place(entry: int, words: str) -> None:
    image = Image(4 * MIB, blocks={2: (PRESENT, NOISE)})
    data = image.build()
    data[image.entry_at(1) : image.entry_at(1) + 8] = struct.pack("<Q", entry)
    driver = opened(data)
    with pytest.raises(ImageError, match=words) as caught:
        driver.map(MIB, 1)
    assert caught.value.offset == BAT_AT + 8
    assert any(words in finding.message for finding in driver.check().findings)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("entry", "words"), [(0, "in state 0"), (6, "header section"), (6 | BAT_AT, "overlaps")])
def test_a_partial_block_needs_its_bitmap(entry: int, words: str) -> None:
    image = Image(2 * MIB, blocks={0: (PARTIAL, NOISE)}, parent=named_parent("p.vhdx"))
    data = image.build()
    data[image.bitmap_entry_at(0) : image.bitmap_entry_at(0) + 8] = struct.pack("<Q", entry)
    with pytest.raises(ImageError, match=words):
        opened(data).map(0, 1)


def test_a_last_block_that_the_file_cuts_behind_the_end_of_the_disk_is_read() -> None:
    data = Image(MIB // 2, blocks={0: (PRESENT, NOISE)}).build()[: BLOCKS_AT + MIB // 2]
    file = MemoryFile(bytes(data))
    driver = FORMAT.open(file, OpenRequest())
    assert read_extents(driver, file, 0, MIB // 2) == NOISE[: MIB // 2]
    report = driver.check()  # type: ignore[attr-defined]
    assert (report.corruptions, report.leaks) == (0, 0)


def test_a_block_that_the_file_cuts_inside_the_disk_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    data = Image(2 * MIB, blocks={0: (PRESENT, NOISE), 1: (PRESENT, NOISE)}).build()
    path = tmp_path / "cut.vhdx"
    path.write_bytes(data[:-1])
    message = "the file was cut: it ends 1 bytes before the block's end"
    with tapfs.open(path) as disk, pytest.raises(ImageError, match=message) as caught:
        disk.read(MIB, 512)
    assert caught.value.kind is ErrorKind.CORRUPT
    # The file grows where it is written, and the damage would look like zeros.
    with pytest.raises(ImageError, match=message) as caught:
        tapfs.open(path, writable=True)
    assert caught.value.kind is ErrorKind.READ_ONLY
    assert tapfs.check(path).corruptions == 1


@pytest.mark.parametrize(
    ("blocks", "cut", "message"),
    [(1, MIB - 255, "it lacks 1 bytes of the bitmap"), (2, 1, "it ends 1 bytes before the block")],
)
def test_a_cut_over_a_parent_is_an_error_for_every_reader(tmp_path: Path, blocks: int, cut: int, message: str) -> None:
    """The bitmap of a chunk follows its first block in the file, and the first 256 bytes of it are that block's."""
    partial = dict.fromkeys(range(blocks), (PARTIAL, NOISE))
    path = tmp_path / "cut.vhdx"
    path.write_bytes(Image(2 * MIB, blocks=partial, parent=named_parent("p.vhdx")).build()[:-cut])
    (tmp_path / "p.vhdx").write_bytes(Image(2 * MIB).build())
    with tapfs.open(path, any_parent=True) as disk, pytest.raises(ImageError, match=message):
        disk.read(0, 2 * MIB)
    report = tapfs.check(path)
    assert (report.corruptions, report.leaks) == (1, 0)
    assert message in report.findings[0].message


def test_the_end_of_a_long_run_of_nothing_costs_little() -> None:
    image = Image(100 << 30, block=MIB, blocks={90_000: (PRESENT, NOISE)})
    driver = opened(image.build())
    run = driver.empty_run(5, 100 << 30)  # type: ignore[attr-defined]
    assert run == Extent(5, 90_000 * MIB - 5, Kind.UNALLOCATED)
    assert driver.empty_run(90_000 * MIB, 100 << 30) is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ({"relative_path": ".\\a\\b.vhdx"}, ("a/b.vhdx",)),
        ({"relative_path": "..\\b.vhdx", "absolute_win32_path": "C:\\x\\c.vhdx"}, ("../b.vhdx", "c.vhdx")),
        ({"volume_path": "\\\\?\\Volume{1}\\v.vhdx", "absolute_win32_path": "D:\\v.vhdx"}, ("v.vhdx",)),
        ({"absolute_win32_path": "/images/v.vhdx"}, ("/images/v.vhdx",)),
    ],
)
def test_the_names_of_a_parent(entries: dict[str, str], names: tuple[str, ...]) -> None:
    image = Image(2 * MIB, parent={"parent_linkage": "{" + PARENT_GUID.upper() + "}", **entries})
    backing = opened(image.build()).geometry.backing
    assert backing is not None
    assert (backing.name, *backing.others) == names
    assert backing.format == "vhdx"
    assert backing.identity == f"uuid:{PARENT_GUID}"


def test_a_parent_without_a_name_is_an_error() -> None:
    for parent in ({"relative_path": "a\0b"}, {"parent_linkage": "{" + PARENT_GUID + "}"}, {}):
        data = Image(2 * MIB, parent=parent).build()
        with pytest.raises(ImageError, match="parent locator"):
            opened(data)
        lenient = FORMAT.open(MemoryFile(bytes(data)), OpenRequest(lenient=True))
        assert lenient.check().corruptions == 1  # type: ignore[attr-defined]


def test_a_huge_empty_table_is_not_read(tmp_path: Path) -> None:
    """64 TiB in blocks of 1 MiB are a table of 512 MiB, a hole but for two pages."""
    path = tmp_path / "a.vhdx"
    tapfs.create(str(path), "vhdx", 64 << 40, options={"block_size": "1M", "block_state_zero": "off"})
    with tapfs.open(path, writable=True) as disk:
        disk.write(40 << 40, b"middle")
        disk.write(disk.size - 5, b"last")
    with tapfs.open(path) as disk:
        found = [(each.offset, each.length) for each in disk.extents() if not each.zero]
        assert found == [(40 << 40, MIB), ((64 << 40) - MIB, MIB)]
        statistics = disk.statistics()
        assert statistics.cache_fills < 20
        places = disk.layers[0].driver.table_places(0, 65536)  # type: ignore[attr-defined]
        assert places.count(ABSENT) > 65000
        assert places[40 << 10] != ABSENT
        assert list(places) == [disk.layers[0].driver.table_places(n, 1)[0] for n in range(65536)]  # type: ignore[attr-defined]
    assert tapfs.check(path).corruptions == 0


def test_blocks_behind_the_end_of_the_disk_are_not_given_back() -> None:
    """The metadata have no checksum, so the size may be wrong. A resize that was cut off leaves such blocks, too."""
    image = Image(4 * MIB, blocks={0: (PRESENT, NOISE), 3: (PRESENT, NOISE)})
    data = bytes(image.build())
    assert opened(data).check().findings == []  # type: ignore[attr-defined]
    cut = data.replace((4 * MIB).to_bytes(8, "little"), (2 * MIB).to_bytes(8, "little"), 1)
    report = opened(cut).check()  # type: ignore[attr-defined]
    assert (report.corruptions, report.leaks, report.leaked_bytes) == (0, 1, MIB)
    assert "1 blocks behind the end of the disk have places" in report.findings[0].message
    assert opened(cut).repair() == []  # type: ignore[attr-defined]
