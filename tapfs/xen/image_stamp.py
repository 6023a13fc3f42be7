"""Detect that an image was changed by another program after its disk was given up.

A disk process that was killed leaves a plan and a journal for the next process. If the disk was given up, the next
process may come days later. Meanwhile an operator may have mended the image with another program. The old plan and
journal would then destroy the work of that program, so they must be dropped. Therefore the supervisor notes a stamp of
the image when no process of ours can write it any more. A crash of the host takes the note, the plan and the journal
together, because all three lie on tmpfs.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from tapfs.errors import ErrorKind
from tapfs.serving.log import log
from tapfs.serving.runtime_directory import write_private

#: Errors at opening that come before the plan is touched, and while others may change the image.
NEVER_OPENED = (ErrorKind.LOCKED, ErrorKind.NOT_FOUND, ErrorKind.DENIED)

#: For an image whose changes cannot be told: a block device, or one that is away.
_UNKNOWN = "unknown"


def how_it_stands(path: str) -> str:
    """What differs when anybody has changed the file since: when its inode changed (ns), and its bytes."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return _UNKNOWN
    return f"{status.st_ctime_ns}:{status.st_size}" if stat.S_ISREG(status.st_mode) else _UNKNOWN


class GivenUp:
    """The note of one device, by its key. Nothing is raised: without a note what was left is taken as it is."""

    def __init__(self, directory: Path, key: str) -> None:
        self._note = directory / f"{key}.left"
        self._left = [directory / f"{key}{suffix}" for suffix in (".plan", ".journal")]

    def write(self, standing: str, *, instead: bool = True) -> None:
        """Note how the image stands, if there is anything that depends on it; `instead`: of an older note."""
        if any(path.exists() for path in self._left) and (instead or not self._note.exists()):
            with suppress(OSError):
                write_private(self._note, standing)

    def take(self, path: str) -> str | None:
        """The note, which is gone then: the image is to be opened. If that was changed, what was left is dropped."""
        try:
            standing = self._note.read_text()
        except OSError:
            return None
        if standing == _UNKNOWN or standing != how_it_stands(path):
            log.error("%s may have been changed since its process died: what that had not flushed is lost", path)
            for left in self._left:
                left.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        return standing
