"""Disks on NBD servers are written: what has returned has got there, and a lost connection is never a lost write."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.chain import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.host.remote.messages import receive_with_descriptor
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


#: A process that writes elsewhere, and shows what it likes. Words: its socket, where a link leads, the kind of file.
_HOSTILE = """
import os, socket, stat, sys
import trio
from tapfs.host.fuse_binding import pyfuse3
from tapfs.host.remote import writer

class Hostile(writer.OneFile):
    def __init__(self):
        pyfuse3.Operations.__init__(self)

    async def getattr(self, inode, ctx):
        found = pyfuse3.EntryAttributes()
        found.st_ino, found.st_nlink = inode, 1
        kind = stat.S_IFDIR if inode == pyfuse3.ROOT_INODE else getattr(stat, sys.argv[3])
        found.st_mode = kind | 0o700
        return found

    async def readlink(self, inode, ctx):
        return os.fsencode(sys.argv[2])

connection = socket.socket(fileno=int(sys.argv[1]))
mounter = writer._Mounter(connection)
pyfuse3.init(Hostile(), f"/dev/fd/{mounter.mount()}", set())
mounter.pass_on({"number": 1})
connection.close()
trio.run(pyfuse3.main)
pyfuse3.close(unmount=False)
mounter.close()
"""


@pytest.mark.parametrize("kind", ["S_IFLNK", "S_IFIFO", "S_IFREG"])
def test_only_a_file_that_is_shown_by_the_process_that_writes_is_opened(tmp_path: Path, kind: str) -> None:
    """Another process opens it, outside of the sandbox."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"victim")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, "-c", _HOSTILE, str(theirs.fileno()), str(victim), kind]
    with ours, subprocess.Popen(words, pass_fds=[theirs.fileno()]) as hostile:
        theirs.close()
        ours.settimeout(60)
        try:
            answer, found = receive_with_descriptor(ours)
            if found is not None:
                where = os.readlink(f"/proc/self/fd/{found}")
                os.close(found)
                assert (kind, os.path.basename(where)) == ("S_IFREG", "disk")
            else:
                assert kind != "S_IFREG"
                assert answer["error"]["kind"] == "denied"
        finally:
            hostile.wait(60)


def test_what_takes_no_writes_is_told(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    with nbd_served(disk, "-r") as path, pytest.raises(ImageError) as raised:
        tapfs.open(address(path), format="raw", writable=True)
    assert raised.value.kind is ErrorKind.READ_ONLY
