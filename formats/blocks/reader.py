"""The map of an image with one table of blocks."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.driver import BackingReference, Geometry, HostFile, OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, merge
from tapfs.formats.blocks.layout import BlockLayout, Run
from tapfs.formats.blocks.table import BlockTable
from tapfs.tables import ASK, Rule, TableLayout


class BlockReader:
    """An open image, read-only: the parts of a :class:`tapfs.driver.Driver` and of a :class:`tapfs.tables.Tabled`.

    `host_bytes` is the length of the file that blocks may lie in; a writer moves it as it allocates.
    """

    def __init__(
        self, file: HostFile, request: OpenRequest, layout: BlockLayout, backing: BackingReference | None = None
    ) -> None:
        self.file = file
        self.writable = request.writable
        #: Whether a block that the end of the file cuts is mapped.
        self._cut = request.cut
        #: Makes space for a check to work in.
        self.scratch = request.scratch
        self.layout = layout
        self.table = BlockTable(file, layout)
        self.host_bytes = file.size()
        self._geometry = Geometry(
            virtual_size=layout.virtual_size,
            granule=layout.block_bytes,
            map_unit=layout.unit_blocks * layout.block_bytes,
            backing=backing,
        )

    @property
    def geometry(self) -> Geometry:
        """The constants of the image."""
        return self._geometry

    def map(self, offset: int, length: int) -> list[Extent]:
        """The map of the whole blocks that the range touches; see :meth:`tapfs.driver.Driver.map`."""
        block = self.layout.block_bytes
        return list(merge(self._extents(offset // block, -(-(offset + length) // block))))

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The free blocks from that of `offset` on, found by comparisons of whole pages."""
        block = self.layout.block_bytes
        first = offset // block
        stop = self.table.free_until(first, -(-end // block))
        if stop == first:
            return None
        return Extent(offset, min(stop * block, end) - offset, Kind.UNALLOCATED)

    def table_layout(self) -> TableLayout | None:
        """The table, unless its entries may name places that no host file has."""
        layout = self.layout
        every_bit = (1 << 8 * layout.entry_bytes) - 1
        if layout.payload(every_bit) >= 1 << 63:
            return None
        rules = [Rule(every_bit, layout.free, Kind.UNALLOCATED)]
        if layout.zero is not None:
            rules.append(Rule(every_bit, layout.zero, Kind.ZERO))
        return TableLayout(
            entry_bytes=layout.entry_bytes,
            big_endian=layout.order == "big",
            host_size=self.host_size,
            rules=tuple(rules),
            place_mask=every_bit,
            place_multiplier=layout.scale,
            place_add=layout.origin + layout.payload_at,
            data_whole=True,
            least_place=layout.least_place + layout.payload_at,
            tables_reserved=True,
            # A slot overlaps a range if its block overlaps the range or what the slot begins with does.
            reserved=tuple((start, end + layout.payload_at) for start, end in layout.reserved),
        )

    def table_places(self, first: int, count: int) -> array[int]:
        """The places of the units' parts of the table; those that differ from the disk are left to `map`."""
        layout = self.layout
        unit = layout.unit_blocks
        start, stop = layout.entry_place(first * unit), layout.entry_place((first + count) * unit)
        places = array("Q", range(start, stop, unit * layout.entry_bytes))
        for index in range(count):
            if self.table.is_changed((first + index) * unit, (first + index + 1) * unit):
                places[index] = ASK
        return places

    @property
    def host_size(self) -> int:
        """The length of the file, with what has been allocated."""
        return self.host_bytes

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """The blocks ``[first, stop)`` as runs, all at possible places. Raises ImageError(corrupt)."""
        for start, entries in self.table.pieces(first, stop):
            for run in self.layout.runs(entries, start):
                self._require_possible(run)
                yield run

    def extents_of(self, run: Run) -> Iterator[Extent]:
        """A run as extents; `merge` joins those of neighbours."""
        layout = self.layout
        at, length = run.first * layout.block_bytes, run.blocks * layout.block_bytes
        if run.kind != Kind.DATA:
            yield Extent(at, length, run.kind)
        elif layout.contiguous:
            yield Extent(at, length, Kind.DATA, host_offset=layout.payload(run.entry), in_place=self.writable)
        else:
            for index in range(run.blocks):
                yield Extent(
                    at + index * layout.block_bytes,
                    layout.block_bytes,
                    Kind.DATA,
                    host_offset=layout.payload(run.entry + index * layout.step),
                    in_place=self.writable,
                )

    def _extents(self, first: int, stop: int) -> Iterator[Extent]:
        for run in self.runs(first, stop):
            yield from self.extents_of(run)

    def _require_possible(self, run: Run) -> None:
        wrong = self.layout.place_fault(run, self.host_bytes)
        if wrong is None and not self._cut:
            wrong = self.layout.cut_fault(run, self.host_bytes)
        if wrong is not None:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"entry {run.first} of the block table: {wrong}",
                path=self.file.path,
                offset=self.layout.entry_place(run.first),
                op="map",
            )
