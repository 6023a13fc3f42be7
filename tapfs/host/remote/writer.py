"""The process that writes to one file elsewhere, which it shows by FUSE as a file of this host.

The engine writes to a descriptor, and each of its writes must have reached the other side when it returns. So this
process mounts a file system with one file, of which the kernel keeps nothing. The process that serves the image opens
the file, and then the mount is taken away. What is left is the open file, and this process ends when it is closed for
the last time. A flush of the file is one of the other side.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.fuse_binding import pyfuse3
from tapfs.host.remote.address import Address
from tapfs.host.remote.messages import SOCKET, answer_of, receive, send
from tapfs.host.remote.options import RemoteOptions
from tapfs.host.remote.retries import retried
from tapfs.host.remote.source import WritableSource, open_writable
from tapfs.records import replace

#: The one file, and its number.
NAME = b"disk"
_FILE = pyfuse3.ROOT_INODE + 1

_MNT_DETACH = 2

_Result = TypeVar("_Result")


class OneFile(pyfuse3.Operations):
    """A file system that is one file, which is a source elsewhere."""

    def __init__(self, source: WritableSource, options: RemoteOptions) -> None:
        super().__init__()
        self._source = source
        self._options = options

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        """Find the file."""
        del parent_inode
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(_FILE, ctx)

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        """What the file, or the folder, is."""
        del ctx
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_mode = stat.S_IFREG | 0o600 if inode == _FILE else stat.S_IFDIR | 0o700
        entry.st_nlink = 1
        if inode == _FILE:
            entry.st_size = self._source.facts.size
            # No holes are known, so none are looked for.
            entry.st_blocks = -(-entry.st_size // 512)
        return entry

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """Open the file, past the kernel's page cache."""
        del flags, ctx
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes from elsewhere."""
        del fh
        length = min(size, self._source.facts.size - off)
        return bytes(await self._done(partial(self._source.read, off, length))) if length > 0 else b""

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Bytes for elsewhere, which have got there when it returns."""
        del fh
        if off + len(buf) > self._source.facts.size:
            raise pyfuse3.FUSEError(errno.ENOSPC)
        await self._done(partial(self._source.write, off, buf))
        return len(buf)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        """The file has its length for good."""
        del fh
        if fields.update_size and attr.st_size != self._source.facts.size:
            raise pyfuse3.FUSEError(errno.ENOSPC)
        return await self.getattr(inode, ctx)

    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001  pyfuse3 calls it so
        """Have what was written be durable elsewhere."""
        del fh, datasync
        # Tried once: a connection that is lost meanwhile may take what was written with it.
        await self._done(self._source.flush, replace(self._options, tries=1))

    async def flush(self, fh: int) -> None:
        """A descriptor of the file was closed."""

    async def release(self, fh: int) -> None:
        """Nobody has the file open any more."""

    async def _done(self, work: Callable[[], _Result], options: RemoteOptions | None = None) -> _Result:
        """What the work gives, in a thread; its failure as an errno."""
        try:
            return await trio.to_thread.run_sync(partial(retried, work, options or self._options))
        except OSError as error:  # an ImageError, too
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error


def _take_away(folder: str) -> None:
    """Take the mount away. Who has the file open keeps it."""
    if ctypes.CDLL(None).umount2(os.fsencode(folder), _MNT_DETACH):
        helper = shutil.which("fusermount3") or "fusermount3"
        subprocess.run([helper, "-u", "-z", folder], check=False, stdin=subprocess.DEVNULL)
    os.rmdir(folder)


def _wait_until_opened(connection: socket.socket, folder: str) -> None:
    """Take the mount away once the file is open, or whoever was to open it is gone."""
    asked = receive(connection)
    _take_away(folder)
    if asked:
        send(connection, {"number": asked["number"]})


def main() -> None:
    """Serve one address until the file is closed for the last time."""
    os.closerange(SOCKET + 1, os.sysconf("SC_OPEN_MAX"))
    connection = socket.socket(fileno=SOCKET)
    asked = receive(connection)
    options = RemoteOptions(**asked["options"])

    def opened() -> tuple[WritableSource, str]:
        address = Address.known(asked["address"])
        source = open_writable(address, options)
        folder = tempfile.mkdtemp(prefix="tapfs-remote-")
        try:
            pyfuse3.init(OneFile(source, options), folder, {"fsname=tapfs-remote", "nosuid", "nodev"})
        except RuntimeError as error:
            os.rmdir(folder)
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "to write elsewhere needs FUSE, and it cannot be mounted",
                path=str(address),
                op="open",
                remedy="see that /dev/fuse is there, and install fuse3",
            ) from error
        return source, folder

    answer, got = answer_of(asked, opened)
    if got is None:
        send(connection, answer)
        return
    source, folder = got
    send(connection, {**answer, "facts": source.facts._asdict(), "path": os.path.join(folder, os.fsdecode(NAME))})
    threading.Thread(target=_wait_until_opened, args=(connection, folder), daemon=True).start()
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)
    source.close()


if __name__ == "__main__":
    main()
