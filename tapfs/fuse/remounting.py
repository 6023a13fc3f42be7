"""Change a mount between read-only and writable in the kernel, for `mount -o remount,ro DIR`."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.fuse.mount_table import holders, top_mount
from tapfs.fuse.registry import Registry

_MS_RDONLY = 1
_MS_REMOUNT = 32

#: Flags of a mount that statvfs(2) tells with the numbers of mount(2): nosuid, nodev, noexec, and those of times.
_KEPT_FLAGS = 2 | 4 | 8 | 1024 | 2048


def remount(mountpoint: str, *, writable: bool) -> None:
    """Have the kernel refuse or take writes from now on; the image stays open as it was.

    Raises ImageError(not_found) if no image of ours is mounted there, (read_only) if its image was opened
    read-only, (locked) if a file is open for writing.
    """
    real = os.path.realpath(mountpoint)
    registry = Registry()
    entry = registry.find(real)
    if entry is None or not entry.alive or registry.mount_of(entry) != top_mount(real):
        raise ImageError(ErrorKind.NOT_FOUND, "no image is mounted here", path=mountpoint, op="remount")
    if writable and entry.mode != "rw":
        raise ImageError(
            ErrorKind.READ_ONLY,
            "its image was opened read-only",
            path=mountpoint,
            op="remount",
            remedy="unmount it, and mount it with {rw}",
        )
    flags = _MS_REMOUNT | (0 if writable else _MS_RDONLY) | (os.statvfs(real).f_flag & _KEPT_FLAGS)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, os.fsencode(real), None, ctypes.c_ulong(flags), None) != 0:
        raise _refusal(ctypes.get_errno(), mountpoint, real)
    if not writable and entry.shows == "disk":
        _flush(os.path.join(real, "disk"))


def _refusal(number: int, mountpoint: str, real: str) -> ImageError:
    if number == errno.EBUSY:
        by = ", ".join(holders(real))
        said = "is busy: a file is open for writing" + (f"; used by {by}" if by else "")
        return ImageError(ErrorKind.LOCKED, said, path=mountpoint, op="remount", remedy="end that use first")
    return from_os_error(OSError(number, ""), path=mountpoint, op="remount")


def _flush(disk: str) -> None:
    """Have the image's metadata written, which otherwise waits some seconds for the next flush."""
    with suppress(OSError):  # the mount is read-only already: it flushes later what it cannot now
        descriptor = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
