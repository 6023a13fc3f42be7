"""The L2 tables of an open image: read on demand, a bounded cache, and the changed ones.

Three kinds of tables are not read as they are on disk, and this module gives them like all others: a table that maps
nothing yet, a table that the fast path makes unnecessary, and a table under a stray header copy.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import ChangedTable
from tapfs.formats.qcow.entries import BYTE_ORDER, STRAY_HEADER_WORD, consecutive, decode_table
from tapfs.formats.qcow.header import ENTRY_LENGTH, LENGTH, Header
from tapfs.formats.qcow.l1 import L1Table
from tapfs.plan import Step, Write

#: Bytes of unchanged tables that are kept.
CACHE_BYTES = 2 << 20


class Tables:
    """The L2 tables of one image, by L1 index.

    `file_size` bounds what may be pointed at; a writer moves it as it allocates. `formula`: no
    table need be read, L1 gives every cluster (the fast path). `strays_follow_formula`: a table that
    starts with a header copy is one that blktap filled whole, so the formula gives it too.
    """

    def __init__(self, file: HostFile, header: Header, l1: L1Table) -> None:
        self._file = file
        self._header = header
        self._l1 = l1
        self.file_size = file.size()
        self.formula = False
        self.strays_follow_formula = False
        self._clean: OrderedDict[int, array[int]] = OrderedDict()
        self.changed: dict[int, ChangedTable] = {}
        #: The numbers of those that were asked for to be changed since the last plan, or the last addition to it.
        self.recent: set[int] = set()
        #: Indexes of tables found under a stray header copy.
        self.strays: set[int] = set()

    def computed(self, table_offset: int) -> array[int]:
        """The entries of a table at `table_offset` that blktap filled whole."""
        header = self._header
        return consecutive(table_offset + header.l2_length, header.l2_entries, header.cluster_size)

    def load(self, index: int) -> array[int] | None:
        """The entries of the table of L1 entry `index`, None where there is none; not to be changed.

        Raises ImageError(corrupt) where the L1 entry cannot be true.
        """
        changed = self.changed.get(index)
        if changed is not None:
            return changed.entries
        entry = self._l1[index]
        if entry == 0:
            return None
        clean = self._clean.get(index)
        if clean is None:
            wrong = self.table_fault(entry)
            if wrong is not None:
                raise ImageError(
                    ErrorKind.CORRUPT,
                    f"L1 entry {index}: {wrong}",
                    path=self._file.path,
                    offset=self._header.l1_table_offset + ENTRY_LENGTH * index,
                    op="map",
                )
            clean = self.computed(entry) if self.formula else self._read(index, entry)
            while len(self._clean) * self._header.l2_length >= CACHE_BYTES:
                self._clean.popitem(last=False)
        else:
            del self._clean[index]
        self._clean[index] = clean
        return clean

    def change(self, index: int) -> ChangedTable:
        """The table of L1 entry `index`, which must have one, to be changed."""
        self.recent.add(index)
        changed = self.changed.get(index)
        if changed is None:
            entries = self.load(index)
            if entries is None:
                raise AssertionError(f"L1 entry {index} has no table")
            del self._clean[index]
            changed = self.changed[index] = ChangedTable(entries, BYTE_ORDER)
        return changed

    def create(self, index: int, entries: array[int]) -> ChangedTable:
        """A table that is new on disk, for an L1 entry that was zero."""
        changed = ChangedTable(entries, BYTE_ORDER)
        changed.mark(0, len(entries))
        self.changed[index] = changed
        self.recent.add(index)
        return changed

    def find_strays(self, limit: int | None = None) -> None:
        """Look for stray header copies in the tables of the first `limit` L1 entries in use."""
        for _, (index, entry) in zip(range(limit or len(self._l1)), self._l1.used(), strict=False):
            word = STRAY_HEADER_WORD.to_bytes(ENTRY_LENGTH, "big")
            if self.table_fault(entry) is None and self._file.read(entry, ENTRY_LENGTH) == word:
                self.strays.add(index)

    def changed_between(self, first: int, stop: int) -> list[int]:
        """The indexes in ``[first, stop)`` of tables that differ from the disk."""
        if stop - first < len(self.changed):
            return [index for index in range(first, stop) if index in self.changed]
        return [index for index in self.changed if first <= index < stop]

    def changed_bytes(self) -> int:
        """Memory that the changed tables take."""
        return len(self.changed) * self._header.l2_length

    def begin_plan(self) -> None:
        """All that is pending flies with the plan that is being made."""
        self.recent.clear()
        for changed in self.changed.values():
            changed.begin_plan()

    def added_steps(self) -> list[Step]:
        """The writes of what has changed since the last plan or addition, which is in the plan from now on."""
        recent, self.recent = self.recent, set()
        tables = ((self._l1[index], self.changed.get(index)) for index in recent)
        return [Write(0, place + at, data) for place, each in tables if each for at, data in each.added_runs()]

    def plan_done(self) -> None:
        """What flew is durable."""
        for index in [index for index, changed in self.changed.items() if not changed.pending]:
            entries = self.changed.pop(index).entries
            while len(self._clean) * self._header.l2_length >= CACHE_BYTES:
                self._clean.popitem(last=False)
            self._clean[index] = entries
        for changed in self.changed.values():
            changed.plan_done()

    def table_fault(self, table_offset: int) -> str | None:
        """What makes the place of a table impossible, or None."""
        header = self._header
        end = table_offset + header.l2_length
        if table_offset % header.cluster_size:
            return f"L2 table at {table_offset:#x} not aligned to a cluster"
        if end > self.file_size:
            return f"L2 table [{table_offset:#x}, {end:#x}) past the end of the file ({self.file_size:#x})"
        if table_offset < LENGTH:
            return f"L2 table at {table_offset:#x} inside the header"
        if table_offset < header.l1_end and header.l1_table_offset < end:
            return f"L2 table at {table_offset:#x} inside the L1 table"
        return None

    def read_from_disk(self, table_offset: int) -> array[int]:
        """The entries as they stand on disk, whatever they are."""
        length = self._header.l2_length
        return decode_table(self._file.read(table_offset, length).ljust(length, b"\0"))

    def _read(self, index: int, table_offset: int) -> array[int]:
        table = self.read_from_disk(table_offset)
        if self.strays_follow_formula and table[0] == STRAY_HEADER_WORD:
            self.strays.add(index)
            return self.computed(table_offset)
        return table
