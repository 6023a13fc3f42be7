"""Check an image: compare the claims of its metadata with each other and with the file.

All metadata is read. Memory stays bounded whatever the image says (see :mod:`tapfs.formats.claims`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from enum import IntEnum
from itertools import chain
from typing import TYPE_CHECKING

from tapfs.driver import CheckReport, ProgressCallback, Severity
from tapfs.extent import Kind
from tapfs.formats.claims import Claim, gaps
from tapfs.formats.leaks import pieces_with_data
from tapfs.formats.qcow import era, extended
from tapfs.formats.qcow.entries import STRAY_HEADER_WORD, Run, fault
from tapfs.formats.qcow.header import ENTRY_LENGTH, LENGTH, SIZE_AT
from tapfs.formats.qcow.survey import Survey
from tapfs.formats.rounding import round_up

if TYPE_CHECKING:
    from tapfs.formats.qcow.reader import QcowReader

_BLOCK = 4096
_PROGRESS_TABLES = 256

#: So many stray tables and leaked ranges are remembered for repair.
MAX_REMEMBERED = 4096


class Claimant(IntEnum):
    """What a range of the host file is claimed for."""

    HEADER = 0
    NAME = 1
    L1 = 2
    #: The table of L1 entry `Claim.table`.
    TABLE = 3
    #: What that table maps from its entry `Claim.entry` on.
    CLUSTER = 4


class Check:
    """One check of one image; the result is in `report` and the other attributes."""

    def __init__(self, image: QcowReader, progress: ProgressCallback | None = None) -> None:
        self._image = image
        self._progress = None if progress is None else _forwards(progress)
        self._file_size = image.file.size()
        #: One byte for each L1 entry: 1 where its table cannot be read or was read for another entry.
        self._skipped = bytearray(len(image.l1))
        self._unaligned_noted = False
        self.report = CheckReport()
        #: L1 indexes of tables under a stray header copy, and how many tables the L1 formula does not give.
        self.strays: list[int] = []
        self.disagreements = 0
        #: Unreferenced ``(offset, length)`` ranges with data in them.
        self.leaks: list[tuple[int, int]] = []
        for finding in image.open_findings:
            self.report.add(*finding)
        self._note_era()
        claims = self._surveyed()
        if claims is None:
            self._check_tables()
            claims = self._claims()
        for offset, length in gaps(claims, self._file_size, self._overlap, image.scratch):
            self._check_gap(offset, length)
        self._note_strays()

    # -- notes ----------------------------------------------------------------------------------

    def _note_era(self) -> None:
        image, report = self._image, self.report
        if (layout := era.name(image)) is not None:
            report.add(Severity.NOTE, f"the layout is that of {layout}", extended.OFFSET)
        if image.l1.order == "little":
            message = "the L1 table is little-endian: QEMU reads other data than the guest wrote, or none"
            report.add(Severity.NOTE, message, image.header.l1_table_offset)
        lost = image.header.size % 512
        if lost:
            report.add(Severity.NOTE, f"size is no multiple of 512: QEMU does not show the last {lost} bytes", SIZE_AT)
        if image.extended is not None and not image.cksum_valid:
            message = "the cksum does not fit the L1 table: readers ignore the extended header"
            report.add(Severity.NOTE, message, extended.CKSUM_AT)

    def _note_strays(self) -> None:
        for index in self.strays:
            message = f"L2 table {index} starts with a stray copy of the header: QEMU reads 64 clusters wrongly"
            self.report.add(Severity.NOTE, message, self._image.l1[index])

    def _overlap(self, earlier: Claim, later: Claim) -> None:
        verb = "overlap" if later.claimant == Claimant.CLUSTER else "overlaps"
        self.report.add(Severity.CORRUPTION, f"{_name(later)} {verb} {_name(earlier)}", later.start)

    # -- tables ---------------------------------------------------------------------------------

    def _surveyed(self) -> Iterator[Claim] | None:
        """The claims of an image whose tables and clusters are all in order; None: each is to be looked at."""
        header = self._image.header
        survey = Survey(self._image, self._file_size, self._progress)
        metadata = list(self._metadata_claims())
        if not survey.complete or any(survey.is_claimed(claim.start, claim.end) for claim in metadata):
            return None
        self.report.allocated_bytes += survey.data_clusters << header.cluster_bits
        if survey.cut is not None:
            index, entry = survey.cut
            self._note_missing_end(index, entry, -self._file_size % header.cluster_size)
        ranges = (Claim(start, length, Claimant.CLUSTER) for start, length in survey.ranges())
        return chain(metadata, ranges)

    def _check_tables(self) -> None:
        """Find the L1 entries that lead nowhere or to a table of another entry."""
        image = self._image
        for index, entry in image.l1.used():
            wrong = image.tables.table_fault(entry)
            if wrong is not None:
                self._skipped[index] = 1
                at = image.header.l1_table_offset + ENTRY_LENGTH * index
                self.report.add(Severity.CORRUPTION, f"L1 entry {index}: {wrong}", at)

        def tables() -> Iterator[Claim]:
            for index, entry in image.l1.used():
                if not self._skipped[index]:
                    yield Claim(entry, image.header.l2_length, Claimant.TABLE, index)

        def overlap(earlier: Claim, later: Claim) -> None:
            # The table is read once, so its clusters are not all reported as well.
            if not self._skipped[later.table]:
                self._skipped[later.table] = 1
                self._overlap(earlier, later)

        for _ in gaps(tables(), 0, overlap, image.scratch):
            pass

    def _metadata_claims(self) -> Iterator[Claim]:
        header = self._image.header
        yield Claim(0, self._header_end(), Claimant.HEADER)
        if header.has_backing and header.backing_file_offset >= self._header_end():
            yield Claim(header.backing_file_offset, header.backing_file_size, Claimant.NAME)
        yield Claim(header.l1_table_offset, header.l1_length, Claimant.L1)

    def _claims(self) -> Iterator[Claim]:
        image = self._image
        header = image.header
        yield from self._metadata_claims()
        total = len(image.l1) * header.l2_length
        for number, (index, entry) in enumerate(image.l1.used()):
            if self._progress is not None and number % _PROGRESS_TABLES == 0:
                self._progress(index * header.l2_length, total)
            if self._skipped[index]:
                continue
            yield Claim(entry, header.l2_length, Claimant.TABLE, index)
            yield from self._cluster_claims(index, entry)
        if self._progress is not None:
            self._progress(total, total)

    def _cluster_claims(self, index: int, table_offset: int) -> Iterator[Claim]:
        image = self._image
        header = image.header
        table = image.tables.read_from_disk(table_offset)
        if image.follows_formula:
            table = self._reconcile(index, table_offset, table)
        for run in self._named_runs(index, table):
            wrong = fault(run, header, self._file_size)
            at = table_offset + ENTRY_LENGTH * run.first
            if wrong is not None:
                self.report.add(Severity.CORRUPTION, f"L2 entry {run.first} of table {index}: {wrong}", at)
                continue
            length = run.host_length or run.clusters << header.cluster_bits
            self.report.allocated_bytes += length
            missing = run.host_offset + length - self._file_size
            if run.kind == Kind.DATA and missing > 0:
                self._note_missing_end(index, run.first + run.clusters - 1, missing)
            if run.kind == Kind.DATA and run.host_offset % header.cluster_size and not image.follows_formula:
                self._note_unaligned(index, run.first, at)
            yield Claim(run.host_offset, length, Claimant.CLUSTER, index, run.first)

    def _named_runs(self, index: int, table: array[int]) -> Iterator[Run]:
        """The runs that have places; of a run that is wrong each entry by itself, because the report names it."""
        header = self._image.header
        for run in self._image.table_runs(index, table):
            if run.kind == Kind.UNALLOCATED:
                continue
            if run.clusters > 1 and fault(run, header, self._file_size) is not None:
                for at in range(run.clusters):
                    place = run.host_offset + (at << header.cluster_bits)
                    yield run._replace(first=run.first + at, clusters=1, host_offset=place)
            else:
                yield run

    def _reconcile(self, index: int, table_offset: int, table: array[int]) -> array[int]:
        """The entries that readers use: those that L1 gives, if they may differ from the table's."""
        image = self._image
        computed = image.tables.computed(table_offset)
        if table == computed:
            return table
        stray = table[0] == STRAY_HEADER_WORD
        if stray:
            if len(self.strays) < MAX_REMEMBERED:
                self.strays.append(index)
        else:
            self.disagreements += 1
            if image.fast_path:
                message = f"L2 table {index} is not what blktap computes from L1: QEMU reads other data than blktap"
                self.report.add(Severity.CORRUPTION, message, table_offset)
        return computed if stray or image.fast_path else table

    def _note_missing_end(self, index: int, entry: int, missing: int) -> None:
        """Writers may leave out zeros at the end of the file, so this alone does not tell a file that was cut."""
        message = f"the cluster of L2 entry {entry} of table {index} lacks its last {missing} bytes: they read as zeros"
        self.report.add(Severity.NOTE, message, self._file_size)

    def _note_unaligned(self, index: int, entry: int, at: int) -> None:
        if not self._unaligned_noted:
            message = f"L2 entry {entry} of table {index} and perhaps others are not aligned to a cluster"
            self.report.add(Severity.NOTE, message, at)
            self._unaligned_noted = True

    # -- leaks ----------------------------------------------------------------------------------

    def _header_end(self) -> int:
        image = self._image
        header = image.header
        end = LENGTH if image.extended is None else LENGTH + image.extended.length
        if header.has_backing and header.backing_file_offset == end:
            end += header.backing_file_size
        return end

    def _check_gap(self, offset: int, length: int) -> None:
        """Space that nothing claims is leaked where it holds data; what was never written is not."""
        end = offset + length
        # Between header and L1 the old tools left what was in their buffer.
        slack_end = min(self._image.header.l1_table_offset, round_up(self._header_end(), _BLOCK))
        start = max(offset, slack_end)
        if start >= end:
            return
        for at, leaked in pieces_with_data(self._image.file, start, end, self._image.header.cluster_size):
            self.report.add(Severity.LEAK, f"{leaked} bytes that nothing refers to hold data", at)
            self.report.leaked_bytes += leaked
            if len(self.leaks) < MAX_REMEMBERED:
                self.leaks.append((at, leaked))


def _name(claim: Claim) -> str:
    """A claim for people."""
    match Claimant(claim.claimant):
        case Claimant.HEADER:
            return "the header"
        case Claimant.NAME:
            return "the backing file's name"
        case Claimant.L1:
            return "the L1 table"
        case Claimant.TABLE:
            return f"L2 table {claim.table}"
        case Claimant.CLUSTER:
            return f"the clusters from L2 entry {claim.entry} of table {claim.table} on"


def _forwards(progress: ProgressCallback) -> ProgressCallback:
    """The same, told only what is more than before: where the survey finds damage all is looked at once more."""
    most = -1

    def advance(done: int, total: int) -> None:
        nonlocal most
        if done > most:
            most = done
            progress(done, total)

    return advance
