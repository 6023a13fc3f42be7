"""A window: a range of an open host file as a file of its own, such as a member of an archive. It is only read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from tapfs.errors import ErrorKind, ImageError, truncated
from tapfs.host.copied import Shared
from tapfs.host.file import UNCHANGED, LocalFile, SecondUse
from tapfs.host.lock import Sharing


class WindowFile(LocalFile):
    """Bytes ``[start, start + length)`` of a host file, which is open as long and counts as the same file.

    `beside` opens the other files of the archive by their names; the window's file asks for nothing outside.
    """

    def __init__(
        self,
        outer: Shared[LocalFile],
        start: int,
        length: int,
        *,
        member: str,
        beside: Callable[[str], LocalFile] | None = None,
    ) -> None:
        """Take over `outer`, in which the range lies, for this user; it is let go on an error, too."""
        self._shared: Shared[LocalFile] | None = outer
        self._outer = outer.held
        try:
            descriptor = os.dup(self._outer.descriptor)
        except BaseException:
            outer.close()
            raise
        super().__init__(f"{self._outer.path}/{member}", descriptor, writable=False, sharing=Sharing.UNCHECKED)
        self.identity = self._outer.identity
        self.is_block_device = False
        self.presence = self._outer.presence
        self.packing = self._outer.packing
        self.window = start, length
        self.member = member
        self._beside = beside
        self._start = start
        self._length = length

    def open_beside(self, name: str) -> LocalFile:
        """Another file of the archive, which this one names. Raises ImageError(not_found, …)."""
        if self._beside is None:
            raise ImageError(
                ErrorKind.UNSUPPORTED, f"names the file {name}, and lies in an archive", path=self.path, op="open"
            )
        return self._beside(name)

    def require_present(self, offset: int, length: int) -> None:
        """Have the bytes of the range here."""
        self._outer.require_present(self._start + offset, min(length, self._length - offset))

    def size(self) -> int:
        """Length in bytes."""
        return self._length

    def require_whole(self) -> None:
        """Raise ImageError(io) if somebody has made the outer file shorter than it was seen to be."""
        self._outer.require_whole()

    def allocated_size(self) -> int:
        """Bytes that the range takes on the host, as far as its length says that."""
        return min(self._length, self._outer.allocated_size())

    def modified_seconds(self) -> int:
        """When the outer file was changed, in whole seconds since 1970."""
        return self._outer.modified_seconds()

    def real_path(self) -> str:
        """The name of the outer file without symbolic links, and the name in it."""
        return f"{self._outer.real_path()}/{self.member}"

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end of the range."""
        length = max(0, min(length, self._length - offset))
        content = self._outer.read(self._start + offset, length)
        if len(content) < length:
            raise truncated(self.path, offset=offset + len(content))
        return content

    @property
    def tells_holes(self) -> bool:
        """Whether the outer file does."""
        return self._outer.tells_holes

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The ranges inside the request that may hold other than zeros."""
        length = max(0, min(length, self._length - offset))
        for start, count in self._outer.data_ranges(self._start + offset, length):
            yield start - self._start, count

    def again(self, use: SecondUse = UNCHANGED) -> WindowFile:
        """See `LocalFile.again`; it is called after its outer file. Not of a file that is closed."""
        del use
        shared = Shared(self._outer) if self._shared is None else self._shared.taken()
        return WindowFile(shared, self._start, self._length, member=self.member or "", beside=self._beside)

    def close(self) -> None:
        """Close it, and the outer file if nobody else uses that; closing twice is allowed."""
        super().close()
        if self._shared is not None:
            self._shared.close()
            self._shared = None
