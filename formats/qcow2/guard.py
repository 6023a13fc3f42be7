"""The places of an open qcow2 image's metadata, so that no guest data is ever written over it.

A damaged image may lead a write there: an entry that points at a table, or a refcount of 0 for a table that is in use.
Whoever is about to use a place for data asks first.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import pairwise

from tapfs.driver import HostFile
from tapfs.formats.changed_table import decode
from tapfs.formats.qcow2.bitmaps import Directory
from tapfs.formats.qcow2.entries import BYTE_ORDER, OFFSET, TYPECODE
from tapfs.formats.qcow2.header import MAX_HOST_SIZE, WORD, Header
from tapfs.formats.qcow2.snapshots import Snapshot
from tapfs.formats.rounding import round_up
from tapfs.records import NamedTuple
from tapfs.tables import GuardedPlaces

#: So many bytes of an L1 table of a snapshot are read at once.
_L1_PIECE = 1 << 20


class MetadataRange(NamedTuple):
    """``[start, stop)`` of the file and what lies there, with its article."""

    start: int
    stop: int
    what: str


class Guard:
    """Knows where metadata lies: some ranges, and many tables and blocks that are one cluster each."""

    def __init__(self, cluster_size: int, ranges: Sequence[MetadataRange], tables: Iterable[int]) -> None:
        self._cluster_size = cluster_size
        self._ranges = list(ranges)
        #: The number of changes that were made since it was opened.
        self.changes = 0
        self._tables = array(TYPECODE, sorted(place for place in tables if place < MAX_HOST_SIZE))

    def places(self) -> GuardedPlaces:
        """All of it, for the engine."""
        ranges: list[tuple[int, int]] = []
        for each in sorted(self._ranges):
            start, stop = min(each.start, MAX_HOST_SIZE), min(each.stop, MAX_HOST_SIZE)
            if ranges and start <= ranges[-1][1]:
                start, stop = ranges[-1][0], max(stop, ranges.pop()[1])
            ranges.append((start, stop))
        return GuardedPlaces(self._cluster_size, self._tables, tuple(ranges))

    def over(self, start: int, length: int) -> str | None:
        """What of the metadata lies in ``[start, start + length)``, or None."""
        for each in self._ranges:
            if start < each.stop and each.start < start + length:
                return each.what
        # A table that begins before the range may reach into it.
        at = bisect_left(self._tables, max(0, start - self._cluster_size + 1))
        if at < len(self._tables) and self._tables[at] < start + length:
            return f"the table or refcount block at {self._tables[at]:#x}"
        return None

    def add(self, table: int) -> None:
        """A table or block has been made there."""
        insort(self._tables, table)
        self.changes += 1

    def remove(self, start: int, length: int) -> None:
        """The range is free now: nothing of the metadata lies there any more."""
        first = bisect_left(self._tables, start)
        last = bisect_left(self._tables, start + length)
        kept = [each for each in self._ranges if not start <= each.start < start + length]
        if last > first or len(kept) < len(self._ranges):
            del self._tables[first:last]
            self._ranges = kept
            self.changes += 1

    def tangled(self) -> str | None:
        """Two tables that lie in one cluster, in words."""
        size = self._cluster_size
        # Snapshots may have one L1 table.
        wanted = [each for each in self._ranges if each.stop > each.start]
        names = {(each.start, each.stop): each.what for each in wanted}
        for (start, stop), following in pairwise(sorted(names)):
            if following[0] < round_up(stop, size):
                return f"{names[start, stop]} and {names[following]}"
        return None

    @property
    def end(self) -> int:
        """The first byte behind all of it."""
        last = self._tables[-1] + self._cluster_size if self._tables else 0
        return max([last, *(each.stop for each in self._ranges)])


def tables_of_snapshots(file: HostFile, header: Header, snapshots: Sequence[Snapshot]) -> set[int]:
    """The places of the L2 tables of snapshots. What of the file several L1 tables share is read once."""
    found: set[int] = set()
    seen = 0
    for start, length in sorted((each.l1_offset, each.l1_length) for each in snapshots):
        at = max(start, seen)
        seen = max(seen, start + length)
        while at < start + length:
            raw = file.read(at, min(_L1_PIECE, start + length - at))
            found.update(place & OFFSET for place in set(decode(raw[: len(raw) // WORD * WORD], TYPECODE, BYTE_ORDER)))
            if not raw:
                break
            at += len(raw)
    return {place for place in found if place and place % header.cluster_size == 0}


def guard_of(
    header: Header,
    fixed: Sequence[MetadataRange],
    snapshots: Sequence[Snapshot],
    directory: Directory | None,
    tables: Iterable[int],
) -> Guard:
    """The guard of an image: header, `fixed`, what belongs to snapshots and bitmaps, and the `tables` and blocks."""
    ranges = [MetadataRange(0, header.cluster_size, "the header"), *fixed]
    for each in snapshots:
        stop = each.l1_offset + each.l1_length
        ranges.append(MetadataRange(each.l1_offset, stop, f"the L1 table of snapshot {each.name or each.id}"))
    if snapshots:
        end = snapshots[-1].offset + snapshots[-1].length
        ranges.append(MetadataRange(header.snapshots_offset, end, "the table of snapshots"))
    if directory is not None:
        stop = directory.offset + directory.length
        ranges.append(MetadataRange(directory.offset, stop, "the directory of bitmaps"))
    return Guard(header.cluster_size, ranges, tables)
