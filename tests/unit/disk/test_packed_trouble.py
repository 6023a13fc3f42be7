"""Packed files whose unpacking fails midway, or which say wrong lengths: no other bytes, and bounded memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
from contextlib import closing
from pathlib import Path

import pytest
import zstandard

from tapfs import ErrorKind, ImageError
from tapfs.host.copied import CopiedFile
from tapfs.host.file import LocalFile
from tapfs.host.packed import bound
from tapfs.host.packed import file as packed_file
from tapfs.host.packed.file import unpacked

MIB = 1 << 20
PIECE = 64 << 10


def opened(folder: Path, content: bytes, kind: str) -> CopiedFile:
    (folder / "packed").write_bytes(content)
    return unpacked(LocalFile.open(str(folder / "packed"), writable=False), kind)


def seekable(frames: list[bytes], lengths: list[int]) -> bytes:
    entries = b"".join(struct.pack("<II", len(frame), length) for frame, length in zip(frames, lengths, strict=True))
    table = entries + struct.pack("<IBI", len(frames), 0, 0x8F92EAB1)
    return b"".join(frames) + struct.pack("<II", 0x184D2A5E, len(table)) + table


def test_a_full_scratch_folder_stays_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of zeros that follows needs no room, and is not taken for the piece that found none."""
    content = random.Random(5).randbytes(PIECE) + bytes(8 * PIECE)
    monkeypatch.setattr(packed_file, "_LEFT_FREE", 1 << 60)
    monkeypatch.setattr(packed_file, "_PIECE_BYTES", PIECE)
    with closing(opened(tmp_path, lzma.compress(content, preset=0), "xz")) as file:
        for _ in range(4):
            with pytest.raises(ImageError) as raised:
                file.read(0, 100)
            assert raised.value.kind is ErrorKind.NO_SPACE


def test_a_read_that_failed_is_tried_again_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(6).randbytes(3 * PIECE)
    monkeypatch.setattr(packed_file, "_PIECE_BYTES", PIECE)
    with closing(opened(tmp_path, lzma.compress(content, preset=0), "xz")) as file:
        packed, read, times = file._copy.held.origin, LocalFile.read, [0]

        def failing(self: LocalFile, offset: int, length: int) -> bytes:
            times[0] += self is packed
            if self is packed and times[0] == 2:
                raise ImageError(ErrorKind.IO, "the server is away", path=self.path, op="fetch")
            return read(self, offset, length)

        monkeypatch.setattr(LocalFile, "read", failing)
        with pytest.raises(ImageError, match="is away"):
            file.read(0, len(content))
        assert file.read(0, len(content)) == content


def test_a_checksum_behind_the_last_piece_is_compared(tmp_path: Path) -> None:
    """The frame is unpacked in pieces of 4 KiB, and a piece may end before the checksum."""
    drawn = random.Random(7).randbytes(PIECE)
    for length in range(PIECE - 20, PIECE):
        frame = zstandard.ZstdCompressor(write_checksum=True).compress(drawn[:length])
        damaged = frame[:-1] + bytes([frame[-1] ^ 1])
        with closing(opened(tmp_path, seekable([damaged], [length]), "zstd")) as file, pytest.raises(ImageError):
            file.read(0, length)


def test_a_unit_that_says_or_holds_more_than_the_index_is_not_unpacked(tmp_path: Path) -> None:
    said = struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 40) + (4096 << 3 | 3).to_bytes(3, "little") + b"x"
    with (
        closing(opened(tmp_path, seekable([said, said], [4096, 4096]), "zstd")) as file,
        pytest.raises(ImageError, match="more than the seek table says"),
    ):
        file.read(0, 100)


def test_zeros_without_end_behind_an_xz_stream_are_refused(tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(lzma.compress(b"content"))
    with (tmp_path / "packed").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageError, match="zeros or more stand behind") as raised:
        unpacked(LocalFile.open(str(tmp_path / "packed"), writable=False), "xz")
    assert raised.value.kind is ErrorKind.CORRUPT


def test_streams_are_opened_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    reader = packed_file._Reader

    def counted(file: LocalFile, start: int, end: int) -> packed_file._Reader:
        made.append(start)
        return reader(file, start, end)

    monkeypatch.setattr(packed_file, "_Reader", counted)
    parts = [bytes([number]) * (MIB + number) for number in range(1, 5)]
    with closing(opened(tmp_path, b"".join(map(lzma.compress, parts)), "xz")) as file:
        assert file.read(0, 100) == parts[0][:100]
        assert len(made) == 1
        assert file.read(MIB + 1, 3 * MIB) == b"".join(parts[1:])[: 3 * MIB]


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "zstd", "xz"])
def test_a_bomb_is_unpacked_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A packed megabyte is as long as a bomb where the bound is half of that."""
    monkeypatch.setattr(bound, "LEAST_BYTES", MIB // 2)
    content = bytes(MIB)
    packed = {
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "zstd": zstandard.ZstdCompressor(write_content_size=False).compress,
        "xz": lzma.compress,
    }[kind](content)

    def read() -> bytes:
        with closing(opened(tmp_path, packed, kind)) as file:  # xz knows its length, and is unpacked as it is read
            return file.read(MIB - 100, 100)

    with pytest.raises(ImageError) as raised:
        read()
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    assert raised.value.path == str(tmp_path / "packed")
    assert f"{MIB // 2} bytes" in raised.value.message
    for said in ("none", "1M", str(MIB)):
        monkeypatch.setenv(bound.VARIABLE, said)
        assert read() == bytes(100)
    monkeypatch.setenv(bound.VARIABLE, "much")
    with pytest.raises(ImageError, match="no number of bytes"):
        read()


def test_a_packed_file_may_hold_as_much_as_a_mostly_empty_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound.most_bytes(1000) == 64 << 30
    assert bound.most_bytes(20 << 30) == 20 * 64 << 30
    monkeypatch.setenv(bound.VARIABLE, "2T")
    assert bound.most_bytes(1000) == 2 << 40
