"""Host files: judge and open one, lock it, read its metadata. The engine moves the data."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Self

from tapfs.errors import ErrorKind, ImageError, from_os_error, truncated
from tapfs.host.lock import Sharing, lock_image, mark_requests
from tapfs.host.loops import loop_device_of
from tapfs.host.presence import Presence
from tapfs.records import NamedTuple

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a fifo"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
)

#: ioctl of a block device: whether it is read-only (<linux/fs.h>).
_BLKROGET = 0x125E
#: And the bytes of its sectors.
_BLKSSZGET = 0x1268

#: Reads above so many bytes first ask how long the file is.
_LONG_READ = 1 << 20

#: Positions in a file are below this (`loff_t`).
_POSITIONS_END = (1 << 63) - 1


class SecondUse(NamedTuple):
    """How a file that is open is used once more: the name that it has there, None for the one that it has.

    It is `writable` there if it is here, too. A file knows some of these and leaves the others aside.
    """

    path: str | None = None
    writable: bool = False
    direct: bool = False
    sharing: Sharing = Sharing.UNCHECKED


#: The uses that may write a file which a loop device shows.
_LOOPS_ALLOWED = (Sharing.UNCHECKED, Sharing.COOPERATING)

#: A file that is read once more under the name that it has.
UNCHANGED = SecondUse()


def look_up(path: str, *, follow: bool = True) -> int:
    """An O_PATH descriptor of what `path` names, which has no effect on it, as opening has on fifos and devices.

    Without `follow` a symbolic link is not followed but found. Raises ImageError(not_found, denied, …).
    """
    flags = os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        return os.open(path, flags)
    except OSError as error:
        raise from_os_error(error, path=path, op="open the image") from error
    except ValueError as error:
        raise ImageError(ErrorKind.NOT_FOUND, f"is no file name: {error}", path=repr(path), op="open") from error


def _judge_kind(status: os.stat_result, path: str) -> None:
    """Raise ImageError(invalid_format) for what is neither a regular file nor a block device."""
    if stat.S_ISREG(status.st_mode):
        return
    for test, what in _KINDS:
        if test(status.st_mode):
            remedy = (
                "open the image in it: of a .vmwarevm its .vmx, of an .hdd its DiskDescriptor.xml"
                if stat.S_ISDIR(status.st_mode)
                else None
            )
            message = f"is {what}, not a disk image"
            raise ImageError(ErrorKind.INVALID_FORMAT, message, path=path, op="open", remedy=remedy)


def _refuse_loop_device(status: os.stat_result, path: str) -> None:
    """Raise ImageError(locked) if a loop device shows the file: its users write past every lock, and we past theirs."""
    device = loop_device_of((status.st_dev, status.st_ino))
    if device is not None:
        raise ImageError(
            ErrorKind.LOCKED,
            f"is used by the loop device {device}",
            path=path,
            op="open the image",
            remedy=f"end that use (unmount it, losetup --detach {device}), or write to {device} instead",
        )


class LocalFile:
    """An open and locked regular file or block device: a `tapfs.driver.HostFile`.

    `path` is only a name for messages once the file is open.
    """

    #: How the file is packed whose contents these are, None: it is read as it is.
    packing: str | None = None

    def __init__(
        self,
        path: str,
        descriptor: int,
        *,
        writable: bool,
        sharing: Sharing = Sharing.EXCLUSIVE,
        direct: bool = False,
        request_owner: int | None = None,
        already_open: bool = False,
    ) -> None:
        """Take over `descriptor`; it is closed here if anything is wrong with the file.

        `request_owner` marks direct requests as those of a disk whose next process has to wait for them
        (`tapfs.host.lock.mark_requests`); `already_open`: this process has the file open for it already.
        Raises ImageError(invalid_format) for what is no file, ImageError(locked).
        """
        self.path = path
        self.descriptor = descriptor
        self.writable = writable
        self.direct = False
        self.request_owner = request_owner
        self._data_descriptor: int | None = None
        #: The blocks of the file that are here; None: all.
        self.presence: Presence | None = None
        #: Where the file begins in what `descriptor` names, and its length in bytes; None: it is all of that.
        self.window: tuple[int, int] | None = None
        #: How the file is called in the package that it is a member of; None: it is a file of its own.
        self.member: str | None = None
        #: The greatest length that was seen: no file of an open image becomes shorter.
        self._known_size = 0
        try:
            status = os.fstat(descriptor)
            _judge_kind(status, path)
            self.is_block_device = stat.S_ISBLK(status.st_mode)
            self.identity = (status.st_dev, status.st_ino)
            self._known_size = 0 if self.is_block_device else status.st_size
            if writable and self.is_block_device:
                self._refuse_read_only_device()
            lock_image(descriptor, path, writable=writable, sharing=sharing)
            if direct:
                self._open_direct(already_open=already_open)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        path: str,
        *,
        writable: bool = False,
        sharing: Sharing = Sharing.EXCLUSIVE,
        direct: bool = False,
        request_owner: int | None = None,
    ) -> Self:
        """Open an existing file by its name. Raises ImageError(not_found, denied) and what `open_found` does."""
        found = look_up(path)
        try:
            return cls.open_found(
                found, path, writable=writable, sharing=sharing, direct=direct, request_owner=request_owner
            )
        finally:
            os.close(found)

    @classmethod
    def open_found(
        cls,
        found: int,
        path: str,
        *,
        writable: bool = False,
        sharing: Sharing = Sharing.EXCLUSIVE,
        direct: bool = False,
        request_owner: int | None = None,
    ) -> Self:
        """Open the file that an O_PATH descriptor stands for, whatever its name means by now.

        The file is judged before it is opened, so a fifo, a character device or a socket is never opened. A block
        device is opened exclusively for writing, so that a mounted one is refused, and so is a file that a loop device
        shows, unless `sharing` is UNCHECKED or COOPERATING.
        Raises ImageError(invalid_format, denied, read_only, locked, …).
        """
        flags = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
        try:
            status = os.fstat(found)
            _judge_kind(status, path)
            if writable and stat.S_ISBLK(status.st_mode):
                flags |= os.O_EXCL
            descriptor = os.open(f"/proc/self/fd/{found}", flags)
        except OSError as error:
            from tapfs.host.sandbox.confinement import explained  # most files can be opened

            raise explained(from_os_error(error, path=path, op="open the image"), path) from error
        if writable and stat.S_ISREG(status.st_mode) and sharing not in _LOOPS_ALLOWED:
            try:
                _refuse_loop_device(status, path)
            except BaseException:
                os.close(descriptor)
                raise
        return cls(path, descriptor, writable=writable, sharing=sharing, direct=direct, request_owner=request_owner)

    def duplicate(self, *, direct: bool = False) -> LocalFile:
        """Another descriptor of the open file, for writing; it is the caller's. Raises ImageError."""
        return LocalFile(self.path, os.dup(self.descriptor), writable=True, direct=direct)

    def again(self, use: SecondUse = UNCHANGED) -> LocalFile:
        """The same open file and its locks on a descriptor of its own, which may be closed before or after this one."""
        return LocalFile(
            self.path if use.path is None else use.path,
            os.dup(self.descriptor),
            writable=use.writable and self.writable,
            sharing=use.sharing,
            direct=use.direct,
            request_owner=self.request_owner,
            already_open=True,
        )

    @property
    def tells_holes(self) -> bool:
        """Whether `data_ranges` knows holes that the engine, which asks the host, does not."""
        return False

    @property
    def place(self) -> tuple[tuple[int, int], int]:
        """Where the bytes lie: `identity`, and the start of the window. Members of one archive have one identity."""
        return self.identity, 0 if self.window is None else self.window[0]

    def require_present(self, offset: int, length: int) -> None:
        """Have the bytes of the range here, if the file is a copy that comes block by block."""
        if self.presence is not None:
            self.presence.require(offset, length)

    @property
    def data_descriptor(self) -> int:
        """The descriptor for guest data: the O_DIRECT one where there is one."""
        return self.descriptor if self._data_descriptor is None else self._data_descriptor

    def _open_direct(self, *, already_open: bool) -> None:
        """A second open file with O_DIRECT; a host that has none of it is used without."""
        flags = (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_DIRECT
        try:
            self._data_descriptor = os.open(f"/proc/self/fd/{self.descriptor}", flags)
            self.direct = True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise from_os_error(error, path=self.path, op="open the image for direct I/O") from error
            return
        if self.request_owner is not None:
            mark_requests(self._data_descriptor, self.path, self.request_owner, already_open=already_open)

    def _refuse_read_only_device(self) -> None:
        """Raise ImageError(read_only) for a device that can be opened for writing and then refuses every write."""
        try:
            (read_only,) = struct.unpack("i", fcntl.ioctl(self.descriptor, _BLKROGET, bytes(4)))
        except OSError:
            return  # a device without the question
        if read_only:
            raise ImageError(
                ErrorKind.READ_ONLY,
                "is a read-only block device",
                path=self.path,
                op="open the image",
                remedy="have the device writable (blockdev --setrw, losetup without -r), or only read it",
            )

    def real_path(self) -> str:
        """Where the open file is now, symbolic links resolved.

        Linux does not say it of a file that was opened before it got its name (O_TMPFILE). That is where `path` leads.
        """
        path = os.readlink(f"/proc/self/fd/{self.descriptor}")
        named = os.path.realpath(self.path)
        return named if self._is_at(named) and not self._is_at(path) else path

    def unlink(self) -> None:
        """Remove the name of the file, wherever that is now: not a link that led to it, and no other file of that name.

        Raises OSError.
        """
        path = self.real_path()
        status = os.lstat(path)
        if (status.st_dev, status.st_ino) == self.identity:
            os.unlink(path)

    def _is_at(self, path: str) -> bool:
        try:
            status = os.lstat(path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.identity

    def size(self) -> int:
        """Length in bytes now (of a block device: its capacity)."""
        try:
            if self.is_block_device:
                return os.lseek(self.descriptor, 0, os.SEEK_END)
            now = os.fstat(self.descriptor).st_size
        except OSError as error:
            raise from_os_error(error, path=self.path, op="ask for the size") from error
        self._known_size = max(self._known_size, now)
        return now

    @property
    def sector_size(self) -> int | None:
        """Bytes of a sector, by which a block device is addressed; None: it is none, or does not say it."""
        if not self.is_block_device:
            return None
        try:
            (size,) = struct.unpack("i", fcntl.ioctl(self.descriptor, _BLKSSZGET, bytes(4)))
        except OSError:
            return None
        return int(size) if size > 0 else None

    def require_whole(self) -> None:
        """Raise ImageError(io) if somebody has made the file shorter than it was seen to be."""
        known = self._known_size
        now = self.size()
        if now < known:
            raise truncated(self.path, offset=now)

    def forget_cached(self) -> None:
        """Make the file durable, and have the host drop what it has of it in memory, where it heeds that."""
        try:
            os.fsync(self.descriptor)
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise from_os_error(error, path=self.path, op="drop the cache of the file") from error

    def allocated_size(self) -> int:
        """Bytes that the host has allocated for the file."""
        if self.is_block_device:
            return self.size()
        return os.fstat(self.descriptor).st_blocks * 512

    def modified_seconds(self) -> int:
        """The modification time in whole seconds since 1970."""
        return int(os.fstat(self.descriptor).st_mtime)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end of the file.

        Images name places that no file can have. Those are behind the end, too. Raises ImageError(io) where the file
        has had bytes which it has no more.
        """
        length = min(length, _POSITIONS_END - offset)
        end, known = offset + length, self._known_size
        if length > _LONG_READ:
            length = min(length, self.size() - offset)  # memory is taken for all of it
        pieces: list[bytes] = []
        try:
            if self.presence is None and 0 < length <= _LONG_READ:  # nearly every read of metadata is one of the host
                piece = os.pread(self.descriptor, length, offset)
                if len(piece) == length:
                    return piece
            with nullcontext() if self.presence is None else self.presence.kept(offset, length):
                while length > 0:
                    piece = os.pread(self.descriptor, length, offset)
                    if not piece:
                        break
                    pieces.append(piece)
                    offset += len(piece)
                    length -= len(piece)
        except OSError as error:
            raise from_os_error(error, path=self.path, op="read metadata", offset=offset) from error
        if offset < min(end, known):
            raise truncated(self.path, offset=offset)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The ranges inside the request that may hold other than zeros (SEEK_DATA).

        Raises ImageError(io) if somebody has made the file shorter: what it has lost is no hole.
        """
        self.require_whole()
        end = min(offset + length, self.size())
        if self.presence is not None:  # what is not here looks like a hole
            if offset < end:
                yield offset, end - offset
            return
        while offset < end:
            try:
                data = os.lseek(self.descriptor, offset, os.SEEK_DATA)
                hole = os.lseek(self.descriptor, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                    return
                yield offset, end - offset  # the host cannot tell
                return
            if data >= end:
                return
            yield data, min(hole, end) - data
            offset = hole

    def close(self) -> None:
        """Close the descriptors; the lock goes with them. Closing twice is allowed."""
        for descriptor in (self._data_descriptor, self.descriptor):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._data_descriptor = None
        self.descriptor = -1
