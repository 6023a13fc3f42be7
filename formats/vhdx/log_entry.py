"""An entry of the log: the header, the descriptors and the data of one change of metadata (docs/specs/vhdx.md, "Log").

An entry is whole sectors of 4 KiB: first the header with the descriptors, then one sector for each page that it writes.
Each sector has the entry's sequence number, and a checksum covers all of it. So an entry that a crash has torn shows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from tapfs.formats.rounding import round_up
from tapfs.formats.vhdx.crc32c import crc32c_without
from tapfs.formats.vhdx.units import MAX_FILE_BYTES, PAGE
from tapfs.records import NamedTuple

_SIGNATURE, _ZERO, _DATA, _SECTOR = b"loge", b"zero", b"desc", b"data"
CRC_AT = 4
HEADER_BYTES = 64
_DESCRIPTOR_BYTES = 32
#: No page before this is logged: there are the identifier and the headers.
_LEAST_PAGE = 192 << 10

#: Signature, checksum, length, tail, sequence, number of descriptors, the log's GUID, two lengths of the file.
_HEADER = struct.Struct("<4sIIIQI4x16sQQ")
#: Signature, then for "zero" 4 unused bytes and a length, for "desc" the last 4 and the first 8 bytes of the page.
_ZERO_DESCRIPTOR = struct.Struct("<4s4xQQQ")
_DATA_DESCRIPTOR = struct.Struct("<4s4s8sQQ")


class EntryHeader(NamedTuple):
    """The header of an entry. `tail` is the offset in the log from which a replay begins if this is the newest entry.

    The file was `flushed_bytes` long, durably, when the entry was written, and needs `last_bytes`.
    """

    crc: int
    length: int
    tail: int
    sequence: int
    descriptors: int
    log: bytes
    flushed_bytes: int
    last_bytes: int


class ZeroRange(NamedTuple):
    """``[offset, offset + length)`` of the file is zeros."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


class LoggedPage(NamedTuple):
    """A page of the file, and its 4096 bytes."""

    offset: int
    data: bytes

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + PAGE


Change = ZeroRange | LoggedPage


def descriptor_bytes(descriptors: int) -> int:
    """The length of header and descriptors, in whole sectors."""
    return round_up(HEADER_BYTES + descriptors * _DESCRIPTOR_BYTES, PAGE)


def entry_bytes(pages: int) -> int:
    """The length of an entry that writes so many pages."""
    return descriptor_bytes(pages) + pages * PAGE


def parse_header(raw: bytes, log: bytes, log_bytes: int) -> EntryHeader | None:
    """The header of an entry in the log with that GUID, None where there can be none."""
    if not raw.startswith(_SIGNATURE):
        return None
    header = EntryHeader(*_HEADER.unpack_from(raw)[1:])
    possible = (
        header.log == log
        and header.sequence > 0
        and header.length % PAGE == 0
        and PAGE <= header.length <= log_bytes
        and descriptor_bytes(header.descriptors) <= header.length
        and header.tail % PAGE == 0
        and header.tail < log_bytes
    )
    return header if possible else None


def parse_changes(read: Callable[[int, int], bytes], header: EntryHeader) -> list[Change] | None:
    """What a whole entry does, in its order; None if it is torn or cannot be true.

    `read(offset, length)` gives bytes of the entry. It is read sector by sector as far as every sector is what it must
    be, so that a false header costs little. The checksum is looked at last.
    """
    descriptors_end = descriptor_bytes(header.descriptors)
    found: list[Change] = []
    left = header.descriptors
    sectors: list[bytes] = []
    for sector_at in range(0, descriptors_end, PAGE):
        sector = read(sector_at, PAGE)
        sectors.append(sector)
        start = HEADER_BYTES if sector_at == 0 else 0
        stop = min(PAGE, start + left * _DESCRIPTOR_BYTES)
        left -= (stop - start) // _DESCRIPTOR_BYTES
        for at in range(start, stop, _DESCRIPTOR_BYTES):
            change = _parse_descriptor(sector[at : at + _DESCRIPTOR_BYTES], header.sequence)
            if change is None:
                return None
            found.append(change)
    pages = sum(isinstance(change, LoggedPage) for change in found)
    if descriptors_end + pages * PAGE != header.length:
        return None
    sector_at = descriptors_end
    for index, change in enumerate(found):
        if isinstance(change, LoggedPage):
            sector = read(sector_at, PAGE)
            if not _is_sector(sector, header.sequence):
                return None
            sectors.append(sector)
            sector_at += PAGE
            found[index] = LoggedPage(change.offset, change.data[:8] + sector[8:-4] + change.data[8:])
    return found if crc32c_without(b"".join(sectors), CRC_AT) == header.crc else None


def _parse_descriptor(raw: bytes, sequence: int) -> Change | None:
    """A descriptor; a page has only its first 8 and its last 4 bytes so far."""
    change: Change
    if raw.startswith(_ZERO):
        _, length, offset, own = _ZERO_DESCRIPTOR.unpack(raw)
        change = ZeroRange(offset, length)
    elif raw.startswith(_DATA):
        _, last, first, offset, own = _DATA_DESCRIPTOR.unpack(raw)
        length = PAGE
        change = LoggedPage(offset, first + last)
    else:
        return None
    possible = (
        own == sequence
        and offset % PAGE == 0
        and length % PAGE == 0
        and length > 0
        and _LEAST_PAGE <= offset <= MAX_FILE_BYTES - length
    )
    return change if possible else None


def _is_sector(sector: bytes, sequence: int) -> bool:
    if len(sector) < PAGE or not sector.startswith(_SECTOR):
        return False
    return sector[4:8] == (sequence >> 32).to_bytes(4, "little") and sector[-4:] == _low(sequence)


def _low(sequence: int) -> bytes:
    return (sequence & 0xFFFFFFFF).to_bytes(4, "little")


def pack_entry(header: EntryHeader, pages: Sequence[LoggedPage]) -> bytes:
    """An entry on disk; the header's checksum, length and number of descriptors are those of the pages."""
    filled = header._replace(crc=0, length=entry_bytes(len(pages)), descriptors=len(pages))
    raw = b"".join(_pieces(filled, pages))
    return raw[:CRC_AT] + crc32c_without(raw, CRC_AT).to_bytes(4, "little") + raw[CRC_AT + 4 :]


def _pieces(header: EntryHeader, pages: Sequence[LoggedPage]) -> Iterator[bytes]:
    head = _HEADER.pack(_SIGNATURE, *header)
    for page in pages:
        head += _DATA_DESCRIPTOR.pack(_DATA, page.data[-4:], page.data[:8], page.offset, header.sequence)
    yield head.ljust(descriptor_bytes(len(pages)), b"\0")
    high, low = (header.sequence >> 32).to_bytes(4, "little"), _low(header.sequence)
    for page in pages:
        yield _SECTOR + high + page.data[8:-4] + low
