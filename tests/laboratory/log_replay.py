"""A log of the device mapper's target log-writes, read and replayed onto a file.

The log's format is Linux's (its administrator's guide on log-writes, and the two structures of dm-log-writes in its
sources): a sector with the magic, the version, the number of entries and the size of sectors; then for each entry a
sector with its head, and its data, which a discard has none of. A mark's text is beside its head.
The log has writes when a flush has made them durable, so every prefix of it is what a power failure may leave.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from enum import IntFlag
from typing import NamedTuple

MAGIC, VERSION = 0x6A736677736872, 1
_SUPER, _HEAD = struct.Struct("<QQQI"), struct.Struct("<QQQQ")
_PIECE = 1 << 20


class Flags(IntFlag):
    """The kinds of an entry."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


class Entry(NamedTuple):
    """A write, a discard or a mark: bytes of the device, and where its data lies in the log."""

    offset: int
    length: int
    flags: Flags
    mark: str
    data_at: int


def entries(log: int) -> Iterator[Entry]:
    """The entries of an open log, in order. ValueError: it is none."""
    magic, version, count, sector = _SUPER.unpack(os.pread(log, _SUPER.size, 0))
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError("this is no log of log-writes")
    at = sector
    for _ in range(count):
        first, sectors, bits, text_length = _HEAD.unpack(os.pread(log, _HEAD.size, at))
        flags = Flags(bits)
        mark = os.pread(log, text_length, at + _HEAD.size).rstrip(b"\0\n").decode() if flags & Flags.MARK else ""
        at += sector
        yield Entry(first * sector, sectors * sector, flags, mark, at)
        if not flags & Flags.DISCARD:
            at += sectors * sector


def replay(log: int, entry: Entry, target: int) -> None:
    """Do to the target what the entry did to the device."""
    for at in range(0, entry.length, _PIECE):
        piece = min(_PIECE, entry.length - at)
        # What is discarded reads as zeros here, as on most devices.
        data = bytes(piece) if entry.flags & Flags.DISCARD else os.pread(log, piece, entry.data_at + at)
        os.pwrite(target, data, entry.offset + at)
