"""A guest that breaks the protocol of its block device harms nobody but itself."""

from __future__ import annotations

import os
import random
import select
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.image import Image
from tapfs.kernel.xen_ring import Grants, ParkedRequest
from tests.unit.xen.xen_rings import DOMAIN, Served, new_machine, pattern
from tests.xen import blkif
from tests.xen.blkif import ERROR, NOT_SUPPORTED, OKAY, PAGE, SECTOR, Abi, Indirect, Operation, Segment
from tests.xen.frontend import Frontend
from tests.xen.machine import PATIENCE, Machine

SECTORS = 256
SIZE = SECTORS * SECTOR
EVERY_BIT = (1 << 64) - 1


@pytest.fixture
def machine() -> Iterator[Machine]:
    with new_machine() as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Image]:
    """Longer on its host than it is, so that what is behind its end would be found."""
    (tmp_path / "disk").write_bytes(pattern(SECTORS) + b"\x55" * 300)
    with tapfs.open(tmp_path / "disk", format="raw", writable=True) as image:
        assert image.size // SECTOR == SECTORS
        yield image


def readable(descriptor: int, seconds: float = PATIENCE) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@pytest.mark.parametrize("abi", Abi)
def test_every_field_is_checked(machine: Machine, disk: Image, abi: Abi) -> None:
    domain = machine.domain(DOMAIN)
    with Frontend(domain, abi=abi) as frontend, Served(machine, frontend, disk, indirect_segments=16) as served:
        buffer = frontend.buffer(12)
        readonly = frontend.buffer(1, readonly=True)
        listing = frontend.buffer(1)
        whole = buffer.segments(88)
        read, write = Operation.READ, Operation.WRITE
        reference = buffer.references[0]
        bad: list[tuple[int, blkif.Message]] = [
            (ERROR, blkif.Request(read, 0, [])),
            (ERROR, blkif.Request(write, 0, [])),
            (ERROR, blkif.Request(read, 0, whole, count=12)),
            (ERROR, blkif.Request(write, 0, whole, count=255)),
            (ERROR, blkif.Request(Operation.BARRIER, 0, whole, count=12)),
            (ERROR, blkif.Request(Operation.FLUSH, 0, whole, count=12)),
            (ERROR, blkif.Request(read, 0, [Segment(reference, 1, 0)])),
            (ERROR, blkif.Request(read, 0, [Segment(reference, 0, 8)])),
            (ERROR, blkif.Request(write, 0, [Segment(reference, 0, 255)])),
            (ERROR, blkif.Request(write, 0, [Segment(reference, 255, 255)])),
            (ERROR, blkif.Request(read, SECTORS - 7, whole[:1])),
            (ERROR, blkif.Request(write, SECTORS - 87, whole)),
            (ERROR, blkif.Request(read, SECTORS, whole[:1])),
            (ERROR, blkif.Request(write, EVERY_BIT, whole[:1])),
            (ERROR, blkif.Request(write, EVERY_BIT - 6, whole[:1])),
            (ERROR, blkif.Request(write, (1 << 55) + 1, whole[:1])),
            (ERROR, blkif.Request(Operation.BARRIER, EVERY_BIT, whole[:1])),
            (ERROR, blkif.Request(read, 0, [Segment(0)])),
            (ERROR, blkif.Request(write, 0, [Segment(0)])),
            (ERROR, blkif.Request(read, 0, [Segment(0xFFFFFFFF)])),
            (ERROR, blkif.Request(read, 0, [Segment(readonly.references[0])])),
            (ERROR, Indirect(read, 0, 0, listing.references)),
            (ERROR, Indirect(read, 0, 17, listing.references)),
            (ERROR, Indirect(read, 0, 0xFFFF, listing.references)),
            (ERROR, Indirect(Operation.BARRIER, 0, 1, listing.references)),
            (ERROR, Indirect(Operation.FLUSH, 0, 1, listing.references)),
            (ERROR, Indirect(Operation.DISCARD, 0, 1, listing.references)),
            (ERROR, Indirect(Operation.INDIRECT, 0, 1, listing.references)),
            (ERROR, Indirect(read, EVERY_BIT, 1, listing.references)),
            (ERROR, Indirect(read, 0, 1, [0])),
            (ERROR, Indirect(write, 0, 1, [domain.references + 5])),
            (NOT_SUPPORTED, blkif.Request(4, 0, whole[:1])),
            (NOT_SUPPORTED, blkif.Request(7, 0, whole[:1])),
            (NOT_SUPPORTED, blkif.Request(255, 0, whole[:1])),
        ]
        # Segments that would be well, more of them than may be.
        listing.write(blkif.pack_segments(buffer.segments(8) * 512))
        assert frontend.ring.call(Indirect(read, 0, 16, listing.references)).status == OKAY
        for number, (status, message) in enumerate(bad):
            assert frontend.ring.call(message).status == status, number
        listing.write(blkif.pack_segments([*whole[:5], Segment(reference, 5, 4)]))
        assert frontend.ring.call(Indirect(read, 0, 5, listing.references)).status == OKAY
        assert frontend.ring.call(Indirect(read, 0, 6, listing.references)).status == ERROR
        assert frontend.ring.call(Indirect(read, SECTORS - 39, 5, listing.references)).status == ERROR
        assert frontend.ring.call(blkif.Request(write, SECTORS - 8, readonly.segments(8))).status == OKAY
        assert served.device.statistics().errors == len(bad) + 2
        assert served.device.problem() is None
        assert not served.parked
        buffer.close()
        readonly.close()
        listing.close()
    assert disk.read(0, SIZE) == pattern(SECTORS - 8) + bytes(PAGE)


@pytest.mark.parametrize("ahead", [33, 34, 1000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_an_impossible_producer_index_ends_the_ring(machine: Machine, disk: Image, ahead: int) -> None:
    """What was taken before is answered."""
    parked = threading.Event()
    go_on = threading.Event()

    def hold(_: ParkedRequest) -> None:
        parked.set()
        assert go_on.wait(PATIENCE)

    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk, before=hold) as served:
        ring = frontend.ring
        assert served.device.problem() is None
        assert not readable(served.device.ended_descriptor, 0)
        ring.submit(blkif.Request(Operation.FLUSH))
        assert parked.wait(PATIENCE)
        ring.req_prod = ring.rsp_prod + ahead
        ring.port.notify()
        assert readable(served.device.ended_descriptor)
        assert "more requests than its ring holds" in (served.device.problem() or "")
        assert not ring.responses()
        go_on.set()
        assert ring.wait(1)[0].status == OKAY
        # Nothing is taken from it any more, whatever it says.
        ring.submit(blkif.Request(Operation.FLUSH))
        ring.port.notify()
        served.device.pause()
        served.device.resume()
        assert served.device.statistics().in_flight == 0
        assert served.device.statistics().flushes == 1
        ring.waiting.clear()


def test_a_full_ring_is_no_offence(machine: Machine, disk: Image) -> None:
    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk) as served:
        for _ in range(5):
            frontend.ring.submit(*(blkif.Request(Operation.FLUSH) for _ in range(frontend.ring.entries)))
            assert len(frontend.ring.wait(frontend.ring.entries)) == frontend.ring.entries
        assert served.device.problem() is None


def test_the_guest_cannot_move_our_indices(machine: Machine, disk: Image) -> None:
    """What it writes to the response index is overwritten, and changes nothing of what is answered next."""
    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk):
        ring = frontend.ring
        frontend.read(0, 8)
        ring.rsp_prod = 77
        frontend.ring.submit(blkif.Request(Operation.FLUSH))
        while ring.rsp_prod == 77:
            ring.port.wait(0.01)
        assert ring.rsp_prod == 2
        assert ring.wait(1)[0].status == OKAY


@pytest.mark.parametrize("grants", Grants)
def test_a_request_is_what_it_was_when_it_was_taken(machine: Machine, disk: Image, grants: Grants) -> None:
    """Slots, pages of segments and grants that change all the time: every answer is one to a request as it could be."""
    domain = machine.domain(DOMAIN, pages=64)
    stop = threading.Event()
    with Frontend(domain) as frontend, Served(machine, frontend, disk, grants=grants) as served:
        ring = frontend.ring
        buffer = frontend.buffer(4)
        listing = frontend.buffer(1)
        rng = random.Random(1)

        def change() -> None:
            choice = random.Random(2)
            while not stop.is_set():
                what = choice.random()
                if what < 0.6:
                    ring.write_slot(ring.produced - choice.randrange(1, 9), choice.randbytes(40))
                elif what < 0.8:
                    listing.write(choice.randbytes(64))
                else:
                    entry = choice.choice((0, 2, 1 << 31 | 1, buffer.pages[0] << 2 | 1, buffer.pages[0] << 2 | 3))
                    domain.set_grant(buffer.references[0], entry)

        changer = threading.Thread(target=change)
        changer.start()
        try:
            for _ in range(60):
                for _ in range(8):
                    operation = rng.choice((Operation.READ, Operation.WRITE))
                    if rng.random() < 0.5:
                        message: blkif.Message = Indirect(operation, 8, rng.randrange(1, 9), listing.references)
                    else:
                        message = blkif.Request(operation, 8, buffer.segments(32))
                    ring.put(message)
                ring.push(always=True)
                while ring.rsp_prod != ring.produced % blkif.WORD:
                    ring.port.wait(0.01)
                ring.consumed = ring.produced
        finally:
            stop.set()
            changer.join()
        ring.waiting.clear()
        for reference, page in zip(buffer.references, buffer.pages, strict=True):
            domain.set_grant(reference, page << 2 | 1)
        assert frontend.read(0, 8) is not None
        assert served.device.problem() is None
        buffer.close()
        listing.close()


@pytest.mark.parametrize("grants", Grants)
def test_grants_that_are_taken_back_while_data_moves(machine: Machine, tmp_path: Path, grants: Grants) -> None:
    """The request fails or has what it asked for; the next one is well."""
    tapfs.create(str(tmp_path / "qcow"), "qcow", SIZE)
    domain = machine.domain(DOMAIN)
    buffers: list[int] = []

    def take_back(_: ParkedRequest) -> None:
        for reference in buffers:
            domain.set_grant(reference, 0)

    with (
        tapfs.open(tmp_path / "qcow", writable=True) as image,
        Frontend(domain) as frontend,
        Served(machine, frontend, image, grants=grants, before=take_back),
    ):
        buffer = frontend.buffer(4)
        buffers += buffer.references
        buffer.write(pattern(32))
        assert frontend.ring.call(blkif.Request(Operation.WRITE, 0, buffer.segments(32))).status == OKAY
        assert image.read(0, 4 * PAGE) == pattern(32)
        assert frontend.ring.call(blkif.Request(Operation.WRITE, 64, buffer.segments(32))).status in {OKAY, ERROR}
        assert image.read(64 * SECTOR, 4 * PAGE) in (bytes(4 * PAGE), pattern(32))
        buffers.clear()
        frontend.write(0, pattern(8, 5))
        assert frontend.read(0, 8) == pattern(8, 5)


def test_the_memory_of_another_use_is_never_shown(machine: Machine, disk: Image) -> None:
    """A read that fails leaves nothing of our buffers in the guest's pages."""
    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk):
        frontend.write(0, b"\xa5" * PAGE)
        buffer = frontend.buffer(2)
        for message in (
            blkif.Request(Operation.READ, SECTORS - 8, buffer.segments(16)),
            blkif.Request(Operation.READ, 0, [*buffer.segments(8), Segment(0)]),
        ):
            buffer.write(bytes(2 * PAGE))
            assert frontend.ring.call(message).status == ERROR
            assert b"\xa5" not in buffer.read()[PAGE:]
        buffer.close()


def test_random_slots(machine: Machine, disk: Image, tmp_path: Path) -> None:
    """Whole rings of noise, in every ABI: each request is answered, and nothing outside the disk changes."""
    for abi in Abi:
        domain = machine.domain(DOMAIN + abi, pages=256)
        rng = random.Random(abi)
        with Frontend(domain, abi=abi, ring_pages=2) as frontend, Served(machine, frontend, disk):
            ring = frontend.ring
            for _ in range(20):
                for _ in range(ring.entries):
                    head = struct.pack(
                        "<BBH", rng.choice((0, 1, 2, 3, 5, 6, 7)), rng.randrange(13), rng.getrandbits(16)
                    )
                    ring.put_raw(head + rng.randbytes(rng.choice((0, 4, 20, 108))))
                ring.push()
                while ring.rsp_prod != ring.produced % blkif.WORD:
                    ring.rsp_event = ring.produced
                    ring.port.wait(0.05)
                ring.consumed = ring.produced
    with (tmp_path / "disk").open("rb") as file:
        file.seek(SIZE)
        assert file.read() == b"\x55" * 300
    assert os.path.getsize(tmp_path / "disk") == SIZE + 300
