"""The pages of 4 KiB in which metadata is read, changed and logged.

A page that differs from the disk is in one of the states of formats/README.md, "The life of a write": pending, or in
the plan that is being executed. Such a page stays in memory until it is durable; of the others the last ones are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from tapfs.driver import HostFile, HostSpace
from tapfs.formats.rounding import round_down
from tapfs.formats.vhdx.units import PAGE

#: Bytes of unchanged pages that are kept.
_CACHE_BYTES = 2 << 20
#: Pages that a reading of unchanged ones takes along.
_READ_PAGES = 16


class Pages:
    """The metadata of one file, by the host offsets of pages. A page past the end of the file reads as zeros."""

    def __init__(self, file: HostFile) -> None:
        self._file = file
        self._clean: OrderedDict[int, bytes] = OrderedDict()
        self.changed: dict[int, bytearray] = {}
        self._pending: set[int] = set()
        self._in_plan: set[int] = set()

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at a host offset as they will be once all changes are on the disk."""
        start, stop = round_down(offset, PAGE), -(-(offset + length) // PAGE) * PAGE
        if stop - start > _READ_PAGES * PAGE:
            found = bytearray(self._file.read(offset, length).ljust(length, b"\0"))
            for at in self._changed_between(start, stop):
                first, last = max(at, offset), min(at + PAGE, offset + length)
                found[first - offset : last - offset] = self.changed[at][first - at : last - at]
            return bytes(found)
        pages = b"".join(self._page(at) for at in range(start, stop, PAGE))
        return pages[offset - start : offset - start + length]

    def word(self, offset: int) -> int:
        """The little-endian word of 8 bytes at an aligned host offset."""
        at = offset % PAGE
        return int.from_bytes(self._page(offset - at)[at : at + 8], "little")

    def set_word(self, offset: int, word: int) -> None:
        """Change the word at an aligned host offset."""
        at = offset % PAGE
        self.change(offset - at)[at : at + 8] = word.to_bytes(8, "little")

    def change(self, offset: int) -> bytearray:
        """The page at a host offset, a multiple of 4 KiB, which the caller changes."""
        page = self.changed.get(offset)
        if page is None:
            page = self.changed[offset] = bytearray(self._page(offset))
            self._clean.pop(offset, None)
        self._pending.add(offset)
        return page

    def blank(self, offset: int, length: int) -> Iterator[HostSpace]:
        """The pages of a range that are zeros, for which a full host may have no space."""
        for at in range(round_down(offset, PAGE), offset + length, PAGE):
            page = self._page(at)
            if page.count(0) == len(page):
                yield HostSpace(at, PAGE)

    def differs(self, offset: int, length: int) -> bool:
        """Whether a page of the range differs from the disk."""
        return bool(self._changed_between(round_down(offset, PAGE), offset + length))

    def _changed_between(self, start: int, stop: int) -> list[int]:
        if (stop - start) // PAGE < len(self.changed):
            return [at for at in range(start, stop, PAGE) if at in self.changed]
        return [at for at in self.changed if start <= at < stop]

    @property
    def changed_bytes(self) -> int:
        """The memory of pages that differ from the disk."""
        return len(self.changed) * PAGE

    def begin_plan(self) -> list[int]:
        """All that is pending is in the plan that is being made: the offsets of all pages in it, ascending."""
        self._in_plan |= self._pending
        self._pending = set()
        return sorted(self._in_plan)

    def plan_done(self) -> None:
        """The pages of the last plan are durable."""
        for at in self._in_plan - self._pending:
            self._keep(at, bytes(self.changed.pop(at)))
        self._in_plan = set()

    def _page(self, offset: int) -> bytes | bytearray:
        changed = self.changed.get(offset)
        if changed is not None:
            return changed
        page = self._clean.get(offset)
        if page is None:
            page = self._file.read(offset, PAGE).ljust(PAGE, b"\0")
            self._keep(offset, page)
        else:
            self._clean.move_to_end(offset)
        return page

    def _keep(self, offset: int, page: bytes) -> None:
        while len(self._clean) * PAGE >= _CACHE_BYTES:
            self._clean.popitem(last=False)
        self._clean[offset] = page
