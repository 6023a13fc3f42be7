"""The log of a live migration: each page of the guest's memory that the device writes has its bit, and no other."""

from __future__ import annotations

import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import tapfs
from tests import vhost_front_end as virtio
from tests.unit.vhost.served import Served
from tests.vhost_front_end import GUEST, FrontEnd, Ring

PAGE = 4096
SET_FEATURES, SET_LOG_BASE, SET_VRING_ADDR = 2, 6, 9
MEMORY = 16 << 20
LOG_BYTES = (GUEST + MEMORY) // PAGE // 8


class Log:
    """The log of a front end."""

    def __init__(self, front_end: FrontEnd) -> None:
        self._file = os.memfd_create("log")
        os.ftruncate(self._file, LOG_BYTES)
        front_end.descriptors.append(self._file)
        front_end.send(SET_LOG_BASE, struct.pack("=QQ", LOG_BYTES, 0), [self._file])
        assert front_end.receive() == (SET_LOG_BASE, b"", [])

    def taken(self) -> set[int]:
        """The places in the guest's memory, by page, whose bits are set; none is afterwards."""
        start = GUEST // PAGE // 8
        bits = os.pread(self._file, MEMORY // PAGE // 8, start)
        assert not any(os.pread(self._file, start, 0))
        os.pwrite(self._file, bytes(len(bits)), start)
        return {at * 8 + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}


def pages(*ranges: tuple[int, int]) -> set[int]:
    """Those that byte ranges of the guest's memory touch."""
    return {page for at, length in ranges for page in range(at // PAGE, (at + length - 1) // PAGE + 1)}


@contextmanager
def logged(path: Path, *, entries: int = 128, slot_bytes: int = 8192) -> Generator[tuple[FrontEnd, Ring, Log, int]]:
    """A ring whose writes are logged."""
    with Served(tapfs.open(path, writable=True, format="qcow2")) as served:
        front_end = served.connect(memory_bytes=MEMORY)
        features = front_end.negotiate()
        ring = Ring(front_end, entries=entries, slot_bytes=slot_bytes)
        ring.set_up()
        ring.read(0, PAGE)
        log = Log(front_end)
        ring.read(0, PAGE)
        assert not log.taken(), "nothing is logged before it is asked for"
        assert front_end.tell(SET_FEATURES, struct.pack("=Q", features | virtio.F_LOG_ALL)) == 0
        assert front_end.tell(SET_VRING_ADDR, ring.addresses(logged=True)) == 0
        log.taken()
        yield front_end, ring, log, features


def made(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    tapfs.create(path, "qcow2", 64 << 20)
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, bytes(range(256)) * 16384)
    return path


def test_what_the_device_writes_is_logged(tmp_path: Path) -> None:
    with logged(made(tmp_path)) as (front_end, ring, log, features):
        used = ring.used, 6 + 8 * ring.entries
        for kind, length, data in (
            (virtio.IN, 7680, b""),
            (virtio.OUT, 0, b"w" * 7680),
            (virtio.GET_ID, 20, b""),
            (virtio.FLUSH, 0, b""),
        ):
            _, slot = ring.request(kind, 0, data, length=length, pieces=3)
            ring.kick_it()
            ring.wait()
            written = [(slot + 512, length)] if length else []
            # A thread that sleeps has asked for a kick, in the used ring as well.
            assert log.taken() - pages(used) == pages((slot + 16, 1), *written)
        _, slot = ring.request(virtio.IN, 1 << 40, length=PAGE)
        ring.kick_it()
        ring.wait()
        found = log.taken()
        assert found == pages(used, (slot + 16, 1)), "a read that is refused writes its status only"
        assert front_end.tell(SET_FEATURES, struct.pack("=Q", features)) == 0
        log.taken()
        ring.read(0, PAGE)
        assert not log.taken()


def test_a_read_of_several_pieces_is_logged_whole(tmp_path: Path) -> None:
    with logged(made(tmp_path), entries=4, slot_bytes=3 << 20) as (_, ring, log, _):
        length = (5 << 19) - 512
        # The first comes from tables that the engine has yet to map, the second is moved at once.
        for _ in range(2):
            _, slot = ring.request(virtio.IN, 1, length=length)
            ring.kick_it()
            ring.wait()
            assert log.taken() - pages((ring.used, 64)) == pages((slot + 512, length), (slot + 16, 1))


def test_pages_behind_the_end_of_the_log_are_no_error(tmp_path: Path) -> None:
    with logged(made(tmp_path)) as (front_end, ring, log, _):
        short = os.memfd_create("short")
        os.ftruncate(short, PAGE)
        front_end.descriptors.append(short)
        front_end.send(SET_LOG_BASE, struct.pack("=QQ", 100, 28), [short])
        assert front_end.receive() == (SET_LOG_BASE, b"", [])
        assert ring.read(0, PAGE) == bytes(range(256)) * 16
        assert not any(os.pread(short, PAGE, 0))
        assert not log.taken() - pages((ring.used, 6 + 8 * ring.entries)), "the ring was stopped before"
        front_end.send(SET_LOG_BASE, struct.pack("=QQ", PAGE, 1), [short], flags=9)
        assert front_end.receive() == (SET_LOG_BASE, struct.pack("=Q", 1), []), "longer than its file"
