"""Many threads on one disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tapfs.driver import Cipher
from tapfs.extent import Extent, Kind
from tapfs.kernel.engine import Status
from tapfs.plan import Grow, plan
from tests.unit.engine.engine_disks import AES, GRANULE, UNIT, Disk, extents, host, pattern


def run_together(*bodies: Callable[[], None]) -> None:
    """Run each body in a thread of its own; raise what the first failing one raised."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(bodies))

    def guarded(body: Callable[[], None]) -> None:
        try:
            barrier.wait()
            body()
        except BaseException as failure:  # noqa: BLE001 - raised again below, in the test's thread
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize(("cipher", "direct"), [(AES, False), (AES, True), (None, True)])
def test_neighbours_in_a_sector_lose_nothing(tmp_path: Path, cipher: Cipher | None, direct: bool) -> None:  # noqa: FBT001
    """Each thread owns the bytes of its own stripes; every write of all threads modifies shared sectors."""
    stripe, threads, rounds = 100, 4, 150
    size = 8192
    with Disk() as disk:
        disk.layer(host(tmp_path, "raw"), size=size, cipher=cipher, writable=True, direct=direct)
        disk.install(0, extents((size, Kind.DATA, 512)))
        disk.put(bytes(size), 0)

        def owner(number: int) -> Callable[[], None]:
            def body() -> None:
                for turn in range(rounds):
                    block = (turn * 13) % (size // (stripe * threads))
                    offset = (block * threads + number) * stripe
                    mine = bytes([number * 50 + turn % 50 + 1]) * stripe
                    disk.put(mine, offset)
                    # Nobody else writes here, whatever happens to the rest of the sector.
                    assert disk.read(offset, stripe) == mine

            return body

        run_together(*(owner(number) for number in range(threads)))


def test_overlapping_writes_leave_whole_sectors_of_one_writer(tmp_path: Path) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "raw"), size=GRANULE, cipher=AES, writable=True)
        disk.install(0, extents((GRANULE, Kind.DATA, 0)))
        disk.put(bytes(GRANULE), 0)

        def writer(fill: int) -> Callable[[], None]:
            def body() -> None:
                for _ in range(100):
                    disk.put(bytes([fill]) * 3000, 7)

            return body

        run_together(*(writer(fill) for fill in (1, 2, 3)))
        content = disk.read(0, GRANULE)
        assert content[:7] == bytes(7)
        assert content[3007:] == bytes(GRANULE - 3007)
        assert len(set(content[7:3007])) == 1
        assert content[7] in {1, 2, 3}


def test_after_quiesce_a_freed_place_may_be_used_again(tmp_path: Path) -> None:
    """The granule moves between two places; the one it left is overwritten as soon as quiesce returns."""
    rounds = 300
    with Disk() as disk:
        disk.layer(host(tmp_path, "top", bytes(2 * UNIT)), size=UNIT, writable=True)
        tag = pattern(UNIT, 1)
        disk.write_host(0, 0, tag)
        disk.install(0, extents((UNIT, Kind.DATA, 0)))
        done = threading.Event()
        reads = [0]

        def reader() -> None:
            while not done.is_set():
                assert disk.read(0, UNIT) == tag
                reads[0] += 1

        def mover() -> None:
            try:
                for turn in range(rounds):
                    new = UNIT if turn % 2 == 0 else 0
                    disk.write_host(0, new, tag)
                    disk.install(0, extents((UNIT, Kind.DATA, new)))
                    disk.quiesce()
                    disk.write_host(0, UNIT - new, b"\xff" * UNIT)
                while reads[0] == 0:
                    disk.quiesce()
            finally:
                done.set()

        run_together(reader, reader, mover)


def test_requests_and_maintenance_together(tmp_path: Path) -> None:
    """Reads, writes, installs, forgets, syncs and quiesces at once: each read is whole and right."""
    units = 16
    content = pattern(units * UNIT, 3)
    done = threading.Event()
    with Disk(2048) as disk:
        disk.layer(host(tmp_path, "top", content), size=units * UNIT, writable=True)

        def supply(outcome_offset: int) -> None:
            base = outcome_offset - outcome_offset % UNIT
            disk.install(0, [Extent(base, UNIT, Kind.DATA, host_offset=base, in_place=True)])

        def mover(seed: int) -> Callable[[], None]:
            def body() -> None:
                try:
                    for turn in range(300):
                        offset = (turn * 7919 + seed * 104729) % (units * UNIT - 9000)
                        buffer = bytearray(9000)
                        while (outcome := disk.read_into(buffer, offset)).status is not Status.DONE:
                            supply(outcome.offset)
                        assert buffer == content[offset : offset + 9000]
                        at = 0
                        while at < 9000:
                            outcome = disk.write(buffer[at:], offset + at)
                            at += outcome.done
                            if outcome.status is not Status.DONE:
                                supply(outcome.offset)
                finally:
                    done.set()

            return body

        def maintain() -> None:
            turn = 0
            while not done.is_set():
                disk.forget(0, turn % units * UNIT, 3 * UNIT)
                disk.quiesce()
                disk.sync()
                disk.statistics()
                turn += 1

        run_together(mover(1), mover(2), maintain)
        assert disk.statistics().bytes_read >= 2 * 300 * 9000
    assert (tmp_path / "top").read_bytes() == content


def test_growing_never_cuts_what_is_written_meanwhile() -> None:
    block, blocks = 256 << 10, 200
    memory = os.memfd_create("grown")  # its fdatasync costs nothing
    path = Path(f"/proc/self/fd/{memory}")
    with Disk() as disk:
        disk.layer(path, size=1 << 30, identity=True, writable=True)
        done = threading.Event()
        written = [0]

        def writer() -> None:
            try:
                for index in range(blocks):
                    disk.put(b"x" * block, index * block)
                    written[0] = (index + 1) * block
            finally:
                done.set()

        def grower() -> None:
            """To sizes that the running write passes on its way."""
            while not done.is_set():
                disk.execute(plan([Grow(0, written[0] + part * 4096 + 1) for part in range(8)]))

        run_together(writer, grower)
        assert disk.read(0, blocks * block) == b"x" * (blocks * block)
    os.close(memory)


def test_a_reader_stays_out_of_sectors_that_are_being_rewritten(tmp_path: Path) -> None:
    """Half a rewritten sector decrypts to garbage where nobody wrote: under a cipher reads wait for writes."""
    size = 8 << 20
    with Disk() as disk:
        disk.layer(host(tmp_path, "top"), size=size, unit=size, cipher=AES, writable=True)
        disk.install(0, extents((size, Kind.DATA, 0)))
        disk.put(b"a" * size, 0)
        writer = threading.Thread(target=disk.put, args=(b"b" * size, 0))
        writer.start()
        while disk.read(0, 1) == b"a":
            pass
        last = disk.read(size - 1, 1)
        writer.join()
        assert last == b"b"


def test_quiesce_waits_for_a_running_request(tmp_path: Path) -> None:
    """A read that takes a while has filled its buffer to the end when a quiesce that began later returns."""
    size = 96 << 20
    with Disk() as disk:
        disk.layer(host(tmp_path, "top"), size=size, unit=1 << 30)
        disk.install(0, [Extent(0, size, Kind.ZERO)])
        buffer = bytearray(b"\xdd") * size
        reader = threading.Thread(target=disk.read_into, args=(buffer, 0))
        reader.start()
        while disk.statistics().cache_hits == 0:
            pass
        disk.quiesce()
        ends = buffer[0], buffer[-1]
        reader.join()
        assert ends == (0, 0)
