"""The blocks of an image that is being written: their entries in the block table, and their space in the file."""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.formats.allocation import Allocation
from tapfs.formats.rounding import round_down, round_up
from tapfs.formats.vhdx.blocks import (
    ANCHORED,
    BITMAP_BYTES,
    PLACE_MASK,
    STATE_MASK,
    State,
    make_entry,
    place_fault,
)
from tapfs.formats.vhdx.reader import VhdxReader
from tapfs.formats.vhdx.units import MAX_FILE_BYTES, MIB

_PLACED = frozenset({State.PRESENT, State.PARTIAL}) | ANCHORED


class Space:
    """Changes entries of one image, and takes and gives back what they point at."""

    def __init__(self, image: VhdxReader) -> None:
        self._image = image
        self.allocation = Allocation(
            image.file.path,
            _end_of_blocks(image),
            image.table.block_size,
            max_size=MAX_FILE_BYTES,
            alignment=MIB,
        )

    def link(self, block: int, state: State, host_offset: int) -> None:
        """The block has its bytes at that place from now on."""
        self._release(block)
        self._set(self._image.table.index(block), make_entry(state, host_offset))
        self.allocation.commit(host_offset, self._image.table.block_size)

    def unlink(self, block: int) -> None:
        """The block reads as zeros from now on, whatever a parent has."""
        self._release(block)
        self._set(self._image.table.index(block), make_entry(State.ZERO))

    def uncover(self, block: int) -> None:
        """The block reads as the parent has it from now on."""
        self._release(block)
        self._set(self._image.table.index(block), make_entry(State.NOT_PRESENT))

    def forget_bitmap(self, chunk: int) -> None:
        """Give up the sector bitmap of a chunk behind the end of a disk that got smaller."""
        table = self._image.table
        index = table.bitmap_index(chunk)
        entry = self._image.pages.word(table.entry_offset(index))
        usable = place_fault(entry, BITMAP_BYTES, self._image.reserved, self._image.file_end) is None
        if entry & STATE_MASK == State.PRESENT and usable:
            self.allocation.release(entry & PLACE_MASK, BITMAP_BYTES, reusable=False)
        if entry:
            self._set(index, 0)

    def add_bitmap(self, block: int) -> None:
        """Give the chunk of a block a sector bitmap without a bit, if it has none."""
        table = self._image.table
        index = table.bitmap_index(table.chunk_of(block))
        if self._image.pages.word(table.entry_offset(index)) & STATE_MASK != State.PRESENT:
            place = self.allocation.tail(MIB)
            self._set(index, make_entry(State.PRESENT, place))
            self.allocation.commit(place, MIB)

    def _set(self, index: int, entry: int) -> None:
        self._image.pages.set_word(self._image.table.entry_offset(index), entry)

    def _release(self, block: int) -> None:
        image = self._image
        entry, length = image.entry(block), image.table.block_size
        # What lies at an impossible place is left alone: it may be the header.
        if (
            entry & STATE_MASK in _PLACED
            and entry & PLACE_MASK
            and place_fault(entry, length, image.reserved, image.file_end) is None
        ):
            self.allocation.release(entry & PLACE_MASK, length)


def _end_of_blocks(image: VhdxReader) -> int:
    """The end of the file in whole MiB, or of a block that the end of the file cuts short."""
    table = image.table
    size = image.file.size()
    end = max(round_up(size, MIB), *(place.end for place in image.reserved))
    for _, entries in image.chunks():
        if max(entries) >> 63 or max(entries) & PLACE_MASK >= size:
            last = max((entry & PLACE_MASK for entry in entries if entry & PLACE_MASK < size), default=0)
        else:
            last = max(entries) & PLACE_MASK
        if last:
            end = max(end, last + table.block_size)
    return end


def places(image: VhdxReader) -> Iterator[tuple[int, int]]:
    """The ranges ``(start, length)`` of the file that entries say to be a block's or a sector bitmap's.

    Raises ImageError(corrupt) for an entry that cannot be true.
    """
    table = image.table
    for first, entries in image.chunks():
        partial: int | None = None
        for block, entry in enumerate(entries, first):
            state = entry & STATE_MASK
            if state in {State.NOT_PRESENT, State.ZERO}:
                continue
            # The space that a block has had stays its own, wherever it can be.
            if state in ANCHORED and place_fault(entry, table.block_size, image.reserved, image.file_end) is not None:
                continue
            image.require_possible(block, entry)
            if state in _PLACED and entry & PLACE_MASK:
                yield entry & PLACE_MASK, table.block_size
            if state == State.PARTIAL:
                partial = block
        if partial is not None:
            yield round_down(image.bitmap_place(partial), MIB), MIB
