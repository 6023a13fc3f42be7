"""The parts of a disk: each maps a range of the disk to a host file, to zeros, or to nothing that may be read.

A descriptor calls a part an extent. Here an extent is what a map is made of (`tapfs.extent`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Protocol

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.formats.vmdk.grain_runs import EntryRules, Run, runs
from tapfs.records import dataclass


class Part(Protocol):
    """A range ``[offset, end)`` of the disk, in bytes. `writable`: a guest may write it."""

    @property
    def offset(self) -> int:
        """The first byte."""
        ...

    @property
    def length(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def writable(self) -> bool:
        """Whether it may be written."""
        ...

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """The map of at least ``[start, end)`` of the disk, ascending; the end of a last grain may lie behind the part.

        Raises ImageError(corrupt, denied).
        """
        ...

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """See `tapfs.driver.Sparse.empty_run`; `end` is not behind the part."""
        ...


@dataclass(frozen=True, slots=True)
class FlatPart:
    """Bytes of host file `number` from `host_offset` on, as they stand there."""

    offset: int
    length: int
    number: int
    file: HostFile
    host_offset: int
    writable: bool

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """One run of data. Holes of the host file count as data: they may be filled behind the map's back."""
        place = self.host_offset + start - self.offset
        yield Extent(start, end - start, Kind.DATA, self.number, place, in_place=self.writable)

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The hole of the host file at `offset`."""
        place = self.host_offset + offset - self.offset
        # What lies behind the end of a file that was cut is lost and no hole.
        stop = min(place + end - offset, self.file.size())
        start, _ = next(self.file.data_ranges(place, max(0, stop - place)), (stop, 0))
        if start <= place:
            return None
        return Extent(offset, start - place, Kind.ZERO, self.number, place, in_place=self.writable)


@dataclass(frozen=True, slots=True)
class ZeroPart:
    """A part that reads as zeros and has no host file."""

    offset: int
    length: int
    writable: bool = False

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """Zeros."""
        yield Extent(start, end - start, Kind.ZERO)

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """Zeros up to the end."""
        return Extent(offset, end - offset, Kind.ZERO)


@dataclass(frozen=True, slots=True)
class ClosedPart:
    """A part that nobody may read (NOACCESS); `path` and `at` are where the descriptor says so."""

    offset: int
    length: int
    name: str
    path: str
    at: int
    writable: bool = False

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """Raise ImageError(denied)."""
        del start, end
        what = f"of the file {self.name}" if self.name else "without a file"
        raise ImageError(
            ErrorKind.DENIED,
            f"bytes {self.offset} to {self.offset + self.length} of the disk may not be read: the descriptor has an"
            f" extent {what} there whose access is NOACCESS",
            path=self.path,
            offset=self.at,
            op="map",
            remedy="change NOACCESS to RDONLY in the descriptor if it may",
        )

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """Only the map can tell."""
        del offset, end
        return None


class PartTables(Protocol):
    """The grain tables behind a sparse part, whatever they look like on the host."""

    @property
    def grain(self) -> int:
        """Bytes of a grain."""
        ...

    @property
    def table_entries(self) -> int:
        """Entries of a table."""
        ...

    @property
    def rules(self) -> EntryRules:
        """The rules by which an entry is read."""
        ...

    def next_used(self, index: int, stop: int) -> int:
        """The first table from `index` on, below `stop`, that is there; else `stop`."""
        ...

    def load(self, index: int) -> array[int] | None:
        """The entries of a table, None where there is none."""
        ...

    def require_possible(self, index: int, run: Run) -> None:
        """Raise ImageError(corrupt) for a run that has no possible place."""
        ...

    def payload_bound(self, place: int, header_bytes: int) -> int:
        """The most bytes that the packed grain at a place can have."""
        ...


@dataclass(frozen=True, slots=True)
class SparsePart:
    """Grains of host file `number`, found through tables. A packed one has a header of `header_bytes`."""

    offset: int
    length: int
    number: int
    tables: PartTables
    writable: bool
    header_bytes: int = 0

    @property
    def span(self) -> int:
        """Bytes of the disk that one table maps."""
        return self.tables.grain * self.tables.table_entries

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """The grains that the range touches."""
        grain, entries = self.tables.grain, self.tables.table_entries
        at, last = (start - self.offset) // grain, -(-(end - self.offset) // grain)
        while at < last:
            index, first = divmod(at, entries)
            used = self.tables.next_used(index, -(-last // entries))
            table = self.tables.load(index) if used == index else None
            if table is None:
                stop = min(last, max(used, index + 1) * entries)
                yield Extent(self.offset + at * grain, (stop - at) * grain, Kind.UNALLOCATED)
            else:
                stop = min(last, (index + 1) * entries)
                for run in runs(table, self.tables.rules, first, first + stop - at):
                    yield self._extent(index, run)
            at = stop

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The tables from that of `offset` on which are not there."""
        index = (offset - self.offset) // self.span
        used = self.tables.next_used(index, -(-(end - self.offset) // self.span))
        if used == index:
            return None
        return Extent(offset, min(self.offset + used * self.span, end) - offset, Kind.UNALLOCATED)

    def _extent(self, index: int, run: Run) -> Extent:
        self.tables.require_possible(index, run)
        grain = self.tables.grain
        offset = self.offset + (index * self.tables.table_entries + run.first) * grain
        if run.kind == Kind.COMPRESSED:
            length = self.tables.payload_bound(run.host_offset, self.header_bytes)
            return Extent(offset, grain, run.kind, self.number, run.host_offset, length)
        if run.kind != Kind.DATA:
            return Extent(offset, run.grains * grain, run.kind)
        in_place = self.writable
        return Extent(offset, run.grains * grain, run.kind, self.number, run.host_offset, in_place=in_place)
