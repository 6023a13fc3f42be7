"""The volume section: the size of the disk, and of the chunks that hold it (docs/specs/ewf.md, "Volume")."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.ewf.sections import Section

#: Media type, chunks, sectors in a chunk, bytes in a sector, sectors: both layouts begin so, but for the last field.
_ENCASE = struct.Struct("<B3xIIIQ")
_SMART = struct.Struct("<4xIIII")
_ENCASE_BYTES = 1052
_SMART_BYTES = 94

#: The largest chunk: the engine unpacks it as a whole, and the place of a chunk has 22 bits for its length.
MAX_CHUNK_BYTES = 2 << 20
_SECTOR_BYTES = (512, 1024, 2048, 4096)


class Volume(NamedTuple):
    """The size of the disk and of its chunks, in bytes but for `chunks`."""

    chunks: int
    chunk_bytes: int
    sector_bytes: int
    size: int


def parse_volume(file: HostFile, section: Section) -> Volume:
    """The volume in a section "volume", "disk" or "data". Raises ImageError(corrupt, unsupported, out_of_bounds)."""
    at = section.content
    raw = file.read(at, min(section.end - at, _ENCASE_BYTES))
    if len(raw) == _SMART_BYTES:
        chunks, per_chunk, sector_bytes, sectors = _SMART.unpack_from(raw)
    elif len(raw) == _ENCASE_BYTES:
        _, chunks, per_chunk, sector_bytes, sectors = _ENCASE.unpack_from(raw)
    else:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"a volume section of {len(raw)} bytes is unknown",
            path=file.path,
            offset=at,
            op="open",
        )
    if struct.unpack_from("<I", raw, len(raw) - 4)[0] != zlib.adler32(raw[:-4]):
        message = "the checksum of the volume section does not fit: the size of the disk cannot be trusted"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=at, op="open")
    if sector_bytes not in _SECTOR_BYTES:
        message = f"sectors of {sector_bytes} bytes are unknown"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, offset=at + 12, op="open")
    chunk_bytes = per_chunk * sector_bytes
    if not 0 < chunk_bytes <= MAX_CHUNK_BYTES:
        message = f"chunks of {chunk_bytes} bytes are not read, the limit is {MAX_CHUNK_BYTES}"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, offset=at + 8, op="open")
    size = sectors * sector_bytes
    if chunks != -(-size // chunk_bytes):
        message = f"{chunks} chunks of {chunk_bytes} bytes do not make a disk of {size} bytes"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=at + 4, op="open")
    return Volume(chunks, chunk_bytes, sector_bytes, size)
