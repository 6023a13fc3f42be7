"""The directory and the tables of a seSparse extent, decoded into the entries that `grain_runs` knows.

docs/specs/vmdk.md, "seSparse (all u64)". The bits of a grain's number stand in two pieces in its entry, so the engine
cannot decode such tables. A grain of the types "unmapped" and "zero" reads as zeros, as a guest sees it,
over any parent.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind
from tapfs.formats.vmdk.grain_runs import ZERO_GRAIN, EntryRules, Run
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.sesparse_header import (
    ENTRY_BYTES,
    GRAIN_SECTORS,
    TABLE_ENTRIES,
    TABLE_SECTORS,
    SeSparseHeader,
)
from tapfs.tables import ABSENT, ASK, Rule, TableLayout

_TABLE_BYTES = TABLE_SECTORS * SECTOR
_MAX_KEPT = 32

#: The top four bits of an entry that is not 0: what the guest has unmapped, zeros, data.
_TYPE_SHIFT = 60
_UNMAPPED, _ZERO, _DATA = 1, 2, 3
_TABLE_TYPE = 1 << 28

#: The number of a grain: its low 12 bits stand at bit 48, the rest at bit 0. A grain has 2**12 bytes.
_LOW_SHIFT, _GRAIN_SHIFT = 48, 12
_HIGH_BITS = (1 << 38) - 1


class SeSparseTables:
    """The tables of one extent, by directory index; a bounded number of them is kept."""

    def __init__(self, file: HostFile, header: SeSparseHeader) -> None:
        self.file = file
        self.header = header
        self.file_size = file.size()
        #: How much of the extent the disk uses: of its last grain no more must be in the file.
        self.disk_bytes = header.capacity
        #: Whether grains that the end of the file cuts are mapped.
        self.cut = False
        self.rules = EntryRules(GRAIN_SECTORS, zeroed=True)
        self.grain = header.grain
        self.table_entries = TABLE_ENTRIES
        length = header.directory_entries * ENTRY_BYTES
        self._directory = _words(file.read(header.directory.start, length).ljust(length, b"\0"))
        self._kept: OrderedDict[int, array[int]] = OrderedDict()

    def table_layout(self, number: int, header_bytes: int) -> TableLayout:
        """The tables for the engine; they are in host file `number`."""
        del header_bytes  # nothing is packed
        grains = self.header.grains
        kinds = ((_UNMAPPED, Kind.ZERO), (_ZERO, Kind.ZERO), (_DATA, Kind.DATA))
        return TableLayout(
            entry_bytes=ENTRY_BYTES,
            big_endian=False,
            host_size=min(self.file_size, grains.start + grains.length // self.grain * self.grain),
            rules=(
                Rule((1 << 64) - 1, 0, Kind.UNALLOCATED),
                *(Rule(0xF << _TYPE_SHIFT, kind << _TYPE_SHIFT, what) for kind, what in kinds),
                Rule(0, 0, None),
            ),
            # A place of more than 62 bits is none: `map` requires the same by the length of the area.
            place_mask=_HIGH_BITS,
            place_shift=12 + _GRAIN_SHIFT,
            place_low_mask=0xFFF << _LOW_SHIFT,
            place_low_shift=_LOW_SHIFT - _GRAIN_SHIFT,
            place_add=grains.start,
            place_alignment=SECTOR,
            data_whole=True,
            zero_mask=((1 << _LOW_SHIFT) - 1) & ~_HIGH_BITS,
            tables_reserved=True,
            least_place=grains.start,
            table_file=number,
            data_file=number,
        )

    def places(self, first: int, count: int) -> array[int]:
        """The places of the tables for the engine; an entry that is no table is left to `map`."""
        places = array("Q", [ABSENT]) * count
        end = min(self.header.tables.end, self.file_size)
        for at, entry in enumerate(self._directory[first : first + count]):
            if entry:
                place = self.header.tables.start + (entry & 0xFFFFFFFF) * _TABLE_BYTES
                good = entry >> 32 == _TABLE_TYPE and place + _TABLE_BYTES <= end
                places[at] = place if good else ASK
        return places

    def next_used(self, index: int, stop: int) -> int:
        """The first index from `index` on, below `stop`, that has a table; else `stop`."""
        return next((at for at in range(index, stop) if self._directory[at]), stop)

    def load(self, index: int) -> array[int] | None:
        """The entries of a table as sectors, None where there is none. Raises ImageError(corrupt)."""
        kept = self._kept.get(index)
        if kept is not None:
            self._kept.move_to_end(index)
            return kept
        place = self._table_place(index)
        if place is None:
            return None
        found = self._decoded(index, place, _words(self.file.read(place, _TABLE_BYTES).ljust(_TABLE_BYTES, b"\0")))
        while len(self._kept) >= _MAX_KEPT:
            self._kept.popitem(last=False)
        self._kept[index] = found
        return found

    def require_possible(self, index: int, run: Run) -> None:
        """Raise ImageError(corrupt) if a run of table `index` has no possible place."""
        if run.kind != Kind.DATA:
            return
        last = run.host_offset + (run.grains - 1) * self.grain
        at = (index * TABLE_ENTRIES + run.first + run.grains - 1) * self.grain
        needed = 1 if self.cut else max(1, min(self.grain, self.disk_bytes - at))
        if last + needed > self.file_size:
            message = f"entry {run.first} of table {index}: grain at {last:#x} past the end of the file"
            raise self._corrupt(f"{message} ({self.file_size:#x})", (self._table_place(index) or 0) + 8 * run.first)

    def payload_bound(self, place: int, header_bytes: int) -> int:
        """Nothing is packed in such an extent."""
        del place, header_bytes
        return 0

    def _table_place(self, index: int) -> int | None:
        entry = self._directory[index]
        if entry == 0:
            return None
        at = self.header.directory.start + ENTRY_BYTES * index
        if entry >> 32 != _TABLE_TYPE:
            raise self._corrupt(f"directory entry {index} is {entry:#x}, which is no table", at)
        tables = self.header.tables
        place = tables.start + (entry & 0xFFFFFFFF) * _TABLE_BYTES
        if place + _TABLE_BYTES > min(tables.end, self.file_size):
            raise self._corrupt(f"directory entry {index}: table at {place:#x} outside the area of the tables", at)
        return place

    def _decoded(self, index: int, place: int, words: array[int]) -> array[int]:
        if not any(words):
            return words
        first, most = self.header.grains.start // SECTOR, self.header.grains.length // self.grain
        for at, word in enumerate(words):
            if word == 0:
                continue
            kind = word >> _TYPE_SHIFT
            if kind in (_UNMAPPED, _ZERO):
                words[at] = ZERO_GRAIN
                continue
            number = ((word >> 48) & 0xFFF) | ((word & 0xFFFFFFFFFFFF) << 12)
            if kind != _DATA or number >= most:
                raise self._corrupt(f"entry {at} of table {index} is {word:#x}, which is no grain", place + 8 * at)
            words[at] = first + number * GRAIN_SECTORS
        return words

    def _corrupt(self, message: str, offset: int) -> ImageError:
        return ImageError(ErrorKind.CORRUPT, message, path=self.file.path, offset=offset, op="map")


def _words(raw: bytes) -> array[int]:
    words = array("Q", raw)
    if sys.byteorder == "big":
        words.byteswap()
    return words
