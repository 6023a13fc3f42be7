"""Check a table of blocks against the file and against itself.

Each entry must name a slot of its own in the file. What no entry names is a leak if it holds data.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

from tapfs.driver import CheckReport, HostFile, ProgressCallback, Severity
from tapfs.extent import Kind
from tapfs.formats.blocks.layout import BlockLayout, Run
from tapfs.formats.blocks.reader import BlockReader
from tapfs.formats.changed_table import decode
from tapfs.formats.claims import Claim, gaps
from tapfs.formats.leaks import pieces_with_data

#: The claimant of slots; a format numbers its own metadata from 1 up.
SLOTS = 0

#: So many entries behind those of the disk are looked at.
_MAX_FURTHER = 1 << 20
#: So many leaked ranges are remembered for repair.
_MAX_REMEMBERED = 4096
_LEAK_UNIT = 4096
_PROGRESS_BLOCKS = 1 << 18
_FURTHER_AT_ONCE = 1 << 12


class BlockCheck:
    """One check of one image; the result is in `report` and the other attributes.

    `metadata` are the claims of what is no slot, each with the words for it in `names`, by claimant. The table on disk
    has `entries`: see `further_blocks`.
    """

    def __init__(
        self,
        image: BlockReader,
        metadata: Iterable[Claim],
        names: dict[int, str],
        report: CheckReport,
        progress: ProgressCallback | None = None,
        *,
        entries: int,
    ) -> None:
        self._image = image
        self._names = names
        self._progress = progress
        self.report = report
        #: Entries that name a slot, one more than the largest of these, and one more than the largest possible one.
        self.used = 0
        self.entries_end = 0
        self.possible_end = 0
        #: Unreferenced ``(offset, length)`` ranges with data in them.
        self.leaks: list[tuple[int, int]] = []
        claims = (claim for part in (metadata, self._slots(), self._further(entries)) for claim in part)
        for offset, length in gaps(claims, image.file.size(), self._overlap, image.scratch):
            self._check_gap(offset, offset + length)

    def _slots(self) -> Iterator[Claim]:
        image, layout = self._image, self._image.layout
        for start in range(0, layout.blocks, _PROGRESS_BLOCKS):
            if self._progress is not None:
                self._progress(start, layout.blocks)
            for first, entries in image.table.pieces(start, min(start + _PROGRESS_BLOCKS, layout.blocks)):
                for run in self._named_runs(entries, first):
                    if run.kind != Kind.DATA:
                        continue
                    self.used += run.blocks
                    last = run.entry + (run.blocks - 1) * layout.step
                    self.entries_end = max(self.entries_end, last + 1)
                    wrong = layout.fault(run, image.file.size())
                    if wrong is not None:
                        message = f"entry {run.first} of the block table: {wrong}"
                        self.report.add(Severity.CORRUPTION, message, layout.entry_place(run.first))
                        # What the file has of a block that was cut is not leaked.
                        if wrong != layout.cut_fault(run, image.file.size()):
                            continue
                    self.possible_end = max(self.possible_end, last + 1)
                    self.report.allocated_bytes += run.blocks * layout.block_bytes
                    yield Claim(layout.slot(run.entry), run.blocks * layout.slot_bytes, SLOTS, entry=run.first)
        if self._progress is not None:
            self._progress(layout.blocks, layout.blocks)

    def _named_runs(self, entries: array[int], first: int) -> Iterator[Run]:
        """The runs of entries; of a run that is wrong each entry by itself, because the report names it."""
        layout, size = self._image.layout, self._image.file.size()
        for run in layout.runs(entries, first):
            if run.blocks > 1 and layout.fault(run, size) is not None:
                yield from run.each(layout.step)
            else:
                yield run

    def _further(self, entries: int) -> Iterator[Claim]:
        """The slots that entries behind those of the disk name."""
        layout, report = self._image.layout, self.report
        blocks = layout.blocks
        if entries > blocks:
            message = f"the block table has {entries} entries for the {blocks} blocks of the disk"
            report.add(Severity.NOTE, message, layout.entry_place(blocks))
        for claim in further_blocks(self._image.file, layout, entries, report):
            last = layout.entry(claim.end - layout.slot_bytes)
            self.entries_end, self.possible_end = max(self.entries_end, last + 1), max(self.possible_end, last + 1)
            yield claim

    def _overlap(self, earlier: Claim, later: Claim) -> None:
        message = f"{self._name(later)} overlaps {self._name(earlier)}"
        self.report.add(Severity.CORRUPTION, message, later.start)

    def _name(self, claim: Claim) -> str:
        if claim.claimant != SLOTS:
            return self._names[claim.claimant]
        blocks = claim.length // self._image.layout.slot_bytes
        return f"block {claim.entry}" if blocks == 1 else f"a run of {blocks} blocks from block {claim.entry} on"

    def _check_gap(self, start: int, end: int) -> None:
        start = max(start, self._image.layout.least_place)
        if start >= end:
            return
        for offset, length in pieces_with_data(self._image.file, start, end, _LEAK_UNIT):
            self.report.add(Severity.LEAK, f"{length} bytes that nothing refers to hold data", offset)
            self.report.leaked_bytes += length
            if len(self.leaks) < _MAX_REMEMBERED:
                self.leaks.append((offset, length))


def further_blocks(file: HostFile, layout: BlockLayout, entries: int, report: CheckReport) -> Iterator[Claim]:
    """The slots that entries behind those of the disk name, in a table of `entries`; the report says so.

    A change of the size that was cut off leaves such entries, but the size may as well be damaged. So no repair frees
    these slots, and no writer uses them.
    """
    blocks = layout.blocks
    stop = min(entries, blocks + _MAX_FURTHER)
    named = 0
    for first in range(blocks, stop, _FURTHER_AT_ONCE):
        raw = file.read(layout.entry_place(first), min(_FURTHER_AT_ONCE, stop - first) * layout.entry_bytes)
        words = decode(raw[: len(raw) // layout.entry_bytes * layout.entry_bytes], layout.typecode, layout.order)
        for run in layout.runs(words, first):
            start, length = layout.slot(run.entry), run.blocks * layout.slot_bytes
            if run.kind == Kind.DATA and layout.least_place <= start and start + length <= file.size():
                named += run.blocks
                yield Claim(start, length, SLOTS, entry=run.first)
    if named:
        message = f"{named} blocks behind the end of the disk have places: it was longer, or its size is wrong"
        report.add(Severity.LEAK, message, layout.entry_place(blocks))
        report.leaked_bytes += named * layout.slot_bytes
