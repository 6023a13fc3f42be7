"""Windows of a disk that threads of the engine read and pack ahead: in order, each granule with data once."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from tapfs.driver import Codec
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, Range
from tapfs.kernel.ranges import Ranges, ranges_of, read_ranges
from tapfs.kernel.window_packer import PackedUnits, PackingRoom, WindowPacker
from tests.unit.engine.engine_disks import UNIT, Disk

GRANULE = 4096
WINDOW = 8 * GRANULE
WINDOWS = 12


def made(number: int) -> bytes:
    """Zeros, text and noise in turns of one, two and three granules."""
    kind = "z.ttnnn"[number % 7]
    if kind == "t":
        return (b"granule %d " % number * GRANULE)[:GRANULE]
    return random.Random(number).randbytes(GRANULE) if kind == "n" else bytes(GRANULE)


CONTENT = b"".join(made(number) for number in range(WINDOWS * WINDOW // GRANULE))


@pytest.fixture
def plain(tmp_path: Path) -> Disk:
    (tmp_path / "host").write_bytes(CONTENT)
    disk = Disk()
    disk.layer(tmp_path / "host", size=len(CONTENT), identity=True)
    return disk


def room() -> PackingRoom:
    return PackingRoom(Codec.ZLIB, GRANULE, WINDOW)


def window(number: int) -> Ranges:
    """Two ranges with a gap between them."""
    start = number * WINDOW
    return ranges_of([Range(start, 3 * GRANULE), Range(start + 4 * GRANULE, 4 * GRANULE)], start + WINDOW)


def contents(units: PackedUnits) -> list[tuple[int, bytes]]:
    """The granules of a window, unpacked; what is said of each by the two ways to ask is the same."""
    found: list[tuple[int, bytes]] = []
    for (offset, payload, memory), length in zip(units.each(), units.lengths, strict=True):
        assert length == (0 if payload is None else len(memory))
        found.append((offset, bytes(memory) if payload is None else zlib.decompress(payload)))
    assert [offset for offset, _ in found] == units.offsets
    return found


def expected(ranges: Ranges) -> list[tuple[int, bytes]]:
    places = [at for offset, length in ranges for at in range(offset, offset + length, GRANULE)]
    granules = [(at, CONTENT[at : at + GRANULE]) for at in places]
    return [(at, granule) for at, granule in granules if any(granule)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_windows_come_in_order_with_their_units(plain: Disk, threads: int) -> None:
    rooms = [room() for _ in range(4)]
    with plain, WindowPacker(plain, threads=threads, capacity=4) as packer:
        waiting = list(range(WINDOWS))
        taken = 0
        while waiting or len(packer):
            while waiting and rooms:
                packer.add(window(waiting.pop(0)), rooms.pop())
            ranges, used = packer.take()
            assert used.is_packed
            assert contents(used.units()) == expected(window(taken))
            assert ranges.until == (taken + 1) * WINDOW
            rooms.append(used)
            taken += 1
    assert taken == WINDOWS


def test_runs_are_what_follows_in_the_file_and_in_memory() -> None:
    granules = [made(2), made(3), made(4), made(5), made(6), made(9)]  # text, text, noise, noise, noise, text
    used = PackingRoom(Codec.ZLIB, GRANULE, WINDOW)
    used.plain[: 6 * GRANULE] = b"".join(granules)
    # The last two lie behind a gap of the disk, so their guest bytes do not follow those before.
    used.pack(ranges_of([Range(0, 4 * GRANULE), Range(9 * GRANULE, 2 * GRANULE)], WINDOW))
    units = used.units()
    assert [length == 0 for length in units.lengths] == [False, False, True, True, True, False]
    first, second = units.lengths[:2]
    behind = 1 << 20
    places = [100, 100 + first, behind, behind + GRANULE, behind + 2 * GRANULE, behind + 3 * GRANULE]
    runs = [(run.host_offset, len(run.data), run.offset) for run in units.runs(places)]
    assert runs == [
        (100, first + second, None),
        (behind, 2 * GRANULE, 2 * GRANULE),
        (behind + 2 * GRANULE, GRANULE, 9 * GRANULE),
        (behind + 3 * GRANULE, units.lengths[5], None),
    ]
    apart = [(run.host_offset, len(run.data)) for run in units.runs([place * 2 for place in places])]
    assert len(apart) == 6
    assert units.length == first + second + 3 * GRANULE + units.lengths[5]
    image = bytearray(2 << 20)
    for run in units.runs(places):
        image[run.host_offset : run.host_offset + len(run.data)] = run.data
    assert image[behind : behind + 3 * GRANULE] == b"".join(granules[2:5])
    assert zlib.decompress(image[places[1] : places[1] + second]) == granules[1]


def test_what_the_engine_cannot_read_alone_is_for_the_caller(tmp_path: Path) -> None:
    (tmp_path / "host").write_bytes(CONTENT)
    with Disk() as disk:
        disk.layer(tmp_path / "host", size=len(CONTENT))
        disk.install(0, [Extent(0, UNIT, Kind.DATA, host_offset=0)])
        with WindowPacker(disk, threads=1, capacity=2) as packer:
            packer.add(ranges_of([Range(UNIT, WINDOW)], UNIT + WINDOW), room())
            ranges, used = packer.take()
            assert not used.is_packed
            used.plain[:] = CONTENT[UNIT : UNIT + WINDOW]
            used.pack(ranges)
            assert used.is_packed
            assert contents(used.units()) == expected(ranges)


def test_a_host_that_cannot_be_read_is_for_the_caller(plain: Disk, tmp_path: Path) -> None:
    (tmp_path / "host").write_bytes(CONTENT[:WINDOW])
    with plain, WindowPacker(plain, threads=1, capacity=2) as packer:
        packer.add(window(1), room())
        ranges, used = packer.take()
        assert not used.is_packed
        with pytest.raises(ImageError):
            read_ranges(plain, ranges, used.plain, 0)


def test_an_end_leaves_windows_that_nobody_has_begun(plain: Disk) -> None:
    """The memory of their rooms can be given back then: nothing points at it any more."""
    rooms = [room() for _ in range(4)]
    with plain:
        with WindowPacker(plain, threads=2, capacity=4) as packer:
            for number, each in enumerate(rooms):
                packer.add(window(number), each)
        for each in rooms:
            each.plain.close()
            each.packed.close()


def test_one_window_too_many_and_ranges_that_are_no_granules_are_refused(plain: Disk) -> None:
    with plain, WindowPacker(plain, threads=0, capacity=1) as packer:
        for length in (WINDOW + GRANULE, GRANULE - 1):
            with pytest.raises(ValueError, match=f"{length} bytes"):
                packer.add(ranges_of([Range(0, length)], length), room())
        with pytest.raises(ImageError) as refused:
            room().pack(ranges_of([Range(0, GRANULE // 2), Range(GRANULE, GRANULE // 2)], 2 * GRANULE))
        assert refused.value.kind is ErrorKind.IO
        packer.add(window(0), room())
        with pytest.raises(ValueError, match=r"too many"):
            packer.add(window(1), room())
        assert len(packer) == 1


def test_a_codec_that_does_not_pack_is_refused() -> None:
    used = PackingRoom(Codec.BZIP2, GRANULE, WINDOW)
    used.plain[0] = 1
    with pytest.raises(ImageError, match="compress"):
        used.pack(ranges_of([Range(0, GRANULE)], GRANULE))
