"""Repair a VMDK: make the copies of its tables agree, write a lost footer, and give leaked space back.

Of two tables that differ the primary counts, because all readers use it. The redundant one counts where the primary
cannot be true, where the primary is blank and the redundant is not, and where a closed extent has a primary that lacks
entries of the redundant. Entries that only the redundant one has are left alone where other grains are in doubt, too. A
table whose place in a directory cannot be true is written anew, at the end of the file. Last of all the extent is
marked as closed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tapfs.formats.changed_table import encode
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk import cowd_header, sparse_header
from tapfs.formats.vmdk.check import Check
from tapfs.formats.vmdk.grain_tables import ENTRY_BYTES, GrainTables
from tapfs.formats.vmdk.host_extents import CowdExtent, HostedExtent
from tapfs.formats.vmdk.markers import footer_sectors
from tapfs.formats.vmdk.reader import VmdkReader
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.plan import Discard, Grow, Plan, Step, Write, plan


def repair(image: VmdkReader) -> Sequence[Plan]:
    """Plans for every extent, executed one after the other. See :meth:`tapfs.driver.Checkable.repair`."""
    plans: list[Plan] = []
    checked = Check(image)
    for extent in image.disk.sparse:
        if isinstance(extent, HostedExtent):
            plans += _Repair(extent, sound=not checked.unmended[extent.number]).plans()
        if isinstance(extent, CowdExtent):
            plans += _next_grain(extent, checked.ends[extent.number])
        # What looks leaked may belong to a table that cannot be read, and tables that differ are known by the mark.
        if isinstance(extent, HostedExtent | CowdExtent) and not checked.unmended[extent.number]:
            plans += _leaks(extent.number, checked.leaks.get(extent.number, []))
            plans += _closed(extent)
    return plans


def _leaks(number: int, ranges: Sequence[tuple[int, int]]) -> Iterator[Plan]:
    if ranges:
        total = sum(length for _, length in ranges)
        yield plan([Discard(number, *each) for each in ranges], mends=f"leaked space of {total} bytes")


def _next_grain(extent: CowdExtent, end: int) -> Iterator[Plan]:
    if extent.header.next_free_sector * SECTOR < end:
        content = (end // SECTOR).to_bytes(4, "little")
        yield plan([Write(extent.number, cowd_header.NEXT_FREE_AT, content)], mends="the place of the next grain")


def _closed(extent: HostedExtent | CowdExtent) -> Iterator[Plan]:
    if not extent.unclean:
        return
    hosted = isinstance(extent, HostedExtent)
    at, width = (sparse_header.UNCLEAN_AT, 1) if hosted else (cowd_header.UNCLEAN_AT, 4)
    yield plan([Write(extent.number, at, bytes(width))], mends="an extent that was not closed")


class _Repair:
    """The plans for one hosted extent. `_end` is the end of its file, as the plans so far leave it.

    `sound`: no grain is in doubt, so what a redundant table has alone lies over nothing else.
    """

    def __init__(self, extent: HostedExtent, *, sound: bool) -> None:
        self._extent = extent
        self._sound = sound
        self._tables: GrainTables = extent.tables
        self._end = round_up(extent.file.size(), SECTOR)

    def plans(self) -> Iterator[Plan]:
        """One plan for each table, and one for a directory or a footer."""
        tables, extent = self._tables, self._extent
        if extent.trailer.lost_footer:
            header = extent.header
            steps: list[Step] = [Write(extent.number, self._end, footer_sectors(header))]
            yield plan(steps, mends="a lost footer")
        if tables.redundant is None or self._directories_overlap():
            return
        if tables.directory_faults:
            if len(tables.directory_faults) == 1:
                yield self._new_directory(redundant=self._is_readable(tables.layout.directory_at))
            return
        total = tables.layout.directory_entries
        index = tables.next_used(0, total)
        while index < total:
            yield from self._table_plans(index)
            index = tables.next_used(index + 1, total)

    def _directories_overlap(self) -> bool:
        """Whether the header itself cannot be true: then nothing that it says is a reason to write."""
        ranges = sorted(self._tables.layout.metadata)
        return any(left[1] > right[0] for left, right in pairwise(ranges))

    def _is_readable(self, place: int) -> bool:
        return all(place != at for _, at in self._tables.directory_faults)

    def _table_plans(self, index: int) -> Iterator[Plan]:
        primary, twin = self._content(index, redundant=False), self._content(index, redundant=True)
        redundant = self._tables.prefers_twin(index, primary, twin)
        if not self._sound and primary and twin and self._tables.has_lost_entries(primary, twin):
            return
        good = twin if redundant else primary
        if primary != twin and good is not None and self._tables.first_fault(index, good) is None:
            yield self._copied(index, good, redundant=not redundant)

    def _content(self, index: int, *, redundant: bool) -> array[int] | None:
        """The entries of a table; None if its place cannot be true."""
        place = self._tables.table_at(index, redundant=redundant)
        if place == 0 or self._tables.table_fault(place) is not None:
            return None
        return self._tables.read_table(place)

    def _copied(self, index: int, table: array[int], *, redundant: bool) -> Plan:
        """The plan that writes a table to the place of its twin, or to a new place if that one cannot be true."""
        number = self._extent.number
        place = self._tables.table_at(index, redundant=redundant)
        content = encode(table, "little")
        name = "redundant grain table" if redundant else "grain table"
        if place and self._tables.table_fault(place) is None:
            return plan([Write(number, place, content)], mends=f"{name} {index}, from its twin")
        new = self._taken(self._tables.layout.table_bytes)
        layout = self._tables.layout
        at = (layout.redundant_at if redundant else layout.directory_at) + ENTRY_BYTES * index
        return plan(
            [Grow(number, self._end)],
            [Write(number, new, content)],
            [Write(number, at, (new // SECTOR).to_bytes(ENTRY_BYTES, "little"))],
            mends=f"{name} {index} and its place, from its twin",
        )

    def _new_directory(self, *, redundant: bool) -> Plan:
        """The plan for a directory at the end of the file, with copies of the tables of the other one."""
        tables, number = self._tables, self._extent.number
        layout = tables.layout
        directory = array("I", bytes(layout.directory_bytes))
        steps: list[Step] = []
        for index in range(layout.directory_entries):
            table = self._content(index, redundant=not redundant)
            if table is not None and tables.first_fault(index, table) is None:
                place = self._taken(layout.table_bytes)
                directory[index] = place // SECTOR
                steps.append(Write(number, place, encode(table, "little")))
        start = self._taken(round_up(layout.directory_bytes, SECTOR))
        steps.append(Write(number, start, encode(directory, "little")))
        at = sparse_header.REDUNDANT_AT if redundant else sparse_header.DIRECTORY_AT
        return plan(
            [Grow(number, self._end)],
            steps,
            [Write(number, at, (start // SECTOR).to_bytes(8, "little"))],
            mends="the redundant grain directory" if redundant else "the grain directory, from the redundant one",
        )

    def _taken(self, length: int) -> int:
        """The place of `length` bytes at the end of the file."""
        place, self._end = self._end, self._end + length
        return place
