"""A quick pass over all tables of an image, for one in which every cluster is plain, whole and claimed once.

One byte for each cluster of the file says that something claims it, so nothing is sorted and no entry is looked at by
itself. Whatever is out of the ordinary is left to the thorough way (:mod:`tapfs.formats.qcow.check`), which names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from tapfs.driver import ProgressCallback
from tapfs.formats.qcow.entries import decode_table
from tapfs.formats.qcow.header import ENTRY_LENGTH
from tapfs.marking import mark_units

if TYPE_CHECKING:
    from tapfs.formats.qcow.reader import QcowReader

#: A file of more clusters is not surveyed: the marks would take more memory than sorting does.
MAX_CLUSTERS = 64 << 20

#: Tables are read and marked so many bytes at a time.
_BYTES_AT_ONCE = 1 << 20


class Survey:
    """What the tables of an image claim, if it is `complete`: it is not where one of them claims what another does."""

    def __init__(self, image: QcowReader, file_size: int, progress: ProgressCallback | None) -> None:
        self._image = image
        self._header = image.header
        self._file_size = file_size
        cluster_size = self._header.cluster_size
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
        total = len(self._image.l1) * header.l2_length
        at_once = max(1, _BYTES_AT_ONCE // header.l2_length)
        used = self._image.l1.used()
        while tables := list(islice(used, at_once)):
            if progress is not None:
                progress(tables[0][0] * header.l2_length, total)
            if not self._take_tables(tables):
                return False
        if progress is not None:
            progress(total, total)
        return self._marks.count(1) == self._claimed

    def _take_tables(self, tables: list[tuple[int, int]]) -> bool:
        """Mark the clusters of the tables, each an index of L1 and a place, and their own.

        Whether all of them are plain and in the file.
        """
        header, marks, read = self._header, self._marks, self._image.file.read
        length = header.l2_length
        own = length >> header.cluster_bits
        for _, at in tables:
            if at % header.cluster_size or at + length > self._file_size:
                return False
            first = at >> header.cluster_bits
            marks[first : first + own] = b"\1" * own
        words = b"".join([read(at, length) for _, at in tables])
        if tables[-1][0] == self._last_table:  # it has entries past the end of the disk, which are nobody's
            words = words[: len(words) - length + ENTRY_LENGTH * self._last_entries]
        marked = mark_units(words, header.cluster_bits, marks)
        if marked is None:  # a compressed cluster, too
            return False
        if marked.greatest > self._last_whole:
            number, entry = divmod(decode_table(words).index(marked.greatest), header.l2_entries)
            self.cut = tables[number][0], entry
        self.data_clusters += marked.words
        self._claimed += marked.words + own * len(tables)
        return True
