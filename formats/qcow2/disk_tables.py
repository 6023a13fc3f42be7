"""The tables of one disk of a qcow2 image, the current one or a snapshot's: what they refer to, and their bits.

A cluster counts once for each L1 entry and L2 entry that leads to it. The bit "owned alone" (COPIED) of an entry says
that its cluster has the count 1. In the tables of a snapshot nobody looks at it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import decode
from tapfs.formats.qcow2.edited_image import EditedImage, changed_sectors
from tapfs.formats.qcow2.entries import BYTE_ORDER, COMPRESSED, COPIED, OFFSET, TYPECODE, compressed_place
from tapfs.formats.qcow2.header import WORD
from tapfs.formats.qcow2.l1 import L1Table
from tapfs.formats.qcow2.refcounts import ClusterRun
from tapfs.plan import Step

#: COPIED is the highest bit of the first byte of a word.
_CLEARED = bytes(byte & 0x7F for byte in range(256))
#: So many runs of clusters are put in order at a time.
_RUNS_AT_ONCE = 100_000
#: Of so many refcount blocks it is kept which clusters are owned alone.
_BLOCKS_KEPT = 1024


class DiskTables:
    """The L1 table of a disk and the L2 tables that it leads to."""

    def __init__(self, image: EditedImage, l1: L1Table) -> None:
        self._image = image
        self._l1 = l1
        self._bits = image.header.cluster_bits
        self._entry_bytes = image.header.l2_entry_bytes
        self._alone: dict[int, bytes] = {}

    def places(self) -> list[int]:
        """The host offsets of the L2 tables, in the order of the L1 table."""
        return [entry & OFFSET for _, entry in self._l1.used() if entry & OFFSET]

    def references(self) -> Iterator[list[ClusterRun]]:
        """Every reference that the tables have, as lists of bounded length whose runs ascend.

        A cluster that is referred to again is there again. Raises ImageError(corrupt).
        """
        waiting: list[ClusterRun] = []
        for place in self.places():
            waiting.append(ClusterRun(place >> self._bits, 1))
            waiting += self._of_table(place)
            if len(waiting) >= _RUNS_AT_ONCE:
                yield _joined(waiting)
                waiting = []
        if waiting:
            yield _joined(waiting)

    def l1_without_bits(self) -> L1Table:
        """A copy of the L1 table in which no entry says that its table is owned alone."""
        return L1Table(_without_bits(bytes(self._l1.raw), WORD))

    def clear_bits(self) -> Iterator[Step]:
        """Writes after which no entry of the L2 tables says that its cluster is owned alone."""
        for place in dict.fromkeys(self.places()):
            raw = self._read(place)
            yield from changed_sectors(place, raw, _without_bits(raw, self._entry_bytes))

    def set_bits(self) -> Iterator[Step]:
        """Writes after which the entries of L2 tables say that their clusters are owned alone where that is so.

        A table that is shared refers to nothing that is owned alone.
        """
        for place in self.places():
            if not self._is_alone(place >> self._bits):
                continue
            raw = self._read(place)
            words = decode(raw, TYPECODE, BYTE_ORDER)
            changed = bytearray(raw)
            for index in range(0, len(words), self._entry_bytes // WORD):
                word = words[index]
                unmarked = word & OFFSET and not word & (COMPRESSED | COPIED)
                if unmarked and self._is_alone((word & OFFSET) >> self._bits):
                    changed[index * WORD] |= 0x80
            yield from changed_sectors(place, raw, changed)

    def l1_with_bits(self) -> L1Table:
        """A copy of the L1 table whose entries say that their tables are owned alone where that is so."""
        changed = L1Table(bytearray(self._l1.raw))
        for index, entry in self._l1.used():
            if entry & OFFSET and self._is_alone((entry & OFFSET) >> self._bits):
                changed[index] = entry | COPIED
        return changed

    # -- inside ---------------------------------------------------------------------------------

    def _read(self, place: int) -> bytes:
        size = 1 << self._bits
        return self._image.file.read(place, size).ljust(size, b"\0")

    def _of_table(self, place: int) -> Iterator[ClusterRun]:
        """What the entries of one L2 table refer to."""
        words = decode(self._read(place), TYPECODE, BYTE_ORDER)[:: self._entry_bytes // WORD]
        bits, size = self._bits, self._image.file.size()
        index, stop = 0, len(words)
        while index < stop:
            word = words[index]
            index += 1
            if word & COMPRESSED:
                start, length = compressed_place(word, bits)
                # The sectors that the entry names are an upper bound, and the file may end before.
                last = min(start + length, max(start + 1, size)) - 1
                yield ClusterRun(start >> bits, (last >> bits) - (start >> bits) + 1)
                continue
            host = word & OFFSET
            if not host:
                continue
            if host & ((1 << bits) - 1):
                raise self._error(place + (index - 1) * self._entry_bytes, f"cluster at {host:#x} not aligned")
            after = index
            if after < stop and (words[stop - 1] - word) >> bits == stop - index:  # perhaps all of the rest
                rest = array(TYPECODE, range(word, word + (stop - index + 1 << bits), 1 << bits))
                after = stop if rest == words[index - 1 : stop] else index
            expected = host + (after - index + 1 << bits)
            while after < stop and words[after] & (OFFSET | COMPRESSED) == expected:
                after += 1
                expected += 1 << bits
            yield ClusterRun(host >> bits, after - index + 1)
            index = after

    def _is_alone(self, cluster: int) -> bool:
        """Whether the count of a cluster is 1."""
        refcounts = self._image.refcounts
        index, inside = divmod(cluster, refcounts.per_block)
        known = self._alone.get(index)
        if known is None:
            block = refcounts.block(index)
            numbers = b"" if block is None else refcounts.counting.numbers(block.tobytes())
            known = bytes(number == 1 for number in numbers)
            if len(self._alone) >= _BLOCKS_KEPT:
                self._alone.clear()
            self._alone[index] = known
        return inside < len(known) and known[inside] != 0

    def _error(self, offset: int, message: str) -> ImageError:
        return ImageError(ErrorKind.CORRUPT, message, path=self._image.file.path, offset=offset, op="read the tables")


def _joined(runs: list[ClusterRun]) -> list[ClusterRun]:
    """The runs in order; those that continue each other as one."""
    found: list[ClusterRun] = []
    runs.sort()
    first, stop = runs[0].first, runs[0].first
    for run in runs:
        if run.first == stop:
            stop += run.clusters
            continue
        found.append(ClusterRun(first, stop - first))
        first, stop = run.first, run.first + run.clusters
    found.append(ClusterRun(first, stop - first))
    return found


def _without_bits(raw: bytes, entry_bytes: int) -> bytearray:
    changed = bytearray(raw)
    changed[::entry_bytes] = bytes(changed[::entry_bytes]).translate(_CLEARED)
    return changed
