"""Several files as one, each behind the other: the pieces of an image that was split.

Who reads metadata is given the bytes of the pieces. To the engine it is a sparse scratch file, into which a piece comes
as far as it is read.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from itertools import accumulate

from tapfs.host.file import LocalFile
from tapfs.host.lock import Sharing
from tapfs.host.packed.file import Queue, Scratch, told
from tapfs.host.presence import Presence
from tapfs.host.scratch import unnamed_descriptor

_BLOCK_BYTES = 1 << 20


class JoinedFile(LocalFile):
    """The pieces as one file, read-only. They are open as long."""

    def __init__(self, pieces: Sequence[LocalFile], path: str) -> None:
        """Take over the pieces, at least one; they are closed on an error, too. Raises ImageError."""
        self._pieces = tuple(pieces)
        self._ends = list(accumulate(piece.size() for piece in pieces))
        try:
            scratch = unnamed_descriptor("join the pieces")
            os.ftruncate(scratch, self._ends[-1])
        except BaseException:
            for piece in pieces:
                piece.close()
            raise
        super().__init__(path, scratch, writable=False, sharing=Sharing.UNCHECKED)
        self.identity = pieces[0].identity
        self.member = pieces[0].member
        self.presence = Presence(_BLOCK_BYTES, self._ends[-1], _Copier(self, Scratch(scratch)), ahead=False)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end of the last piece."""
        found: list[bytes] = []
        end = min(offset + length, self._ends[-1])
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
        """Close all of it."""
        super().close()
        for piece in self._pieces:
            piece.close()


class _Copier(Queue):
    """Brings blocks of the pieces into the scratch file."""

    def __init__(self, joined: JoinedFile, scratch: Scratch) -> None:
        super().__init__(joined.path)
        self._joined = joined
        self._scratch = scratch

    def _bring(self, offset: int, length: int) -> None:
        with told(self._joined.path):
            self._scratch.put(self._joined.read(offset, length), offset)
