"""The requests of the kernel, answered by pyfuse3 on trio from an Image.

A request that the image can answer without waiting for the host is answered at once. Every other request runs in a
thread while further requests are served. The kernel keeps no dirty pages (no writeback cache). So a write that has
returned is in the image, and is durable after fsync, close or unmount.
"""

# ruff: noqa: ARG002, FBT001 - the signatures are pyfuse3's

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, NoReturn, TypeVar

import trio

from tapfs.disk.image import Image
from tapfs.errors import ImageError
from tapfs.fuse.settings import PLAIN, MountSettings
from tapfs.fuse.tree import Document, KeptDisk, MadeFile, Node, ServedFile, Tree, Window
from tapfs.fuse.verified_reads import VerifiedReads
from tapfs.host.fuse_binding import EntryAttributes, FileInfo, FUSEError, pyfuse3
from tapfs.serving.counted_requests import CountedRequests
from tapfs.serving.failures import ErrorLog
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread

_Result = TypeVar("_Result")

#: Requests of the image that may block in threads at once.
_THREADS = 32

#: Seconds for which the kernel may keep the attributes of what only we change.
_STABLE_SECONDS = 3600.0

_BLOCK = 4096

#: A handle has the inode and whether it was opened for writing in its low bits, so that a successor of this process
#: knows what handles of the predecessor were. The rest is a count.
_HANDLE_SHIFT = 32
_LOW_HANDLE = (1 << _HANDLE_SHIFT) - 1


class _Handle(NamedTuple):
    """An open file.

    `text` is what a Document said when it was opened, `kept` the disk of a KeptDisk, `made` the file of a MadeFile.
    """

    node: Node
    writing: bool
    text: bytes = b""
    kept: Image | None = None
    made: ServedFile | None = None


class _Answering:
    """Turns what goes wrong in a handler into an errno: anything else would end the mount."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._errors = ErrorLog()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, FUSEError):
            raise FUSEError(self._errors.answer(error, path=self._image.path)) from error


class ImageOperations(pyfuse3.Operations):
    """The handlers for one image and its tree.

    `modified_ns` is the modification time that the files show until one is written. Writes that
    do not come here are asked for: `last_write_ns` is the time of the last of them, or 0. `on_init` is called when
    libfuse has read INIT, before it answers. `verified` reads in the image's place.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self,
        image: Image,
        tree: Tree,
        *,
        modified_ns: int,
        last_write_ns: Callable[[], int] = lambda: 0,
        on_init: Callable[[], None] = lambda: None,
        settings: MountSettings = PLAIN,
        verified: VerifiedReads | None = None,
    ) -> None:
        super().__init__()
        self._image = image
        self._tree = tree
        self._modified_ns = modified_ns
        self._last_write_ns = last_write_ns
        self._on_init = on_init
        self._settings = settings
        self._verified = verified
        self._owner = settings.owner
        self._handles: dict[int, _Handle] = {}
        # Another start than that of a predecessor, whose handles may still be open.
        self._next_handle = (os.getpid() & 0x7FF) << 20 | 1
        self._limit = trio.CapacityLimiter(_THREADS)
        self._answering = _Answering(image)
        #: The requests for the disk that came here: all, or those that native threads leave.
        self.counted = CountedRequests()

    def init(self) -> None:
        """Begin: libfuse agrees with the kernel."""
        self._on_init()

    @property
    def modified_ns(self) -> int:
        """The modification time that the disk shows, in nanoseconds since 1970."""
        return max(self._modified_ns, self._last_write_ns())

    # The tree

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        """Find an entry of a directory."""
        with self._answering:
            node = self._tree.lookup(parent_inode, name)
            if node is None:
                raise FUSEError(errno.ENOENT)
            return await self._attributes(node)

    async def forget(self, inode_list: object) -> None:
        """Nothing: inodes live as long as the mount."""

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        """Attributes of a node."""
        with self._answering:
            return await self._attributes(self._node(inode))

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        """Refuse every change but a truncation to the size that the disk has.

        A truncation to nothing without a handle is an open with O_TRUNC; truncate(2) cannot be told from it. It has no
        effect, as on a block device: the answer has the size that the disk keeps.
        """
        with self._answering:
            node = self._node(inode)
            window = node.content
            keeps_size = (
                fields.update_size
                and isinstance(window, Window)
                and (attr.st_size == window.size or (attr.st_size == 0 and fh is None))
            )
            changes = fields.update_mode or fields.update_uid or fields.update_gid
            times = fields.update_atime or fields.update_mtime
            if changes or (not keeps_size and (fields.update_size or times)):
                raise FUSEError(errno.EPERM)
            return await self._attributes(node)

    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        """Allow what the mode bits allow; with `default_permissions` the kernel does not ask."""
        with self._answering:
            permissions = self._settings.mode(self._node(inode).mode)
            granted = permissions >> 6 if ctx.uid == self._owner[0] else permissions
            return ctx.uid == 0 or mode & granted & 7 == mode

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        """A directory's handle is its inode."""
        with self._answering:
            if self._tree.directory(inode) is None:
                raise FUSEError(errno.ENOTDIR)
            return inode

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory from the entry after number `start_id`."""
        with self._answering:
            for number, node in enumerate(self._tree.children(fh), 1):
                if number <= start_id:
                    continue
                if not pyfuse3.readdir_reply(token, node.name, await self._listed(node), number):
                    break

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Nothing is held for an open directory."""

    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Nothing: directories do not change."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """A full file system of the size of the disk."""
        with self._answering:
            data = pyfuse3.StatvfsData()
            data.f_bsize = data.f_frsize = _BLOCK
            data.f_blocks = -(-self._image.size // _BLOCK)
            data.f_files = len(self._tree)
            data.f_namemax = 255
            return data

    async def _refuse(self, *_: object, **__: object) -> NoReturn:
        """The tree is fixed."""
        raise FUSEError(errno.EPERM)

    create = mknod = mkdir = symlink = link = rename = unlink = rmdir = _refuse

    # Files

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> FileInfo:
        """Open a file. The kernel keeps what it has read of a read-only disk between opens."""
        with self._answering:
            node = self._node(inode)
            writing = flags & os.O_ACCMODE != os.O_RDONLY
            if writing and (not self._image.writable or not isinstance(node.content, Window)):
                raise FUSEError(errno.EROFS)
            handle = self._add(await self._opened(node, writing=writing))
            if isinstance(node.content, Document):
                # Read around the page cache, for the size seen earlier need not be that of this text.
                return FileInfo(fh=handle, direct_io=True, keep_cache=False)
            if isinstance(node.content, KeptDisk | MadeFile):
                return FileInfo(fh=handle, keep_cache=True)
            return FileInfo(fh=handle, keep_cache=not self._image.writable)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """The last descriptor of an open file is gone."""
        self._handles.pop(fh, None)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Bytes of a file, fewer only at its end."""
        with self._answering:
            handle = await self._handle(fh)
            if isinstance(handle.node.content, Document):
                return handle.text[off : off + size]
            with self.counted.request("read") as request:
                data = await self._bytes_of(handle, off, size)
                request.bytes = len(data)
                return data

    async def _bytes_of(self, handle: _Handle, off: int, size: int) -> bytes:
        """Bytes of a disk, or of a file that is made of one."""
        content, made = handle.node.content, handle.made
        if made is not None:
            data = made.try_read(off, size)
            return await self._in_thread(lambda: made.read(off, size)) if data is None else data
        if not isinstance(content, Window | KeptDisk):
            return handle.text[off : off + size]
        length = min(size, content.size - off)
        if length <= 0:
            return b""
        image = handle.kept or self._image
        start = off + (content.start if isinstance(content, Window) else 0)
        verified = self._verified
        if verified is not None:
            data = verified.try_read(start, length)
            return await self._in_thread(lambda: verified.read(start, length)) if data is None else data
        data = image.try_read(start, length)
        return await self._in_thread(lambda: image.read(start, length)) if data is None else data

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Write to the disk; like a block device it takes nothing past its end."""
        with self._answering, self.counted.request("write") as request:
            window = (await self._handle(fh)).node.content
            if not isinstance(window, Window):
                raise FUSEError(errno.EBADF)
            length = min(len(buf), window.size - off)
            if length <= 0:
                raise FUSEError(errno.ENOSPC)
            data = buf if length == len(buf) else buf[:length]
            await self._in_thread(lambda: self._image.write(window.start + off, data))
            self._modified_ns = time.time_ns()
            request.bytes = length
            return length

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """A descriptor is being closed: make what was written through it durable."""
        with self._answering:
            if (await self._handle(fh)).writing:
                with self.counted.request("flush"):
                    await self._in_thread(self._image.flush)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """Make everything written durable."""
        with self._answering:
            if self._image.writable:
                with self.counted.request("flush"):
                    await self._in_thread(self._image.flush)

    # Helpers

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await in_thread(work, limiter=self._limit)

    def _node(self, inode: int) -> Node:
        node = self._tree.node(inode)
        if node is None:
            raise FUSEError(errno.ENOENT)
        return node

    async def _opened(self, node: Node, *, writing: bool) -> _Handle:
        if isinstance(node.content, Document):
            return _Handle(node, writing, await self._in_thread(node.content.text))
        if isinstance(node.content, KeptDisk):
            return _Handle(node, writing, kept=await self._in_thread(node.content.image))
        if isinstance(node.content, MadeFile):
            return _Handle(node, writing, made=await self._in_thread(node.content.file))
        return _Handle(node, writing)

    async def _handle(self, number: int) -> _Handle:
        """The open file; one that a predecessor of this process has opened is opened anew."""
        handle = self._handles.get(number)
        if handle is None:
            node = self._tree.node((number & _LOW_HANDLE) >> 1)
            if node is None:
                raise FUSEError(errno.EBADF)
            handle = self._handles.setdefault(number, await self._opened(node, writing=bool(number & 1)))
        return handle

    def _add(self, handle: _Handle) -> int:
        low = handle.node.inode << 1 | handle.writing
        while (number := self._next_handle << _HANDLE_SHIFT | low) in self._handles:
            self._next_handle += 1
        self._next_handle += 1
        self._handles[number] = handle
        return number

    async def _listed(self, node: Node) -> EntryAttributes:
        """The attributes of an entry of a directory. One that cannot be made is listed, and is an error by itself."""
        try:
            return await self._attributes(node)
        except ImageError as error:
            log.error("%s: %s", node.name.decode(errors="replace"), error)
            entry = EntryAttributes()
            entry.st_ino, entry.st_mode = node.inode, self._settings.mode(node.mode)
            entry.entry_timeout = entry.attr_timeout = 0
            return entry

    async def _attributes(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.inode
        entry.st_mode = self._settings.mode(node.mode)
        entry.st_nlink = 2 if stat.S_ISDIR(node.mode) else 1
        entry.st_uid, entry.st_gid = self._owner
        modified_ns = self.modified_ns
        if isinstance(node.content, KeptDisk):
            modified_ns = node.content.modified_ns
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = modified_ns
        entry.entry_timeout = entry.attr_timeout = _STABLE_SECONDS
        if isinstance(node.content, MadeFile):
            entry.st_size = (await self._in_thread(node.content.file)).size
        elif isinstance(node.content, Window | KeptDisk):
            entry.st_size = node.content.size
        elif isinstance(node.content, Document):
            entry.st_size = len(await self._in_thread(node.content.text))
            entry.attr_timeout = 0
        disk = isinstance(node.content, Window | KeptDisk | MadeFile)
        taken = min(entry.st_size, self._image.allocated_bytes) if disk else entry.st_size
        entry.st_blocks = -(-taken // 512)
        return entry
