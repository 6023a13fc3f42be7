"""Pausing, swapping, limiting and stopping the rings of a Xen block device while the guest works."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import ImageError
from tapfs.disk.image import Image
from tapfs.kernel.parked import Queue
from tapfs.kernel.xen_ring import Grants, ParkedRequest, Protocol, Request, XenDevice
from tests.unit.xen.xen_rings import DOMAIN, Served, new_machine, pattern
from tests.xen import blkif
from tests.xen.blkif import ERROR, OKAY, PAGE, SECTOR, Operation
from tests.xen.frontend import Frontend, RequestError
from tests.xen.machine import PATIENCE, Machine

SECTORS = 2048
SIZE = SECTORS * SECTOR


@pytest.fixture
def machine() -> Iterator[Machine]:
    with new_machine() as made:
        yield made


def snapshot(folder: Path, number: int) -> Image:
    """An overlay on the image of that number, which is raw if it is the first."""
    path = folder / str(number + 1)
    tapfs.create(str(path), "qcow", SIZE, backing=str(folder / str(number)))
    return tapfs.open(path, writable=True, backing_formats=["qcow"] * number + ["raw"])


def raw(path: Path, content: bytes = bytes(SIZE)) -> Image:
    path.write_bytes(content)
    return tapfs.open(path, format="raw", writable=True)


class Load:
    """A guest that writes every page again and again, each time with other bytes, and remembers what was answered."""

    def __init__(self, frontend: Frontend, number: int) -> None:
        self.frontend = frontend
        self.ring = frontend.rings[number]
        self.pages = range(number, SECTORS // 8, len(frontend.rings))
        self.rounds: dict[int, int] = dict.fromkeys(self.pages, 0)
        self.ended = False
        self.answered = 0
        self.failure: BaseException | None = None
        self._buffers = [frontend.buffer(1) for _ in range(8)]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            at = 0
            while not self.ended:
                writes = {}
                for buffer in self._buffers:
                    page = self.pages[at % len(self.pages)]
                    at += 1
                    self.rounds[page] += 1
                    buffer.write(bytes([self.rounds[page] % 255 + 1]) * PAGE)
                    message = blkif.Request(Operation.WRITE, page * 8, buffer.segments(8))
                    writes[self.ring.put(message)] = page
                self.ring.push()
                for response in self.ring.wait(len(writes)):
                    assert response.status == OKAY
                    self.answered += 1
        except BaseException as error:  # noqa: BLE001 - for the thread that ends it
            self.failure = error

    def end(self) -> None:
        self.ended = True
        self._thread.join()
        for buffer in self._buffers:
            buffer.close()
        assert self.failure is None

    def content(self, data: bytes) -> None:
        for page, rounds in self.rounds.items():
            assert data[page * PAGE : (page + 1) * PAGE] == bytes([rounds % 255 + 1 if rounds else 0]) * PAGE

    def wait_for(self, more: int) -> None:
        """Until so many more have been answered."""
        target = self.answered + more
        deadline = time.monotonic() + PATIENCE
        while self.answered < target and self.failure is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.parametrize("grants", Grants)
def test_pause_and_swap_under_load(tmp_path: Path, machine: Machine, grants: Grants) -> None:
    """A live snapshot, several times: an overlay on top of what was served, while two rings are written."""
    with Frontend(machine.domain(DOMAIN), queues=2, persistent=grants is Grants.PERSISTENT) as frontend:
        images = [raw(tmp_path / "0")]
        with Served(machine, frontend, images[0], grants=grants) as served:
            loads = [Load(frontend, number) for number in range(2)]
            for number in range(1, 4):
                for load in loads:
                    load.wait_for(40)
                served.device.pause()
                assert served.device.statistics().in_flight == 0
                below = images[-1]
                before = below.read(0, SIZE)
                below.flush()
                below.close()
                images.append(snapshot(tmp_path, number - 1))
                served.replace(images[-1])
                assert images[-1].read(0, SIZE) == before
                served.device.resume()
            for load in loads:
                load.wait_for(40)
                load.end()
            content = images[-1].read(0, SIZE)
            for load in loads:
                load.content(content)
        images[-1].close()


def test_while_paused_requests_stay_in_the_ring(tmp_path: Path, machine: Machine) -> None:
    with (
        raw(tmp_path / "disk") as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image) as served,
    ):
        served.device.pause()
        served.device.pause()
        buffer = frontend.buffer(1)
        buffer.write(pattern(8))
        frontend.ring.submit(blkif.Request(Operation.WRITE, 0, buffer.segments(8)))
        served.device.limit(1 << 40, 0)  # wakes the ring's thread
        assert not frontend.ring.port.wait(0.05) or not frontend.ring.responses()
        assert served.device.statistics().in_flight == 0
        assert image.read(0, PAGE) == bytes(PAGE)
        served.device.resume()
        assert frontend.ring.wait(1)[0].status == OKAY
        assert image.read(0, PAGE) == pattern(8)
        served.device.resume()
        assert frontend.read(0, 8) == pattern(8)
        buffer.close()


def test_another_disk_has_its_own_size_and_rights(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "small").write_bytes(pattern(16))
    with (
        raw(tmp_path / "disk") as image,
        tapfs.open(tmp_path / "small", format="raw") as small,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image) as served,
    ):
        frontend.write(0, pattern(64, 1))
        served.device.pause()
        served.replace(small)
        served.device.resume()
        assert frontend.read(0, 16) == pattern(16)
        for call in (lambda: frontend.read(0, 17), lambda: frontend.write(0, pattern(8))):
            with pytest.raises(RequestError):
                call()
        served.device.pause()
        served.replace(image)
        served.device.resume()
        assert frontend.read(0, 64) == pattern(64, 1)


def test_a_pause_waits_for_what_is_parked(tmp_path: Path, machine: Machine) -> None:
    parked = threading.Event()
    go_on = threading.Event()

    def hold(_: ParkedRequest) -> None:
        parked.set()
        assert go_on.wait(PATIENCE)

    with (
        raw(tmp_path / "disk") as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image, before=hold) as served,
    ):
        frontend.ring.submit(blkif.Request(Operation.FLUSH))
        assert parked.wait(PATIENCE)
        pauser = threading.Thread(target=served.device.pause)
        pauser.start()
        pauser.join(0.05)
        assert pauser.is_alive()
        go_on.set()
        pauser.join(PATIENCE)
        assert not pauser.is_alive()
        assert frontend.ring.wait(1)[0].status == OKAY
        assert served.parked == [Request.SYNC]


@pytest.mark.parametrize(("bytes_per_second", "requests_per_second"), [(100 * PAGE, 0), (0, 100), (100 * PAGE, 100)])
def test_the_rate_limit_holds(
    tmp_path: Path, machine: Machine, bytes_per_second: int, requests_per_second: int
) -> None:
    """It never lets more through; that it lets enough through is for a benchmark to say."""
    with (
        raw(tmp_path / "disk") as image,
        Frontend(machine.domain(DOMAIN), queues=2) as frontend,
        Served(machine, frontend, image) as served,
    ):
        buffer = frontend.buffer(1)
        served.device.limit(bytes_per_second, requests_per_second)
        start = time.monotonic()
        for ring in frontend.rings:
            ring.submit(*(blkif.Request(Operation.READ, 16 * n, buffer.segments(8)) for n in range(10)))
        for ring in frontend.rings:
            ring.wait(10)
        # Twenty requests at a hundred a second, of which a twentieth of a second and one for each ring are free.
        assert time.monotonic() - start >= (20 - 5 - 2) / 100
        assert served.device.statistics().throttled_ns > 0
        buffer.close()


def test_a_limit_that_is_lifted_lets_go_at_once(tmp_path: Path, machine: Machine) -> None:
    """And a request that is larger than a second's worth passes in the end."""
    with (
        raw(tmp_path / "disk") as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image) as served,
    ):
        served.device.limit(1, 0)
        buffer = frontend.buffer(1)
        assert frontend.ring.call(blkif.Request(Operation.READ, 0, buffer.segments(8))).status == OKAY
        frontend.ring.submit(*(blkif.Request(Operation.READ, 16 * n, buffer.segments(8)) for n in range(5)))
        assert not frontend.ring.port.wait(0.05) or not frontend.ring.responses()
        served.device.pause()  # the limit does not keep a pause waiting
        served.device.resume()
        served.device.limit(0, 0)
        assert len(frontend.ring.wait(5)) == 5
        buffer.close()


def test_a_successor_takes_what_was_not_taken(tmp_path: Path, machine: Machine) -> None:
    with raw(tmp_path / "disk") as image, Frontend(machine.domain(DOMAIN)) as frontend:
        with Served(machine, frontend, image) as served:
            frontend.write(0, pattern(8))
            served.device.pause()
            buffer = frontend.buffer(1)
            frontend.ring.submit(blkif.Request(Operation.READ, 0, buffer.segments(8)))
            served.stop()
            assert served.device.next_parked(Queue.MOVES) == []
            assert not frontend.ring.responses()
            frontend.ring.port.clear()
        for grants in Grants:
            with Served(machine, frontend, image, grants=grants):
                if grants is Grants.COPY:
                    assert frontend.ring.wait(1)[0].status == OKAY
                    assert buffer.read() == pattern(8)
                assert frontend.read(0, 8) == pattern(8)
        buffer.close()


def test_it_notifies_once_at_the_start(tmp_path: Path, machine: Machine) -> None:
    """A predecessor may have published and died before it could say so."""
    with (
        raw(tmp_path / "disk") as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image) as served,
    ):
        assert frontend.ring.port.wait()
        assert served.device.statistics().notifications == 1


def test_what_cannot_be_served_says_why(tmp_path: Path, machine: Machine) -> None:
    def device(machine_directory: str | None = None, **changes: object) -> XenDevice:
        options: dict[str, object] = {
            "machine": str(machine.directory) if machine_directory is None else machine_directory,
            "domain": DOMAIN,
            "protocol": Protocol.NATIVE,
            "grants": Grants.COPY,
            "journal": journal.fileno(),
            "writable": True,
            "discard": True,
        }
        return XenDevice(image.engine_disk, **(options | changes))  # type: ignore[arg-type]

    journal_path = tmp_path / "journal"
    with (
        raw(tmp_path / "disk") as image,
        Frontend(machine.domain(DOMAIN), ring_pages=4) as frontend,
        journal_path.open("w+b") as journal,
        (tmp_path / "disk").open("rb") as read_only,
    ):
        with pytest.raises(ImageError, match="cannot open the grants of the domain"):
            device(str(tmp_path / "nowhere"))
        for changes in ({"domain": 0xFFFF}, {"workers": 0}, {"indirect_segments": 257}, {"protocol": 3}, {"grants": 3}):
            with pytest.raises(ImageError):
                device(**changes)
        ring = frontend.ring
        made = device()
        for references, port in (
            ([], ring.port.number),
            (ring.references[:3], ring.port.number),
            ([2000] * 2, ring.port.number),
            ([99999999], ring.port.number),
            (ring.references, 4711),
        ):
            with pytest.raises(ImageError, match="cannot map the frontend's ring"):
                made.add_ring(references, port)
        with pytest.raises(ImageError):
            made.start()  # no ring
        made.add_ring(ring.references, ring.port.number)
        made.start()
        # Its port is bound, and two backends at one ring would be worse than an error.
        another = device()
        with pytest.raises(ImageError, match="cannot map the frontend's ring"):
            another.add_ring(ring.references, ring.port.number)
        another.close()
        with pytest.raises(ImageError):
            made.start()
        with pytest.raises(ImageError):
            made.add_ring(ring.references, ring.port.number)
        made.close()
        made.close()
        with pytest.raises(ValueError, match="closed"):
            made.pause()
        made = device(journal=read_only.fileno())
        made.add_ring(ring.references, ring.port.number)
        with pytest.raises(ImageError, match="cannot start the frontend's rings"):
            made.start()
        made.close()


def test_a_ring_is_no_reason_to_end_the_others(tmp_path: Path, machine: Machine) -> None:
    with (
        raw(tmp_path / "disk") as image,
        Frontend(machine.domain(DOMAIN), queues=2) as frontend,
        Served(machine, frontend, image),
    ):
        broken, good = frontend.rings
        broken.req_prod = 1000
        broken.port.notify()
        frontend.write(0, pattern(8), ring=good)
        assert frontend.read(0, 8, ring=good) == pattern(8)
        assert good.call(blkif.Request(99)).status == blkif.NOT_SUPPORTED
        assert good.call(blkif.Request(Operation.READ)).status == ERROR
