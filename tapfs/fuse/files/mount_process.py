"""Mount and unmount the file system inside an image: the work of a process outside of the mount's sandbox.

The kernel finishes these calls only after our own mount has answered. If the serving process made such a call in a
thread and were killed, the thread could not end, and would keep open the very connection that it waits for. So a child
of the process outside (`tapfs.fuse.outside`) makes the call, and ends with whoever waits for the answer. What to mount
where the user has said (`FilesWords`). A request says what was found in the image, and is not believed more than that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from tapfs.disk import blkid
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.fuse.files.file_systems import OWNERLESS_TYPES, READ_ONLY_TYPES, TYPES, kernel_type
from tapfs.fuse.files.loop_device import loop_device
from tapfs.fuse.mount_table import mounts_at, top_mount, unmount
from tapfs.fuse.settings import MountSettings
from tapfs.host.fuse_connection import open_in_mount
from tapfs.host.sandbox.confinement import Needs, enter
from tapfs.records import dataclass

_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_NOEXEC = 8
_MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1 << 5, 1 << 14, 1 << 18
_CLONE_NEWNS = 0x20000

#: The errno values of file systems that find damage.
_DAMAGED = (errno.EINVAL, errno.EUCLEAN, errno.EBADMSG)

_NODE = re.compile(r"disk|part\d+")


@dataclass(frozen=True, slots=True)
class FilesWords:
    """What the user has said of a mount that shows files. `image` is the image's name, for messages."""

    image: str
    mountpoint: str
    settings: MountSettings
    writable: bool

    def writes(self, type_name: str) -> bool:
        """Whether a file system of blkid's type is mounted writable."""
        return self.writable and type_name not in READ_ONLY_TYPES

    def require_known(self, type_name: str) -> None:
        """Raise ImageError(unsupported) for what is no type of file systems."""
        if type_name not in TYPES:
            said = "what is in there is no file system that tapfs has mounted"
            raise ImageError(ErrorKind.UNSUPPORTED, said, path=self.image, op="mount")

    def owner_options(self, type_name: str) -> list[str]:
        """Owner and modes where the file system has none of its own. Raises ImageError(unsupported) where it has."""
        chosen = self.settings
        options = [f"{name}={value}" for name, value in (("uid", chosen.uid), ("gid", chosen.gid)) if value is not None]
        if chosen.umask is not None:
            options.append(f"umask={chosen.umask:03o}")
        if options and type_name not in OWNERLESS_TYPES:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"{type_name} has owners and modes of its own: {', '.join(options)} cannot change them",
                path=self.image,
                op="mount",
            )
        return options


@dataclass(frozen=True, slots=True)
class MountRequest:
    """Have the kernel mount the bytes ``[offset, offset + size)`` of the disk, a file system of blkid's `type`.

    `remarks` stand after a message that tells of damage.
    """

    type: str
    offset: int
    size: int
    remarks: Sequence[str]


@dataclass(frozen=True, slots=True)
class UnmountRequest:
    """Write back and unmount; `force`: also if that fails or it is in use (then when its last user ends)."""

    force: bool
    write_back: bool


@dataclass(frozen=True, slots=True)
class TypeRequest:
    """Ask libblkid for the type of the file system in a node of the tree, in a sandbox, for it parses that."""

    node: str


@dataclass(frozen=True, slots=True)
class SettleRequest:
    """Have the file system of `device` whole on its disk, though another mount covers it."""

    device: str


@dataclass(frozen=True, slots=True)
class LookRequest:
    """See that the files answer, shown by whom they may be."""


Request = MountRequest | UnmountRequest | TypeRequest | SettleRequest | LookRequest

_REQUESTS: dict[str, type[Request]] = {
    "mount files": MountRequest,
    "unmount files": UnmountRequest,
    "type": TypeRequest,
    "settle": SettleRequest,
    "look at files": LookRequest,
}


def message_of(request: Request) -> dict[str, object]:
    """The request as a message."""
    name = next(name for name, kind in _REQUESTS.items() if isinstance(request, kind))
    return {"request": name, **asdict(request)}


def request_of(message: Mapping[str, Any]) -> Request | None:
    """The reverse; None: it is none of these. Raises TypeError for one that lacks something."""
    kind = _REQUESTS.get(message["request"])
    return None if kind is None else kind(**{name: value for name, value in message.items() if name != "request"})


def perform(request: Request, words: FilesWords, tree_directory: str) -> str | bool | None:
    """Do it, in a process that has nothing else to do. Raises ImageError."""
    match request:
        case MountRequest():
            return _mount(request, words, tree_directory)
        case UnmountRequest():
            return _unmount(request, words.mountpoint)
        case TypeRequest():
            with opened_node(tree_directory, request.node, os.O_RDONLY, words) as node:
                if words.settings.confined:
                    enter(Needs(read=(f"/proc/self/fd/{node}",)))
                return _type_of(node)
        case SettleRequest():
            return _settle(request, words.mountpoint)
        case LookRequest():
            os.statvfs(words.mountpoint)
            return True


def node_path(tree_directory: str, node: str) -> str:
    """Where a node of the tree lies. Raises ImageError(invalid_argument) for what is no name of one."""
    if not _NODE.fullmatch(node):
        raise ImageError(ErrorKind.INVALID_ARGUMENT, "is no node of a disk", path=node, op="mount")
    return os.path.join(tree_directory, node)


@contextmanager
def opened_node(tree_directory: str, node: str, flags: int, words: FilesWords) -> Generator[int]:
    """A node of the tree, opened: a file of the mount of the disk, whatever its server shows there.

    Raises ImageError, (denied) for what is no such file. Errors name the image.
    """
    node_path(tree_directory, node)
    mount = top_mount(tree_directory)
    try:
        descriptor = open_in_mount(tree_directory, node, flags)
    except ImageError as error:
        error.path = words.image
        raise
    try:
        device = os.fstat(descriptor).st_dev
        if mount is None or mount.device != f"{os.major(device)}:{os.minor(device)}":
            raise ImageError(ErrorKind.DENIED, "its node is no file of its mount", path=words.image, op="mount")
        yield descriptor
    finally:
        os.close(descriptor)


def _mount(request: MountRequest, words: FilesWords, tree_directory: str) -> bool:
    words.require_known(request.type)
    kind = kernel_type(request.type)
    writable = words.writes(request.type)
    options = [*kind.always, *(() if writable else kind.read_only)]
    options += [*words.owner_options(request.type), *words.settings.inner]
    wanted = words.settings.flags
    flags = 0 if writable else _MS_RDONLY
    flags |= 0 if "suid" in wanted else _MS_NOSUID
    flags |= 0 if "dev" in wanted else _MS_NODEV
    flags |= _MS_NOEXEC if "noexec" in wanted else 0
    libc = ctypes.CDLL(None, use_errno=True)
    access = os.O_RDWR if writable else os.O_RDONLY
    place = node_path(tree_directory, "disk")
    part = {"offset": request.offset, "size": request.size}
    with (
        opened_node(tree_directory, "disk", access, words) as disk,
        loop_device(disk, place, **part, writable=writable, name=words.image) as device,
    ):
        result = libc.mount(
            os.fsencode(device),
            os.fsencode(words.mountpoint),
            kind.name.encode(),
            ctypes.c_ulong(flags),
            os.fsencode(",".join(options)),
        )
        number = ctypes.get_errno()
    if result != 0:
        raise _refusal(number, request, words.image)
    return True


def _refusal(number: int, request: MountRequest, image: str) -> ImageError:
    """What mount(2) means by an errno."""
    if number == errno.ENODEV:
        said = f"the kernel does not know {request.type}"
        remedy = f"mount it without --files, and read the {request.type} file system there with a program that knows it"
        return ImageError(ErrorKind.UNSUPPORTED, said, path=image, op="mount", remedy=remedy)
    if number in _DAMAGED:
        said = f"the kernel does not mount the {request.type} file system: it seems damaged"
        said = "; ".join((said, *request.remarks, "dmesg may say more"))
        return ImageError(ErrorKind.CORRUPT, said, path=image, op="mount")
    error = from_os_error(OSError(number, ""), path=image, op=f"mount the {request.type} file system")
    error.message = "; ".join((error.message, *request.remarks))
    return error


def _unmount(request: UnmountRequest, mountpoint: str) -> bool:
    """Whether it is gone, not only out of sight."""
    if request.write_back:
        try:
            _write_back(mountpoint)
        except OSError as error:
            if not request.force:
                raise from_os_error(error, path=mountpoint, op="write back the file system") from error
    try:
        unmount(mountpoint)
    except ImageError as error:
        if not request.force or error.kind is not ErrorKind.LOCKED:
            raise
        unmount(mountpoint, lazy=True)
        return False
    return True


def _settle(request: SettleRequest, mountpoint: str) -> bool:
    """Whether it is read-only now; if somebody writes there, all that was written is on the disk at least.

    What covers it is taken away in a namespace of this process's own, where nobody else sees that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        number = ctypes.get_errno()
        raise from_os_error(OSError(number, os.strerror(number)), path=mountpoint, op="reach what is covered")
    for _ in mounts_at(mountpoint):
        top = top_mount(mountpoint)
        if top is None or top.device == request.device:
            break
        unmount(mountpoint, lazy=True)
    try:
        _write_back(mountpoint)
    except OSError as error:
        raise from_os_error(error, path=mountpoint, op="write back the file system") from error
    return bool(libc.mount(None, os.fsencode(mountpoint), None, _MS_REMOUNT | _MS_RDONLY, None) == 0)


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


def _type_of(disk: int) -> str | None:
    """Blkid's word, from all of the open disk; None if libblkid knows none, more than one, or is not there."""
    found = blkid.identify_file(disk)
    return found[0].type if len(found) == 1 else None
