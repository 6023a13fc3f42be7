"""Requests that meet in one cluster: QEMU's case 046, two bugs that QEMU 11.0.2 mended, and three of Cloud Hypervisor.

A write is held between its reservation and its commit, where the engine fills the new place. What comes meanwhile must
wait for it, or see the disk as it was.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tapfs.disk.chain import OpenOptions
from tapfs.jobs.resize import resize_image
from tapfs.kernel import writes
from tapfs.kernel.engine import EngineDisk
from tests.qcow2_images import by_hand
from tests.unit.formats.qcow2.cases.small_images import CLUSTER, clean, new, poke, put, raw, refcount_at, table_at

SIZE = 32 * CLUSTER


class Held:
    """One call of a function that waits until it is told to go on; other calls go through."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._first = threading.Lock()
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, *words: Any) -> Any:
        if self._first.acquire(blocking=False):
            self.reached.set()
            assert self.go.wait(30)
        return self._function(*words)


def held_call(self: object, held: Held, *words: object) -> Any:
    """A method that goes through `held`."""
    return held(self, *words)


@contextmanager
def meanwhile(held: Held, first: Callable[[], None]) -> Generator[None]:
    """`first` runs as far as the held call while the block runs, and to its end afterwards."""
    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert held.reached.wait(30)
        yield
    finally:
        held.go.set()
        thread.join()


def beside(disk: tapfs.Image, held: Held, first: Callable[[], None], *others: Callable[[], None]) -> None:
    """Begin `first`, and the others while it is held; it goes on once each other has ended or waits for it."""
    with meanwhile(held, first):
        threads = [threading.Thread(target=other) for other in others]
        for thread in threads:
            thread.start()
        waiting = disk._writes._claims._changed  # type: ignore[union-attr]
        while sum(thread.is_alive() for thread in threads) > len(waiting._waiters):  # type: ignore[attr-defined]
            for thread in threads:
                thread.join(0.001)
    for thread in threads:
        thread.join()


#: A write of ``(offset, length)`` in halves of 512 bytes of clusters of 16, and those that come while it is held.
MEETINGS = {
    "before and behind it": ((24, 2), [(18, 2), (28, 2)]),
    "from it into the next": ((40, 2), [(42, 16)]),
    "with a gap": ((72, 2), [(76, 16)]),
    "into one that is there": ((102, 2), [(106, 14)]),
    "into one that was discarded": ((134, 2), [(138, 14)]),
    "backward": ((220, 2), [(196, 24)]),
    "backward with a gap": ((252, 2), [(228, 20)]),
    "over it": ((268, 8), [(260, 24)]),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_046_writes_that_meet_in_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meeting: str) -> None:
    unit = 256
    below = random.Random(46).randbytes(SIZE)
    (tmp_path / "base").write_bytes(below)
    path = new(tmp_path / "image", SIZE, tmp_path / "base")
    expected = bytearray(below)
    put(path, (70, 7 * CLUSTER, 0x300), (89, 9 * CLUSTER, 0x300))
    for byte, cluster in ((70, 7), (89, 9)):
        expected[cluster * CLUSTER : cluster * CLUSTER + 0x300] = bytes([byte]) * 0x300
    first, others = MEETINGS[meeting]
    with tapfs.open(path, writable=True) as disk:
        disk.discard(9 * CLUSTER, CLUSTER)
        expected[9 * CLUSTER : 10 * CLUSTER] = bytes(CLUSTER)
        held = Held(writes.write_reserved)
        monkeypatch.setattr(writes, "write_reserved", held)

        def write(number: int, place: tuple[int, int]) -> Callable[[], None]:
            return lambda: disk.write(place[0] * unit, bytes([number]) * place[1] * unit)

        beside(disk, held, write(1, first), *(write(number, place) for number, place in enumerate(others, start=2)))
        for number, (at, length) in enumerate([first, *others], start=1):
            expected[at * unit : (at + length) * unit] = bytes([number]) * length * unit
        assert disk.read(0, SIZE) == expected
    assert by_hand(path.read_bytes(), below) == expected
    clean(path)


@pytest.mark.parametrize("change", ["zeros", "a part of zeros", "a discard"])
@pytest.mark.parametrize("had", ["nothing", "a parent", "data that a snapshot shares"])
def test_qemu_11_0_2_zeros_and_discards_wait_for_a_copy_on_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, had: str
) -> None:
    """QEMU freed the cluster of a copy-on-write under way, for a discard or for zeros under detect-zeroes=unmap.

    The entry that was written at the end led to a cluster which another write had been given meanwhile.
    """
    below = b"\x55" * SIZE if had == "a parent" else b""
    base = raw(tmp_path / "base", 0x55, SIZE) if below else None
    path = new(tmp_path / "image", SIZE, base)
    expected = bytearray(below or bytes(SIZE))
    if had == "data that a snapshot shares":
        put(path, (0x66, 0, 4 * CLUSTER))
        tapfs.create_snapshot(path, "before")
        expected[: 4 * CLUSTER] = b"\x66" * 4 * CLUSTER
    kept = bytes(expected)
    with tapfs.open(path, writable=True) as disk:
        held = Held(writes.write_reserved)
        monkeypatch.setattr(writes, "write_reserved", held)

        def zero() -> None:
            offset, length = (CLUSTER + 700, 100) if change == "a part of zeros" else (CLUSTER, CLUSTER)
            (disk.discard if change == "a discard" else disk.write_zeroes)(offset, length)

        def write() -> None:
            disk.write(CLUSTER + 512, b"w" * 1024)

        def elsewhere() -> None:
            disk.write(9 * CLUSTER, b"e" * CLUSTER)
            disk.flush()

        beside(disk, held, write, zero, elsewhere)
        expected[CLUSTER + 512 : CLUSTER + 1536] = b"w" * 1024
        expected[9 * CLUSTER : 10 * CLUSTER] = b"e" * CLUSTER
        changed = bytearray(expected)
        if change == "a part of zeros":
            changed[CLUSTER + 700 : CLUSTER + 800] = bytes(100)
        else:
            changed[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
        # The zeros came later. Where they found nothing to do while the write was held they came before it.
        now = disk.read(0, SIZE)
        found_nothing = had == "nothing" or (had == "a parent" and change == "a discard")
        assert now == changed or (found_nothing and now == expected)
        disk.write(20 * CLUSTER, b"n" * 4 * CLUSTER)
        changed[:] = now
        changed[20 * CLUSTER : 24 * CLUSTER] = b"n" * 4 * CLUSTER
        assert disk.read(0, SIZE) == changed
    assert by_hand(path.read_bytes(), below) == changed
    if had == "data that a snapshot shares":
        assert by_hand(path.read_bytes(), snapshot=0) == kept
    clean(path)


def test_060_metadata_that_the_guard_stops_leaves_a_copy_on_write_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one write copies, another would get a table's cluster, of refcount 0. It fails, the first does not."""
    base = raw(tmp_path / "base", 0x55, 1024 * CLUSTER)
    path = new(tmp_path / "image", 1024 * CLUSTER, base)
    put(path, (1, 0, 2 * CLUSTER))
    put(path, (2, 600 * CLUSTER, CLUSTER))
    with tapfs.open(path, writable=True) as disk:
        disk.discard(CLUSTER, CLUSTER)  # so that there is one free cluster before the table
    poke(path, refcount_at(path, table_at(path, 1)), 0, 2)
    disk = tapfs.open(path, writable=True)
    held = Held(writes.write_reserved)
    monkeypatch.setattr(writes, "write_reserved", held)
    with meanwhile(held, lambda: disk.write(3 * CLUSTER, b"w" * 1024)), pytest.raises(tapfs.ImageError) as raised:
        disk.write(4 * CLUSTER, b"x" * CLUSTER)
    assert raised.value.kind is tapfs.ErrorKind.CORRUPT
    assert disk.read(3 * CLUSTER, CLUSTER) == b"w" * 1024 + b"\x55" * (CLUSTER - 1024)
    assert disk.read(600 * CLUSTER, CLUSTER) == b"\2" * CLUSTER
    disk.abandon()


def test_cloud_hypervisor_8624_a_late_hole_never_hits_a_cluster_that_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan frees is punched in its last stage. Until that is done, no writer may be given the cluster."""
    path = new(tmp_path / "image", 1024 * CLUSTER)
    put(path, *((number + 1, number * CLUSTER, CLUSTER) for number in range(8)))
    with tapfs.open(path, writable=True) as disk:
        disk.discard(0, 8 * CLUSTER)
        held = Held(EngineDisk.execute)
        monkeypatch.setattr(EngineDisk, "execute", partialmethod(held_call, held))
        with meanwhile(held, disk.flush):
            # Data, and a new L2 table for the second half of the disk.
            disk.write(100 * CLUSTER, b"a" * 4 * CLUSTER)
            disk.write(900 * CLUSTER, b"b" * 4 * CLUSTER)
        disk.flush()
        disk.write(200 * CLUSTER, b"c" * 8 * CLUSTER)
        disk.flush()
        for place, byte, clusters in ((100, b"a", 4), (900, b"b", 4), (200, b"c", 8)):
            assert disk.read(place * CLUSTER, clusters * CLUSTER) == byte * clusters * CLUSTER
    clean(path)


def test_cloud_hypervisor_8621_several_queues_over_a_parent(tmp_path: Path) -> None:
    """Threads write, zero, discard and read blocks of their own; several share each cluster. L2 tables are there."""
    block, threads, size = 1024, 4, 96 * CLUSTER
    below = random.Random(8621).randbytes(size)
    (tmp_path / "base").write_bytes(below)
    path = new(tmp_path / "image", size, tmp_path / "base", cluster_size="8192")
    put(path, *((7, offset, 100) for offset in range(0, size, 8 * CLUSTER)))
    with tapfs.open(path, writable=True) as disk:
        expected = bytearray(disk.read(0, size))
        failures: list[str] = []

        def queue(number: int) -> None:
            choice = random.Random(number)
            for _ in range(60):
                at = choice.randrange(size // block // threads) * threads * block + number * block
                what = choice.random()
                if what < 0.6:
                    expected[at : at + block] = data = choice.randbytes(block)
                    disk.write(at, data)
                elif what < 0.8:
                    expected[at : at + block] = bytes(block)
                    disk.write_zeroes(at, block)
                elif what < 0.85:
                    disk.flush()
                elif disk.read(at, block) != bytes(expected[at : at + block]):
                    failures.append(f"queue {number} reads what it never wrote at {at:#x}")

        running = [threading.Thread(target=queue, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert failures == []
        assert disk.read(0, size) == expected
    assert by_hand(path.read_bytes(), below) == expected
    clean(path)


def test_cloud_hypervisor_8606_no_live_table_is_given_away(tmp_path: Path) -> None:
    """An image that was compressed, copied and made larger, then written for long: tables were overwritten there.

    Clusters of 512 bytes have many refcount blocks and tables; every flush must leave an image without a fault.
    """
    choice = random.Random(8606)
    size = 300_000 // 512 * 512
    content = b"".join(choice.choice([bytes([n % 251]) * 2048, choice.randbytes(2048)]) for n in range(size // 2048))
    (tmp_path / "raw").write_bytes(content.ljust(size, b"\0"))
    path = tmp_path / "image"
    options = {"cluster_size": "512"}
    tapfs.convert(tmp_path / "raw", path, format="raw", target_format="qcow2", compressed=True, options=options)
    resize_image(str(path), lambda now: 3 * now, OpenOptions(format="qcow2"))
    expected = bytearray((tmp_path / "raw").read_bytes().ljust(3 * size, b"\0"))
    for _ in range(4):
        with tapfs.open(path, writable=True) as disk:
            for _ in range(40):
                offset = choice.randrange(len(expected))
                length = min(choice.choice([1, 600, 5000, 40_000]), len(expected) - offset)
                if choice.random() < 0.6:
                    data = choice.randbytes(length)
                    disk.write(offset, data)
                    expected[offset : offset + length] = data
                else:
                    (disk.discard if choice.random() < 0.5 else disk.write_zeroes)(offset, length)
                    expected[offset : offset + length] = disk.read(offset, length)
                if choice.random() < 0.2:
                    disk.flush()
            assert disk.read(0, disk.size) == expected
        assert by_hand(path.read_bytes()) == expected
        clean(path)
