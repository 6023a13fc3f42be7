"""Write an image with one table of blocks.

Blocks get slots as they are asked for: first those that nothing refers to, then new ones at the end of the file.
What a flush makes durable, in this order, each stage after the one before:

1. the length of the file: no entry may point past its end;
2. what the format has to say before its entries are true (`before_table`): bitmaps, footers, counts;
3. the changed sectors of the table (the data that they point at is durable by the barrier that starts every plan);
4. what is only true once they are durable (`after_table`);
5. holes where slots were given back, which no entry points at any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.driver import BackingReference, HostFile, OpenRequest, Operation, Placement, Reservation
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind, Range
from tapfs.formats.allocation import Allocation, HostRange
from tapfs.formats.apart import require_apart
from tapfs.formats.blocks.layout import BlockLayout
from tapfs.formats.blocks.reader import BlockReader
from tapfs.plan import Discard, Grow, Plan, Step, plan

#: Memory that a slot which waits for a flush is taken to need.
_RELEASED_SLOT_BYTES = 128

#: Slots of a file that are marked, a byte for each, to see that no two blocks have one.
_MAX_MARKS = 64 << 20

#: Host offsets are signed 64-bit numbers; what the format adds after the last slot needs room, too.
_MAX_HOST_SIZE = (1 << 63) - (1 << 32)


class BlockWriter(BlockReader):
    """An open image, read-write: the parts of a :class:`tapfs.driver.WritableDriver`."""

    #: Whether a commit of a write maps the blocks to their placements and changes nothing else (`Reservation.exact`).
    exact_writes = True
    #: Whether the block of a zero or a discard loses its slot, where no parent would show through. Otherwise zeros are
    #: put in place, and the host gets the space back: for formats whose slots must be numbered without gaps.
    unlinks = True

    def __init__(
        self, file: HostFile, request: OpenRequest, layout: BlockLayout, backing: BackingReference | None = None
    ) -> None:
        super().__init__(file, request, layout, backing)
        if layout.table_offset % layout.entry_bytes:
            # An entry across two sectors could be torn into a third value by a crash.
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"cannot write an image whose block table is not aligned to {layout.entry_bytes} bytes",
                path=file.path,
                offset=layout.table_offset,
                op="open",
            )
        if not request.lenient and not self._is_plain():
            used = (run for run in self.runs(0, layout.blocks) if run.kind == Kind.DATA)
            slots = ((layout.slot(run.entry), run.blocks * layout.slot_bytes) for run in used)
            require_apart(slots, layout.scale, file.path, what="blocks", origin=layout.origin)
        self._unlinks = self.unlinks and backing is None
        self.allocation = Allocation(
            file.path,
            max(layout.least_place, self.blocks_end()),
            layout.slot_bytes,
            max_size=min(_MAX_HOST_SIZE, layout.slot(layout.largest_entry) + layout.slot_bytes),
            origin=layout.origin,
            alignment=self.slot_alignment(),
        )
        # New slots may begin before the end of the file, or after it where a slot must be aligned.
        self.allocation.committed_end = self.allocation.durable_end = self.host_bytes
        self._prepared = False
        self._open: set[Reservation] = set()

    def _is_plain(self) -> bool:
        """Whether all slots are known to differ, and to be whole in the file: a quick look at whole pages of the table.

        False says nothing: the image may be sound all the same.
        """
        layout = self.layout
        slots = (self.host_bytes - layout.origin) // layout.slot_bytes
        if layout.step != 1 or layout.reserved or layout.least_place > layout.origin or not 0 <= slots <= _MAX_MARKS:
            return False
        marks = bytearray(slots)
        claimed = 0
        special = {layout.free, layout.zero}
        for _, entries in self.table.pieces(0, layout.blocks):
            if entries.count(layout.free) == len(entries):
                continue
            used = [entry for entry in entries if entry not in special]
            if used and max(used) >= slots:
                return False
            claimed += len(used)
            for entry in used:
                marks[entry] = 1
        return marks.count(1) == claimed

    # -- what a format may do otherwise -----------------------------------------------------------

    def slot_alignment(self) -> int:
        """Slots begin at multiples of this after the layout's origin."""
        return self.layout.slot_bytes

    def blocks_end(self) -> int:
        """Where new slots may begin: nothing but what the format writes anew lies behind it."""
        return self.host_bytes

    def unused_slots(self) -> Sequence[HostRange]:
        """Ranges before the end of the file that are slots and that no entry names; asked before the first of all."""
        return ()

    def before_table(self) -> list[list[Step]]:
        """The stages of a plan between the length of the file and the entries."""
        return []

    def after_table(self) -> list[list[Step]]:
        """The stages of a plan between the entries and the holes."""
        return []

    def file_bytes(self, blocks_end: int) -> int:
        """The length of a file whose last slot ends at `blocks_end`."""
        return blocks_end

    @property
    def has_more_to_flush(self) -> bool:
        """Whether there is something to flush beyond entries and slots."""
        return False

    # -- reservations -----------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """See :meth:`tapfs.driver.WritableDriver.reserve`.

        Raises ImageError(corrupt) for an impossible entry, (no_space) where the format can address no more.
        """
        if not self._prepared:
            self.allocation.adopt(self.unused_slots())
            self._prepared = True
        if operation is Operation.WRITE:
            placements = self._placed(ranges)
        else:
            placements = [place for each in ranges for place in self._zeroed(each, operation)]
        exact = operation is Operation.WRITE and self.exact_writes
        size = self.layout.block_bytes
        metadata = [
            space for each in ranges for space in self.table.blank_pages(each.offset // size, -(-each.end // size))
        ]
        reservation = Reservation(tuple(ranges), operation, tuple(placements), exact, tuple(metadata))
        self._open.add(reservation)
        return reservation

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map; durable after the next flush."""
        self._open.remove(reservation)
        if reservation.operation is not Operation.WRITE:
            for each in reservation.ranges:
                self._unlink(each, reservation.operation)
        for placement in reservation.placements:
            if not placement.in_place:
                self.link(placement)

    def abort(self, reservation: Reservation) -> None:
        """Give the slots back. They are punched by the next flush and used again after it."""
        self._open.remove(reservation)
        for placement in reservation.placements:
            if not placement.in_place:
                blocks = placement.length // self.layout.block_bytes
                self.release(self._slot_of(placement), blocks)

    # -- flush ------------------------------------------------------------------------------------

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changed pages of the table and by slots that were given back."""
        return self.table.unflushed_bytes + self.allocation.noted * _RELEASED_SLOT_BYTES

    def flush(self) -> Plan:
        """The plan described at the head of this module; empty where nothing has changed."""
        released = self.allocation.begin_plan()
        if not (self.table.unflushed_bytes or released or self.has_more_to_flush):
            return Plan()
        self.table.begin_plan()
        grown: list[Step] = []
        if self.allocation.committed_end > self.allocation.durable_end:
            grown.append(Grow(0, self.file_bytes(self.allocation.committed_end)))
        holes: list[Step] = [Discard(0, piece.start, piece.end - piece.start) for piece in released]
        return plan(grown, *self.before_table(), self.table.steps(), *self.after_table(), holes)

    def flushed(self, executed: Plan) -> None:
        """What the last plan wrote is durable, what it released may be used again."""
        if executed:
            self.table.plan_done()
            self.allocation.plan_done()

    # -- placing ----------------------------------------------------------------------------------

    def _placed(self, ranges: Sequence[Range]) -> list[Placement]:
        """Slots for ranges, as contiguous over all of them as the free space is."""
        layout = self.layout
        blocks = sum(each.length for each in ranges) // layout.block_bytes
        slots = (
            (piece.host_offset, piece.length // layout.slot_bytes, piece.fresh)
            for piece in self.allocation.clusters(blocks * layout.slot_bytes)
        )
        placements: list[Placement] = []
        slot, left, fresh = 0, 0, False
        for each in ranges:
            at = each.offset
            while at < each.end:
                if not left:
                    slot, left, fresh = next(slots)
                taken = min(left, (each.end - at) // layout.block_bytes) if layout.contiguous else 1
                length = taken * layout.block_bytes
                placements.append(Placement(at, length, slot + layout.payload_at, fresh=fresh))
                at += length
                slot += taken * layout.slot_bytes
                left -= taken
        return placements

    def _zeroed(self, wanted: Range, operation: Operation) -> Iterator[Placement]:
        """The placements that make a range read as zeros, or that give its space to the host."""
        layout = self.layout
        if operation is Operation.UNCOVER:
            return
        zero_below = operation is Operation.ZERO and self._geometry.backing is not None
        first, stop = wanted.offset // layout.block_bytes, wanted.end // layout.block_bytes
        for run in self.runs(first, stop):
            if run.kind == Kind.DATA and not self._unlinks:
                for extent in self.extents_of(run):
                    yield Placement(extent.offset, extent.length, extent.host_offset, in_place=True)
            elif run.kind == Kind.UNALLOCATED and zero_below and layout.zero is None:
                yield from self._placed([Range(run.first * layout.block_bytes, run.blocks * layout.block_bytes)])

    # -- publishing -------------------------------------------------------------------------------

    def link(self, placement: Placement) -> None:
        """Have the entries of a placement's blocks name its slots."""
        layout = self.layout
        slot, blocks = self._slot_of(placement), placement.length // layout.block_bytes
        self.allocation.commit(slot, blocks * layout.slot_bytes)
        self.host_bytes = max(self.host_bytes, self.allocation.committed_end)
        self.table.set(placement.offset // layout.block_bytes, layout.consecutive(layout.entry(slot), blocks))

    def give_up(self, slot: int, blocks: int) -> None:
        """Have no entry name slots any more that follow one another."""
        self.release(slot, blocks)

    def release(self, slot: int, blocks: int) -> None:
        """Give back slots that follow one another."""
        self.allocation.release(slot, blocks * self.layout.slot_bytes)

    def _unlink(self, wanted: Range, operation: Operation) -> None:
        """Change the entries that a zero, a discard or an uncovering needs changed."""
        layout = self.layout
        below = self._geometry.backing is not None
        uncovers = operation is Operation.UNCOVER
        for run in list(self.runs(wanted.offset // layout.block_bytes, wanted.end // layout.block_bytes)):
            if run.kind == Kind.DATA and (self._unlinks or uncovers):
                self.table.set(run.first, layout.same(layout.free, run.blocks))
                self.give_up(layout.slot(run.entry), run.blocks)
            elif run.kind == Kind.ZERO and uncovers:
                self.table.set(run.first, layout.same(layout.free, run.blocks))
            elif run.kind == Kind.UNALLOCATED and below and operation is Operation.ZERO and layout.zero is not None:
                self.table.set(run.first, layout.same(layout.zero, run.blocks))

    def _slot_of(self, placement: Placement) -> int:
        return placement.host_offset - self.layout.payload_at
