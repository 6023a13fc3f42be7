"""The size of a VHD's disk: who made the image decides between current size and geometry."""

from __future__ import annotations

from typing import Any

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vhd import FORMAT
from tapfs.formats.vhd.disk_size import LARGEST, geometry_not_below, geometry_of
from tapfs.testing.model import MemoryFile
from tests.vhd_images import DYNAMIC, FIXED, Vhd

SECTORS = 20480
#: The geometry of 10 MiB: 20468 sectors, 12 fewer than the disk has.
GEOMETRY = (301, 4, 17)
BY_GEOMETRY = 301 * 4 * 17 * 512


def opened(kind: int, creator: bytes, geometry: tuple[int, int, int]) -> Any:
    image = Vhd(size=SECTORS * 512, type=kind, creator=creator, geometry=geometry, block_size=1 << 21)
    return FORMAT.open(MemoryFile(image.content()), OpenRequest())


@pytest.mark.parametrize("kind", [FIXED, DYNAMIC])
@pytest.mark.parametrize(
    ("creator", "size"),
    [
        *((creator, BY_GEOMETRY) for creator in (b"vpc ", b"qemu")),
        *(
            (creator, SECTORS * 512)
            for creator in (b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0", b"wa\0\0", b"vbox", b"\0\0\0\0")
        ),
    ],
)
def test_the_creator_decides(kind: int, creator: bytes, size: int) -> None:
    assert opened(kind, creator, GEOMETRY).geometry.virtual_size == size


@pytest.mark.parametrize("creator", [b"vpc ", b"qemu", b"win "])
def test_the_largest_geometry_says_nothing(creator: bytes) -> None:
    driver = opened(DYNAMIC, creator, LARGEST)
    assert driver.geometry.virtual_size == SECTORS * 512
    assert "notes" not in driver.details()


def test_two_sizes_are_noted_where_readers_differ() -> None:
    (note,) = opened(DYNAMIC, b"qemu", GEOMETRY).details()["notes"]
    assert note.startswith(f"the disk has the {BY_GEOMETRY} bytes of the geometry")
    (note,) = opened(DYNAMIC, b"wa\0\0", GEOMETRY).details()["notes"]
    assert f"the {BY_GEOMETRY} bytes of the geometry" in note
    assert "notes" not in opened(DYNAMIC, b"win ", GEOMETRY).details()


def test_a_size_that_the_table_cannot_map_is_refused() -> None:
    with pytest.raises(ImageError, match="the block allocation table 5") as caught:
        opened(DYNAMIC, b"vpc ", (400, 16, 17))
    assert caught.value.kind is ErrorKind.CORRUPT


@pytest.mark.parametrize(
    ("sectors", "expected"),
    [
        # As qemu-img 10.0.2 writes them for sizes of so many sectors, rounded down by the algorithm.
        (20480, (301, 4, 17)),
        (131072, (963, 8, 17)),
        (2097152, (2080, 16, 63)),
        (16777216, (16644, 16, 63)),
        (65535 * 16 * 255, (65535, 16, 255)),
        (1 << 33, (65535, 16, 255)),
        (1, (0, 4, 17)),
    ],
)
def test_the_algorithm_of_the_document(sectors: int, expected: tuple[int, int, int]) -> None:
    assert geometry_of(sectors) == expected


def test_a_geometry_that_holds_the_disk() -> None:
    assert geometry_not_below(20480) == (302, 4, 17)
    assert geometry_not_below(20480).sectors * 512 == 10514432
    for sectors in (1, 999, 70_000, 1_032_193, 5_000_001, 267_382_800, 65535 * 16 * 255 - 1):
        assert geometry_not_below(sectors).sectors >= sectors
