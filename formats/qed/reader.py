"""Open and map a QED image: an L1 table in memory, and L2 tables that are read by pieces."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

from tapfs.driver import BackingReference, Geometry, HostFile, OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, merge
from tapfs.formats.changed_table import decode
from tapfs.formats.qed.header import ENTRY_LENGTH, LENGTH, Header, parse_header
from tapfs.tables import ABSENT, ASK, Rule, TableLayout

FREE: Final = 0
ZERO: Final = 1

#: Bytes of a table that are read together: those of a map unit.
PIECE_BYTES = 4096
PIECE_ENTRIES = PIECE_BYTES // ENTRY_LENGTH
_MAX_MAP_UNIT = 1 << 30

_EVERY_BIT = (1 << 64) - 1


class QedReader:
    """An open image, read-only: its metadata, its map, and what the engine needs to read the tables itself."""

    format_name = "qed"

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        self.file = file
        #: Whether clusters that the end of the file cuts are mapped.
        self._cut = request.cut
        #: Makes space for a check to work in.
        self.scratch = request.scratch
        self.header: Header = parse_header(file.read(0, LENGTH), file)
        self.l1: array[int] = decode(file.read(self.header.l1_offset, self.header.tables * ENTRY_LENGTH), "Q", "little")
        self.file_size = file.size()
        cluster = self.header.cluster_size
        self.unit_entries = min(PIECE_ENTRIES, _MAX_MAP_UNIT // cluster)
        self.geometry = Geometry(
            virtual_size=self.header.image_size,
            granule=cluster,
            map_unit=self.unit_entries * cluster,
            backing=self._backing(),
        )

    def map(self, offset: int, length: int) -> list[Extent]:
        """The map of the whole clusters that the range touches; see :meth:`tapfs.driver.Driver.map`."""
        unit, cluster = self.geometry.map_unit, self.header.cluster_size
        touched = range(offset // cluster, -(-(offset + length) // cluster))
        units = range(offset // unit, -(-(offset + length) // unit))
        return list(merge(extent for index in units for extent in self._unit_extents(index, touched)))

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The tables from that of `offset` on that are not there."""
        span = self.header.table_span
        index = first = offset // span
        stop = -(-end // span)
        while index < stop and self.l1[index] == FREE:
            index += 1
        return None if index == first else Extent(offset, min(index * span, end) - offset, Kind.UNALLOCATED)

    def table_layout(self) -> TableLayout:
        """The L2 tables."""
        header = self.header
        return TableLayout(
            entry_bytes=ENTRY_LENGTH,
            big_endian=False,
            host_size=self.host_size,
            rules=(Rule(_EVERY_BIT, FREE, Kind.UNALLOCATED), Rule(_EVERY_BIT, ZERO, Kind.ZERO)),
            place_mask=_EVERY_BIT >> 1,
            zero_mask=1 << 63,
            place_alignment=header.cluster_size,
            data_whole=True,
            least_place=header.header_end,
            reserved=((header.l1_offset, header.l1_offset + header.table_bytes),),
        )

    def table_places(self, first: int, count: int) -> array[int]:
        """The places of the pieces of L2 tables; a table at an impossible place is left to `map`."""
        per_table = self.header.table_entries // self.unit_entries
        unit_bytes = self.unit_entries * ENTRY_LENGTH
        places = array("Q")
        for unit in range(first, first + count):
            index, piece = divmod(unit, per_table)
            table = self.l1[index]
            if table == FREE:
                places.append(ABSENT)
            else:
                places.append(ASK if self.table_fault(table) else table + piece * unit_bytes)
        return places

    @property
    def host_size(self) -> int:
        """The length of the file."""
        return self.file_size

    def table_fault(self, place: int) -> str | None:
        """A sentence that says why a table cannot lie at `place`, or None."""
        length = self.header.table_bytes
        return self.place_fault(place, length) or self.cut_fault(place, length)

    def place_fault(self, place: int, length: int) -> str | None:
        """A sentence that says why `length` bytes cannot lie at `place`, or None; see `cut_fault`, too."""
        header = self.header
        if place % header.cluster_size:
            return f"{place:#x} is not aligned to a cluster"
        if place >= self.file_size:
            return f"{place:#x} past the end of the file ({self.file_size:#x})"
        l1_end = header.l1_offset + header.table_bytes
        if place < header.header_end or (place < l1_end and header.l1_offset < place + length):
            return f"{place:#x} inside the header or the L1 table"
        return None

    def cut_fault(self, place: int, present: int) -> str | None:
        """How the file was cut in `present` bytes at `place`, or None."""
        missing = place + present - self.file_size
        return f"the file was cut: it ends {missing} bytes before what lies at {place:#x} does" if missing > 0 else None

    def cluster_fault(self, place: int, index: int) -> str | None:
        """A sentence that says why cluster `index` of the disk cannot lie at `place`, or None.

        What the disk has of it must be in the file: all of it, but for the last cluster of the disk.
        """
        wrong = self.place_fault(place, self.header.cluster_size)
        return wrong or (None if self._cut else self.cut_fault(place, self.needed(index)))

    def needed(self, index: int) -> int:
        """The bytes that the disk has of cluster `index`."""
        cluster = self.header.cluster_size
        return max(0, min(cluster, self.header.image_size - index * cluster))

    def piece(self, table: int, first: int, count: int) -> array[int]:
        """Entries of the L2 table at `table`, which lies in the file."""
        return decode(self.file.read(table + first * ENTRY_LENGTH, count * ENTRY_LENGTH), "Q", "little")

    def corrupt(self, message: str, offset: int) -> ImageError:
        """The error for an entry at a host offset that cannot be true."""
        return ImageError(ErrorKind.CORRUPT, message, path=self.file.path, offset=offset, op="map")

    def _unit_extents(self, unit: int, touched: range) -> Iterator[Extent]:
        header = self.header
        cluster = header.cluster_size
        start = unit * self.geometry.map_unit
        count = min(self.unit_entries, -(-(header.image_size - start) // cluster))
        index, first = divmod(unit * self.unit_entries, header.table_entries)
        table = self.l1[index]
        if table == FREE:
            yield Extent(start, count * cluster, Kind.UNALLOCATED)
            return
        wrong = self.table_fault(table)
        if wrong is not None:
            raise self.corrupt(f"L1 entry {index}: {wrong}", header.l1_offset + index * ENTRY_LENGTH)
        base = unit * self.unit_entries
        skip, count = max(touched.start - base, 0), min(touched.stop - base, count)
        for at, entry in enumerate(self.piece(table, first + skip, count - skip), skip):
            if entry in {FREE, ZERO}:
                yield Extent(start + at * cluster, cluster, Kind.ZERO if entry == ZERO else Kind.UNALLOCATED)
                continue
            wrong = self.cluster_fault(entry, base + at)
            if wrong is not None:
                message = f"L2 entry {first + at} of table {index}: {wrong}"
                raise self.corrupt(message, table + (first + at) * ENTRY_LENGTH)
            yield Extent(start + at * cluster, cluster, Kind.DATA, host_offset=entry)

    def _backing(self) -> BackingReference | None:
        header = self.header
        if not header.has_backing:
            return None
        raw = self.file.read(header.name_offset, header.name_length)
        name = raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        return BackingReference(name, "raw" if header.backing_is_raw else None) if name else None
