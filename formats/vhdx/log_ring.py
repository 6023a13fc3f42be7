"""The log of an image that is being written: the places of its entries, and which of them a crash would still need.

The log is a ring of sectors of 4 KiB. Three rules keep a crash from leaving a log that cannot be replayed:

* An entry stands alone: its tail is itself. A plan that is made again after a failure has all pages of the failed one.
* An entry never goes over one that a crash may need: the last one that is durable, and those that failed plans have
  written since. Whether a plan has written its entries shows in the file.
* The first entry of a log changes nothing. It is durable before a header names the log.
"""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vhdx.header import Header
from tapfs.formats.vhdx.log_entry import HEADER_BYTES, EntryHeader, LoggedPage, entry_bytes, pack_entry
from tapfs.formats.vhdx.units import PAGE
from tapfs.plan import Step, Write
from tapfs.records import NamedTuple

#: An entry takes at most one of so many parts of the ring: so it fits beside those that are kept.
_PARTS = 4


class _Written(NamedTuple):
    """An entry of a plan: the first sector, the first one after it, and its first bytes."""

    first: int
    stop: int
    head: bytes


class LogRing:
    """The ring of one open image. Positions count sectors from its start, and go on where it begins anew."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._offset = header.log_offset
        self._sectors = header.log_length // PAGE
        self._sequence = 1
        #: The first sector that is kept, and the first that is free.
        self._tail = self._next = 0
        #: The entries of the last plan, while it is not known what became of it.
        self._written: list[_Written] = []

    @property
    def most_pages(self) -> int:
        """The most pages that an entry may have."""
        sectors = (self._sectors - 1) // _PARTS
        pages = sectors - 1
        while entry_bytes(pages) > sectors * PAGE:
            pages -= 1
        return pages

    def begin_plan(self) -> None:
        """A plan is being made. What the one before has written is kept; what it has not written is free."""
        seen = [entry for entry in self._written if self._is_there(entry)]
        self._written = []
        if seen:
            self._next = seen[-1].stop
        if len(seen) > 1:
            # That the last one was begun shows that the one before it was durable, with all that it logs.
            self._tail = seen[-2].first

    def plan_done(self) -> None:
        """The last plan is durable: of its entries only the last one is still needed."""
        if self._written:
            self._tail, self._next = self._written[-1].first, self._written[-1].stop
        self._written = []

    def entry(self, log: bytes, pages: Sequence[LoggedPage], *, flushed_bytes: int, last_bytes: int) -> list[Step]:
        """The writes of the next entry of the plan, with at most `most_pages` pages.

        The file has `flushed_bytes`, durably, when they are executed, and needs `last_bytes`. The entry before it in
        the same plan is durable by then. Raises ImageError(io) where failed plans have filled the ring.
        """
        sectors = entry_bytes(len(pages)) // PAGE
        first = self._written[-1].stop if self._written else self._next
        kept = self._written[-1].first if self._written else self._tail
        if first + sectors - kept > self._sectors - 1:
            raise ImageError(
                ErrorKind.IO,
                "the log is full of changes whose flush has failed",
                path=self._file.path,
                offset=self._offset,
                op="flush",
                remedy="open the image anew: what was flushed is safe",
            )
        place = first % self._sectors * PAGE
        raw = pack_entry(
            EntryHeader(0, 0, place, self._sequence, 0, log, flushed_bytes, last_bytes),
            pages,
        )
        self._sequence += 1
        self._written.append(_Written(first, first + sectors, raw[:HEADER_BYTES]))
        before_end = self._sectors * PAGE - place
        steps: list[Step] = [Write(0, self._offset + place, raw[:before_end])]
        if raw[before_end:]:
            steps.append(Write(0, self._offset, raw[before_end:]))
        return steps

    def _is_there(self, entry: _Written) -> bool:
        at = self._offset + entry.first % self._sectors * PAGE
        return self._file.read(at, HEADER_BYTES) == entry.head
