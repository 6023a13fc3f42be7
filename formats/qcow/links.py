"""The links of an open image: its L1 and L2 entries, from which allocated clusters hang and are taken off again.

A reservation may have hundreds of runs, each of one cluster. So a run costs no more here than its own entries: a table
is looked up once for all runs in it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from tapfs.driver import HostSpace, Placement
from tapfs.extent import Kind, Range
from tapfs.formats.allocation import Allocation
from tapfs.formats.blank_pages import blank_bytes, blank_entries
from tapfs.formats.changed_table import ChangedTable
from tapfs.formats.qcow.entries import Run, consecutive, fault, new_table, runs
from tapfs.formats.qcow.header import ENTRY_LENGTH, Header
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
        #: Places that are kept for tables which a commit makes, by L1 index. An abort leaves them for the next one.
        self._kept: dict[int, int] = {}

    def require_tables(self, ranges: Sequence[Range], spaces: list[HostSpace]) -> list[int]:
        """Load the tables of ascending ranges of clusters; the result is the L1 indexes of those that are missing.

        What of the others the host may have no space for is added to `spaces`. Raises ImageError(corrupt) for an L1
        entry that cannot be true.
        """
        bits, l2_bits = self._header.cluster_bits, self._header.l2_bits
        missing: list[int] = []
        index, first, stop = -1, 0, 0
        for offset, length in ranges:
            at, end = offset >> bits, (offset + length) >> bits
            while at < end:
                if at >> l2_bits != index:
                    if index >= 0:
                        self._require_table(index, first, stop, spaces, missing)
                    index, first = at >> l2_bits, at
                at = stop = min(end, (index + 1) << l2_bits)
        if index >= 0:
            self._require_table(index, first, stop, spaces, missing)
        return missing

    def _require_table(self, index: int, first: int, stop: int, spaces: list[HostSpace], missing: list[int]) -> None:
        """Do so for one table, in which clusters ``[first, stop)`` of the disk change."""
        table = self._tables.load(index)
        if table is None:
            missing.append(index)
        else:
            base = index << self._header.l2_bits
            spaces += blank_entries(self._l1[index], table, first - base, stop - base)

    def keep_tables(self, missing: Sequence[int]) -> Iterator[HostSpace]:
        """Keep places for tables that a commit will make; what the host may have no space for."""
        for index in missing:
            if index not in self._kept:
                self._kept[index] = self._allocation.tail(self._header.l2_length)
            yield from self.new_table_space(index, self._kept[index])

    def new_table_space(self, index: int, place: int) -> Iterator[HostSpace]:
        """What of a new table at `place`, and of its L1 entry, the host may have no space for."""
        yield HostSpace(place, self._header.l2_length, unused=True)
        at = ENTRY_LENGTH * index
        yield from blank_bytes(self._header.l1_table_offset, self._l1.raw, at, at + ENTRY_LENGTH)

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
                for used in self._release(changed.entries, first, stop):
                    # A page of entries that are zeros anyway may be a hole, for which a full host has no space.
                    after = used.first + used.clusters
                    changed.entries[used.first : after] = new_table(used.clusters)
                    changed.mark(used.first, after)

    def _release(self, entries: array[int], first: int, stop: int) -> list[Run]:
        """Give back the clusters of a part of a table, whose entries stay; the runs that are not nothing."""
        used = [run for run in runs(entries, self._header.cluster_bits, first, stop) if run.kind != Kind.UNALLOCATED]
        for run in used:
            # What lies at an impossible place is left alone: it may be the header.
            if fault(run, self._header, self._tables.file_size) is not None:
                continue
            if run.kind == Kind.COMPRESSED:
                self._allocation.release(run.host_offset, run.host_length, reusable=False)
            else:
                self._allocation.release(run.host_offset, run.clusters * self._header.cluster_size)
        return used

    def changed_table(self, index: int) -> ChangedTable:
        """The L2 table of L1 entry `index`, to be changed; allocated if there is none."""
        if self._l1[index] == 0:
            kept = self._kept.pop(index, None)
            table_offset = self._allocation.tail(self._header.l2_length) if kept is None else kept
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
