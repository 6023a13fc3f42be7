"""The tables of blocks of a DMG, one for each partition (docs/specs/dmg.md, "Tables of blocks").

The tables stand in a property list, or in the resource fork of older images.
"""

from __future__ import annotations

import plistlib
import struct
from collections.abc import Iterator
from typing import NamedTuple, cast
from xml.parsers.expat import ExpatError

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.dmg.trailer import Trailer

_MAGIC = b"mish"
_HEAD = struct.Struct(">4sIQQQ")
_COUNT_AT, _BLOCKS_AT = 200, 204
_BLOCK = struct.Struct(">IIQQQQ")

#: A property list has 54 bytes for a block. One of this size would describe some terabytes of disk.
_PLIST_LIMIT = 256 << 20

SECTOR = 512
#: Sectors of the largest disk that can be served.
_MAX_SECTORS = (1 << 63) // SECTOR


class Kind:
    """The kinds of blocks that are not packed, and of those that are no blocks."""

    ZERO = 0
    RAW = 1
    IGNORED = 2
    COMMENT = 0x7FFFFFFE
    END = 0xFFFFFFFF


class Block(NamedTuple):
    """Sectors ``[first, first + sectors)`` of the disk and the bytes of the file that hold them."""

    first: int
    sectors: int
    kind: int
    host_offset: int
    host_length: int


class Table(NamedTuple):
    """The blocks of one partition, ascending, and the partition's name."""

    name: str
    blocks: list[Block]


def read_tables(file: HostFile, trailer: Trailer) -> list[Table]:
    """All tables, in the order of the disk. Raises ImageError(corrupt, unsupported)."""
    if trailer.plist_length:
        raw = _tables_of_plist(file, trailer)
    elif trailer.resources_length:
        raw = _tables_of_resources(file, trailer)
    else:
        raise _corrupt(file, file.size() - SECTOR, "names neither a property list nor a resource fork")
    tables = [Table(name, sorted(_blocks(file, content, trailer))) for name, content in raw]
    return sorted(tables, key=lambda table: table.blocks[0].first if table.blocks else 0)


def _tables_of_plist(file: HostFile, trailer: Trailer) -> list[tuple[str, bytes]]:
    at, length = trailer.plist_offset, trailer.plist_length
    if length > _PLIST_LIMIT:
        message = f"a property list of {length} bytes is not read, the limit is {_PLIST_LIMIT}"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=file.path, offset=at, op="open")
    try:
        # Entity declarations, by which a small list would become a large one, are refused by plistlib.
        content = cast("object", plistlib.loads(file.read(at, length), fmt=plistlib.FMT_XML))
    except (plistlib.InvalidFileException, ExpatError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise _corrupt(file, at, f"the property list cannot be read: {error}") from error
    found: list[tuple[str, bytes]] = []
    for each in _list(_get(_get(content, "resource-fork"), "blkx")):
        name, data = _get(each, "Name"), _get(each, "Data")
        if not isinstance(data, bytes):
            raise _corrupt(file, at, "the property list has a table of blocks without data")
        found.append((name if isinstance(name, str) else "", data))
    if not found:
        raise _corrupt(file, at, "the property list has no table of blocks")
    return found


def _get(value: object, key: str) -> object:
    return cast("dict[object, object]", value).get(key) if isinstance(value, dict) else None


def _list(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _tables_of_resources(file: HostFile, trailer: Trailer) -> list[tuple[str, bytes]]:
    """The resources that begin as tables do: a resource is its length and its bytes."""
    base, limit = trailer.resources_offset, min(trailer.resources_length, _PLIST_LIMIT)
    start, _, length = struct.unpack(">III", file.read(base, 12).ljust(12, b"\0"))
    if start + length > limit:
        raise _corrupt(file, base, "the resources lie outside their fork")
    raw = file.read(base + start, length)
    found: list[tuple[str, bytes]] = []
    at = 0
    while at + 4 <= len(raw):
        size = int.from_bytes(raw[at : at + 4], "big")
        content = raw[at + 4 : at + 4 + size]
        if content.startswith(_MAGIC):
            found.append(("", content))
        at += 4 + size
    if not found:
        raise _corrupt(file, base, "the resource fork has no table of blocks")
    return found


def _blocks(file: HostFile, content: bytes, trailer: Trailer) -> Iterator[Block]:
    place = trailer.plist_offset or trailer.resources_offset
    if len(content) < _BLOCKS_AT or not content.startswith(_MAGIC):
        raise _corrupt(file, place, "a table of blocks is none")
    _, _, first_sector, _, data_offset = _HEAD.unpack_from(content)
    count = int.from_bytes(content[_COUNT_AT:_BLOCKS_AT], "big")
    if _BLOCKS_AT + count * _BLOCK.size > len(content):
        raise _corrupt(file, place, f"a table of {count} blocks has {len(content)} bytes")
    for index in range(count):
        kind, _, sector, sectors, offset, length = _BLOCK.unpack_from(content, _BLOCKS_AT + index * _BLOCK.size)
        if kind == Kind.END and index + 1 < count:
            raise _corrupt(file, place, f"block {index} of a table of {count} says that it is the end")
        if kind == Kind.END:
            return
        if kind == Kind.COMMENT or sectors == 0:
            continue
        first = first_sector + sector
        if first + sectors > _MAX_SECTORS:
            raise _corrupt(file, place, f"block {index} ends at sector {first + sectors}")
        if kind == Kind.RAW and length % SECTOR and length < sectors * SECTOR:
            message = f"block {index} has {length} plain bytes for {sectors} sectors, which are no whole sectors"
            raise _corrupt(file, place, message)
        yield Block(first, sectors, kind, trailer.data_offset + data_offset + offset, length)
    # Sectors of blocks that are not counted would read as zeros.
    if _BLOCKS_AT + (count + 1) * _BLOCK.size <= len(content):
        raise _corrupt(file, place, f"a table of {count} blocks has {len(content)} bytes, and no end among them")


def _corrupt(file: HostFile, at: int, message: str) -> ImageError:
    return ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=at, op="open")
