"""The 48-byte qcow version 1 header: limits, parsing, serialising (docs/specs/blktap-qcow.md, "Header")."""

from __future__ import annotations

import struct

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow.signature import MAGIC, VERSION
from tapfs.records import NamedTuple

LENGTH = 48

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 16
MIN_L2_BITS, MAX_L2_BITS = 6, 13
MAX_NAME_LENGTH = 1023
MAX_L1_BYTES = 128 << 20
MAX_VIRTUAL_SIZE = (1 << 63) - 1

CRYPT_NONE, CRYPT_AES = 0, 1

ENTRY_LENGTH = 8

_LAYOUT = struct.Struct(">4sIQIIQBB2xIQ")

#: Offsets of the fields, for messages and for partial rewrites.
BACKING_FILE_OFFSET_AT = 8
BACKING_FILE_SIZE_AT = 16
SIZE_AT = 24
CLUSTER_BITS_AT = 32
L2_BITS_AT = 33
CRYPT_METHOD_AT = 36
L1_TABLE_OFFSET_AT = 40


class Header(NamedTuple):
    """The fields of the header and what follows from them. Lengths and offsets in bytes."""

    backing_file_offset: int
    backing_file_size: int
    mtime: int
    size: int
    cluster_bits: int
    l2_bits: int
    crypt_method: int
    l1_table_offset: int

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return 1 << self.l2_bits

    @property
    def l2_length(self) -> int:
        """Bytes of one L2 table."""
        return ENTRY_LENGTH << self.l2_bits

    @property
    def unit(self) -> int:
        """Bytes of the virtual disk that one L1 entry maps."""
        return 1 << (self.cluster_bits + self.l2_bits)

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table."""
        return -(-self.size // self.unit)

    @property
    def l1_length(self) -> int:
        """Bytes of the L1 table."""
        return ENTRY_LENGTH * self.l1_entries

    @property
    def l1_end(self) -> int:
        """The first host byte after the L1 table."""
        return self.l1_table_offset + self.l1_length

    @property
    def has_backing(self) -> bool:
        """Whether the header names a parent."""
        return self.backing_file_offset != 0 and self.backing_file_size != 0

    def pack(self) -> bytes:
        """The 48 bytes on disk."""
        return _LAYOUT.pack(MAGIC, VERSION, *self)


def parse_header(head: bytes, file: HostFile) -> Header:
    """The header in `head`, the first bytes of `file`.

    Raises ImageError, always with field, value and byte offset: invalid_format where this is no
    qcow version 1 image, unsupported or out_of_bounds where it is one beyond our limits.
    """
    if len(head) < LENGTH or not head.startswith(MAGIC):
        what = (
            "no qcow magic"
            if head[:4] != MAGIC[: len(head)]
            else f"the file ends inside the header ({len(head)} bytes)"
        )
        raise ImageError(ErrorKind.INVALID_FORMAT, f"not a qcow image: {what}", path=file.path, offset=0, op="open")
    version = int.from_bytes(head[4:8], "big")
    if version != VERSION:
        raise ImageError(
            ErrorKind.INVALID_FORMAT, f"qcow version {version}, not 1", path=file.path, offset=4, op="open"
        )
    header = Header(*_LAYOUT.unpack_from(head)[2:])
    _check_limits(header, file.path)
    return header


def _check_limits(header: Header, path: str) -> None:
    def refuse(kind: ErrorKind, message: str, offset: int) -> ImageError:
        return ImageError(kind, message, path=path, offset=offset, op="open")

    invalid = ErrorKind.INVALID_FORMAT
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        allowed = f"{MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
        raise refuse(invalid, f"cluster_bits is {header.cluster_bits}, must be {allowed}", CLUSTER_BITS_AT)
    if not MIN_L2_BITS <= header.l2_bits <= MAX_L2_BITS:
        allowed = f"{MIN_L2_BITS} to {MAX_L2_BITS}"
        raise refuse(invalid, f"l2_bits is {header.l2_bits}, must be {allowed}", L2_BITS_AT)
    if header.crypt_method not in {CRYPT_NONE, CRYPT_AES}:
        message = f"crypt_method is {header.crypt_method}, only 0 (none) and 1 (AES) are known"
        raise refuse(ErrorKind.UNSUPPORTED, message, CRYPT_METHOD_AT)
    if header.size <= 1:
        raise refuse(invalid, f"size is {header.size}, must be greater than 1", SIZE_AT)
    if header.size > MAX_VIRTUAL_SIZE:
        raise refuse(ErrorKind.OUT_OF_BOUNDS, f"size is {header.size:#x}, must be below 2^63", SIZE_AT)
    if header.l1_length > MAX_L1_BYTES:
        message = f"size {header.size:#x} needs an L1 table of {header.l1_length} bytes, the limit is {MAX_L1_BYTES}"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, SIZE_AT)
    if header.backing_file_offset and header.backing_file_size > MAX_NAME_LENGTH:
        message = f"backing_file_size is {header.backing_file_size}, the limit is {MAX_NAME_LENGTH}"
        raise refuse(invalid, message, BACKING_FILE_SIZE_AT)
    if header.l1_table_offset < LENGTH:
        message = f"l1_table_offset is {header.l1_table_offset:#x}, inside the header"
        raise refuse(ErrorKind.CORRUPT, message, L1_TABLE_OFFSET_AT)
