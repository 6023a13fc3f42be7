"""The header of a VHD that grows: block size, block allocation table, parent (docs/specs/vhd.md, "Dynamic header")."""

from __future__ import annotations

import struct

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.rounding import round_up
from tapfs.formats.vhd.checksum import checksum_without
from tapfs.formats.vhd.footer import DATA_OFFSET_AT, NO_OFFSET, Footer
from tapfs.records import NamedTuple

COOKIE = b"cxsparse"
LENGTH = 1024
VERSION = 0x00010000
SECTOR = 512

#: Bytes of an entry of the block allocation table.
ENTRY_LENGTH = 4
#: The entry of a block that is not there.
UNUSED = 0xFFFFFFFF

DEFAULT_BLOCK_SIZE = 2 << 20
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 4096, 256 << 20

_LAYOUT = struct.Struct(">8sQQIIII16sI4x512s")
_LOCATOR = struct.Struct(">4sIIIQ")
_LOCATORS = 8
_LOCATORS_AT = _LAYOUT.size

#: Offsets of fields from the start of the header, for messages.
TABLE_OFFSET_AT = 16
MAX_ENTRIES_AT = 28
BLOCK_SIZE_AT = 32
CHECKSUM_AT = 36


class Locator(NamedTuple):
    """One of the eight places of a parent's name: `data_length` bytes at `offset` in the encoding that `code` says."""

    code: bytes
    data_space: int
    data_length: int
    reserved: int
    offset: int

    @property
    def space_bytes(self) -> int:
        """Bytes that are set aside; the document counts sectors, Microsoft's own files have bytes."""
        return self.data_space * SECTOR if self.data_space < SECTOR else self.data_space


NO_LOCATOR = Locator(bytes(4), 0, 0, 0, 0)


class DynamicHeader(NamedTuple):
    """The fields of the header, sizes and offsets in bytes, `parent_timestamp` in seconds since 2000."""

    table_offset: int
    version: int
    max_entries: int
    block_size: int
    checksum: int = 0
    parent_uuid: bytes = bytes(16)
    parent_timestamp: int = 0
    #: The parent's name in UTF-16BE with zeros behind it.
    parent_name: bytes = bytes(512)
    locators: tuple[Locator, ...] = (NO_LOCATOR,) * _LOCATORS
    #: The offset of a next structure, all ones in every image.
    next_offset: int = NO_OFFSET
    reserved: bytes = bytes(LENGTH - _LOCATORS_AT - _LOCATORS * _LOCATOR.size)

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of a block's bitmap, one bit for each sector, in whole sectors."""
        return round_up(self.block_size // SECTOR // 8, SECTOR)

    @property
    def table_end(self) -> int:
        """The first byte of the file behind the block allocation table, which is padded to a sector."""
        return self.table_offset + round_up(self.max_entries * ENTRY_LENGTH, SECTOR)

    def pack(self) -> bytes:
        """The 1024 bytes on disk, the checksum as it is in the field."""
        head = _LAYOUT.pack(
            COOKIE,
            self.next_offset,
            self.table_offset,
            self.version,
            self.max_entries,
            self.block_size,
            self.checksum,
            self.parent_uuid,
            self.parent_timestamp,
            self.parent_name,
        )
        return head + b"".join(_LOCATOR.pack(*each) for each in self.locators) + self.reserved

    def sealed(self) -> DynamicHeader:
        """The same with the checksum that fits."""
        return self._replace(checksum=checksum_without(self.pack(), CHECKSUM_AT))

    @property
    def fits(self) -> bool:
        """Whether the checksum fits."""
        return checksum_without(self.pack(), CHECKSUM_AT) == self.checksum


def read_header(file: HostFile, footer: Footer, footer_offset: int) -> DynamicHeader:
    """The header that the footer points at, whatever its checksum.

    Raises ImageError: corrupt where there is none, out_of_bounds for sizes beyond the limits, always naming the field.
    """
    at, size = footer.data_offset, file.size()
    raw = file.read(at, LENGTH) if at + LENGTH <= size else b""
    if len(raw) < LENGTH or not raw.startswith(COOKIE):
        what = "past the end of the file" if len(raw) < LENGTH else "does not begin with its cookie"
        raise ImageError(
            ErrorKind.CORRUPT,
            f"the dynamic header at {at:#x} {'lies ' if len(raw) < LENGTH else ''}{what}",
            path=file.path,
            offset=footer_offset + DATA_OFFSET_AT,
            op="open",
        )
    _, next_offset, *fields = _LAYOUT.unpack_from(raw)
    locators = tuple(
        Locator(*_LOCATOR.unpack_from(raw, _LOCATORS_AT + number * _LOCATOR.size)) for number in range(_LOCATORS)
    )
    reserved = raw[_LOCATORS_AT + _LOCATORS * _LOCATOR.size :]
    header = DynamicHeader(*fields)._replace(locators=locators, next_offset=next_offset, reserved=reserved)
    _check_limits(header, at, file.path, size)
    return header


def _check_limits(header: DynamicHeader, at: int, path: str, size: int) -> None:
    def refuse(kind: ErrorKind, message: str, field: int) -> ImageError:
        return ImageError(kind, message, path=path, offset=at + field, op="open")

    block = header.block_size
    if block & (block - 1) or not MIN_BLOCK_SIZE <= block <= MAX_BLOCK_SIZE:
        message = f"block_size is {block}, must be a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, BLOCK_SIZE_AT)
    table_bytes = header.max_entries * ENTRY_LENGTH
    if header.table_offset + table_bytes > size:
        message = f"the block allocation table at {header.table_offset:#x} has {header.max_entries} entries: it reaches"
        raise refuse(ErrorKind.CORRUPT, f"{message} past the end of the file ({size:#x})", TABLE_OFFSET_AT)


def require_table_for(header: DynamicHeader, disk_bytes: int, header_offset: int, path: str) -> None:
    """See that the table has an entry for each block of a disk of so many bytes. Raises ImageError(corrupt).

    A table may be larger: xapi reserves room to grow.
    """
    entries = -(-disk_bytes // header.block_size)
    if entries > header.max_entries:
        raise ImageError(
            ErrorKind.CORRUPT,
            f"a disk of {disk_bytes} bytes has {entries} blocks, the block allocation table {header.max_entries}",
            path=path,
            offset=header_offset + MAX_ENTRIES_AT,
            op="open",
        )
