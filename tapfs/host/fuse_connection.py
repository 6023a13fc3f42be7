"""Mount without libfuse, and get the connection to the kernel as a descriptor that this process may read.

Root mounts by mount(2). Where mount(2) is not allowed, fusermount3 mounts for its user and passes the connection over
a socket.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from tapfs.errors import ErrorKind, ImageError, from_os_error

#: The type of our file systems in the mount table: `fuse` and the subtype that we mount with.
FILE_SYSTEM_TYPE = "fuse.tapfs"

_DEVICE = "/dev/fuse"

#: FUSE_DEV_IOC_CLONE, with the number of a descriptor.
_CLONE = 0x8004E500
_NUMBER = struct.Struct("=I")

_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_NOEXEC = 8


class MountOptions(NamedTuple):
    """What the kernel is told: `source` is what the mount table names as mounted, `others` further FUSE options.

    `type` is that of the mount table. Of `flags` there are suid, dev and noexec.
    """

    source: str
    read_only: bool
    others: Sequence[str] = ("default_permissions",)
    type: str = FILE_SYSTEM_TYPE
    flags: frozenset[str] = frozenset()


def connect(mountpoint: str, options: MountOptions, *, follow: bool = True) -> int:
    """Mount on a directory; the descriptor of the connection, to be closed by the caller.

    Without `follow` a symbolic link at this place is refused. fusermount3 itself refuses one.
    Raises ImageError(denied, io, …). Nothing answers the mount before its first request is read.
    """
    if os.geteuid() == 0:
        with _held(mountpoint, follow=follow) as place:
            descriptor = _mount_directly(place, mountpoint, options)
        if descriptor is not None:
            return descriptor
    return _mount_by_helper(mountpoint, options)


def open_in_mount(folder: str, name: str, flags: int) -> int:
    """Open a file right in a mounted file system whose server is not trusted; the descriptor, for the caller to close.

    A link, a device and what lies in another file system would be no file of that server. Raises ImageError.
    """
    path = os.path.join(folder, name)
    held: list[int] = []
    try:
        held.append(os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
        held.append(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=held[0]))
        mounted, found = map(os.fstat, held)
        if not stat.S_ISREG(found.st_mode) or found.st_dev != mounted.st_dev:
            raise ImageError(ErrorKind.DENIED, "is no file of its mount", path=path, op="open")
        return os.open(f"/proc/self/fd/{held[1]}", flags | os.O_CLOEXEC)
    except ImageError:
        raise
    except OSError as error:
        raise from_os_error(error, path=path, op="open") from error
    finally:
        for descriptor in held:
            os.close(descriptor)


def further_connections(connection: int, count: int) -> list[int]:
    """So many further descriptors of the connection, each of which a thread can read and answer.

    There are fewer where the kernel gives no more. They are to be closed by the caller.
    """
    further: list[int] = []
    with suppress(OSError):
        while len(further) < count:
            further.append(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
            try:
                fcntl.ioctl(further[-1], _CLONE, _NUMBER.pack(connection))
            except OSError:
                os.close(further.pop())
                raise
    return further


@contextmanager
def _held(mountpoint: str, *, follow: bool) -> Generator[str]:
    """A path by which mount(2) finds the mount point: without `follow` that of the directory itself, held open."""
    if follow:
        yield mountpoint
        return
    try:
        directory = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path=mountpoint, op="mount") from error
    try:
        yield f"/proc/self/fd/{directory}"
    finally:
        os.close(directory)


def _mount_directly(place: str, mountpoint: str, options: MountOptions) -> int | None:
    """By mount(2), on the directory that `place` leads to; None where this root may not. Errors name `mountpoint`."""
    try:
        descriptor = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path=_DEVICE, op="open") from error
    data = [
        f"fd={descriptor}",
        "rootmode=40000",
        f"user_id={os.getuid()}",
        f"group_id={os.getgid()}",
        *options.others,
    ]
    flags = _MS_RDONLY if options.read_only else 0
    flags |= 0 if "suid" in options.flags else _MS_NOSUID
    flags |= 0 if "dev" in options.flags else _MS_NODEV
    flags |= _MS_NOEXEC if "noexec" in options.flags else 0
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.mount(
        os.fsencode(options.source),
        os.fsencode(place),
        options.type.encode(),
        ctypes.c_ulong(flags),
        ",".join(data).encode(),
    )
    if result == 0:
        return descriptor
    number = ctypes.get_errno()
    os.close(descriptor)
    if number == errno.EPERM:
        return None
    raise from_os_error(OSError(number, ""), path=mountpoint, op="mount")


def _mount_by_helper(mountpoint: str, options: MountOptions) -> int:
    program = shutil.which("fusermount3")
    if program is None:
        raise ImageError(ErrorKind.DENIED, "mounting needs fusermount3", path=mountpoint, remedy="apt install fuse3")
    words = [
        "ro" if options.read_only else "rw",
        *(f"no{name}" for name in ("suid", "dev") if name not in options.flags),
        *(["noexec"] if "noexec" in options.flags else []),
        f"fsname={escaped(options.source)}",
        f"subtype={options.type.partition('.')[2]}",
        *options.others,
    ]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        result = subprocess.run(
            [program, "-o", ",".join(words), "--", mountpoint],
            env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if result.returncode != 0:
            said = " ".join(result.stderr.decode(errors="backslashreplace").split())
            raise ImageError(kind_of_failure(said), f"cannot mount: {said}", path=mountpoint, op="mount")
        ours.setblocking(False)  # it has ended: what it sent is there
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise ImageError(ErrorKind.IO, "fusermount3 mounted, but gave no connection", path=mountpoint, op="mount")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def escaped(value: str) -> str:
    """A value as fusermount3 and libfuse take it among options, which commas separate."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


def kind_of_failure(said: str) -> ErrorKind:
    """fusermount3 and libfuse tell only in words why they did not mount."""
    refused = any(words in said for words in ("ermission denied", "not permitted", "no write access"))
    return ErrorKind.DENIED if refused else ErrorKind.IO
