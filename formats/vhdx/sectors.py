"""Reservations of a differencing image: sectors, in blocks that are taken whole at the first write.

A block that shows the parent becomes PARTIAL, and the sector bitmap says which sectors are written. A block that reads
as zeros hides the parent; it becomes PRESENT, in space that reads as zeros. A reservation that takes a block is as wide
as the block, so nobody else takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.driver import HostSpace, Operation, Placement, Reservation
from tapfs.extent import Range
from tapfs.formats.vhdx.bitmaps import clear_bits, sector_runs, set_bits
from tapfs.formats.vhdx.blocks import PLACE_MASK, STATE_MASK, ZEROS, State
from tapfs.formats.vhdx.reader import VhdxReader
from tapfs.formats.vhdx.space import Space
from tapfs.records import NamedTuple


class _Piece(NamedTuple):
    """Sectors ``[first, stop)`` of a block; `whole`: all that the disk has of it."""

    block: int
    first: int
    stop: int
    whole: bool


class _Taken(NamedTuple):
    """The place of a block that a reservation takes, and the state that it will have."""

    place: int
    state: State
    fresh: bool


class _Changes(NamedTuple):
    """The blocks that the commit of a reservation takes, makes zeros, and lets show the parent."""

    taken: dict[int, _Taken]
    unlinked: list[int]
    uncovered: list[int]


class Sectors:
    """Reserves, commits and aborts on one image."""

    def __init__(self, image: VhdxReader, space: Space) -> None:
        self._image = image
        self._space = space
        self._sector = image.metadata.logical_sector
        self._block_size = image.table.block_size
        self._open: dict[Reservation, _Changes] = {}

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """Places for a write, and for zeros that hide a part of a block of the parent; the rest is done in place."""
        changes = _Changes({}, [], [])
        placements: list[Placement] = []
        try:
            for each in ranges:
                for piece in self._pieces(each):
                    placements += self._place(piece, operation, changes)
        except BaseException:
            self._give_back(changes)
            raise
        taken = changes.taken.values()
        exact = operation is Operation.WRITE and all(each.state == State.PARTIAL for each in taken)
        metadata = tuple(self._metadata(changes, placements))
        reservation = Reservation(self._widened(ranges, changes), operation, tuple(placements), exact, metadata)
        self._open[reservation] = changes
        return reservation

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map in memory."""
        image = self._image
        changes = self._open.pop(reservation)
        for block, each in changes.taken.items():
            self._space.link(block, each.state, each.place)
            if each.state == State.PARTIAL:
                self._space.add_bitmap(block)
                image.note_end(self._space.allocation.end)
                clear_bits(image.pages, image.bitmap_place(block), image.table.bitmap_bytes)
        for placement in reservation.placements:
            block, within = divmod(placement.offset, self._block_size)
            if image.entry(block) & STATE_MASK == State.PARTIAL and not placement.in_place:
                first, count = within // self._sector, placement.length // self._sector
                set_bits(image.pages, image.bitmap_place(block), first, first + count)
        for block in changes.unlinked:
            self._space.unlink(block)
        for block in changes.uncovered:
            self._space.uncover(block)

    def abort(self, reservation: Reservation) -> None:
        """Give the places back."""
        self._give_back(self._open.pop(reservation))

    def _metadata(self, changes: _Changes, placements: Sequence[Placement]) -> Iterator[HostSpace]:
        """What the commit changes and the host may have no space for."""
        image = self._image
        yield from self._space.metadata(sorted([*changes.taken, *changes.unlinked, *changes.uncovered]))
        for block, taken in changes.taken.items():
            if taken.state == State.PARTIAL:
                yield from self._space.bitmap_metadata(block)
        for placement in placements:
            block, within = divmod(placement.offset, self._block_size)
            if not placement.in_place and image.entry(block) & STATE_MASK == State.PARTIAL:
                first, last = within // self._sector // 8, (within + placement.length - 1) // self._sector // 8
                yield from image.pages.blank(image.bitmap_place(block) + first, last + 1 - first)

    def _give_back(self, changes: _Changes) -> None:
        for each in changes.taken.values():
            self._space.allocation.release(each.place, self._block_size)

    def _place(self, piece: _Piece, operation: Operation, changes: _Changes) -> Iterator[Placement]:
        image, block = self._image, piece.block
        entry = image.entry(block)
        state = entry & STATE_MASK
        image.require_possible(block, entry)
        if operation is Operation.UNCOVER:
            if piece.whole and state != State.NOT_PRESENT:
                changes.uncovered.append(block)
            return
        if operation is not Operation.WRITE and piece.whole:
            if state >= State.PRESENT or (state == State.NOT_PRESENT and operation is Operation.ZERO):
                changes.unlinked.append(block)
            return
        if state == State.PRESENT:
            yield self._placement(piece, entry & PLACE_MASK, in_place=True)
        elif state == State.PARTIAL:
            bitmap = image.pages.read(image.bitmap_place(block), image.table.bitmap_bytes)
            for run in sector_runs(bitmap, piece.first, piece.stop):
                # A discard leaves what the parent has.
                if run.present or operation is not Operation.DISCARD:
                    part = piece._replace(first=run.first, stop=run.stop)
                    yield self._placement(part, entry & PLACE_MASK, in_place=run.present)
        elif operation is Operation.WRITE or (operation is Operation.ZERO and state == State.NOT_PRESENT):
            taken = changes.taken.get(block)
            if taken is None:
                taken = changes.taken[block] = self._take(block, state)
            yield self._placement(piece, taken.place, fresh=taken.fresh)

    def _take(self, block: int, state: int) -> _Taken:
        allocation = self._space.allocation
        if state in ZEROS:
            # What is not written must read as zeros, and only space at the end of the file does.
            return _Taken(allocation.tail(self._block_size), State.PRESENT, fresh=True)
        table = self._image.table
        index = table.bitmap_index(table.chunk_of(block))
        entry = self._image.pages.word(table.entry_offset(index))
        if entry & STATE_MASK == State.PRESENT:
            self._image.bitmap_place(block)
        (piece,) = allocation.clusters(self._block_size)
        return _Taken(piece.host_offset, State.PARTIAL, piece.fresh)

    def _placement(self, piece: _Piece, place: int, *, fresh: bool = False, in_place: bool = False) -> Placement:
        within = piece.first * self._sector
        return Placement(
            piece.block * self._block_size + within,
            (piece.stop - piece.first) * self._sector,
            place + within,
            fresh=fresh,
            in_place=in_place,
        )

    def _pieces(self, each: Range) -> Iterator[_Piece]:
        """The blocks that a range touches."""
        at, end = each.offset, min(each.end, self._image.metadata.size)
        while at < end:
            block, within = divmod(at, self._block_size)
            block_end = min((block + 1) * self._block_size, self._image.metadata.size)
            stop = min(end, block_end)
            whole = within == 0 and stop == block_end
            last = (stop - block * self._block_size) // self._sector
            yield _Piece(block, within // self._sector, last, whole)
            at = stop

    def _widened(self, ranges: Sequence[Range], changes: _Changes) -> tuple[Range, ...]:
        """The ranges and the whole of every block that is taken."""
        size, disk = self._block_size, self._image.metadata.size
        whole = [Range(block * size, min(size, disk - block * size)) for block in changes.taken]
        joined: list[Range] = []
        for each in sorted([*ranges, *whole]):
            if whole and joined and each.offset <= joined[-1].end:
                joined[-1] = Range(joined[-1].offset, max(joined[-1].end, each.end) - joined[-1].offset)
            else:
                joined.append(each)
        return tuple(joined)
