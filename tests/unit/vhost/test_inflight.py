"""The in-flight region: requests that a killed predecessor had taken are done again, and nothing else is."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import tapfs
from tests import vhost_front_end as virtio
from tests.unit.vhost.served import Served
from tests.vhost_front_end import Ring

ENTRIES = 128


class Region:
    """The part of an in-flight region that is for ring 0, as a predecessor has left it."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, 16 + 16 * ENTRIES)

    def leave(self, *, version: int = 1, last_batch_head: int = 0, used_index: int = 0) -> None:
        """The words at the start of it."""
        struct.pack_into("<QHHHH", self._memory, 0, 0, version, ENTRIES, last_batch_head, used_index)

    def mark(self, head: int, counter: int, following: int = 0) -> None:
        """A request was taken, as the one with this number."""
        struct.pack_into("<B5xHQ", self._memory, 16 + 16 * head, 1, following, counter)

    def marked(self) -> list[int]:
        """The heads that are marked."""
        return [head for head in range(ENTRIES) if self._memory[16 + 16 * head]]

    @property
    def used_index(self) -> int:
        """The index of the used ring that it has noted."""
        (index,) = struct.unpack_from("<H", self._memory, 14)
        return int(index)


@contextmanager
def left(folder: Path) -> Generator[tuple[Served, Ring, Region]]:
    """A ring that is not enabled yet, and the region that is for it."""
    path = folder / "disk.raw"
    tapfs.create(path, "raw", 1 << 20)
    with Served(tapfs.open(path, format="raw", writable=True)) as served:
        front_end = served.connect()
        front_end.negotiate(inflight=True)
        assert front_end.inflight is not None
        ring = Ring(front_end, entries=ENTRIES)
        ring.set_up(enable=False)
        yield served, ring, Region(front_end.inflight[1])


def enable(ring: Ring) -> None:
    assert ring.front_end.tell(18, struct.pack("=II", 0, 1)) == 0


def test_what_was_taken_is_done_again_once(tmp_path: Path) -> None:
    with left(tmp_path) as (served, ring, region):
        heads = [ring.request(virtio.OUT, 8 * fill, bytes([fill]) * 512)[0] for fill in (1, 2, 3)]
        region.leave()
        # The first two were taken, the second one before the first; the third one was not.
        region.mark(heads[0], 12)
        region.mark(heads[1], 11)
        enable(ring)
        assert sorted(ring.wait(3)) == sorted(heads)
        assert [ring.read(8 * fill, 512)[0] for fill in (1, 2, 3)] == [1, 2, 3]
        assert served.disk.statistics()["redone"] == 2
        assert ring.stop() == 6
        assert region.marked() == []
        assert region.used_index == 6


def test_answers_that_the_guest_has_seen_are_not_given_again(tmp_path: Path) -> None:
    with left(tmp_path) as (served, ring, region):
        heads = [ring.request(virtio.OUT, 8 * fill, bytes([fill]) * 512)[0] for fill in (1, 2, 3)]
        # Two answers were shown, and their marks are left: the predecessor was killed in between.
        for i, head in enumerate(heads[:2]):
            ring.put(ring.used + 4 + 8 * i, struct.pack("<II", head, 1))
        ring.put(ring.used + 2, struct.pack("<H", 2))
        region.leave(last_batch_head=heads[1], used_index=0)
        region.mark(heads[0], 1)
        region.mark(heads[1], 2, heads[0])
        region.mark(heads[2], 3)
        enable(ring)
        assert ring.wait(3) == heads
        assert served.disk.statistics()["redone"] == 1
        assert [ring.read(8 * fill, 512)[0] for fill in (1, 2, 3)] == [0, 0, 3]


def test_a_region_that_makes_no_sense_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    with left(tmp_path) as (served, ring, region):
        region.leave(last_batch_head=60000, used_index=500)
        for head in range(ENTRIES):
            region.mark(head, 2**64 - 1 - head, 65535)
        # Each of the heads is to be done again, and none of them is a request.
        assert ring.front_end.tell(18, struct.pack("=II", 0, 1)) == 0
        ring.stop()
        assert served.disk.statistics()["reads"] == 0
        region.leave(version=7)
        ring.kick = ring.front_end.event()
        assert ring.front_end.tell(12, struct.pack("=Q", 0), [ring.kick]) == 1
        assert not served.disk.is_started(0)
