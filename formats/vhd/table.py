"""The block allocation table of an open VHD: for each block the host sector of its bitmap, or UNUSED."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.driver import CheckReport, HostFile
from tapfs.formats.blocks.check import further_blocks
from tapfs.formats.blocks.layout import BlockLayout
from tapfs.formats.blocks.table import BlockTable
from tapfs.formats.claims import Claim
from tapfs.formats.vhd.dynamic_header import ENTRY_LENGTH, SECTOR, UNUSED, DynamicHeader

#: Entries looked at together where all of them are.
_PIECE = 1 << 16


class AllocationTable:
    """The entries that a disk needs, by block. A table on disk may have more, which are nobody's.

    `changes` has what differs from the disk (`begin_plan`, `steps`, `plan_done`).
    """

    def __init__(self, file: HostFile, header: DynamicHeader, disk_bytes: int) -> None:
        self._layout = BlockLayout(
            virtual_size=disk_bytes,
            block_bytes=header.block_size,
            table_offset=header.table_offset,
            entry_bytes=ENTRY_LENGTH,
            order="big",
            slot_bytes=header.bitmap_bytes + header.block_size,
            scale=SECTOR,
            free=UNUSED,
            least_place=header.table_end,
            payload_at=header.bitmap_bytes,
        )
        self._file = file
        self._entries = header.max_entries
        self.changes = BlockTable(file, self._layout)

    def __len__(self) -> int:
        return self._layout.blocks

    def place(self, index: int) -> int | None:
        """The host offset of a block's bitmap; None for a block that is not there."""
        _, entries = next(self.changes.pieces(index, index + 1))
        return None if entries[0] == UNUSED else entries[0] * SECTOR

    def entry_offset(self, index: int) -> int:
        """The host offset of a block's entry, for messages."""
        return self._layout.entry_place(index)

    def enter(self, index: int, place: int | None) -> None:
        """Change an entry."""
        self.changes.set(index, array("I", (UNUSED if place is None else place // SECTOR,)))

    def further(self, report: CheckReport) -> Iterator[Claim]:
        """The places that entries behind those of the disk name, as `tapfs.formats.blocks.check.further_blocks`."""
        return further_blocks(self._file, self._layout, self._entries, report)

    def next_used(self, index: int, stop: int) -> int:
        """The first block from `index` on that is there, or `stop`."""
        return self.changes.free_until(index, stop)

    def used(self) -> Iterator[tuple[int, int]]:
        """``(index, place)`` of every block that is there. Nobody may change one meanwhile."""
        index, stop = 0, len(self)
        while (index := self.next_used(index, stop)) < stop:
            end = min(index + _PIECE, stop)
            for first, entries in self.changes.pieces(index, end):
                for at, entry in enumerate(entries, first):
                    if entry != UNUSED:
                        yield at, entry * SECTOR
            index = end

    def bounds(self) -> tuple[int, int] | None:
        """The least and the largest host offset of a bitmap; None in an image without blocks."""
        lowest, highest = UNUSED, -1
        index, stop = 0, len(self)
        while (index := self.next_used(index, stop)) < stop:
            end = min(index + _PIECE, stop)
            for _, entries in self.changes.pieces(index, end):
                lowest = min(lowest, *entries)  # UNUSED is the largest entry
                highest = max(highest, max((entry for entry in entries if entry != UNUSED), default=-1))
            index = end
        return None if highest < 0 else (lowest * SECTOR, highest * SECTOR)
