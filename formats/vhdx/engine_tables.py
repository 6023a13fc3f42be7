"""The tables of a VHDX image as the engine reads them itself: the block table, and the sector bitmaps over a parent."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right

from tapfs.extent import Kind
from tapfs.formats.vhdx.blocks import ENTRY_BYTES, PLACE_MASK, RESERVED_MASK, STATE_MASK, ZEROS, State
from tapfs.formats.vhdx.reader import VhdxReader
from tapfs.formats.vhdx.units import HEADER_SECTION
from tapfs.tables import ABSENT, ASK, Bitmap, Rule, TableLayout, Where

#: Bits of an entry that are zero where it has a place; no host offset has the highest one.
_ZERO_MASK = RESERVED_MASK | 1 << 63

#: The engine knows so many ranges where no block may lie.
_MAX_RESERVED = 8


class TabledVhdx(VhdxReader):
    """An open image that describes its tables: a :class:`tapfs.tables.Tabled`. The oracle of a test is its `map`."""

    @property
    def host_size(self) -> int:
        """The length of the file, with what has been allocated."""
        return self.file_end

    def table_layout(self) -> TableLayout | None:
        """The block table, with the sector bitmaps where there is a parent."""
        if len(self.reserved) > _MAX_RESERVED:
            return None
        table, unit = self.table, self._geometry.map_unit
        unknown = (4, 5) if table.has_parent else (4, 5, State.PARTIAL)
        bitmap = Bitmap(
            Where.IN_TABLE,
            entry_mask=STATE_MASK,
            entry_value=State.PARTIAL,
            word_place=table.entry_offset(table.bitmap_index(0)),
            word_stride=(table.chunk_blocks + 1) * ENTRY_BYTES,
            word_units=table.chunk_blocks * table.block_size // unit,
            word_mask=STATE_MASK | _ZERO_MASK,
            word_value=State.PRESENT,
        )
        return TableLayout(
            entry_bytes=ENTRY_BYTES,
            big_endian=False,
            host_size=self.host_size,
            rules=(
                Rule(STATE_MASK, State.NOT_PRESENT, Kind.UNALLOCATED),
                *(Rule(STATE_MASK, state, Kind.ZERO) for state in sorted(ZEROS)),
                *(Rule(STATE_MASK, state, None) for state in unknown),
            ),
            place_mask=PLACE_MASK & ~_ZERO_MASK,
            data_whole=True,
            in_place_mask=State.PRESENT,
            in_place_value=State.PRESENT,
            zero_mask=_ZERO_MASK,
            entry_granules=table.block_size // self._geometry.granule,
            bitmap=bitmap if table.has_parent else None,
            table_alignment=ENTRY_BYTES,
            tables_reserved=True,
            least_place=HEADER_SECTION,
            reserved=tuple((place.offset, place.end) for place in self.reserved),
        )

    def table_places(self, first: int, count: int) -> array[int]:
        """The entries of the blocks of each map unit; those on pages that differ from the disk are left to `map`."""
        table = self.table
        blocks = self._geometry.map_unit // table.block_size
        places = array("Q")
        block, stop = first * blocks, (first + count) * blocks
        while block < stop:
            chunk_end = min(stop, (table.chunk_of(block) + 1) * table.chunk_blocks)
            at = table.entry_offset(table.index(block))
            places.extend(range(at, at + (chunk_end - block) * ENTRY_BYTES, blocks * ENTRY_BYTES))
            block = chunk_end
        self._leave_out_holes(places, blocks * ENTRY_BYTES)
        if self.pages.changed:
            for unit in range(first, first + count):
                if self._differs(unit * blocks, blocks):
                    places[unit - first] = ASK
        return places

    def _leave_out_holes(self, places: array[int], unit_bytes: int) -> None:
        """Say of units whose entries are in a hole of the host file that they have none: these are zero."""
        start, end = places[0], places[-1] + unit_bytes
        holes: list[tuple[int, int]] = []
        for at, length in (*self.file.data_ranges(start, end - start), (end, 0)):
            # The units that begin in the hole and end in it, too.
            first, stop = bisect_left(places, start), bisect_right(places, at - unit_bytes)
            if first < stop:
                holes.append((first, stop))
            start = at + length
        for first, stop in holes:
            places[first:stop] = array("Q", [ABSENT]) * (stop - first)

    def _differs(self, block: int, count: int) -> bool:
        """Whether the map of blocks of one chunk is another on the disk."""
        table, pages = self.table, self.pages
        if pages.differs(table.entry_offset(table.index(block)), count * ENTRY_BYTES):
            return True
        if not table.has_parent:
            return False
        word_at = table.entry_offset(table.bitmap_index(table.chunk_of(block)))
        place = (pages.word(word_at) & PLACE_MASK) + table.bitmap_offset(block)
        return pages.differs(word_at, ENTRY_BYTES) or pages.differs(place, count * table.bitmap_bytes)
