"""A quick pass over all tables of an image, for one in which every cluster is plain, whole and claimed once.

One byte for each cluster of the file says that something claims it, so nothing is sorted and no entry is looked at by
itself. Whatever is out of the ordinary is left to the thorough way (:mod:`tapfs.formats.qcow.check`), which names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tapfs.driver import ProgressCallback

if TYPE_CHECKING:
    from tapfs.formats.qcow.reader import QcowReader

#: A file of more clusters is not surveyed: the marks would take more memory than sorting does.
MAX_CLUSTERS = 64 << 20

_PROGRESS_TABLES = 256


class Survey:
    """What the tables of an image claim, if it is `complete`: it is not where one of them claims what another does."""

    def __init__(self, image: QcowReader, file_size: int, progress: ProgressCallback | None) -> None:
        self._image = image
        self._header = image.header
        self._file_size = file_size
        # Asked for once: a table costs no more than its entries.
        cluster_size = self._header.cluster_size
        self._cluster_bits = self._header.cluster_bits
        self._unaligned_bits = cluster_size - 1
        self._last_whole = file_size - cluster_size
        self._last_table = len(image.l1) - 1
        self._last_entries = -(-(self._header.size - self._last_table * self._header.unit) // cluster_size)
        self._count = -(-file_size // cluster_size)
        self._claimed = 0
        #: Clusters that hold data of the disk.
        self.data_clusters = 0
        #: Table and entry of the cluster that the end of the file cuts, if there is one.
        self.cut: tuple[int, int] | None = None
        self._marks = bytearray(0)
        possible = not image.follows_formula and self._count <= MAX_CLUSTERS
        whole_tables = self._header.l2_length % self._header.cluster_size == 0
        self.complete = possible and whole_tables and self._take_all(progress)

    def is_claimed(self, start: int, end: int) -> bool:
        """Whether a table or cluster lies in this range of the file."""
        size = self._header.cluster_size
        return self._marks.find(1, start // size, -(-end // size)) >= 0

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The ``(offset, length)`` ranges of the file that tables and clusters claim, ascending and long."""
        size = self._header.cluster_size
        start = self._marks.find(1)
        while start >= 0:
            stop = self._marks.find(0, start)
            stop = self._count if stop < 0 else stop
            yield start * size, (stop - start) * size
            start = self._marks.find(1, stop)

    def _take_all(self, progress: ProgressCallback | None) -> bool:
        header = self._header
        self._marks = bytearray(self._count)
        clusters = header.l2_length >> header.cluster_bits
        total = len(self._image.l1) * header.l2_length
        for number, (index, entry) in enumerate(self._image.l1.used()):
            if progress is not None and number % _PROGRESS_TABLES == 0:
                progress(index * header.l2_length, total)
            if entry % header.cluster_size or entry + header.l2_length > self._file_size:
                return False
            first = entry >> header.cluster_bits
            self._marks[first : first + clusters] = b"\1" * clusters
            self._claimed += clusters
            if not self._take_table(index, entry):
                return False
        if progress is not None:
            progress(total, total)
        return self._marks.count(1) == self._claimed

    def _take_table(self, index: int, at: int) -> bool:
        """Mark the clusters of a table; whether all of them are plain and in the file."""
        table = self._image.tables.read_from_disk(at)
        # The last table has entries past the end of the disk, which are nobody's.
        used = list(filter(None, table if index < self._last_table else table[: self._last_entries]))
        if not used:
            return True
        last = max(used)
        if last >= self._file_size:  # a compressed one, too
            return False
        if last > self._last_whole:
            self.cut = index, table.index(last)
        if any(map(self._unaligned_bits.__and__, used)):
            return False
        marks, bits = self._marks, self._cluster_bits
        for entry in used:
            marks[entry >> bits] = 1
        self.data_clusters += len(used)
        self._claimed += len(used)
        return True
