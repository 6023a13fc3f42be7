"""The host files of an image as its driver sees them: metadata reads, and a way to open the files that the image names.

File 0 is the file that the user named. An image may consist of more files: a VMDK descriptor names its extents, a qcow2
image its data file. The driver asks for each of them by :class:`FurtherFiles` and gets a number, which extents,
placements and plan steps carry. Whether a name may be opened is decided outside the driver (`tapfs.host.gate`).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Protocol

from tapfs.errors import ErrorKind, ImageError
from tapfs.records import NamedTuple


class HostFile(Protocol):
    """A host file as a driver sees it: metadata reads only."""

    @property
    def path(self) -> str:
        """The name for messages."""
        ...

    def size(self) -> int:
        """Length in bytes now (of a block device: its capacity)."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end of the file.

        Raises ImageError(io) when the host cannot read.
        """
        ...

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The ``(offset, length)`` ranges inside the request that may hold other than zeros.

        Ascending and disjoint. What lies between them is a hole of the host file system and
        reads as zeros. A host that cannot tell answers the whole request.
        """
        ...


class Presence(Protocol):
    """Which blocks of a host file are here, for the engine; `tapfs.host.presence` fetches the others."""

    @property
    def block_bytes(self) -> int:
        """The length of a block."""
        ...

    @property
    def blocks(self) -> bytearray:
        """One byte a block, 0 where the block is not here; never resized."""
        ...


class Role(Enum):
    """What a further host file is for. A parent is none: the chain opens it as a layer of its own."""

    #: Guest data. The file is writable if the image is.
    DATA = "data"
    #: Guest data that is never changed.
    READ_ONLY_DATA = "read-only data"
    #: No guest data: a text about the image, which is never changed. Layers of one chain may share it.
    DESCRIPTION = "description"
    #: A journal of the image's metadata. The file is writable if the image is.
    LOG = "log"


class NumberedFile(NamedTuple):
    """A host file of an image and its number: the `file` of extents, placements and plan steps."""

    number: int
    file: HostFile


class FurtherFiles(Protocol):
    """Opens the host files that an image names."""

    def open(self, name: str, role: Role) -> NumberedFile:
        """Open the file `name`; a relative name starts at the folder of the image.

        A file that is open already keeps its number, whatever name it is given. The file is
        locked as the image is and closed with it. Raises ImageError: not_found, denied (the
        user's gate refuses it), locked, invalid_format (a directory, a pipe).
        """
        ...


class NoFurtherFiles:
    """The :class:`FurtherFiles` of an image that stands alone: every name is refused."""

    def open(self, name: str, role: Role) -> NumberedFile:
        """Raise ImageError(denied)."""
        raise ImageError(
            ErrorKind.DENIED, f"names a further file, and none may be opened: {name!r} ({role.value})", op="open"
        )
