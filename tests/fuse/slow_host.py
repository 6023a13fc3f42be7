"""A file system with one file, which answers reads of its middle when it is told to: a slow host, without any time.

As a program: `python -m tests.fuse.slow_host DIRECTORY`. It writes a line when it is mounted, and another for each read
that waits. The end of its standard input releases them, and all that come later. It ends when it is unmounted.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio

from tapfs.fuse.mount_table import unmount
from tests.conftest import REPOSITORY
from tests.fuse.conftest import wait_for

MIB = 1 << 20
SIZE = 64 * MIB
#: Bytes at both ends that are there at once.
ENDS = 8 * MIB
NAME = b"image"
_FILE = pyfuse3.ROOT_INODE + 1

#: For how long a read may take until it has come to the host, though nothing keeps it.
_PATIENCE_SECONDS = 60


def content(offset: int, length: int) -> bytes:
    """What the file has there: each 8 bytes are their number."""
    first, stop = offset // 8, -(-(offset + length) // 8)
    data = b"".join(number.to_bytes(8, "big") for number in range(first, stop))
    return data[offset - 8 * first :][:length]


class SlowHost(pyfuse3.Operations):
    """The root directory and the file in it."""

    def __init__(self) -> None:
        super().__init__()
        self.released = trio.Event()

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """The same for ever."""
        del ctx
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode
        attributes.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        attributes.st_nlink = 1
        attributes.st_size = SIZE if inode == _FILE else 0
        return attributes

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Only the file."""
        del parent_inode, ctx
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(pyfuse3.InodeT(_FILE))

    async def open(self, inode: pyfuse3.InodeT, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Without the page cache, so that each read comes here, and no other."""
        del flags, ctx
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """At once at both ends, where a mount looks for partition tables and file systems."""
        del fh
        size = min(size, SIZE - off)
        if ENDS <= off < SIZE - ENDS:
            os.write(1, b"waits\n")
            await self.released.wait()
        return content(off, size)


async def serve(directory: str) -> None:
    """Until it is unmounted."""
    host = SlowHost()
    options = {*pyfuse3.default_options, "fsname=tapfs-test-slow-host"}
    pyfuse3.init(host, directory, options)
    os.write(1, b"mounted\n")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_wait_for_release, host)
        await pyfuse3.main(max_tasks=64)
        nursery.cancel_scope.cancel()
    pyfuse3.close(unmount=False)


async def _wait_for_release(host: SlowHost) -> None:
    while True:
        await trio.lowlevel.wait_readable(0)
        if os.read(0, 100) == b"":
            host.released.set()
            return


class RunningHost:
    """The program, seen by a test."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self._process = process
        self.file = directory / NAME.decode()

    def wait_for_line(self) -> None:
        """Its next line: it is mounted, or one more read waits."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _PATIENCE_SECONDS)
        assert ready, "no more reads have come to the host"
        assert self._process.stdout.readline() != b""

    def release(self) -> None:
        """Answer what waits, and what will come."""
        assert self._process.stdin is not None
        self._process.stdin.close()


@contextmanager
def slow_host(directory: Path) -> Generator[RunningHost]:
    """The file system, mounted on an empty directory; released and unmounted at the end, whatever happens."""
    command = [sys.executable, "-m", "tests.fuse.slow_host", str(directory)]
    # Unbuffered: `select` sees what was not yet read.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY, bufsize=0) as process:
        host = RunningHost(process, directory)
        try:
            host.wait_for_line()
            yield host
        finally:
            host.release()
            unmount(str(directory), lazy=True)
            # A mount that a failed test has left keeps it.
            wait_for(lambda: process.poll() is not None, patience=20)
            process.kill()


if __name__ == "__main__":
    trio.run(serve, sys.argv[1])
