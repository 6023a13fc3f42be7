"""Copied files: a local copy of what lies elsewhere, or is packed, as host files that share it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from tapfs.host.file import UNCHANGED, LocalFile, SecondUse
from tapfs.host.lock import Sharing
from tapfs.host.presence import Presence


class Closable(Protocol):
    """What is open."""

    def close(self) -> None:
        """Let go of it."""
        ...


Held = TypeVar("Held", bound=Closable)


class Shared(Generic[Held]):
    """Something open that has several users; the last of them closes it."""

    def __init__(self, held: Held) -> None:
        """Take it over for a first user."""
        self.held = held
        self._users = 1
        self._lock = threading.Lock()

    def taken(self) -> Shared[Held]:
        """The same for a user more."""
        with self._lock:
            self._users += 1
        return self

    def close(self) -> None:
        """Let go of it, once for each user."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.held.close()


class Origin(Closable, Protocol):
    """What a copy is one of. It is open as long as a file shows the copy."""

    def allocated_size(self) -> int:
        """Bytes that it takes where it lies."""
        ...

    def modified_seconds(self) -> int:
        """When it was changed, in whole seconds since 1970; 0 if nobody knows."""
        ...

    def real_path(self) -> str:
        """Its name."""
        ...


class Sparse(Protocol):
    """What knows which ranges of an origin read as zeros."""

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """See `tapfs.host_files.HostFile.data_ranges`."""
        ...


class Copy:
    """A local copy: its descriptor, what it is one of, and which of its blocks are here (None: all)."""

    def __init__(
        self,
        descriptor: int,
        origin: Origin,
        *,
        place: tuple[tuple[int, int], int],
        presence: Presence | None = None,
    ) -> None:
        """Take over both. `place` is the origin's (`LocalFile.place`)."""
        self.descriptor = descriptor
        self.origin = origin
        self.place = place
        self.presence = presence
        #: What tells of holes; None: nobody does.
        self.sparse: Sparse | None = None
        #: As `LocalFile` has them.
        self.packing: str | None = None
        self.member: str | None = None

    def close(self) -> None:
        """Close both."""
        os.close(self.descriptor)
        self.origin.close()


class CopiedFile(LocalFile):
    """A file that shows a local copy, and is only read. Blocks that are absent come when somebody reads them."""

    def __init__(self, path: str, copy: Shared[Copy]) -> None:
        """Take over this use of the copy, which is let go on an error, too."""
        self._copy = copy
        self._uses_copy = True
        try:
            descriptor = os.dup(copy.held.descriptor)
        except BaseException:
            copy.close()
            raise
        super().__init__(path, descriptor, writable=False, sharing=Sharing.UNCHECKED)
        self.identity = copy.held.place[0]
        self.presence = copy.held.presence
        self.packing = copy.held.packing
        self.member = copy.held.member

    def again(self, use: SecondUse = UNCHANGED) -> CopiedFile:
        """See `LocalFile.again`: what comes for the one file is there for the other. Not of a file that is closed."""
        return CopiedFile(self.path if use.path is None else use.path, self._copy.taken())

    @property
    def place(self) -> tuple[tuple[int, int], int]:
        """See `LocalFile.place`: that of the origin."""
        return self._copy.held.place

    @property
    def tells_holes(self) -> bool:
        """See `LocalFile.tells_holes`."""
        return self._copy.held.sparse is not None

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The ranges inside the request that may hold other than zeros, as the origin knows them."""
        sparse = self._copy.held.sparse
        if sparse is None:
            yield from super().data_ranges(offset, length)
        elif offset < self.size():
            yield from sparse.data_ranges(offset, min(length, self.size() - offset))

    def allocated_size(self) -> int:
        """Bytes that the origin takes where it lies."""
        return self._copy.held.origin.allocated_size()

    def modified_seconds(self) -> int:
        """When the origin was changed, in whole seconds since 1970; 0 if nobody knows."""
        return self._copy.held.origin.modified_seconds()

    def real_path(self) -> str:
        """The name of the origin."""
        return self._copy.held.origin.real_path()

    def close(self) -> None:
        """Close it, and the copy if no other file shows that; closing twice is allowed."""
        super().close()
        if self._uses_copy:
            self._uses_copy = False
            self._copy.close()
