"""Write a qcow2 image.

What a flush makes durable, in this order, each stage after the one before. Guest data is durable before all of it:

1. the length of the file: a cluster that was left out because it is zeros may be its last;
2. refcount blocks with the counts that were raised, and new blocks; a refcount table that has moved, whole;
3. the refcount table's entries of new blocks, or the header's fields that lead to the table that has moved;
4. L2 tables: new ones whole, of others the changed sectors;
5. L1 entries;
6. refcount blocks with the counts lowered, of what nothing refers to any more;
7. holes where clusters became free.

So a crash leaves at worst clusters with a count that nothing refers to. Writers that defer refcounts (`lazy_refcounts`)
mark the image as dirty and need a repair after a crash; this one never defers them, whatever the image allows.

Tables and clusters that a snapshot shares are copied before they change. A cluster is written in place only where its
entry says that it is owned alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tapfs.driver import HostFile, HostSpace, OpenRequest, Operation, Placement, Reservation
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind, Range
from tapfs.formats.blank_pages import blank_bytes, blank_entries
from tapfs.formats.changed_table import ChangedTable
from tapfs.formats.qcow2.bitmaps import clusters_of_bitmaps, directory_of, read_bitmaps
from tapfs.formats.qcow2.driver import Qcow2Driver
from tapfs.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET, ZERO, Run, compressed_place, consecutive, new_words
from tapfs.formats.qcow2.guard import Guard, MetadataRange, guard_of, tables_of_snapshots
from tapfs.formats.qcow2.header import AUTOCLEAR_AT, BITMAPS, WORD
from tapfs.formats.qcow2.l1 import l1_steps
from tapfs.formats.qcow2.openable import require_refcount_table
from tapfs.formats.qcow2.refcounts import Refcounts
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.qcow2.space import Space
from tapfs.plan import Discard, Grow, Plan, Step, Write, plan
from tapfs.tables import GuardedPlaces

if TYPE_CHECKING:
    from tapfs.formats.qcow2.stream import Qcow2StreamWriter

#: A slice of an L2 table by its map unit, and entries ``[first, stop)`` of it.
SlicePiece = tuple[int, int, int]


class WritableQcow2Driver(Qcow2Driver):
    """An open image, read-write: a :class:`tapfs.driver.WritableDriver`."""

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        super().__init__(file, request)
        #: Of the header, which computes them anew each time: every cluster that is written asks for them.
        self._bits, self._per_slice, self._slices = (
            self.header.cluster_bits,
            self.header.slice_entries,
            self.header.slices,
        )
        self.refcounts = Refcounts(file, self.header)
        self.guard = Guard(self.header.cluster_size, [], [])
        self.l1_pending: set[int] = set()
        self._l1_in_plan: set[int] = set()
        #: Places that are kept for L2 tables which a commit may need, by L1 index.
        self._tables: dict[int, int] = {}
        self._open: set[Reservation] = set()
        #: What of tables and counts the host may have no space for, of the reservation that is being made.
        self._metadata: list[HostSpace] = []
        #: Bytes of the file that are known to be durable, and that the plan makes so.
        self._durable_end = self._end_in_plan = file.size()
        self._has_zeros = self.header.version > VERSIONS[0]
        if not request.lenient:  # a repair writes by plans alone, into an image that may have anything wrong with it
            require_refcount_table(self.header, file.size(), file.path)
            self.guard = self._make_guard()
            self._require_owners()
            self.space = Space(file.path, self.header, self.refcounts, self.guard, file.size())

    # -- reservations ---------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """See :meth:`tapfs.driver.WritableDriver.reserve`.

        Raises ImageError(corrupt) for an impossible entry or place, (no_space) where qcow2 cannot address more.
        """
        placements: list[Placement] = []
        self._metadata = []
        if operation is Operation.WRITE:
            pieces = [piece for offset, length in ranges for piece in self.pieces(offset, length, used=False)]
            self.require_runs(pieces)
            self.keep_tables(pieces)
            placements += self.places(ranges)
        else:
            for offset, length in ranges:
                self.require_runs(list(self.pieces(offset, length, used=True)))
                placements += self._place_zeros(offset, length, operation)
        self.note_growth()
        exact = operation is Operation.WRITE
        reservation = Reservation(tuple(ranges), operation, tuple(placements), exact, self.take_metadata())
        self._open.add(reservation)
        return reservation

    def take_metadata(self) -> tuple[HostSpace, ...]:
        """What the reservation that is being made needs and the host may have no space for."""
        found, self._metadata = tuple(self._metadata), []
        return found

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map; durable after the next flush."""
        self._open.remove(reservation)
        if reservation.operation is Operation.UNCOVER or (
            reservation.operation is not Operation.WRITE and not self.data_number
        ):
            for offset, length in reservation.ranges:
                self.unlink(offset, length, reservation.operation)
        self.link([placement for placement in reservation.placements if not placement.in_place])
        if reservation.operation is Operation.ZERO and self.data_number and self.backing is not None:
            for offset, length in reservation.ranges:
                self.hide_parent(offset, length)
        self.note_growth()

    def abort(self, reservation: Reservation) -> None:
        """Give the places back."""
        self._open.remove(reservation)
        for placement in reservation.placements:
            if not placement.in_place and not placement.file:
                self.space.give_back(placement.host_offset, placement.length)

    # -- begin, flush, end ----------------------------------------------------------------------

    def begin(self) -> Plan:
        """Clear the bits of features that are unknown, and say of the bitmaps that they do not follow the disk."""
        kept = self.header.kept_autoclear
        steps: list[Step] = []
        if kept & BITMAPS:
            steps += [each.mark_in_use() for each in read_bitmaps(self.file, self.extensions) if each.must_be_marked]
        if kept == self.header.autoclear:
            return plan(steps)
        return plan(steps, [Write(0, AUTOCLEAR_AT, kept.to_bytes(WORD, "big"))])

    def end(self) -> Plan:
        """Nothing: whatever is flushed is whole."""
        return Plan()

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changed tables and counts."""
        return self.slices.changed_bytes() + self.refcounts.changed_bytes

    def flush(self) -> Plan:
        """The plan described at the head of this module; empty where nothing has changed."""
        if not (self.slices.changed or self.l1_pending or self._l1_in_plan or self.refcounts.is_changed):
            return Plan()
        return self.planned()

    def added(self) -> Plan | None:
        """See :meth:`tapfs.driver.Additive.added`. Counts that are lowered need the whole plan."""
        if not self.refcounts.only_raised:
            return None
        end = max(self._durable_end, self.refcounts.end)
        grow: list[Step] = [Grow(0, end)] if end > self._end_in_plan else []
        self._end_in_plan = max(self._end_in_plan, end)
        pending, self.l1_pending = self.l1_pending, set()
        self._l1_in_plan |= pending
        entries = l1_steps(self.l1, self.l1_offset, pending)
        raised, table = self.refcounts.added_steps()
        slices = self.slices.added_steps()
        return Plan((tuple(grow), tuple(raised), tuple(table), tuple(slices), tuple(entries)))

    def planned(self, *further: list[Step]) -> Plan:
        """The plan of a flush, with `further` stages before the counts of what they unlink are lowered."""
        self.slices.begin_plan()
        self.refcounts.begin_plan()
        self._l1_in_plan |= self.l1_pending
        self.l1_pending = set()
        self._end_in_plan = max(self._durable_end, self.refcounts.end)
        bits = self.header.cluster_bits
        return plan(
            [Grow(0, self._end_in_plan)] if self._end_in_plan > self._durable_end else [],
            self.refcounts.raise_steps(),
            self.refcounts.table_steps(),
            self._slice_steps(),
            l1_steps(self.l1, self.l1_offset, self._l1_in_plan),
            *further,
            self.refcounts.lower_steps(),
            [Discard(0, run.first << bits, run.clusters << bits) for run in self.refcounts.freed],
        )

    def flushed(self, executed: Plan) -> None:
        """What the last plan wrote is durable, what it freed may be used again."""
        if not executed:
            return
        self._durable_end = self._end_in_plan
        self._l1_in_plan = set()
        self.slices.plan_done()
        freed = self.refcounts.freed
        self.refcounts.plan_done()
        place, clusters = self.refcounts.durable_table
        self.header = self.header._replace(reftable_offset=place, reftable_clusters=clusters)
        self.space.freed(freed)

    def _slice_steps(self) -> list[Step]:
        changed, place = self.slices.changed.items(), self.slices.table_offset
        return [Write(0, place(unit) + at, data) for unit, each in changed for at, data in each.sector_runs()]

    def stream(self) -> Qcow2StreamWriter:
        """The writer of new images, of compressed ones above all."""
        if self.data_number:
            message = "an image with a data file takes no compressed clusters"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self.file.path, op="compress")
        from tapfs.formats.qcow2.stream import Qcow2StreamWriter  # few images are filled so

        return Qcow2StreamWriter(self, self.file.path)

    @property
    def appends_packed(self) -> bool:
        """Whether compressed clusters can be added: neither a data file nor a key goes with them."""
        return not self.data_number and self.encryption is None

    def flushed_plan(self) -> Iterator[Plan]:
        """The plan of a flush, which is durable when whoever asked goes on: a part of an edit."""
        made = self.flush()
        yield made
        self.flushed(made)

    # -- what must hold before a change ---------------------------------------------------------

    def may_write(self, run: Run) -> bool:
        """Whether a write in place can go to a run: never over metadata, wherever an entry leads it."""
        return self.data_number != 0 or self.guard.over(run.host_offset, run.length) is None

    @property
    def guard_changes(self) -> int:
        """See :meth:`tapfs.tables.Guarded.guard_changes`."""
        return self.guard.changes

    def guarded_places(self) -> GuardedPlaces:
        """Every cluster with metadata; see :meth:`tapfs.tables.Guarded.guarded_places`."""
        return self.guard.places()

    def table_stays(self, place: int) -> bool:
        """Whether a table is counted for others, too, so that a copy of it does not free it."""
        try:
            return self.refcounts.get(place >> self.header.cluster_bits) > 1
        except ImageError:  # a damaged refcount block
            return False

    def _require_owners(self) -> None:
        """Raise ImageError(corrupt) for a cluster with more references than its refcount says; a new image has none."""
        if self.header.snapshot_count or next(self.l1.used(), None) is not None:
            from tapfs.formats.qcow2.owners import require_owners

            require_owners(self, self.refcounts)

    def _make_guard(self) -> Guard:
        tables = [entry & OFFSET for _, entry in self.l1.used() if entry & OFFSET]
        tables += [place for _, place in self.refcounts.blocks()]
        tables += clusters_of_bitmaps(self.file, self.extensions, self.header.cluster_size)
        fixed = [MetadataRange(start, stop, f"the {name}") for name, start, stop in self.reserved()]
        snapshots = self.read_snapshots()
        tables = sorted(tables_of_snapshots(self.file, self.header, snapshots).union(tables))
        return guard_of(self.header, fixed, snapshots, directory_of(self.extensions), tables)

    def note_growth(self) -> None:
        """Places up to the end of what was handed out are places in the file from now on."""
        self.slices.file_size = self.decoder.file_size = max(self.slices.file_size, self.space.end)

    def require_runs(self, pieces: Sequence[SlicePiece]) -> None:
        """Raise ImageError(corrupt) if an entry of these pieces cannot be true, or leads to metadata.

        What of the tables that are changed in place the host may have no space for is noted.
        """
        each = self.header.l2_entry_bytes // WORD
        last_unit, words = -1, None
        for unit, first, stop in pieces:
            if unit != last_unit:
                last_unit, words = unit, self.slices.load(unit)
                if words is not None:  # a slice is not longer than a page, so any entry of it stands for all
                    self._metadata += blank_entries(self.slices.table_offset(unit), words, first * each, stop * each)
            if words is None or not any(words[first * each : stop * each]):
                continue
            for run in self.runs(unit, words, first, stop):
                if run.kind is Kind.ZERO and run.host_offset % self.header.granule:
                    raise self.entry_error(unit, run.first, f"cluster at {run.host_offset:#x} not aligned to a cluster")
                # Of a cluster that others count, too, a copy is made, and the metadata in it stays.
                if run.kind is Kind.DATA and not self.may_write(run) and (run.copied or not self._counted_twice(run)):
                    there = self.guard.over(run.host_offset, run.length)
                    raise self.entry_error(unit, run.first, f"cluster at {run.host_offset:#x} lies over {there}")

    def _counted_twice(self, run: Run) -> bool:
        bits = self.header.cluster_bits
        clusters = range(run.host_offset >> bits, (run.host_offset + run.length - 1 >> bits) + 1)
        return all(self.refcounts.get(cluster) > 1 for cluster in clusters)

    def keep_tables(self, pieces: Sequence[SlicePiece]) -> None:
        """Keep a place for every L2 table that a commit of these pieces may have to make, so that it cannot fail."""
        for index in sorted({unit // self._slices for unit, _, _ in pieces}):
            if not self.owns_table(index):
                place = self._tables.get(index, 0)
                if place == 0:
                    place = self._tables[index] = self.space.take_whole(1)
                self.ensure_counts(place, self.header.cluster_size)
                self._metadata.append(HostSpace(place, self.header.cluster_size, unused=True))
                self._metadata += blank_bytes(self.l1_offset, self.l1.raw, WORD * index, WORD * (index + 1))

    def ensure_counts(self, start: int, length: int) -> None:
        """Have places for the refcounts of clusters that were taken."""
        bits = self.header.cluster_bits
        self.refcounts.ensure(start >> bits, length >> bits, self.take_for_refcounts)
        self._metadata += self.refcounts.metadata(start >> bits, length >> bits)

    def take_for_refcounts(self, clusters: int) -> int:
        """The offset of clusters in a row for refcount blocks or their table."""
        place = self.space.take_whole(clusters)
        for cluster in range(clusters):
            self.guard.add(place + cluster * self.header.cluster_size)
        return place

    # -- placing --------------------------------------------------------------------------------

    def places(self, ranges: Sequence[Range]) -> list[Placement]:
        """Places for ascending ranges of whole clusters, one after the other in the file wherever it has room."""
        if self.data_number:
            return [Placement(offset, length, offset, file=self.data_number) for offset, length in ranges]
        pieces = self.space.take(sum(length for _, length in ranges))
        for piece in pieces:
            self.ensure_counts(piece.host_offset, piece.length)
        placements: list[Placement] = []
        waiting = iter(pieces)
        host = left = 0
        fresh = False
        for offset, length in ranges:
            at, end = offset, offset + length
            while at < end:
                if not left:
                    host, left, fresh = next(waiting)
                part = min(left, end - at)
                placements.append(Placement(at, part, host, fresh=fresh))
                at, host, left = at + part, host + part, left - part
        return placements

    def _place_zeros(self, offset: int, length: int, operation: Operation) -> list[Placement]:
        """Zero in place where an entry cannot say it: in a data file, and over a parent in version 2."""
        below = self.backing is not None and operation is not Operation.UNCOVER
        by_entries = operation is Operation.UNCOVER or not self.data_number
        if below and operation is Operation.ZERO:
            self.keep_tables(list(self.pieces(offset, length, used=False)))
        elif by_entries:
            self.keep_tables(list(self.pieces(offset, length, used=True)))
        if by_entries and (self._has_zeros or not below):
            return []
        must_place = operation is Operation.ZERO and below and not self._has_zeros
        placements: list[Placement] = []
        for unit, first, stop in self.pieces(offset, length, used=not must_place):
            words = self.slices.load(unit)
            if words is None:
                words = new_words(self.header.slice_entries)
            owned = self.owns_table(unit // self.header.slices)
            for run in self.runs(unit, words, first, stop):
                at = unit * self.header.unit + run.start
                if run.kind is Kind.DATA and (run.copied and owned):
                    placements.append(Placement(at, run.length, run.host_offset, self.data_number, in_place=True))
                elif must_place:
                    placements += self.places([Range(at, run.length)])
        return placements

    # -- publishing -----------------------------------------------------------------------------

    def link(self, placements: Sequence[Placement]) -> None:
        """Have the entries of the placements point at them."""
        bits, size = self.header.cluster_bits, self.header.cluster_size
        if not self.data_number:
            for start, length in _host_runs(placements):
                self.refcounts.raise_counts(start >> bits, length >> bits)
        last_unit, changed = -1, None
        for offset, length, start, *_ in placements:
            host = start
            for unit, first, stop in self.pieces(offset, length, used=False):
                if unit != last_unit or changed is None:
                    last_unit, changed = unit, self.owned_slice(unit)
                entries = changed.entries
                if any(entries[first:stop]):
                    self.release(entries, first, stop)
                if stop == first + 1:
                    entries[first] = host | COPIED
                else:
                    entries[first:stop] = consecutive(host, stop - first, size)
                changed.mark(first, stop)
                host += (stop - first) << bits

    def unlink(self, offset: int, length: int, operation: Operation) -> None:
        """Let go of clusters: nothing is there any more, or zeros where a parent would show through."""
        below = self.backing is not None and operation is not Operation.UNCOVER
        if below and not self._has_zeros:
            return  # zeroed in place
        absent = below and operation is Operation.ZERO
        for unit, first, stop in self.pieces(offset, length, used=not absent):
            words = self.slices.load(unit)
            if words is None:
                words = new_words(self.header.slice_entries)
            wanted = words[first:stop]
            if operation is Operation.ZERO or not below:
                wanted = array(wanted.typecode, [ZERO if below else 0]) * (stop - first)
            else:  # what shows the parent may go on to do so
                wanted = array(wanted.typecode, [ZERO if word & (OFFSET | COMPRESSED) else word for word in wanted])
            if words[first:stop] == wanted:
                continue
            changed = self.owned_slice(unit)
            self.release(changed.entries, first, stop)
            changed.entries[first:stop] = wanted
            changed.mark(first, stop)

    def hide_parent(self, offset: int, length: int) -> None:
        """Zeros where nothing of a data file was used, because a parent would show through."""
        for unit, first, stop in self.pieces(offset, length, used=False):
            changed = self.owned_slice(unit)
            for at in range(first, stop):
                if self.decoder.kind(changed.entries[at]) is Kind.UNALLOCATED:
                    changed.entries[at] = ZERO
            changed.mark(first, stop)

    def release(self, words: array[int], first: int, stop: int) -> None:
        """Lower the counts of what these entries refer to. What lies at an impossible place is left alone."""
        bits = self.header.cluster_bits
        if self.data_number:
            return
        for run in self.decoder.runs(words, first, stop):
            if not isinstance(run, Run):
                continue
            if run.kind is Kind.COMPRESSED:
                start, length = compressed_place(words[run.first], bits)
                last = (start + length - 1) >> bits
                self.refcounts.lower_counts(start >> bits, last - (start >> bits) + 1)
            elif run.host_offset and self.place_fault(run._replace(kind=Kind.DATA)) is None:
                self.refcounts.lower_counts(run.host_offset >> bits, run.length >> bits)

    def owned_slice(self, unit: int) -> ChangedTable:
        """A slice of a table that belongs to this disk alone, to be changed."""
        self.own_table(unit // self._slices)
        return self.slices.change(unit)

    def owns_table(self, index: int) -> bool:
        """Whether an L1 entry has a table that belongs to this disk alone."""
        entry = self.l1[index]
        return entry & COPIED != 0 and entry & OFFSET != 0

    def own_table(self, index: int) -> None:
        """Make the L2 table of an L1 entry, or a copy of one that is shared with a snapshot."""
        entry = self.l1[index]
        if self.owns_table(index):
            return
        if entry & OFFSET:
            self.slices.move_table(index)
            self.refcounts.lower_counts((entry & OFFSET) >> self.header.cluster_bits, 1)
        else:
            self.slices.new_table(index)
        place = self._tables.pop(index, None)
        if place is None:
            place = self.space.take_whole(1)
            self.ensure_counts(place, self.header.cluster_size)
        self.refcounts.raise_counts(place >> self.header.cluster_bits, 1)
        self.guard.add(place)
        self.l1[index] = place | COPIED
        self.l1_pending.add(index)

    # -- walking --------------------------------------------------------------------------------

    def pieces(self, offset: int, length: int, *, used: bool) -> Iterator[SlicePiece]:
        """The slices that a granule-aligned range touches, each with its entries ``[first, stop)``.

        `used`: without the slices that have no table.
        """
        per_slice = self._per_slice
        at, end = offset >> self._bits, (offset + length) >> self._bits
        while at < end:
            unit, first = divmod(at, per_slice)
            if used:
                next_unit = self.next_used_unit(unit, -(-end // per_slice))
                if next_unit > unit:
                    at = next_unit * per_slice
                    continue
            stop = min(per_slice, first + end - at)
            yield unit, first, stop
            at += stop - first


def _host_runs(placements: Sequence[Placement]) -> Iterator[tuple[int, int]]:
    """The offset and length of each run of placements that follow one another in the file."""
    start = end = -1
    for placement in placements:
        if placement.host_offset != end:
            if end > start:
                yield start, end - start
            start = placement.host_offset
        end = placement.host_offset + placement.length
    if end > start:
        yield start, end - start
