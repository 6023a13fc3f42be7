"""Markers and the footer of a streamOptimized extent: sectors that say what the next sectors are.

docs/specs/vmdk.md, "streamOptimized". A file whose header has no place for the grain directory ends with the directory,
a footer (a second header, which has the place) and a marker of the end.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.sparse_header import (
    DIRECTORY_AT,
    DIRECTORY_AT_END,
    MAGIC,
    SparseHeader,
    parse_sparse_header,
)
from tapfs.records import NamedTuple

#: The header of a packed grain: its first sector on the disk, and the bytes that follow.
GRAIN_HEADER = struct.Struct("<QI")
#: The place of the length in that header, and its bytes.
GRAIN_LENGTH_AT, GRAIN_LENGTH_BYTES = 8, 4

_MARKER = struct.Struct("<QII")

#: A footer is looked for so many bytes before the end: what follows it was added in a transfer.
_TAIL_BYTES = 64 << 10


class MarkerType(IntEnum):
    """What follows a marker."""

    END = 0
    TABLE = 1
    DIRECTORY = 2
    FOOTER = 3


class Marker(NamedTuple):
    """`sectors` sectors of something follow."""

    sectors: int
    type: int

    def pack(self) -> bytes:
        """The 512 bytes on disk."""
        return _MARKER.pack(self.sectors, 0, self.type).ljust(SECTOR, b"\0")


class Trailer(NamedTuple):
    """The header that counts, and whether it is the footer; `slack` bytes follow the end of the image."""

    header: SparseHeader
    has_footer: bool = False
    slack: int = 0
    lost_footer: bool = False


def _marker(raw: bytes) -> Marker | None:
    """The marker in a sector; None if it is none."""
    if len(raw) < SECTOR or raw[_MARKER.size :].strip(b"\0"):
        return None
    sectors, size, kind = _MARKER.unpack_from(raw)
    return Marker(sectors, kind) if size == 0 else None


def find_trailer(file: HostFile, header: SparseHeader) -> Trailer:
    """The header with the place of the directory: `header` itself, the footer, or `header` and what a lost footer had.

    Raises ImageError(corrupt) if the end of the file is missing, or if the footer belongs to another file.
    """
    if header.directory_sector != DIRECTORY_AT_END:
        return Trailer(header)
    size = file.size()
    start = max(0, size - size % SECTOR - _TAIL_BYTES)
    tail = file.read(start, size - start)
    for at in range(len(tail) - len(tail) % SECTOR - SECTOR, SECTOR - 1, -SECTOR):
        before = _marker(tail[at - SECTOR : at])
        if before is None:
            continue
        if tail.startswith(MAGIC, at) and before.type == MarkerType.FOOTER:
            return _from_footer(file, header, tail[at : at + SECTOR], start + at)
    for at in range(len(tail) - len(tail) % SECTOR - SECTOR, SECTOR - 1, -SECTOR):
        before = _marker(tail[at - SECTOR : at])
        if before == Marker(header.directory_bytes // SECTOR, MarkerType.DIRECTORY):
            place = start + at
            if place + header.directory_bytes <= size:
                return Trailer(header._replace(directory_sector=place // SECTOR), lost_footer=True)
    raise ImageError(
        ErrorKind.CORRUPT,
        "the end of the file is missing: it has neither its footer nor its grain directory",
        path=file.path,
        offset=size,
        op="open",
        remedy="copy or download the file again",
    )


def _from_footer(file: HostFile, header: SparseHeader, raw: bytes, at: int) -> Trailer:
    footer = parse_sparse_header(raw, file.path, at)
    same = ("capacity_sectors", "grain_sectors", "table_entries", "is_compressed", "has_markers", "has_zeroed_grains")
    for field in same:
        if getattr(footer, field) != getattr(header, field):
            message = f"the footer's {field} is {getattr(footer, field)}, the header's is {getattr(header, field)}"
            raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=at, op="open")
    if footer.directory_sector == DIRECTORY_AT_END:
        message = "the footer does not say where the grain directory is"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=at + DIRECTORY_AT, op="open")
    end = at + 2 * SECTOR  # the footer and the marker of the end
    return Trailer(
        header._replace(directory_sector=footer.directory_sector),
        has_footer=True,
        slack=max(0, file.size() - end),
    )


def footer_sectors(header: SparseHeader) -> bytes:
    """The marker, the footer and the end, for a file whose header is `header` but for the directory's place."""
    return Marker(1, MarkerType.FOOTER).pack() + header.pack() + Marker(0, MarkerType.END).pack()


def packed_grain(lba: int, payload: bytes) -> bytes:
    """A packed grain as it stands in the file: header, payload, zeros up to a whole sector."""
    raw = GRAIN_HEADER.pack(lba, len(payload)) + payload
    return raw.ljust(round_up(len(raw), SECTOR), b"\0")
