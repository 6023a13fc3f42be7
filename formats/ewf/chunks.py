"""The tables that say where the chunks of the disk stand (docs/specs/ewf.md, "Tables").

A table has one word for each chunk: the chunk's offset in the segment file, and a bit that says whether the chunk is
packed. The length of a chunk is the distance to the next one, or to the end of the section that holds the chunks. A
table stands twice; where one copy is damaged the other is read.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.formats.ewf.sections import Section

#: Entries, the base that is added to each offset, the checksum of all before it.
_HEADER = struct.Struct("<I4xQ4xI")
_PACKED = 1 << 31
ENTRY_BYTES = 4


class Copy(NamedTuple):
    """One copy of a table: the offset of its entries, their number and base, and whether its header's checksum fits."""

    entries_at: int
    entries: int
    base: int
    header_right: bool


class Table(NamedTuple):
    """A table: the first chunk that it has, its segment, its copies, and the sections that chunks may lie in.

    `areas` are ``(start, end)`` of the sections of the segment before the table and of the table itself.
    """

    first: int
    entries: int
    file_number: int
    file: HostFile
    copies: tuple[Copy, ...]
    areas: tuple[tuple[int, int], ...]


def read_copy(file: HostFile, section: Section) -> Copy:
    """The header of a table's copy. Raises ImageError(corrupt) if the section cannot hold its entries."""
    raw = file.read(section.content, _HEADER.size)
    if len(raw) < _HEADER.size:
        raise _corrupt(file, section.content, "the header of a table is cut off")
    count, base, checksum = _HEADER.unpack(raw)
    entries_at = section.content + _HEADER.size
    if entries_at + ENTRY_BYTES * count > section.end:
        raise _corrupt(file, section.content, f"a table of {count} entries does not fit its section")
    return Copy(entries_at, count, base, checksum == zlib.adler32(raw[:-4]))


def read_entries(table: Table, copy: Copy) -> array[int] | None:
    """The entries of a copy, None where its checksums do not fit."""
    raw = table.file.read(copy.entries_at, ENTRY_BYTES * copy.entries + 4)
    entries, checksum = raw[: ENTRY_BYTES * copy.entries], raw[ENTRY_BYTES * copy.entries :]
    # SMART's tables have chunks in place of the second checksum.
    unchecked = len(table.copies) == 1
    if not copy.header_right or (not unchecked and int.from_bytes(checksum, "little") != zlib.adler32(entries)):
        return None
    words = array("I", entries)
    if sys.byteorder == "big":
        words.byteswap()
    return words


def entries_of(table: Table) -> tuple[Copy, array[int]]:
    """The first copy that is whole, and its entries. Raises ImageError(corrupt) if there is none."""
    for copy in table.copies:
        entries = read_entries(table, copy)
        if entries is not None and len(entries) == table.entries:
            return copy, entries
    raise _corrupt(table.file, table.copies[0].entries_at, "no copy of a table of chunks has the right checksum")


def places(entries: array[int], base: int) -> tuple[list[int], list[bool]]:
    """The host offset of each chunk, and whether it is packed.

    EnCase 6.7 wrote segments of more than 2 GiB without a base. From the first offset that falls on, all 32 bits are
    the offset of a plain chunk.
    """
    offsets = [entry & ~_PACKED for entry in entries]
    packed = [bool(entry & _PACKED) for entry in entries]
    falls = next((i for i in range(1, len(offsets)) if offsets[i] < offsets[i - 1]), len(offsets))
    for i in range(falls, len(offsets)):
        offsets[i], packed[i] = entries[i], False
    return [offset + base for offset in offsets], packed


def extents_of(table: Table, chunk_bytes: int, virtual_size: int) -> Sequence[Extent | ImageError]:
    """The chunks of a table, each an extent, or the ImageError(corrupt) of one that lies nowhere.

    Raises ImageError(corrupt) for a table without a whole copy.
    """
    copy, entries = entries_of(table)
    offsets, packed = places(entries, copy.base)
    found: list[Extent | ImageError] = []
    for i, start in enumerate(offsets):
        index = table.first + i
        area_end = next((end for begin, end in table.areas if begin <= start < end), None)
        end = offsets[i + 1] if i + 1 < len(offsets) else area_end
        entry_at = copy.entries_at + ENTRY_BYTES * i
        if area_end is None or end is None or not start < end <= area_end:
            message = f"chunk {index} at {start:#x} lies in no section of chunks"
            found.append(_corrupt(table.file, entry_at, message))
            continue
        offset = index * chunk_bytes
        if packed[i]:
            found.append(Extent(offset, chunk_bytes, Kind.COMPRESSED, table.file_number, start, end - start))
            continue
        inside = min(chunk_bytes, virtual_size - offset)
        if end - start < inside:
            message = f"chunk {index} at {start:#x} has {end - start} bytes, the disk needs {inside}"
            found.append(_corrupt(table.file, entry_at, message))
            continue
        found.append(Extent(offset, chunk_bytes, Kind.DATA, table.file_number, start))
    return found


def _corrupt(file: HostFile, at: int, message: str) -> ImageError:
    return ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=at, op="map")
