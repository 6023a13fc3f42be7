"""Sources of a copy: disks one behind the other, and disks of which a part cannot be read."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.jobs.create import NewImage
from tapfs.jobs.pace import Pace
from tapfs.jobs.sources import Joined, Mapped, Salvaged
from tapfs.kernel.engine import Buffer
from tapfs.kernel.ranges import Ranges, ranges_of


def read(source: Joined | Salvaged, *ranges: tuple[int, int]) -> bytes:
    wanted = ranges_of([Range(*each) for each in ranges], ranges[-1][0] + ranges[-1][1])
    buffer = bytearray(b"\xaa" * (wanted.packed + 7))
    source.read_ranges(wanted, buffer)
    assert buffer[wanted.packed :] == b"\xaa" * 7
    return bytes(buffer[: wanted.packed])


def walked(source: Mapped, size: int, **settings: int) -> list[Range]:
    """All data ranges of a disk; each call gives no more than it may."""
    found: list[Range] = []
    offset = 0
    while offset < size:
        ranges = source.data_ranges(offset, size, **settings)  # type: ignore[arg-type]
        assert ranges.until > offset
        assert ranges.packed <= settings["most_bytes"]
        for each in ranges:
            assert each.offset >= (found[-1].end if found else 0)
            assert offset <= each.offset
            assert each.end <= ranges.until
            found.append(each)
        offset = ranges.until
    return found


@pytest.mark.parametrize("seed", range(20))
def test_joined_disks_are_one_behind_the_other(tmp_path: Path, seed: int) -> None:
    choice = random.Random(seed)
    expected = b""
    with ExitStack() as stack:
        images: list[tapfs.Image] = []
        for number in range(choice.randrange(1, 5)):
            size = choice.choice([1, 511, 512, 70_000, 65536, 300_000])
            content = bytearray(size)
            for _ in range(3):
                at = choice.randrange(size)
                piece = choice.randbytes(min(choice.choice([1, 5000]), size - at))
                content[at : at + len(piece)] = piece
            path = tmp_path / f"{number}.raw"
            with path.open("wb") as file:  # with holes
                file.truncate(size)
                for at in range(0, size, 4096):
                    if any(content[at : at + 4096]):
                        file.seek(at)
                        file.write(content[at : at + 4096])
            images.append(stack.enter_context(tapfs.open(path, format="raw")))
            expected += bytes(-len(expected) % 512) + bytes(content)
        joined = Joined(images)
        assert joined.size == len(expected)
        assert read(joined, (0, len(expected) + 1000)) == expected + bytes(1000)
        for align in (1, 4096, 65536):
            found = walked(joined, joined.size, align=align, most_bytes=65536)
            assert all(each.offset % align == each.length % align == 0 for each in found)
            rest = bytearray(expected.ljust(-(-len(expected) // align) * align, b"\0"))
            for each in found:
                assert read(joined, each) == bytes(rest[each.offset : each.end])
                rest[each.offset : each.end] = bytes(each.length)
            assert not any(rest)


class Broken:
    """A disk of ones of which some bytes cannot be read."""

    size = 1 << 20
    path = "broken"

    def __init__(self, bad: list[Range], kind: ErrorKind = ErrorKind.IO) -> None:
        self.bad = bad
        self.kind = kind
        self.map_fails = False

    @property
    def disk_map(self) -> Broken:
        return self

    def data_ranges(self, offset: int, end: int, *, gap: int = 0, align: int = 1, most_bytes: int) -> Ranges:
        del gap, align
        if self.map_fails:
            raise ImageError(ErrorKind.CORRUPT, "no map")
        stop = min(end, offset + most_bytes)
        return ranges_of([Range(offset, stop - offset)], stop)

    def read_ranges(self, ranges: Ranges, buffer: Buffer) -> None:
        with memoryview(buffer) as view:
            at = 0
            for each in ranges:
                if any(each.offset < bad.end and bad.offset < each.end for bad in self.bad):
                    view[at : at + each.length] = b"\x55" * each.length  # a part of it was read
                    raise ImageError(self.kind, "cannot be read", path="broken", offset=each.offset)
                view[at : at + each.length] = b"\1" * each.length
                at += each.length


def test_what_cannot_be_read_becomes_zeros_and_no_more() -> None:
    source = Salvaged(Broken([Range(5000, 10), Range(9000, 3000), Range(100_000, 512)]))
    found = read(source, (0, 8192), (8200, 300_000))
    whole = found[:8192] + b"\1" * 8 + found[8192:]
    zeros = bytearray(b"\1" * len(whole))
    for start, stop in ((4608, 5120), (8704, 12288), (99840, 100864)):
        zeros[start:stop] = bytes(stop - start)
    for at in range(0, len(whole), 512):  # what lies in a piece with an error is lost with it
        if any(zeros[at : at + 512]):
            assert whole[at : at + 512] == bytes(zeros[at : at + 512]), at
    assert all(each.length % 512 in {0, 8, 504} for each, _ in source.lost)
    assert sum(each.length for each, _ in source.lost) == whole.count(0)
    assert [error.kind for _, error in source.lost] == [ErrorKind.IO] * len(source.lost)


def test_what_has_no_map_is_read() -> None:
    broken = Broken([])
    source = Salvaged(broken)
    broken.map_fails = True
    assert sum(each.length for each in walked(source, broken.size, align=65536, most_bytes=1 << 21)) == broken.size
    assert source.lost == []


def test_other_errors_are_raised() -> None:
    source = Salvaged(Broken([Range(0, 1)], ErrorKind.NO_SPACE))
    with pytest.raises(ImageError):
        read(source, (0, 512))


def test_a_pace_waits_until_what_was_moved_was_due() -> None:
    now, slept = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    pace = Pace(1000, clock=lambda: now[0], sleep=sleep)
    pace.moved(0)
    pace.moved(500)
    pace.moved(250)
    assert slept == [0.5, 0.25]
    now[0] += 60  # held up by something else: it catches up a second, and no more
    pace.moved(2000)
    assert slept[2:] == [1.0]
    for none in (None, 0):
        Pace(none, sleep=sleep).moved(1 << 40)
    assert len(slept) == 3


def test_a_copy_of_several_images_can_be_packed(tmp_path: Path) -> None:
    names: list[Path] = []
    for number in range(3):
        path = tmp_path / f"{number}.raw"
        path.write_bytes(bytes([number + 1]) * (65536 * number + 700))
        names.append(path)
    from tapfs.jobs.convert import convert_to_new

    expected = b"".join(path.read_bytes().ljust(-(-path.stat().st_size // 512) * 512, b"\0") for path in names)
    for compressed in (False, True):
        target = tmp_path / "all.qcow2"
        with ExitStack() as stack:
            joined = Joined([stack.enter_context(tapfs.open(path, format="raw")) for path in names])
            convert_to_new(joined, str(target), NewImage("qcow2", joined.size), compressed=compressed)
        with tapfs.open(target) as disk:
            assert disk.read(0, disk.size).rstrip(b"\0") == expected.rstrip(b"\0")
            assert any(extent.compressed for extent in disk.extents()) == compressed


def test_python_salvages_too(tmp_path: Path) -> None:
    sources: list[Path] = []
    for number in (1, 2):
        path = tmp_path / f"{number}.raw"
        path.write_bytes(bytes([number]) * 4096)
        sources.append(path)
    target = tmp_path / "both.raw"
    copying = tapfs.CopyOptions(rate=1 << 30, workers=1, sparse_bytes=0)
    assert tapfs.convert(sources, target, format="raw", target_format="raw", salvage=True, copying=copying) == []
    assert target.read_bytes() == b"\1" * 4096 + b"\2" * 4096
