"""Loop devices: a file as a block device, which goes away by itself with its last user.

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

_MAJOR = 7

#: Others look for a free device at the same time; this many of them may be faster than we.
_ATTEMPTS = 64


def available() -> bool:
    """Whether this kernel, or container, has loop devices at all."""
    return os.path.exists(_CONTROL)


@contextmanager
def loop_device(path: str, *, offset: int, size: int, writable: bool) -> Generator[str]:
    """The bytes ``[offset, offset + size)`` of a file as a block device, by its name in /dev.

    It is there while somebody has it open: at the end of the context it is gone unless
    something is mounted from it, and then with that. I/O is direct where the file takes it, so
    that nothing is cached twice. Raises ImageError(unsupported, denied, io).
    """
    try:
        backing = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, path=path, op="open") from error
    try:
        name, device = _configured(backing, path, offset, size, writable=writable)
    finally:
        os.close(backing)
    try:
        yield name
    finally:
        os.close(device)


def _configured(backing: int, path: str, offset: int, size: int, *, writable: bool) -> tuple[str, int]:
    """A device set up for an open file: its name and a descriptor that keeps it."""
    flags = _LO_FLAGS_AUTOCLEAR | (0 if writable else _LO_FLAGS_READ_ONLY)
    wanted = [flags | _LO_FLAGS_DIRECT_IO, flags]
    try:
        for _ in range(_ATTEMPTS):
            name, device = _free_device()
            try:
                _configure(device, backing, path, offset, size, wanted[0])
            except OSError as error:
                os.close(device)
                if error.errno == errno.EINVAL and len(wanted) > 1:
                    del wanted[0]  # the file takes no direct I/O
                elif error.errno != errno.EBUSY:
                    raise
            else:
                return name, device
    except OSError as error:
        raise from_os_error(error, path=path, op="set up a loop device") from error
    raise ImageError(ErrorKind.LOCKED, "others take every free loop device", path=path, op="set up a loop device")


def _free_device() -> tuple[str, int]:
    """A device that was free a moment ago, opened. Some containers make no nodes for new ones."""
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    finally:
        os.close(control)
    name = f"/dev/loop{number}"
    return name, os.open(name, os.O_RDWR | os.O_CLOEXEC)


def _configure(device: int, backing: int, path: str, offset: int, size: int, flags: int) -> None:
    name = os.fsencode(path)[: _NAME_BYTES - 1]
    config = _CONFIG.pack(backing, 0, 0, 0, 0, offset, size, 0, 0, 0, flags, name, b"", b"", 0, 0)
    fcntl.ioctl(device, _LOOP_CONFIGURE, config)
