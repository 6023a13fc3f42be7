"""Any bytes at all: the parsers end, answer within the disk, and raise nothing."""

from __future__ import annotations

import json
import zlib

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tapfs.errors import ErrorKind, ImageError
from tapfs.partitions.contents import disk_contents
from tapfs.partitions.table import MAX_NOTES, MAX_PARTITIONS

SIZE = 160 * 1024
SECTOR = 512

_MAGICS = [
    (0, b"XFSB\0\0\x10\0"),
    (0, b"LUKS\xba\xbe\0\2"),
    (0, b"hsqs"),
    (3, b"NTFS    \0\2\1"),
    (3, b"EXFAT   "),
    (0, b"\xeb\x3c\x90mkfs.fat\0\2\1\1\0\2\0\2\0\1\xf8\x10\0"),
    (510, b"\x55\xaa"),
    (446, b"\x80\0\0\0\x05\0\0\0\1\0\0\0\xff\xff\0\0"),
    (512, b"EFI PART\0\0\1\0\x5c\0\0\0"),
    (512, b"LABELONE\1\0\0\0\0\0\0\0"),
    (1080, b"\x53\xef"),
    (4086, b"SWAPSPACE2"),
    (4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0"),
    (32768, b"\x01CD001"),
    (65600, b"_BHRfS_M"),
]

pieces = st.lists(
    st.one_of(
        st.sampled_from(_MAGICS),
        st.tuples(st.integers(0, SIZE - 64), st.binary(max_size=64)),
        st.tuples(st.sampled_from([0, 11, 440, 446, 462, 512, 584, 1024, 4096, 32768, 65536]), st.binary(max_size=80)),
    ),
    max_size=12,
)


def disk_of(parts: list[tuple[int, bytes]], size: int = SIZE) -> bytes:
    disk = bytearray(SIZE)
    for offset, data in parts:
        disk[offset : offset + len(data)] = data
    return bytes(disk[:size])


def check(disk: bytes) -> None:
    requested = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal requested
        assert offset >= 0
        assert 0 < length <= len(disk) - offset
        requested += length
        return disk[offset : offset + length]

    contents = disk_contents(read, len(disk))
    assert requested <= 64 << 20
    table = contents.table
    assert len(table.partitions) <= MAX_PARTITIONS
    assert len(table.notes) <= MAX_NOTES
    numbers = [partition.number for partition in table.partitions]
    assert numbers == sorted(set(numbers))
    for partition in table.partitions:
        assert 0 <= partition.start < partition.end <= len(disk)
    json.dumps(contents.description())


@given(pieces, st.integers(0, SIZE))
@settings(deadline=None)
def test_any_bytes(parts: list[tuple[int, bytes]], size: int) -> None:
    check(disk_of(parts, size))


@given(st.binary(max_size=80), st.lists(st.binary(min_size=128, max_size=128), max_size=8), st.data())
@settings(deadline=None)
@example(b"", [], None)
def test_any_gpt_with_right_sums(tail: bytes, entries: list[bytes], data: st.DataObject | None) -> None:
    """A hostile writer computes its CRCs."""
    table = b"".join(entries).ljust(128 * 128, b"\0")
    count, entry_size = (
        (128, 128)
        if data is None
        else data.draw(
            st.sampled_from(
                [(128, 128), (1 << 31, 128), (1, 1 << 31), (0, 128), (128, 0), (64, 256), (2**32 - 1, 2**32 - 1)]
            )
        )
    )
    body = table[: count * entry_size] if count * entry_size <= len(table) else table
    header = bytearray(b"EFI PART\0\0\1\0\x5c\0\0\0".ljust(92, b"\0"))
    header[24:32] = (1).to_bytes(8, "little")
    header[32:40] = tail[:8].ljust(8, b"\xff")
    header[72:80] = (2).to_bytes(8, "little")
    header[80:84], header[84:88] = count.to_bytes(4, "little"), entry_size.to_bytes(4, "little")
    header[88:92] = zlib.crc32(body).to_bytes(4, "little")
    header[16:20] = zlib.crc32(header).to_bytes(4, "little")
    protective = bytes(446) + b"\0\0\2\0\xee\xff\xff\xff\1\0\0\0\xff\xff\xff\xff" + bytes(48) + b"\x55\xaa"
    check(disk_of([(0, protective), (SECTOR, bytes(header)), (2 * SECTOR, table)]))


@given(st.lists(st.tuples(st.sampled_from([0, 5, 0x83]), st.integers(0, 300), st.integers(0, 300)), max_size=4))
@settings(deadline=None)
def test_any_chain(entries: list[tuple[int, int, int]]) -> None:
    """Every sector is the same table: the chain goes everywhere."""
    packed = b"".join(
        bytes(4) + bytes([kind, 0, 0, 0]) + start.to_bytes(4, "little") + count.to_bytes(4, "little")
        for kind, start, count in entries
    )
    check((bytes(446) + packed.ljust(64, b"\0") + b"\x55\xaa") * (SIZE // SECTOR))


def test_what_cannot_be_read_is_a_note() -> None:
    def read(offset: int, length: int) -> bytes:
        raise ImageError(ErrorKind.CORRUPT, "is broken", path="image", offset=offset)

    contents = disk_contents(read, SIZE)
    assert contents.file_system is None
    assert contents.table.partitions == []
    assert len(contents.table.notes) == 2
    assert all("image: is broken" in note for note in contents.table.notes)
