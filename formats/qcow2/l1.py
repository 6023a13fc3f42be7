"""The L1 table of a qcow2 disk in memory: words as they are on the disk, never stepped through where they are zero."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator

from tapfs.formats.qcow2.entries import OFFSET, TYPECODE
from tapfs.formats.qcow2.header import WORD
from tapfs.plan import Step, Write

#: Zero entries are skipped in pieces of this many bytes.
_PIECE = 64 << 10


class L1Table:
    """The L1 entries of one disk: the current one, or a snapshot."""

    def __init__(self, raw: bytearray) -> None:
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw) // WORD

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(self.raw[WORD * index : WORD * (index + 1)], "big")

    def __setitem__(self, index: int, value: int) -> None:
        self.raw[WORD * index : WORD * (index + 1)] = value.to_bytes(WORD, "big")

    def table(self, index: int) -> int:
        """The host offset of the L2 table of an entry, 0 for none. Entries behind the table have none."""
        return self[index] & OFFSET if index < len(self) else 0

    def next_used(self, index: int, stop: int) -> int:
        """The first index from `index` on whose entry is not zero, or `stop`."""
        at, end = WORD * index, WORD * stop
        while at < end:
            piece = self.raw[at : min(at + _PIECE, end)]
            rest = piece.lstrip(b"\0")
            if rest:
                return (at + len(piece) - len(rest)) // WORD
            at += len(piece)
        return stop

    def used(self) -> Iterator[tuple[int, int]]:
        """``(index, entry)`` of every entry that is not zero, ascending by index. Nobody may change one meanwhile."""
        for at in range(0, len(self.raw), _PIECE):
            piece = bytes(self.raw[at : at + _PIECE])
            if piece.count(0) == len(piece):
                continue
            for index, entry in enumerate(self.entries(at // WORD, (at + len(piece)) // WORD), at // WORD):
                if entry:
                    yield index, entry

    def entries(self, start: int, stop: int) -> array[int]:
        """The entries ``[start, stop)`` as numbers."""
        words = array(TYPECODE, bytes(self.raw[WORD * start : WORD * stop]))
        if sys.byteorder == "little":
            words.byteswap()
        return words


def l1_steps(l1: L1Table, offset: int, indexes: Iterable[int]) -> list[Step]:
    """The writes of these entries of a table that lies at `offset`, those that follow one another in one write."""
    steps: list[Step] = []
    start = last = -2
    for index in sorted(indexes):
        if index != last + 1:
            if start >= 0:
                steps.append(Write(0, offset + WORD * start, bytes(l1.raw[WORD * start : WORD * (last + 1)])))
            start = index
        last = index
    if start >= 0:
        steps.append(Write(0, offset + WORD * start, bytes(l1.raw[WORD * start : WORD * (last + 1)])))
    return steps
