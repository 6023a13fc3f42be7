"""The header of a hosted sparse extent ("KDMV"), 512 bytes: limits, parsing, serialising.

docs/specs/vmdk.md, "Sparse extent header (KDMV), 512 bytes". The footer of a streamOptimized file is one, too.
"""

from __future__ import annotations

import struct

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk.sectors import MAX_BYTES, SECTOR, is_power_of_two
from tapfs.formats.vmdk.signature import SPARSE, UNFINISHED_SPARSE
from tapfs.records import NamedTuple

MAGIC = SPARSE
#: The magic that open-vmdk writes until the file is complete.
UNFINISHED_MAGIC = UNFINISHED_SPARSE

#: Place of the grain directory in a header whose file ends with the directory and a footer.
DIRECTORY_AT_END = (1 << 64) - 1

VERSIONS = (1, 2, 3)
MIN_GRAIN_SECTORS, MAX_GRAIN_SECTORS = 8, 0x200000
MAX_TABLE_ENTRIES = 4096
ENTRY_BYTES = 4
MAX_DIRECTORY_BYTES = 128 << 20

FLAG_NEWLINES = 1 << 0
FLAG_REDUNDANT = 1 << 1
FLAG_ZEROED_GRAINS = 1 << 2
FLAG_COMPRESSED = 1 << 16
FLAG_MARKERS = 1 << 17

COMPRESSION_NONE, COMPRESSION_DEFLATE = 0, 1

_LAYOUT = struct.Struct("<4sIIQQQQIQQQB4sH")
_NEWLINES = b"\n \r\n"

#: Offsets of the fields, for messages and for partial rewrites.
VERSION_AT, FLAGS_AT, CAPACITY_AT, GRAIN_AT = 4, 8, 12, 20
DESCRIPTOR_AT, TABLE_ENTRIES_AT, REDUNDANT_AT, DIRECTORY_AT = 28, 44, 48, 56
UNCLEAN_AT, NEWLINES_AT, COMPRESSION_AT = 72, 73, 77


class SparseHeader(NamedTuple):
    """The fields of the header, places and lengths in sectors, and what follows from them in bytes."""

    version: int
    flags: int
    capacity_sectors: int
    grain_sectors: int
    descriptor_sector: int
    descriptor_sectors: int
    table_entries: int
    redundant_sector: int
    directory_sector: int
    overhead_sectors: int
    unclean: int = 0
    newlines: bytes = _NEWLINES
    compression: int = COMPRESSION_NONE

    @property
    def capacity(self) -> int:
        """Bytes of the disk that the extent can hold."""
        return self.capacity_sectors * SECTOR

    @property
    def grain(self) -> int:
        """Bytes of a grain."""
        return self.grain_sectors * SECTOR

    @property
    def table_span(self) -> int:
        """Bytes of the disk that one grain table maps."""
        return self.table_entries * self.grain

    @property
    def table_bytes(self) -> int:
        """Bytes of one grain table on the host, whole sectors."""
        return round_up(self.table_entries * ENTRY_BYTES, SECTOR)

    @property
    def directory_entries(self) -> int:
        """Entries of the grain directory."""
        return -(-self.capacity_sectors // (self.table_entries * self.grain_sectors))

    @property
    def directory_bytes(self) -> int:
        """Bytes of the grain directory on the host, whole sectors."""
        return round_up(self.directory_entries * ENTRY_BYTES, SECTOR)

    @property
    def has_redundant(self) -> bool:
        """Whether there is a second grain directory. The flag alone does not count: its place must be there, too."""
        return bool(self.flags & FLAG_REDUNDANT) and self.redundant_sector != 0

    @property
    def has_zeroed_grains(self) -> bool:
        """Whether an entry of 1 is a grain of zeros."""
        return bool(self.flags & FLAG_ZEROED_GRAINS)

    @property
    def is_compressed(self) -> bool:
        """Whether the grains are packed."""
        return bool(self.flags & FLAG_COMPRESSED)

    @property
    def has_markers(self) -> bool:
        """Whether a packed grain has its place on the disk before it."""
        return bool(self.flags & FLAG_MARKERS)

    def pack(self) -> bytes:
        """The 512 bytes on disk."""
        return _LAYOUT.pack(MAGIC, *self).ljust(SECTOR, b"\0")


def parse_sparse_header(raw: bytes, path: str, at: int = 0) -> SparseHeader:
    """The header in `raw`, which stands at byte `at` of the host file `path`.

    Raises ImageError with the byte offset of the field: invalid_format where this is no such header, unsupported or
    out_of_bounds where it is one beyond our limits, corrupt where it went through a transfer as text.
    """

    def refuse(kind: ErrorKind, message: str, field: int) -> ImageError:
        return ImageError(kind, message, path=path, offset=at + field, op="open")

    if raw.startswith(UNFINISHED_MAGIC):
        message = "is an unfinished VMDK: the program that wrote it did not come to its end"
        raise refuse(ErrorKind.CORRUPT, message, 0)
    if len(raw) < SECTOR or not raw.startswith(MAGIC):
        raise refuse(ErrorKind.INVALID_FORMAT, "not a sparse extent of a VMDK: no KDMV header", 0)
    header = SparseHeader(*_LAYOUT.unpack_from(raw)[1:])
    if header.version not in VERSIONS:
        raise refuse(ErrorKind.UNSUPPORTED, f"VMDK version {header.version}: 1, 2 and 3 are known", VERSION_AT)
    if header.flags & FLAG_NEWLINES and header.newlines != _NEWLINES:
        message = "the line ends in the header are changed: the file went through a transfer as text, and is damaged"
        raise refuse(ErrorKind.CORRUPT, message, NEWLINES_AT)
    if not is_power_of_two(header.grain_sectors) or not MIN_GRAIN_SECTORS <= header.grain_sectors <= MAX_GRAIN_SECTORS:
        message = f"grain of {header.grain_sectors} sectors: must be a power of two from 8 to {MAX_GRAIN_SECTORS}"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, GRAIN_AT)
    if not is_power_of_two(header.table_entries) or header.table_entries > MAX_TABLE_ENTRIES:
        message = f"grain tables of {header.table_entries} entries: must be a power of two up to {MAX_TABLE_ENTRIES}"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, TABLE_ENTRIES_AT)
    if header.capacity >= MAX_BYTES:
        raise refuse(ErrorKind.OUT_OF_BOUNDS, f"capacity of {header.capacity_sectors} sectors", CAPACITY_AT)
    if header.directory_entries * ENTRY_BYTES > MAX_DIRECTORY_BYTES:
        message = f"the grain directory has {header.directory_entries} entries, more than {MAX_DIRECTORY_BYTES} bytes"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, CAPACITY_AT)
    if header.compression > COMPRESSION_DEFLATE:
        message = f"compression {header.compression}: only 0 (none) and 1 (deflate) are known"
        raise refuse(ErrorKind.UNSUPPORTED, message, COMPRESSION_AT)
    if header.is_compressed and header.compression != COMPRESSION_DEFLATE:
        raise refuse(ErrorKind.CORRUPT, "the grains are packed, and no algorithm is named", COMPRESSION_AT)
    if header.compression and not header.is_compressed:
        # Readers who go by one of the two would show packed bytes as the guest's.
        message = "an algorithm of packed grains is named, and the flag of packed grains is not set"
        raise refuse(ErrorKind.CORRUPT, message, COMPRESSION_AT)
    return header
