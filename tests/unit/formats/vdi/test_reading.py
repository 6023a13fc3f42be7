"""VDI images of every kind are read as docs/specs/vdi.md says, by their bytes."""

from __future__ import annotations

import uuid

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.formats.vdi import FORMAT
from tapfs.testing.model import MemoryFile, read_extents
from tests.vdi_images import DIFFERENCING, FIXED, FREE, MIB, UNDO, ZERO, VdiImage

PARENT = uuid.UUID("12345678-9abc-def0-1234-56789abcdef0")
SMALL = 128 << 10


def block(byte: bytes, length: int = MIB) -> bytes:
    return byte * length


IMAGES = {
    "dynamic": VdiImage(3 * MIB, [FREE, 0, FREE], {0: block(b"a")}),
    "out of order": VdiImage(4 * MIB, [2, FREE, 0, 1], {0: block(b"a"), 1: block(b"b"), 2: block(b"c")}),
    "zero blocks": VdiImage(3 * MIB, [ZERO, 0, FREE], {0: block(b"a")}),
    "extra": VdiImage(3 * MIB, [1, FREE, 0], {0: block(b"a"), 1: block(b"b")}, extra=512),
    "much extra": VdiImage(
        3 * SMALL, [1, 2, 0], {0: b"a" * SMALL, 1: b"b" * SMALL, 2: b""}, block=SMALL, extra=SMALL - 512
    ),
    "small blocks": VdiImage(
        8 * SMALL - 512, [FREE, 1, 0, FREE, 3, 2, FREE, 4], {0: b"a" * SMALL, 1: b"b" * 512, 4: b"c" * 999}, block=SMALL
    ),
    "fixed": VdiImage(2 * MIB, [0, 1], {0: block(b"a"), 1: block(b"b")}, kind=FIXED),
    "version 0": VdiImage(3 * MIB, [1, FREE, 0], {0: block(b"a"), 1: block(b"b")}, old=True),
    "QEMU's places": VdiImage(2 * MIB, [FREE, 0], {0: block(b"a")}, map_at=512, data_at=1024, header_length=0x180),
    "an odd size": VdiImage(2 * MIB - 1000, [FREE, 0], {0: block(b"a")}),
    "more entries": VdiImage(2 * MIB, [FREE, 0, FREE, FREE], {0: block(b"a")}),
}
LINKED = {
    "differencing": VdiImage(3 * MIB, [FREE, ZERO, 0], {0: block(b"a")}, kind=DIFFERENCING, link=PARENT),
    "undo": VdiImage(3 * MIB, [0, FREE, FREE], {0: block(b"a")}, kind=UNDO, link=PARENT),
    "differencing of version 0": VdiImage(2 * MIB, [FREE, ZERO], kind=DIFFERENCING, link=PARENT, old=True),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("writable", [False, True])
def test_an_image_reads_as_it_was_built(name: str, *, writable: bool) -> None:
    image = IMAGES[name]
    file = MemoryFile(image.content())
    if writable and name == "more entries":
        with pytest.raises(ImageError, match="4 entries for 2 blocks"):
            FORMAT.open(file, OpenRequest(writable=True))
        return
    driver = FORMAT.open(file, OpenRequest(writable=writable))
    assert driver.geometry.virtual_size == image.size
    assert driver.geometry.backing is None
    assert read_extents(driver, file, 0, image.size) == image.guest()
    assert driver.check().corruptions == 0


@pytest.mark.parametrize("name", LINKED)
def test_free_blocks_of_a_differencing_image_are_its_parents_and_zero_blocks_are_not(name: str) -> None:
    image = LINKED[name]
    below = block(b"p", image.size)
    file = MemoryFile(image.content())
    driver = FORMAT.open(file, OpenRequest())
    assert read_extents(driver, file, 0, image.size, below) == image.guest(below)
    reference = driver.geometry.backing
    assert reference is not None
    assert reference.search is not None
    assert (reference.name, reference.search.identity) == ("", f"uuid:{PARENT}")


def test_the_map_is_runs() -> None:
    image = VdiImage(8 * MIB, [FREE, FREE, 0, 1, 2, ZERO, ZERO, 4], {4: b""})
    file = MemoryFile(image.content())
    driver = FORMAT.open(file, OpenRequest())
    assert driver.map(0, 8 * MIB) == [
        Extent(0, 2 * MIB, Kind.UNALLOCATED),
        Extent(2 * MIB, 3 * MIB, Kind.DATA, host_offset=2 * MIB),
        Extent(5 * MIB, 2 * MIB, Kind.ZERO),
        Extent(7 * MIB, MIB, Kind.DATA, host_offset=6 * MIB),
    ]
    assert driver.empty_run(0, 8 * MIB) == Extent(0, 2 * MIB, Kind.UNALLOCATED)
    assert driver.empty_run(2 * MIB, 8 * MIB) is None


def test_the_details_are_those_of_the_header() -> None:
    image = VdiImage(2 * MIB, [FREE, FREE], kind=DIFFERENCING, link=PARENT, comment=b"mine \xc3\xa9")
    driver = FORMAT.open(MemoryFile(image.content()), OpenRequest())
    details = driver.details()
    assert details["type"] == "differencing"
    assert details["comment"] == "mine é"
    assert details["uuid"] == str(image.creation)
    assert details["parent_uuid"] == str(PARENT)


def test_a_block_that_the_end_of_the_file_cuts_off_is_an_error_and_never_zeros() -> None:
    image = IMAGES["dynamic"]
    file = MemoryFile(image.content()[:-1])
    driver = FORMAT.open(file, OpenRequest())
    assert driver.map(0, MIB) == [Extent(0, MIB, Kind.UNALLOCATED)]
    with pytest.raises(ImageError, match="the file was cut: it ends 1 bytes before the block") as caught:
        driver.map(MIB, MIB)
    assert (caught.value.kind, caught.value.offset) == (ErrorKind.CORRUPT, MIB + 4)


def test_what_the_last_block_has_beyond_the_disk_may_be_missing() -> None:
    image = IMAGES["small blocks"]
    needed = VdiImage(3 * MIB - 512, [FREE, FREE, 0], {0: block(b"a")})
    file = MemoryFile(needed.content()[:-512])
    driver = FORMAT.open(file, OpenRequest())
    assert read_extents(driver, file, 0, needed.size) == needed.guest()
    assert driver.check().corruptions == 0
    assert image.size % SMALL


#: Bytes to put at a place of the "dynamic" image, and what is said then.
DAMAGE: list[tuple[int, bytes, ErrorKind, int, str]] = [
    (64, b"\0", ErrorKind.INVALID_FORMAT, 64, "is not a VDI image"),
    (68, b"\2\0\1\0", ErrorKind.UNSUPPORTED, 68, "version 1.2"),
    (72, b"\x7f\1\0\0", ErrorKind.CORRUPT, 72, "the header has 0x17f bytes"),
    (72, b"\xff\xff\xff\xff", ErrorKind.CORRUPT, 72, "the map begins at 0x100000"),
    (76, b"\5", ErrorKind.UNSUPPORTED, 76, "type 5"),
    (340, b"\0\0\x20\0", ErrorKind.CORRUPT, 340, "lies in the data"),
    (360, b"\0\x10\0\0", ErrorKind.UNSUPPORTED, 360, "sectors of 4096 bytes"),
    (368, bytes(8), ErrorKind.CORRUPT, 368, "no bytes"),
    (368, b"\1\0\x30\0", ErrorKind.CORRUPT, 384, "too few"),
    (368, b"\xff" * 8, ErrorKind.CORRUPT, 384, "too few"),
    (376, b"\0\0\x10\1", ErrorKind.UNSUPPORTED, 376, "power of two"),
    (376, b"\0\0\1\0", ErrorKind.UNSUPPORTED, 376, "power of two"),
    (380, b"\1\0\0\0", ErrorKind.CORRUPT, 380, "before each block"),
    (380, b"\0\0\x10\0", ErrorKind.CORRUPT, 380, "before each block"),
    (384, b"\2\0\0\0", ErrorKind.CORRUPT, 384, "too few"),
    (384, b"\xff\xff\xff\xff", ErrorKind.OUT_OF_BOUNDS, 384, "too many"),
]


@pytest.mark.parametrize(("at", "bytes_", "kind", "offset", "message"), DAMAGE)
def test_fields_that_cannot_be_true_are_named(
    at: int, bytes_: bytes, kind: ErrorKind, offset: int, message: str
) -> None:
    content = bytearray(IMAGES["dynamic"].content())
    content[at : at + len(bytes_)] = bytes_
    with pytest.raises(ImageError, match=message) as caught:
        FORMAT.open(MemoryFile(bytes(content)), OpenRequest())
    assert (caught.value.kind, caught.value.offset, caught.value.op) == (kind, offset, "open")


def test_a_map_past_the_end_of_the_file_is_refused_and_checked() -> None:
    content = IMAGES["dynamic"].content()[: MIB + 8]
    with pytest.raises(ImageError, match="past the end of the file"):
        FORMAT.open(MemoryFile(content), OpenRequest())
    driver = FORMAT.open(MemoryFile(content), OpenRequest(lenient=True))
    assert driver.check().corruptions == 2  # the map, and the block whose entry is left


def test_a_differencing_image_without_a_link_is_damaged() -> None:
    image = VdiImage(2 * MIB, [FREE, FREE], kind=DIFFERENCING)
    with pytest.raises(ImageError, match="names no parent") as caught:
        FORMAT.open(MemoryFile(image.content()), OpenRequest())
    assert (caught.value.kind, caught.value.offset) == (ErrorKind.CORRUPT, 424)
    assert FORMAT.open(MemoryFile(image.content()), OpenRequest(lenient=True)).check().corruptions == 1


def test_the_header_of_a_short_file_is_damaged() -> None:
    content = IMAGES["dynamic"].content()
    for length in (68, 72, 100, 455):
        with pytest.raises(ImageError) as caught:
            FORMAT.open(MemoryFile(content[:length]), OpenRequest())
        assert caught.value.kind in {ErrorKind.INVALID_FORMAT, ErrorKind.CORRUPT}
