"""The 64-byte header of a Parallels image: fields, limits, parsing (docs/specs/parallels.md, "Header")."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.parallels.signature import MAGIC, OLD_MAGIC
from tapfs.formats.rounding import round_up

VERSION = 2
LENGTH = 64
SECTOR = 512
ENTRY_LENGTH = 4

IN_USE, CLOSED = 0x746F6E59, 0x312E3276
_EMPTY_FLAG = 1

_LAYOUT = struct.Struct("<16sIIIIIQIIIQ")

#: Clusters of Parallels have 63 sectors to 1 MiB.
MAX_CLUSTER_BYTES = 256 << 20

#: Offsets of fields, for messages.
VERSION_AT = 16
CLUSTER_AT = 28
ENTRIES_AT = 32
SECTORS_AT = 36
DATA_OFFSET_AT = 48
EXTENSION_AT = 56


class Header(NamedTuple):
    """The fields of the header."""

    magic: bytes
    version: int
    heads: int
    cylinders: int
    cluster_sectors: int
    entries: int
    sectors: int
    in_use: int
    data_offset_sectors: int
    flags: int
    extension_sectors: int

    @property
    def old(self) -> bool:
        """Whether the image is of the older kind, whose table counts sectors."""
        return self.magic == OLD_MAGIC

    @property
    def size(self) -> int:
        """Bytes of the disk. The older kind has 32 bits for its sectors."""
        return (self.sectors & 0xFFFFFFFF if self.old else self.sectors) * SECTOR

    @property
    def cluster_bytes(self) -> int:
        """Bytes of a cluster."""
        return self.cluster_sectors * SECTOR

    @property
    def table_end(self) -> int:
        """The first byte of the file behind the block allocation table."""
        return LENGTH + self.entries * ENTRY_LENGTH

    @property
    def data_offset(self) -> int:
        """The host offset of the first cluster."""
        return self.data_offset_sectors * SECTOR or round_up(self.table_end, SECTOR)

    @property
    def extension_offset(self) -> int:
        """The host offset of the cluster with the format extension, 0 if there is none."""
        return self.extension_sectors * SECTOR

    @property
    def open(self) -> bool:
        """Whether a writer has not closed the image."""
        return self.in_use == IN_USE

    @property
    def empty(self) -> bool:
        """Whether the image says that nothing was written to it."""
        return bool(self.flags & _EMPTY_FLAG)


def parse_header(head: bytes, file: HostFile) -> Header:
    """The header in `head`, the first bytes of `file`.

    Raises ImageError naming the field: invalid_format where this is no Parallels image, unsupported, out_of_bounds or
    corrupt where it is one that cannot be read.
    """
    if len(head) < LENGTH or not head.startswith((OLD_MAGIC, MAGIC)):
        raise ImageError(
            ErrorKind.INVALID_FORMAT, "not a Parallels image: no magic", path=file.path, offset=0, op="open"
        )
    header = Header(*_LAYOUT.unpack_from(head))

    def refuse(kind: ErrorKind, message: str, offset: int) -> ImageError:
        return ImageError(kind, message, path=file.path, offset=offset, op="open")

    if header.version != VERSION:
        raise refuse(ErrorKind.UNSUPPORTED, f"version {header.version} of Parallels, only 2 is known", VERSION_AT)
    if not 0 < header.cluster_bytes <= MAX_CLUSTER_BYTES:
        message = f"a cluster has {header.cluster_sectors} sectors, must be 1 to {MAX_CLUSTER_BYTES // SECTOR}"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, CLUSTER_AT)
    needed = -(-header.size // header.cluster_bytes)
    if needed > header.entries:
        message = f"a disk of {header.size} bytes has {needed} clusters, the table has {header.entries} entries"
        raise refuse(ErrorKind.CORRUPT, message, ENTRIES_AT)
    if LENGTH + needed * ENTRY_LENGTH > file.size():
        message = f"the table of {header.entries} entries reaches past the end of the file ({file.size():#x})"
        raise refuse(ErrorKind.CORRUPT, message, ENTRIES_AT)
    if header.data_offset < LENGTH + needed * ENTRY_LENGTH:
        message = f"data begins at {header.data_offset:#x}, inside the table"
        raise refuse(ErrorKind.CORRUPT, message, DATA_OFFSET_AT)
    return header
