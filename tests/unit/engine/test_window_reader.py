"""Windows of a disk that threads of the engine read ahead: in order, with the data in them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tapfs.errors import ImageError
from tapfs.extent import Extent, Kind, Range
from tapfs.kernel.ranges import Ranges, cut, ranges_of, read_ranges
from tapfs.kernel.window_reader import WindowReader
from tapfs.kernel.writes import Segments
from tests.unit.engine.engine_disks import GRANULE, UNIT, Disk, pattern

WINDOW = 8 * GRANULE
WINDOWS = 12
#: Data and zeros in turns, so that each window has several segments.
CONTENT = b"".join(
    pattern(GRANULE, seed=1 + number) if number % 3 else bytes(GRANULE) for number in range(WINDOWS * WINDOW // GRANULE)
)


@pytest.fixture
def plain(tmp_path: Path) -> Disk:
    path = tmp_path / "host"
    path.write_bytes(CONTENT)
    disk = Disk()
    disk.layer(path, size=len(CONTENT), identity=True)
    return disk


def buffer() -> mmap.mmap:
    return mmap.mmap(-1, WINDOW)


def window(number: int) -> Ranges:
    """Two ranges with a gap between them."""
    start = number * WINDOW
    return ranges_of([Range(start, 3 * GRANULE), Range(start + 4 * GRANULE, 4 * GRANULE)], start + WINDOW)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_windows_come_in_order_with_their_data(plain: Disk, threads: int) -> None:
    copied = bytearray(len(CONTENT))
    with plain, WindowReader(plain, GRANULE, threads=threads, capacity=4) as reader:
        places = list(range(WINDOWS))
        taken: list[int] = []
        while places or len(reader):
            while places and len(reader) < 4:
                reader.add(window(places.pop(0)), buffer())
            ranges, _, segments = reader.take()
            taken.append(ranges.until)
            assert segments is not None
            for offset, data in segments.pieces(GRANULE):
                assert any(data)
                copied[offset : offset + len(data)] = data
    assert taken == [(number + 1) * WINDOW for number in range(WINDOWS)]
    for number in range(WINDOWS):
        for offset, length in window(number):
            assert copied[offset : offset + length] == CONTENT[offset : offset + length]


def test_what_the_engine_cannot_read_alone_is_for_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "host"
    path.write_bytes(CONTENT)
    with Disk() as disk:
        disk.layer(path, size=len(CONTENT))
        disk.install(0, [Extent(0, UNIT, Kind.DATA, host_offset=0)])
        with WindowReader(disk, GRANULE, threads=1, capacity=2) as reader:
            reader.add(ranges_of([Range(0, UNIT)], UNIT), buffer())
            reader.add(ranges_of([Range(UNIT, UNIT)], 2 * UNIT), buffer())
            assert reader.take().segments is not None
            missed = reader.take()
            assert missed.segments is None
            assert read_ranges(disk, missed.ranges, missed.buffer, 0).incomplete


def test_a_host_that_cannot_be_read_is_for_the_caller(plain: Disk, tmp_path: Path) -> None:
    (tmp_path / "host").write_bytes(CONTENT[:WINDOW])
    with plain, WindowReader(plain, GRANULE, threads=1, capacity=2) as reader:
        reader.add(window(1), buffer())
        failed = reader.take()
        assert failed.segments is None
        with pytest.raises(ImageError):
            read_ranges(plain, failed.ranges, failed.buffer, 0)


def test_an_end_leaves_windows_that_nobody_has_begun(plain: Disk) -> None:
    """Their buffers can be closed then: nothing points at them any more."""
    buffers = [buffer() for _ in range(4)]
    with plain:
        with WindowReader(plain, GRANULE, threads=2, capacity=4) as reader:
            for number, each in enumerate(buffers):
                reader.add(window(number), each)
        for each in buffers:
            each.close()


def test_one_window_too_many_and_a_buffer_too_small_are_refused(plain: Disk) -> None:
    with plain, WindowReader(plain, GRANULE, threads=0, capacity=1) as reader:
        with pytest.raises(ValueError, match=r"too small"):
            reader.add(window(0), mmap.mmap(-1, GRANULE))
        reader.add(window(0), buffer())
        with pytest.raises(ValueError, match=r"too many"):
            reader.add(window(1), buffer())
        assert len(reader) == 1


def test_a_window_is_ready_once_it_is_read(plain: Disk) -> None:
    with plain, WindowReader(plain, GRANULE, threads=0, capacity=2) as reader:
        assert not reader.ready
        reader.add(window(0), buffer())
        assert not reader.ready
        reader.take()


def test_a_thread_makes_a_window_ready(plain: Disk) -> None:
    with plain, WindowReader(plain, GRANULE, threads=1, capacity=2) as reader:
        reader.add(window(0), buffer())
        while not reader.ready:
            pass
        assert reader.take().segments is not None
        assert not reader.ready


def test_segments_of_several_windows_are_joined(plain: Disk) -> None:
    with plain, WindowReader(plain, GRANULE, threads=0, capacity=3) as reader:
        for number in range(3):
            reader.add(window(number), buffer())
        taken = [reader.take() for _ in range(3)]
        parts = [each.segments for each in taken if each.segments is not None]
        whole = Segments.joined([Segments.none(), *parts])
        assert list(whole.pieces(GRANULE)) == [piece for part in parts for piece in part.pieces(GRANULE)]
        assert whole.ranges() == [each for part in parts for each in part.ranges()]
        assert whole.length == sum(part.length for part in parts)
        assert (whole.offset, whole.end) == (parts[0].offset, parts[-1].end)
    assert Segments.joined([]).count == 0


# ---- copies into a plain target


def copied_by(
    plain: Disk, path: Path, ranges: list[Ranges], *, threads: int = 1, piece: int = WINDOW, writable: bool = True
) -> list[Segments | None]:
    """What came of each window that was copied to a file of zeros at `path`."""
    path.write_bytes(bytes(len(CONTENT)))
    with plain, Disk() as target:
        target.layer(path, size=len(CONTENT), identity=True, writable=writable)
        with WindowReader(plain, GRANULE, threads=threads, capacity=len(ranges), target=target) as copier:
            for each in ranges:
                copier.add(each, mmap.mmap(-1, piece))
            return [copier.take().segments for _ in ranges]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("piece", [GRANULE, 3 * GRANULE, 4 * WINDOW])
def test_a_plain_target_has_the_windows_and_nothing_else(plain: Disk, tmp_path: Path, threads: int, piece: int) -> None:
    path = tmp_path / "target"
    windows = [window(number) for number in range(WINDOWS)]
    ended = copied_by(plain, path, windows, threads=threads, piece=piece)
    assert [segments is not None and segments.count for segments in ended] == [0] * WINDOWS
    wanted = bytearray(len(CONTENT))
    for each in windows:
        for offset, length in each:
            wanted[offset : offset + length] = CONTENT[offset : offset + length]
    assert path.read_bytes() == wanted


def test_zeros_stay_holes_of_a_plain_target(plain: Disk, tmp_path: Path) -> None:
    """Pieces are cut between granules, so that a granule of zeros is seen as one."""
    path = tmp_path / "target"
    whole = ranges_of([Range(GRANULE // 2, len(CONTENT) - GRANULE // 2)], len(CONTENT))
    path.touch()
    os.truncate(path, len(CONTENT))
    with plain, Disk() as target:
        target.layer(path, size=len(CONTENT), identity=True, writable=True)
        with WindowReader(plain, GRANULE, threads=0, capacity=1, target=target) as copier:
            copier.add(whole, mmap.mmap(-1, 3 * GRANULE))
            assert copier.take().segments is not None
    assert path.read_bytes()[GRANULE // 2 :] == CONTENT[GRANULE // 2 :]
    zeros = sum(not any(CONTENT[at : at + GRANULE]) for at in range(GRANULE, len(CONTENT), GRANULE))
    assert path.stat().st_blocks * 512 <= len(CONTENT) - zeros * GRANULE


@pytest.mark.parametrize("every", [2, 7, 40])
def test_data_among_zeros_is_written_to_its_places(tmp_path: Path, every: int) -> None:
    """What is kept of several pieces lies at the start of the buffer, and the next piece behind it."""
    content = b"".join(
        bytes(GRANULE) if number % every else pattern(GRANULE, seed=1 + number) for number in range(50 * 8)
    )
    host, path = tmp_path / "host", tmp_path / "target"
    host.write_bytes(content)
    path.touch()
    os.truncate(path, len(content))
    with Disk() as source, Disk() as target:
        source.layer(host, size=len(content), identity=True)
        target.layer(path, size=len(content), identity=True, writable=True)
        with WindowReader(source, GRANULE, threads=0, capacity=1, target=target) as copier:
            copier.add(ranges_of([Range(100, len(content) - 100)], len(content)), mmap.mmap(-1, WINDOW))
            assert copier.take().segments is not None
    assert path.read_bytes()[100:] == content[100:]


def test_more_ranges_than_a_piece_has_are_copied(plain: Disk, tmp_path: Path) -> None:
    path = tmp_path / "target"
    many = [Range(at, 100) for at in range(0, len(CONTENT), 200)]
    assert len(many) > 3 * 64
    (segments,) = copied_by(plain, path, [ranges_of(many, len(CONTENT))])
    assert segments is not None
    content = path.read_bytes()
    for offset, length in many:
        assert content[offset : offset + length] == CONTENT[offset : offset + length]
        assert not any(content[offset + length : offset + 200])


def test_a_target_that_cannot_be_written_is_for_the_caller(plain: Disk, tmp_path: Path) -> None:
    assert copied_by(plain, tmp_path / "target", [window(0)], writable=False) == [None]


def test_a_source_that_cannot_be_read_is_copied_by_the_caller(plain: Disk, tmp_path: Path) -> None:
    (tmp_path / "host").write_bytes(CONTENT[:WINDOW])
    first, second = copied_by(plain, tmp_path / "target", [window(0), window(1)])
    assert first is not None
    assert second is None


def test_ranges_are_cut_into_lists_of_a_size() -> None:
    whole = ranges_of([Range(0, 10), Range(20, 25), Range(50, 1)], 60)
    parts = [(list(part), part.until) for part in cut(whole, 12)]
    assert parts == [
        ([Range(0, 10), Range(20, 2)], 22),
        ([Range(22, 12)], 34),
        ([Range(34, 11), Range(50, 1)], 51),
    ]
    assert [part.until for part in cut(ranges_of([Range(0, 3)], 9), 12)] == [9]
