"""Disks that are larger than the engine can serve are refused when they are opened or made, by every command alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import MAX_DISK_BYTES


@pytest.fixture
def file() -> Iterator[int]:
    """A file in memory, where sizes up to the largest offset are possible."""
    descriptor = os.memfd_create("disk")
    yield descriptor
    os.close(descriptor)


def test_the_largest_disk_is_read_and_written_to_its_end(file: int) -> None:
    os.ftruncate(file, MAX_DISK_BYTES)
    with tapfs.open(f"/proc/self/fd/{file}", format="raw", writable=True) as image:
        image.write(MAX_DISK_BYTES - 3, b"end")
        assert image.read(MAX_DISK_BYTES - 4, 4) == b"\0end"


@pytest.mark.parametrize("size", [MAX_DISK_BYTES + 1, (1 << 63) - 1])
def test_a_larger_disk_is_refused_at_open(file: int, size: int) -> None:
    os.ftruncate(file, size)
    for writable in (False, True):
        with pytest.raises(ImageError, match=f"a disk of {size} bytes is too large") as caught:
            tapfs.open(f"/proc/self/fd/{file}", format="raw", writable=writable)
        assert caught.value.kind is ErrorKind.OUT_OF_BOUNDS


def test_a_larger_disk_is_not_made(tmp_path: Path) -> None:
    for name in ("raw", "qcow"):
        with pytest.raises(ImageError, match=r"too large|too many|limit") as caught:
            tapfs.create(str(tmp_path / "image"), name, MAX_DISK_BYTES + 1)
        assert caught.value.kind is ErrorKind.OUT_OF_BOUNDS
    assert os.listdir(tmp_path) == []
