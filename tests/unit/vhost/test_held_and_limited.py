"""A guest waits where the host is full, and is slower under a limit; neither keeps a ring from stopping."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.image import Image
from tapfs.serving.disk_operations import RateLimit
from tapfs.vhost.disk import GuestDisk
from tests import vhost_front_end as virtio
from tests.fuse.conftest import wait_for
from tests.unit.vhost.served import Served
from tests.vhost_front_end import Ring

MIB = 1 << 20


class FullHost:
    """An image whose host has no space as long as `full` says so."""

    def __init__(self, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = True
        for name in ("write", "write_segments"):
            monkeypatch.setattr(image, name, self._unless_full(getattr(image, name)))

    def _unless_full(self, write: Callable[..., None]) -> Callable[..., None]:
        def attempt(*words: object) -> None:
            if self.full:
                raise ImageError(ErrorKind.NO_SPACE, "the host is full", op="write")
            write(*words)

        return attempt


@contextmanager
def waiting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, inflight: bool
) -> Generator[tuple[Served, Ring, FullHost]]:
    """A guest that waits for the answer to a write, because the host is full."""
    path = folder / "disk.qcow2"
    tapfs.create(path, "qcow2", 4 * MIB)
    image = tapfs.open(path, writable=True)
    host = FullHost(image, monkeypatch)
    with Served(image, wait_on="space") as served:
        front_end = served.connect()
        front_end.negotiate(inflight=inflight)
        ring = Ring(front_end)
        ring.set_up()
        ring.request(virtio.OUT, 8, b"w" * 512)
        ring.kick_it()
        wait_for(lambda: served.disk.held.reason is not None)
        assert ring.ended() == []
        try:
            yield served, ring, host
        finally:
            host.full = False
            served.disk.held.retry()


def test_a_write_waits_for_space_and_is_done_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting(tmp_path, monkeypatch, inflight=True) as (served, ring, host):
        assert "the host is full" in str(served.disk.held.reason)
        assert ring.read(0, 512) == bytes(512)  # others are served
        host.full = False
        served.disk.held.retry()
        assert ring.wait()
        assert ring.read(8, 512) == b"w" * 512
        wait_for(lambda: served.disk.held.reason is None)
        assert served.disk.held.reason is None


def test_a_ring_that_stops_meanwhile_does_the_write_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting(tmp_path, monkeypatch, inflight=True) as (served, ring, host):
        ring.stop()
        assert served.disk.held.reason is None
        assert ring.ended() == []
        host.full = False
        ring.set_up(base=0)
        assert ring.wait()
        assert ring.read(8, 512) == b"w" * 512


def test_a_pause_does_not_wait_for_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting(tmp_path, monkeypatch, inflight=True) as (served, ring, host):
        served.disk.pause()
        host.full = False
        served.disk.resume()
        assert ring.wait()
        assert ring.read(8, 512) == b"w" * 512


def test_a_ring_that_goes_on_waits_on_however_soon_another_one_has_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting(tmp_path, monkeypatch, inflight=True) as (served, ring, host):
        held, let_go = served.disk.held, list[bool]()

        def told() -> None:
            if held.reason is None:
                held.begin()  # the other ring has stopped
                let_go.append(True)

        monkeypatch.setattr(held, "_told", told)
        held.give_up()
        wait_for(lambda: bool(let_go) and (held.reason is not None or bool(ring.ended())))
        assert ring.ended() == []
        host.full = False
        held.retry()
        assert ring.wait()
        assert ring.read(8, 512) == b"w" * 512


def test_without_an_in_flight_region_a_ring_that_stops_has_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting(tmp_path, monkeypatch, inflight=False) as (_, ring, _host):
        assert ring.stop() == 1
        assert len(ring.ended()) == 1


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"d" * MIB)
    return path


def test_a_limit_holds_requests_back_and_is_taken_away(flat: Path) -> None:
    with Served(tapfs.open(flat, format="raw", writable=True)) as served:
        disk: GuestDisk = served.disk
        front_end = served.connect()
        front_end.negotiate(inflight=True)
        ring = Ring(front_end)
        ring.set_up()
        disk.set_limit(RateLimit(requests=1))
        for sector in range(3):  # the second and later ones wait for seconds
            ring.request(virtio.IN, sector, length=512)
        ring.kick_it()
        assert len(ring.wait()) < 3
        disk.set_limit(RateLimit())
        ring.wait(2)
        assert disk.statistics()["reads"] == 3
        assert disk.statistics()["throttled_ns"] > 0
        # A ring that is held back stops at once, and what it had not taken is taken by the next.
        disk.set_limit(RateLimit(bytes=1))
        for sector in range(2):
            ring.request(virtio.IN, sector, length=512)
        ring.kick_it()
        ring.wait()
        base = ring.stop()
        disk.set_limit(RateLimit())
        ring.set_up(base=base)
        ring.wait()
        assert disk.statistics()["reads"] == 5
