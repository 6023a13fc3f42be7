"""Write a qcow version 1 image.

Two ways to allocate. Ordinarily: clusters as they are asked for, L2 tables where they are missing,
all at the end of the file or in space freed earlier. In an image with a live fast path, the way
blktap does: the L2 table and every cluster that it maps in one piece, the table filled at once, so
that blktap, which takes the clusters from L1 alone there and never reads L2, finds the same bytes.

What a flush makes durable, in this order, each stage after the one before:

1. L2 tables that lie under a stray header copy, rebuilt from L1;
2. extended header words: `min_cluster_alloc` = 1 where L2 is about to stop following L1 (so that
   blktap reads L2 from now on), the flag that says L1 is big endian where it was empty till now;
3. the length of the file, alone: an entry in an old table may otherwise point past its end;
4. new L2 tables and changed sectors of old ones (the data they point at is durable by the barrier
   that starts every plan);
5. L1 entries, and the cksum where it was valid. Any part of this stage alone is safe: a wrong cksum
   only makes readers ignore the extended header and read L2, which is complete by then;
6. holes where clusters were released, which nothing on disk points at any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.driver import BackingReference, Driver, HostFile, HostSpace, OpenRequest, Operation, Placement, Reservation
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind, Range
from tapfs.formats.allocation import Allocation
from tapfs.formats.changed_table import ChangedTable
from tapfs.formats.qcow.driver import QcowDriver
from tapfs.formats.qcow.entries import Run, encode_entries, runs
from tapfs.formats.qcow.extended import (
    CKSUM_AT,
    FLAG_L1_BIG_ENDIAN,
    FLAGS_AT,
    MIN_CLUSTER_ALLOC_AT,
    ExtendedHeader,
)
from tapfs.formats.qcow.header import ENTRY_LENGTH
from tapfs.formats.qcow.links import Links
from tapfs.formats.qcow.owners import require_owners
from tapfs.formats.qcow.rebase import rebase_plan
from tapfs.formats.qcow.stream import QcowStreamWriter
from tapfs.formats.rounding import round_up
from tapfs.plan import Discard, Grow, Plan, Step, Write, plan

#: More stray header copies than this were not made by blktap, which made one.
_MAX_STRAYS = 64
#: While the fast path stays on, only the first tables are looked at, because only QEMU reads tables then.
_STRAYS_LOOKED_FOR = 8

_RELEASED_RANGE_BYTES = 128

#: No host offset may reach the bit that marks compressed entries.
_MAX_HOST_SIZE = (1 << 63) - (1 << 32)


class WritableQcowDriver(QcowDriver):
    """An open image, read-write: a :class:`tapfs.driver.WritableDriver`."""

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        super().__init__(file, request)
        if self.header.l1_table_offset % ENTRY_LENGTH:
            # An entry across two sectors could be torn into a third value by a crash.
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "cannot write an image whose L1 table is not aligned to 8 bytes",
                path=file.path,
                offset=self.header.l1_table_offset,
                op="open",
            )
        self.allocation = Allocation(
            file.path, self.tables.file_size, self.header.cluster_size, max_size=_MAX_HOST_SIZE
        )
        if not request.lenient:
            require_owners(self)
        self._links = Links(self.header, self.l1, self.tables, self.allocation)
        #: Whether new space is allocated the way blktap does.
        self._whole_extents = self.fast_path and self._geometry.cipher is None
        self._l1_in_plan: set[int] = set()
        #: The disk's size in whole clusters.
        self._rounded_size = round_up(self.header.size, self.header.cluster_size)
        #: Whole extents that are reserved, by L1 index: the table's offset.
        self._extents: dict[int, int] = {}
        self._open: dict[Reservation, list[int]] = {}
        self._prepared = False
        #: The extended header as it must be before anything else is changed, if it must.
        self._new_words: ExtendedHeader | None = None
        self._cksum_in_plan = 0
        self._strays_in_plan: list[int] = []

    # -- reservations ---------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """See :meth:`tapfs.driver.WritableDriver.reserve`.

        Raises ImageError(corrupt) for an impossible L1 or L2 entry, (no_space) where qcow cannot
        address more.
        """
        self._prepare()
        extents: list[int] = []
        spaces: list[HostSpace] = []
        try:
            placements = self._place(ranges, operation, extents, spaces)
        except BaseException:
            self._release_extents(extents)
            raise
        self.tables.file_size = max(self.tables.file_size, self.allocation.end)
        exact = operation is Operation.WRITE and not self._whole_extents
        wide = self._with_extents(ranges, extents)
        reservation = Reservation(wide, operation, tuple(placements), exact, tuple(spaces))
        self._open[reservation] = extents
        return reservation

    def _with_extents(self, ranges: Sequence[Range], extents: Sequence[int]) -> tuple[Range, ...]:
        """The ranges and the whole extents: committing one maps all of its clusters, so nobody else may fill any."""
        if not extents:
            return tuple(ranges)
        unit = self.header.unit
        whole = [Range(index * unit, min(unit, self._rounded_size - index * unit)) for index in extents]
        joined: list[Range] = []
        for each in sorted([*ranges, *whole]):
            if joined and each.offset <= joined[-1].end:
                joined[-1] = Range(joined[-1].offset, max(joined[-1].end, each.end) - joined[-1].offset)
            else:
                joined.append(each)
        return tuple(joined)

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map; durable after the next flush."""
        extents = self._open.pop(reservation)
        for index in extents:
            table_offset = self._extents.pop(index)
            self._links.enter_table(index, table_offset, self.tables.computed(table_offset))
            self.allocation.commit(table_offset, self.header.l2_length + self.header.unit)
        if not self._whole_extents:
            uncovers = reservation.operation is Operation.UNCOVER
            if uncovers or (reservation.operation is not Operation.WRITE and self.backing is None):
                self._links.unlink(reservation.ranges)
            self._links.link(reservation.placements)
        self.tables.file_size = max(self.tables.file_size, self.allocation.end)

    def abort(self, reservation: Reservation) -> None:
        """Give the places back. They are punched by the next flush and used again after it."""
        self._release_extents(self._open.pop(reservation))
        if not self._whole_extents:
            for placement in reservation.placements:
                if not placement.in_place:
                    self.allocation.release(placement.host_offset, placement.length)

    def _release_extents(self, extents: Sequence[int]) -> None:
        for index in extents:
            self.allocation.release(self._extents.pop(index), self.header.l2_length + self.header.unit)

    @property
    def can_uncover(self) -> bool:
        """Whether entries can be taken away: blktap's whole extents are mapped by L1 alone."""
        return not self._whole_extents

    def rebase(self, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
        """See :mod:`tapfs.formats.qcow.rebase`. An image may have any parent."""
        del parent
        if self._whole_extents and backing is not None:
            message = "blktap maps whole extents of this image, which hide a parent"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self.file.path, op="rebase")
        if self.extended is not None and self.extended.flags is None:
            message = "its extended header of 2006 is known by the place of the backing file's name, which must stay"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self.file.path, op="rebase", remedy="convert it")
        yield rebase_plan(self, backing)

    # -- flush ----------------------------------------------------------------------------------

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changed tables and released ranges."""
        return self.tables.changed_bytes() + self.allocation.noted * _RELEASED_RANGE_BYTES

    def flush(self) -> Plan:
        """The plan described at the head of this module; empty where nothing has changed."""
        released = self.allocation.begin_plan()
        # A stray header copy is mended even where guest data was only written in place.
        if not (self.tables.changed or self._links.l1_pending or self._l1_in_plan or released or self.tables.strays):
            return Plan()
        self.tables.begin_plan()
        self._l1_in_plan |= self._links.l1_pending
        self._links.l1_pending.clear()
        return plan(
            self._grow_steps(),
            self._stray_steps(),
            self._word_steps(),
            self._table_steps(),
            self._l1_steps(),
            [Discard(0, piece.start, piece.end - piece.start) for piece in released],
        )

    def added(self) -> Plan | None:
        """See :meth:`tapfs.driver.Additive.added`. What blktap's header says, and releases, need the whole plan."""
        pending = self._links.l1_pending
        if self.allocation.noted or self.tables.strays or self._new_words or (pending and self.cksum_valid):
            return None
        end = self.allocation.added_end()
        grow: list[Step] = [] if end is None else [Grow(0, end)]
        self._l1_in_plan |= pending
        entries = self._l1_runs(pending)
        pending.clear()
        return Plan((tuple(grow), tuple(self.tables.added_steps()), tuple(entries)))

    def flushed(self, executed: Plan) -> None:
        """What the last plan wrote is durable, what it released may be used again."""
        if not executed:
            return
        if self._new_words is not None:
            self.extended = self._new_words
            self._new_words = None
            self.decide_fast_path()
        self.tables.strays.difference_update(self._strays_in_plan)
        self._strays_in_plan = []
        if self._l1_in_plan and self.cksum_valid and self.extended is not None:
            self.extended = self.extended._replace(cksum=self._cksum_in_plan)
        self.tables.plan_done()
        self._l1_in_plan = set()
        self.allocation.plan_done()

    def _stray_steps(self) -> list[Step]:
        self._strays_in_plan = sorted(self.tables.strays)[:_MAX_STRAYS]
        return [
            Write(0, self.l1[index], encode_entries(self.tables.computed(self.l1[index])))
            for index in self._strays_in_plan
        ]

    def _word_steps(self) -> list[Step]:
        if self._new_words is None or self.extended is None:
            return []
        steps: list[Step] = []
        if self._new_words.min_cluster_alloc != self.extended.min_cluster_alloc:
            steps.append(Write(0, MIN_CLUSTER_ALLOC_AT, self._new_words.min_cluster_alloc.to_bytes(4, "big")))
        if self._new_words.flags != self.extended.flags:
            steps.append(Write(0, FLAGS_AT, (self._new_words.flags or 0).to_bytes(4, "big")))
        return steps

    def _grow_steps(self) -> list[Step]:
        """A stage of its own before the tables: no entry may ever point past the end of the file.

        The data may have ended before it: fresh clusters are not written where they are zero.
        """
        if self.allocation.committed_end > self.allocation.durable_end:
            return [Grow(0, self.allocation.committed_end)]
        return []

    def _table_steps(self) -> list[Step]:
        steps: list[Step] = []
        for index, changed in self.tables.changed.items():
            table_offset = self.l1[index]
            steps.extend(Write(0, table_offset + at, data) for at, data in changed.sector_runs())
        return steps

    def _l1_runs(self, indexes: set[int]) -> list[Step]:
        steps: list[Step] = []
        start: int | None = None
        for index in sorted(indexes):
            if start is None:
                start = index
            if index + 1 not in indexes:
                at, end = ENTRY_LENGTH * start, ENTRY_LENGTH * (index + 1)
                steps.append(Write(0, self.header.l1_table_offset + at, bytes(self.l1.raw[at:end])))
                start = None
        return steps

    def _l1_steps(self) -> list[Step]:
        steps = self._l1_runs(self._l1_in_plan)
        if steps and self.cksum_valid:
            self._cksum_in_plan = self.l1.cksum()
            steps.append(Write(0, CKSUM_AT, self._cksum_in_plan.to_bytes(4, "big")))
        return steps

    def stream(self) -> QcowStreamWriter:
        """The writer of compressed images; blktap's whole extents have no place for them."""
        self._whole_extents = False
        self._prepare()
        return QcowStreamWriter(self)

    # -- the extended header --------------------------------------------------------------------

    def _prepare(self) -> None:
        """Before the first change: what must become true of the extended header for it."""
        if self._prepared:
            return
        extended = self.extended
        if extended is not None:
            words = extended
            if not self._whole_extents and extended.min_cluster_alloc != 1:
                # Even where the cksum is wrong now: an old blktap turns L1 round when it opens the
                # image, and the cksum may fit again after that.
                words = words._replace(min_cluster_alloc=1)
            if extended.flags is not None and self.l1.is_empty:
                words = words._replace(flags=extended.flags | FLAG_L1_BIG_ENDIAN)
            if self.follows_formula:
                self.tables.find_strays(_STRAYS_LOOKED_FOR if self._whole_extents else None)
            if len(self.tables.strays) > _MAX_STRAYS:
                raise ImageError(
                    ErrorKind.CORRUPT,
                    f"{len(self.tables.strays)} L2 tables lie under header copies",
                    path=self.file.path,
                    offset=self.l1[min(self.tables.strays)],
                    op="write",
                    remedy="run tapfs repair",
                )
            if words != extended:
                self._new_words = words
        self._prepared = True

    # -- placing --------------------------------------------------------------------------------

    def _place(
        self, ranges: Sequence[Range], operation: Operation, extents: list[int], spaces: list[HostSpace]
    ) -> list[Placement]:
        """Places for the ranges.

        To `extents` the indexes of extents are added that are reserved for them, to `spaces` what of tables the host
        may have no space for.
        """
        if operation is Operation.WRITE:
            if not self._whole_extents:
                missing = self._links.require_tables(ranges, spaces)
                placements = self.allocation.places(ranges)
                spaces += self._links.keep_tables(missing)
                return placements
            placements = [place for each in ranges for place in self._place_in_extents(each, extents)]
            for index in extents:
                spaces += self._links.new_table_space(index, self._extents[index])
            return placements
        if operation is not Operation.UNCOVER and (self._whole_extents or self.backing is not None):
            placements = [place for each in ranges for place in self._place_zeros(each, operation)]
            linked = [Range(place.offset, place.length) for place in placements if not place.in_place]
            spaces += self._links.keep_tables(self._links.require_tables(linked, spaces))
            return placements
        for each in ranges:
            for index, first, stop in self._links.used_pieces(*each):
                self._checked_runs(index, first, stop)
        return []

    def _place_in_extents(self, wanted: Range, extents: list[int]) -> Iterator[Placement]:
        header = self.header
        for index, first, stop in self._links.pieces(*wanted):
            table_offset = self.l1[index]
            in_place = table_offset != 0
            if not in_place and index in self._extents:  # an earlier range of the same reservation is in it, too
                table_offset = self._extents[index]
            elif not in_place:
                table_offset = self.allocation.tail(header.l2_length + header.unit)
                self._extents[index] = table_offset
                extents.append(index)
            yield Placement(
                index * header.unit + first * header.cluster_size,
                (stop - first) * header.cluster_size,
                table_offset + header.l2_length + first * header.cluster_size,
                fresh=not in_place,
                in_place=in_place,
            )

    def _place_zeros(self, wanted: Range, operation: Operation) -> Iterator[Placement]:
        """Zero in place, where L2 entries must stay.

        That is where blktap does not read them, and where what lies below would show through.
        """
        header = self.header
        zero_below = operation is Operation.ZERO and self.backing is not None
        punchable = operation is Operation.ZERO or self._geometry.cipher is None
        pieces = self._links.pieces if zero_below else self._links.used_pieces
        for index, first, stop in pieces(*wanted):
            for run in self._checked_runs(index, first, stop):
                at = index * header.unit + run.first * header.cluster_size
                bytes_ = run.clusters * header.cluster_size
                if run.kind == Kind.DATA:
                    if punchable:
                        yield Placement(at, bytes_, run.host_offset, in_place=True)
                elif zero_below:
                    yield from self.allocation.places([Range(at, bytes_)])

    def changed_table(self, index: int) -> ChangedTable:
        """The L2 table of L1 entry `index`, to be changed; allocated if there is none."""
        return self._links.changed_table(index)

    def _checked_runs(self, index: int, first: int, stop: int) -> Sequence[Run]:
        """The runs of a part of a table; none of them at an impossible place."""
        table = self.tables.load(index)
        if table is None:
            return [Run(first, stop - first, Kind.UNALLOCATED)]
        found = list(runs(table, self.header.cluster_bits, first, stop))
        for run in found:
            self.require_possible(index, run)
        return found
