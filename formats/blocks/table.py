"""The table of blocks of an open image: read by pages, a bounded cache, and the pages that differ from the disk."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator

from tapfs.driver import HostFile, HostSpace
from tapfs.formats.blank_pages import blank_entries
from tapfs.formats.blocks.layout import PAGE_BYTES, BlockLayout
from tapfs.formats.changed_table import ChangedTable, decode
from tapfs.plan import Step, Write

#: Bytes of unchanged pages that are kept.
_CACHE_BYTES = 2 << 20
#: Bytes that are read at once where a long run of free blocks is looked over.
_SCAN_BYTES = 1 << 20


class BlockTable:
    """The entries of all blocks of a disk. What the file has no bytes for is free."""

    def __init__(self, file: HostFile, layout: BlockLayout) -> None:
        self._file = file
        self._layout = layout
        self._per_page = PAGE_BYTES // layout.entry_bytes
        self._clean: OrderedDict[int, array[int]] = OrderedDict()
        self._changed: dict[int, ChangedTable] = {}

    def pieces(self, first: int, stop: int) -> Iterator[tuple[int, array[int]]]:
        """The entries of the blocks ``[first, stop)``: pairs of the first index and a copy, none across pages."""
        while first < stop:
            number, at = divmod(first, self._per_page)
            entries = self._page(number)[at : at + stop - first]
            yield first, entries
            first += len(entries)

    def set(self, first: int, entries: array[int]) -> None:
        """Change the entries of the blocks from `first` on."""
        done = 0
        while done < len(entries):
            number, at = divmod(first + done, self._per_page)
            count = min(len(entries) - done, self._per_page - at)
            page = self._changed.get(number)
            if page is None:
                page = self._changed[number] = ChangedTable(self._page(number), self._layout.order)
                self._clean.pop(number, None)
            page.entries[at : at + count] = entries[done : done + count]
            page.mark(at, at + count)
            done += count

    def blank_pages(self, first: int, stop: int) -> Iterator[HostSpace]:
        """The pages with entries of the blocks ``[first, stop)`` that are zeros, for which a host may have no space."""
        place = self._layout.table_offset
        for number in range(first // self._per_page, -(-stop // self._per_page)):
            page = self._page(number)
            at = number * self._per_page
            yield from blank_entries(place + number * PAGE_BYTES, page, max(0, first - at), min(len(page), stop - at))

    def free_until(self, first: int, stop: int) -> int:
        """The index of the first block in ``[first, stop)`` that is not free; `stop` where all are."""
        layout = self._layout
        count = self._per_page - first % self._per_page
        while first < stop:
            count = min(count, stop - first)
            entries = self._entries(first, count)
            free = layout.same(layout.free, len(entries))
            if entries != free:
                while (half := len(entries) // 2) > 0:
                    equal = entries[:half] == free[:half]
                    entries = entries[half:] if equal else entries[:half]
                    first += half if equal else 0
                return first
            first += count
            count = min(4 * max(count, self._per_page), _SCAN_BYTES // layout.entry_bytes)
        return stop

    def is_changed(self, first: int, stop: int) -> bool:
        """Whether an entry of the blocks ``[first, stop)`` lies in a page that differs from the disk."""
        if not self._changed:
            return False
        return any(page in self._changed for page in range(first // self._per_page, -(-stop // self._per_page)))

    @property
    def unflushed_bytes(self) -> int:
        """Memory that the changed pages take."""
        return len(self._changed) * PAGE_BYTES

    def begin_plan(self) -> None:
        """All that is pending is in the plan that is being made."""
        for page in self._changed.values():
            page.begin_plan()

    def steps(self) -> list[Step]:
        """The writes of a plan: all sectors that are in it."""
        at = self._layout.table_offset
        return [
            Write(0, at + number * PAGE_BYTES + offset, data)
            for number, page in sorted(self._changed.items())
            for offset, data in page.sector_runs()
        ]

    def plan_done(self) -> None:
        """What was in the plan is durable."""
        for number, page in list(self._changed.items()):
            page.plan_done()
            if not page.pending:
                del self._changed[number]
                self._keep(number, page.entries)

    def _page(self, number: int) -> array[int]:
        """The entries of a page; not to be changed."""
        changed = self._changed.get(number)
        if changed is not None:
            return changed.entries
        clean = self._clean.get(number)
        if clean is None:
            first = number * self._per_page
            clean = self._read(first, min(self._per_page, self._layout.blocks - first))
            self._keep(number, clean)
        else:
            self._clean.move_to_end(number)
        return clean

    def _keep(self, number: int, entries: array[int]) -> None:
        while len(self._clean) * PAGE_BYTES >= _CACHE_BYTES:
            self._clean.popitem(last=False)
        self._clean[number] = entries

    def _entries(self, first: int, count: int) -> array[int]:
        """Entries, past the cache where they are many and none of them has changed."""
        if count <= self._per_page or self.is_changed(first, first + count):
            pieces = [entries for _, entries in self.pieces(first, first + count)]
            return sum(pieces[1:], pieces[0])
        return self._read(first, count)

    def _read(self, first: int, count: int) -> array[int]:
        layout = self._layout
        raw = self._file.read(layout.entry_place(first), count * layout.entry_bytes)
        entries = decode(raw[: len(raw) - len(raw) % layout.entry_bytes], layout.typecode, layout.order)
        if len(entries) < count:
            entries += layout.same(layout.free, count - len(entries))
        return entries
