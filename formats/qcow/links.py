"""The links of an open image: its L1 and L2 entries, from which allocated clusters hang and are taken off again.

A reservation may have hundreds of runs, each of one cluster. So a run costs no more here than its own entries: a table
is looked up once for all runs in it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from tapfs.driver import Placement
from tapfs.extent import Kind, Range
from tapfs.formats.allocation import Allocation
from tapfs.formats.changed_table import ChangedTable
from tapfs.formats.qcow.entries import consecutive, fault, new_table, runs
from tapfs.formats.qcow.header import Header
from tapfs.formats.qcow.l1 import L1Table
from tapfs.formats.qcow.tables import Tables


class Links:
    """The L1 table and the L2 tables of one image as its writer changes them."""

    def __init__(self, header: Header, l1: L1Table, tables: Tables, allocation: Allocation) -> None:
        self._header = header
        self._l1 = l1
        self._tables = tables
        self._allocation = allocation
        #: The L1 entries that changed since the last flush.
        self.l1_pending: set[int] = set()

    def require_tables(self, ranges: Sequence[Range]) -> None:
        """Load the tables of ascending ranges. Raises ImageError(corrupt) for an L1 entry that cannot be true."""
        unit, following = self._header.unit, 0
        for offset, length in ranges:
            stop = (offset + length - 1) // unit + 1
            for index in range(max(offset // unit, following), stop):
                self._tables.load(index)
            following = stop

    def link(self, placements: Sequence[Placement]) -> None:
        """Enter clusters in the map: those of placements that ascend, but for what is in place."""
        header = self._header
        bits, l2_bits, in_table = header.cluster_bits, header.l2_bits, header.l2_entries - 1
        # First, for no entry may ever point past the end that the file is given.
        ends = [place + length for _, length, place, _, _, in_place in placements if not in_place]
        self._allocation.commit(0, max(ends, default=0))
        index, changed = -1, None
        for offset, length, place, _, _, in_place in placements:
            if in_place:
                continue
            host_offset = place
            at, end = offset >> bits, (offset + length) >> bits
            while at < end:
                if changed is None or at >> l2_bits != index:
                    index = at >> l2_bits
                    changed = self.changed_table(index)
                first = at & in_table
                if end == at + 1 and not changed.entries[first]:  # usual on a fragmented disk
                    changed.entries[first] = host_offset
                    changed.mark(first, first + 1)
                    break
                stop = min(in_table + 1, first + end - at)
                self._enter(changed, first, stop, host_offset)
                host_offset += (stop - first) << bits
                at += stop - first

    def _enter(self, changed: ChangedTable, first: int, stop: int, host_offset: int) -> None:
        self._release(changed.entries, first, stop)
        changed.entries[first:stop] = consecutive(host_offset, stop - first, self._header.cluster_size)
        changed.mark(first, stop)

    def unlink(self, ranges: Sequence[Range]) -> None:
        """Take the clusters of the ranges off the map."""
        for offset, length in ranges:
            for index, first, stop in self.used_pieces(offset, length):
                table = self._tables.load(index)
                nothing = new_table(stop - first)
                if table is None or table[first:stop] == nothing:
                    continue
                changed = self.changed_table(index)
                self._release(changed.entries, first, stop)
                changed.entries[first:stop] = nothing
                changed.mark(first, stop)

    def _release(self, entries: array[int], first: int, stop: int) -> None:
        for run in runs(entries, self._header.cluster_bits, first, stop):
            # What lies at an impossible place is left alone: it may be the header.
            if run.kind == Kind.UNALLOCATED or fault(run, self._header, self._tables.file_size) is not None:
                continue
            if run.kind == Kind.COMPRESSED:
                self._allocation.release(run.host_offset, run.host_length, reusable=False)
            else:
                self._allocation.release(run.host_offset, run.clusters * self._header.cluster_size)

    def changed_table(self, index: int) -> ChangedTable:
        """The L2 table of L1 entry `index`, to be changed; allocated if there is none."""
        if self._l1[index] == 0:
            table_offset = self._allocation.tail(self._header.l2_length)
            return self.enter_table(index, table_offset, new_table(self._header.l2_entries))
        return self._tables.change(index)

    def enter_table(self, index: int, table_offset: int, entries: array[int]) -> ChangedTable:
        """Have L1 entry `index`, which was zero, point at a table that is new on disk."""
        self._l1[index] = table_offset
        self.l1_pending.add(index)
        self._allocation.commit(table_offset, self._header.l2_length)
        return self._tables.create(index, entries)

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The L1 indexes that a granule-aligned range touches, each with its L2 indexes ``[first, stop)``."""
        header = self._header
        at, end = offset >> header.cluster_bits, (offset + length) >> header.cluster_bits
        while at < end:
            index, first = at >> header.l2_bits, at & (header.l2_entries - 1)
            stop = min(header.l2_entries, first + end - at)
            yield index, first, stop
            at += stop - first

    def used_pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The same, without the indexes that have no table."""
        unit = self._header.unit
        end = offset + length
        index, last = offset // unit, -(-end // unit)
        while (index := self._l1.next_used(index, last)) < last:
            start = max(offset, index * unit)
            yield from self.pieces(start, min(end, (index + 1) * unit) - start)
            index += 1
