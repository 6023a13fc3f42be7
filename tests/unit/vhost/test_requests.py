"""Requests of a guest: each kind, its limits, and hostile ones."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs.vhost.messages import Kind
from tests import vhost_front_end as virtio
from tests.fuse.conftest import wait_for
from tests.unit.vhost.served import Served
from tests.vhost_front_end import GUEST, USER, Descriptor, FrontEnd, Ring

SIZE = 64 << 20


def made(folder: Path, kind: str = "qcow2", *, writable: bool = True) -> tapfs.Image:
    path = folder / f"disk.{kind}"
    if not path.exists():
        tapfs.create(path, kind, SIZE)
    return tapfs.open(path, format=kind, writable=writable)


def started(served: Served, *, without: int = 0) -> Ring:
    """A front end that has negotiated, and its ring."""
    front_end = served.connect()
    front_end.negotiate(without=without)
    ring = Ring(front_end)
    ring.set_up()
    return ring


def ranges(*found: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *one) for one in found)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_each_request_does_what_it_says(tmp_path: Path, kind: str) -> None:
    with Served(made(tmp_path, kind), b"a serial number of many bytes") as served:
        ring = started(served)
        features = ring.front_end.number(1)
        assert features & virtio.F_FLUSH
        assert features & virtio.F_DISCARD
        assert not features & virtio.F_RO
        space = ring.front_end.configuration()
        assert struct.unpack_from("<Q", space) == (SIZE // 512,)
        data = os.urandom(7 * 512)
        ring.write(3, data)
        ring.write(13, data, pieces=5, indirect=True)
        assert ring.read(3, 7 * 512, pieces=4) == data
        assert ring.read(12, 8 * 512, pieces=3, indirect=True) == bytes(512) + data
        assert ring.do(virtio.FLUSH) == (virtio.OK, b"")
        assert ring.do(virtio.GET_ID, length=20) == (virtio.OK, b"a serial number of m")
        assert ring.do(virtio.WRITE_ZEROES, data=ranges((3, 1, 1), (5, 2, 0)))[0] == virtio.OK
        assert ring.read(3, 4 * 512) == bytes(512) + data[512:1024] + bytes(1024)
        assert ring.do(virtio.DISCARD, data=ranges((0, 2048, 0)))[0] == virtio.OK
        assert ring.do(99)[0] == virtio.UNSUPPORTED
        assert served.disk.statistics()["errors"] == 1
    again = made(tmp_path, kind, writable=False)
    with again:
        assert again.read(13 * 512, 512) in {data[:512], bytes(512)}


def test_what_a_request_may_not_ask_for_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    last = SIZE // 512 - 1
    with Served(made(tmp_path)) as served:
        ring = started(served)
        data = os.urandom(1024)
        ring.write(last - 1, data)
        for answer, asked in {
            virtio.IOERR: [
                (virtio.OUT, last, os.urandom(1024)),
                (virtio.OUT, 1 << 55, os.urandom(512)),
                (virtio.OUT, 0, b"not a sector"),
                (virtio.DISCARD, 0, b"too short"),
                (virtio.DISCARD, 0, b""),
                (virtio.DISCARD, 0, ranges((last, 2, 0))),
                (virtio.WRITE_ZEROES, 0, ranges((last - 1, 2, 1), (2**64 - 1, 1, 1))),
                (virtio.WRITE_ZEROES, 0, ranges((0, 2**32 - 1, 1))),
                (virtio.DISCARD, 0, ranges(*[(0, 1, 0)] * 33)),
            ],
            virtio.UNSUPPORTED: [
                (virtio.DISCARD, 0, ranges((last - 1, 2, 1))),
                (virtio.WRITE_ZEROES, 0, ranges((last - 1, 2, 2))),
                (2, 0, b"a command of SCSI"),
            ],
        }.items():
            for request in asked:
                assert ring.do(*request)[0] == answer, request
        assert ring.do(virtio.IN, last, length=1024)[0] == virtio.IOERR
        assert ring.read(last - 1, 1024) == data


def test_a_disk_that_is_read_only_says_so_and_is_not_written(tmp_path: Path) -> None:
    with Served(made(tmp_path)) as served:
        started(served).write(0, b"x" * 512)
    with Served(made(tmp_path, writable=False)) as served:
        ring = started(served)
        assert ring.front_end.number(1) & virtio.F_RO
        assert ring.do(virtio.OUT, 0, b"y" * 512)[0] == virtio.IOERR
        assert ring.do(virtio.DISCARD, data=ranges((0, 1, 0)))[0] == virtio.IOERR
        assert ring.do(virtio.FLUSH)[0] == virtio.OK
        assert ring.read(0, 512) == b"x" * 512


def test_a_request_of_many_pieces_is_one_answer(tmp_path: Path) -> None:
    with Served(made(tmp_path)) as served:
        front_end = served.connect(memory_bytes=32 << 20)
        front_end.negotiate()
        ring = Ring(front_end, slot_bytes=4096)
        ring.set_up()
        length = 5 << 20
        data = os.urandom(length)
        at = ring.end
        for kind, flags in ((virtio.OUT, 0), (virtio.IN, virtio.WRITE)):
            ring.put(ring.data, struct.pack("<IIQ", kind, 0, 5))
            if kind == virtio.OUT:
                ring.put(at, data)
            else:
                ring.put(at, bytes(length))
            # Pieces of odd lengths, one far longer than a move.
            lengths = [1, 511, 3 << 20, 77, length - 589 - (3 << 20)]
            parts, place = [Descriptor(GUEST + ring.data, 16)], at
            for one in lengths:
                parts.append(Descriptor(GUEST + place, one, flags))
                place += one
            parts.append(Descriptor(GUEST + ring.data + 16, 1, virtio.WRITE))
            ring.offer(ring.chain(parts))
            ring.kick_it()
            ring.wait()
            assert ring.memory[ring.data + 16] == virtio.OK
        assert ring.memory[at : at + length] == data
        assert served.disk.statistics()["read_bytes"] == length


def test_many_requests_on_two_rings_end_each_once(tmp_path: Path) -> None:
    with Served(made(tmp_path)) as served:
        front_end = served.connect()
        front_end.negotiate(without=virtio.F_EVENT_INDEX)
        rings = [Ring(front_end, 0, event_index=False), Ring(front_end, 1, at=2 << 20, entries=64, event_index=False)]
        for ring in rings:
            ring.set_up()
        for _ in range(3):
            for number, ring in enumerate(rings):
                for i in range(20):
                    ring.request(virtio.OUT, number * 4096 + i * 8, bytes([number + i]) * 4096)
                ring.kick_it()
            for ring in rings:
                assert len(set(ring.wait(20))) == 20
        for number, ring in enumerate(rings):
            assert ring.read(number * 4096 + 19 * 8, 4096) == bytes([number + 19]) * 4096
            assert ring.stop() == 61


def test_without_the_flush_feature_an_answered_write_is_durable(tmp_path: Path) -> None:
    with Served(made(tmp_path)) as served:
        ring = started(served, without=virtio.F_FLUSH)
        ring.write(0, b"z" * 512)
        assert served.image.unflushed_bytes == 0
        ring.front_end.close()
        served.wait_until_gone()
        ring = started(served)
        ring.write(4096, b"z" * 512)
        assert served.image.unflushed_bytes > 0


Spoil = Callable[[Ring], None]


def loop(ring: Ring) -> None:
    ring.offer(ring.chain([Descriptor(GUEST + ring.data, 16)]))
    ring.put(ring.table + 16 * (ring.entries - 1), b"")
    head = next(iter(ring.chains))
    ring.put(ring.table + 16 * head, struct.pack("<QIHH", GUEST + ring.data, 16, virtio.NEXT, head))


def chained(*descriptors: Descriptor, indirect: int | None = None) -> Spoil:
    def spoil(ring: Ring) -> None:
        ring.offer(ring.chain(descriptors, indirect=indirect))

    return spoil


def index_far_ahead(ring: Ring) -> None:
    ring.put(ring.available + 2, struct.pack("<H", 5000))


def head_that_is_none(ring: Ring) -> None:
    ring.offer(9999)


HEADER, STATUS = Descriptor(GUEST + 0x40000, 16), Descriptor(GUEST + 0x40010, 1, virtio.WRITE)
HOSTILE: dict[str, Spoil] = {
    "a loop": loop,
    "an index far ahead": index_far_ahead,
    "a head that is none": head_that_is_none,
    "no status": chained(HEADER),
    "no header": chained(STATUS),
    "a short header": chained(HEADER._replace(length=15), STATUS),
    "an address outside": chained(HEADER, Descriptor(GUEST - 4096, 512, virtio.WRITE), STATUS),
    "a length past the end": chained(HEADER, Descriptor(GUEST + (8 << 20) - 512, 1024, virtio.WRITE), STATUS),
    "an address that wraps": chained(HEADER, Descriptor(2**64 - 512, 1024, virtio.WRITE), STATUS),
    "the longest length": chained(HEADER, Descriptor(GUEST, 2**32 - 1, virtio.WRITE), STATUS),
    "read after written": chained(STATUS, HEADER),
    "a table in a table": chained(Descriptor(GUEST + 0x40000, 16, virtio.INDIRECT), indirect=0x50000),
    "a table of no length": chained(Descriptor(GUEST + 0x40000, 0, virtio.INDIRECT)),
    "a table of odd length": chained(Descriptor(GUEST + 0x40000, 17, virtio.INDIRECT)),
    "a table outside": chained(Descriptor(GUEST + (1 << 40), 32, virtio.INDIRECT)),
    "a table that is too long": chained(Descriptor(GUEST, 16 * 1025, virtio.INDIRECT)),
    "a table that is written": chained(Descriptor(GUEST + 0x40000, 32, virtio.INDIRECT | virtio.WRITE)),
}


def test_a_hostile_guest_stops_its_ring_and_nothing_else(tmp_path: Path) -> None:
    with Served(made(tmp_path)) as served:
        for name, spoil in HOSTILE.items():
            front_end = served.connect()
            front_end.negotiate()
            ring, other = Ring(front_end), Ring(front_end, 1, at=4 << 20)
            ring.set_up()
            other.set_up()
            other.write(8, b"o" * 512)
            spoil(ring)
            ring.kick_it()
            wait_for(lambda: bool(served.disk.problems()))
            assert [index for index, _ in served.disk.problems()] == [0], name
            assert other.read(8, 512) == b"o" * 512
            # It goes on when it is set up anew.
            ring.stop()
            front_end.close()
            served.wait_until_gone()
        assert not served.ended


def test_memory_that_vanishes_ends_the_ring_and_not_the_process(tmp_path: Path) -> None:
    with Served(made(tmp_path, "raw")) as served:
        front_end = served.connect()
        front_end.negotiate()
        ring = Ring(front_end)
        ring.set_up()
        ring.write(0, b"v" * 4096)
        _, slot = ring.request(virtio.IN, 0, length=4096)
        os.ftruncate(front_end.memory_file, 0)
        os.eventfd_write(ring.kick, 1)
        wait_for(lambda: bool(served.disk.problems()))
        assert served.disk.problems() == [(0, "lost its memory: a file of it became shorter")]
        front_end.close()
        served.wait_until_gone()
        assert started(served).read(0, 4096) == b"v" * 4096
        assert slot


def test_hostile_addresses_of_rings_and_regions_are_refused(tmp_path: Path) -> None:
    def region(front_end: FrontEnd, **how: int) -> int:
        return front_end.tell(5, struct.pack("=II", 1, 0) + front_end.region(**how), [front_end.memory_file])

    with Served(made(tmp_path)) as served:
        front_end = served.connect()
        front_end.negotiate()
        for wrong in (
            {"size": 0},
            {"size": (8 << 20) + 1},
            {"offset": 4096},
            {"offset": 2**63},
            {"size": 2**64 - 1},
            {"guest": 2**64 - 4096},
            {"user": 2**64 - 4096},
        ):
            assert region(front_end, **wrong) == 1, wrong
        # More regions than descriptors, an eventfd that is none, a ring that there is not.
        assert front_end.tell(5, struct.pack("=II", 2, 0) + front_end.region() * 2, [front_end.memory_file]) == 1
        assert front_end.tell(12, struct.pack("=Q", 0), [front_end.memory_file]) == 1
        assert front_end.tell(12, struct.pack("=Q", 0x100)) == 1
        assert front_end.tell(8, struct.pack("=II", 64, 128)) == 1
        assert region(front_end) == 0
        ring = Ring(front_end)
        ring.kick, ring.call = front_end.event(), front_end.event()
        front_end.send(13, struct.pack("=Q", 0), [ring.call])
        front_end.send(12, struct.pack("=Q", 0), [ring.kick])
        front_end.send(18, struct.pack("=II", 0, 1))
        front_end.send(8, struct.pack("=II", 0, 128))
        for parts in (
            (USER - 4096, USER, USER),
            (USER, USER + (8 << 20) - 16, USER),
            (USER, USER, 2**64 - 8),
            (USER + 4, USER, USER),
        ):
            assert front_end.tell(9, struct.pack("=IIQQQQ", 0, 0, *parts, 0)) == 1
        for entries in (0, 3, 2048, 1 << 31):
            front_end.tell(8, struct.pack("=II", 0, entries))
            front_end.tell(9, ring.addresses())
            assert not served.disk.is_started(0)
        assert front_end.tell(8, struct.pack("=II", 0, 128)) == 0
        assert ring.do(virtio.FLUSH)[0] == virtio.OK


def test_no_message_leaves_its_descriptors_open(tmp_path: Path) -> None:
    """A front end that sends what is no socket, no eventfd and no memory costs the server no descriptor."""

    def strays() -> int:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum("stray" in os.readlink(link) for link in links if link.is_symlink())

    with Served(made(tmp_path)) as served:
        for kind, payload in itertools.product(Kind, (b"", bytes(8), bytes(20))):
            front_end = served.connect()
            front_end.negotiate()
            stray = os.memfd_create("stray")
            front_end.send(kind, payload, [stray], flags=9)
            os.close(stray)
            front_end.close()
            served.wait_until_gone()
            assert strays() == 0, kind
