"""The trailer of a DMG: where its parts are (docs/specs/dmg.md, "Trailer")."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.dmg import MAGIC, TRAILER_BYTES, trailer_from_end

_FIELDS = struct.Struct(">4sIII QQQQQ II 16s III")
_PLIST = struct.Struct(">QQ")
_PLIST_AT, _SECTORS_AT = 216, 492
_VERSION = 4
#: The kind of a checksum that is a CRC-32.
CRC32 = 2


class Trailer(NamedTuple):
    """Offsets and lengths in bytes; `checksum` of the data fork is None if it is no CRC-32."""

    data_offset: int
    data_length: int
    resources_offset: int
    resources_length: int
    plist_offset: int
    plist_length: int
    sectors: int
    checksum: int | None


def read_trailer(file: HostFile) -> Trailer:
    """The trailer of a file. Raises ImageError(invalid_format, unsupported, corrupt)."""
    size = file.size()
    looked_from = max(0, size - 2 * TRAILER_BYTES)
    tail = file.read(looked_from, size - looked_from)
    distance = trailer_from_end(tail)
    at = max(0, size - (distance or TRAILER_BYTES))
    raw = tail[at - looked_from :][:TRAILER_BYTES]
    if len(raw) < TRAILER_BYTES or not raw.startswith(MAGIC):
        raise ImageError(
            ErrorKind.INVALID_FORMAT,
            "is no DMG: its last sector is no trailer",
            path=file.path,
            offset=at,
            op="open",
        )
    fields = _FIELDS.unpack_from(raw)
    _, version, _, _, _, data_offset, data_length, rsrc_offset, rsrc_length, _, segments, _, kind, _, checksum = fields
    if version != _VERSION:
        message = f"trailers of version {version} are unknown"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, offset=at + 4, op="open")
    if segments > 1:
        message = f"is one of {segments} segments, which tapfs does not read"
        remedy = "join them with hdiutil convert on macOS"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, offset=at + 60, op="open", remedy=remedy)
    plist_offset, plist_length = _PLIST.unpack_from(raw, _PLIST_AT)
    (sectors,) = struct.unpack_from(">Q", raw, _SECTORS_AT)
    for name, offset, length, field in (
        ("data fork", data_offset, data_length, 24),
        ("resource fork", rsrc_offset, rsrc_length, 40),
        ("property list", plist_offset, plist_length, _PLIST_AT),
    ):
        if offset + length > size:
            message = f"the {name} [{offset:#x}, {offset + length:#x}) ends past the end of the file ({size:#x})"
            remedy = "the file may have been cut off"
            raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=at + field, op="open", remedy=remedy)
    return Trailer(
        data_offset,
        data_length,
        rsrc_offset,
        rsrc_length,
        plist_offset,
        plist_length,
        sectors,
        checksum if kind == CRC32 else None,
    )
