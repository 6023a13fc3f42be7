"""Seeks and zeros that may take long: what they find, and that they end when nobody waits for them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import tapfs
from tapfs.fuse import long_requests

CLUSTER = 4096


class Parked:
    """A request that is given up after so many looks, if ever."""

    def __init__(self, offset: int, length: int, patience: int = 1 << 60) -> None:
        self.offset, self.length = offset, length
        self.patience = patience
        self.looks = 0
        self.answer: tuple[str, int] | None = None

    @property
    def given_up(self) -> bool:
        self.looks += 1
        return self.looks > self.patience

    def complete(self, found: int = 0) -> None:
        self.answer = ("found", found)

    def fail(self, number: int) -> None:
        self.answer = ("failed", number)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """64 MiB whose clusters lie in the wrong order, so that each is an extent; then 64 MiB of nothing."""
    path = tmp_path / "image.qcow"
    tapfs.create(str(path), "qcow", 128 << 20)
    with tapfs.open(path, writable=True) as disk:
        for start in (CLUSTER, 0):
            for offset in range(start, 64 << 20, 2 * CLUSTER):
                disk.write(offset, b"x" * CLUSTER)
    return path


def test_what_a_seek_finds(image: Path) -> None:
    with tapfs.open(image) as disk:
        for offset, data, found in (
            (5, True, ("found", 5)),
            (5, False, ("found", 64 << 20)),
            (64 << 20, False, ("found", 64 << 20)),
            (64 << 20, True, ("failed", errno.ENXIO)),
        ):
            parked = Parked(offset, disk.size - offset)
            long_requests.seek(disk, parked, data=data)
            assert parked.answer == found
        parked = Parked(0, 32 << 20)
        long_requests.seek(disk, parked, data=False)
        assert parked.answer == ("found", 32 << 20)


def test_a_seek_ends_when_nobody_waits(image: Path) -> None:
    with tapfs.open(image) as disk:
        whole = Parked(0, disk.size)
        long_requests.seek(disk, whole, data=False)
        assert whole.looks > 3
        for patience in (0, 1, 2):
            parked = Parked(0, disk.size, patience)
            long_requests.seek(disk, parked, data=False)
            assert parked.answer == ("failed", errno.EINTR)
            assert parked.looks == patience + 1


def test_zeros_end_when_nobody_waits(tmp_path: Path) -> None:
    path = tmp_path / "large.raw"
    tapfs.create(str(path), "raw", 5 << 30)
    with tapfs.open(path, format="raw", writable=True) as disk:
        for offset in (0, 4 << 30):
            disk.write(offset, b"x")
        parked = Parked(0, disk.size, 2)
        long_requests.zero(disk, parked)
        assert parked.answer == ("failed", errno.EINTR)
        assert (disk.read(0, 1), disk.read(4 << 30, 1)) == (b"\0", b"x")
        parked = Parked(0, disk.size)
        long_requests.zero(disk, parked)
        assert parked.answer == ("found", 0)
        assert disk.read(4 << 30, 1) == b"\0"
