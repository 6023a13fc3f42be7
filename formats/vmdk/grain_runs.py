"""Decode the entries of a grain table into runs: grains that are absent, zero, packed, or follow one another.

An entry is a sector of the host file. 0 is no grain, 1 a grain of zeros where the header allows such entries
(docs/specs/vmdk.md, "Sparse extent header (KDMV), 512 bytes").
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.extent import Kind
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.records import NamedTuple

#: The entries that are no place.
NO_GRAIN, ZERO_GRAIN = 0, 1


class Run(NamedTuple):
    """`grains` table entries from `first` on that are one extent; `sector` is the place of the first one, or 0."""

    first: int
    grains: int
    kind: Kind
    sector: int = 0

    @property
    def host_offset(self) -> int:
        """The place in bytes."""
        return self.sector * SECTOR

    def each(self, grain: int) -> Iterator[Run]:
        """Its entries as runs of their own, of grains of so many bytes."""
        for at in range(self.grains):
            yield Run(self.first + at, 1, self.kind, self.sector + at * grain // SECTOR if self.sector else 0)


class EntryRules(NamedTuple):
    """How the entries of an image are read: `step` is the length of a grain in sectors."""

    step: int
    zeroed: bool = False
    packed: bool = False

    def kind(self, entry: int) -> Kind:
        """The kind of a grain with this entry."""
        if entry == NO_GRAIN:
            return Kind.UNALLOCATED
        if entry == ZERO_GRAIN and self.zeroed:
            return Kind.ZERO
        return Kind.COMPRESSED if self.packed else Kind.DATA


def runs(table: array[int], rules: EntryRules, start: int = 0, stop: int | None = None) -> Iterator[Run]:
    """The entries ``[start, stop)`` of a table as runs, ascending and as long as possible."""
    end = len(table) if stop is None else stop
    index = start
    while index < end:
        entry = table[index]
        kind = rules.kind(entry)
        if kind == Kind.COMPRESSED:
            yield Run(index, 1, kind, entry)
            index += 1
            continue
        advance = rules.step if kind == Kind.DATA else 0
        after = index + 1
        expected = entry + advance
        # A whole run is usual (a filled, an empty table), so try that before stepping through.
        if after < end and table[end - 1] == entry + (end - 1 - index) * advance:
            whole = consecutive(table.typecode, entry, end - index, advance)
            if table[index:end] == whole:
                after = end
        while after < end and table[after] == expected:
            after += 1
            expected += advance
        yield Run(index, after - index, kind, entry if advance else 0)
        index = after


def consecutive(typecode: str, start: int, count: int, step: int) -> array[int]:
    """`count` entries from `start` on, each `step` after the one before."""
    if step == 0:
        return array(typecode, [start]) * count
    return array(typecode, range(start, start + count * step, step))


def packed_bound(grain: int) -> int:
    """The most bytes that a grain takes when it is packed by zlib: deflate adds little to what does not shrink."""
    return grain + (grain >> 12) + (grain >> 14) + 13
