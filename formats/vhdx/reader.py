"""Open and map a VHDX image whose log is empty."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.driver import BackingReference, Finding, Geometry, HostFile, OpenRequest, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, Range, merge
from tapfs.formats.changed_table import decode
from tapfs.formats.rounding import round_up
from tapfs.formats.vhdx.bitmaps import sector_runs
from tapfs.formats.vhdx.blocks import (
    ENTRY_BYTES,
    PLACE_MASK,
    STATE_MASK,
    ZEROS,
    BlockTable,
    State,
    bitmap_fault,
    block_fault,
)
from tapfs.formats.vhdx.header import Headers
from tapfs.formats.vhdx.locator import identity, parent_reference, parse_locator
from tapfs.formats.vhdx.metadata import read_metadata
from tapfs.formats.vhdx.pages import Pages
from tapfs.formats.vhdx.regions import read_regions
from tapfs.records import replace

#: The map unit of an image without parent, and the least one of an image over a parent, whose bitmaps are read whole.
#: A chunk is a multiple of either, so the entries of a unit follow one another.
_MAP_UNIT = 1 << 30
_LEAST_PARTIAL_UNIT = 32 << 20

#: Entries of the block table that one search for the end of a run of nothing looks at.
_RUN_ENTRIES = 1 << 17


class VhdxReader:
    """The map of an open image, and what every kind of driver needs of the image."""

    format_name = "vhdx"

    def __init__(self, file: HostFile, request: OpenRequest, headers: Headers) -> None:
        self.file = file
        self.writable = request.writable
        #: Whether a block that the end of the file cuts is mapped.
        self._cut = request.cut
        #: Makes space for a check to work in.
        self.scratch = request.scratch
        self.header = headers.current
        self.slot = headers.slot
        log = Range(self.header.log_offset, self.header.log_length)
        self.regions = read_regions(file, log)
        self.metadata = read_metadata(file, self.regions.metadata)
        if request.grown_size is not None:
            grown = round_up(request.grown_size, self.metadata.logical_sector)
            self.metadata = self.metadata._replace(size=grown)
        #: Damage that the opening went past.
        self.open_findings: list[Finding] = [*headers.findings, *self.regions.findings]
        self.table = BlockTable.of(self.metadata, self.regions.bat.offset)
        if self.table.place.length > self.regions.bat.length:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"the block table has room for {self.regions.bat.length} bytes, and the disk needs "
                f"{self.table.place.length}",
                path=file.path,
                offset=self.regions.bat.offset,
                op="open",
            )
        #: The places of metadata, ascending, neighbours joined; blocks lie outside of them.
        self.reserved = _joined([*self.regions.all, *([log] if log.length else [])])
        self.pages = Pages(file)
        self._file_end = file.size()
        self.locator_entries: dict[str, str] = {}
        self.backing = self._read_backing(lenient=request.lenient)
        has_parent, block_size = self.metadata.has_parent, self.metadata.block_size
        self._geometry = Geometry(
            virtual_size=self.metadata.size,
            granule=self.metadata.logical_sector if has_parent else block_size,
            map_unit=max(block_size, _LEAST_PARTIAL_UNIT) if has_parent else _MAP_UNIT,
            backing=self.backing,
            sector_size=self.metadata.logical_sector,
        )

    @property
    def geometry(self) -> Geometry:
        """The constants of the image."""
        return self._geometry

    @property
    def identities(self) -> frozenset[str]:
        """The GUID of the disk's contents, which an image over this one has written down."""
        return frozenset({identity(self.header.data_write)})

    @property
    def file_end(self) -> int:
        """The length of the file, with what has been allocated."""
        return self._file_end

    def add_reserved(self, place: Range) -> None:
        """A range of the file is metadata from now on."""
        self.reserved = _joined([*self.reserved, place])
        self.note_end(place.end)

    def block_table_moved(self, place: Range) -> None:
        """The block table is in another region from now on."""
        self.regions = self.regions._replace(bat=place)
        self.table = replace(self.table, host_offset=place.offset)
        self.add_reserved(place)

    def note_end(self, end: int) -> None:
        """Blocks may lie before `end` of the file from now on."""
        self._file_end = max(self._file_end, end)

    def map(self, offset: int, length: int) -> list[Extent]:
        """The map of the whole blocks that the range touches; see :meth:`tapfs.driver.Driver.map`."""
        table = self.table
        first = offset // table.block_size
        stop = min(table.blocks, -(-(offset + length) // table.block_size))
        extents = list(merge(self._extents(first, stop)))
        end = round_up(self.metadata.size, self._geometry.granule)
        # The bitmap of the last block goes on behind the end of the disk.
        while extents[-1].offset >= end:
            extents.pop()
        if extents[-1].end > end:
            extents[-1] = extents[-1]._replace(length=end - extents[-1].offset)
        return extents

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The blocks from that of `offset` on that are in one state which has no data."""
        block_size = self.table.block_size
        first, stop = offset // block_size, -(-end // block_size)
        block = self._hole_end(first, stop)
        stop = min(stop, block + _RUN_ENTRIES)
        kind = Kind.UNALLOCATED if block > first else None
        while block < stop:
            chunk_end = min(stop, (self.table.chunk_of(block) + 1) * self.table.chunk_blocks)
            entries = self.entries(block, chunk_end)
            # Most runs are of one and the same entry.
            if entries.count(entries[0]) == len(entries):
                entries = entries[:1]
            for entry in entries:
                found = _kind_of_nothing(entry)
                if found is None or kind not in {None, found}:
                    stop = chunk_end = block
                    break
                kind = found
                block += 1
            block = chunk_end
        if kind is None:
            return None
        return Extent(offset, min(stop * block_size, end) - offset, kind)

    def _hole_end(self, first: int, stop: int) -> int:
        """The end of the blocks from `first` on whose entries are in a hole of the host file, and so zero."""
        table = self.table
        at, end = table.entry_offset(table.index(first)), table.entry_offset(table.index(stop - 1) + 1)
        data_at, _ = next(self.file.data_ranges(at, end - at), (end, 0))
        if self.pages.differs(at, end - at):
            return first
        index = (data_at - table.host_offset) // ENTRY_BYTES
        return min(stop, index - index // (table.chunk_blocks + 1)) if data_at > at else first

    def chunks(self) -> Iterator[tuple[int, array[int]]]:
        """The first block and the entries of each chunk that may have an entry which is not zero on the disk."""
        table = self.table
        chunk, chunks = 0, table.chunk_of(table.blocks - 1) + 1
        chunk_bytes = (table.chunk_blocks + 1) * ENTRY_BYTES
        for start, length in self.file.data_ranges(*table.place):
            chunk = max(chunk, (start - table.host_offset) // chunk_bytes)
            while chunk < min(chunks, -(-(start + length - table.host_offset) // chunk_bytes)):
                first = chunk * table.chunk_blocks
                yield first, self.entries(first, min(first + table.chunk_blocks, table.blocks))
                chunk += 1

    def entry(self, block: int) -> int:
        """The entry of a block."""
        return self.pages.word(self.table.entry_offset(self.table.index(block)))

    def entries(self, first: int, stop: int) -> array[int]:
        """The entries of the blocks ``[first, stop)`` of one chunk."""
        raw = self.pages.read(self.table.entry_offset(self.table.index(first)), (stop - first) * ENTRY_BYTES)
        return decode(raw, "Q", "little")

    def require_possible(self, block: int, entry: int) -> None:
        """Raise ImageError(corrupt) if the entry of a block cannot be true."""
        wrong = block_fault(block, entry, self.table, self.reserved, self.file_end, cut=self._cut)
        if wrong is not None:
            raise self._corrupt(f"block {block}: {wrong}", self.table.index(block))

    def bitmap_place(self, block: int) -> int:
        """The host offset of the part of a sector bitmap that a block in state PARTIAL has.

        Raises ImageError(corrupt) if there is none.
        """
        index = self.table.bitmap_index(self.table.chunk_of(block))
        entry = self.pages.word(self.table.entry_offset(index))
        needed = self.table.bitmap_offset(block) + self.table.bitmap_bytes
        wrong = bitmap_fault(entry, self.reserved, self.file_end, needed)
        if wrong is not None:
            raise self._corrupt(f"the sector bitmap of block {block}: {wrong}", index)
        return (entry & PLACE_MASK) + self.table.bitmap_offset(block)

    def _corrupt(self, message: str, index: int) -> ImageError:
        at = self.table.entry_offset(index)
        return ImageError(ErrorKind.CORRUPT, message, path=self.file.path, offset=at, op="map")

    def _extents(self, first: int, stop: int) -> Iterator[Extent]:
        table = self.table
        while first < stop:
            chunk_end = min(stop, (table.chunk_of(first) + 1) * table.chunk_blocks)
            for block, entry in enumerate(self.entries(first, chunk_end), first):
                yield from self._block_extents(block, entry)
            first = chunk_end

    def _block_extents(self, block: int, entry: int) -> Iterator[Extent]:
        size = self.table.block_size
        nothing = _kind_of_nothing(entry)
        if nothing is not None:
            yield Extent(block * size, size, nothing)
            return
        self.require_possible(block, entry)
        place = entry & PLACE_MASK
        if entry & STATE_MASK == State.PRESENT:
            yield Extent(block * size, size, Kind.DATA, host_offset=place, in_place=self.writable)
            return
        sector = self.metadata.logical_sector
        bitmap = self.pages.read(self.bitmap_place(block), self.table.bitmap_bytes)
        stop = min(size, self.metadata.size - block * size) // sector
        for run in sector_runs(bitmap, 0, stop):
            at, length = block * size + run.first * sector, (run.stop - run.first) * sector
            if run.present:
                host_offset = place + run.first * sector
                yield Extent(at, length, Kind.DATA, host_offset=host_offset, in_place=self.writable)
            else:
                yield Extent(at, length, Kind.UNALLOCATED)

    def _read_backing(self, *, lenient: bool) -> BackingReference | None:
        metadata = self.metadata
        if not metadata.has_parent:
            return None
        place = metadata.locator
        try:
            if place is None:
                raise ValueError("the image has a parent, and no parent locator")
            self.locator_entries = parse_locator(self.file.read(place.offset, place.length))
            reference = parent_reference(self.locator_entries)
            if reference is None:
                raise ValueError("the parent locator has no name that can be used")
        except ValueError as error:
            at = self.regions.metadata.offset if place is None else place.offset
            if lenient:
                self.open_findings.append(Finding(Severity.CORRUPTION, str(error), at))
                return None
            raise ImageError(
                ErrorKind.CORRUPT,
                str(error),
                path=self.file.path,
                offset=at,
                op="open",
                remedy="name the parent with {backing=FILE}",
            ) from error
        return reference


def _kind_of_nothing(entry: int) -> Kind | None:
    """The kind of extent of a block without data, None for every other block."""
    state = entry & STATE_MASK
    if state == State.NOT_PRESENT:
        return Kind.UNALLOCATED
    return Kind.ZERO if state in ZEROS else None


def _joined(places: list[Range]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for place in sorted(places):
        if joined and place.offset <= joined[-1].end:
            joined[-1] = Range(joined[-1].offset, max(joined[-1].end, place.end) - joined[-1].offset)
        else:
            joined.append(place)
    return tuple(joined)
