"""Check a VMDK: compare the claims of its metadata with each other, with their copies and with the host files.

All metadata is read. Memory stays bounded whatever the image says (see :mod:`tapfs.formats.claims`). Tables that are
there twice may differ after a crash, because both copies are true then. In an extent that was closed well they may not.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.driver import CheckReport, ProgressCallback, Severity
from tapfs.errors import ImageError
from tapfs.extent import Kind
from tapfs.formats.claims import Claim, gaps
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk import cowd_header
from tapfs.formats.vmdk.check_finding import Claimant as Who
from tapfs.formats.vmdk.check_finding import Leaks, described
from tapfs.formats.vmdk.grain_runs import Run, runs
from tapfs.formats.vmdk.grain_tables import ENTRY_BYTES, GrainTables
from tapfs.formats.vmdk.host_extents import CowdExtent, HostedExtent, HostExtent, SeSparseExtent
from tapfs.formats.vmdk.markers import GRAIN_HEADER
from tapfs.formats.vmdk.parts import FlatPart
from tapfs.formats.vmdk.reader import VmdkReader
from tapfs.formats.vmdk.sectors import SECTOR

_PROGRESS_TABLES = 256


class Check:
    """One check of one disk. `report` has the result, `leaks` the ranges of each host file that nothing refers to.

    `unmended` counts, for each host file, the corruptions that no copy of a table can mend. `ends` has the ends of the
    last grains.
    """

    def __init__(self, image: VmdkReader, progress: ProgressCallback | None = None) -> None:
        self._image = image
        self._progress = progress
        self.report = CheckReport()
        self.leaks: dict[int, list[tuple[int, int]]] = {}
        self.unmended: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        for finding in image.disk.findings:
            self.report.add(*finding)
        self.report.allocated_bytes = sum(part.length for part in image.parts if isinstance(part, FlatPart))
        for extent in image.disk.sparse:
            if isinstance(extent, SeSparseExtent):
                _ExtentOfEsxi(extent, self.report).check(image)
                continue
            found = _ExtentCheck(extent, self.report, image, progress)
            found.check()
            self.leaks[extent.number] = found.leaks.ranges
            self.unmended[extent.number] = found.unmended
            self.ends[extent.number] = found.end


class _Said:
    """Adds findings of one extent; those of other files than the image itself begin with the file's name."""

    def __init__(self, extent: HostExtent, report: CheckReport) -> None:
        self._prefix = "" if extent.number == 0 else f"{extent.file.path}: "
        self._report = report

    def __call__(self, severity: Severity, message: str, host_offset: int | None = None) -> None:
        self._report.add(severity, self._prefix + message, host_offset)


class _ExtentOfEsxi:
    """The check of a seSparse extent: every entry is possible, and no grain belongs to two of them."""

    def __init__(self, extent: SeSparseExtent, report: CheckReport) -> None:
        self._extent = extent
        self._report = report
        self._say = _Said(extent, report)

    def check(self, image: VmdkReader) -> None:
        """Read all tables."""
        for _ in gaps(self._claims(), 0, self._overlap, image.scratch):
            pass

    def _claims(self) -> Iterator[Claim]:
        tables = self._extent.tables
        stop = self._extent.header.directory_entries
        index = tables.next_used(0, stop)
        while index < stop:
            try:
                table = tables.load(index) or array("Q")
                for run in runs(table, tables.rules):
                    if run.kind == Kind.DATA:
                        yield from self._grain_claims(index, run)
            except ImageError as error:
                self._say(Severity.CORRUPTION, error.message, error.offset)
            index = tables.next_used(index + 1, stop)

    def _grain_claims(self, index: int, run: Run) -> Iterator[Claim]:
        tables = self._extent.tables
        try:
            tables.require_possible(index, run)
        except ImageError as error:
            if run.grains == 1:
                self._say(Severity.CORRUPTION, error.message, error.offset)
                return
            for one in run.each(tables.grain):
                yield from self._grain_claims(index, one)
            return
        self._report.allocated_bytes += run.grains * tables.grain
        yield Claim(run.host_offset, run.grains * tables.grain, Who.GRAIN, index, run.first)

    def _overlap(self, earlier: Claim, later: Claim) -> None:
        self._say(Severity.CORRUPTION, f"{described(later)} overlap {described(earlier)}", later.start)


class _ExtentCheck:
    """The check of one hosted extent, or of one of ESX."""

    def __init__(
        self,
        extent: HostedExtent | CowdExtent,
        report: CheckReport,
        image: VmdkReader,
        progress: ProgressCallback | None,
    ) -> None:
        self._extent = extent
        self._tables: GrainTables = extent.tables
        self._file_size = extent.file.size()
        self._report = report
        self._image = image
        self._progress = progress
        self._say = _Said(extent, report)
        self._packed = extent.header_bytes > 0
        #: The end of the last grain, for what ESX has written down of it.
        self.end = 0
        self.unmended = 0
        self.leaks = Leaks(extent.file, self._tables.grain)

    def check(self) -> None:
        """Read all tables and look at what nothing refers to."""
        self._check_header()
        for offset, length in gaps(self._claims(), self._file_size, self._overlap, self._image.scratch):
            # What is packed has markers between the grains, which nothing points at.
            if not self._packed:
                for start, size in self.leaks.look(offset, length):
                    self._say(Severity.LEAK, f"{size} bytes that nothing refers to hold data", start)
                    self._report.leaked_bytes += size
        extent = self._extent
        if isinstance(extent, CowdExtent) and extent.header.next_free_sector * SECTOR < self.end:
            message = f"the next grain would go to {extent.header.next_free_sector * SECTOR:#x}, among the grains"
            self._say(Severity.CORRUPTION, message, cowd_header.NEXT_FREE_AT)

    def _check_header(self) -> None:
        extent = self._extent
        if extent.unclean:
            self._say(Severity.NOTE, "the extent was not closed when it was written last")
        for message, place in self._tables.directory_faults:
            self._say(Severity.CORRUPTION, message, place)
        self.unmended += len(self._tables.directory_faults) > 1
        if not isinstance(extent, HostedExtent):
            return
        if extent.trailer.lost_footer:
            message = "the footer is lost: other readers do not find the grain directory"
            self._say(Severity.CORRUPTION, message, self._file_size)
        if extent.trailer.slack:
            message = f"{extent.trailer.slack} bytes follow the end of the image: other readers do not find its footer"
            self._say(Severity.NOTE, message, self._file_size - extent.trailer.slack)

    # -- claims ---------------------------------------------------------------------------------

    def _claims(self) -> Iterator[Claim]:
        layout = self._tables.layout
        for number, (start, end) in enumerate(layout.metadata):
            yield Claim(start, end - start, Who.HEADER, number)
        total = layout.directory_entries
        index = self._tables.next_used(0, total)
        while index < total:
            if self._progress is not None and index % _PROGRESS_TABLES == 0:
                self._progress(index, total)
            yield from self._table_claims(index)
            index = self._tables.next_used(index + 1, total)
        if self._progress is not None:
            self._progress(total, total)

    def _table_claims(self, index: int) -> Iterator[Claim]:
        tables = self._tables
        copies: list[array[int] | None] = []
        for redundant in (False, True):
            place = tables.table_at(index, redundant=redundant)
            usable = self._require_table(index, place, redundant=redundant)
            if usable:
                who = Who.REDUNDANT_TABLE if redundant else Who.TABLE
                yield Claim(place, tables.layout.table_bytes, who, index)
            copies.append(tables.read_table(place) if usable else None)
        primary, twin = copies
        if primary is not None and twin is not None and primary != twin:
            severity = Severity.NOTE if self._extent.unclean else Severity.CORRUPTION
            at = next(at for at, pair in enumerate(zip(primary, twin, strict=True)) if pair[0] != pair[1])
            message = f"grain table {index} and its redundant twin differ from entry {at} on"
            self._say(severity, message, tables.table_at(index) + ENTRY_BYTES * at)
        redundant = tables.prefers_twin(index, primary, twin)
        if redundant and primary is not None and (found := tables.first_fault(index, primary)) is not None:
            self._say_grain(index, *found, redundant=False)
        table = twin if redundant else primary
        if table is None:
            self.unmended += 1
        else:
            yield from self._grain_claims(index, table, redundant=redundant)

    def _require_table(self, index: int, place: int, *, redundant: bool) -> bool:
        """Whether a table is there; what is wrong with its place is reported."""
        tables = self._tables
        if redundant and tables.redundant is None:
            return False
        layout = tables.layout
        name = "redundant directory" if redundant else "directory"
        at = (layout.redundant_at if redundant else layout.directory_at) + ENTRY_BYTES * index
        if place == 0:
            severity = Severity.NOTE if redundant and self._extent.unclean else Severity.CORRUPTION
            self._say(severity, f"{name} entry {index} is 0, and its twin is not", at)
            return False
        wrong = tables.table_fault(place)
        if wrong is not None:
            self._say(Severity.CORRUPTION, f"{name} entry {index}: {wrong}", at)
        return wrong is None

    def _say_grain(self, index: int, run: Run, wrong: str, *, redundant: bool) -> None:
        at = self._tables.table_at(index, redundant=redundant) + ENTRY_BYTES * run.first
        self._say(Severity.CORRUPTION, f"entry {run.first} of grain table {index}: {wrong}", at)

    def _grain_claims(self, index: int, table: array[int], *, redundant: bool) -> Iterator[Claim]:
        tables = self._tables
        for run in self._named_runs(index, table):
            wrong = tables.grain_fault(index, run)
            if wrong is not None:
                self._say_grain(index, run, wrong, redundant=redundant)
                self.unmended += 1
                # What the file has of it is not leaked.
                if tables.cut_fault(index, run) != wrong:
                    continue
            length = self._packed_length(index, run) if run.kind == Kind.COMPRESSED else run.grains * tables.grain
            if length:
                self._report.allocated_bytes += length
                self.end = max(self.end, run.host_offset + length)
                yield Claim(run.host_offset, length, Who.GRAIN, index, run.first)

    def _named_runs(self, index: int, table: array[int]) -> Iterator[Run]:
        """The runs that have places; of a run that is wrong each entry by itself, because the report names it."""
        for run in runs(table, self._tables.rules):
            if run.kind not in (Kind.DATA, Kind.COMPRESSED):
                continue
            if run.grains > 1 and self._tables.grain_fault(index, run) is not None:
                yield from run.each(self._tables.grain)
            else:
                yield run

    def _packed_length(self, index: int, run: Run) -> int:
        """Bytes of a packed grain with its header; 0, and a finding, if the header cannot be true."""
        tables, place = self._tables, run.host_offset
        raw = self._extent.file.read(place, GRAIN_HEADER.size).ljust(GRAIN_HEADER.size, b"\0")
        what = f"the grain of entry {run.first} of grain table {index}"
        header_bytes = self._extent.header_bytes
        if header_bytes == GRAIN_HEADER.size:
            lba, length = GRAIN_HEADER.unpack(raw)
            expected = (index * tables.table_entries + run.first) * (tables.grain // SECTOR)
            if lba != expected:
                self._say(Severity.CORRUPTION, f"{what} is marked as sector {lba}, not {expected}", place)
        else:
            length = int.from_bytes(raw[:header_bytes], "little")
        if not 0 < length <= tables.payload_bound(place, header_bytes) - header_bytes:
            self._say(Severity.CORRUPTION, f"{what} has {length} packed bytes, which cannot be", place)
            self.unmended += 1
            return 0
        return round_up(header_bytes + length, SECTOR)

    def _overlap(self, earlier: Claim, later: Claim) -> None:
        self.unmended += 1
        verb = "overlap" if later.claimant == Who.GRAIN else "overlaps"
        self._say(Severity.CORRUPTION, f"{described(later)} {verb} {described(earlier)}", later.start)
