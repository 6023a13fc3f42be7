"""Several files as one, each behind the other: the pieces of an image that was split.

It is a sparse scratch file, into which a piece comes as far as it is read.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from itertools import accumulate

from tapfs.errors import from_os_error
from tapfs.host.copied import CopiedFile, Copy, Shared
from tapfs.host.file import LocalFile
from tapfs.host.packed.file import Queue, Scratch
from tapfs.host.presence import Presence
from tapfs.host.scratch import unnamed_descriptor

_BLOCK_BYTES = 1 << 20


def joined(pieces: Sequence[LocalFile], path: str) -> CopiedFile:
    """The pieces, at least one, as one file, read-only; they are taken over. Raises ImageError."""
    origin = _Pieces(pieces)
    try:
        scratch = unnamed_descriptor("join the pieces")
    except BaseException:
        origin.close()
        raise
    copy = Copy(scratch, origin, place=pieces[0].place)
    copy.presence = Presence(_BLOCK_BYTES, origin.size, _Copier(path, origin, Scratch(scratch)), ahead=False)
    copy.member = pieces[0].member
    try:
        os.ftruncate(scratch, origin.size)
    except OSError as error:
        copy.close()
        raise from_os_error(error, path=path, op="join the pieces") from error
    return CopiedFile(path, Shared(copy))


class _Pieces:
    """Open files, each behind the other: a `tapfs.host.copied.Origin`."""

    def __init__(self, pieces: Sequence[LocalFile]) -> None:
        self._pieces = tuple(pieces)
        self._ends = list(accumulate(piece.size() for piece in pieces))
        self.size = self._ends[-1]

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end of the last piece."""
        found: list[bytes] = []
        end = min(offset + length, self.size)
        while offset < end:
            number = bisect.bisect_right(self._ends, offset)
            start = self._ends[number - 1] if number else 0
            content = self._pieces[number].read(offset - start, min(end, self._ends[number]) - offset)
            if not content:
                break
            found.append(content)
            offset += len(content)
        return b"".join(found)

    def allocated_size(self) -> int:
        """Bytes that the pieces take on the host."""
        return sum(piece.allocated_size() for piece in self._pieces)

    def modified_seconds(self) -> int:
        """When the first piece was changed, in whole seconds since 1970."""
        return self._pieces[0].modified_seconds()

    def real_path(self) -> str:
        """The name of the first piece without symbolic links."""
        return self._pieces[0].real_path()

    def close(self) -> None:
        """Close all of them."""
        for piece in self._pieces:
            piece.close()


class _Copier(Queue):
    """Brings blocks of the pieces into the scratch file."""

    def __init__(self, path: str, pieces: _Pieces, scratch: Scratch) -> None:
        super().__init__(path)
        self._pieces = pieces
        self._scratch = scratch

    def _bring(self, offset: int, length: int) -> None:
        self._scratch.put(self._pieces.read(offset, length), offset)
