"""Exchange the names of two files at one moment, which no call of Python's library does."""

from __future__ import annotations

import ctypes
import errno
import os

from tapfs.errors import ErrorKind, ImageError, from_os_error

#: Flag of renameat2(2).
_RENAME_EXCHANGE = 2
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV)


def exchange_names(first: str, second: str) -> None:
    """Give each of two files the name of the other, durably: a crash leaves both with their own names, or neither.

    The paths are absolute and on one file system. Raises ImageError: unsupported where the host cannot do this, and
    then nothing is changed.
    """
    _exchange(first, second)
    try:
        for folder in {os.path.dirname(first), os.path.dirname(second)}:
            _sync(folder)
    except OSError as error:
        # It may not outlive a crash, so it is taken back.
        _exchange(first, second)
        raise from_os_error(error, path=first, op="exchange the names") from error


def _exchange(first: str, second: str) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    here = ctypes.c_int(-100)  # AT_FDCWD
    names = [ctypes.c_char_p(os.fsencode(name)) for name in (first, second)]
    if library.renameat2(here, names[0], here, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return
    error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if error.errno in _CANNOT:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"cannot exchange its name with that of {second} ({error.strerror})",
            path=first,
            op="exchange the names",
            remedy="name a file in the same folder, on a file system of this machine",
        ) from error
    raise from_os_error(error, path=first, op="exchange the names") from error


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
