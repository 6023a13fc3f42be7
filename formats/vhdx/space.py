"""The blocks of an image that is being written: their entries in the block table, and their space in the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tapfs.driver import HostSpace
from tapfs.extent import Range
from tapfs.formats.allocation import Allocation
from tapfs.formats.rounding import round_down, round_up
from tapfs.formats.vhdx.blocks import (
    ANCHORED,
    BITMAP_BYTES,
    ENTRY_BYTES,
    PLACE_MASK,
    STATE_MASK,
    State,
    make_entry,
    place_fault,
)
from tapfs.formats.vhdx.reader import VhdxReader
from tapfs.formats.vhdx.units import MAX_FILE_BYTES, MIB, PAGE

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
        #: The log, until a reservation that named it was committed: a flush may write anywhere in it.
        self._log: tuple[HostSpace, ...] = ()
        #: Places that are kept for sector bitmaps which a commit makes, by chunk.
        self._kept: dict[int, int] = {}

    def use_log(self, place: Range) -> None:
        """The log lies there, and the host may have no space for it."""
        self._log = (HostSpace(place.offset, place.length),)

    def log_has_space(self) -> None:
        """A reservation that named the log was committed."""
        self._log = ()

    def metadata(self, entries: Iterable[int]) -> Iterator[HostSpace]:
        """The log and pages of the table that a host may have no space for, if the entries of these blocks change."""
        yield from self._log
        place = -1
        for block in entries:
            at = self._image.table.entry_offset(self._image.table.index(block))
            if not place <= at < place + PAGE:
                place = round_down(at, PAGE)
                yield from self._image.pages.blank(at, ENTRY_BYTES)

    def bitmap_metadata(self, block: int) -> Iterator[HostSpace]:
        """The same for a block that becomes one with a sector bitmap; the bitmap gets a place if there is none."""
        image, table = self._image, self._image.table
        chunk = table.chunk_of(block)
        at = table.entry_offset(table.bitmap_index(chunk))
        entry = image.pages.word(at)
        place = entry & PLACE_MASK
        if entry & STATE_MASK != State.PRESENT:
            yield from image.pages.blank(at, ENTRY_BYTES)
            if chunk not in self._kept:
                self._kept[chunk] = self.allocation.tail(MIB)
            place = self._kept[chunk]
        yield from image.pages.blank(place + table.bitmap_offset(block), table.bitmap_bytes)

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
            kept = self._kept.pop(table.chunk_of(block), None)
            place = self.allocation.tail(MIB) if kept is None else kept
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
