"""Check a VHD that grows: the findings of the opening, the block allocation table, bitmaps, batmap, leaked space.

The table is read once, and the ranges that it claims are sorted in bounded memory (`tapfs.formats.claims`). A bitmap is
read for each block that is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING

from tapfs.driver import CheckReport, ProgressCallback, Severity
from tapfs.formats.claims import Claim, gaps
from tapfs.formats.leaks import pieces_with_data
from tapfs.formats.vhd.bitmap import is_full, sector_runs
from tapfs.formats.vhd.dynamic_header import SECTOR
from tapfs.formats.vhd.footer import LENGTH

if TYPE_CHECKING:
    from tapfs.formats.vhd.reader import DynamicReader

_LEAK_UNIT = 4096
_PROGRESS_BLOCKS = 256

#: So many leaked ranges are remembered for repair.
MAX_REMEMBERED = 4096


class _Claimant(IntEnum):
    METADATA = 0
    LOCATOR = 1
    BATMAP = 2
    BLOCK = 3
    FOOTER = 4


class Check:
    """One check of one image; the result is in `report` and the other attributes."""

    def __init__(self, image: DynamicReader, progress: ProgressCallback | None = None) -> None:
        self._image = image
        self._progress = progress
        self._file_size = image.file.size()
        self.report = CheckReport()
        #: Unreferenced ``(offset, length)`` ranges with data in them.
        self.leaks: list[tuple[int, int]] = []
        #: Blocks that the batmap calls full and whose bitmaps are not.
        self.not_full: list[int] = []
        self._hidden_noted = False
        for finding in image.findings:
            self.report.add(*finding)
        self._check_batmap_sum()
        for offset, length in gaps(self._claims(), self._file_size, self._overlap, image.scratch):
            self._check_gap(offset, length)

    def _check_batmap_sum(self) -> None:
        batmap = self._image.batmap
        if batmap is not None and not batmap.valid:
            message = "the checksum of tapdisk's batmap is wrong: it is ignored"
            self.report.add(Severity.NOTE, message, batmap.offset)

    # -- claims ---------------------------------------------------------------------------------

    def _claims(self) -> Iterator[Claim]:
        image = self._image
        for number, (start, stop, _) in enumerate(image.metadata_ranges):
            yield Claim(start, stop - start, _Claimant.METADATA, number)
        for number, locator in enumerate(image.header.locators):
            if locator.data_length:
                length = max(locator.space_bytes, locator.data_length)
                if locator.offset + locator.data_length > self._file_size:
                    message = f"parent locator {number} past the end of the file"
                    self.report.add(Severity.CORRUPTION, message, locator.offset)
                else:
                    yield Claim(locator.offset, length, _Claimant.LOCATOR, number)
        if image.batmap is not None:
            yield Claim(image.batmap.offset, SECTOR, _Claimant.BATMAP)
            if image.batmap.bits:
                yield Claim(image.batmap.map_offset, len(image.batmap.bits), _Claimant.BATMAP)
        if image.footers.last_good:
            yield Claim(image.footers.place, LENGTH, _Claimant.FOOTER)
        total = len(image.table)
        for number, (index, place) in enumerate(image.table.used()):
            if self._progress is not None and number % _PROGRESS_BLOCKS == 0:
                self._progress(index * image.header.block_size, total * image.header.block_size)
            wrong = image.place_fault(index, place)
            if wrong is not None:
                at = image.table.entry_offset(index)
                self.report.add(Severity.CORRUPTION, f"block {index}: {wrong}", at)
                continue
            self.report.allocated_bytes += image.header.bitmap_bytes + image.block_bytes(index)
            self._check_bitmap(index, place)
            yield Claim(place, self._block_end(index, place) - place, _Claimant.BLOCK, index)
        for claim in image.table.further(self.report):
            yield Claim(claim.start, claim.length, _Claimant.BLOCK, claim.entry)
        if self._progress is not None:
            self._progress(total * image.header.block_size, total * image.header.block_size)

    def _block_end(self, index: int, place: int) -> int:
        """The end of a block in the file. The last block of a disk may end with the disk, or go on behind its end."""
        data = place + self._image.header.bitmap_bytes
        limit = self._image.footers.place if self._image.footers.last_good else self._file_size
        return max(data + self._image.block_bytes(index), min(data + self._image.header.block_size, limit))

    def _overlap(self, earlier: Claim, later: Claim) -> None:
        message = f"{self._named(later)} overlaps {self._named(earlier)}"
        self.report.add(Severity.CORRUPTION, message, later.start)

    def _named(self, claim: Claim) -> str:
        match claim.claimant:
            case _Claimant.METADATA:
                return self._image.metadata_ranges[claim.table][2]
            case _Claimant.LOCATOR:
                return f"parent locator {claim.table}"
            case _Claimant.BATMAP:
                return "the batmap"
            case _Claimant.FOOTER:
                return "the footer at the end"
            case _:
                return f"block {claim.table}"

    # -- bitmaps --------------------------------------------------------------------------------

    def _check_bitmap(self, index: int, place: int) -> None:
        image = self._image
        bitmap = image.read_bitmap(place)
        if is_full(bitmap, image.block_sectors):
            return
        sectors = image.block_bytes(index) // SECTOR
        missing = [run for run in sector_runs(bitmap, 0, sectors) if not run.present]
        if missing and image.batmap is not None and image.batmap.is_full(index):
            self.not_full.append(index)
            message = f"block {index} lacks sectors and the batmap calls it full"
            self.report.add(Severity.CORRUPTION, message, place)
        elif not image.differencing and not self._hidden_noted:
            data = place + image.header.bitmap_bytes
            for run in missing:
                if self._holds_data(data + run.first * SECTOR, (run.stop - run.first) * SECTOR):
                    message = f"block {index} and perhaps others hold bytes in sectors that are not there: they read"
                    self.report.add(Severity.NOTE, f"{message} as zeros, QEMU shows the bytes", place)
                    self._hidden_noted = True
                    break

    def _holds_data(self, offset: int, length: int) -> bool:
        return next(pieces_with_data(self._image.file, offset, offset + length, SECTOR), None) is not None

    # -- leaks ----------------------------------------------------------------------------------

    def _check_gap(self, offset: int, length: int) -> None:
        """Space as long as a block that nothing claims is leaked where it holds data.

        Shorter gaps are those that align blocks; old footers lie in them.
        """
        if length < self._image.header.block_size:
            return
        for start, count in pieces_with_data(self._image.file, offset, offset + length, _LEAK_UNIT):
            self.report.add(Severity.LEAK, f"{count} bytes that nothing refers to hold data", start)
            self.report.leaked_bytes += count
            if len(self.leaks) < MAX_REMEMBERED:
                self.leaks.append((start, count))
