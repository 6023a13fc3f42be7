"""Writes that must not wait for the host (TAPFS_NOWAIT): done where the host takes them, else it is said why not."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tapfs.extent import Kind
from tapfs.geometry import Cipher
from tapfs.kernel._engine import ffi, lib
from tests.unit.engine.engine_disks import AES, GRANULE, UNIT, Disk, extents, host, pattern

DATA = pattern(GRANULE, 5)


class Ended(NamedTuple):
    """How a write ended."""

    status: int
    error: int
    done: int


def write(disk: Disk, offset: int, data: bytes = DATA) -> Ended:
    outcome = ffi.new("tapfs_outcome *")
    lib.tapfs_write(disk.handle, ffi.from_buffer(data), offset, len(data), lib.TAPFS_NOWAIT, outcome)
    return Ended(outcome.status, outcome.error, outcome.done)


DONE = Ended(lib.TAPFS_DONE, 0, GRANULE)
WOULD_WAIT = Ended(lib.TAPFS_AGAIN, errno.EAGAIN, 0)
CANNOT_BE_ASKED = Ended(lib.TAPFS_AGAIN, errno.EOPNOTSUPP, 0)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder on tmpfs, where no transfer waits."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_memory_takes_what_lies_inside_the_file(in_memory: Path) -> None:
    path = host(in_memory, "raw", pattern(UNIT))
    with Disk() as disk:
        disk.layer(path, size=2 * UNIT, identity=True, writable=True)
        assert write(disk, GRANULE) == DONE
        # What makes the file longer may have to wait for who is making it longer.
        assert write(disk, UNIT - 1) == WOULD_WAIT
    assert path.read_bytes() == pattern(UNIT)[:GRANULE] + DATA + pattern(UNIT)[2 * GRANULE :]


def test_a_file_on_disk_is_asked(tmp_path: Path) -> None:
    """DONE where its file system knows RWF_NOWAIT in writes; else nobody can tell."""
    path = host(tmp_path, "raw", pattern(UNIT))
    with Disk() as disk:
        disk.layer(path, size=UNIT, identity=True, writable=True)
        for _ in range(2):
            ended = write(disk, GRANULE)
            assert ended in {DONE, WOULD_WAIT, CANNOT_BE_ASKED}
        expected = DATA if ended == DONE else pattern(UNIT)[GRANULE : 2 * GRANULE]
        assert disk.read(GRANULE, GRANULE) == expected


@pytest.mark.parametrize(("cipher", "direct"), [(AES, False), (None, True)])
def test_what_may_have_to_read_first_is_not_begun(in_memory: Path, *, cipher: Cipher | None, direct: bool) -> None:
    path = host(in_memory, "raw", pattern(UNIT))
    with Disk() as disk:
        disk.layer(path, size=UNIT, identity=True, writable=True, cipher=cipher, direct=direct)
        assert write(disk, GRANULE) == CANNOT_BE_ASKED
    assert path.read_bytes() == pattern(UNIT)


def test_what_is_missing_is_said_all_the_same(in_memory: Path) -> None:
    with Disk() as disk:
        disk.layer(host(in_memory, "top", pattern(UNIT)), size=UNIT, writable=True)
        assert write(disk, 0).status == lib.TAPFS_MISS
        disk.install(0, extents((GRANULE, Kind.DATA, 0), (UNIT - GRANULE, Kind.UNALLOCATED, 0)))
        assert write(disk, 0, DATA + DATA) == Ended(lib.TAPFS_RESERVE, 0, GRANULE)
        assert disk.read(0, GRANULE) == DATA


def test_a_host_error_is_the_write_s(in_memory: Path) -> None:
    path = host(in_memory, "raw", pattern(UNIT))
    descriptor = os.open(path, os.O_RDONLY)
    with Disk() as disk:
        disk.layer(path, size=UNIT, identity=True, writable=True)
        os.dup2(descriptor, disk.descriptors[0])
        assert write(disk, 0) == Ended(lib.TAPFS_FAILED, errno.EBADF, 0)
    os.close(descriptor)
