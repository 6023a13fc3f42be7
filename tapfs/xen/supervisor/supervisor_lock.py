"""One supervisor to a host: a lock in the runtime directory that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.serving.runtime_directory import make_private
from tapfs.xen.runtime_files import directory, open_lock, supervisor_lock_path

_TAKING = "take the supervisor's lock"


def take_supervisor_lock() -> int:
    """Make the runtime directory and take the lock in it; it is held as long as the descriptor is open.

    Raises ImageError(locked), which names the process that supervises already, or ImageError(denied, io, no_space).
    """
    place = directory()
    make_private(place.parent)
    make_private(place)
    path = supervisor_lock_path()
    descriptor = open_lock(path, op=_TAKING)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise ImageError(
            ErrorKind.LOCKED,
            f"the disks of this host are supervised already, by process {holder}",
            path=str(path),
            op=_TAKING,
            remedy="end that one first",
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise from_os_error(error, path=str(path), op=_TAKING) from error
    return descriptor


def _holder(descriptor: int) -> str:
    """The pid that the holder has written; it may be just about to."""
    text = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
    return text if text.isdecimal() else "of unknown number"
