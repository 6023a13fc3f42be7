"""Loop devices: show a file as a block device that is released with its last user.

The numbers and structures are those of <linux/loop.h>; LOOP_CONFIGURE needs Linux 5.8.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Generator
from contextlib import contextmanager

from tapfs.errors import ErrorKind, ImageError, from_os_error

_CONTROL = "/dev/loop-control"

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16

#: struct loop_config: fd, block_size, struct loop_info64, 8 reserved words.
_CONFIG = struct.Struct("=II 5Q 4I 64s 64s 32s 2Q 64x")
_NAME_BYTES = 64

#: Errors of opening and setting up where the kernel or the container has no loop devices, or too old ones.
_NOT_HERE = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTTY)

#: Others look for a free device at the same time; this many of them may be faster than we.
_ATTEMPTS = 64


@contextmanager
def loop_device(backing: int, path: str, *, offset: int, size: int, writable: bool, name: str) -> Generator[str]:
    """The bytes ``[offset, offset + size)`` of an open file as a block device, by its name in /dev.

    It is there while somebody has it open: at the end of the context it is gone unless
    something is mounted from it, and then with that. I/O is direct where the file takes it, so
    that nothing is cached twice. The kernel is told the file's `path`; errors name the file as `name`.
    Raises ImageError(unsupported, denied, io).
    """
    node, device = _configured(backing, path, offset, size, writable=writable, name=name)
    try:
        yield node
    finally:
        os.close(device)


def _configured(backing: int, path: str, offset: int, size: int, *, writable: bool, name: str) -> tuple[str, int]:
    """A device set up for an open file: its node and a descriptor that keeps it."""
    flags = _LO_FLAGS_AUTOCLEAR | (0 if writable else _LO_FLAGS_READ_ONLY)
    wanted = [flags | _LO_FLAGS_DIRECT_IO, flags]
    for _ in range(_ATTEMPTS):
        node, device = _free_device(name)
        try:
            _configure(device, backing, path, offset, size, wanted[0])
        except OSError as error:
            os.close(device)
            if error.errno == errno.EINVAL and len(wanted) > 1:
                del wanted[0]  # the file takes no direct I/O
            elif error.errno in _NOT_HERE:
                raise _unusable(node, error, name) from error
            elif error.errno != errno.EBUSY:
                raise from_os_error(error, path=name, op="set up a loop device") from error
        else:
            return node, device
    raise ImageError(ErrorKind.LOCKED, "others take every free loop device", path=name, op="set up a loop device")


def _free_device(name: str) -> tuple[str, int]:
    """A device that was free a moment ago, opened: its node and the descriptor. Errors are of the file `name`.

    Raises ImageError(unsupported, denied) where there is none to open. Some containers have no nodes for
    devices that the kernel has made since they were started.
    """
    node = _CONTROL
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
        finally:
            os.close(control)
        node = f"/dev/loop{number}"
        return node, os.open(node, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(node, error, name) from error


def _unusable(node: str, error: OSError, name: str) -> ImageError:
    """The error of the file `name` for a loop device that is not there, or not for us."""
    if error.errno in _NOT_HERE:
        return ImageError(ErrorKind.UNSUPPORTED, f"there is no {node} here", path=name, op="mount")
    return from_os_error(error, path=name, op=f"open {node}")


def _configure(device: int, backing: int, path: str, offset: int, size: int, flags: int) -> None:
    name = os.fsencode(path)[: _NAME_BYTES - 1]
    config = _CONFIG.pack(backing, 0, 0, 0, 0, offset, size, 0, 0, 0, flags, name, b"", b"", 0, 0)
    fcntl.ioctl(device, _LOOP_CONFIGURE, config)
