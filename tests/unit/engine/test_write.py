"""Writing in place and to reserved places, zeroing, plans, durability."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from tapfs.driver import Cipher
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.kernel.engine import HostDescriptor, Status, execute_on_files
from tapfs.plan import Copy, Discard, Grow, Plan, Shorten, Write, plan
from tests.unit.engine.engine_disks import AES, GRANULE, UNIT, Disk, extents, host, pattern, place

DATA, ZERO, UNALLOCATED, COMPRESSED, _ = Kind
SENTINEL = b"\xee"


def test_in_place_writes_reach_their_runs(tmp_path: Path) -> None:
    path = host(tmp_path, "top", SENTINEL * UNIT)
    with Disk() as disk:
        disk.layer(path, size=UNIT, writable=True)
        disk.install(0, extents((2 * GRANULE, DATA, 2 * GRANULE), (2 * GRANULE, DATA, 0)))
        disk.put(pattern(2 * GRANULE), GRANULE)
        assert disk.read(GRANULE, 2 * GRANULE) == pattern(2 * GRANULE)
        assert disk.statistics().bytes_written == 2 * GRANULE
    expected = bytearray(SENTINEL * UNIT)
    expected[3 * GRANULE :] = pattern(2 * GRANULE)[:GRANULE]
    expected[:GRANULE] = pattern(2 * GRANULE)[GRANULE:]
    assert path.read_bytes() == expected


def test_what_is_not_in_place_asks_for_a_reservation(tmp_path: Path) -> None:
    path = host(tmp_path, "top", SENTINEL * 2 * UNIT)
    shared = Extent(GRANULE, GRANULE, DATA, host_offset=GRANULE)
    with Disk() as disk:
        disk.layer(path, size=4 * UNIT, writable=True)
        in_place = Extent(0, GRANULE, DATA, in_place=True)
        last = Extent(3 * GRANULE, GRANULE, DATA, host_offset=3 * GRANULE, in_place=True)
        disk.install(0, [in_place, shared, Extent(2 * GRANULE, GRANULE, ZERO), last])
        outcome = disk.write(pattern(UNIT), 100)
        assert outcome[:5] == (Status.RESERVE, GRANULE - 100, 0, GRANULE, 2 * GRANULE)
        outcome = disk.write(b"xy", GRANULE + 5)
        assert outcome[:5] == (Status.RESERVE, 0, 0, GRANULE + 5, 2)
        # Over cached units, up to one that is not.
        disk.install(0, [Extent(UNIT, 2 * UNIT, UNALLOCATED)])
        outcome = disk.write(pattern(3 * UNIT - 10), UNIT + 10)
        assert outcome[:5] == (Status.RESERVE, 0, 0, UNIT + 10, 2 * UNIT - 10)
        outcome = disk.write(b"x", 3 * UNIT)
        assert outcome[:5] == (Status.MISS, 0, 0, 3 * UNIT, 1)
    assert path.read_bytes() == (SENTINEL * 100 + pattern(GRANULE - 100)).ljust(2 * UNIT, SENTINEL)


def test_a_miss_in_the_middle_keeps_what_is_written(tmp_path: Path) -> None:
    path = host(tmp_path, "top", b"")
    with Disk() as disk:
        disk.layer(path, size=2 * UNIT, writable=True)
        disk.install(0, extents((UNIT, DATA, 0)))
        assert disk.write(pattern(2 * UNIT), 0)[:5] == (Status.MISS, UNIT, 0, UNIT, UNIT)
    assert path.read_bytes() == pattern(2 * UNIT)[:UNIT]


def test_a_layer_that_is_not_writable_is_read_only(tmp_path: Path) -> None:
    path = host(tmp_path, "raw", pattern(UNIT))
    with Disk() as disk:
        disk.layer(path, size=UNIT, identity=True)
        for attempt in (
            lambda: disk.write(b"x", 0),
            lambda: disk.write_reserved(b"x", 0, [place(0, UNIT, 0)]),
            lambda: disk.zero_placements([place(0, UNIT, 0)], discard=False),
            lambda: disk.write_host(0, 0, b"x"),
            lambda: disk.execute(plan([Write(0, 0, b"x")])),
        ):
            with pytest.raises(ImageError) as caught:
                attempt()
            assert caught.value.kind is ErrorKind.READ_ONLY
    assert path.read_bytes() == pattern(UNIT)


@pytest.mark.parametrize("cipher", [None, AES])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("granule", "length"), [(GRANULE, 3), (1 << 20, 300_000)])
def test_reserved_writes_fill_from_the_old_contents(
    tmp_path: Path,
    cipher: Cipher | None,
    direct: bool,  # noqa: FBT001
    granule: int,
    length: int,
) -> None:
    offset = 5000
    size = 2 * granule
    below = pattern(size - 1000, 7)
    path = host(tmp_path, "top", SENTINEL * (3 * granule))
    with Disk() as disk:
        disk.layer(path, size=size, granule=granule, unit=size, cipher=cipher, writable=True, direct=direct)
        disk.layer(host(tmp_path, "below", below), size=len(below), identity=True)
        disk.install(0, extents((size, UNALLOCATED, 0)))
        start = offset - offset % granule
        end = -(-(offset + length) // granule) * granule
        data = pattern(length, 3)
        outcome = disk.write_reserved(data, offset, [place(start, end - start, granule, fresh=bool(cipher))])
        assert (outcome.status, outcome.done) == (Status.DONE, 1)
        model = bytearray(below.ljust(size, b"\0"))
        assert disk.read(0, size) == model, "nothing is visible yet"
        model[offset : offset + length] = data
        disk.forget(0, 0, size)
        pieces = [Extent(start, end - start, DATA, host_offset=granule, in_place=True)]
        before = [Extent(0, start, UNALLOCATED)] if start else []
        after = [Extent(end, size - end, UNALLOCATED)] if end < size else []
        disk.install(0, before + pieces + after)
        assert disk.read(0, size) == model
    content = path.read_bytes()
    assert content[:granule] == SENTINEL * granule
    assert content[granule + end - start :] == SENTINEL * (2 * granule - (end - start))


def test_fills_miss_in_the_layers_below(tmp_path: Path) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "top"), size=UNIT, writable=True)
        disk.layer(host(tmp_path, "below", pattern(UNIT)), size=UNIT, unit=GRANULE, granule=512)
        disk.install(0, extents((UNIT, UNALLOCATED, 0)))
        outcome = disk.write_reserved(b"x", 700, [place(0, GRANULE, 0)])
        assert outcome[:5] == (Status.MISS, 0, 1, 0, 700)
        disk.install(1, extents((GRANULE, DATA, 0)))
        assert disk.write_reserved(b"x", 700, [place(0, GRANULE, 0)]).status is Status.DONE
        disk.install(0, extents((GRANULE, DATA, 0), (UNIT - GRANULE, ZERO, 0)))
        assert disk.read(0, GRANULE) == pattern(700) + b"x" + pattern(UNIT)[701:GRANULE]


@pytest.mark.parametrize("length", [1, 600 << 10])
def test_zeros_are_not_written_where_it_is_fresh(tmp_path: Path, length: int) -> None:
    path = host(tmp_path, "top", SENTINEL * (2 << 20))
    with Disk() as disk:
        disk.layer(path, size=4 << 20, granule=2 << 20, unit=4 << 20, writable=True)
        disk.install(0, extents((4 << 20, ZERO, 0)))
        disk.write_reserved(b"x" * length, 700 << 10, [place(0, 2 << 20, 0, fresh=True)])
    content = path.read_bytes()
    assert content[700 << 10 : (700 << 10) + length] == b"x" * length
    assert content[:1024] == SENTINEL * 1024
    assert content[-1024:] == SENTINEL * 1024
    assert content.count(b"x") == length


@pytest.mark.parametrize("direct", [False, True])
def test_only_the_data_is_written_where_it_is_fresh_and_the_disk_is_zeros(tmp_path: Path, *, direct: bool) -> None:
    path = host(tmp_path, "top", SENTINEL * (2 << 20))
    with Disk() as disk:
        disk.layer(path, size=4 << 20, granule=2 << 20, unit=4 << 20, writable=True, direct=direct)
        disk.install(0, extents((4 << 20, UNALLOCATED, 0)))
        disk.write_reserved(b"x" * 4096, 700 << 10, [place(0, 2 << 20, 0, fresh=True)])
    written = (SENTINEL * (700 << 10) + b"x" * 4096).ljust(2 << 20, SENTINEL)
    assert path.read_bytes() == written


def test_a_fresh_place_over_a_parent_is_filled(tmp_path: Path) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "top"), size=1 << 20, granule=1 << 20, unit=1 << 20, writable=True)
        disk.layer(host(tmp_path, "below", pattern(1 << 20)), size=1 << 20, identity=True)
        disk.install(0, extents((1 << 20, UNALLOCATED, 0)))
        disk.write_reserved(b"x" * 10, 700, [place(0, 1 << 20, 0, fresh=True)])
        disk.install(0, extents((1 << 20, DATA, 0)))
        assert disk.read(0, 1 << 20) == pattern(700) + b"x" * 10 + pattern(1 << 20)[710:]


def test_in_place_placements_are_not_filled(tmp_path: Path) -> None:
    path = host(tmp_path, "top", SENTINEL * UNIT)
    with Disk() as disk:
        disk.layer(path, size=UNIT, writable=True)
        disk.install(0, extents((UNIT, ZERO, 0)))
        placements = [place(0, GRANULE, GRANULE, in_place=True), place(GRANULE, GRANULE, 0)]
        disk.write_reserved(b"x" * 20, GRANULE - 10, placements)
    content = path.read_bytes()
    assert content[GRANULE : 2 * GRANULE] == SENTINEL * (GRANULE - 10) + b"x" * 10
    assert content[:GRANULE] == b"x" * 10 + bytes(GRANULE - 10)
    assert content[2 * GRANULE :] == SENTINEL * 2 * GRANULE


def test_a_placement_past_the_end_of_the_disk_is_filled_with_zeros(tmp_path: Path) -> None:
    path = host(tmp_path, "top", SENTINEL * GRANULE)
    with Disk() as disk:
        disk.layer(path, size=100, writable=True)
        disk.layer(host(tmp_path, "below", pattern(GRANULE)), size=GRANULE, identity=True)
        disk.install(0, [Extent(0, GRANULE, UNALLOCATED)])
        disk.write_reserved(b"xy", 98, [place(0, GRANULE, 0)])
    assert path.read_bytes() == pattern(98) + b"xy" + bytes(GRANULE - 100)


@pytest.mark.parametrize(
    "placements",
    [
        [],
        [place(0, GRANULE, 0)],
        [place(GRANULE, GRANULE, 0)],
        [place(0, GRANULE, 0), place(2 * GRANULE, GRANULE, GRANULE)],
        [place(0, UNIT, (1 << 63) - UNIT)],
        [place(0, UNIT, (1 << 64) - 1)],
        [place(0, UNIT, 0)._replace(file=1)],
    ],
)
def test_placements_that_do_not_hold_the_request_are_refused(tmp_path: Path, placements: list) -> None:  # type: ignore[type-arg]
    path = host(tmp_path, "top")
    with Disk() as disk:
        disk.layer(path, size=UNIT, writable=True)
        with pytest.raises(ImageError):
            disk.write_reserved(b"x" * 20, GRANULE - 10, placements)
    assert path.read_bytes() == b""


def test_zeroing_writes_nothing_where_it_is_fresh_and_punches_elsewhere(tmp_path: Path) -> None:
    path = host(tmp_path, "top", SENTINEL * UNIT)
    with Disk() as disk:
        disk.layer(path, size=UNIT, writable=True)
        disk.zero_placements([place(0, GRANULE, 0, fresh=True), place(GRANULE, GRANULE, 2 * GRANULE)], discard=False)
        content = SENTINEL * 2 * GRANULE + bytes(GRANULE) + SENTINEL * GRANULE
        assert path.read_bytes() == content
        disk.zero_placements([place(0, GRANULE, 0)], discard=True)
        assert path.read_bytes() == bytes(GRANULE) + content[GRANULE:]


def test_under_a_cipher_zeros_are_written_and_discards_are_nothing(tmp_path: Path) -> None:
    path = host(tmp_path, "top", SENTINEL * (600 << 10))
    with Disk() as disk:
        disk.layer(path, size=600 << 10, unit=1 << 20, cipher=AES, writable=True)
        disk.install(0, extents((600 << 10, DATA, 0)))
        disk.zero_placements([place(0, 600 << 10, 0)], discard=True)
        assert path.read_bytes() == SENTINEL * (600 << 10)
        disk.zero_placements([place(0, 600 << 10, 0, fresh=True)], discard=False)
        assert disk.read(0, 600 << 10) == bytes(600 << 10)
        assert path.read_bytes()[:512] != bytes(512)


def test_payloads_go_where_they_are_told(tmp_path: Path) -> None:
    path = host(tmp_path, "top")
    with Disk() as disk:
        disk.layer(path, size=UNIT, cipher=AES, writable=True)
        disk.write_host(0, 3, b"payload")
        disk.write_host(0, GRANULE, pattern(GRANULE), guest_offset=GRANULE)
        disk.install(0, extents((UNIT, DATA, 0)))
        assert disk.read(GRANULE, GRANULE) == pattern(GRANULE)
        with pytest.raises(ImageError):
            disk.write_host(1, 0, b"x")
        with pytest.raises(ImageError):
            disk.write_host(0, (1 << 63) - 1, b"xy")
    assert path.read_bytes()[:10] == b"\0\0\0payload"
    assert path.read_bytes()[GRANULE:] != pattern(GRANULE)


@pytest.mark.parametrize("direct", [False, True])
def test_a_plan_runs_in_order(tmp_path: Path, direct: bool) -> None:  # noqa: FBT001
    one, two = host(tmp_path, "one", SENTINEL * UNIT), host(tmp_path, "two")
    with Disk() as disk:
        disk.layer(one, two, size=UNIT, writable=True, direct=direct)
        disk.execute(
            Plan(
                (
                    (Write(0, 10, b"first"), Write(1, 0, b"a"), Grow(1, 9000)),
                    (Write(0, 12, b"second"), Discard(0, GRANULE, GRANULE), Grow(0, 5)),
                )
            )
        )
        disk.execute(plan())
    content = SENTINEL * 10 + b"fisecond" + SENTINEL * (GRANULE - 18) + bytes(GRANULE) + SENTINEL * 2 * GRANULE
    assert one.read_bytes() == content
    assert two.read_bytes() == b"a".ljust(9000, b"\0")


@pytest.mark.parametrize("direct", [False, True])
def test_a_plan_copies_inside_a_file_and_cuts_it(tmp_path: Path, direct: bool) -> None:  # noqa: FBT001
    long = (600 << 10) + 7  # more than the engine copies at once
    path = host(tmp_path, "one", pattern(long))
    with Disk() as disk:
        disk.layer(path, size=UNIT, writable=True, direct=direct)
        disk.execute(
            plan([Copy(0, long, 7, long - 7), Copy(0, 3 * long, 2 * long - 10, 100)], [Shorten(0, 3 * long + 50)])
        )
        disk.execute(plan([Shorten(0, 4 * long)]))  # it is shorter already
    content = (pattern(long) + pattern(long)[7:]).ljust(3 * long, b"\0")
    assert path.read_bytes() == content + pattern(long)[-3:].ljust(50, b"\0")


def test_a_failing_step_stops_the_plan_and_names_its_place(tmp_path: Path) -> None:
    path = host(tmp_path, "top")
    with Disk() as disk:
        disk.layer(path, size=UNIT, writable=True)
        with pytest.raises(ImageError) as caught:
            disk.execute(plan([Write(0, 0, b"a"), Write(0, (1 << 63) - 1, b"bc"), Write(0, 1, b"d")]))
        assert caught.value.path == str(path)
        with pytest.raises(ImageError):
            disk.execute(plan([Write(3, 0, b"x")]))
    assert path.read_bytes() == b"a"


def test_a_plan_runs_on_a_file_without_a_disk(tmp_path: Path) -> None:
    path = host(tmp_path, "new")
    with path.open("r+b") as file:
        execute_on_files(
            [HostDescriptor(file.fileno(), str(path), writable=True)], plan([Grow(0, 100), Write(0, 50, b"x")])
        )
    assert path.read_bytes() == (bytes(50) + b"x").ljust(100, b"\0")


# fdatasync fails on /dev/null (EINVAL), so what a descriptor refers to decides whether a sync works.


def test_a_failed_sync_stays_failed(tmp_path: Path) -> None:
    path = host(tmp_path, "top", bytes(UNIT))
    null = os.open(os.devnull, os.O_RDWR)
    with Disk() as disk:
        disk.layer(path, size=UNIT, identity=True, writable=True)
        os.dup2(null, disk.descriptors[0])
        for attempt in (disk.sync, disk.sync, lambda: disk.execute(plan())):
            with pytest.raises(ImageError) as caught:
                attempt()
            assert caught.value.op == "sync"
        real = os.open(path, os.O_RDWR)
        os.dup2(real, disk.descriptors[0])
        os.close(real)
        with pytest.raises(ImageError):
            disk.sync()
    os.close(null)


def test_only_files_that_were_written_are_synced(tmp_path: Path) -> None:
    path = host(tmp_path, "top", bytes(UNIT))
    null = os.open(os.devnull, os.O_RDWR)
    with Disk() as disk:
        disk.layer(path, size=UNIT, identity=True, writable=True)
        disk.sync()
        os.dup2(null, disk.descriptors[0])
        disk.sync()
        disk.put(b"x", 0)
        with pytest.raises(ImageError):
            disk.sync()
    os.close(null)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(100, 200), (100, 412), (512 + 7, 3 * 512), (0, 5 * 512 + 50)])
def test_a_write_under_a_cipher_that_the_host_cuts_spoils_no_neighbour(
    tmp_path: Path, offset: int, length: int, *, direct: bool
) -> None:
    """The file-size limit ends a write at any byte. What lies beside the write in its sectors stays as it was."""
    path = host(tmp_path, "top")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Disk() as disk:
        disk.layer(path, size=UNIT, cipher=AES, writable=True, direct=direct)
        disk.install(0, extents((UNIT, DATA, 0)))
        first = offset - offset % 512
        last = (offset + length - 1) // 512 * 512
        for edge in {first, last}:
            for cut in (1, 99, 300, 511):
                disk.put(pattern(UNIT), 0)
                resource.setrlimit(resource.RLIMIT_FSIZE, (edge + cut, limits[1]))
                try:
                    with pytest.raises(ImageError):
                        disk.write(b"n" * length, offset)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                content = disk.read(0, UNIT)
                assert content[:offset] == pattern(UNIT)[:offset]
                assert content[offset + length :] == pattern(UNIT)[offset + length :]
