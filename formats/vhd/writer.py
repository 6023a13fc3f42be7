"""Write a VHD that grows: dynamic, or differencing over a parent.

A new block goes to the end of the data, where the last footer stands, or to a place that was given up. A new block of a
dynamic image at a fresh place is mapped whole, so later writes go in place. Everywhere else the bits of the written
sectors are set, and no other byte of the block counts.

A flush makes durable, in this order, each stage after the one before:

1. the batmap without the blocks that change, if tapdisk has left one: a block that it calls full has no bitmap to read;
2. the footer behind the new end of the data, and the bitmaps. The data is durable by the barrier that starts every
   plan. The first new block may lie over the old footer. Until this stage is durable the copy of the footer at the
   start counts, so an image whose copy is damaged is not written;
3. entries of the block allocation table, in both directions: a block of which it gives up the place is not there;
4. holes at the places that were given up, and of old footers: nothing on disk refers to them any more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from tapfs.driver import (
    BackingReference,
    CheckReport,
    Driver,
    HostFile,
    HostSpace,
    OpenRequest,
    Operation,
    Placement,
    Reservation,
)
from tapfs.errors import ImageError
from tapfs.extent import Range
from tapfs.formats.blank_pages import blank_bytes
from tapfs.formats.rounding import round_up
from tapfs.formats.vhd.bitmap import is_full, sector_runs, set_bits
from tapfs.formats.vhd.changed_bitmaps import ChangedBitmaps
from tapfs.formats.vhd.driver import DynamicDriver
from tapfs.formats.vhd.dynamic_header import SECTOR
from tapfs.formats.vhd.footer import LENGTH
from tapfs.formats.vhd.footers import Footers
from tapfs.formats.vhd.places import Place, Places
from tapfs.formats.vhd.relink import relink_plans
from tapfs.formats.vhd.writability import require_writable
from tapfs.plan import Discard, Plan, Step, Write, plan
from tapfs.tables import ASK

#: Memory that a place that was given up takes about.
_NOTED_BYTES = 128


class _NewBlock:
    """A block that open reservations are filling: its place, and how many reservations have sectors of it."""

    __slots__ = ("place", "users")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.users = 0


class WritableDynamicDriver(DynamicDriver):
    """An open image, read-write: a :class:`tapfs.driver.WritableDriver`."""

    def __init__(self, file: HostFile, request: OpenRequest, footers: Footers) -> None:
        super().__init__(file, request, footers)
        if not request.lenient:
            require_writable(self)
        #: Where the last footer is, once all plans are executed; None if there is no good one at the end.
        self._footer_at: int | None = footers.place if footers.last_good else None
        self._footer_in_plan: int | None = None
        #: Where footers were before it moved, and where a plan that failed may have put one.
        self._old_footers: set[int] = set()
        self.places = Places(file, self.header, self.data_end(), footers.place)
        self._changed_bitmaps = ChangedBitmaps(self.header.bitmap_bytes)
        self._new: dict[int, _NewBlock] = {}
        self._open: dict[Reservation, set[int]] = {}
        #: Blocks whose entry or bitmap differs from the disk, since the last flush and in the plan.
        self._pending: set[int] = set()
        self._in_plan: set[int] = set()
        #: Whether the batmap has changed since it was durable, and whether the change is in the plan.
        self._batmap_pending = self._batmap_in_plan = False

    # -- reservations ---------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """See :meth:`tapfs.driver.WritableDriver.reserve`.

        Raises ImageError(corrupt) for a block at an impossible place, (no_space) where the table cannot name more.
        """
        used: set[int] = set()
        placements: list[Placement] = []
        end = self.places.end
        try:
            if operation is Operation.WRITE:
                placements.extend(self._placements(ranges, used))
            else:
                for offset, length in ranges:
                    for index, first, stop in self._pieces(offset, length):
                        placements.extend(self._zero_placements(index, first, stop, operation, used))
        except ImageError:
            self._let_go(used)
            raise
        self.file_size = max(self.file_size, self.places.end)
        whole = [index for index in sorted(used) if self._maps_whole(self._new[index])]
        exact = operation is Operation.WRITE
        wide = self._with_blocks(ranges, whole)
        metadata = tuple(self._metadata_of(used, placements, end))
        reservation = Reservation(wide, operation, tuple(placements), exact, metadata)
        self._open[reservation] = used
        return reservation

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map; durable after the next flush."""
        used = self._open.pop(reservation)
        for index in sorted(used):
            if self.table.place(index) is None:
                self._enter(index)
        uncovers = reservation.operation is Operation.UNCOVER
        if uncovers or (reservation.operation is not Operation.WRITE and not self.differencing):
            for offset, length in reservation.ranges:
                self._unlink_whole(offset, length)
        for placement in reservation.placements:
            if not placement.in_place:
                self._set_bits(placement.offset, placement.length)
        self._let_go(used)

    def abort(self, reservation: Reservation) -> None:
        """Give the places back. They are punched by the next flush and used again after it."""
        self._let_go(self._open.pop(reservation))

    @property
    def can_uncover(self) -> bool:
        """Whether blocks can be given up, one by one: they can."""
        return True

    def rebase(self, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
        """See :mod:`tapfs.formats.vhd.relink`."""
        return relink_plans(self, backing, parent)

    # -- flush ----------------------------------------------------------------------------------

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changed bitmaps, entries and places that were given up."""
        noted = self.places.given_up * _NOTED_BYTES
        return self._changed_bitmaps.held_bytes + self.table.changes.unflushed_bytes + noted

    def flush(self) -> Plan:
        """The plan described at the head of this module; empty where nothing has changed."""
        given_up = self.places.begin_plan()
        self.table.changes.begin_plan()
        self._changed_bitmaps.begin_plan()
        self._batmap_in_plan |= self._batmap_pending
        self._batmap_pending = False
        self._in_plan |= self._pending
        self._pending = set()
        table_steps = self.table.changes.steps()
        bitmap_steps: list[Step] = [
            Write(0, place + start, data) for place, start, data in self._changed_bitmaps.sector_runs()
        ]
        if not (table_steps or bitmap_steps or given_up or self._batmap_in_plan):
            return Plan()
        footer_steps = self._footer_steps()
        holes: list[Step] = [Discard(0, offset, length) for offset, length in given_up]
        holes += [Discard(0, offset, LENGTH) for offset in sorted(self._old_footers) if not self.places.covers(offset)]
        return plan(self._batmap_steps(), [*footer_steps, *bitmap_steps], table_steps, holes)

    def flushed(self, executed: Plan) -> None:
        """What the last plan wrote is durable, what it gave up may be used again."""
        if not executed:
            return
        self.table.changes.plan_done()
        self._changed_bitmaps.plan_done()
        self.places.plan_done()
        self._batmap_in_plan = False
        self._in_plan = set()
        if self._footer_in_plan is not None:
            self._footer_at, self._footer_in_plan = self._footer_in_plan, None
            self._old_footers.clear()
            self.places.footer_moved(self._footer_at)

    def table_places(self, first: int, count: int) -> array[int]:
        """The entries' own places; blocks that differ from the disk are left to `map`."""
        places = super().table_places(first, count)
        for changed in (self._pending, self._in_plan):
            near = changed if len(changed) < count else changed.intersection(range(first, first + count))
            for index in near:
                if first <= index < first + count:
                    places[index - first] = ASK
        return places

    def _footer_steps(self) -> list[Step]:
        place = max(self.places.end, self.footers.place)
        if place == self._footer_at:
            return []
        for old in (self._footer_at, self._footer_in_plan):
            if old is not None and old != place:
                self._old_footers.add(old)
        self._footer_in_plan = place
        return [Write(0, place, self.footer.pack())]

    def _batmap_steps(self) -> list[Step]:
        batmap = self.batmap
        if batmap is None or not self._batmap_in_plan:
            return []
        return [Write(0, batmap.offset, batmap.sealed_head()), Write(0, batmap.map_offset, bytes(batmap.bits))]

    # -- placing --------------------------------------------------------------------------------

    def _placements(self, ranges: Sequence[Range], used: set[int]) -> Iterator[Placement]:
        """The placements of what is to be written. A block that a commit maps whole is one, however little is written.

        What of such a place is not written stays as it is, and that is zeros.
        """
        block = self.header.block_size
        known: dict[int, Place] = {}  # of blocks that have given a placement: a fragmented disk has many ranges in each
        whole_end = 0  # of the last block that was placed whole
        for offset, length in ranges:
            if offset + length <= whole_end:
                continue
            for index, first, stop in self._pieces(offset, length):
                if index * block < whole_end:
                    continue
                place = known.get(index)
                if place is None:
                    place = self._place_for(index, used)
                    known[index] = place._replace(fresh=False)
                    if index in self._new and self._maps_whole(self._new[index]):
                        whole_end = (index + 1) * block
                        yield self._placement_in(index, 0, self.block_bytes(index) // SECTOR, place)
                        continue
                yield self._placement_in(index, first, stop, place)

    def _placement_in(self, index: int, first: int, stop: int, place: Place) -> Placement:
        """The placement of sectors of a block that lies there, or will."""
        start = index * self.header.block_size
        host_offset = place.offset + self.header.bitmap_bytes + first * SECTOR
        return Placement(start + first * SECTOR, (stop - first) * SECTOR, host_offset, fresh=place.fresh)

    def _metadata_of(self, used: set[int], placements: Sequence[Placement], end: int) -> Iterator[HostSpace]:
        """What the commit needs that the host may have no space for; `end` was that of the data before.

        These are bitmaps of new blocks, bitmaps without a bit, a batmap that will not call a block full any more, and
        the last footer, which a new block makes move. Entries of the table that are free are not zeros.

        The footer is first: where the host has no space for it the file is no longer than before. A bitmap behind the
        old footer would make it longer, and an old footer before the end of the file is none.
        """
        if self.places.end > max(end, self.footers.place):
            yield HostSpace(self.places.end, LENGTH, unused=True)
        elif self._footer_at is None:
            yield HostSpace(max(self.places.end, self.footers.place), LENGTH)
        for index in used:
            new = self._new[index].place.offset
            if self.table.place(index) != new:  # else another reservation has named it, and was committed
                yield HostSpace(new, self.header.bitmap_bytes, unused=True)
        last_index, place = -1, None
        for placement in placements:
            if placement.in_place:
                continue
            for index, first, stop in self._pieces(placement.offset, placement.length):
                if index != last_index:
                    last_index, place = index, self.table.place(index)
                if place is not None:
                    yield from blank_bytes(place, self._known_bitmap(index, place), first // 8, -(-stop // 8))
        if self.batmap is not None and any(self.batmap.is_full(index) for index in used):
            yield from blank_bytes(self.batmap.map_offset, self.batmap.bits, 0, len(self.batmap.bits))

    def _place_for(self, index: int, used: set[int]) -> Place:
        """The place of a block, allocated if there is none."""
        place = self.require_place(index)
        if place is not None and index not in self._new:
            return Place(place, fresh=False)
        new = self._new.get(index)
        first_user = new is None
        if new is None:
            new = self._new[index] = _NewBlock(self.places.take())
        if index not in used:
            used.add(index)
            new.users += 1
        # What a reservation that was aborted has left in a block that others go on filling is not zeros.
        return Place(new.place.offset, new.place.fresh and (first_user or self._maps_whole(new)))

    def _maps_whole(self, new: _NewBlock) -> bool:
        """Whether a new block is mapped whole with its first sectors. No other reservation is in it then."""
        return new.place.fresh and not self.differencing

    def _zero_placements(
        self, index: int, first: int, stop: int, operation: Operation, used: set[int]
    ) -> Iterator[Placement]:
        """What the engine must make read as zeros. Where no parent is to be hidden a whole block is given up."""
        place = self.require_place(index)
        if operation is Operation.UNCOVER:
            return
        if not self.differencing and (place is None or self._covers_block(index, first, stop)):
            return
        hidden = operation is Operation.ZERO and self.differencing
        if place is None:
            if hidden:
                yield self._placement_in(index, first, stop, self._place_for(index, used))
            return
        data = place + self.header.bitmap_bytes
        start = index * self.header.block_size
        for run in sector_runs(self._known_bitmap(index, place), first, stop):
            if run.present or hidden:
                yield Placement(
                    start + run.first * SECTOR,
                    (run.stop - run.first) * SECTOR,
                    data + run.first * SECTOR,
                    in_place=run.present,
                )

    def _covers_block(self, index: int, first: int, stop: int) -> bool:
        return first == 0 and stop * SECTOR >= self.block_bytes(index)

    def _with_blocks(self, ranges: Sequence[Range], whole: list[int]) -> tuple[Range, ...]:
        """The ranges and the new blocks that a commit maps whole, so that nobody else fills any of those."""
        if not whole:
            return tuple(ranges)
        block = self.header.block_size
        inside = set(whole)
        found = [Range(index * block, self.block_bytes(index)) for index in whole]
        found += [
            Range(offset, length)
            for offset, length in ranges
            if offset // block not in inside or offset % block + length > block
        ]
        joined: list[Range] = []
        for each in sorted(found):
            if joined and each.offset <= joined[-1].end:
                joined[-1] = Range(joined[-1].offset, max(joined[-1].end, each.end) - joined[-1].offset)
            else:
                joined.append(each)
        return tuple(joined)

    # -- publishing -----------------------------------------------------------------------------

    def _enter(self, index: int) -> None:
        new = self._new[index]
        self._pending.add(index)
        self._forget_full(index)
        self.table.enter(index, new.place.offset)
        fill = b"\xff" if self._maps_whole(new) else b"\0"
        self._store_bitmap(new.place.offset, bytearray(fill * self.header.bitmap_bytes))

    def _set_bits(self, offset: int, length: int) -> None:
        for index, first, stop in self._pieces(offset, length):
            place = self.table.place(index)
            if place is None:
                raise AssertionError(f"block {index} was committed without a place")
            known = self._known_bitmap(index, place)
            if is_full(known, self.block_sectors):
                continue
            self._pending.add(index)
            bitmap = bytearray(known)
            set_bits(bitmap, first, stop)
            self._store_bitmap(place, bitmap, first, stop)

    def _store_bitmap(self, place: int, bitmap: bytearray, first: int = 0, stop: int | None = None) -> None:
        self.forget_bitmap(place)
        self._changed_bitmaps.put(place, bitmap, first, self.block_sectors if stop is None else stop)

    def _unlink_whole(self, offset: int, length: int) -> None:
        """Give up the blocks that a range covers."""
        for index, first, stop in self._pieces(offset, length):
            place = self.table.place(index)
            if place is not None and self._covers_block(index, first, stop):
                self.unlink_block(index, place)

    def unlink_block(self, index: int, place: int) -> None:
        """Give up the block of a number, which lies at `place`."""
        self._pending.add(index)
        self._forget_full(index)
        self.table.enter(index, None)
        self._changed_bitmaps.drop(place)
        self.forget_bitmap(place)
        self.places.give_up(place)

    def _forget_full(self, index: int) -> None:
        """Have the batmap not call a block full whose place or bitmap is about to change."""
        if self.batmap is not None and self.batmap.is_full(index):
            self.batmap.clear(index)
            self._batmap_pending = True

    def _let_go(self, used: set[int]) -> None:
        """A reservation does not fill these new blocks any more; one that nobody has committed is given up."""
        footer = max(self._footer_at or 0, self._footer_in_plan or 0)
        # The last ones first: what nobody has written to at the end of the file is not needed at all.
        for index in sorted(used, key=lambda index: self._new[index].place.offset, reverse=True):
            new = self._new[index]
            new.users -= 1
            if new.users == 0:
                del self._new[index]
                if self.table.place(index) == new.place.offset:
                    continue
                if footer >= self.places.end or not self.places.take_back(new.place.offset):
                    self.places.give_up(new.place.offset)

    # -- bitmaps and walking --------------------------------------------------------------------

    def bitmap(self, place: int) -> bytes | bytearray:
        """The bitmap at `place` with what was committed."""
        changed = self._changed_bitmaps.get(place)
        return super().bitmap(place) if changed is None else changed

    def _known_bitmap(self, index: int, place: int) -> bytes | bytearray:
        """The bitmap of a block, or that of a full one where tapdisk's batmap says so."""
        if self.batmap is not None and self.batmap.is_full(index):
            return b"\xff" * self.header.bitmap_bytes
        return self.bitmap(place)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The blocks that a range of whole sectors touches, each with its sectors ``[first, stop)``."""
        at, end = offset // SECTOR, (offset + length) // SECTOR
        while at < end:
            index, first = divmod(at, self.block_sectors)
            stop = min(self.block_sectors, first + end - at)
            yield index, first, stop
            at += stop - first

    def data_end(self) -> int:
        """The end of all that the image refers to, but for the last footer.

        A file without a good footer at the end is one that a crash has left: its last bytes may be anything.
        """
        ends = [stop for _, stop, _ in self.metadata_ranges]
        ends += [locator.offset + locator.space_bytes for locator in self.header.locators if locator.data_length]
        if self.batmap is not None:
            ends.append(self.batmap.end)
        if (bounds := self.table.bounds()) is not None:
            ends.append(bounds[1] + self.header.bitmap_bytes + self.header.block_size)
        # Entries behind the end of the disk may name data: of a growth that was cut off, or where the size is damaged.
        ends += [claim.start + claim.length for claim in self.table.further(CheckReport())]
        if not self.footers.last_good:
            ends.append(round_up(self.file.size(), SECTOR))
        return round_up(max(ends), SECTOR)
