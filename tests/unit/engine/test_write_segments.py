"""Many runs of bytes in one write: in place as far as that goes, and then to reserved places."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tapfs.driver import Cipher, Placement
from tapfs.errors import ImageError
from tapfs.extent import Extent, Kind, Range
from tapfs.kernel import writes
from tapfs.kernel._engine import ffi
from tapfs.kernel.engine import Status
from tests.unit.engine.engine_disks import AES, GRANULE, UNIT, Disk, extents, host, pattern

SENTINEL = b"\xee"
UNITS = 4
SIZE = UNITS * UNIT
GRANULES = SIZE // GRANULE


class Kept:
    """Segments whose memory lives as long as this does: cffi frees what nobody refers to."""

    def __init__(self, runs: list[tuple[int, bytes]]) -> None:
        self._memory = [ffi.new("uint8_t[]", data or b"\0") for _, data in runs]
        self.segments = writes.Segments(
            [(offset, len(data), memory) for (offset, data), memory in zip(runs, self._memory, strict=True)]
        )


def some_runs(choice: random.Random, size: int) -> list[tuple[int, bytes]]:
    """Runs that ascend; many of them share a granule, and some touch."""
    runs: list[tuple[int, bytes]] = []
    at = choice.randrange(3000)
    while at < size and len(runs) < 40:
        length = min(choice.choice([1, 100, 512, 4096, 5000, choice.randrange(1, 12000)]), size - at)
        runs.append((at, pattern(length, choice.randrange(1, 200))))
        at += length + choice.choice([0, 1, 1000, 4096, 9000])
    return runs


def test_what_is_in_place_is_written_and_the_rest_is_noted(tmp_path: Path) -> None:
    path = host(tmp_path, "top", SENTINEL * SIZE)
    with Disk() as disk:
        disk.layer(path, size=SIZE, writable=True)
        # Granules 0 and 2 follow each other on the host, with one between them that is not in place.
        disk.install(0, extents((GRANULE, Kind.DATA, 0), (GRANULE, Kind.ZERO, 0), (2 * GRANULE, Kind.DATA, GRANULE)))
        runs = [(10, b"a" * GRANULE), (2 * GRANULE - 5, b"b" * 10), (UNIT + 1, b"c"), (UNIT + 9, b"d")]
        kept = Kept(runs)
        gaps = writes.Gaps(kept.segments, GRANULE)
        outcome = writes.write_in_place(disk, kept.segments, 0, gaps)
        assert (outcome.status, outcome.done, outcome.offset) == (Status.MISS, GRANULE + 10, UNIT + 1)
        assert gaps.ranges() == [Range(GRANULE, GRANULE)]
        disk.install(0, [Extent(UNIT, UNIT, Kind.UNALLOCATED)])
        outcome = writes.write_in_place(disk, kept.segments, outcome.done, gaps)
        assert (outcome.status, outcome.done) == (Status.DONE, kept.segments.length)
        assert gaps.ranges() == [Range(GRANULE, GRANULE), Range(UNIT, GRANULE)]
        assert disk.statistics().bytes_written == GRANULE - 10 + 5
    expected = bytearray(SENTINEL * SIZE)
    expected[10:GRANULE] = b"a" * (GRANULE - 10)
    expected[GRANULE : GRANULE + 5] = b"b" * 5
    assert path.read_bytes() == expected


def test_gaps_for_which_there_is_no_room_end_a_write(tmp_path: Path) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "top"), size=SIZE, writable=True)
        disk.install(0, [Extent(0, SIZE, Kind.ZERO)])
        kept = Kept([(offset, b"x") for offset in range(0, SIZE, 2 * GRANULE)])
        gaps = writes.Gaps(kept.segments, GRANULE)
        gaps.capacity = 3
        outcome = writes.write_in_place(disk, kept.segments, 0, gaps)
        assert (outcome.status, outcome.done, gaps.count) == (Status.DONE, 3, 3)


@pytest.mark.parametrize("cipher", [None, AES])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_reserved_places_get_the_segments_and_the_old_contents(
    tmp_path: Path, seed: int, cipher: Cipher | None, *, direct: bool
) -> None:
    """A model of both halves of a write, over a parent whose map is supplied bit by bit."""
    choice = random.Random(seed)
    below = pattern(SIZE - 700, 7)
    path = host(tmp_path, "top", bytes(3 * SIZE))
    with Disk() as disk:
        disk.layer(path, size=SIZE, cipher=cipher, writable=True, direct=direct)
        disk.layer(host(tmp_path, "below", below), size=len(below), granule=512, unit=UNIT)
        model = bytearray(below.ljust(SIZE, b"\0"))
        places: list[int | None] = [None] * GRANULES
        end = 0

        def mapped() -> list[Extent]:
            return [
                Extent(i * GRANULE, GRANULE, Kind.UNALLOCATED)
                if place is None
                else Extent(i * GRANULE, GRANULE, Kind.DATA, host_offset=place, in_place=True)
                for i, place in enumerate(places)
            ]

        disk.install(0, mapped())
        for _ in range(6):
            runs = some_runs(choice, SIZE)
            kept = Kept(runs)
            gaps = writes.Gaps(kept.segments, GRANULE)
            assert not writes.write_in_place(disk, kept.segments, 0, gaps).incomplete
            wanted = [at for each in gaps.ranges() for at in range(each.offset, each.end, GRANULE)]
            placements: list[Placement] = []
            for at in wanted:
                end += choice.choice([0, 0, 0, GRANULE])  # mostly one after the other
                placements.append(Placement(at, GRANULE, end, fresh=choice.random() < 0.5))
                places[at // GRANULE] = end
                end += GRANULE
            array = writes.Places(placements)
            done = 0
            while (outcome := writes.write_reserved(disk, kept.segments, gaps, array, done)).incomplete:
                assert outcome.layer == 1
                assert done <= outcome.done <= len(placements)
                done = outcome.done
                disk.install(1, below_extents(outcome.offset, len(below)))
            assert outcome.done == len(placements)
            for unit in range(0, len(below), UNIT):
                disk.install(1, below_extents(unit, len(below)))
            assert disk.read(0, SIZE) == model_before(model, runs, wanted), "nothing is visible yet"
            if placements:
                writes.patch_placed(disk, placements)
            for offset, data in runs:
                model[offset : offset + len(data)] = data
            assert disk.read(0, SIZE) == model
            disk.forget(1, 0, SIZE)


def below_extents(offset: int, size: int) -> list[Extent]:
    start = offset - offset % UNIT
    length = min(UNIT, -(-(size - start) // 512) * 512)
    return [Extent(start, length, Kind.DATA, host_offset=start)]


def model_before(model: bytearray, runs: list[tuple[int, bytes]], wanted: list[int]) -> bytearray:
    """What is in place is new already, what lacked places is old still."""
    seen, new = bytearray(model), bytearray(model)
    for offset, data in runs:
        new[offset : offset + len(data)] = data
    old = set(wanted)
    for at in range(0, len(model), GRANULE):
        if at not in old:
            seen[at : at + GRANULE] = new[at : at + GRANULE]
    return seen


@pytest.mark.parametrize("direct", [False, True])
def test_an_empty_piece_of_a_write_to_a_new_place_is_nothing(tmp_path: Path, *, direct: bool) -> None:
    """It lies where the file has not come to yet, so there is no block to look at."""
    path = host(tmp_path, "top", b"\xee" * GRANULE)
    with Disk() as disk:
        disk.layer(path, size=GRANULE, unit=GRANULE, writable=True, direct=direct)
        disk.install(0, [Extent(0, GRANULE, Kind.ZERO)])
        kept = Kept([(1, b""), (1, b"xy")])
        gaps = writes.Gaps(kept.segments, GRANULE)
        assert not writes.write_in_place(disk, kept.segments, 0, gaps).incomplete
        places = writes.Places([Placement(0, GRANULE, GRANULE, fresh=True)])
        assert not writes.write_reserved(disk, kept.segments, gaps, places, 0).incomplete
    assert path.read_bytes() == b"\xee" * GRANULE + b"\0xy"


def test_pieces_that_follow_each_other_are_written_at_once(tmp_path: Path) -> None:
    """More of them than one call of the host takes, and fills between them that do not fit into memory at once."""
    granule, count = 16384, 700
    size = 2 * count * granule
    below = pattern(granule) * (size // granule)
    path = host(tmp_path, "top")
    with Disk() as disk:
        disk.layer(path, size=size, granule=granule, unit=size, writable=True)
        disk.layer(host(tmp_path, "below", below), size=size, identity=True)
        disk.install(0, [Extent(0, size, Kind.UNALLOCATED)])
        runs = [(2 * i * granule + 100, b"%08d" % i) for i in range(count)]
        kept = Kept(runs)
        gaps = writes.Gaps(kept.segments, granule)
        assert not writes.write_in_place(disk, kept.segments, 0, gaps).incomplete
        assert gaps.ranges() == [Range(2 * i * granule, granule) for i in range(count)]
        placements = [Placement(2 * i * granule, granule, i * granule, fresh=True) for i in range(count)]
        outcome = writes.write_reserved(disk, kept.segments, gaps, writes.Places(placements), 0)
        assert (outcome.status, outcome.done) == (Status.DONE, count)
    one = bytearray(pattern(granule))
    expected = bytearray()
    for _, data in runs:
        one[100:108] = data
        expected += one
    assert path.read_bytes() == expected


@pytest.mark.parametrize(
    "runs",
    [
        [(100, b"x" * 10), (105, b"y")],
        [(GRANULE, b"x"), (0, b"y")],
        [(SIZE - 1, b"xy")],
        [(0, b"x"), (SIZE, b"y")],
    ],
)
def test_segments_that_overlap_or_lie_outside_are_refused(tmp_path: Path, runs: list[tuple[int, bytes]]) -> None:
    path = host(tmp_path, "top", SENTINEL * SIZE)
    with Disk() as disk:
        disk.layer(path, size=SIZE, writable=True)
        disk.install(0, [Extent(0, SIZE, Kind.DATA, in_place=True)])
        kept = Kept(runs)
        gaps = writes.Gaps(kept.segments, GRANULE)
        with pytest.raises(ImageError):
            writes.write_in_place(disk, kept.segments, 0, gaps)
        with pytest.raises(ImageError):
            writes.write_reserved(disk, kept.segments, gaps, writes.Places([Placement(0, SIZE, 0)]), 0)
    assert path.read_bytes() == SENTINEL * SIZE
