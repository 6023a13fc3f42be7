"""Disks on NBD servers are written: what has returned has got there, and a lost connection is never a lost write."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.chain import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.host.remote.options import RemoteOptions
from tapfs.jobs.convert import convert_to_new
from tapfs.jobs.create import NewImage
from tests.unit.remote.cut_line import CutLine, nbd_served

MIB = 1 << 20
SIZE = 4 * MIB


def address(path: Path) -> str:
    return f"nbd+unix:///disk?socket={path}"


def test_a_disk_is_converted_straight_to_a_server(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(MIB) + bytes(2 * MIB) + random.Random(2).randbytes(MIB - 700)
    (tmp_path / "source").write_bytes(content)
    disk = tmp_path / "disk"
    disk.write_bytes(b"old" * (SIZE // 3) + b"x")
    with nbd_served(disk) as path:
        line = CutLine(tmp_path, path)
        with tapfs.open(tmp_path / "source", format="raw") as source:
            convert_to_new(source, address(line.path), NewImage("raw", len(content)))
            with pytest.raises(ImageError, match="growing"):
                convert_to_new(source, address(line.path), NewImage("qcow2", len(content)))
        with pytest.raises(ImageError) as raised:
            tapfs.create(address(line.path), "raw", SIZE)
        assert raised.value.kind is ErrorKind.EXISTS
        line.close()
    assert disk.read_bytes()[: len(content)] == content
    assert disk.stat().st_size == SIZE
    assert not [name for name in os.listdir("/tmp") if name.startswith("tapfs-remote-")]  # noqa: S108


def test_writes_go_through_a_line_that_is_cut_and_no_flush_covers_what_may_be_lost(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    options = OpenOptions(format="raw", writable=True, remote=RemoteOptions(tries=20, pause_seconds=0.001))
    with nbd_served(disk) as path:
        line = CutLine(tmp_path, path)
        image = open_image(address(line.path), options)
        image.write(MIB, b"one")
        assert disk.read_bytes()[MIB : MIB + 3] == b"one"  # it has got there before any flush
        image.flush()
        line.cut()
        image.write(2 * MIB, b"two")
        image.flush()  # all that was written before the cut had been flushed
        image.write(0, b"three")
        line.cut()
        assert image.read(2 * MIB, 3) == b"two"
        for _ in range(2):
            with pytest.raises(ImageError) as raised:
                image.flush()
            assert raised.value.kind is ErrorKind.IO
        image.abandon()
        line.close()


def test_what_takes_no_writes_is_told(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    with nbd_served(disk, "-r") as path, pytest.raises(ImageError) as raised:
        tapfs.open(address(path), format="raw", writable=True)
    assert raised.value.kind is ErrorKind.READ_ONLY
