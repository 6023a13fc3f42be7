"""The limits of the qcow header: each refusal names the field, its value and its place."""

from __future__ import annotations

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow import FORMAT
from tapfs.testing.model import MemoryFile
from tests.qcow_images import created, opened


def changed(offset: int, value: int, length: int, *, file: MemoryFile | None = None) -> MemoryFile:
    file = file or created(4 << 20)
    file.data[offset : offset + length] = value.to_bytes(length, "big")
    return file


@pytest.mark.parametrize(
    ("offset", "length", "value", "kind", "words"),
    [
        (0, 4, 0x51464900, ErrorKind.INVALID_FORMAT, "magic"),
        (4, 4, 2, ErrorKind.INVALID_FORMAT, "qcow version 2"),
        (4, 4, 3, ErrorKind.INVALID_FORMAT, "qcow version 3"),
        (24, 8, 1, ErrorKind.INVALID_FORMAT, "size is 1"),
        (24, 8, 0, ErrorKind.INVALID_FORMAT, "size is 0"),
        (24, 8, 1 << 63, ErrorKind.OUT_OF_BOUNDS, "size is 0x8000000000000000"),
        (24, 8, 1 << 62, ErrorKind.OUT_OF_BOUNDS, "size 0x4000000000000000"),
        (32, 1, 8, ErrorKind.INVALID_FORMAT, "cluster_bits is 8"),
        (32, 1, 17, ErrorKind.INVALID_FORMAT, "cluster_bits is 17"),
        (33, 1, 5, ErrorKind.INVALID_FORMAT, "l2_bits is 5"),
        (33, 1, 14, ErrorKind.INVALID_FORMAT, "l2_bits is 14"),
        (36, 4, 2, ErrorKind.UNSUPPORTED, "crypt_method is 2"),
        (40, 8, 40, ErrorKind.CORRUPT, "l1_table_offset is 0x28"),
        (40, 8, 1 << 40, ErrorKind.CORRUPT, "L1 table"),
        (40, 8, (1 << 64) - 8, ErrorKind.CORRUPT, "L1 table"),
    ],
)
def test_a_field_out_of_its_limits_is_named(offset: int, length: int, value: int, kind: ErrorKind, words: str) -> None:
    with pytest.raises(ImageError) as refused:
        FORMAT.open(changed(offset, value, length), OpenRequest())
    assert refused.value.kind is kind
    assert words in refused.value.message
    assert refused.value.path == "memory.img"
    assert refused.value.offset in {offset, 0, 24}
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("length", [0, 3, 4, 8, 47])
def test_a_file_that_ends_in_the_header_is_no_image(length: int) -> None:
    with pytest.raises(ImageError) as refused:
        FORMAT.open(MemoryFile(bytes(created(4 << 20).data[:length])), OpenRequest())
    assert refused.value.kind is ErrorKind.INVALID_FORMAT


def test_every_truncation_opens_or_is_refused_and_checks() -> None:
    disk = opened(created(4 << 20, {"blktap": "on"}, "/base"))
    disk.write(0, b"x" * 5000)
    disk.write(3 << 20, b"y" * 5000)
    disk.flush()
    whole = bytes(disk.file.data)
    refused = 0
    for length in [*range(48, 120), *range(4000, len(whole), 509)]:
        file = MemoryFile(whole[:length])
        try:
            FORMAT.open(file, OpenRequest()).map(0, 4 << 20)
        except ImageError:
            refused += 1
            assert FORMAT.open(file, OpenRequest(lenient=True)).check().corruptions > 0
    assert refused > 100


def test_a_name_that_is_too_long_or_outside_is_refused() -> None:
    file = created(4 << 20, backing="base")
    with pytest.raises(ImageError, match="backing_file_size is 1024"):
        FORMAT.open(changed(16, 1024, 4, file=file), OpenRequest())
    file = changed(8, 1 << 30, 8, file=created(4 << 20, backing="base"))
    with pytest.raises(ImageError, match="backing_file_offset"):
        FORMAT.open(file, OpenRequest())
    assert FORMAT.open(file, OpenRequest(lenient=True)).check().corruptions == 1


def test_a_name_ends_at_its_first_nul_and_may_hold_any_byte() -> None:
    file = created(4 << 20, backing="ba\0e".replace("\0", "x"))
    file.data[50:52] = b"\xff\0"
    backing = FORMAT.open(file, OpenRequest()).geometry.backing
    assert backing is not None
    assert backing.name.encode("utf-8", "surrogateescape") == b"ba\xff"
    file.data[48] = 0
    assert FORMAT.open(file, OpenRequest()).geometry.backing is None


def test_probe_takes_version_1_only() -> None:
    head = bytes(created(4 << 20).data[:512])
    assert FORMAT.probe(head, 560) == 100
    assert FORMAT.probe(head[:4] + b"\0\0\0\2" + head[8:], 560) == 0
    assert FORMAT.probe(head[:4] + b"\0\0\0\3" + head[8:], 560) == 0
    assert FORMAT.probe(b"", 0) == 0


def test_impossible_entries_are_named_with_their_place() -> None:
    disk = opened(created(4 << 20))
    disk.write(0, b"x" * 9000)
    disk.flush()
    data = bytes(disk.file.data)
    table = int.from_bytes(data[48:56], "big")
    for entry, words in [
        (len(data), "past the end"),
        (0x1001, "not aligned to 512"),
        (1 << 63 | 5 << 51 | 40, "inside the header"),
        (1 << 63 | 0x1000, "is empty"),
        (1 << 63 | 9 << 51 | len(data) - 3, "past the end"),
        (1 << 63 | 9 << 51 | 50, "inside the L1 table"),
    ]:
        file = changed(table + 8, entry, 8, file=MemoryFile(data))
        with pytest.raises(ImageError, match=words) as found:
            FORMAT.open(file, OpenRequest()).map(4096, 1)
        assert found.value.kind is ErrorKind.CORRUPT
        assert found.value.offset == table + 8
        assert FORMAT.open(file, OpenRequest(lenient=True)).check().corruptions == 1
