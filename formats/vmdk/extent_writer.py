"""Write one sparse extent: places for grains, changes of its tables, and the steps that bring them to the disk.

A hosted extent may have its tables twice. Every change goes to both. The entry of a new table enters the primary
directory first, so after a crash the redundant one can lack an entry, and no more: the twin of such a table is made
when the table is changed again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.driver import HostSpace, Operation, Placement
from tapfs.extent import Kind
from tapfs.formats.allocation import Allocation
from tapfs.formats.blank_pages import blank_entries
from tapfs.formats.changed_table import ChangedTable, encode
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk import cowd_header
from tapfs.formats.vmdk.grain_runs import NO_GRAIN, ZERO_GRAIN, Run, consecutive, runs
from tapfs.formats.vmdk.grain_tables import ENTRY_BYTES, GrainTables
from tapfs.formats.vmdk.host_extents import CowdExtent, HostedExtent
from tapfs.formats.vmdk.parts import SparsePart
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.plan import Discard, Grow, Step, Write

#: Entries are sectors in 32 bits.
_MAX_HOST_SIZE = SECTOR << 32


class ExtentWriter:
    """The writer of `extent`, which is the part `part` of the disk. Offsets are those of the disk, in bytes."""

    def __init__(self, extent: HostedExtent | CowdExtent, part: SparsePart, *, has_backing: bool) -> None:
        self.part = part
        self._extent = extent
        self._tables = tables = extent.tables
        self._grain = grain = tables.grain
        #: Whether zeros must stand on the host, because no entry can hide what the parent has.
        self.zeros_take_places = has_backing and not tables.rules.zeroed
        self._zeroed = has_backing and tables.rules.zeroed
        size = tables.file_size
        # The last grain of a file that ends inside one may lie at any sector: nothing begins before its end.
        end = size if size % grain == 0 else round_up(size, grain) + grain
        self.allocation = Allocation(extent.file.path, end, grain, max_size=_MAX_HOST_SIZE)
        #: Directory entries that changed since the last flush, and those that are in the plan.
        self._pending: set[int] = set()
        self._in_plan: set[int] = set()
        #: Places that are kept for tables which a commit makes: directory index, whether it is the redundant one.
        self._kept: dict[tuple[int, bool], int] = {}
        #: The directories: whether it is the redundant one, its host offset, its entries.
        self._directories = [(False, tables.layout.directory_at, tables.directory)]
        if tables.redundant is not None:
            self._directories.append((True, tables.layout.redundant_at, tables.redundant))

    @property
    def tables(self) -> GrainTables:
        """The tables of the extent."""
        return self._tables

    @property
    def path(self) -> str:
        """The name of the host file."""
        return self._tables.file.path

    def places(self) -> Iterator[tuple[int, int]]:
        """The ranges ``(start, length)`` of the file that tables and grains take.

        Raises ImageError(corrupt) for a place that cannot be.
        """
        tables = self._tables
        stop = tables.layout.directory_entries
        grains = -(-tables.disk_bytes // self._grain)
        index = tables.next_used(0, stop)
        seen: set[int] = set()
        while index < stop:
            for place in {tables.table_at(index), tables.table_at(index, redundant=True)} - {0}:
                yield place, tables.layout.table_bytes
            # A table that is there twice is an overlap already, and need not be read again.
            if tables.table_at(index) not in seen:
                seen.add(tables.table_at(index))
                # Entries behind the end of the disk are nobody's.
                entries = min(tables.table_entries, grains - index * tables.table_entries)
                for run in self._checked_runs(index, 0, max(0, entries)):
                    if run.kind == Kind.DATA:
                        yield run.host_offset, run.grains * self._grain
            index = tables.next_used(index + 1, stop)

    # -- reservations ---------------------------------------------------------------------------

    def place_write(self, offset: int, length: int) -> Iterator[Placement]:
        """Places for whole grains. Raises ImageError(corrupt) for a table that cannot be true, (no_space)."""
        for index, first, stop in self._pieces(offset, length):
            self._checked_runs(index, first, stop)
        yield from self._places(offset, length)

    def place_zeros(self, offset: int, length: int, operation: Operation) -> Iterator[Placement]:
        """Places to be zeroed, where an entry cannot say that a grain is zeros, or that there is none."""
        for index, first, stop in self._pieces(offset, length):
            for run in self._checked_runs(index, first, stop):
                if not self.zeros_take_places or operation is Operation.UNCOVER:
                    continue
                at = self._offset_of(index, run.first)
                if run.kind == Kind.DATA:
                    yield Placement(at, run.grains * self._grain, run.host_offset, self.part.number, in_place=True)
                elif operation is Operation.ZERO:
                    yield from self._places(at, run.grains * self._grain)

    def metadata(self, offset: int, length: int, operation: Operation) -> Iterator[HostSpace]:
        """What of tables and directories a commit changes and the host may have no space for.

        Tables that are missing get places. An entry that says less than before was no zeros.
        """
        hides = operation is Operation.ZERO and (self._zeroed or self.zeros_take_places)
        if operation is not Operation.WRITE and not hides:
            return
        for index, first, stop in self._pieces(offset, length):
            table = self._tables.load(index)
            places = [self._tables.table_at(index, redundant=redundant) for redundant, _, _ in self._directories]
            if table is not None and all(places):
                for place in places:
                    yield from blank_entries(place, table, first, stop, self.part.number)
                continue
            for (redundant, at, directory), there in zip(self._directories, places, strict=True):
                if there and table is not None:  # a new twin has the whole table written
                    yield from blank_entries(there, table, 0, len(table), self.part.number)
                    continue
                if (index, redundant) not in self._kept:
                    self._kept[index, redundant] = self._take_table()
                yield HostSpace(
                    self._kept[index, redundant], self._tables.layout.table_bytes, self.part.number, unused=True
                )
                yield from blank_entries(at, directory, index, index + 1, self.part.number)

    def note_growth(self) -> None:
        """What was handed out may be pointed at."""
        self._tables.file_size = max(self._tables.file_size, self.allocation.end)

    def release(self, placement: Placement) -> None:
        """Give a place back that was not used."""
        self.allocation.release(placement.host_offset, placement.length)

    # -- publishing -----------------------------------------------------------------------------

    def link(self, placement: Placement) -> None:
        """Enter the grains of a placement in the tables."""
        self.allocation.commit(placement.host_offset, placement.length)
        sector = placement.host_offset // SECTOR
        step = self._grain // SECTOR
        for index, first, stop in self._pieces(placement.offset, placement.length):
            self._set(index, first, consecutive("I", sector, stop - first, step))
            sector += (stop - first) * step
        self.note_growth()

    def unlink(self, offset: int, length: int, operation: Operation) -> None:
        """Enter that the grains of a range are zeros, or are not there, whichever shows zeros, or shows the parent."""
        zeroed = self._zeroed and operation is not Operation.UNCOVER
        for index, first, stop in self._pieces(offset, length):
            table = self._tables.load(index)
            if table is None and not (zeroed and operation is Operation.ZERO):
                continue
            if zeroed and operation is Operation.DISCARD and table is not None:
                for run in list(runs(table, self._tables.rules, first, stop)):
                    if run.kind == Kind.DATA:
                        self._set(index, run.first, array("I", [ZERO_GRAIN]) * run.grains)
                continue
            entries = array("I", [ZERO_GRAIN if zeroed else NO_GRAIN]) * (stop - first)
            if table is None or table[first:stop] != entries:
                self._set(index, first, entries)
        self.note_growth()

    def drop(self, first: int, stop: int) -> None:
        """Enter that the grains of these numbers, all of one table that is there, are not there."""
        index, inside = divmod(first, self._tables.table_entries)
        table = self._tables.load(index)
        entries = array("I", [NO_GRAIN]) * (stop - first)
        if table is not None and table[inside : inside + len(entries)] != entries:
            self._set(index, inside, entries)

    # -- flush ----------------------------------------------------------------------------------

    @property
    def changed(self) -> bool:
        """Whether a plan would have anything of this extent, released places aside."""
        return bool(self._tables.changed or self._pending or self._in_plan)

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changed tables and released places."""
        return len(self._tables.changed) * self._tables.layout.table_bytes + self.allocation.noted * 128

    def begin_plan(self) -> list[Step]:
        """All that is pending is in the plan that is being made. The steps that punch what was released."""
        released = self.allocation.begin_plan()
        for changed in self._tables.changed.values():
            changed.begin_plan()
        self._in_plan |= self._pending
        self._pending = set()
        return [Discard(self.part.number, piece.start, piece.end - piece.start) for piece in released]

    def grow_steps(self) -> list[Step]:
        """The length of the file, and where ESX puts the next grain, before anything points past the old end."""
        if self.allocation.committed_end <= self.allocation.durable_end:
            return []
        steps: list[Step] = [Grow(self.part.number, self.allocation.committed_end)]
        if isinstance(self._extent, CowdExtent):
            free = min(self.allocation.committed_end // SECTOR, (1 << 32) - 1)
            steps.append(Write(self.part.number, cowd_header.NEXT_FREE_AT, free.to_bytes(4, "little")))
        return steps

    def table_steps(self) -> list[Step]:
        """The changed sectors of both tables."""
        steps: list[Step] = []
        number = self.part.number
        for index, changed in self._tables.changed.items():
            places = (self._tables.table_at(index), self._tables.table_at(index, redundant=True))
            for place in filter(None, places):
                steps.extend(Write(number, place + at, data) for at, data in changed.sector_runs())
        return steps

    def directory_steps(self, *, redundant: bool) -> list[Step]:
        """The changed entries of one directory."""
        directory = self._tables.redundant if redundant else self._tables.directory
        if directory is None:
            return []
        layout = self._tables.layout
        start = layout.redundant_at if redundant else layout.directory_at
        return [
            Write(self.part.number, start + ENTRY_BYTES * index, encode(directory[index : index + 1], "little"))
            for index in sorted(self._in_plan)
        ]

    def plan_done(self) -> None:
        """The last plan is durable."""
        self._tables.plan_done()
        self._in_plan = set()
        self.allocation.plan_done()

    # -- inside ---------------------------------------------------------------------------------

    def _places(self, offset: int, length: int) -> Iterator[Placement]:
        for piece in self.allocation.clusters(length):
            yield Placement(offset, piece.length, piece.host_offset, self.part.number, fresh=piece.fresh)
            offset += piece.length

    def _set(self, index: int, first: int, entries: array[int]) -> None:
        changed = self._changed_table(index)
        stop = first + len(entries)
        for run in list(runs(changed.entries, self._tables.rules, first, stop)):
            # What lies at an impossible place is left alone: it may be the header.
            if run.kind == Kind.DATA and self._tables.grain_fault(index, run) is None:
                self.allocation.release(run.host_offset, run.grains * self._grain)
        changed.entries[first:stop] = entries
        changed.mark(first, stop)

    def _changed_table(self, index: int) -> ChangedTable:
        if self._tables.table_at(index):
            changed = self._tables.change(index)
        else:
            changed = self._tables.enter(index, self._new_table(index, redundant=False))
            self._pending.add(index)
        redundant = self._tables.redundant
        if redundant is not None and redundant[index] == 0:
            redundant[index] = self._new_table(index, redundant=True) // SECTOR
            changed.mark(0, len(changed.entries))
            self._pending.add(index)
        return changed

    def _new_table(self, index: int, *, redundant: bool) -> int:
        kept = self._kept.pop((index, redundant), None)
        place = self._take_table() if kept is None else kept
        self.allocation.commit(place, self._tables.layout.table_bytes)
        return place

    def _take_table(self) -> int:
        return self.allocation.tail(self._tables.layout.table_bytes, alignment=SECTOR)

    def _checked_runs(self, index: int, first: int, stop: int) -> list[Run]:
        table = self._tables.load(index)
        if table is None:
            return [Run(first, stop - first, Kind.UNALLOCATED)]
        found = list(runs(table, self._tables.rules, first, stop))
        for run in found:
            self._tables.require_possible(index, run)
        return found

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The tables that a range of whole grains touches, each with its entries ``[first, stop)``."""
        entries = self._tables.table_entries
        at = (offset - self.part.offset) // self._grain
        end = at + -(-length // self._grain)
        while at < end:
            index, first = divmod(at, entries)
            stop = min(entries, first + end - at)
            yield index, first, stop
            at += stop - first

    def _offset_of(self, index: int, entry: int) -> int:
        return self.part.offset + (index * self._tables.table_entries + entry) * self._grain
