"""Requests that wait for the host: what a resume reaches, and what front ends do when more fail than threads wait."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.image import Image
from tapfs.kernel.nbd_server import Style
from tapfs.kernel.ublk_server import Shape
from tapfs.kernel.xen_ring import Grants, Protocol
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.held_requests import HeldRequests
from tapfs.ublk.served_disk import ServedDisk as BlockDevice
from tapfs.xen.disk.frontend_keys import FrontendKeys, RingKeys
from tapfs.xen.disk.held_export import HeldExport
from tapfs.xen.disk.served_disk import ServedDisk as GuestDisk
from tests import nbd_client
from tests import vhost_front_end as virtio
from tests.failing_file import FailingFile
from tests.fuse.conftest import wait_for
from tests.unit.ublk.simulated_driver import WRITE, SimulatedDriver
from tests.unit.vhost.served import Served
from tests.unit.xen.xen_rings import DOMAIN, new_machine
from tests.xen.blkif import OKAY, Operation
from tests.xen.frontend import Frontend

IO, FULL = (ImageError(kind, "the host", op="write") for kind in (ErrorKind.IO, ErrorKind.NO_SPACE))
#: Requests that fail at once: more than there are threads that wait with one each.
MANY = 8
SIZE = 1 << 20
SECTOR = 512


def told_of() -> tuple[HeldRequests, list[str | None]]:
    """Held requests that wait for any error, and a list of what is told of them."""
    told: list[str | None] = []
    held = HeldRequests("errors", lambda: told.append(held.reason and str(held.reason)))
    return held, told


def in_a_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_resume_during_a_try_has_it_tried_again() -> None:
    held, _ = told_of()
    tries: list[str] = []

    def attempt() -> None:
        tries.append("first")
        held.retry()  # the disk works again, but this try has met the error already
        raise IO

    thread = in_a_thread(lambda: held.serve(attempt, lambda: tries.append("again")))
    thread.join(30)
    assert tries == ["first", "again"]


def test_a_resume_during_a_later_try_has_it_tried_again() -> None:
    held, _ = told_of()
    tries = 0

    def attempt() -> None:
        raise IO

    def again() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            held.retry()
            raise IO

    thread = in_a_thread(lambda: held.serve(attempt, again))
    wait_for(lambda: held.reason is not None)
    held.retry()
    thread.join(30)
    assert tries == 2
    assert held.reason is None


@pytest.mark.parametrize("error", [IO, FULL])
def test_an_error_from_before_the_last_resume_is_tried_again_and_not_told(error: ImageError) -> None:
    held, told = told_of()
    tried, done = time.monotonic_ns(), threading.Event()

    def attempt() -> None:
        raise error

    held.retry()
    thread = in_a_thread(lambda: held.serve(attempt, done.set, tried_ns=tried))
    thread.join(30)
    assert done.is_set()
    assert told == []


def test_what_lacked_space_long_ago_is_tried_again_at_once() -> None:
    held, told = told_of()
    done = threading.Event()

    def attempt() -> None:
        raise FULL

    thread = in_a_thread(lambda: held.serve(attempt, done.set, tried_ns=time.monotonic_ns() - 3600 * 10**9))
    thread.join(30)
    assert done.is_set()
    assert told == []


@contextmanager
def failing(folder: Path) -> Generator[tuple[Image, FailingFile]]:
    """A raw image whose host fails."""
    path = folder / "disk"
    path.write_bytes(bytes(SIZE))
    image = tapfs.open(path, format="raw", writable=True)
    with FailingFile(image) as host:
        host.fail()
        yield image, host


def wait_until_all_have_failed(held: HeldRequests, parked: Callable[[], int]) -> None:
    wait_for(lambda: held.reason is not None and parked() == MANY)


def test_one_resume_has_all_writes_of_a_block_device_done(tmp_path: Path) -> None:
    with ExitStack() as stack:
        driver = stack.enter_context(SimulatedDriver(Shape(queues=1, depth=MANY, max_bytes=64 << 10)))
        image, host = stack.enter_context(failing(tmp_path))
        held = HeldRequests("errors", lambda: None)
        disk = BlockDevice(image, limit=RateLimit(), paused=False, held=held)
        stack.callback(disk.close)
        disk.connect(driver.shape, simulated=driver.descriptor)
        for tag in range(MANY):
            driver.give(tag, WRITE, tag * SECTOR, SECTOR, bytes([tag + 1]) * SECTOR)
        wait_until_all_have_failed(held, lambda: disk.statistics()["parked"])
        host.mend()
        held.retry()
        assert [driver.answer(tag) for tag in range(MANY)] == [SECTOR] * MANY
        wait_for(lambda: held.reason is None)
    assert (tmp_path / "disk").read_bytes()[: MANY * SECTOR : SECTOR] == bytes(range(1, MANY + 1))


def test_one_resume_has_all_writes_of_a_xen_guest_done(tmp_path: Path) -> None:
    with ExitStack() as stack:
        machine = stack.enter_context(new_machine())
        image, host = stack.enter_context(failing(tmp_path))
        held = HeldRequests("errors", lambda: None)
        disk = GuestDisk(
            image, machine=str(machine.directory), domain=DOMAIN, limit=RateLimit(), paused=False, held=held
        )
        stack.callback(disk.close)
        frontend = stack.enter_context(Frontend(machine.domain(DOMAIN)))
        ring = frontend.ring
        journal = os.memfd_create("journal")
        stack.callback(os.close, journal)
        keys = FrontendKeys(
            Protocol.NATIVE, persistent=False, rings=(RingKeys(tuple(ring.references), ring.port.number),)
        )
        disk.rings.connect(keys, grants=Grants.COPY, journal=journal)
        for number in range(MANY):  # apart, so that no two become one transfer
            buffer = frontend.buffer(1)
            buffer.write(bytes([number + 1]) * SECTOR)
            message, _ = frontend.message(Operation.WRITE, 16 * number, buffer.segments(1))
            ring.submit(message)
        wait_until_all_have_failed(held, lambda: disk.statistics()["parked"])
        host.mend()
        held.retry()
        assert [answer.status for answer in ring.wait(MANY)] == [OKAY] * MANY


def test_one_resume_has_all_writes_of_a_device_model_done(tmp_path: Path) -> None:
    with ExitStack() as stack:
        image, host = stack.enter_context(failing(tmp_path))
        held = HeldRequests("errors", lambda: None)
        export = HeldExport(image, held, opened_anew=False)
        stack.callback(image.close)
        stack.callback(export.stop)
        export.start()
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        theirs.setblocking(False)
        export.add(theirs.detach(), Style(nbd_client.SIMPLE), 0)
        client = stack.enter_context(closing(nbd_client.Client(ours)))
        sent = [
            client.send(nbd_client.WRITE, number * SECTOR, data=bytes([number + 1]) * SECTOR) for number in range(MANY)
        ]
        wait_until_all_have_failed(held, lambda: export.statistics().parked)
        host.mend()
        held.retry()
        assert [client.answer(cookie).error for cookie in sent] == [0] * MANY


def test_one_resume_has_all_writes_of_a_vhost_guest_done(tmp_path: Path) -> None:
    with failing(tmp_path) as (image, host), Served(image, wait_on="errors") as served:
        front_end = served.connect()
        front_end.negotiate(inflight=True)
        ring = virtio.Ring(front_end)
        ring.set_up()
        for number in range(MANY):
            ring.request(virtio.OUT, number, bytes([number + 1]) * SECTOR)
        ring.kick_it()
        wait_until_all_have_failed(served.disk.held, lambda: served.disk.statistics()["parked"])
        host.mend()
        served.disk.held.retry()
        assert len(ring.wait(MANY)) == MANY
        assert ring.read(0, MANY * SECTOR)[::SECTOR] == bytes(range(1, MANY + 1))
