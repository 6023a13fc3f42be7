"""The process that writes to one file elsewhere, which it shows by FUSE as a file of this host.

The engine writes to a descriptor, and each of its writes must have reached the other side when it returns. So this
process serves a file system with one file, of which the kernel keeps nothing. A second process mounts it, opens the
file, takes the mount away and passes the open file on. Then this process has no need to mount, and is in a sandbox when
the other side says its first word. It ends when the file is closed for the last time. A flush of the file is one of the
other side.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, TypeVar

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.host import fuse_connection
from tapfs.host.fuse_binding import pyfuse3
from tapfs.host.remote.address import Address
from tapfs.host.remote.messages import SOCKET, allowed, answer_of, failed, receive, receive_with_descriptor, send
from tapfs.host.remote.options import RemoteOptions
from tapfs.host.remote.retries import retried
from tapfs.host.remote.source import WritableSource, open_writable
from tapfs.host.sandbox import rules
from tapfs.host.sandbox.confinement import Needs, enter
from tapfs.host.sandbox.filter import Calls
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


class _Mounter:
    """The process that mounts for the one that serves; the two talk over a pair of sockets."""

    def __init__(self, connection: socket.socket) -> None:
        """Fork it; be the only thread. It gives what it has opened to who is at the other end of the connection."""
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = os.fork()
        if child == 0:
            self._channel.close()
            self._serve(theirs, connection)
        theirs.close()
        self._child = child

    def mount(self) -> int:
        """Mount; the descriptor of the connection to the kernel. Raises ImageError."""
        send(self._channel, {})
        answer, descriptor = receive_with_descriptor(self._channel)
        if descriptor is None:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"to write elsewhere needs FUSE, and it cannot be mounted: {answer.get('said', 'nobody does')}",
                op="open",
                remedy="see that /dev/fuse is there, and install fuse3",
            )
        return descriptor

    def pass_on(self, answer: dict[str, Any]) -> None:
        """Have the file opened, which this process is to serve meanwhile, and passed on with the answer."""
        send(self._channel, answer)

    def close(self) -> None:
        """See it end."""
        self._channel.close()
        os.waitpid(self._child, 0)

    @staticmethod
    def _serve(channel: socket.socket, connection: socket.socket) -> NoReturn:
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # it ends with the process that serves
            with channel, suppress(OSError):
                if channel.recv(1 << 10):
                    _mount_and_open(channel, connection)
        finally:
            os._exit(0)


def _mount_and_open(channel: socket.socket, connection: socket.socket) -> None:
    folder = tempfile.mkdtemp(prefix="tapfs-remote-")
    try:
        options = fuse_connection.MountOptions("tapfs-remote", read_only=False, others=(), type="fuse.tapfs-remote")
        mounted = fuse_connection.connect(folder, options, follow=False)
    except ImageError as error:
        os.rmdir(folder)
        send(channel, {"said": error.message})
        return
    try:
        socket.send_fds(channel, [b"{}"], [mounted])
        os.close(mounted)  # with the serving process the connection is to end
        answer = receive(channel)
        # The other side may have taken over the process that serves.
        found = fuse_connection.open_in_mount(folder, os.fsdecode(NAME), os.O_RDWR) if answer else None
    except OSError as error:
        send(connection, failed(error))
        return
    finally:
        _take_away(folder)
    if found is not None:
        socket.send_fds(connection, [json.dumps(answer).encode()], [found])


def main() -> None:
    """Serve one address until the file is closed for the last time."""
    os.closerange(SOCKET + 1, os.sysconf("SC_OPEN_MAX"))
    connection = socket.socket(fileno=SOCKET)
    places = [Address.known(each) for each in allowed()]
    mounter = _Mounter(connection)
    # The libraries that write read what the user has set up for them.
    enter(Needs(anything=rules.READING, scratch=True, calls=Calls(network=True), cache_bytes=None))
    asked = receive(connection)
    options = RemoteOptions(**asked["options"])

    def opened() -> WritableSource:
        address = Address.known(asked["address"])
        if places and not any(address.lies_below(each) for each in places):
            message = "is no place that the user has named to be written"
            raise ImageError(ErrorKind.DENIED, message, path=str(address), op="open")
        source = open_writable(address, options)
        try:
            pyfuse3.init(OneFile(source, options), f"/dev/fd/{mounter.mount()}", set())
        except ImageError as error:
            error.path = str(address)
            raise
        return source

    answer, source = answer_of(asked, opened)
    if source is None:
        send(connection, answer)
        mounter.close()
        return
    mounter.pass_on({**answer, "facts": source.facts._asdict()})
    connection.close()
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)
    mounter.close()
    source.close()


if __name__ == "__main__":
    main()
