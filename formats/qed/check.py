"""Check a QED image: every cluster is named once, and lies in the file."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

from tapfs.driver import CheckReport, ProgressCallback, Severity
from tapfs.formats.claims import Claim, gaps
from tapfs.formats.leaks import pieces_with_data
from tapfs.formats.qed.header import ENTRY_LENGTH, FEATURES_AT
from tapfs.formats.qed.reader import FREE, PIECE_ENTRIES, ZERO, QedReader


class _Claimant(IntEnum):
    HEADER = 0
    L1 = 1
    TABLE = 2
    CLUSTER = 3


class Check:
    """One check of one image; the result is in `report`."""

    def __init__(self, image: QedReader, progress: ProgressCallback | None = None) -> None:
        self._image = image
        self._progress = progress
        self.report = CheckReport()
        if image.header.dirty:
            message = "a writer has not closed the image: QEMU checks it before it opens it"
            self.report.add(Severity.NOTE, message, FEATURES_AT)
        for offset, length in gaps(self._claims(), image.file_size, self._overlap, image.scratch):
            for start, count in pieces_with_data(image.file, offset, offset + length, image.header.cluster_size):
                self.report.add(Severity.LEAK, f"{count} bytes that nothing refers to hold data", start)
                self.report.leaked_bytes += count

    def _claims(self) -> Iterator[Claim]:
        image, header = self._image, self._image.header
        yield Claim(0, header.header_end, _Claimant.HEADER)
        yield Claim(header.l1_offset, header.table_bytes, _Claimant.L1)
        for index, table in enumerate(image.l1):
            if self._progress is not None:
                self._progress(index * header.table_span, header.image_size)
            if table == FREE:
                continue
            wrong = image.table_fault(table)
            if wrong is not None:
                self.report.add(
                    Severity.CORRUPTION, f"L1 entry {index}: {wrong}", header.l1_offset + index * ENTRY_LENGTH
                )
                continue
            yield Claim(table, header.table_bytes, _Claimant.TABLE, index)
            for first in range(0, header.table_entries, PIECE_ENTRIES):
                yield from self._clusters(index, table, first)
        if self._progress is not None:
            self._progress(header.image_size, header.image_size)

    def _clusters(self, index: int, table: int, first: int) -> Iterator[Claim]:
        image, cluster = self._image, self._image.header.cluster_size
        entries = image.piece(table, first, PIECE_ENTRIES)
        if entries.count(FREE) == len(entries):
            return
        for at, entry in enumerate(entries, first):
            if entry in {FREE, ZERO}:
                continue
            number = index * image.header.table_entries + at
            wrong = image.cluster_fault(entry, number)
            if wrong is not None:
                message = f"L2 entry {at} of table {index}: {wrong}"
                self.report.add(Severity.CORRUPTION, message, table + at * ENTRY_LENGTH)
                # What the file has of a cluster that was cut is not leaked.
                if wrong != image.cut_fault(entry, image.needed(number)):
                    continue
            self.report.allocated_bytes += cluster
            yield Claim(entry, cluster, _Claimant.CLUSTER, index, at)

    def _overlap(self, earlier: Claim, later: Claim) -> None:
        message = f"{self._named(later)} overlaps {self._named(earlier)}"
        self.report.add(Severity.CORRUPTION, message, later.start)

    def _named(self, claim: Claim) -> str:
        match claim.claimant:
            case _Claimant.HEADER:
                return "the header"
            case _Claimant.L1:
                return "the L1 table"
            case _Claimant.TABLE:
                return f"L2 table {claim.table}"
            case _:
                return f"the cluster of L2 entry {claim.entry} of table {claim.table}"
