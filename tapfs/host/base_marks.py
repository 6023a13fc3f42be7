"""Notes on a host file itself: the overlays that lie over it, and the format that it has taken over.

The notes are extended attributes, so they go where the file goes, whatever name it gets. A host without attributes has
no notes. Only root can note a format, because it overrules what a user says of the file: whoever could give a file to
a stranger with such a note would choose how it is read, and so which further files are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from tapfs.errors import from_os_error

#: The second for devices and the like, which have no attributes of users.
_OVERLAYS = ("user.tapfs.overlays", "trusted.tapfs.overlays")
_FORMAT = ("trusted.tapfs.format",)
#: ext4 keeps all attributes of a file in one block.
_MAX_BYTES = 2048


def overlays_over(descriptor: int) -> list[str]:
    """The overlays that were made over the open file, the newest first. They may be gone, or lie over another since."""
    return [os.fsdecode(name) for name in _read(descriptor, _OVERLAYS).split(b"\0") if name]


def note_overlay(descriptor: int, overlay: str) -> bool:
    """Note that the absolute path `overlay` is an overlay over the open file; whether the host keeps the note.

    The oldest notes go where there are too many.
    """
    names = [overlay, *(name for name in overlays_over(descriptor) if name != overlay)]
    noted = b""
    for name in map(os.fsencode, names):
        if len(noted) + len(name) + 1 > _MAX_BYTES:
            break
        noted += name + b"\0"
    return bool(noted) and _write(descriptor, _OVERLAYS, noted)


def forget_overlay(descriptor: int, overlay: str) -> None:
    """Note no more that `overlay` lies over the open file."""
    names = overlays_over(descriptor)
    overlay = os.path.abspath(overlay)
    if overlay in names:
        noted = b"".join(os.fsencode(name) + b"\0" for name in names if name != overlay)
        _write(descriptor, _OVERLAYS, noted)


def format_taken_over(descriptor: int) -> str | None:
    """The format of an open file whose name stood for an image of another format before (`tapfs.disk.leaf`)."""
    found = _read(descriptor, _FORMAT).decode("ascii", "replace")
    return found or None


def take_over_format(descriptor: int, name: str, path: str) -> None:
    """Note the format. Raises ImageError(unsupported) where the host keeps no such note."""
    if not _write(descriptor, _FORMAT, name.encode()):
        error = OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        raise from_os_error(error, path=path, op="note its format")


def _read(descriptor: int, names: Sequence[str]) -> bytes:
    for name in names:
        try:
            return os.getxattr(descriptor, name)
        except OSError:
            continue  # what cannot be read says nothing
    return b""


def _write(descriptor: int, names: Sequence[str], value: bytes) -> bool:
    for name in names:
        try:
            os.setxattr(descriptor, name, value)
        except OSError:
            continue  # a file of another user, a file system that is full or only read, no attributes
        return True
    return False
