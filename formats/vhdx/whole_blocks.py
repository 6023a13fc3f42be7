"""Reservations of an image without parent: whole blocks, each new or unlinked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.driver import Operation, Placement, Reservation
from tapfs.extent import Range
from tapfs.formats.vhdx.blocks import PLACE_MASK, STATE_MASK, State
from tapfs.formats.vhdx.reader import VhdxReader
from tapfs.formats.vhdx.space import Space


class WholeBlocks:
    """Reserves, commits and aborts on one image. A fixed image keeps its blocks: they are zeroed in place."""

    def __init__(self, image: VhdxReader, space: Space) -> None:
        self._image = image
        self._space = space
        self._block_size = image.table.block_size
        self._keeps = image.metadata.leave_allocated

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """Places for a write; for zeros and discards only what is done in place."""
        placements: list[Placement] = []
        for each in ranges:
            if operation is Operation.WRITE:
                at = each.offset
                for piece in self._space.allocation.clusters(each.length):
                    placements.append(Placement(at, piece.length, piece.host_offset, fresh=piece.fresh))
                    at += piece.length
                continue
            present = self._present(each)
            if self._keeps and operation is Operation.ZERO:
                placements += [
                    Placement(block * self._block_size, self._block_size, place, in_place=True)
                    for block, place in present
                ]
        blocks = (block for each in ranges for block in self._blocks(each))
        metadata = tuple(self._space.metadata(blocks))
        exact = operation is Operation.WRITE
        return Reservation(tuple(ranges), operation, tuple(placements), exact, metadata)

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map in memory."""
        if reservation.operation is Operation.WRITE:
            for placement in reservation.placements:
                first = placement.offset // self._block_size
                for number in range(placement.length // self._block_size):
                    place = placement.host_offset + number * self._block_size
                    self._space.link(first + number, State.PRESENT, place)
        elif not self._keeps:
            for each in reservation.ranges:
                for block, _ in self._present(each):
                    self._space.unlink(block)

    def abort(self, reservation: Reservation) -> None:
        """Give the places back."""
        for placement in reservation.placements:
            if not placement.in_place:
                self._space.allocation.release(placement.host_offset, placement.length)

    def _present(self, each: Range) -> list[tuple[int, int]]:
        """The blocks of a range that have bytes, and their host offsets."""
        return [
            (block, entry & PLACE_MASK) for block, entry in self._entries(each) if entry & STATE_MASK == State.PRESENT
        ]

    def _blocks(self, each: Range) -> range:
        return range(each.offset // self._block_size, min(self._image.table.blocks, -(-each.end // self._block_size)))

    def _entries(self, each: Range) -> Iterator[tuple[int, int]]:
        table = self._image.table
        block, stop = each.offset // self._block_size, min(table.blocks, each.end // self._block_size)
        while block < stop:
            chunk_end = min(stop, (table.chunk_of(block) + 1) * table.chunk_blocks)
            for entry in self._image.entries(block, chunk_end):
                self._image.require_possible(block, entry)
                yield block, entry
                block += 1
