"""The L2 tables of an open qcow2 disk by slices: read on demand, a bounded cache, and the changed ones.

A slice is the part of an L2 table that is read at once, 4 KiB or a whole smaller table. It maps one map unit, so slice
`n` of the disk maps unit `n`. A table of a large cluster is as large, and a disk of few writes touches little of it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import ChangedTable, decode
from tapfs.formats.qcow2.entries import BYTE_ORDER, OFFSET, TYPECODE, new_words
from tapfs.formats.qcow2.header import WORD, Header
from tapfs.formats.qcow2.l1 import L1Table
from tapfs.plan import Step, Write

#: Bytes of unchanged slices that are kept.
CACHE_BYTES = 4 << 20


class Slices:
    """The slices of one disk, by map unit.

    `file_size` bounds where tables may be; a writer moves it as it allocates. `l1_offset` is for messages.
    """

    def __init__(self, file: HostFile, header: Header, l1: L1Table, l1_offset: int) -> None:
        self._file = file
        self._header = header
        self._slices, self._slice_bytes = header.slices, header.slice_bytes
        self._l1 = l1
        self._l1_offset = l1_offset
        self.file_size = file.size()
        self._clean: OrderedDict[int, array[int]] = OrderedDict()
        self.changed: dict[int, ChangedTable] = {}
        #: The numbers of those that were asked for to be changed since the last plan, or the last addition to it.
        self.recent: set[int] = set()

    def place(self, unit: int) -> int:
        """The host offset of a slice, 0 where there is no table.

        Raises ImageError(corrupt) where the L1 entry cannot be true.
        """
        index, part = divmod(unit, self._slices)
        table = self._l1.table(index)
        if table == 0:
            return 0
        wrong = self.table_fault(table)
        if wrong is not None:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"L1 entry {index}: {wrong}",
                path=self._file.path,
                offset=self._l1_offset + WORD * index,
                op="map",
            )
        return table + part * self._slice_bytes

    def load(self, unit: int) -> array[int] | None:
        """The words of a slice, None where there is no table; not to be changed. Raises as `place` does."""
        changed = self.changed.get(unit)
        if changed is not None:
            return changed.entries
        clean = self._clean.get(unit)
        if clean is not None:
            self._clean.move_to_end(unit)
            return clean
        place = self.place(unit)
        if place == 0:
            return None
        clean = self.read_from_disk(place)
        self._keep(unit, clean)
        return clean

    def change(self, unit: int) -> ChangedTable:
        """A slice whose table exists, to be changed."""
        self.recent.add(unit)
        changed = self.changed.get(unit)
        if changed is None:
            words = self.load(unit)
            if words is None:
                raise AssertionError(f"unit {unit} has no table")
            self._clean.pop(unit, None)
            changed = self.changed[unit] = ChangedTable(words, BYTE_ORDER)
        return changed

    def move_table(self, index: int) -> None:
        """Have every slice of L1 entry `index` be written anew, because its table gets another place."""
        for unit in range(index * self._slices, (index + 1) * self._slices):
            changed = self.change(unit)
            changed.mark(0, len(changed.entries))

    def new_table(self, index: int) -> None:
        """The slices of an L1 entry that had no table: all of them are empty, and all are written."""
        words = self._slice_bytes // WORD
        for unit in range(index * self._slices, (index + 1) * self._slices):
            changed = self.changed[unit] = ChangedTable(new_words(words), BYTE_ORDER)
            self.recent.add(unit)
            changed.mark(0, words)

    def changed_between(self, first: int, stop: int) -> list[int]:
        """The units in ``[first, stop)`` whose slices differ from the disk."""
        if stop - first < len(self.changed):
            return [unit for unit in range(first, stop) if unit in self.changed]
        return [unit for unit in self.changed if first <= unit < stop]

    def changed_bytes(self) -> int:
        """Memory that the changed slices take."""
        return len(self.changed) * self._slice_bytes

    def begin_plan(self) -> None:
        """All that is pending is in the plan that is being made."""
        self.recent.clear()
        for changed in self.changed.values():
            changed.begin_plan()

    def added_steps(self) -> list[Step]:
        """The writes of what has changed since the last plan or addition, which is in the plan from now on."""
        recent, self.recent = self.recent, set()
        tables = ((self.table_offset(unit), self.changed.get(unit)) for unit in recent)
        return [Write(0, place + at, data) for place, each in tables if each for at, data in each.added_runs()]

    def plan_done(self) -> None:
        """What was in the plan is durable."""
        for unit in [unit for unit, changed in self.changed.items() if not changed.pending]:
            self._keep(unit, self.changed.pop(unit).entries)
        for changed in self.changed.values():
            changed.plan_done()

    def table_fault(self, table: int) -> str | None:
        """What makes the place of a table impossible, or None."""
        size = self._header.cluster_size
        if table % size:
            return f"L2 table at {table:#x} not aligned to a cluster"
        if table >= self.file_size:  # one that the end cuts goes on with zeros, as every cluster does
            return f"L2 table at {table:#x} past the end of the file ({self.file_size:#x})"
        if table < size:
            return f"L2 table at {table:#x} inside the header"
        return None

    def read_from_disk(self, place: int) -> array[int]:
        """The words of a slice as they stand on the disk."""
        length = self._slice_bytes
        return decode(self._file.read(place, length).ljust(length, b"\0"), TYPECODE, BYTE_ORDER)

    def table_offset(self, unit: int) -> int:
        """The host offset of a slice whose table is known to be right."""
        index, part = divmod(unit, self._slices)
        return (self._l1[index] & OFFSET) + part * self._slice_bytes

    def _keep(self, unit: int, words: array[int]) -> None:
        while self._clean and len(self._clean) * self._slice_bytes >= CACHE_BYTES:
            self._clean.popitem(last=False)
        self._clean[unit] = words
