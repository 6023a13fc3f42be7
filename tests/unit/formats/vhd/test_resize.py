"""VHDs that get another size: what lies behind the block allocation table makes way, or the table moves."""

from __future__ import annotations

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vhd import FORMAT
from tapfs.testing import resize
from tapfs.testing.model import MemoryFile
from tapfs.testing.subject import Subject
from tests.vhd_images import Block, Vhd, by_bytes, ignoring_bitmaps, make

SIZE = 5 * 16384 + 1536
LONGER = 400 * 16384


def raw(file: MemoryFile) -> bytes:
    return bytes(file.data)


@pytest.mark.parametrize(
    "kind",
    ["dynamic", "dynamic-small-blocks", "dynamic-partial", "dynamic-tail", "differencing", "differencing-windows"],
)
def test_a_table_that_has_no_room(kind: str) -> None:
    file, parent = make(kind, SIZE, 1)
    before = by_bytes(raw(file), parent)
    for size in (LONGER, SIZE // 2 // 512 * 512, SIZE):
        resize.change_size(Subject(FORMAT, SIZE), file, parent, size)
        before = before[:size].ljust(size, b"\0")
        assert by_bytes(raw(file), parent) == before
        report = FORMAT.open(file, OpenRequest()).check()  # type: ignore[attr-defined]
        assert report.corruptions == 0, report.findings
        assert report.leaks == 0 or kind == "dynamic-tail", report.findings


def test_qemu_which_reads_no_bitmaps_finds_zeros_behind_the_old_end() -> None:
    file, _ = make("dynamic", SIZE, 1)
    before = ignoring_bitmaps(raw(file))
    resize.change_size(Subject(FORMAT, SIZE), file, b"", LONGER)
    assert ignoring_bitmaps(raw(file)) == before.ljust(LONGER, b"\0")


def test_a_batmap_in_the_way_is_not_lost() -> None:
    image = Vhd(
        blocks={0: Block(b"x" * 16384)}, creator=b"tap\0", creator_version=0x00010003, batmap=(True, False)
    ).content()
    file = MemoryFile(image)
    driver = FORMAT.open(file, OpenRequest(writable=True))
    with pytest.raises(ImageError, match="batmap") as raised:
        driver.make_room(LONGER)  # type: ignore[attr-defined]
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    assert raw(file) == image


@pytest.mark.parametrize("blocks", [6, 127, 128])
def test_a_table_grows_to_the_end_of_its_sector_before_a_batmap(blocks: int) -> None:
    image = Vhd(
        size=2 * 16384,
        blocks={0: Block(b"x" * 16384), 1: Block(b"y" * 16384)},
        creator=b"tap\0",
        creator_version=0x00010003,
        batmap=(True, False),
    ).content()
    file, longer = MemoryFile(image), blocks * 16384
    resize.change_size(Subject(FORMAT, 2 * 16384), file, b"", longer)
    assert by_bytes(raw(file)) == by_bytes(image).ljust(longer, b"\0")
    driver = FORMAT.open(file, OpenRequest(writable=True))
    assert driver.batmap.valid  # type: ignore[attr-defined]
    assert driver.batmap.is_full(0)  # type: ignore[attr-defined]
    assert not driver.check().corruptions  # type: ignore[attr-defined]


def test_spare_entries_of_xapi_are_used() -> None:
    image = Vhd(
        blocks={0: Block(b"x" * 16384)},
        creator=b"tap\0",
        creator_version=0x00010003,
        batmap=(True,),
        spare_entries=3000,
    ).content()
    file = MemoryFile(image)
    resize.change_size(Subject(FORMAT, SIZE), file, b"", LONGER)
    driver = FORMAT.open(file, OpenRequest(writable=True))
    assert driver.geometry.virtual_size == LONGER
    assert by_bytes(raw(file)) == by_bytes(image).ljust(LONGER, b"\0")
