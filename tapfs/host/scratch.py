"""Scratch files: space on the host that has no name, so it is gone with its last descriptor, also after a crash."""

from __future__ import annotations

import os

from tapfs.errors import ErrorKind, from_os_error

#: Folders for scratch files if $TMPDIR is not set. The files can be large, and /tmp may be memory.
_FOLDERS = ("/var/tmp", "/tmp")  # noqa: S108  the file has no name there


def scratch_folder() -> str:
    """The folder of scratch files: what TMPDIR names, or the first of the usual ones that is there."""
    return os.environ.get("TMPDIR") or next(filter(os.path.isdir, _FOLDERS), _FOLDERS[0])


def unnamed_descriptor(operation: str) -> int:
    """A descriptor of a new, empty file without a name, to be closed by the caller. Raises ImageError.

    A TMPDIR that cannot be used is an error. It may be set so that the data lies on a disk that is encrypted or large
    enough, and another folder would be neither.
    """
    import tempfile  # those that need no scratch space need not load it

    folder = scratch_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as unnamed:
            return os.dup(unnamed.fileno())
    except OSError as error:
        failed = from_os_error(error, path=folder, op=operation)
        if os.environ.get("TMPDIR"):
            failed.remedy = "TMPDIR names this folder: make it usable, name another, or unset TMPDIR for /var/tmp"
        raise failed from error


class ScratchFile:
    """A `tapfs.driver.Scratch` on the host's disk; the file is made when something is first put into it."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._length = 0

    def append(self, data: bytes) -> None:
        """Add to the end. Raises ImageError(no_space, io)."""
        if self._descriptor < 0:
            self._descriptor = unnamed_descriptor("make a scratch file")
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._descriptor, view, self._length)
                self._length += written
                view = view[written:]
        except OSError as error:
            failed = from_os_error(error, path=None, op="write to a scratch file")
            if failed.kind is ErrorKind.NO_SPACE:
                failed.remedy = "set TMPDIR to a folder with more space"
            raise failed from error

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end. Raises ImageError(io)."""
        pieces: list[bytes] = []
        try:
            while length and (piece := os.pread(self._descriptor, length, offset)):
                pieces.append(piece)
                offset += len(piece)
                length -= len(piece)
        except OSError as error:
            raise from_os_error(error, path=None, op="read a scratch file") from error
        return b"".join(pieces)

    def close(self) -> None:
        """Give the space back; closing twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
