"""A table of an image in memory that differs from the one on the disk, and which of its sectors do.

A table is an array of 4- or 8-byte words (typecode "I" or "Q"). A host disk writes whole sectors of 512 bytes, so a
plan has the changed sectors of a table, never single words.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Literal

ByteOrder = Literal["big", "little"]

#: The unit of atomicity that a host disk has.
SECTOR = 512


def decode(raw: bytes, typecode: str, order: ByteOrder) -> array[int]:
    """The words of a table on disk."""
    words = array(typecode, raw)
    if order != sys.byteorder:
        words.byteswap()
    return words


def encode(words: array[int], order: ByteOrder) -> bytes:
    """Words as they stand on disk."""
    if order == sys.byteorder:
        return words.tobytes()
    copy = words[:]
    copy.byteswap()
    return copy.tobytes()


class ChangedTable:
    """A table that differs from the disk.

    `pending` sectors changed since the last flush, `in_plan` ones are in the plan that is being executed.
    The runs of the last plan are kept while nothing changes: plans can be asked for with every commit.
    """

    __slots__ = ("_order", "_per_sector", "_runs", "entries", "in_plan", "pending")

    def __init__(self, entries: array[int], order: ByteOrder) -> None:
        self.entries = entries
        self.pending: set[int] = set()
        self.in_plan: set[int] = set()
        self._order: ByteOrder = order
        self._per_sector = SECTOR // entries.itemsize
        self._runs: list[tuple[int, bytes]] | None = None

    def mark(self, start: int, stop: int) -> None:
        """Note that the entries ``[start, stop)`` have changed."""
        if stop == start + 1:  # quicker, and the usual case of a fragmented disk
            self.pending.add(start // self._per_sector)
            return
        self.pending.update(range(start // self._per_sector, -(-stop // self._per_sector)))

    def mark_sectors(self, sectors: bytearray) -> None:
        """Note that the sectors have changed of which the byte is not 0."""
        self.pending.update(at for at, changed in enumerate(sectors) if changed)

    def begin_plan(self) -> None:
        """What is pending is in the plan that is being made."""
        if self.pending:
            self.in_plan |= self.pending
            self.pending.clear()
            self._runs = None

    def added_runs(self) -> list[tuple[int, bytes]]:
        """Runs of the sectors that are pending, which are in the plan from now on."""
        added = list(self._sector_runs(self.pending))
        self.begin_plan()
        return added

    def plan_done(self) -> None:
        """What was in the plan is durable."""
        self.in_plan.clear()
        self._runs = None

    def sector_runs(self) -> list[tuple[int, bytes]]:
        """Runs of the sectors in the plan: byte offset in the table, bytes."""
        if self._runs is None:
            self._runs = list(self._sector_runs(self.in_plan))
        return self._runs

    def _sector_runs(self, chosen: set[int]) -> Iterator[tuple[int, bytes]]:
        sectors = sorted(chosen)
        start = 0
        for at in range(1, len(sectors) + 1):
            if at == len(sectors) or sectors[at] != sectors[at - 1] + 1:
                first, last = sectors[start], sectors[at - 1] + 1
                yield (
                    first * SECTOR,
                    encode(self.entries[first * self._per_sector : last * self._per_sector], self._order),
                )
                start = at
