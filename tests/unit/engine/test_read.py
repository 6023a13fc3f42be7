"""Reading: layers, misses, the edges of files and disks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tapfs.driver import MAX_DISK_BYTES
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.kernel.engine import Status
from tests.unit.engine.engine_disks import GRANULE, UNIT, Disk, extents, filled, host, pattern

DATA, ZERO, UNALLOCATED, COMPRESSED, _ = Kind


def test_every_kind_comes_from_its_place(tmp_path: Path) -> None:
    top, below = pattern(3 * GRANULE, 1), pattern(UNIT, 2)
    with Disk() as disk:
        disk.layer(host(tmp_path, "top", top), size=UNIT)
        disk.layer(host(tmp_path, "below", below), size=UNIT, identity=True)
        disk.install(0, extents((GRANULE, DATA, GRANULE), (GRANULE, ZERO, 0), (2 * GRANULE, UNALLOCATED, 0)))
        expected = top[GRANULE : 2 * GRANULE] + bytes(GRANULE) + below[2 * GRANULE :]
        assert disk.read(0, UNIT) == expected
        assert disk.read(GRANULE - 3, GRANULE + 7) == expected[GRANULE - 3 : 2 * GRANULE + 4]
        assert disk.read(UNIT, 0) == b""
        assert disk.statistics().bytes_read == UNIT + GRANULE + 7


def test_zeros_past_shorter_layers_and_below_the_last(tmp_path: Path) -> None:
    short = pattern(GRANULE + 100, 3)
    with Disk() as disk:
        disk.layer(host(tmp_path, "top"), size=2 * UNIT)
        disk.layer(host(tmp_path, "middle"), size=UNIT + 10)
        disk.layer(host(tmp_path, "short", short), size=len(short), identity=True)
        disk.install(0, extents((2 * UNIT, UNALLOCATED, 0)))
        disk.install(1, extents((UNIT + 10, UNALLOCATED, 0)))
        assert disk.read(0, 2 * UNIT) == short.ljust(2 * UNIT, b"\0")
        assert disk.read(GRANULE + 99, 2) == short[-1:] + b"\0"


def test_runs_in_several_files_and_out_of_order(tmp_path: Path) -> None:
    one, two = pattern(UNIT, 1), pattern(UNIT, 2)
    with Disk() as disk:
        disk.layer(host(tmp_path, "one", one), host(tmp_path, "two", two), size=UNIT)
        disk.install(
            0,
            [
                Extent(0, GRANULE, DATA, file=1, host_offset=GRANULE),
                Extent(GRANULE, GRANULE, DATA, file=0, host_offset=2 * GRANULE),
                Extent(2 * GRANULE, GRANULE, DATA, file=0, host_offset=3 * GRANULE),
                Extent(3 * GRANULE, GRANULE, DATA, file=0, host_offset=0),
            ],
        )
        assert disk.read(0, UNIT) == two[GRANULE : 2 * GRANULE] + one[2 * GRANULE :] + one[:GRANULE]


def test_a_miss_names_what_is_missing_and_what_is_done(tmp_path: Path) -> None:
    top, below = pattern(UNIT, 1), pattern(3 * UNIT, 2)
    with Disk() as disk:
        disk.layer(host(tmp_path, "top", top), size=3 * UNIT)
        disk.layer(host(tmp_path, "below", below), size=2 * UNIT + 50, unit=2 * UNIT)
        buffer = bytearray(3 * UNIT - 10)

        outcome = disk.read_into(buffer, 10)
        assert outcome[:5] == (Status.MISS, 0, 0, 10, 3 * UNIT - 10)

        disk.install(0, [*extents((UNIT, DATA, 0)), Extent(UNIT, 2 * UNIT, UNALLOCATED)])
        outcome = disk.read_into(buffer, 10)
        assert outcome[:5] == (Status.MISS, UNIT - 10, 1, UNIT, UNIT + 50)
        assert buffer[: UNIT - 10] == top[10:]

        disk.install(1, extents((2 * UNIT, DATA, 0)))
        outcome = disk.read_into(buffer, 10)
        assert outcome[:5] == (Status.MISS, 2 * UNIT - 10, 1, 2 * UNIT, 50)

        disk.install(1, [Extent(2 * UNIT, 2 * UNIT, DATA, host_offset=2 * UNIT)])
        expected = top[10:] + below[UNIT : 2 * UNIT + 50] + bytes(UNIT - 50)
        assert disk.read(10, 3 * UNIT - 10) == expected


def test_forgetting_touches_only_the_units_in_the_range(tmp_path: Path) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "top", pattern(3 * UNIT)), size=3 * UNIT)
        disk.install(0, extents((3 * UNIT, DATA, 0)))
        disk.forget(0, 2 * UNIT - 1, 1)
        assert disk.read(0, UNIT) == pattern(3 * UNIT)[:UNIT]
        assert disk.read(2 * UNIT, UNIT) == pattern(3 * UNIT)[2 * UNIT :]
        outcome = disk.read_into(bytearray(UNIT), UNIT)
        assert (outcome.status, outcome.offset, outcome.done) == (Status.MISS, UNIT, 0)
        disk.forget(0, 0, (1 << 64) - 1)
        assert disk.statistics().cache_bytes == 0


def test_installing_replaces(tmp_path: Path) -> None:
    content = pattern(2 * UNIT)
    with Disk() as disk:
        disk.layer(host(tmp_path, "top", content), size=UNIT)
        disk.install(0, extents((UNIT, DATA, 0)))
        before = disk.statistics().cache_bytes
        disk.install(0, extents((UNIT, DATA, UNIT)))
        assert disk.read(0, UNIT) == content[UNIT:]
        assert disk.statistics().cache_bytes == before


def test_a_mapped_file_may_end_early_and_an_identity_may_not(tmp_path: Path) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "mapped", b"abc"), size=UNIT)
        disk.install(0, extents((UNIT, DATA, 1)))
        assert disk.read(0, UNIT) == b"bc".ljust(UNIT, b"\0")
    path = host(tmp_path, "raw", pattern(UNIT))
    with Disk() as disk:
        disk.layer(path, size=UNIT, identity=True)
        assert disk.read(0, UNIT) == pattern(UNIT)
        os.truncate(path, GRANULE)
        with pytest.raises(ImageError) as caught:
            disk.read(0, UNIT)
        assert (caught.value.kind, caught.value.path, caught.value.offset) == (ErrorKind.IO, str(path), GRANULE)


@pytest.mark.parametrize(("offset", "length"), [(0, UNIT + 1), (UNIT, 1), (UNIT + 1, 0), ((1 << 64) - 1, 2)])
def test_requests_past_the_end_are_out_of_bounds(tmp_path: Path, offset: int, length: int) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "raw", pattern(UNIT)), size=UNIT, identity=True, writable=True)
        with pytest.raises(ImageError) as caught:
            disk.read_into(bytearray(length), offset)
        assert caught.value.kind is ErrorKind.OUT_OF_BOUNDS
        with pytest.raises(ImageError) as caught:
            disk.write(bytes(length), offset)
        assert caught.value.kind is ErrorKind.OUT_OF_BOUNDS


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [Extent(GRANULE, UNIT, ZERO)],
        [Extent(0, GRANULE, ZERO)],
        [Extent(4 * UNIT, UNIT, ZERO)],
        [Extent(0, GRANULE, ZERO), Extent(2 * GRANULE, 2 * GRANULE, ZERO)],
        [Extent(0, 0, ZERO), Extent(0, UNIT, ZERO)],
        [Extent(0, UNIT, DATA, file=1)],
        [Extent(0, UNIT, DATA, host_offset=(1 << 63) - UNIT)],
        [Extent(0, UNIT, DATA, host_offset=(1 << 64) - UNIT)],
        filled([Extent(0, GRANULE, COMPRESSED, host_offset=0)], UNIT),
        filled([Extent(0, GRANULE, COMPRESSED, host_offset=0, host_length=1 << 40)], UNIT),
        filled([Extent(0, GRANULE, COMPRESSED, host_offset=(1 << 63) - 5, host_length=10)], UNIT),
        filled([Extent(0, 2 * GRANULE, COMPRESSED, host_offset=0, host_length=10)], UNIT),
        filled([Extent(0, 512, ZERO), Extent(512, GRANULE, COMPRESSED, host_offset=0, host_length=10)], UNIT),
    ],
)
def test_a_map_that_breaks_a_rule_is_refused_whole(tmp_path: Path, wrong: list[Extent]) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "top"), size=3 * UNIT)
        with pytest.raises(ImageError):
            disk.install(0, wrong)
        assert disk.statistics().cache_bytes == 0


@pytest.mark.parametrize(
    "geometry",
    [{"granule": 0}, {"unit": GRANULE - 1}, {"unit": GRANULE + 512}, {"unit": 1 << 31}, {"size": 1 << 63}],
)
def test_a_geometry_that_cannot_be_served_is_refused(tmp_path: Path, geometry: dict[str, int]) -> None:
    with Disk() as disk, pytest.raises(ImageError):
        disk.layer(host(tmp_path, "top"), **({"size": UNIT} | geometry))


def test_the_largest_disk_is_the_one_that_the_contract_names(tmp_path: Path) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "top"), size=MAX_DISK_BYTES)
    with Disk() as disk, pytest.raises(ImageError):
        disk.layer(host(tmp_path, "top"), size=MAX_DISK_BYTES + 1)


def test_the_cache_stays_in_its_bound_and_reads_stay_right(tmp_path: Path) -> None:
    units, limit = 5000, 64 << 10
    content = pattern(UNIT, 5)
    with Disk(limit) as disk:
        disk.layer(host(tmp_path, "top", content), size=units * UNIT)
        for unit in range(units):
            base = unit * UNIT
            disk.install(
                0,
                [
                    Extent(base + part * GRANULE, GRANULE, DATA, host_offset=(unit + 3 * part) % 4 * GRANULE)
                    for part in range(4)
                ],
            )
            assert disk.statistics().cache_bytes <= limit
            got = disk.read(base + 3 * GRANULE, GRANULE)
            source = (unit + 9) % 4 * GRANULE
            assert got == content[source : source + GRANULE]
        assert disk.read_into(bytearray(1), 0).status is Status.MISS
        assert disk.statistics().cache_bytes > limit // 2
        # The least recently used goes first: a unit that is read again and again stays.
        kept = (units - 1) * UNIT
        for unit in range(2000):
            disk.install(0, [Extent(unit * UNIT, UNIT, ZERO)])
            disk.read(kept, 1)


def test_a_cache_without_room_still_serves_a_deep_chain(tmp_path: Path) -> None:
    with Disk(0) as disk:
        for _ in range(6):
            disk.layer(host(tmp_path, "empty"), size=UNIT)
        disk.layer(host(tmp_path, "raw", pattern(UNIT)), size=UNIT, identity=True)
        buffer = bytearray(UNIT)
        for _ in range(6):
            outcome = disk.read_into(buffer, 0)
            assert outcome.status is Status.MISS
            disk.install(outcome.layer, extents((UNIT, UNALLOCATED, 0)))
        assert disk.read(0, UNIT) == pattern(UNIT)


def host_knows_nowait(descriptor: int) -> bool:
    """Some host file systems (tmpfs of some kernels) refuse RWF_NOWAIT."""
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False


def test_nowait_answers_what_the_host_has_in_memory(tmp_path: Path) -> None:
    path = host(tmp_path, "top", pattern(4 * UNIT))
    with Disk() as disk:
        disk.layer(path, size=4 * UNIT)
        disk.install(0, extents((4 * UNIT, DATA, 0)))
        buffer = bytearray(4 * UNIT)
        statuses = set[Status]()
        for _ in range(50):
            disk.read(0, 4 * UNIT)
            statuses.add(disk.read_into(buffer, 0, nowait=True).status)
        if host_knows_nowait(disk.descriptors[0]):
            assert Status.DONE in statuses
            assert buffer == pattern(4 * UNIT)
        # Whatever part of the file the host lets go of: what is done is right.
        os.fsync(disk.descriptors[0])
        os.posix_fadvise(disk.descriptors[0], 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(4 * UNIT)
        outcome = disk.read_into(buffer, 0, nowait=True)
        assert (outcome.status is Status.DONE) == (outcome.done == 4 * UNIT)
        assert buffer[: outcome.done] == pattern(4 * UNIT)[: outcome.done]
        assert disk.read(0, 4 * UNIT) == pattern(4 * UNIT)


def test_a_closed_disk_says_so() -> None:
    disk = Disk()
    disk.close()
    disk.close()
    with pytest.raises(ValueError, match="closed"):
        disk.read_into(bytearray(1), 0)
