"""Requests are counted by their kind, with their latency, at every door that the engine has."""

from __future__ import annotations

import errno
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tapfs.kernel import _engine  # type: ignore[attr-defined]  # the library itself
from tapfs.kernel.metrics import BOUNDS_NS, KINDS, NONE, Metric, Metrics, as_data, together
from tests import nbd_client as nbd
from tests import vhost_front_end as virtio
from tests.unit.nbd.served import Served as ServedByNbd
from tests.unit.ublk import simulated_driver as ublk
from tests.unit.ublk.test_queues import SHAPE
from tests.unit.ublk.test_queues import served as served_by_ublk
from tests.unit.vhost.served import Served as ServedToGuest
from tests.vhost_front_end import Ring

SIZE = 4 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    tapfs.create(path, "qcow2", SIZE)
    return path


def counts(metrics: Metrics) -> dict[str, tuple[int, int, int]]:
    """Requests, errors and bytes of the kinds that were asked for."""
    require_law(metrics)
    found = {kind: (metric.requests, metric.errors, metric.bytes) for kind, metric in metrics.items()}
    return {kind: each for kind, each in found.items() if each != (0, 0, 0)}


def require_law(metrics: Metrics) -> None:
    """The latencies lie where their buckets say."""
    assert tuple(metrics) == KINDS
    for metric in metrics.values():
        assert len(metric.buckets) == len(BOUNDS_NS) + 1
        least = sum(count * bound for count, bound in zip(metric.buckets, (0, *BOUNDS_NS), strict=True))
        most = sum(count * bound for count, bound in zip(metric.buckets, (*BOUNDS_NS, 1 << 62), strict=True))
        assert least <= metric.nanoseconds < most or metric.requests == 0 == metric.nanoseconds


@pytest.mark.parametrize("style", [nbd.SIMPLE, nbd.STRUCTURED, nbd.EXTENDED])
def test_nbd(path: Path, style: int) -> None:
    with ServedByNbd(tapfs.open(path, writable=True)) as served:
        client = served.connect(style)
        client.ask(nbd.WRITE, 0, data=b"w" * 8192)
        client.ask(nbd.WRITE, 4096, data=b"w" * (2 << 20), flags=nbd.FUA)
        client.ask(nbd.READ, 0, 3 << 20)
        client.ask(nbd.FLUSH)
        client.ask(nbd.TRIM, 0, 65536)
        client.ask(nbd.WRITE_ZEROES, 65536, 65536)
        client.ask(nbd.CACHE, 0, 65536)
        assert client.ask(nbd.READ, SIZE, 512).error == errno.EINVAL
        assert client.ask(nbd.WRITE, SIZE, data=bytes(512)).error == errno.ENOSPC
        expected = {
            "read": (2, 1, 3 << 20),
            "write": (3, 1, 8192 + (2 << 20)),
            "flush": (1, 0, 0),
            "discard": (1, 0, 0),
            "zero": (1, 0, 0),
            "other": (1, 0, 0),
        }
        assert counts(served.export.metrics()) == expected
        served.stop()
        assert counts(served.export.metrics()) == expected


def test_a_virtual_machine(path: Path) -> None:
    with ServedToGuest(tapfs.open(path, writable=True)) as served:
        front_end = served.connect()
        front_end.negotiate()
        ring = Ring(front_end)
        ring.set_up()
        ring.write(0, b"w" * 8192)
        ring.read(0, 4096)
        ring.do(virtio.FLUSH)
        ring.do(virtio.GET_ID, length=20)
        assert ring.do(virtio.OUT, SIZE // 512, b"w" * 512)[0] == virtio.IOERR
        assert counts(served.disk.metrics()) == {
            "read": (1, 0, 4096),
            "write": (2, 1, 8192),
            "flush": (1, 0, 0),
            "other": (1, 0, 0),
        }


def test_a_block_device(path: Path) -> None:
    with ublk.SimulatedDriver(SHAPE) as driver, served_by_ublk(path, driver) as disk:
        driver.do(ublk.WRITE, 0, 8192, b"w" * 8192)
        driver.do(ublk.READ, 0, 4096)
        driver.do(ublk.FLUSH, 0, 0)
        driver.do(ublk.WRITE_ZEROES, 0, 4096)
        driver.do(ublk.DISCARD, 0, 65536)
        assert driver.do(ublk.WRITE, SIZE, 512) == -errno.EIO
        expected = {
            "read": (1, 0, 4096),
            "write": (2, 1, 8192),
            "flush": (1, 0, 0),
            "zero": (1, 0, 0),
            "discard": (1, 0, 0),
        }
        assert counts(disk.metrics()) == expected
        disk.disconnect()
        assert counts(disk.metrics()) == expected


def test_two_connections_of_a_disk_are_counted_together() -> None:
    one = {**NONE, "read": Metric(1, 2, 3, (4, *NONE["read"].buckets[1:]))}
    assert together(one, one)["read"] == Metric(2, 4, 6, (8, *NONE["read"].buckets[1:]))
    told: dict[str, Any] = as_data(together(one, NONE))
    assert told["operations"]["read"]["requests"] == 4
    assert told["bounds_ns"] == BOUNDS_NS


def test_the_library_has_its_probes() -> None:
    """As bpftrace finds them; systemtap-sdt-dev is among the packages that are needed to build here."""
    notes = subprocess.run(["readelf", "-n", _engine.__file__], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(r"Provider: tapfs\s+Name: (\w+)", notes))
    assert found == {"request__begin", "request__end", "map__miss", "reserve", "flush__begin", "flush__end"}
