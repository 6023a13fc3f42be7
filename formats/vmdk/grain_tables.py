"""The grain directory and the grain tables of one sparse extent whose entries are sectors in 32 bits.

These are the hosted sparse extents (docs/specs/vmdk.md, "Sparse extent header (KDMV), 512 bytes") and those of ESX
(`cowd_header`). A hosted one may have all its tables twice. The primary tables are read. Where a primary entry or table
cannot be true and its redundant twin can, the twin is read in its place, as long as nobody writes.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind
from tapfs.formats.changed_table import ChangedTable
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk.grain_runs import NO_GRAIN, ZERO_GRAIN, EntryRules, Run, packed_bound, runs
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.records import NamedTuple
from tapfs.tables import ASK, Rule, TableLayout

#: Bytes of tables that are kept, of each extent.
CACHE_BYTES = 1 << 20

ENTRY_BYTES = 4
_ALL_BITS = (1 << 32) - 1

_REPAIR = "run tapfs repair"


class GrainLayout(NamedTuple):
    """Where the tables of an extent are and how they are read, in bytes.

    `redundant_at` is 0 where there is one directory. `metadata` are the ranges ``(start, end)`` of the host file, the
    header first, in which no grain and no table can lie.
    """

    grain: int
    table_entries: int
    directory_at: int
    directory_entries: int
    rules: EntryRules
    metadata: tuple[tuple[int, int], ...]
    redundant_at: int = 0

    @property
    def span(self) -> int:
        """Bytes of the disk that one table maps."""
        return self.grain * self.table_entries

    @property
    def table_bytes(self) -> int:
        """Bytes of a table on the host."""
        return round_up(self.table_entries * ENTRY_BYTES, SECTOR)

    @property
    def directory_bytes(self) -> int:
        """Bytes of a directory on the host, without the rest of its last sector."""
        return self.directory_entries * ENTRY_BYTES


class GrainTables:
    """The tables of one extent, by directory index, in the host file `file`; a bounded number of them is kept.

    `file_size` bounds what may be pointed at; a writer moves it as it allocates. The disk uses `disk_bytes` of the
    extent: of its last grain no more must be in the file. `strict`: damage of the primary tables is an error even where
    the redundant ones are good, because a writer must not add to it.
    """

    def __init__(self, file: HostFile, layout: GrainLayout, *, strict: bool = False, unclean: bool = False) -> None:
        self.file = file
        self.layout = layout
        self.file_size = file.size()
        self.disk_bytes = layout.directory_entries * layout.span
        self._strict = strict
        #: Whether the extent was not closed when it was written last.
        self.unclean = unclean
        #: Whether grains that the end of the file cuts are mapped.
        self.cut = False
        #: The faults of directories that could not be read, each with its place.
        self.directory_faults: list[tuple[str, int]] = []
        self.directory = self._read_directory(layout.directory_at, "grain directory")
        self.redundant: array[int] | None = None
        if layout.redundant_at:
            self.redundant = self._read_directory(layout.redundant_at, "redundant grain directory")
        # With neither of two directories each grain would read as not there.
        lost = len(self.directory_faults) == (2 if layout.redundant_at else 1)
        for message, place in self.directory_faults:
            if strict or lost:
                raise self.corrupt(message, place, remedy=None if lost else _REPAIR)
        self._kept: OrderedDict[int, array[int]] = OrderedDict()
        #: Tables that differ from the disk, of a writer.
        self.changed: dict[int, ChangedTable] = {}
        #: Directory indexes whose redundant table was read in place of a damaged primary one.
        self.replaced: set[int] = set()

    @property
    def grain(self) -> int:
        """Bytes of a grain."""
        return self.layout.grain

    @property
    def table_entries(self) -> int:
        """Entries of a table."""
        return self.layout.table_entries

    @property
    def rules(self) -> EntryRules:
        """The rules by which an entry is read."""
        return self.layout.rules

    def next_used(self, index: int, stop: int) -> int:
        """The first index from `index` on, below `stop`, that has a table in a directory; else `stop`."""
        found = _next_nonzero(self.directory, index, stop)
        return found if self.redundant is None else _next_nonzero(self.redundant, index, found)

    def load(self, index: int) -> array[int] | None:
        """The entries of the table of directory entry `index`, None where there is none; not to be changed.

        Raises ImageError(corrupt) with the place of the field that cannot be true.
        """
        changed = self.changed.get(index)
        if changed is not None:
            return changed.entries
        kept = self._kept.get(index)
        if kept is not None:
            self._kept.move_to_end(index)
            return kept
        found = self._read(index)
        if found is not None:
            self._keep(index, found)
        return found

    def table_at(self, index: int, *, redundant: bool = False) -> int:
        """The host offset of a table as its directory has it; 0 where it has none."""
        directory = self.redundant if redundant else self.directory
        return 0 if directory is None else directory[index] * SECTOR

    def table_layout(self, number: int, header_bytes: int) -> TableLayout:
        """The tables for the engine: in host file `number`, packed grains with a header of `header_bytes`."""
        layout = self.layout
        rules = [Rule(_ALL_BITS, NO_GRAIN, Kind.UNALLOCATED)]
        if layout.rules.zeroed:
            rules.append(Rule(_ALL_BITS, ZERO_GRAIN, Kind.ZERO))
        if layout.rules.packed:
            rules.append(Rule(0, 0, Kind.COMPRESSED))
        shift = SECTOR.bit_length() - 1
        return TableLayout(
            entry_bytes=ENTRY_BYTES,
            big_endian=False,
            host_size=self.file_size,
            rules=tuple(rules),
            place_mask=_ALL_BITS,
            place_shift=shift,
            place_alignment=SECTOR,
            data_whole=True,
            packed_place_mask=_ALL_BITS if layout.rules.packed else 0,
            packed_place_shift=shift,
            packed_bound=header_bytes + packed_bound(layout.grain) if layout.rules.packed else 0,
            table_alignment=SECTOR,
            least_place=layout.metadata[0][1],
            reserved=layout.metadata[1:],
            table_file=number,
            data_file=number,
        )

    def places(self, first: int, count: int) -> array[int]:
        """The places of the tables for the engine, as `tapfs.tables.Tabled.table_places`."""
        places = array("Q", [entry * SECTOR for entry in self.directory[first : first + count]])
        if self.redundant is not None:
            for at, entry in enumerate(self.redundant[first : first + count]):
                if entry and not places[at]:
                    places[at] = ASK
        for index in self._changed_between(first, first + count):
            places[index - first] = ASK
        return places

    def table_fault(self, place: int) -> str | None:
        """What makes the place of a table impossible, or None."""
        end = place + self.layout.table_bytes
        if end > self.file_size:
            return f"grain table [{place:#x}, {end:#x}) past the end of the file ({self.file_size:#x})"
        return self._overlap(place, end, f"grain table at {place:#x}")

    def grain_fault(self, index: int, run: Run) -> str | None:
        """What makes the place of a run of table `index` impossible, or None."""
        if run.kind not in (Kind.DATA, Kind.COMPRESSED):
            return None
        place, grain = run.host_offset, self.layout.grain
        last = place + (run.grains - 1) * grain
        what = f"grain at {place:#x}" if run.grains == 1 else f"grains {place:#x} to {last:#x}"
        if last >= self.file_size:
            return f"{what} past the end of the file ({self.file_size:#x})"
        overlap = self._overlap(place, last + (1 if run.kind == Kind.COMPRESSED else grain), what)
        return overlap or (None if self.cut else self.cut_fault(index, run))

    def cut_fault(self, index: int, run: Run) -> str | None:
        """How the file was cut in a run of table `index`, or None.

        What the disk has of a grain must be in the file: all of it, but for the last grain of the disk.
        """
        if run.kind != Kind.DATA:
            return None
        grain, last = self.layout.grain, run.first + run.grains - 1
        needed = min(grain, self.disk_bytes - (index * self.layout.table_entries + last) * grain)
        place = run.host_offset + (run.grains - 1) * grain
        missing = place + needed - self.file_size
        return f"the file was cut: it ends {missing} bytes before the grain at {place:#x} does" if missing > 0 else None

    def require_possible(self, index: int, run: Run) -> None:
        """Raise ImageError(corrupt) if a run of table `index` has no possible place."""
        wrong = self.grain_fault(index, run)
        if wrong is not None:
            place = self.table_at(index, redundant=index in self.replaced)
            raise self.corrupt(f"entry {run.first} of grain table {index}: {wrong}", place + ENTRY_BYTES * run.first)

    def payload_bound(self, place: int, header_bytes: int) -> int:
        """The most bytes that the packed grain at `place` can have, its header included."""
        return min(header_bytes + packed_bound(self.layout.grain), self.file_size - place)

    def first_fault(self, index: int, table: array[int]) -> tuple[Run, str] | None:
        """The first run of a table `index` whose place is impossible, and what is wrong with it."""
        for run in runs(table, self.layout.rules):
            wrong = self.grain_fault(index, run)
            if wrong is not None:
                return run, wrong
        return None

    def prefers_twin(self, index: int, primary: array[int] | None, twin: array[int] | None) -> bool:
        """Whether the redundant table `index` counts: the primary is blank, lacks entries, or cannot be true."""
        if primary is None or twin is None:
            return primary is None
        if primary == twin or self.first_fault(index, twin) is not None:
            return False
        return not any(primary) or self.has_lost_entries(primary, twin) or self.first_fault(index, primary) is not None

    def has_lost_entries(self, primary: array[int], twin: array[int]) -> bool:
        """Whether the primary table is its twin with zeros in places, in an extent that was closed.

        No writer leaves such an extent: a sector of the table was lost. A crash leaves such tables in an extent that is
        open, and there nobody can say which of the two is the newer one.
        """
        if self.unclean or primary == twin:
            return False
        return all(own in (other, NO_GRAIN) for own, other in zip(primary, twin, strict=True))

    def read_table(self, place: int) -> array[int]:
        """The entries of a table as they stand on disk, whatever they are."""
        length = self.layout.table_entries * ENTRY_BYTES
        return decoded(self.file.read(place, length).ljust(length, b"\0"))

    def change(self, index: int) -> ChangedTable:
        """The table of directory entry `index`, which must have one, to be changed."""
        changed = self.changed.get(index)
        if changed is None:
            entries = self.load(index)
            if entries is None:
                raise AssertionError(f"directory entry {index} has no table")
            self._kept.pop(index, None)
            changed = self.changed[index] = ChangedTable(entries, "little")
        return changed

    def enter(self, index: int, place: int) -> ChangedTable:
        """An empty table for a directory entry that was 0; it will stand at the host offset `place`."""
        self.directory[index] = place // SECTOR
        changed = self.changed[index] = ChangedTable(array("I", bytes(self.layout.table_bytes)), "little")
        changed.mark(0, len(changed.entries))
        return changed

    def plan_done(self) -> None:
        """The changes of the last plan are durable: what has not changed since is as on the disk."""
        for index, changed in list(self.changed.items()):
            changed.plan_done()
            if not changed.pending:
                del self.changed[index]
                self._keep(index, changed.entries)

    def corrupt(self, message: str, offset: int, *, remedy: str | None = None) -> ImageError:
        """The error for a field of this extent that cannot be true."""
        return ImageError(ErrorKind.CORRUPT, message, path=self.file.path, offset=offset, op="map", remedy=remedy)

    def _keep(self, index: int, table: array[int]) -> None:
        while self._kept and len(self._kept) * self.layout.table_bytes >= CACHE_BYTES:
            self._kept.popitem(last=False)
        self._kept[index] = table

    def _changed_between(self, first: int, stop: int) -> list[int]:
        if stop - first < len(self.changed):
            return [index for index in range(first, stop) if index in self.changed]
        return [index for index in self.changed if first <= index < stop]

    def _read(self, index: int) -> array[int] | None:
        place, twin = self.table_at(index), self.table_at(index, redundant=True)
        if place == 0 and twin == 0:
            return None
        wrong, at = self._primary_fault(index, place)
        if wrong is None:
            table = self.read_table(place)
            found = self.first_fault(index, table)
            if found is None:
                return table
            run, reason = found
            at = place + ENTRY_BYTES * run.first
            wrong = f"entry {run.first} of grain table {index}: {reason}"
            if twin == 0:
                # The map says which grain is wrong, and a check goes on with the others.
                return table
        if twin and self.table_fault(twin) is None:
            table = self.read_table(twin)
            if self.first_fault(index, table) is None:
                if self._strict:
                    message = f"{wrong}; the redundant tables are good"
                    raise self.corrupt(message, at, remedy=_REPAIR)
                self.replaced.add(index)
                return table
        if place and self.table_fault(place) is None:
            return self.read_table(place)
        raise self.corrupt(wrong, at)

    def _primary_fault(self, index: int, place: int) -> tuple[str | None, int]:
        at = self.layout.directory_at + ENTRY_BYTES * index
        if place == 0:
            return f"directory entry {index}: it is 0, and that of the redundant directory is not", at
        wrong = self.table_fault(place)
        return None if wrong is None else f"directory entry {index}: {wrong}", at

    def _overlap(self, start: int, end: int, what: str) -> str | None:
        for number, (first, stop) in enumerate(self.layout.metadata):
            if start < stop and first < end:
                return f"{what} inside the {'header' if number == 0 else 'grain directory or the descriptor'}"
        return None

    def _read_directory(self, place: int, what: str) -> array[int]:
        layout = self.layout
        end = place + layout.directory_bytes
        wrong: str | None = None
        if end > self.file_size:
            wrong = f"the {what} [{place:#x}, {end:#x}) lies past the end of the file ({self.file_size:#x})"
        elif place < layout.metadata[0][1] and layout.directory_bytes:
            wrong = f"the {what} at {place:#x} lies inside the header"
        if wrong is None:
            return decoded(self.file.read(place, layout.directory_bytes).ljust(layout.directory_bytes, b"\0"))
        self.directory_faults.append((wrong, place))
        return array("I", bytes(layout.directory_bytes))


def decoded(raw: bytes) -> array[int]:
    """Entries as they stand on disk, little-endian, as numbers."""
    table = array("I", raw)
    if sys.byteorder == "big":
        table.byteswap()
    return table


def _next_nonzero(directory: array[int], index: int, stop: int) -> int:
    """The first index in ``[index, stop)`` whose entry is not zero; else `stop`."""
    step = 1 << 14
    while index < stop:
        piece = directory[index : min(index + step, stop)]
        if any(piece):
            return index + next(at for at, entry in enumerate(piece) if entry)
        index += len(piece)
    return stop
