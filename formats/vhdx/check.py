"""Check an image: compare the claims of its metadata with each other and with the file.

All of the block table is read. Memory stays bounded whatever the image says (see :mod:`tapfs.formats.claims`).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING

from tapfs.driver import CheckReport, ProgressCallback, Severity
from tapfs.formats.changed_table import decode
from tapfs.formats.claims import Claim, gaps
from tapfs.formats.leaks import pieces_with_data
from tapfs.formats.rounding import round_down
from tapfs.formats.vhdx.blocks import (
    ANCHORED,
    BITMAP_BYTES,
    ENTRY_BYTES,
    PLACE_MASK,
    RESERVED_MASK,
    STATE_MASK,
    State,
    bitmap_fault,
    block_fault,
    cut_fault,
    place_fault,
)
from tapfs.formats.vhdx.header import read_headers
from tapfs.formats.vhdx.regions import TABLES, whole_tables
from tapfs.formats.vhdx.units import HEADER_SECTION, PAGE

if TYPE_CHECKING:
    from tapfs.formats.vhdx.reader import VhdxReader

#: Entries of blocks without bytes about which there is nothing to say.
_PLAIN_NOTHING = frozenset({int(State.NOT_PRESENT), int(State.UNDEFINED), int(State.ZERO), int(State.UNMAPPED)})

#: Bytes of the table that are read at once where the disk has no blocks.
_BYTES_AT_ONCE = 1 << 20
#: The number of a block behind the end of the disk, for its claim.
_BEHIND = 0xFFFFFFFF

#: So many leaked ranges are remembered for repair.
MAX_REMEMBERED = 4096


class Claimant(IntEnum):
    """What a range of the host file is claimed for."""

    HEADERS = 0
    METADATA = 1
    #: The block `Claim.table` * 2^32 + `Claim.entry`.
    BLOCK = 2
    #: The sector bitmap of the chunk `Claim.entry`.
    BITMAP = 3


class Check:
    """One check of one image; the result is in `report` and `leaks`."""

    def __init__(self, image: VhdxReader, progress: ProgressCallback | None = None) -> None:
        self._image = image
        self._progress = progress
        self._file_size = image.file.size()
        self.report = CheckReport()
        #: Unreferenced ``(offset, length)`` ranges with data in them.
        self.leaks: list[tuple[int, int]] = []
        #: The numbers of the region tables that are not whole, and whether a header is not.
        self.damaged_tables = [number for number, whole in enumerate(whole_tables(image.file)) if not whole]
        self.damaged_header = bool(read_headers(image.file).findings)
        for finding in image.open_findings:
            self.report.add(*finding)
        for number in self.damaged_tables:
            if number not in image.regions.damaged:
                message = f"region table {number + 1} is damaged; the other one is whole"
                self.report.add(Severity.NOTE, message, TABLES[number])
        for offset, length in gaps(self._claims(), self._file_size, self._overlap, image.scratch):
            self._check_gap(offset, length)

    def _overlap(self, earlier: Claim, later: Claim) -> None:
        self.report.add(Severity.CORRUPTION, f"{_name(later)} overlaps {_name(earlier)}", later.start)

    def _claims(self) -> Iterator[Claim]:
        image, table = self._image, self._image.table
        yield Claim(0, HEADER_SECTION, Claimant.HEADERS)
        for place in image.reserved:
            yield Claim(place.offset, place.length, Claimant.METADATA)
        for first, entries in image.chunks():
            needed = 0
            # Most chunks of an empty disk are one entry again and again.
            if entries[0] not in _PLAIN_NOTHING or entries.count(entries[0]) != len(entries):
                for block, entry in enumerate(entries, first):
                    if entry & STATE_MASK == State.PARTIAL:
                        needed = table.bitmap_offset(block) + table.bitmap_bytes
                    yield from self._block_claims(block, entry)
            if table.has_parent:
                yield from self._bitmap_claims(table.chunk_of(first), needed)
            if self._progress is not None:
                self._progress(first + len(entries), table.blocks)
        yield from self._claims_behind()

    def _claims_behind(self) -> Iterator[Claim]:
        """The places that entries behind those of the disk name. No repair frees them: the size may be wrong."""
        image, table = self._image, self._image.table
        start, end = table.place.end, image.regions.bat.end
        named = 0
        for word in self._words_behind(start, end):
            placed = word & STATE_MASK in {State.PRESENT, State.PARTIAL}
            if placed and place_fault(word, table.block_size, image.reserved, self._file_size) is None:
                named += 1
                yield Claim(word & PLACE_MASK, table.block_size, Claimant.BLOCK, 0, _BEHIND)
        if named:
            # A change of the size that was cut off leaves such entries, but the size may as well be damaged.
            message = f"{named} blocks behind the end of the disk have places: it was longer, or its size is wrong"
            self.report.add(Severity.LEAK, message, start)
            self.report.leaked_bytes += named * table.block_size

    def _words_behind(self, start: int, end: int) -> Iterator[int]:
        """The entries between two host offsets, without those that are zero."""
        image = self._image
        for at, length in image.file.data_ranges(start, end - start):
            for piece in range(round_down(at, PAGE), at + length, _BYTES_AT_ONCE):
                first = max(piece, start)
                raw = image.pages.read(first, min(piece + _BYTES_AT_ONCE, end) - first)
                yield from filter(None, decode(raw[: len(raw) // ENTRY_BYTES * ENTRY_BYTES], "Q", "little"))

    def _block_claims(self, block: int, entry: int) -> Iterator[Claim]:
        image, table = self._image, self._image.table
        at = table.entry_offset(table.index(block))
        wrong = block_fault(block, entry, table, image.reserved, self._file_size)
        if wrong is not None:
            self.report.add(Severity.CORRUPTION, f"block {block}: {wrong}", at)
            # What the file has of a block that was cut is not leaked.
            if wrong != cut_fault(block, entry, table, self._file_size):
                return
        state, place = entry & STATE_MASK, entry & PLACE_MASK
        if state < State.PRESENT:
            self._note_unused(block, entry, at)
            # The space that a block has had stays its own.
            if state not in ANCHORED or not place or self._is_impossible(entry):
                return
        else:
            self.report.allocated_bytes += table.block_size
        yield Claim(place, table.block_size, Claimant.BLOCK, block >> 32, block & 0xFFFFFFFF)

    def _is_impossible(self, entry: int) -> bool:
        image = self._image
        return place_fault(entry, image.table.block_size, image.reserved, self._file_size) is not None

    def _note_unused(self, block: int, entry: int, at: int) -> None:
        if entry & RESERVED_MASK:
            self.report.add(Severity.NOTE, f"block {block}: reserved bits are set ({entry & RESERVED_MASK:#x})", at)
        if entry & PLACE_MASK and entry & STATE_MASK not in ANCHORED:
            message = f"block {block} has no bytes and yet a place at {entry & PLACE_MASK:#x}: Hyper-V rejects that"
            self.report.add(Severity.NOTE, message, at)

    def _bitmap_claims(self, chunk: int, needed: int) -> Iterator[Claim]:
        image, table = self._image, self._image.table
        at = table.entry_offset(table.bitmap_index(chunk))
        entry = image.pages.word(at)
        if entry & STATE_MASK == State.NOT_PRESENT and not needed:
            return
        wrong = bitmap_fault(entry, image.reserved, self._file_size, needed)
        if wrong is not None:
            self.report.add(Severity.CORRUPTION, f"the sector bitmap of chunk {chunk}: {wrong}", at)
            return
        yield Claim(entry & PLACE_MASK, BITMAP_BYTES, Claimant.BITMAP, 0, chunk)

    # -- leaks ----------------------------------------------------------------------------------

    def _check_gap(self, offset: int, length: int) -> None:
        """Space that nothing claims is leaked where it holds data; what was never written is not."""
        for at, data_length in pieces_with_data(self._image.file, offset, offset + length, PAGE):
            self._leak(at, data_length)

    def _leak(self, start: int, length: int) -> None:
        self.report.add(Severity.LEAK, f"{length} bytes that nothing refers to hold data", start)
        self.report.leaked_bytes += length
        if len(self.leaks) < MAX_REMEMBERED:
            self.leaks.append((start, length))


def _name(claim: Claim) -> str:
    """A claim for people."""
    match Claimant(claim.claimant):
        case Claimant.HEADERS:
            return "the header section"
        case Claimant.METADATA:
            return "metadata"
        case Claimant.BLOCK:
            number = claim.table << 32 | claim.entry
            return "a block behind the end of the disk" if number == _BEHIND else f"block {number}"
        case Claimant.BITMAP:
            return f"the sector bitmap of chunk {claim.entry}"
