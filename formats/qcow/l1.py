"""The L1 table: its bytes as they are on disk, and the decision about their byte order.

Each function that looks at the whole table works on strided slices or arrays, never entry by entry in
Python: a 2 TiB image has a million entries and must open in an instant.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator

from tapfs.formats.changed_table import ByteOrder
from tapfs.formats.qcow.extended import ExtendedHeader, table_cksum
from tapfs.formats.qcow.header import ENTRY_LENGTH

#: Zero entries are skipped in pieces of this many bytes.
_PIECE = 64 << 10


class L1Table:
    """The L1 entries of an image, in the byte order `order` that they have on disk."""

    def __init__(self, raw: bytearray, order: ByteOrder) -> None:
        self.raw = raw
        self.order: ByteOrder = order

    def __len__(self) -> int:
        return len(self.raw) // ENTRY_LENGTH

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(self.raw[ENTRY_LENGTH * index : ENTRY_LENGTH * (index + 1)], self.order)

    def __setitem__(self, index: int, value: int) -> None:
        self.raw[ENTRY_LENGTH * index : ENTRY_LENGTH * (index + 1)] = value.to_bytes(ENTRY_LENGTH, self.order)

    @property
    def is_empty(self) -> bool:
        """Whether every entry is zero."""
        return self.raw.count(0) == len(self.raw)

    def next_used(self, index: int, stop: int) -> int:
        """The first index from `index` on whose entry is not zero, or `stop`."""
        at, end = ENTRY_LENGTH * index, ENTRY_LENGTH * stop
        while at < end:
            piece = self.raw[at : min(at + _PIECE, end)]
            rest = piece.lstrip(b"\0")
            if rest:
                return (at + len(piece) - len(rest)) // ENTRY_LENGTH
            at += len(piece)
        return stop

    def used(self) -> Iterator[tuple[int, int]]:
        """``(index, entry)`` of every entry that is not zero, ascending by index. Nobody may change one meanwhile."""
        for at in range(0, len(self.raw), _PIECE):
            piece = bytes(self.raw[at : at + _PIECE])
            if piece.count(0) == len(piece):
                continue
            entries = array("Q", piece)
            if self.order != sys.byteorder:
                entries.byteswap()
            for index, entry in enumerate(entries, at // ENTRY_LENGTH):
                if entry:
                    yield index, entry

    def cksum(self) -> int:
        """The cksum of the table as it is now."""
        return table_cksum(self.raw)

    def swapped(self) -> bytes:
        """The bytes of the table in the other byte order."""
        return swapped(self.raw)


def swapped(raw: bytes | bytearray) -> bytes:
    """The same entries in the other byte order."""
    entries = array("Q", bytes(raw))
    entries.byteswap()
    return entries.tobytes()


def is_plausible(raw: bytes | bytearray, order: ByteOrder, cluster_size: int, file_size: int) -> bool:
    """Whether every nonzero entry, read in `order`, is cluster aligned and inside the file."""

    def column(significance: int) -> bytes | bytearray:
        return raw[(7 - significance if order == "big" else significance) :: ENTRY_LENGTH]

    count = len(raw) // ENTRY_LENGTH
    for significance in range(8):
        low_bits = ((cluster_size - 1) >> (8 * significance)) & 0xFF
        high_bits = 0xFF if file_size >> (8 * significance) == 0 else 0
        forbidden = low_bits | high_bits
        if forbidden == 0xFF:
            if column(significance).count(0) != count:
                return False
        elif forbidden and column(significance).translate(None, bytes(b for b in range(256) if not b & forbidden)):
            return False
    # The columns above bound an entry by the next power of 256 only.
    entries = array("Q", bytes(raw))
    if order != sys.byteorder:
        entries.byteswap()
    return max(entries, default=0) < file_size


def implausible_entries(raw: bytes | bytearray, order: ByteOrder, cluster_size: int, file_size: int) -> tuple[int, int]:
    """How many entries, read in `order`, cannot be true, and the largest entry. Slow; for damaged images only."""
    entries = array("Q", bytes(raw))
    if order != sys.byteorder:
        entries.byteswap()
    wrong = sum(1 for entry in entries if entry % cluster_size or entry >= file_size)
    return wrong, max(entries, default=0)


def decide_order(
    raw: bytearray,
    extended: ExtendedHeader | None,
    *,
    cluster_size: int,
    file_size: int,
    tables_plausible: Callable[[ByteOrder], bool],
) -> ByteOrder | None:
    """The byte order of an L1 table (docs/specs/blktap-qcow.md, "Byte order of L1"); None where neither fits.

    `tables_plausible` says whether the L2 tables that an order leads to look like tables; it is
    asked only where both orders fit, which takes a huge sparse file.
    """
    if raw.count(0) == len(raw):
        return "big"
    big = is_plausible(raw, "big", cluster_size, file_size)
    little = is_plausible(raw, "little", cluster_size, file_size)
    if big != little:
        return "big" if big else "little"
    if not big:
        return None
    other = swapped(raw)
    if other == bytes(raw):
        return "big"
    big, little = tables_plausible("big"), tables_plausible("little")
    by_evidence: ByteOrder | None = None
    if big != little:
        by_evidence = "big" if big else "little"
    if extended is not None and extended.cksum == table_cksum(raw):
        return "big" if extended.big_endian_flag else by_evidence or "little"
    if extended is not None and extended.cksum == table_cksum(other):
        # Made in one order and toggled by an open since: the original was big endian.
        return "little"
    return by_evidence or "big"
