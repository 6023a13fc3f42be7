"""The rings of a Xen block device with a guest that keeps the protocol: all ABIs, sizes, queues and kinds of grants."""

from __future__ import annotations

import os
import random
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.image import Image
from tapfs.extent import Extent, Kind
from tapfs.formats.qcow.driver import QcowDriver
from tapfs.host import ram
from tapfs.kernel.xen_ring import Grants, ParkedRequest, Request
from tests.unit.engine import engine_disks
from tests.unit.engine.engine_disks import host
from tests.unit.xen.xen_rings import DOMAIN, Served, new_machine, pattern
from tests.xen import blkif
from tests.xen.blkif import ERROR, NOT_SUPPORTED, OKAY, PAGE, SECTOR, Abi, Discard, Indirect, Operation
from tests.xen.frontend import Frontend, RequestError
from tests.xen.machine import Machine

SECTORS = 4096
SIZE = SECTORS * SECTOR


@pytest.fixture
def machine() -> Iterator[Machine]:
    with new_machine() as made:
        yield made


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Image]:
    with raw(tmp_path / "disk") as image:
        yield image


def raw(path: Path, size: int = SIZE, content: bytes | None = None) -> Image:
    path.write_bytes(bytes(size) if content is None else content)
    return tapfs.open(path, format="raw", writable=True)


@contextmanager
def image_of(kind: str, folder: Path) -> Iterator[Image]:
    if kind == "raw":
        with raw(folder / "disk") as image:
            yield image
    elif kind == "direct":
        (folder / "disk").write_bytes(bytes(SIZE))
        with tapfs.open(folder / "disk", format="raw", writable=True, direct=True) as image:
            yield image
    elif kind == "ram":
        name = f"ram:ring-{secrets.token_hex(8)}"
        tapfs.create(name, "ram", SIZE)
        try:
            with tapfs.open(name, writable=True) as image:
                yield image
        finally:
            os.unlink(ram.host_path(name))
    elif kind == "overlay":
        (folder / "base").write_bytes(bytes(SIZE))
        with tapfs.open(folder / "base", format="raw", overlay=folder / "top") as image:
            yield image
    else:
        secret = b"secret" if kind == "qcow-aes" else None
        tapfs.create(str(folder / "disk"), "qcow", SIZE, password=secret)
        with tapfs.open(folder / "disk", writable=True, password=secret) as image:
            yield image


def exercise(frontend: Frontend) -> bytearray:
    """Write, read, flush, barrier and discard; what the disk holds then."""
    content = bytearray(SIZE)

    def write(sector: int, data: bytes, **options: bool) -> None:
        frontend.write(sector, data, **options)
        content[sector * SECTOR : sector * SECTOR + len(data)] = data

    write(0, pattern(8))
    write(5, pattern(1, 1))
    write(1000, pattern(700, 2))
    write(SECTORS - 1, pattern(1, 3))
    frontend.flush()
    write(1003, pattern(20, 4), barrier=True)
    frontend.barrier()
    for ring in frontend.rings:
        assert frontend.read(0, SECTORS, ring=ring) == content
    frontend.discard(1100, 100)
    assert frontend.read(0, 1100) == content[: 1100 * SECTOR]
    assert frontend.read(1200, 500) == content[1200 * SECTOR : 1700 * SECTOR]
    discarded = frontend.read(1100, 100)
    assert all(new in (0, old) for new, old in zip(discarded, content[1100 * SECTOR :], strict=False))
    content[1100 * SECTOR : 1200 * SECTOR] = discarded
    return content


@pytest.mark.parametrize("grants", Grants)
@pytest.mark.parametrize("abi", Abi)
@pytest.mark.parametrize(("pages", "queues", "indirect"), [(1, 1, 0), (1, 3, 256), (4, 1, 30), (16, 2, 256)])
def test_every_way(
    machine: Machine, disk: Image, grants: Grants, abi: Abi, pages: int, queues: int, indirect: int
) -> None:
    domain = machine.domain(DOMAIN, pages=1500)
    with (
        Frontend(
            domain,
            abi=abi,
            ring_pages=pages,
            queues=queues,
            indirect_segments=indirect,
            persistent=grants is Grants.PERSISTENT,
        ) as frontend,
        Served(machine, frontend, disk, grants=grants) as served,
    ):
        content = exercise(frontend)
        seen = served.device.statistics()
    assert disk.read(0, SIZE) == content
    assert seen.errors == seen.in_flight == 0
    assert (seen.flushes, seen.barriers, seen.discards) == (1, 2, 1)
    assert seen.written_bytes == (8 + 1 + 700 + 1 + 20) * SECTOR
    assert seen.read_bytes == (queues * SECTORS + 1700) * SECTOR
    assert seen.batches >= seen.notifications - queues > 0


@pytest.mark.parametrize("grants", Grants)
@pytest.mark.parametrize("kind", ["raw", "direct", "ram", "qcow", "qcow-aes", "overlay"])
def test_every_format(tmp_path: Path, machine: Machine, kind: str, grants: Grants) -> None:
    domain = machine.domain(DOMAIN)
    with (
        image_of(kind, tmp_path) as image,
        Frontend(domain, indirect_segments=64, persistent=grants is Grants.PERSISTENT) as frontend,
    ):
        with Served(machine, frontend, image, grants=grants) as served:
            content = exercise(frontend)
            assert Request.SYNC in served.parked
            assert (Request.WRITE in served.parked) is (kind not in {"raw", "direct", "ram"})
        assert image.read(0, SIZE) == content


def test_a_segment_may_begin_and_end_within_its_page(machine: Machine, disk: Image) -> None:
    domain = machine.domain(DOMAIN)
    with Frontend(domain) as frontend, Served(machine, frontend, disk):
        buffer = frontend.buffer(3)
        buffer.write(pattern(24))
        pieces = [(0, 3, 3), (1, 0, 7), (2, 1, 4), (0, 0, 1)]
        segments = [blkif.Segment(buffer.references[page], first, last) for page, first, last in pieces]
        data = b"".join(
            buffer.read()[page * PAGE :][first * SECTOR : (last + 1) * SECTOR] for page, first, last in pieces
        )
        assert frontend.ring.call(blkif.Request(Operation.WRITE, 40, segments)).status == OKAY
        assert disk.read(40 * SECTOR, len(data)) == data
        buffer.write(b"\xee" * 3 * PAGE)
        assert frontend.ring.call(blkif.Request(Operation.READ, 40, segments[:3])).status == OKAY
        want = bytearray(b"\xee" * 3 * PAGE)
        at = 0
        for page, first, last in pieces[:3]:
            length = (last + 1 - first) * SECTOR
            want[page * PAGE + first * SECTOR : page * PAGE + first * SECTOR + length] = data[at : at + length]
            at += length
        assert buffer.read() == want
        buffer.close()


def test_the_answer_to_an_indirect_request_names_what_was_done(machine: Machine, disk: Image) -> None:
    with Frontend(machine.domain(DOMAIN), indirect_segments=100) as frontend, Served(machine, frontend, disk):
        frontend.write(0, pattern(400))
        assert frontend.read(0, 400) == pattern(400)
        answer = frontend.ring.call(Indirect(Operation.WRITE, 0, 257, [1]))
        assert answer == (answer.id, Operation.WRITE, ERROR)


def test_without_indirect_segments_such_requests_are_not_supported(machine: Machine, disk: Image) -> None:
    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk, indirect_segments=0):
        page = frontend.buffer(1)
        assert frontend.ring.call(Indirect(Operation.READ, 0, 1, page.references)).status == NOT_SUPPORTED
        page.close()


@pytest.mark.parametrize("grants", Grants)
def test_contiguous_requests_are_merged(machine: Machine, disk: Image, grants: Grants) -> None:
    domain = machine.domain(DOMAIN)
    with (
        Frontend(domain, persistent=grants is Grants.PERSISTENT) as frontend,
        Served(machine, frontend, disk, grants=grants) as served,
    ):
        buffers = [frontend.buffer(2) for _ in range(12)]
        for number, buffer in enumerate(buffers):
            buffer.write(pattern(16, number))
        frontend.ring.submit(
            *(blkif.Request(Operation.WRITE, 16 * n, buffer.segments(16)) for n, buffer in enumerate(buffers))
        )
        frontend.ring.wait(12)
        assert served.device.statistics().merged == 11
        assert disk.read(0, 12 * 16 * SECTOR) == b"".join(pattern(16, n) for n in range(12))
        # Two streams, one read and one written, are merged each on its own.
        messages = []
        for n in range(6):
            messages += [
                blkif.Request(Operation.READ, 16 * n, buffers[n].segments(16)),
                blkif.Request(Operation.WRITE, 1000 + 16 * n, buffers[6 + n].segments(16)),
            ]
        frontend.ring.submit(*messages)
        frontend.ring.wait(12)
        assert served.device.statistics().merged == 11 + 10
        assert b"".join(buffer.read() for buffer in buffers[:6]) == b"".join(pattern(16, n) for n in range(6))
        assert disk.read(1000 * SECTOR, 6 * 16 * SECTOR) == b"".join(pattern(16, n) for n in range(6, 12))
        for buffer in buffers:
            frontend.put_back(buffer)


@pytest.mark.parametrize("grants", Grants)
def test_of_merged_requests_only_the_one_fails_that_has_a_fault(machine: Machine, disk: Image, grants: Grants) -> None:
    domain = machine.domain(DOMAIN)
    with Frontend(domain) as frontend, Served(machine, frontend, disk, grants=grants):
        buffers = [frontend.buffer(1) for _ in range(9)]
        for number, buffer in enumerate(buffers):
            buffer.write(pattern(8, number))
        domain.set_grant(buffers[4].references[0], 0)
        for operation in Operation.WRITE, Operation.READ:
            ids = frontend.ring.submit(
                *(blkif.Request(operation, 8 * n, buffer.segments(8)) for n, buffer in enumerate(buffers))
            )
            answers = {response.id: response.status for response in frontend.ring.wait(9)}
            assert [answers[i] for i in ids] == [OKAY] * 4 + [ERROR] + [OKAY] * 4
        for number, buffer in enumerate(buffers):
            want = bytes(PAGE) if number == 4 else pattern(8, number)
            assert disk.read(number * PAGE, PAGE) == want
            assert buffer.read() == pattern(8, number)
            buffer.close()


def test_merged_requests_of_which_the_disk_refuses_one(tmp_path: Path, machine: Machine) -> None:
    """Parked together they fail together; then each is tried alone."""
    lengths = []

    def refuse(parked: ParkedRequest) -> None:
        lengths.append(parked.length)
        if parked.offset <= 3 * PAGE < parked.offset + parked.length:
            raise ImageError(ErrorKind.IO, "no room for this page")

    with (
        image_of("qcow", tmp_path) as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image, before=refuse) as served,
    ):
        buffers = [frontend.buffer(1) for _ in range(6)]
        for number, buffer in enumerate(buffers):
            buffer.write(pattern(8, number))
        ids = frontend.ring.submit(
            *(blkif.Request(Operation.WRITE, 8 * n, buffer.segments(8)) for n, buffer in enumerate(buffers))
        )
        answers = {response.id: response.status for response in frontend.ring.wait(6)}
        assert [answers[i] for i in ids] == [OKAY] * 3 + [ERROR] + [OKAY] * 2
        assert lengths[0] == 6 * PAGE
        assert lengths[1:].count(PAGE) == len(lengths) - 1
        assert image.read(2 * PAGE, 3 * PAGE) == pattern(8, 2) + bytes(PAGE) + pattern(8, 4)
        assert served.device.statistics().errors == 1
        for buffer in buffers:
            buffer.close()


def test_merged_reads_of_which_one_meets_damage(tmp_path: Path, machine: Machine) -> None:
    """They are done one by one without the owner, who sees only the one that fails."""
    path = host(tmp_path, "top", pattern(8, 1) + pattern(8, 2) + pattern(8, 3))
    with engine_disks.Disk() as disk, Frontend(machine.domain(DOMAIN)) as frontend:
        disk.layer(path, size=4 * PAGE)
        disk.install(
            0,
            [
                Extent(0, PAGE, Kind.DATA, host_offset=0),
                Extent(PAGE, PAGE, Kind.COMPRESSED, host_offset=PAGE, host_length=100),
                Extent(2 * PAGE, 2 * PAGE, Kind.DATA, host_offset=PAGE),
            ],
        )
        image = cast("Image", SimpleNamespace(engine_disk=disk, writable=False))
        with Served(machine, frontend, image) as served:
            buffers = [frontend.buffer(1) for _ in range(4)]
            ids = frontend.ring.submit(
                *(blkif.Request(Operation.READ, 8 * n, buffer.segments(8)) for n, buffer in enumerate(buffers))
            )
            answers = {response.id: response.status for response in frontend.ring.wait(4)}
            assert [answers[i] for i in ids] == [OKAY, ERROR, OKAY, OKAY]
            assert [buffer.read() for buffer in buffers] == [pattern(8, 1), bytes(PAGE), pattern(8, 2), pattern(8, 3)]
            assert served.parked == [Request.READ]
            assert served.device.statistics().merged == 3
            for buffer in buffers:
                buffer.close()


def test_a_parked_write_is_a_copy(tmp_path: Path, machine: Machine) -> None:
    """What is parked does not change when the guest changes its page, though that is mapped."""
    seen = threading.Event()
    go_on = threading.Event()

    def hold(parked: ParkedRequest) -> None:
        if parked.request is Request.WRITE and not seen.is_set():
            before = bytes(parked.data)
            seen.set()
            assert go_on.wait(30)
            assert bytes(parked.data) == before

    with (
        image_of("qcow", tmp_path) as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image, grants=Grants.MAP, before=hold),
    ):
        buffer = frontend.buffer(2)
        buffer.write(pattern(16))
        frontend.ring.submit(blkif.Request(Operation.WRITE, 0, buffer.segments(16)))
        assert seen.wait(30)
        buffer.write(b"\xff" * 2 * PAGE)
        go_on.set()
        assert frontend.ring.wait(1)[0].status == OKAY
        assert image.read(0, 2 * PAGE) == pattern(16)
        buffer.close()


def test_a_barrier_waits_for_what_is_before_and_keeps_back_what_is_after(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    first_may_end = threading.Event()
    sync_may_end = threading.Event()
    in_sync = threading.Event()

    def before(parked: ParkedRequest) -> None:
        if parked.request is Request.WRITE and parked.offset == 0:
            assert first_may_end.wait(30)
            events.append("first")
        elif parked.request is Request.SYNC:
            events.append("sync")
            in_sync.set()
            assert sync_may_end.wait(30)
        else:
            events.append(f"write {parked.offset // PAGE}")

    # The engine reads no tables here: what is allocated and not in the map cache is parked, and written in place.
    monkeypatch.setattr(QcowDriver, "table_layout", lambda _: None)
    with image_of("qcow", tmp_path) as image:
        image.write(0, pattern(SECTORS))
    with (
        tapfs.open(tmp_path / "disk", writable=True) as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image, before=before) as served,
    ):
        buffer = frontend.buffer(1)
        buffer.write(pattern(8, 1))
        pages = [0, 20, 40, 60]
        operations = [Operation.WRITE, Operation.WRITE, Operation.BARRIER, Operation.WRITE]
        frontend.ring.submit(
            *(
                blkif.Request(operation, 8 * page, buffer.segments(8))
                for page, operation in zip(pages, operations, strict=True)
            )
        )
        assert len(frontend.ring.wait(1)) == 1
        assert events == ["write 20"]
        assert served.device.statistics().in_flight == 2  # the first, and the barrier that waits for it
        first_may_end.set()
        assert in_sync.wait(30)
        assert events == ["write 20", "first", "sync"]
        assert image.read(40 * PAGE, PAGE) == pattern(SECTORS)[40 * PAGE : 41 * PAGE]
        assert image.read(60 * PAGE, PAGE) == pattern(SECTORS)[60 * PAGE : 61 * PAGE]
        sync_may_end.set()
        frontend.ring.wait(3)
        assert events == ["write 20", "first", "sync", "sync"]
        assert image.read(40 * PAGE, PAGE) == image.read(60 * PAGE, PAGE) == pattern(8, 1)
        buffer.close()


def test_a_barrier_that_cannot_be_made_durable_fails(machine: Machine, disk: Image) -> None:
    def refuse(parked: ParkedRequest) -> None:
        raise ImageError(ErrorKind.IO, f"no {parked.request.name}")

    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk, before=refuse):
        for call in (frontend.barrier, frontend.flush, lambda: frontend.discard(0, 8)):
            with pytest.raises(RequestError, match="status=-1"):
                call()
        with pytest.raises(RequestError, match="status=-1"):
            frontend.write(0, pattern(8), barrier=True)
        assert disk.read(0, PAGE) == bytes(PAGE)
        frontend.write(0, pattern(8))
        assert disk.read(0, PAGE) == pattern(8)


def test_a_flush_with_data_is_durable_before_and_after(machine: Machine, disk: Image) -> None:
    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk) as served:
        buffer = frontend.buffer(1)
        buffer.write(pattern(8))
        assert frontend.ring.call(blkif.Request(Operation.FLUSH, 8, buffer.segments(8))).status == OKAY
        assert disk.read(PAGE, PAGE) == pattern(8)
        assert served.parked == [Request.SYNC, Request.SYNC]
        assert frontend.ring.call(blkif.Request(Operation.FLUSH, (1 << 64) - 1)).status == OKAY
        buffer.close()


@pytest.mark.parametrize("writable_image", [False, True])
def test_read_only(tmp_path: Path, machine: Machine, *, writable_image: bool) -> None:
    (tmp_path / "disk").write_bytes(pattern(64))
    with (
        tapfs.open(tmp_path / "disk", format="raw", writable=writable_image) as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image, writable=False) as served,
    ):
        for status, call in (
            (ERROR, lambda: frontend.write(0, pattern(8, 1))),
            (ERROR, lambda: frontend.write(0, pattern(8, 1), barrier=True)),
            (NOT_SUPPORTED, frontend.flush),
            (NOT_SUPPORTED, frontend.barrier),
            (NOT_SUPPORTED, lambda: frontend.discard(0, 8)),
        ):
            with pytest.raises(RequestError, match=f"status={status}"):
                call()
        buffer = frontend.buffer(1)
        buffer.write(blkif.pack_segments(buffer.segments(8)))
        assert frontend.ring.call(Indirect(Operation.WRITE, 0, 1, buffer.references)).status == ERROR
        buffer.close()
        assert frontend.read(0, 64) == pattern(64)
        assert not served.parked
        assert served.device.statistics().errors == 6
    assert (tmp_path / "disk").read_bytes() == pattern(64)


def test_discard_is_refused_unless_it_is_offered(machine: Machine, disk: Image) -> None:
    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk, discard=False):
        assert frontend.ring.call(Discard(0, 8)).status == NOT_SUPPORTED


def test_discards_at_the_edges(machine: Machine, disk: Image) -> None:
    disk.write(0, pattern(SECTORS))
    with Frontend(machine.domain(DOMAIN)) as frontend, Served(machine, frontend, disk) as served:
        for sector, count, status in (
            (SECTORS, 0, OKAY),
            (SECTORS + 1, 0, ERROR),
            (SECTORS - 8, 9, ERROR),
            (8, (1 << 64) - 8, ERROR),
            ((1 << 64) - 8, 16, ERROR),
            (1 << 55, 1, ERROR),
        ):
            assert frontend.ring.call(Discard(sector, count, flag=1)).status == status
        assert not served.parked
        assert frontend.ring.call(Discard(SECTORS - 8, 8)).status == OKAY
        assert frontend.ring.call(Discard(0, SECTORS - 8)).status == OKAY
    assert disk.read(0, SIZE) == bytes(SIZE)


def test_no_wakeup_is_lost(machine: Machine, disk: Image) -> None:
    """Guests that notify only when they are asked to, in bursts of every size, against every kind of answer."""
    domain = machine.domain(DOMAIN)
    failures: list[BaseException] = []

    def guest(frontend: Frontend, number: int) -> None:
        try:
            rng = random.Random(number)
            ring = frontend.rings[number]
            buffers = [frontend.buffer(1) for _ in range(ring.entries)]
            left = 1500
            while left or ring.waiting:
                for _ in range(min(rng.choice((1, 1, 2, 5, 32)), ring.room, left)):
                    left -= 1
                    operation = rng.choice((Operation.READ,) * 6 + (Operation.WRITE, Operation.FLUSH))
                    segments = [] if operation is Operation.FLUSH else rng.choice(buffers).segments(8)
                    ring.put(blkif.Request(operation, 8 * rng.randrange(SECTORS // 8), segments))
                    if rng.random() < 0.3:
                        ring.push()
                ring.push()
                if not ring.responses():
                    ring.await_more()
            for buffer in buffers:
                buffer.close()
        except BaseException as error:  # noqa: BLE001 - for the thread that waits
            failures.append(error)

    with Frontend(domain, queues=2) as frontend, Served(machine, frontend, disk) as served:
        guests = [threading.Thread(target=guest, args=(frontend, number)) for number in range(2)]
        for thread in guests:
            thread.start()
        for thread in guests:
            thread.join()
        seen = served.device.statistics()
    assert not failures
    assert seen.reads + seen.writes + seen.flushes == 3000
    assert seen.notifications <= seen.batches + 2


def test_indices_run_over(machine: Machine, disk: Image) -> None:
    domain = machine.domain(DOMAIN)
    frontend = Frontend(domain)
    ring = frontend.ring
    ring.req_prod = ring.rsp_prod = ring.produced = ring.consumed = blkif.WORD - 40
    with frontend, Served(machine, frontend, disk):
        for number in range(100):
            frontend.write(number * 8, pattern(8, number))
        for number in range(100):
            assert frontend.read(number * 8, 8) == pattern(8, number)


def test_requests_wait_for_memory_in_turn(machine: Machine, tmp_path: Path) -> None:
    """More data on its way than a ring has buffers for, all of it parked."""
    segments = 256
    with (
        image_of("qcow", tmp_path) as image,
        Frontend(machine.domain(DOMAIN, pages=8192, references=9000), indirect_segments=segments) as frontend,
    ):
        count = SECTORS // (segments * 8) * 8
        assert count * segments * PAGE > 8 << 20
        messages, pages = [], []
        for number in range(count):
            buffer = frontend.buffer(segments)
            buffer.write(pattern(1, number % 2) * segments * 8)
            message, more = frontend.message(Operation.WRITE, number % 2 * segments * 8, buffer.segments(segments * 8))
            messages.append(message)
            pages += [buffer, more]
        for grants in Grants:
            with Served(machine, frontend, image, grants=grants):
                for message in messages:
                    message.id = 0
                frontend.ring.submit(*messages)
                assert [response.status for response in frontend.ring.wait(count)] == [OKAY] * count
        assert image.read(0, SIZE) == pattern(1, 0) * 2048 + pattern(1, 1) * 2048
        for buffer in pages:
            buffer.close()
