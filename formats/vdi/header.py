"""The header of a VDI image (docs/specs/vdi.md, "Pre-header and header"), read and written.

All numbers are little-endian. UUIDs stand in the order of a GUID: the first three fields are little-endian, too.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.uuid_links import NULL_UUID
from tapfs.formats.vdi.signature import SIGNATURE, SIGNATURE_AT
from tapfs.identifiers import Uuid
from tapfs.records import NamedTuple

SECTOR = 512

_VERSION_AT = 68
#: Version 1.1, and the one before it, 0.2.
VERSION, OLD_VERSION = 0x00010001, 0x00000002

#: The header's own length counts from here.
_HEADER_AT = 72
#: Its length in version 1.1 (without the logical geometry that newer versions of VirtualBox add), and with that.
_LEAST_LENGTH, LENGTH = 0x180, 0x190

#: Bytes of the file that have every header.
HEAD_BYTES = _HEADER_AT + LENGTH

#: In version 1.1.
COMMENT_AT, COMMENT_BYTES = 84, 256
SIZE_AT, BLOCK_BYTES_AT, EXTRA_AT, BLOCKS_AT = 368, 376, 380, 384
MAP_AT, DATA_AT, GEOMETRY_AT = 340, 344, 348

_FIELDS = struct.Struct("<III256sIIIIIIIQIIII16s16s16s16s")
#: type, flags, comment, geometry, size, block size, blocks, allocated, and three UUIDs.
_OLD_FIELDS = struct.Struct("<II256sIIIIQIII16s16s16s")
_LOGICAL_GEOMETRY_BYTES = 16

_LEAST_BLOCK, _MOST_BLOCK = 128 << 10, 128 << 20
#: More blocks than this are no disk that can be served.
MOST_BLOCKS = 1 << 30


class Type(IntEnum):
    """What an image is."""

    DYNAMIC = 1
    FIXED = 2
    UNDO = 3
    DIFFERENCING = 4


class Places(NamedTuple):
    """The host offsets of the fields that a writer changes, which depend on the version."""

    type: int
    allocated: int
    modification: int
    link: int
    parent_modification: int | None


#: The image before version 1.1 does not say which change of its parent it was made over.
_PLACES = {VERSION: Places(76, 388, 408, 424, 440), OLD_VERSION: Places(72, 368, 388, 404, None)}


class Header(NamedTuple):
    """The header's fields; places, sizes and lengths in bytes.

    `slot_bytes` is what a block takes in the file: `extra`, then the block.
    """

    version: int
    type: Type
    size: int
    block_bytes: int
    blocks: int
    allocated: int
    map_offset: int
    data_offset: int
    extra: int = 0
    flags: int = 0
    comment: bytes = b""
    creation: Uuid = NULL_UUID
    modification: Uuid = NULL_UUID
    link: Uuid = NULL_UUID
    parent_modification: Uuid = NULL_UUID

    @property
    def slot_bytes(self) -> int:
        """The length of a slot."""
        return self.extra + self.block_bytes

    @property
    def map_end(self) -> int:
        """The host offset after the map, with the entries that the disk has no blocks for."""
        return self.map_offset + 4 * self.blocks

    @property
    def places(self) -> Places:
        """Where the fields lie that a writer changes."""
        return _PLACES[self.version]

    @property
    def has_parent(self) -> bool:
        """Whether free blocks are the parent's."""
        return self.type in {Type.DIFFERENCING, Type.UNDO}

    def pack(self, text: bytes) -> bytes:
        """A header of version 1.1 from the file's first byte on, after the `text` of up to 64 bytes."""
        fields = _FIELDS.pack(
            LENGTH,
            self.type,
            self.flags,
            self.comment,
            self.map_offset,
            self.data_offset,
            0,
            0,
            0,
            SECTOR,
            0,
            self.size,
            self.block_bytes,
            self.extra,
            self.blocks,
            self.allocated,
            *(each.bytes_le for each in (self.creation, self.modification, self.link, self.parent_modification)),
        )
        logical = struct.pack("<IIII", 0, 0, 0, SECTOR)
        return text.ljust(SIGNATURE_AT, b"\0") + SIGNATURE + VERSION.to_bytes(4, "little") + fields + logical


def parse_header(head: bytes, file: HostFile) -> Header:
    """The header in the first bytes of a file. Raises ImageError naming the field."""
    if head[SIGNATURE_AT : SIGNATURE_AT + 4] != SIGNATURE or len(head) < _HEADER_AT:
        raise _error(ErrorKind.INVALID_FORMAT, "is not a VDI image", file, SIGNATURE_AT)
    version = int.from_bytes(head[_VERSION_AT:_HEADER_AT], "little")
    if version not in _PLACES:
        message = f"version {version >> 16}.{version & 0xFFFF} of VDI is not known"
        raise _error(ErrorKind.UNSUPPORTED, message, file, _VERSION_AT)
    fields = _OLD_FIELDS if version == OLD_VERSION else _FIELDS
    if len(head) < _HEADER_AT + fields.size:
        raise _error(ErrorKind.CORRUPT, "the file ends inside the header", file, len(head))
    header = _old_header(head, file) if version == OLD_VERSION else _header(head, file)
    _require_possible(header, file)
    return header


def _header(head: bytes, file: HostFile) -> Header:
    (
        length, kind, flags, comment, map_offset, data_offset, _, _, _, sector, _,
        size, block_bytes, extra, blocks, allocated, *uuids,
    ) = _FIELDS.unpack_from(head, _HEADER_AT)  # fmt: skip
    _require_sector(sector, file, GEOMETRY_AT + 12)
    if length < _LEAST_LENGTH or _HEADER_AT + length > map_offset:
        message = f"the header has {length:#x} bytes, and the map begins at {map_offset:#x}"
        raise _error(ErrorKind.CORRUPT, message, file, _HEADER_AT)
    return Header(
        VERSION, _type(kind, file, _HEADER_AT + 4), size, block_bytes, blocks, allocated, map_offset, data_offset,
        extra, flags, comment.split(b"\0", 1)[0], *(Uuid.of_bytes_le(each) for each in uuids),
    )  # fmt: skip


def _old_header(head: bytes, file: HostFile) -> Header:
    kind, flags, comment, _, _, _, sector, size, block_bytes, blocks, allocated, *uuids = _OLD_FIELDS.unpack_from(
        head, _HEADER_AT
    )
    _require_sector(sector, file, _HEADER_AT + 276)
    map_offset = _HEADER_AT + _OLD_FIELDS.size
    return Header(
        OLD_VERSION, _type(kind, file, _HEADER_AT), size, block_bytes, blocks, allocated, map_offset,
        map_offset + 4 * blocks, 0, flags, comment.split(b"\0", 1)[0], *(Uuid.of_bytes_le(each) for each in uuids),
    )  # fmt: skip


def _require_sector(sector: int, file: HostFile, at: int) -> None:
    if sector != SECTOR:
        raise _error(ErrorKind.UNSUPPORTED, f"sectors of {sector} bytes are not supported", file, at)


def _type(kind: int, file: HostFile, at: int) -> Type:
    try:
        return Type(kind)
    except ValueError:
        raise _error(ErrorKind.UNSUPPORTED, f"the type {kind} of VDI images is not known", file, at) from None


def _require_possible(header: Header, file: HostFile) -> None:
    """Raise ImageError where the fields contradict each other, before memory is taken for any of them."""
    block = header.block_bytes
    if not _LEAST_BLOCK <= block <= _MOST_BLOCK or block & (block - 1):
        message = f"blocks of {block} bytes are not supported: it must be a power of two, 128 KiB to 128 MiB"
        raise _error(ErrorKind.UNSUPPORTED, message, file, BLOCK_BYTES_AT)
    if header.extra >= block or header.extra % SECTOR:
        message = f"{header.extra} bytes before each block are not possible"
        raise _error(ErrorKind.CORRUPT, message, file, EXTRA_AT)
    if header.blocks > MOST_BLOCKS:
        raise _error(ErrorKind.OUT_OF_BOUNDS, f"{header.blocks} blocks are too many", file, BLOCKS_AT)
    if header.size == 0:
        raise _error(ErrorKind.CORRUPT, "the disk has no bytes", file, SIZE_AT)
    if header.blocks * block < header.size:
        message = f"{header.blocks} blocks of {block} bytes are too few for a disk of {header.size} bytes"
        raise _error(ErrorKind.CORRUPT, message, file, BLOCKS_AT)
    if header.map_end > header.data_offset:
        message = f"the map [{header.map_offset:#x}, {header.map_end:#x}) lies in the data from {header.data_offset:#x}"
        raise _error(ErrorKind.CORRUPT, message, file, MAP_AT)


def _error(kind: ErrorKind, message: str, file: HostFile, at: int) -> ImageError:
    return ImageError(kind, message, path=file.path, offset=at, op="open")
