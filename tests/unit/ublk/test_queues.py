"""The queues of a block device, with a test in the place of the kernel."""

from __future__ import annotations

import errno
import random
import select
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.chain import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel.ublk_server import Shape
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.held_requests import HeldRequests
from tapfs.ublk.served_disk import ServedDisk
from tests.unit.ublk.simulated_driver import (
    DISCARD,
    FLUSH,
    FUA,
    NO_UNMAP,
    NOT_IN_RING,
    READ,
    WRITE,
    WRITE_ZEROES,
    SimulatedDriver,
)

SIZE = 4 << 20
SHAPE = Shape(queues=2, depth=8, max_bytes=64 << 10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    tapfs.create(str(path), "qcow2", SIZE)
    return path


def opened(path: Path, *, writable: bool = True, wait_on: str = "space") -> ServedDisk:
    image = open_image(str(path), OpenOptions(writable=writable))
    return ServedDisk(image, limit=RateLimit(), paused=False, held=HeldRequests(wait_on, lambda: None))


@contextmanager
def served(
    path: Path, driver: SimulatedDriver, *, writable: bool = True, zero_copy: bool = False
) -> Generator[ServedDisk]:
    disk = opened(path, writable=writable)
    try:
        disk.connect(driver.shape, simulated=driver.descriptor, zero_copy=zero_copy)
        yield disk
    finally:
        disk.close()


def wait_for(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


@pytest.mark.parametrize("zero_copy", [False, True])
def test_any_requests_give_what_a_model_gives(path: Path, *, zero_copy: bool) -> None:
    """Requests of both queues beside each other; they own stripes, so that their order is no matter.

    Of some requests the kernel could not put the pages into the ring.
    """
    model = bytearray(SIZE)
    seed = random.Random(5)
    with SimulatedDriver(SHAPE) as driver, served(path, driver, zero_copy=zero_copy) as disk:
        for _ in range(60):
            given: list[tuple[int, int, int, int, int]] = []
            for queue in range(SHAPE.queues):
                for tag in range(SHAPE.depth):
                    stripe = SIZE // (SHAPE.queues * SHAPE.depth)
                    start = (queue * SHAPE.depth + tag) * stripe
                    offset = start + seed.randrange(0, stripe - SHAPE.max_bytes, 512)
                    length = seed.randrange(512, SHAPE.max_bytes + 1, 512)
                    kind = seed.choice((READ, READ, WRITE, WRITE, WRITE | FUA, FLUSH, DISCARD, WRITE_ZEROES, NO_UNMAP))
                    kind = WRITE_ZEROES | NO_UNMAP if kind == NO_UNMAP else kind
                    data = seed.randbytes(length) if kind & 0xFF == WRITE else b""
                    driver.give(tag, kind | seed.choice((0, 0, 0, NOT_IN_RING)), offset, length, data, queue)
                    given.append((queue, tag, kind, offset, length))
                    if data:
                        model[offset : offset + length] = data
                    elif kind & 0xFF == WRITE_ZEROES:
                        model[offset : offset + length] = bytes(length)
            for queue, tag, kind, offset, length in given:
                result = driver.answer(tag, queue)
                assert result == (length if kind & 0xFF in (READ, WRITE) else 0)
                if kind == READ:
                    assert driver.data(tag, length, queue) == model[offset : offset + length]
                if kind == DISCARD:  # zeros, or what it was
                    model[offset : offset + length] = driver.read(offset, length, tag=tag, queue=queue)
        counted = disk.statistics()
        assert counted["in_flight"] == 0
        assert counted["errors"] == 0
        assert counted["parked"] > 0
        # A ring has no use for a file on tmpfs.
        on_disk = subprocess.check_output(["stat", "-f", "-c", "%T", path], text=True).strip() != "tmpfs"
        assert (counted["passed"] > 0) == (zero_copy and on_disk)
    image = open_image(str(path), OpenOptions())
    assert image.read(0, SIZE) == model
    image.close()


def test_zeros_that_keep_their_space_are_allocated(path: Path) -> None:
    with SimulatedDriver(SHAPE) as driver, served(path, driver) as disk:
        assert driver.do(WRITE_ZEROES | NO_UNMAP, 0, 1 << 20) == 0
        assert driver.do(WRITE_ZEROES, 2 << 20, 1 << 20) == 0
        assert path.stat().st_blocks * 512 >= 1 << 20
        assert driver.read(0, 4096) == bytes(4096)
        assert disk.statistics()["zeroes"] == 2


def test_a_request_that_cannot_be_is_refused(path: Path) -> None:
    with SimulatedDriver(SHAPE) as driver:
        with served(path, driver) as disk:
            assert driver.do(WRITE, SIZE - 512, 1024) == -errno.EIO
            assert driver.do(READ, 1 << 60, 512) == -errno.EIO
            assert driver.do(READ, 0, SHAPE.max_bytes + 512) == -errno.EIO
            assert driver.do(15, 0, 512) == -errno.EOPNOTSUPP
            assert disk.statistics()["errors"] == 4
        with served(path, driver, writable=False):
            assert driver.do(WRITE, 0, 512) == -errno.EPERM
            assert driver.do(DISCARD, 0, 512) == -errno.EPERM
            assert driver.do(FLUSH, 0, 0) == 0
            assert driver.read(0, 512) == bytes(512)


def test_a_paused_disk_answers_nothing_and_goes_on(path: Path) -> None:
    with SimulatedDriver(SHAPE) as driver, served(path, driver) as disk:
        disk.pause()
        driver.give(0, WRITE, 0, 4096, b"a" * 4096)
        driver.give(1, READ, 8192, 4096, queue=1)
        time.sleep(0.02)
        assert not driver.is_answered(0)
        assert not driver.is_answered(1, 1)
        disk.resume()
        assert driver.answer(0) == 4096
        assert driver.answer(1, 1) == 4096
        assert driver.read(0, 4096) == b"a" * 4096


def test_a_successor_answers_what_was_not(path: Path) -> None:
    with SimulatedDriver(SHAPE) as driver:
        with served(path, driver) as disk:
            disk.pause()
            driver.give(3, WRITE, 4096, 4096, b"b" * 4096)
            time.sleep(0.02)
        assert not driver.is_answered(3)
        with served(path, driver):
            assert driver.answer(3) == 4096
            assert driver.read(4096, 4096) == b"b" * 4096


def test_another_disk_is_served_from_a_pause_on(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    tapfs.create(str(other), "qcow2", SIZE)
    with SimulatedDriver(SHAPE) as driver, served(path, driver) as disk:
        assert driver.do(WRITE, 0, 512, b"c" * 512) == 512
        disk.pause()
        disk.replace(open_image(str(other), OpenOptions(writable=True))).close()
        disk.resume()
        assert driver.read(0, 512, queue=1) == bytes(512)


def test_the_end_of_the_device_is_told(path: Path) -> None:
    with SimulatedDriver(SHAPE) as driver, served(path, driver) as disk:
        assert driver.do(WRITE, 0, 512, b"d" * 512) == 512
        driver.stop()
        assert select.select([disk.ended_descriptor], [], [], 30)[0]
        assert disk.problem() == 0
        disk.pause()  # nobody waits for queues that are over
        disk.resume()


def test_the_limit_lets_few_requests_pass(path: Path) -> None:
    with SimulatedDriver(SHAPE) as driver, served(path, driver) as disk:
        disk.set_limit(RateLimit(requests=20))
        for tag in range(4):
            driver.give(tag, READ, 0, 512)
        for tag in range(4):
            assert driver.answer(tag) == 512
        assert disk.statistics()["throttled_ns"] > 0


def test_a_write_waits_for_space(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SimulatedDriver(SHAPE) as driver, served(path, driver) as disk:
        full = threading.Event()
        full.set()
        write = disk.image.write

        def refused(offset: int, data: memoryview) -> None:
            if full.is_set():
                raise ImageError(ErrorKind.NO_SPACE, "the host is full", path=str(path), op="write")
            write(offset, data)

        monkeypatch.setattr(disk.image, "write", refused)
        driver.give(0, WRITE, 0, 512, b"e" * 512)
        wait_for(lambda: disk.held.reason is not None)
        assert not driver.is_answered(0)
        full.clear()
        disk.held.retry()
        assert driver.answer(0) == 512
