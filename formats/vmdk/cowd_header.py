"""The header of a sparse extent of ESX ("COWD", createType vmfsSparse): limits, parsing, serialising.

docs/specs/vmdk.md, "COWD (vmfsSparse, also old Workstation)". The header has four sectors. The grain tables have 4096
entries and are there once.
"""

from __future__ import annotations

import struct

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk.sectors import SECTOR, is_power_of_two
from tapfs.formats.vmdk.signature import COWD
from tapfs.records import NamedTuple

MAGIC = COWD
VERSION = 1
HEADER_BYTES = 4 * SECTOR
TABLE_ENTRIES = 4096
DIRECTORY_SECTOR = 4
MAX_GRAIN_SECTORS = 0x200000

FLAGS = 3

_LAYOUT = struct.Struct("<4sIIIIIII")
_NAME_BYTES = 1024

#: Offsets of the fields, for messages and for partial rewrites.
VERSION_AT, GRAIN_AT, DIRECTORY_AT, DIRECTORY_ENTRIES_AT, NEXT_FREE_AT = 4, 16, 20, 24, 28
PARENT_NAME_AT, GENERATION_AT, UNCLEAN_AT = 32, 1060, 1648


class CowdHeader(NamedTuple):
    """The fields of the header, places and lengths in sectors. `next_free_sector` is where the next grain goes."""

    version: int
    flags: int
    capacity_sectors: int
    grain_sectors: int
    directory_sector: int
    directory_entries: int
    next_free_sector: int
    unclean: int = 0

    @property
    def grain(self) -> int:
        """Bytes of a grain."""
        return self.grain_sectors * SECTOR

    @property
    def needed_entries(self) -> int:
        """Directory entries that the capacity needs."""
        return -(-self.capacity_sectors // (TABLE_ENTRIES * self.grain_sectors))

    def pack(self) -> bytes:
        """The four sectors on disk, with no name of a parent: the descriptor has it."""
        raw = bytearray(HEADER_BYTES)
        raw[: _LAYOUT.size] = _LAYOUT.pack(MAGIC, *self[:7])
        raw[UNCLEAN_AT : UNCLEAN_AT + 4] = self.unclean.to_bytes(4, "little")
        return bytes(raw)


def parse_cowd_header(raw: bytes, path: str) -> CowdHeader:
    """The header in `raw`, the first bytes of the host file `path`.

    Raises ImageError with the byte offset of the field: invalid_format, unsupported, out_of_bounds, corrupt.
    """

    def refuse(kind: ErrorKind, message: str, field: int) -> ImageError:
        return ImageError(kind, message, path=path, offset=field, op="open")

    if len(raw) < HEADER_BYTES or not raw.startswith(MAGIC):
        raise refuse(ErrorKind.INVALID_FORMAT, "not a sparse extent of ESX: no whole COWD header", 0)
    unclean = int.from_bytes(raw[UNCLEAN_AT : UNCLEAN_AT + 4], "little")
    header = CowdHeader(*_LAYOUT.unpack_from(raw)[1:])._replace(unclean=unclean)
    if header.version != VERSION:
        raise refuse(ErrorKind.UNSUPPORTED, f"COWD version {header.version}, only 1 is known", VERSION_AT)
    if not is_power_of_two(header.grain_sectors) or header.grain_sectors > MAX_GRAIN_SECTORS:
        message = f"grain of {header.grain_sectors} sectors: must be a power of two up to {MAX_GRAIN_SECTORS}"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, GRAIN_AT)
    if header.directory_sector * SECTOR < HEADER_BYTES:
        raise refuse(ErrorKind.CORRUPT, "the grain directory lies inside the header", DIRECTORY_AT)
    if header.directory_entries < header.needed_entries:
        message = f"the directory has {header.directory_entries} entries, the capacity needs {header.needed_entries}"
        raise refuse(ErrorKind.CORRUPT, message, DIRECTORY_ENTRIES_AT)
    return header
