"""References as data: how table entries refer to clusters, so that the engine counts them for a check.

A driver describes its entries (`EntryLayout`) and asks for a counter of them (`entry_counter`). Without the engine
there is none: the driver counts in Python, which is the reference of what the engine does. What an entry cannot mean is
left to the driver in either case, because only the driver can say what is wrong with it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import Protocol

from tapfs.records import NamedTuple, dataclass

#: More windows of a file than this are not noted one by one by the engine.
MAX_NOTED = 1 << 16
_ONE_BYTE, _TWO_BYTES = 0xFF, 0xFFFF


@dataclass(frozen=True, slots=True)
class EntryLayout:
    """Big-endian entries of 8 bytes, each of which refers to nothing, to a cluster or to a packed payload.

    An entry with a bit of `packed_mask` refers to the clusters of a payload at ``entry & packed_place_mask``. The field
    `packed_length_mask` at `packed_length_shift` counts its sectors of 512 bytes after the first, or its bytes with
    `packed_bytes`.

    Any other entry refers to the cluster at ``entry & place_mask``, a multiple of its size, or to nothing if that is 0.
    The cluster holds data unless a bit of `zero_mask` is set. The entry says by `owned_mask` that nobody else refers to
    it. With `bitmaps` a word of 32 allocated bits, from the lowest on, and 32 bits of zeros follows each entry.

    An entry is impossible with a bit of `impossible_mask`, a packed one with a bit of `packed_impossible_mask`. So is
    one whose place lies before `least_place`, past `file_size`, or in one of at most three `reserved` ranges.
    """

    cluster_bits: int
    file_size: int
    place_mask: int
    owned_mask: int
    packed_mask: int
    packed_place_mask: int
    packed_length_shift: int
    packed_length_mask: int
    zero_mask: int = 0
    impossible_mask: int = 0
    packed_impossible_mask: int = 0
    bitmaps: bool = False
    packed_bytes: bool = False
    least_place: int = 0
    reserved: tuple[tuple[int, int], ...] = ()


class CountedBlock(NamedTuple):
    """How often each of a row of clusters was counted: numbers of `width` (1 or 2) bytes of the machine.

    The row has a `number`: a row of `n` clusters begins with cluster ``number * n``.
    """

    number: int
    counts: bytes
    width: int

    @property
    def clusters(self) -> int:
        """How many clusters there are."""
        return len(self.counts) // self.width

    def counted(self) -> Iterator[tuple[int, int]]:
        """``(number in the row, count)`` of each cluster that was counted at all."""
        numbers = memoryview(self.counts).cast("B" if self.width == 1 else "H")
        return ((at, times) for at, times in enumerate(numbers) if times)


class CountedWindow:
    """The clusters of a file with numbers ``[base, base + clusters)``, each with a count of references.

    A file is counted in windows of ``2 ** window_bits`` clusters, the last one shorter. Each counter has one byte until
    one of them would reach 255. Then each has two, and stays at 65535 whatever comes.
    """

    def __init__(self, number: int, window_bits: int, file_clusters: int) -> None:
        self.number = number
        self.window_bits = window_bits
        self.base = number << window_bits
        self.clusters = max(0, min(1 << window_bits, file_clusters - self.base))
        #: Bytes of one counter; those of two are in the byte order of the machine.
        self.width = 1
        self.counts = bytearray(self.clusters)
        #: One byte for each window of the file that has a number below `MAX_NOTED`: 1 where references lead to it.
        self.noted = bytearray(min(MAX_NOTED, (max(0, file_clusters - 1) >> window_bits) + 1))
        self._further: set[int] = set()
        #: Bytes of data that entries refer to, a packed payload with its own length.
        self.data_bytes = 0
        #: Entries that refer to a cluster and do not say that they own it.
        self.shared = 0
        #: Whether the engine counts no entry that says that it owns its cluster.
        self.skips_owned = False

    @property
    def others(self) -> set[int]:
        """The numbers of the other windows that references lead to."""
        found = self._further | {number for number, noted in enumerate(self.noted) if noted}
        return found - {self.number}

    def add(self, first: int, clusters: int, times: int) -> None:
        """Count references to clusters of the file, so many to each."""
        last = first + clusters - 1
        if first >> self.window_bits != self.number or last >> self.window_bits != self.number:
            self._further.update(range(first >> self.window_bits, (last >> self.window_bits) + 1))
        low, high = max(first - self.base, 0), min(last + 1 - self.base, self.clusters)
        if low >= high:
            return
        if self.width == 1:
            part = self.counts[low:high]
            if times < _ONE_BYTE and part.count(0) == len(part):  # a run of clusters is usual
                self.counts[low:high] = bytes([times]) * (high - low)
                return
            if max(part) + times < _ONE_BYTE:
                self.counts[low:high] = bytes([count + times for count in part])
                return
            self.widen()
        words = memoryview(self.counts).cast("H")
        for at in range(low, high):
            words[at] = min(words[at] + times, _TWO_BYTES)

    def widen(self) -> None:
        """Count in two bytes from now on."""
        if self.width == 1:
            wide = bytearray(2 * self.clusters)
            wide[0 if sys.byteorder == "little" else 1 :: 2] = self.counts
            self.counts, self.width = wide, 2

    def blocks(self, clusters: int) -> Iterator[CountedBlock]:
        """The counts in rows of so many clusters, of which the window has whole ones; those that are all 0 left out.

        The last row may be shorter.
        """
        step = clusters * self.width
        for at in range(0, len(self.counts), step):
            counts = bytes(self.counts[at : at + step])
            if counts.count(0) != len(counts):
                yield CountedBlock(self.base // clusters + at // step, counts, self.width)

    def references(self, first: int, stop: int) -> array[int]:
        """The counts of the clusters with these numbers, which are in the window."""
        low, high = (first - self.base) * self.width, (stop - self.base) * self.width
        return array("B" if self.width == 1 else "H", self.counts[low:high])


class TableKind(IntEnum):
    """What the entries of a table are worth that say that they own their cluster. The engine's C enum has the same."""

    #: Nothing: the table is a snapshot's.
    FOREIGN = 0
    OWN = 1
    #: They are wrong: several places of the disk have the table.
    SHARED = 2
    #: All entries that are not packed own their cluster, whatever they say.
    SOLE = 3


class OwnedClusters:
    """The clusters of a window of a file, a bit each: whether an entry owns it, and whether others refer to it.

    The window is that of `CountedWindow`. A bit takes an eighth of a counter, so the bits of many clusters fit a
    processor's cache. Counters that are hit at random do not.
    """

    def __init__(self, number: int, window_bits: int, file_clusters: int) -> None:
        self.number = number
        self.window_bits = window_bits
        self.base = number << window_bits
        self.clusters = max(0, min(1 << window_bits, file_clusters - self.base))
        #: Bit ``n % 8`` of byte ``n // 8`` is that of the n-th cluster of the window.
        self.alone = bytearray(-(-self.clusters // 8))
        self.others_marks = bytearray(-(-self.clusters // 8))
        #: As those of `CountedWindow`.
        self.noted = bytearray(min(MAX_NOTED, (max(0, file_clusters - 1) >> window_bits) + 1))
        self._further: set[int] = set()
        #: Entries that refer to a cluster and do not own it.
        self.shared = 0
        #: Whether the entry at which `EntryCounter.mark_owners` ended shares what it or another one owns.
        self.doubled = False

    @property
    def others(self) -> set[int]:
        """The numbers of the other windows that references lead to."""
        found = self._further | {number for number, noted in enumerate(self.noted) if noted}
        return found - {self.number}

    def add(self, first: int, clusters: int, *, owned: bool) -> bool:
        """Note a reference to each of these clusters. False if one is owned, by this reference or before."""
        self.shared += not owned
        last = first + clusters - 1
        if first >> self.window_bits != self.number or last >> self.window_bits != self.number:
            self._further.update(range(first >> self.window_bits, (last >> self.window_bits) + 1))
        for at in range(max(first - self.base, 0), min(last + 1 - self.base, self.clusters)):
            index, bit = at >> 3, 1 << (at & 7)
            if self.alone[index] & bit or (owned and self.others_marks[index] & bit):
                return False
            (self.alone if owned else self.others_marks)[index] |= bit
        return True


class EntryCounter(Protocol):
    """Counts what entries of one layout refer to."""

    def count(self, entries: bytes, first: int, stop: int, times: int, window: CountedWindow) -> int:
        """Count the entries ``[first, stop)`` of a table, each so many times.

        It ends at one that is impossible, or leads to a window without a byte in `noted`: the index, otherwise `stop`.
        """
        ...

    def mark_owners(self, entries: bytes, first: int, stop: int, kind: TableKind, owners: OwnedClusters) -> int:
        """Note what the entries ``[first, stop)`` of a table refer to.

        It ends at one that is impossible, that leads to a window without a byte in `noted`, or that makes `doubled`
        true: the index, otherwise `stop`.
        """
        ...

    def overlapping_payload(self, tables: Callable[[], Iterable[tuple[bytes, int]]]) -> int | None:
        """The place of a payload that begins inside another one, None where all lie apart.

        `tables` gives each table with the number of its entries, and may be called again. Entries that are impossible
        are passed over.
        """
        ...

    def find_ownership(self, entries: bytes, first: int, stop: int, base: int, alone: bytearray) -> int:
        """The first entry that is impossible, or says otherwise than `alone` whether it owns its cluster; or `stop`.

        `alone` has a byte for each cluster from number `base` on, 0 for no. Entries to other clusters are passed over.
        """
        ...

    def mark_owned(self, entries: bytearray, base: int, alone: bytearray) -> int:
        """Have each entry say that it owns its cluster where `alone` says so; how many were changed.

        Entries that are impossible, and those to clusters elsewhere, stay as they are.
        """
        ...


class CountChanger(Protocol):
    """Changes counters as they stand on a disk, of ``2 ** order`` bits each, big-endian or from a byte's lowest bit on.

    Counter 0 is that of the first cluster of the block. `sectors` gets a 1 for each 512 bytes in which one changed.
    """

    def raise_counts(self, counters: array[int], order: int, block: CountedBlock, sectors: bytearray) -> int:
        """Add the counts of the block; how many clusters are done.

        It ends at the first one with a counter of 0, or one that would get too large: that and those behind stay.
        """
        ...

    def find_uncounted(self, counters: bytes, order: int, first: int, count: int, marks: bytearray, mark: int) -> int:
        """The first of `count` counters from number `first` on that is 0 though its mark is set; or `count`.

        Mark number `mark` is that of the first one: bit ``mark % 8`` of byte ``mark // 8``.
        """
        ...

    def lower_counts(
        self, counters: array[int], order: int, block: CountedBlock, sectors: bytearray, freed: bytearray
    ) -> None:
        """Take the counts of the block away, down to 0. `freed` gets a 1 for each cluster whose counter became 0."""
        ...


_maker: Callable[[EntryLayout], EntryCounter] | None = None
_changer: CountChanger | None = None


def entry_counter(layout: EntryLayout) -> EntryCounter | None:
    """A counter of entries, None where the engine is not loaded."""
    return None if _maker is None else _maker(layout)


def count_changer() -> CountChanger | None:
    """What changes counters, None where the engine is not loaded."""
    return _changer


def use_counter(maker: Callable[[EntryLayout], EntryCounter] | None, changer: CountChanger | None = None) -> None:
    """Count by the counters that this makes, and change counters by `changer`, from now on."""
    global _maker, _changer  # functions of the process, which only become faster
    _maker, _changer = maker, changer
