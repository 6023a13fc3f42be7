"""Backends that are killed at any moment: the next one answers every request once, and no answered write is lost."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

import tapfs
from tapfs.disk.image import Image
from tapfs.kernel.xen_ring import Grants, ParkedRequest, Request
from tests.native_programs import program
from tests.unit.xen.xen_ring_process import Backend, open_after_kill
from tests.unit.xen.xen_rings import DOMAIN, Served, new_machine, pattern
from tests.xen import blkif
from tests.xen.blkif import OKAY, PAGE, SECTOR, Abi, Message, Operation
from tests.xen.frontend import Buffer, Frontend
from tests.xen.machine import PATIENCE, Machine

SECTORS = 4096
SIZE = SECTORS * SECTOR
#: How often the backend is killed in a test.
LIVES = 15


@pytest.fixture
def machine() -> Iterator[Machine]:
    with new_machine() as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Image]:
    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with tapfs.open(tmp_path / "disk", format="raw", writable=True) as image:
        yield image


class Guest:
    """Keeps a ring full of reads and writes of pages, at most one on its way for each page, and checks every answer."""

    def __init__(self, frontend: Frontend, number: int, rng: random.Random) -> None:
        self.frontend = frontend
        self.ring = frontend.rings[number]
        self.rng = rng
        self.pages = list(range(number, SECTORS // 8, len(frontend.rings)))
        self.content = dict.fromkeys(self.pages, bytes(PAGE))
        # A page of data, and one with the segments for an indirect request of that page.
        self.buffers = [frontend.buffer(2) for _ in range(self.ring.entries)]
        for buffer in self.buffers:
            buffer.write(blkif.pack_segments(buffer.segments(8)), PAGE)
        self.under_way: dict[int, tuple[Buffer, int, bytes | None]] = {}
        self.writes = 0
        self.answered = 0

    def _message(self, buffer: Buffer) -> tuple[Message, int, bytes | None]:
        busy = {page for _, page, _ in self.under_way.values()}
        # Often near each other, so that some are merged.
        page = self.rng.choice(self.pages[:8]) if self.rng.random() < 0.3 else self.rng.choice(self.pages)
        what = self.rng.random()
        if page in busy or what < 0.02:
            return blkif.Request(Operation.BARRIER if what < 0.2 else Operation.FLUSH), -1, None
        if what < 0.4:
            buffer.write(b"\xee" * PAGE)
            return self._request(Operation.READ, page, buffer), page, None
        self.writes += 1
        data = struct.pack("<IQ", page, self.writes) * (PAGE // 12) + bytes(PAGE % 12)
        buffer.write(data)
        operation = Operation.BARRIER if what > 0.98 else Operation.WRITE
        return self._request(operation, page, buffer), page, data

    def _request(self, operation: Operation, page: int, buffer: Buffer) -> Message:
        if operation is not Operation.BARRIER and self.rng.random() < 0.3:
            return blkif.Indirect(operation, page * 8, 1, buffer.references[1:])
        return blkif.Request(operation, page * 8, buffer.segments(8))

    def fill(self) -> None:
        while self.ring.room and self.buffers:
            buffer = self.buffers.pop()
            message, page, data = self._message(buffer)
            self.under_way[self.ring.put(message)] = buffer, page, data
            if self.rng.random() < 0.3:
                self.ring.push()
        self.ring.push()

    def take(self) -> None:
        for response in self.ring.responses():
            assert response.status == OKAY
            buffer, page, data = self.under_way.pop(response.id)
            if data is not None:
                self.content[page] = data
            elif page >= 0:
                assert buffer.read()[:PAGE] == self.content[page], f"page {page}"
            self.buffers.append(buffer)
            self.answered += 1

    def drain(self) -> None:
        """Wait for all that is on its way; what waits in the ring for a notification is noticed."""
        deadline = time.monotonic() + PATIENCE
        while self.under_way:
            self.ring.rsp_event = self.ring.consumed + 1
            self.take()
            assert time.monotonic() < deadline, self.ring
            if self.under_way and self.ring.rsp_prod == self.ring.consumed % blkif.WORD:
                self.ring.port.wait(0.5)

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.close()


@pytest.mark.parametrize(("kind", "abi", "queues"), [("raw", Abi.X86_64, 2), ("qcow", Abi.X86_32, 1)])
def test_killed_at_any_moment(tmp_path: Path, machine: Machine, kind: str, abi: Abi, queues: int) -> None:
    path = tmp_path / "disk"
    if kind == "qcow":
        tapfs.create(str(path), "qcow", SIZE)
    else:
        path.write_bytes(bytes(SIZE))
    rng = random.Random(kind)
    with Frontend(machine.domain(DOMAIN), abi=abi, queues=queues) as frontend:
        guests = [Guest(frontend, number, rng) for number in range(queues)]
        with Backend(machine, frontend, path, kind) as backend:
            for _ in range(LIVES):
                backend.start(rng.choice(list(Grants)))
                enough = sum(guest.answered for guest in guests) + rng.choice((0, 1, 2, 5, 20, 60))
                deadline = time.monotonic() + PATIENCE
                while True:
                    for guest in guests:
                        guest.take()
                        guest.fill()
                    if sum(guest.answered for guest in guests) >= enough:
                        break
                    assert time.monotonic() < deadline
                time.sleep(rng.choice((0, 0, 0.0003, 0.002)))
                backend.kill()
            backend.start(Grants.COPY)
            for guest in guests:
                guest.drain()
        with open_after_kill(str(path), kind) as image:
            for guest in guests:
                for page, data in guest.content.items():
                    assert image.read(page * PAGE, PAGE) == data, f"page {page}"
        for guest in guests:
            guest.close()


#: Each call of one of these is a step at which the program of xen_ring_kills.c ends.
STEPS = "journal_take journal_consumed journal_answer journal_free move_run notify"


@pytest.mark.native
def test_killed_at_every_step(tmp_path: Path) -> None:
    job = program(tmp_path, "xen_ring_kills", wrapped=[f"xen_{step}" for step in STEPS.split()])
    for grants in Grants:
        folder = tmp_path / grants.name
        folder.mkdir()
        done = subprocess.run(
            [job, folder, str(grants.value)], capture_output=True, text=True, check=False, timeout=300
        )
        assert (done.returncode, done.stderr) == (0, "")
        word, steps = done.stdout.split()
        # At least one of each kind for each of 48 requests, and then some.
        assert (word, int(steps) > 100) == ("ok", True)


@pytest.mark.parametrize("pages", [1, 5, 40])
def test_an_answered_write_survives_a_kill(tmp_path: Path, machine: Machine, pages: int) -> None:
    """Also where the image had to grow for it, and where that was another write's doing."""
    path = tmp_path / "disk"
    tapfs.create(str(path), "qcow", SIZE, options={"cluster_size": "65536"})
    order = [page * 37 % 128 for page in range(pages)]
    with Frontend(machine.domain(DOMAIN)) as frontend, Backend(machine, frontend, path, "qcow") as backend:
        backend.start(Grants.COPY)
        for page in order:
            frontend.write(page * 8, pattern(8, page))
        backend.kill()
    with open_after_kill(str(path), "qcow") as image:
        for page in order:
            assert image.read(page * PAGE, PAGE) == pattern(8, page)


def test_flushes_share_a_sync(machine: Machine, disk: Image) -> None:
    """Those that come while one runs wait for the next, and for no other."""
    in_sync = threading.Event()
    go_on = threading.Event()

    def before(_: ParkedRequest) -> None:
        in_sync.set()
        assert go_on.wait(PATIENCE)

    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk, before=before) as served:
        ring = frontend.ring
        ring.submit(blkif.Request(Operation.FLUSH))
        assert in_sync.wait(PATIENCE)
        ring.submit(*(blkif.Request(Operation.FLUSH) for _ in range(8)))
        deadline = time.monotonic() + PATIENCE
        while served.device.statistics().in_flight < 9:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert not ring.responses()
        go_on.set()
        assert [response.status for response in ring.wait(9)] == [OKAY] * 9
        assert served.parked == [Request.SYNC, Request.SYNC]


# ---- the states in between, one by one


JOURNAL_HEADER, RING_HEADER, ENTRY = 64, 128, 128
CONSUMED_AT = 76
FREE, TAKEN, ANSWERED = range(3)


class Journal:
    """The file of a device with one ring of one page, as xen/journal.c lays it out."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def consumed(self) -> int:
        return struct.unpack("<I", os.pread(self.descriptor, 4, JOURNAL_HEADER + CONSUMED_AT))[0]

    @consumed.setter
    def consumed(self, index: int) -> None:
        os.pwrite(self.descriptor, struct.pack("<I", index), JOURNAL_HEADER + CONSUMED_AT)

    def set_entry(self, number: int, state: int, index: int, request: int, raw: bytes) -> None:
        entry = struct.pack("<QII112s", state << 32 | index, request, 0, raw)
        os.pwrite(self.descriptor, entry, JOURNAL_HEADER + RING_HEADER + number * ENTRY)

    def states(self) -> list[int]:
        at = JOURNAL_HEADER + RING_HEADER
        data = os.pread(self.descriptor, 32 * ENTRY, at)
        return [struct.unpack_from("<Q", data, number * ENTRY)[0] >> 32 for number in range(32)]


class Scene:
    """A ring whose backend has died: pages to write, one for each request, and the journal."""

    def __init__(self, machine: Machine, disk: Image, start: int = 0) -> None:
        self.machine, self.disk = machine, disk
        self.frontend = Frontend(machine.domain(DOMAIN))
        self.ring = self.frontend.ring
        self.ring.req_prod = self.ring.rsp_prod = self.ring.produced = self.ring.consumed = start
        self.descriptor = os.memfd_create("journal")
        self.journal = Journal(self.descriptor)
        with self.serve():
            pass  # the journal is made
        assert self.journal.consumed == start
        assert self.journal.states() == [FREE] * 32
        self.ring.port.clear()
        self.buffers: list[Buffer] = []

    def serve(self) -> Served:
        return Served(self.machine, self.frontend, self.disk, journal=self.descriptor)

    def put(self) -> bytes:
        """The next request, which writes the page of its number; its bytes."""
        number = len(self.buffers)
        buffer = self.frontend.buffer(1)
        buffer.write(pattern(8, number))
        self.buffers.append(buffer)
        message = blkif.Request(Operation.WRITE, number * 8, buffer.segments(8))
        self.ring.put(message)
        return message.encode(self.ring.abi)

    def written(self) -> list[int]:
        return [n for n in range(len(self.buffers)) if self.disk.read(n * PAGE, PAGE) == pattern(8, n)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self.buffers:
            buffer.close()
        self.frontend.close()
        os.close(self.descriptor)


@pytest.mark.parametrize("start", [0, blkif.WORD - 2])
def test_every_state_that_a_kill_leaves(machine: Machine, disk: Image, start: int) -> None:
    with Scene(machine, disk, start) as scene:
        ring, journal = scene.ring, scene.journal
        raw = [scene.put() for _ in range(6)]
        ring.push()

        def index(number: int) -> int:
            return (start + number) % blkif.WORD

        # 0 has its response published, but its entry was not freed. That of 2 is in the ring (over 1), unpublished.
        # 1 and 3 are being done, 4 is in the journal but does not count as consumed; 5 was not looked at.
        journal.set_entry(9, ANSWERED, index(0), index(0), raw[0])
        journal.set_entry(3, TAKEN, index(1), index(1), raw[1])
        journal.set_entry(0, ANSWERED, index(1), index(2), raw[2])
        journal.set_entry(31, TAKEN, index(3), index(3), raw[3])
        journal.set_entry(5, TAKEN, index(4), index(4), b"half of it" + raw[4][10:])
        journal.consumed = index(4)
        ring.write_slot(start, struct.pack("<QBxh", 1, Operation.WRITE, OKAY))
        ring.write_slot(start + 1, struct.pack("<QBxh", 3, Operation.WRITE, OKAY))
        ring.rsp_prod = index(1)
        assert [response.id for response in ring.responses()] == [1]
        with scene.serve():
            responses = ring.wait(5)
            assert sorted(response.id for response in responses) == [2, 3, 4, 5, 6]
            assert all(response.status == OKAY for response in responses)
        assert scene.written() == [1, 2, 3, 4, 5]
        assert journal.states() == [FREE] * 32
        assert journal.consumed == index(6)


def test_the_order_of_what_is_done_again(machine: Machine, disk: Image) -> None:
    """Requests come back in the order in which they were taken, whatever their entries, and a barrier is one."""
    with Scene(machine, disk) as scene:
        raw = [scene.put() for _ in range(3)]
        raw[2] = bytes([Operation.BARRIER]) + raw[2][1:]
        scene.ring.waiting[3].operation = Operation.BARRIER  # type: ignore[union-attr]
        scene.ring.push()
        for number, entry in enumerate((7, 2, 0)):
            scene.journal.set_entry(entry, TAKEN, number, number, raw[number])
        scene.journal.consumed = 3
        with scene.serve() as served:
            assert [response.id for response in scene.ring.wait(3)] == [1, 2, 3]
            assert served.parked == [Request.SYNC, Request.SYNC]
        assert scene.written() == [0, 1, 2]


def test_two_barriers_that_come_back_are_both_answered(machine: Machine, disk: Image) -> None:
    """The predecessor had refused the first, for its disk was another, and went on behind it."""
    with Scene(machine, disk) as scene:
        for number in range(2):
            raw = scene.put()
            scene.ring.waiting[number + 1].operation = Operation.BARRIER  # type: ignore[union-attr]
            scene.journal.set_entry(number, TAKEN, number, number, bytes([Operation.BARRIER]) + raw[1:])
        scene.ring.push()
        scene.journal.consumed = 2
        with scene.serve() as served:
            statuses = {response.id: response.status for response in scene.ring.wait(2)}
            assert statuses == {1: OKAY, 2: blkif.ERROR}
            served.device.pause()
        assert scene.written() == [0]


@pytest.mark.parametrize("fault", ["one too few", "one too many", "published more", "published less"])
def test_a_journal_that_contradicts_its_ring_ends_it(machine: Machine, disk: Image, fault: str) -> None:
    """Nothing is done again or answered, for it could be the wrong thing."""
    with Scene(machine, disk) as scene:
        raw = [scene.put() for _ in range(4)]
        scene.ring.push()
        for number in range(3 - (fault == "one too few") + (fault == "one too many")):
            scene.journal.set_entry(number, TAKEN, number % 3, number % 3, raw[number])
        scene.journal.consumed = 3
        scene.ring.rsp_prod = {"published more": 1, "published less": blkif.WORD - 1}.get(fault, 0)
        before = scene.ring.rsp_prod
        with scene.serve() as served:
            assert scene.ring.port.wait()
            served.device.pause()
            assert "not where its journal says" in (served.device.problem() or "")
        assert scene.ring.rsp_prod == before
        assert not scene.written()
        scene.ring.waiting.clear()


def test_a_journal_of_other_rings_is_made_anew(machine: Machine, disk: Image) -> None:
    """The frontend has connected again: what an earlier ring had taken is nobody's any more."""
    with Scene(machine, disk) as scene:
        raw = scene.put()
        scene.journal.set_entry(0, TAKEN, 0, 0, raw)
        scene.journal.consumed = 1
        scene.ring.waiting.clear()
        for options in ({}, {"ring_pages": 2}, {"queues": 2}, {"abi": Abi.X86_32}):
            with Frontend(machine.domain(DOMAIN), **options) as frontend:  # type: ignore[arg-type]
                frontend.ring.req_prod = frontend.ring.rsp_prod = 77
                frontend.ring.produced = frontend.ring.consumed = 77
                with Served(machine, frontend, disk, journal=scene.descriptor) as served:
                    assert frontend.read(0, 8) == bytes(PAGE)
                    assert served.device.problem() is None
        assert not scene.written()


def test_garbage_is_no_journal(machine: Machine, disk: Image) -> None:
    with Scene(machine, disk) as scene:
        for garbage in (b"", b"short", os.urandom(JOURNAL_HEADER + RING_HEADER + 32 * ENTRY), os.urandom(100000)):
            os.ftruncate(scene.descriptor, 0)
            os.pwrite(scene.descriptor, garbage, 0)
            with scene.serve() as served:
                assert scene.frontend.read(0, 8) == bytes(PAGE)
                assert served.device.problem() is None
