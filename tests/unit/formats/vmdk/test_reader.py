"""VMDKs of one file read as what they were built of, every kind; damaged ones are refused with the place."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind
from tapfs.formats.vmdk import FORMAT
from tapfs.testing.laws import check_map
from tapfs.testing.model import MemoryFile, read_extents
from tests.vmdk_images import ZERO, descriptor, hosted, monolithic, padded, random_grains, read_grains, stream

GRAIN = 16 * 512
SIZE = 5 * 512 * GRAIN // 2 + 100 * 1024


def driver_of(content: bytes, name: str = "disk.vmdk", *, lenient: bool = False):  # noqa: ANN201  see FORMAT
    file = MemoryFile(content, name)
    return FORMAT.open(file, OpenRequest(lenient=lenient)), file


def whole(content: bytes, parent: bytes = b"") -> bytes:
    driver, file = driver_of(content)
    check_map(driver, 0, driver.geometry.virtual_size)
    return read_extents(driver, file, 0, driver.geometry.virtual_size, parent)


KINDS: dict[str, Callable[[dict[int, bytes], int], bytes]] = {
    "monolithic": monolithic,
    "without redundant tables": lambda grains, size: monolithic(grains, size, redundant=False),
    "tables left out": lambda grains, size: monolithic(grains, size, all_tables=False),
    "small tables": lambda grains, size: monolithic(grains, size, entries=128),
    "version 2": lambda grains, size: monolithic(grains, size, version=2),
    "version 3": lambda grains, size: monolithic(grains, size, version=3),
    "backwards": lambda grains, size: monolithic(grains, size, reverse=True),
    "renamed": lambda grains, size: monolithic(grains, size, "/vmfs/other.vmdk"),
    "no flags": lambda grains, size: monolithic(grains, size, flags=0, redundant=False),
}


@pytest.mark.parametrize("size", [SIZE, 100 * 1024, GRAIN, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_monolithic(kind: str, size: int) -> None:
    grains = random_grains(random.Random(kind), size, GRAIN)
    assert whole(KINDS[kind](grains, size)) == read_grains(grains, size, GRAIN)


def test_zeroed_grains_hide_the_parent() -> None:
    grains = random_grains(random.Random(1), SIZE, GRAIN, zeros=True)
    parent = random.Random(2).randbytes(SIZE // 2)
    content = monolithic(grains, SIZE, parent_cid=7, hint="parent.vmdk")
    assert whole(content, parent) == read_grains(grains, SIZE, GRAIN, parent)
    driver, _ = driver_of(content)
    backing = driver.geometry.backing
    assert backing is not None
    assert (backing.name, backing.format, backing.identity) == ("parent.vmdk", "vmdk", "cid:00000007")
    assert driver.identities == {"cid:12345678"}


def test_an_entry_of_1_without_the_flag_is_corrupt() -> None:
    with pytest.raises(ImageError, match=r"entry 0 of grain table 0: grain at 0x200 inside the header") as raised:
        whole(monolithic({0: ZERO}, GRAIN, flags=3))
    assert raised.value.kind is ErrorKind.CORRUPT
    assert raised.value.offset is not None


STREAMS: dict[str, Callable[[dict[int, bytes], int], bytes]] = {
    "footer": stream,
    "directory in front": lambda grains, size: stream(grains, size, footer=False),
    "no markers": lambda grains, size: stream(grains, size, footer=False, markers=False),
    "no descriptor": lambda grains, size: stream(grains, size, text=False),
    "out of order": lambda grains, size: stream(grains, size, order=sorted(grains, reverse=True)),
    "short last grain": lambda grains, size: stream(grains, size, short_last=True),
    "bytes behind the end": lambda grains, size: stream(grains, size) + b"more" * 3000,
    "the footer is lost": lambda grains, size: stream(grains, size)[: -3 * 512],
    "the marker of the end is lost": lambda grains, size: stream(grains, size)[:-512],
    "small grains": lambda grains, size: stream(grains, size, grain_sectors=16),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_stream(kind: str) -> None:
    grain = GRAIN if kind == "small grains" else 65536
    size = 70 * 65536 + 100 * 1024
    grains = random_grains(random.Random(kind), size, grain)
    grains[(size - 1) // grain] = b"the last grain"
    content = STREAMS[kind](grains, size)
    driver, file = driver_of(content)
    extents = driver.map(0, size)
    assert {extent.kind for extent in extents} == {Kind.COMPRESSED, Kind.UNALLOCATED}
    found = bytearray(size)
    for extent in extents:
        if extent.kind == Kind.COMPRESSED:
            found[extent.offset : extent.end] = unpacked(driver, file, extent)[: size - extent.offset]
    assert found == read_grains(grains, size, grain)


def unpacked(driver, file: MemoryFile, extent) -> bytes:  # noqa: ANN001  see FORMAT
    import zlib

    packing = driver.geometry.packing
    raw = file.read(extent.host_offset, extent.host_length)
    assert extent.host_offset + extent.host_length <= file.size()
    length = int.from_bytes(raw[packing.length_at : packing.length_at + packing.length_bytes], "little")
    return zlib.decompress(raw[packing.header_bytes : packing.header_bytes + length]).ljust(
        driver.geometry.granule, b"\0"
    )


@pytest.mark.parametrize("cut", [4 * 512, 5000, 100_000])
def test_a_cut_stream_is_an_error(cut: int) -> None:
    content = stream(random_grains(random.Random(3), 40 * 65536, 65536), 40 * 65536)
    with pytest.raises(ImageError, match="the end of the file is missing") as raised:
        driver_of(content[:-cut])
    assert raised.value.kind is ErrorKind.CORRUPT


def test_a_footer_of_another_file() -> None:
    content, other = stream({}, 1 << 20), stream({}, 2 << 20)
    with pytest.raises(ImageError, match="the footer's capacity_sectors is 4096, the header's is 2048"):
        driver_of(content[:-1536] + other[-1536:])


def test_two_directories_that_cannot_be_are_an_error_and_no_zeros() -> None:
    content = bytearray(monolithic({0: b"x" * GRAIN}, 1 << 20))
    struct.pack_into("<Q", content, 48, 1 << 30)
    driver, _ = driver_of(bytes(content))
    assert driver.map(0, GRAIN)[0].kind is Kind.DATA
    struct.pack_into("<Q", content, 56, 1 << 30)
    with pytest.raises(ImageError, match=r"the grain directory \[.*lies past the end") as raised:
        driver_of(bytes(content))
    assert raised.value.kind is ErrorKind.CORRUPT


def test_a_footer_that_says_otherwise_what_grains_begin_with() -> None:
    content = bytearray(stream({}, 1 << 20))
    content[10] ^= 2  # the flag of markers
    with pytest.raises(ImageError, match="the footer's has_markers is True, the header's is False") as raised:
        driver_of(bytes(content))
    assert raised.value.kind is ErrorKind.CORRUPT


def test_the_redundant_tables_are_read_where_the_primary_are_damaged() -> None:
    size = 3 * 512 * GRAIN
    grains = random_grains(random.Random(5), size, GRAIN)
    content = bytearray(monolithic(grains, size))
    (directory,) = struct.unpack_from("<Q", content, 56)
    right = read_grains(grains, size, GRAIN)
    for word in (0, 0xFFFFFFFF, 1):
        damaged = bytearray(content)
        struct.pack_into("<I", damaged, directory * 512 + 4, word)
        assert whole(bytes(damaged)) == right
    (table,) = struct.unpack_from("<I", content, directory * 512)
    damaged = bytearray(content)
    struct.pack_into("<I", damaged, table * 512 + 40, 0xFFFFFFF0)
    assert whole(bytes(damaged)) == right
    struct.pack_into("<Q", damaged, 56, 1 << 40)
    assert whole(bytes(damaged)) == right
    (redundant,) = struct.unpack_from("<Q", content, 48)
    struct.pack_into("<3I", damaged, redundant * 512, 0, 0, 0)
    damaged[56:64] = content[56:64]
    with pytest.raises(ImageError, match=r"entry 10 of grain table 0: grain at 0x1ffffffe000 past the end of the file"):
        whole(bytes(damaged))


HEADER = {
    "magic": (0, b"kdmv", ErrorKind.CORRUPT, "unfinished"),
    "version": (4, b"\4", ErrorKind.UNSUPPORTED, "version 4"),
    "grain": (20, b"\x07", ErrorKind.OUT_OF_BOUNDS, "grain of 7 sectors"),
    "small grain": (20, b"\x04", ErrorKind.OUT_OF_BOUNDS, "grain of 4 sectors"),
    "large grain": (20, b"\0\0\0\1", ErrorKind.OUT_OF_BOUNDS, "grain of"),
    "table entries": (44, b"\0\x20", ErrorKind.OUT_OF_BOUNDS, "grain tables of 8192 entries"),
    "no table entries": (44, b"\0\0", ErrorKind.OUT_OF_BOUNDS, "grain tables of 0 entries"),
    "capacity": (12, b"\xff" * 8, ErrorKind.OUT_OF_BOUNDS, "capacity of"),
    "capacity for a huge directory": (12, b"\0\0\0\0\0\0\1\0", ErrorKind.OUT_OF_BOUNDS, "the grain directory has"),
    "capacity below the line": (12, b"\1\0", ErrorKind.CORRUPT, "its line in the descriptor"),
    "text transfer": (73, b"\n \n\n", ErrorKind.CORRUPT, "transfer as text"),
    "compression": (77, b"\2", ErrorKind.UNSUPPORTED, "compression 2"),
    "packed by nothing": (8, b"\1\0\1\0", ErrorKind.CORRUPT, "no algorithm"),
    "an algorithm for nothing": (77, b"\1\0", ErrorKind.CORRUPT, "the flag of packed grains is not set"),
    "descriptor behind the end": (36, b"\0\0\1", ErrorKind.CORRUPT, "the descriptor lies past the end"),
    "descriptor elsewhere": (28, b"\x10", ErrorKind.INVALID_FORMAT, "not a VMDK descriptor"),
    "no descriptor": (28, bytes(16), ErrorKind.UNSUPPORTED, "has no descriptor"),
    "cut": (None, b"", ErrorKind.INVALID_FORMAT, "no KDMV header"),
}


@pytest.mark.parametrize("field", HEADER)
def test_hostile_headers(field: str) -> None:
    at, value, kind, says = HEADER[field]
    content = bytearray(monolithic({0: b"x"}, 1 << 20))
    if at is None:
        content = content[:400]
    else:
        content[at : at + len(value)] = value
    with pytest.raises(ImageError, match=says) as raised:
        driver_of(bytes(content))
    assert raised.value.kind is kind
    assert raised.value.path == "disk.vmdk"


@pytest.mark.parametrize(
    ("place", "says"), [(0, "inside the header"), (0x7FFFFFFF, "past the end"), (None, "past the end")]
)
def test_hostile_directories(place: int | None, says: str) -> None:
    content = bytearray(monolithic({0: b"x"}, 1 << 20, redundant=False))
    (directory,) = struct.unpack_from("<Q", content, 56)
    if place is None:
        struct.pack_into("<I", content, directory * 512, 0x7FFFFFFF)
    else:
        struct.pack_into("<Q", content, 56, place)
    with pytest.raises(ImageError, match=says) as raised:
        whole(bytes(content))
    assert raised.value.kind is ErrorKind.CORRUPT


def test_the_line_counts_where_the_header_is_larger() -> None:
    grains = {0: b"first", 9: b"last"}
    text = descriptor(['RW 150 SPARSE "x.vmdk"'])
    content = hosted(grains, 1 << 20, text)
    assert driver_of(content)[0].geometry.virtual_size == 150 * 512
    assert whole(content) == read_grains(grains, 150 * 512, GRAIN)


@pytest.mark.parametrize(
    ("content", "says", "remedy"),
    [
        (hosted({}, 1 << 20), "is one extent of a split disk", "should be disk.vmdk"),
        (padded(b"COWD", 4096), "is one extent of a disk of ESX", "should be disk.vmdk"),
        (padded(struct.pack("<Q", 0xCAFEBABE), 4096), "is one extent of a disk of ESX", "should be disk.vmdk"),
    ],
)
def test_a_part_names_its_descriptor(content: bytes, says: str, remedy: str) -> None:
    with pytest.raises(ImageError, match=says) as raised:
        driver_of(content, "/a/disk-s001.vmdk")
    assert remedy in (raised.value.remedy or "")
    with pytest.raises(ImageError, match=says) as raised:
        driver_of(content, "/a/disk.vmdk")
    assert "a small text file" in (raised.value.remedy or "")


def test_a_delta_that_does_not_name_its_parent() -> None:
    with pytest.raises(ImageError, match="is a delta over the disk with the CID 00000007, and does not name it"):
        driver_of(monolithic({}, 1 << 20, parent_cid=7))
