"""Headers, region tables and metadata: which copy counts, and what is refused with its place."""

from __future__ import annotations

import random
import struct

import pytest

from tapfs import ImageError
from tapfs.checksums import crc32c, in_python
from tapfs.driver import Driver, OpenRequest, Severity
from tapfs.errors import ErrorKind
from tapfs.formats.vhdx import FORMAT
from tapfs.testing.model import MemoryFile
from tests.vhdx_images import (
    BAT_AT,
    BAT_REGION,
    DISK_SIZE,
    FILE_PARAMETERS,
    HEADERS,
    KIB,
    LOG_GUID,
    METADATA_AT,
    METADATA_REGION,
    MIB,
    PHYSICAL_SECTOR,
    REGION_TABLES,
    Image,
    header,
    metadata,
    region_table,
)
from tests.vhdx_images import crc32c as bit_by_bit

OTHER_REGION = "12345678-0000-0000-0000-000000000001"
INCOMPLETE = "71CC85F0-1B69-4E28-9558-C3BF83AE75D3"


def opened(data: bytes | bytearray, *, writable: bool = False) -> Driver:
    return FORMAT.open(MemoryFile(bytes(data)), OpenRequest(writable=writable))


def refused(data: bytes | bytearray) -> ImageError:
    with pytest.raises(ImageError) as caught:
        opened(data)
    assert caught.value.offset is not None
    return caught.value


def changed(at: int, raw: bytes, image: Image | None = None) -> bytearray:
    data = (image or Image(3 * MIB)).build()
    data[at : at + len(raw)] = raw
    return data


@pytest.mark.parametrize("zeros", [0, 1, 3, 100, 4000])
def test_the_checksum_is_that_of_the_definition(zeros: int) -> None:
    data = random.Random(zeros).randbytes(37) + bytes(zeros)
    assert in_python(data) == bit_by_bit(data) == crc32c(data)
    assert in_python(b"123456789") == 0xE3069283


def test_the_higher_sequence_number_counts() -> None:
    data = changed(HEADERS[0], header(9, data="aaaaaaaa-0000-0000-0000-000000000000"))
    assert opened(data).details()["data_write_guid"] == "aaaaaaaa-0000-0000-0000-000000000000"
    assert opened(data).details()["header_sequence"] == 9


@pytest.mark.parametrize("slot", [0, 1])
def test_one_damaged_header_is_a_note(slot: int) -> None:
    driver = opened(changed(HEADERS[slot] + 100, b"x"))
    notes = [finding for finding in driver.check().findings if finding.severity is Severity.NOTE]  # type: ignore[attr-defined]
    assert [finding.host_offset for finding in notes] == [HEADERS[slot]]
    assert driver.details()["header_sequence"] == 8 - slot if slot else 8


def test_two_damaged_headers_are_an_error() -> None:
    data = changed(HEADERS[0] + 100, b"x")
    data[HEADERS[1] + 100] ^= 1
    assert "both headers are damaged" in refused(data).message


def test_two_headers_of_one_number_are_the_same_or_corrupt() -> None:
    data = changed(HEADERS[0], header(8))
    assert opened(data).geometry.virtual_size == 3 * MIB
    data[HEADERS[0] : HEADERS[0] + 4096] = header(8, data=OTHER_REGION)
    assert "same sequence number" in refused(data).message


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"version": 2}, ErrorKind.UNSUPPORTED, "version 2"),
        ({"log": LOG_GUID, "log_version": 1}, ErrorKind.UNSUPPORTED, "version 1, only 0"),
        ({"log": LOG_GUID, "log_bytes": 0}, ErrorKind.CORRUPT, "no multiple of 1 MiB"),
        ({"log_bytes": MIB + 4096}, ErrorKind.CORRUPT, "no multiple of 1 MiB"),
        ({"log_bytes": 1 << 31}, ErrorKind.OUT_OF_BOUNDS, "the limit is"),
        ({"log_at": 0}, ErrorKind.CORRUPT, "where no log can be"),
        ({"log_at": 1 << 40}, ErrorKind.CORRUPT, "past the end of the file"),
        ({"log_at": BAT_AT}, ErrorKind.CORRUPT, "regions overlap"),
    ],
)
def test_impossible_headers_are_refused(fields: dict[str, object], kind: ErrorKind, words: str) -> None:
    error = refused(changed(HEADERS[1], header(9, **fields)))  # type: ignore[arg-type]
    assert error.kind is kind
    assert words in error.message


def test_a_file_without_a_log_is_read() -> None:
    assert opened(changed(HEADERS[1], header(9, log_bytes=0, log_at=0))).geometry.virtual_size == 3 * MIB


def test_a_file_that_ends_early_is_refused() -> None:
    whole = Image(3 * MIB).build()
    for length in (0, 7, 8, 70 * KIB, 200 * KIB, MIB, 3 * MIB + 100):
        refused(whole[:length])


@pytest.mark.parametrize("table", [0, 1])
def test_one_damaged_region_table_is_a_note(table: int) -> None:
    driver = opened(changed(REGION_TABLES[table] + 20, b"x"))
    (note,) = driver.check().findings  # type: ignore[attr-defined]
    assert note.host_offset == REGION_TABLES[table]


def test_two_damaged_region_tables_are_an_error() -> None:
    data = changed(REGION_TABLES[0] + 20, b"x")
    data[REGION_TABLES[1] + 20] ^= 1
    assert "both region tables" in refused(data).message


GOOD = ((BAT_REGION, BAT_AT, MIB, 0), (METADATA_REGION, METADATA_AT, MIB, 0))


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (GOOD[:1], "no region of the metadata"),
        (GOOD[1:], "no region of the block table"),
        ((*GOOD, (OTHER_REGION, 8 * MIB, MIB, 1)), "required to be understood"),
        ((*GOOD, GOOD[0]), "there twice"),
        ((*GOOD, (OTHER_REGION, METADATA_AT, MIB, 0)), "overlap"),
        ((GOOD[0], (METADATA_REGION, 0, MIB, 1)), "where none can be"),
        ((GOOD[0], (METADATA_REGION, METADATA_AT, 0, 1)), "where none can be"),
        ((GOOD[0], (METADATA_REGION, METADATA_AT + 4096, MIB, 1)), "where none can be"),
        ((GOOD[0], (METADATA_REGION, 1 << 62, MIB, 1)), "where none can be"),
        ((GOOD[0], (METADATA_REGION, 1 << 30, MIB, 1)), "past the end of the file"),
    ],
)
def test_impossible_regions_are_refused(regions: tuple[tuple[str, int, int, int], ...], words: str) -> None:
    assert words in refused(changed(REGION_TABLES[0], region_table(regions))).message


def test_the_place_of_an_unknown_region_is_kept_free() -> None:
    data = changed(REGION_TABLES[0], region_table((*GOOD, (OTHER_REGION, 8 * MIB, 2 * MIB, 0))))
    driver = opened(data, writable=True)
    assert any(place.offset == 8 * MIB for place in driver.reserved)  # type: ignore[attr-defined]
    data[BAT_AT : BAT_AT + 8] = struct.pack("<Q", 9 * MIB | 6)
    with pytest.raises(ImageError, match="past the end"):
        opened(data).map(0, 1)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ({FILE_PARAMETERS: struct.pack("<II", 3 * MIB, 0)}, "power of two"),
        ({FILE_PARAMETERS: struct.pack("<II", 512 * MIB, 0)}, "power of two"),
        ({FILE_PARAMETERS: b"1234"}, "has 4 bytes, not 8"),
        ({DISK_SIZE: struct.pack("<Q", 0)}, "disk size"),
        ({DISK_SIZE: struct.pack("<Q", 1000)}, "disk size"),
        ({DISK_SIZE: struct.pack("<Q", (64 << 40) + 512)}, "disk size"),
        ({DISK_SIZE: struct.pack("<Q", 64 << 40)}, "the block table has room"),
        ({PHYSICAL_SECTOR: struct.pack("<I", 2048)}, "sectors of 2048"),
    ],
)
def test_impossible_metadata_are_refused(items: dict[str, bytes], words: str) -> None:
    replaced = [(name, items.get(name, data), flags) for name, data, flags in Image(3 * MIB).items()]
    assert words in refused(changed(METADATA_AT, metadata(replaced))).message


def test_missing_unknown_and_incomplete_metadata() -> None:
    good = Image(3 * MIB).items()
    for index in range(len(good)):
        refused(changed(METADATA_AT, metadata([*good[:index], *good[index + 1 :]])))
    assert (
        "creation was never finished" in refused(changed(METADATA_AT, metadata([*good, (INCOMPLETE, b"x", 0)]))).message
    )
    unknown = metadata([*good, (OTHER_REGION, b"x", 4)])
    assert refused(changed(METADATA_AT, unknown)).kind is ErrorKind.UNSUPPORTED
    opened(changed(METADATA_AT, metadata([*good, (OTHER_REGION, b"x", 1), (OTHER_REGION, b"y", 2)])))
    assert "there twice" in refused(changed(METADATA_AT, metadata([*good, good[0]]))).message


def test_only_a_vhdx_file_is_one() -> None:
    assert FORMAT.probe(b"vhdxfile" + bytes(100), 1000) == 100
    assert FORMAT.probe(b"vhdxfilf" + bytes(100), 1000) == 0
    with pytest.raises(ImageError) as caught:
        opened(bytes(MIB))
    assert caught.value.kind is ErrorKind.INVALID_FORMAT
