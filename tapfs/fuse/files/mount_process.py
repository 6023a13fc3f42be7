"""Mount and unmount, in a process of its own, a file system that lies on a mount of ours.

The kernel finishes these calls only after our own mount has answered. If the serving process made such a call in a
thread and were killed, the thread could not end, and would keep open the very connection that it waits for. So the
serving process runs this module as a program, with a request as JSON on standard input and the answer on standard
output.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from tapfs.disk import blkid
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.fuse.files.file_systems import kernel_type
from tapfs.fuse.files.loop_device import loop_device
from tapfs.fuse.mount_table import mounts_at, top_mount, unmount
from tapfs.host.sandbox.confinement import Needs, enter
from tapfs.records import dataclass
from tapfs.serving.failures import reported
from tapfs.serving.messages import MESSAGE_LIMIT, decode, encode, failed, succeeded

_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_NOEXEC = 8
_MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1 << 5, 1 << 14, 1 << 18
_CLONE_NEWNS = 0x20000

#: The errno values of file systems that find damage.
_DAMAGED = (errno.EINVAL, errno.EUCLEAN, errno.EBADMSG)


@dataclass(frozen=True, slots=True)
class MountRequest:
    """Mount the bytes ``[offset, offset + size)`` of the file `disk`, a file system of blkid's `type`.

    `image` names it in messages, `remarks` stand after one that tells of damage.
    """

    image: str
    remarks: Sequence[str]
    disk: str
    offset: int
    size: int
    type: str
    mountpoint: str
    writable: bool
    flags: Sequence[str]
    options: Sequence[str]


@dataclass(frozen=True, slots=True)
class UnmountRequest:
    """Write back and unmount; `force`: also if that fails or it is in use (then when its last user ends)."""

    mountpoint: str
    force: bool
    write_back: bool


@dataclass(frozen=True, slots=True)
class TypeRequest:
    """Ask libblkid for the type of the file system in the file `disk`; `confined`: in a sandbox, for it parses that."""

    disk: str
    confined: bool = True


@dataclass(frozen=True, slots=True)
class SettleRequest:
    """Have the file system of `device` whole on its disk, though another mount covers it at `mountpoint`."""

    mountpoint: str
    device: str


Request = MountRequest | UnmountRequest | TypeRequest | SettleRequest

_REQUESTS: dict[str, type[Request]] = {
    "mount": MountRequest,
    "unmount": UnmountRequest,
    "type": TypeRequest,
    "settle": SettleRequest,
}


def words(request: Request) -> bytes:
    """The request as the program's input."""
    name = next(name for name, kind in _REQUESTS.items() if isinstance(request, kind))
    return encode({"request": name, **asdict(request)})


def main() -> int:
    """Do what standard input says; the answer has the `result`, or is the ImageError (tapfs.serving.messages)."""
    message = decode(sys.stdin.buffer.readline(MESSAGE_LIMIT))
    kind = _REQUESTS[message["request"]]
    arguments: dict[str, Any] = {field.name: message[field.name] for field in fields(kind)}
    answer: dict[str, object]
    try:
        answer = succeeded({"result": _perform(kind(**arguments))})
    except Exception as error:  # noqa: BLE001  the serving process is to know what it was
        answer = failed(reported(error, op=message["request"], path=None))
    sys.stdout.buffer.write(encode(answer))
    return 0


def _perform(request: Request) -> str | bool | None:
    match request:
        case MountRequest():
            return _mount(request)
        case UnmountRequest():
            return _unmount(request)
        case TypeRequest():
            if request.confined:
                enter(Needs(read=(request.disk,)))
            return _type_of(request.disk)
        case SettleRequest():
            return _settle(request)


def _mount(request: MountRequest) -> bool:
    kind = kernel_type(request.type)
    options = [*kind.always, *(() if request.writable else kind.read_only), *request.options]
    flags = 0 if request.writable else _MS_RDONLY
    flags |= 0 if "suid" in request.flags else _MS_NOSUID
    flags |= 0 if "dev" in request.flags else _MS_NODEV
    flags |= _MS_NOEXEC if "noexec" in request.flags else 0
    libc = ctypes.CDLL(None, use_errno=True)
    with loop_device(
        request.disk, offset=request.offset, size=request.size, writable=request.writable, name=request.image
    ) as device:
        result = libc.mount(
            os.fsencode(device),
            os.fsencode(request.mountpoint),
            kind.name.encode(),
            ctypes.c_ulong(flags),
            os.fsencode(",".join(options)),
        )
        number = ctypes.get_errno()
    if result != 0:
        raise _refusal(number, request)
    return True


def _refusal(number: int, request: MountRequest) -> ImageError:
    """What mount(2) means by an errno."""
    if number == errno.ENODEV:
        said = f"the kernel does not know {request.type}"
        remedy = f"mount it without --files, and read the {request.type} file system there with a program that knows it"
        return ImageError(ErrorKind.UNSUPPORTED, said, path=request.image, op="mount", remedy=remedy)
    if number in _DAMAGED:
        said = f"the kernel does not mount the {request.type} file system: it seems damaged"
        said = "; ".join((said, *request.remarks, "dmesg may say more"))
        return ImageError(ErrorKind.CORRUPT, said, path=request.image, op="mount")
    error = from_os_error(OSError(number, ""), path=request.image, op=f"mount the {request.type} file system")
    error.message = "; ".join((error.message, *request.remarks))
    return error


def _unmount(request: UnmountRequest) -> bool:
    """Whether it is gone, not only out of sight."""
    if request.write_back:
        try:
            _write_back(request.mountpoint)
        except OSError as error:
            if not request.force:
                raise from_os_error(error, path=request.mountpoint, op="write back the file system") from error
    try:
        unmount(request.mountpoint)
    except ImageError as error:
        if not request.force or error.kind is not ErrorKind.LOCKED:
            raise
        unmount(request.mountpoint, lazy=True)
        return False
    return True


def _settle(request: SettleRequest) -> bool:
    """Whether it is read-only now; if somebody writes there, all that was written is on the disk at least.

    What covers it is taken away in a namespace of this process's own, where nobody else sees that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        number = ctypes.get_errno()
        raise from_os_error(OSError(number, os.strerror(number)), path=request.mountpoint, op="reach what is covered")
    for _ in mounts_at(request.mountpoint):
        top = top_mount(request.mountpoint)
        if top is None or top.device == request.device:
            break
        unmount(request.mountpoint, lazy=True)
    try:
        _write_back(request.mountpoint)
    except OSError as error:
        raise from_os_error(error, path=request.mountpoint, op="write back the file system") from error
    return bool(libc.mount(None, os.fsencode(request.mountpoint), None, _MS_REMOUNT | _MS_RDONLY, None) == 0)


def _write_back(mountpoint: str) -> None:
    """Tell of errors: umount(2) would not."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


def _type_of(disk: str) -> str | None:
    """Blkid's word, from all of the disk; None if libblkid knows none, more than one, or is not there."""
    try:
        descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path=disk, op="open") from error
    try:
        found = blkid.identify_file(descriptor)
    finally:
        os.close(descriptor)
    return found[0].type if len(found) == 1 else None


if __name__ == "__main__":
    sys.exit(main())
