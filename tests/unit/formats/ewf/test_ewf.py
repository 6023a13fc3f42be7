"""EWF images made by bytes: segments, tables and their copies, chunks of every kind, and damage."""

from __future__ import annotations

import hashlib
import lzma
import os
import random
import struct
import zlib
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.ewf import FORMAT
from tapfs.formats.ewf.chunks import places
from tapfs.formats.ewf.sections import next_name
from tapfs.testing import hostile
from tapfs.testing.model import MemoryFile
from tapfs.testing.subject import Subject
from tests.ewf_images import CHUNK, Segment, finished, single, table, volume

DISK = random.Random(1).randbytes(3 * CHUNK) + b"text" * CHUNK + bytes(5 * 512)


def written(folder: Path, *contents: bytes, suffix: str = "E") -> Path:
    for number, content in enumerate(contents, 1):
        (folder / f"disk.{suffix}{number:02}").write_bytes(content)
    return folder / f"disk.{suffix}01"


def read(path: Path) -> bytes:
    with tapfs.open(path) as disk:
        return disk.read(0, disk.size)


@pytest.mark.parametrize("pack", [(True,), (False,), (True, False)], ids=["packed", "plain", "mixed"])
def test_chunks_of_every_kind(tmp_path: Path, pack: tuple[bool, ...]) -> None:
    path = written(tmp_path, finished(DISK, pack=pack))
    assert read(path) == DISK
    with tapfs.open(path) as disk:
        for offset in (0, CHUNK - 7, len(DISK) - 600, len(DISK) - 1):
            assert disk.read(offset, min(512, len(DISK) - offset)) == DISK[offset : offset + 512]
    report = tapfs.check(path)
    assert (report.corruptions, report.leaks, report.findings) == (0, 0, [])


def test_a_base_is_added_to_every_offset(tmp_path: Path) -> None:
    assert read(written(tmp_path, finished(DISK, base=1000))) == DISK


def test_offsets_beyond_two_gibibytes_without_a_base() -> None:
    """EnCase 6.7: the first offset that falls begins the plain chunks whose offsets have 32 bits."""
    entries = [0x8000_0000 | 0x7FFF_0000, 0x7FFF_8004, 0x8000_0008, 0x8000_800C]
    from array import array

    assert places(array("I", entries), 0) == (
        [0x7FFF_0000, 0x7FFF_8004, 0x8000_0008, 0x8000_800C],
        [True, False, False, False],
    )


@pytest.mark.parametrize("suffix", ["E", "s"])
def test_segments_are_found_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    first, second = Segment(1), Segment(2)
    first.add(b"volume", volume(len(DISK) // 512))
    first.add(b"table", table(first.add_chunks(DISK[: 2 * CHUNK], pack=[True])))
    first.add(b"next", last=True)
    second.add(b"table", table(second.add_chunks(DISK[2 * CHUNK :], pack=[False])))
    second.add(b"done", last=True)
    path = written(tmp_path, bytes(first.data), bytes(second.data), suffix=suffix)
    assert read(path) == DISK
    path.with_suffix(f".{suffix}02").unlink()
    with pytest.raises(ImageError, match=rf"its file disk\.{suffix}02 is missing") as caught:
        tapfs.open(path)
    assert caught.value.kind is ErrorKind.NOT_FOUND
    written(tmp_path, bytes(first.data), bytes(first.data), suffix=suffix)
    with pytest.raises(ImageError, match=r"is not segment 2 of the image"):
        tapfs.open(path)


def test_a_later_segment_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "disk.E02"
    path.write_bytes(bytes(Segment(2).data))
    with pytest.raises(ImageError, match=r"is segment 2 .*name the first segment"):
        tapfs.open(path)


@pytest.mark.parametrize(
    ("number", "name"),
    [(2, "E02"), (99, "E99"), (100, "EAA"), (125, "EAZ"), (126, "EBA"), (775, "EZZ"), (776, "FAA"), (14971, "ZZZ")],
)
def test_the_suffixes(number: int, name: str) -> None:
    assert next_name("a.b.E01", number) == f"a.b.{name}"
    assert next_name("a.b.e01", number) == f"a.b.{name.lower()}"


def test_there_are_no_suffixes_behind_zzz() -> None:
    with pytest.raises(ImageError, match="more segments than there are suffixes"):
        next_name("a.E01", 14972)


def with_damage(at: int, content: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[at] ^= 1
    return bytes(damaged)


def test_the_copy_of_a_table_is_read_where_the_first_is_damaged(tmp_path: Path) -> None:
    whole = finished(DISK)
    first = whole.index(b"table\0")
    for at in (first + 76, first + 76 + 24):
        path = written(tmp_path, with_damage(at, whole))
        assert read(path) == DISK
        report = tapfs.check(path)
        assert [finding.message.split(": ", 1)[1] for finding in report.findings] == [
            "the checksum of a table of chunks does not fit"
        ]


def test_a_table_with_no_good_copy_is_an_error_at_its_place(tmp_path: Path) -> None:
    whole = finished(DISK)
    first, second = whole.index(b"table\0"), whole.index(b"table2\0")
    path = written(tmp_path, with_damage(second + 76 + 24, with_damage(first + 76 + 24, whole)))
    with tapfs.open(path) as disk, pytest.raises(ImageError, match="no copy of a table") as caught:
        disk.read(0, 1)
    assert caught.value.kind is ErrorKind.CORRUPT
    assert caught.value.offset == first + 76 + 24


def test_a_packed_chunk_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    path = written(
        tmp_path, with_damage(finished(DISK, pack=[True]).index(b"sectors") + 76 + 40, finished(DISK, pack=[True]))
    )
    with tapfs.open(path) as disk:
        with pytest.raises(ImageError) as caught:
            disk.read(0, 1)
        assert caught.value.kind is ErrorKind.CORRUPT
        assert disk.read(CHUNK, 512) == DISK[CHUNK : CHUNK + 512]


@pytest.mark.parametrize("pack", [True, False])
def test_a_check_names_the_chunks_that_were_changed(tmp_path: Path, *, pack: bool) -> None:
    """A reader takes a plain one as it is, and only a check sees it."""
    whole = finished(DISK, pack=[pack])
    made = Segment()
    made.add(b"volume", volume(len(DISK) // 512))
    second = made.add_chunks(DISK, pack=[pack])[1] & 0x7FFF_FFFF
    path = written(tmp_path, with_damage(second + 40, whole))
    (finding,) = tapfs.check(path).findings
    assert finding.message == f"{path}: chunk 1 is damaged: the checksum does not fit"
    assert finding.host_offset == second
    path.write_bytes(with_damage(second - 100, with_damage(second + 40, whole)))
    (finding,) = tapfs.check(path).findings
    assert "chunks 0 to 1 are damaged" in finding.message


@pytest.mark.parametrize("right", [True, False])
def test_a_check_compares_the_disk_with_its_md5(tmp_path: Path, *, right: bool) -> None:
    made = single(DISK)
    digest = hashlib.md5(DISK if right else b"other", usedforsecurity=False).digest()
    made.add(b"hash", digest + struct.pack("<16xI", 0))
    made.add(b"done", last=True, length=0)
    findings = tapfs.check(written(tmp_path, bytes(made.data))).findings
    assert [f"the image says {digest.hex()}" in each.message for each in findings] == ([] if right else [True])


def test_what_an_unfinished_acquisition_lacks_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    made = Segment()
    made.add(b"volume", volume(1000 * CHUNK // 512))
    made.add(b"table", table(made.add_chunks(DISK.ljust(8 * CHUNK, b"\0"), pack=[True])))
    made.add(b"done", last=True)
    path = written(tmp_path, bytes(made.data))
    with tapfs.open(path) as disk:
        assert disk.read(0, 7 * CHUNK) == DISK[: 7 * CHUNK]
        with pytest.raises(ImageError, match="only 8 of 1000 chunks: chunk 8 is missing"):
            disk.read(8 * CHUNK, 1)
    assert tapfs.check(tmp_path / "disk.E01").corruptions == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (finished(DISK)[:-90], "leads out of the file"),
        (finished(DISK)[:5000], "leads out of the file"),
        (bytes(Segment().data), "past the end of the file"),
        (bytes(single(DISK).data), "leads out of the file"),
        (with_damage(13 + 76 + 16, finished(DISK)), "checksum of the volume section"),
    ],
)
def test_a_file_that_is_cut_or_damaged_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        tapfs.open(written(tmp_path, content))
    assert caught.value.kind is ErrorKind.CORRUPT


def test_sections_that_go_round_are_refused(tmp_path: Path) -> None:
    made = Segment()
    head = struct.pack("<16sQQ40x", b"header", 13, 76)
    made.data += head + struct.pack("<I", zlib.adler32(head)) + bytes(100)
    with pytest.raises(ImageError, match="leads out of the file"):
        tapfs.open(written(tmp_path, bytes(made.data)))


def test_damaged_images_never_surprise() -> None:
    images = [finished(DISK, pack=pack) for pack in ((True,), (False, True))]
    assert hostile.run(Subject(FORMAT, images=images), 0, 200) == "200 images"


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("1795907874", "2026-11-28T23:17:54Z"),
        ("2002 3 4 10 19 59", "2002-03-04T10:19:59"),
        ("2002 13 4 10 19 59", "2002 13 4 10 19 59"),
        ("9" * 40, "9" * 40),
        ("yesterday", "yesterday"),
    ],
)
def test_what_the_examiner_wrote(written: str, moment: str) -> None:
    made = Segment()
    text = f"1\nmain\nc\tn\ta\te\tt\tav\tov\tm\nc1\t7\tlaptop\tJ. Doe\tnone\t1\tLinux\t{written}\n\n"
    made.add(b"header2", zlib.compress(b"\xff\xfe" + text.encode("utf-16-le")))
    made.add(b"volume", volume(len(DISK) // 512))
    made.add(b"table", table(made.add_chunks(DISK, pack=[True])))
    made.add(b"digest", bytes(range(36)) + bytes(44))
    made.add(b"error2", struct.pack("<I", 3) + bytes(516))
    made.add(b"done", last=True)
    details = FORMAT.open(MemoryFile(bytes(made.data)), OpenRequest()).details()
    assert details["acquisition"] == {
        "case": "c1",
        "evidence_number": "7",
        "description": "laptop",
        "examiner": "J. Doe",
        "notes": "none",
        "program": "1",
        "platform": "Linux",
        "acquired": moment,
    }
    assert details["md5"] == bytes(range(16)).hex()
    assert details["sha1"] == bytes(range(16, 36)).hex()
    assert details["bad_ranges"] == 3


@pytest.mark.parametrize("lost", ["the next segment", "the end"])
def test_a_salvage_reads_the_segments_that_are_there(tmp_path: Path, lost: str) -> None:
    folder = Path(__file__).parents[4] / "fixtures" / "dfvfs"
    for number in (1, 2):
        packed = (folder / f"ext2.split.E0{number}.xz").read_bytes()
        (tmp_path / f"ext2.split.E0{number}").write_bytes(lzma.decompress(packed))
    image, second = tmp_path / "ext2.split.E01", tmp_path / "ext2.split.E02"
    tapfs.convert(image, tmp_path / "whole", target_format="raw")
    if lost == "the end":
        os.truncate(second, second.stat().st_size // 2)
    else:
        second.unlink()
    with pytest.raises(ImageError):
        tapfs.convert(image, tmp_path / "refused", target_format="raw")
    ranges = tapfs.convert(image, tmp_path / "rescued", target_format="raw", salvage=True)
    whole, rescued = (tmp_path / "whole").read_bytes(), (tmp_path / "rescued").read_bytes()
    assert [each.end for each in ranges] == [len(whole)]
    start = ranges[0].offset
    assert start > len(whole) // 2
    assert (rescued[:start], rescued[start:]) == (whole[:start], bytes(len(whole) - start))
