"""Count the references to each cluster of a qcow2 file, or mark their owners: by the engine where an entry is plain.

The engine ends at an entry that cannot be true. That one is decoded by :mod:`tapfs.formats.qcow2.references`, which
tells what is wrong with it, and the engine goes on behind it. Without the engine all entries are decoded so.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.driver import ProgressCallback
from tapfs.formats.qcow2.counted_entries import WINDOW_BITS, counter_of
from tapfs.formats.qcow2.entries import OFFSET
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.references import References, TableUse
from tapfs.references import CountedWindow, OwnedClusters, TableKind

_PROGRESS_TABLES = 64


class Tally:
    """Counts references window by window, and looks at what entries say of their clusters."""

    def __init__(self, image: Qcow2Reader, references: References) -> None:
        self.image = image
        self._references = references
        self._entries = image.header.l2_entries
        self.file_clusters = -(-image.file.size() >> image.header.cluster_bits)
        self._counter = counter_of(image)
        #: Bytes of guest data of the current disk, and how many of its entries do not own their cluster.
        self.data_bytes = self.shared = 0

    def window(self, number: int, progress: ProgressCallback | None = None) -> CountedWindow:
        """The references to the clusters of a window. Faults are told of each time."""
        window = CountedWindow(number, WINDOW_BITS, self.file_clusters)
        references = self._references
        references.begin()
        for each in references.fixed():
            window.add(each.first, each.clusters, each.times)
        total = len(references.tables)
        data_bytes = shared = 0
        bits = self.image.header.cluster_bits
        for at, use in enumerate(references.tables):
            if progress is not None and at % _PROGRESS_TABLES == 0:
                progress(at, total)
            window.add(use.place >> bits, 1, use.times)
            self._count_table(use, window)
            if use.current:
                data_bytes, shared = window.data_bytes, window.shared
            window.data_bytes, window.shared = data_bytes, shared
        if progress is not None:
            progress(total, total)
        self.data_bytes, self.shared = data_bytes + references.allocated_bytes, shared
        return window

    def shared_entries(self, number: int) -> CountedWindow:
        """The references to the clusters of a window, of L2 entries alone, without those that own their cluster.

        One that cannot be decoded at once is counted even if it owns its cluster.
        """
        window = CountedWindow(number, WINDOW_BITS, self.file_clusters)
        for use in self._references.tables:
            window.skips_owned = _kind(use) is TableKind.OWN
            self._count_table(use, window)
        return window

    def mark_owners(self, owners: OwnedClusters) -> tuple[int, int] | None:
        """Mark what all L2 entries refer to in a window; the first that shares what it or another one owns.

        That is its number in its table, and its place in the file.
        """
        for use in self._references.tables:
            found = self._mark_table(use, owners, _kind(use))
            if found is not None:
                return found, use.place + found * self.image.header.l2_entry_bytes
        return None

    def metadata_owners(self, number: int, window_bits: int) -> OwnedClusters:
        """A window of `window_bits` in which tables and all other metadata have their clusters."""
        owners = OwnedClusters(number, window_bits, self.file_clusters)
        self._references.begin()
        for each in self._references.fixed():
            owners.add(each.first, each.clusters, owned=True)
        for use in self._references.tables:
            owners.add(use.place >> self.image.header.cluster_bits, 1, owned=True)
        return owners

    def doubled_entries(self, owners: OwnedClusters) -> Iterator[tuple[int, int]]:
        """The entries of the disk whose cluster something has already: their places, and how many have their table.

        Each that is not compressed is marked as the owner of its cluster.
        """
        for use in self._references.tables:
            first = 0
            while use.current and first < self._entries:
                found = self._mark_table(use, owners, TableKind.SOLE, first)
                if found is None:
                    break
                yield use.place + found * self.image.header.l2_entry_bytes, use.times
                first = found + 1

    def wrong_owners(self, use: TableUse, base: int, alone: bytearray) -> list[int]:
        """The entries of a table that say otherwise than `alone` whether they own their cluster.

        Those of clusters elsewhere than in the window at `base` are left out.
        """
        found: list[int] = []
        raw = self._references.raw(use)
        at = 0
        words: array[int] | None = None
        while at < self._entries:
            stop = self._entries
            if self._counter is not None:
                at = self._counter.find_ownership(raw, at, self._entries, base, alone)
                stop = min(at + 1, self._entries)
            if at < stop:
                words = self._references.decoded(raw) if words is None else words
                found += self._wrong_between(use, words, at, stop, base, alone)
            at = stop
        return found

    # -- inside ---------------------------------------------------------------------------------

    def _mark_table(self, use: TableUse, owners: OwnedClusters, kind: TableKind, first: int = 0) -> int | None:
        raw = self._references.raw(use)
        at, step = first, self.image.header.l2_entry_bytes // 8
        words: array[int] | None = None
        while at < self._entries:
            stop = self._entries
            if self._counter is not None:
                at = self._counter.mark_owners(raw, at, self._entries, kind, owners)
                if owners.doubled:
                    return at
                stop = min(at + 1, self._entries)
            if at < stop:
                words = self._references.decoded(raw) if words is None else words
                for entry in range(at, stop):
                    if words[entry * step] and not self._mark_entry(use, words, entry, kind, owners):
                        return entry
            at = stop
        return None

    def _mark_entry(self, use: TableUse, words: array[int], at: int, kind: TableKind, owners: OwnedClusters) -> bool:
        placed = list(self._references.placed(use, words, at, at + 1))
        says = any(run.copied for run in placed)
        if says and kind is TableKind.SHARED:
            return False
        owned = says if kind is TableKind.OWN else kind is TableKind.SOLE and bool(placed)
        return all(
            owners.add(each.first, each.clusters, owned=owned)
            for each in self._references.of_entries(use, words, at, at + 1)
        )

    def _count_table(self, use: TableUse, window: CountedWindow) -> None:
        raw = self._references.raw(use)
        at = 0
        words: array[int] | None = None
        while at < self._entries:
            stop = self._entries
            if self._counter is not None:
                at = self._counter.count(raw, at, self._entries, use.times, window)
                stop = min(at + 1, self._entries)
            if at < stop:
                words = self._references.decoded(raw) if words is None else words
                for each in self._references.of_entries(use, words, at, stop):
                    window.add(each.first, each.clusters, each.times)
                # What was decoded here may share its cluster, so a look at the bits is due.
                window.shared += use.current
            at = stop

    def _wrong_between(
        self, use: TableUse, words: array[int], first: int, stop: int, base: int, alone: bytearray
    ) -> list[int]:
        header = self.image.header
        per_entry = header.l2_entry_bytes // 8
        found: list[int] = []
        for run in self._references.placed(use, words, first, stop):
            count = 1 if header.extended_l2 else run.length >> header.cluster_bits
            for at in range(run.first, run.first + count):
                cluster = ((words[at * per_entry] & OFFSET) >> header.cluster_bits) - base
                told = header.extended_l2 and found[-1:] == [at]  # by another run of its subclusters
                if 0 <= cluster < len(alone) and run.copied != bool(alone[cluster]) and not told:
                    found.append(at)
        return found


def _kind(use: TableUse) -> TableKind:
    if not use.current:
        return TableKind.FOREIGN
    return TableKind.OWN if use.times == 1 else TableKind.SHARED
