"""Check a qcow2 image: compare its refcounts with the references to each cluster, and both with the entries' bits.

The references are counted in an array over the file's clusters, in windows, so memory stays bounded however long the
file is. A leak is a cluster whose refcount is too high, a corruption one whose refcount is too low; each cluster
counts once, as `qemu-img check` counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from tapfs.driver import CheckReport, ProgressCallback, Severity
from tapfs.extent import Kind
from tapfs.formats.qcow2.counts import Counting
from tapfs.formats.qcow2.entries import COPIED, OFFSET
from tapfs.formats.qcow2.header import CORRUPT, DIRTY, INCOMPATIBLE_AT, SIZE_AT, WORD
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.references import References, TableUse

#: Clusters whose references are counted at a time: 64 MiB of counters.
WINDOW = 1 << 25
_LARGEST = 0xFFFF
_TYPECODE = "H"
_PROGRESS_TABLES = 64


class Mismatch(NamedTuple):
    """A cluster whose refcount is not what it should be."""

    cluster: int
    refcount: int
    references: int


class Check:
    """One check of one image; the result is in `report`."""

    def __init__(self, image: Qcow2Reader, progress: ProgressCallback | None = None) -> None:
        self._image = image
        self._progress = progress
        self.report = CheckReport()
        self._telling = True
        for finding in image.open_findings:
            self.report.add(*finding)
        self._note_header()
        self.references = References(image, self._fault)
        self._counting = Counting(image.header.refcount_order)
        self._table_words: tuple[int, array[int]] | None = None
        for mismatch in self.mismatches():
            self._tell(mismatch)
        self.report.allocated_bytes = self.references.allocated_bytes
        for message, offset in chain(self.cut_clusters(), self.wrong_bits()):
            self.report.add(Severity.CORRUPTION, message, offset)

    @property
    def largest(self) -> int:
        """The largest refcount that the image can have."""
        return self._counting.largest

    def mismatches(self) -> Iterator[Mismatch]:
        """The clusters whose refcounts are wrong, ascending in each window."""
        per_block = self._image.header.block_entries
        # Blocks say which windows there are besides those that are referred to.
        windows = {index * per_block // WINDOW for index in self.references.blocks}
        done: set[int] = set()
        waiting = {0}
        while waiting:
            window = waiting.pop()
            done.add(window)
            counted, others = self._count(window)
            self._telling = False
            waiting |= (others | windows) - done
            yield from self._compare(window, counted)
        self._telling = True

    def cut_clusters(self) -> Iterator[tuple[str, int]]:
        """The entries of the disk whose data the end of the file cuts: a message, the place."""
        image = self._image
        span = image.header.slices * image.header.unit
        for index, entry in image.l1.used() if self.references.cut else ():
            run = self.references.cut.get(entry & OFFSET)
            wrong = None if run is None else image.cut_fault(run, index * span)
            if run is not None and wrong is not None:
                place = (entry & OFFSET) + run.first * image.header.l2_entry_bytes
                yield f"L2 entry {run.first} of table {index}: {wrong}", place

    def wrong_bits(self) -> Iterator[tuple[str, int]]:
        """The entries of the current disk whose bit "owned alone" does not fit the refcount: a message, the place."""
        image = self._image
        if image.snapshot is not None:
            return
        for index, entry in image.l1.used():
            place = entry & OFFSET
            if place and image.slices.table_fault(place) is None and self._alone(place) != (entry & COPIED != 0):
                yield f"L1 entry {index}: {_bit_message(entry)}", image.l1_offset + WORD * index
        if image.header.has_data_file:
            return
        step = image.header.l2_entry_bytes
        per_entry = step // WORD
        self._telling = False
        for use in self.references.tables:
            if not use.current:
                continue
            words = self.references.words(use)
            for first, stop in self._placed(use, words):
                for at in range(first, stop):
                    word = words[at * per_entry]
                    if self._alone(word & OFFSET) != (word & COPIED != 0):
                        yield f"L2 entry {at}: {_bit_message(word)}", use.place + at * step
        self._telling = True

    # -- inside ---------------------------------------------------------------------------------

    def _placed(self, use: TableUse, words: array[int]) -> Iterator[tuple[int, int]]:
        """The entries with a place of their own whose bit may be wrong: those of a run are looked at together first."""
        bits = self._image.header.cluster_bits
        for run in self.references.runs(use, words):
            if run.kind is Kind.COMPRESSED or not run.host_offset:
                continue
            count = 1 if self._image.header.extended_l2 else run.length >> bits
            if not (run.copied and self._all_alone(run.host_offset >> bits, count)):
                yield run.first, run.first + count

    def _fault(self, message: str, offset: int | None) -> None:
        if self._telling:
            self.report.add(Severity.CORRUPTION, message, offset)

    def _note_header(self) -> None:
        image, report = self._image, self.report
        if image.header.incompatible & DIRTY:
            report.add(Severity.NOTE, "the image was not closed after writing", INCOMPATIBLE_AT)
        if image.header.incompatible & CORRUPT:
            report.add(Severity.NOTE, "the image is marked as corrupt", INCOMPATIBLE_AT)
        lost = image.header.size % 512
        if lost:
            report.add(Severity.NOTE, f"size is no multiple of 512: QEMU does not show the last {lost} bytes", SIZE_AT)

    def _count(self, window: int) -> tuple[array[int], set[int]]:
        """The references to the clusters of a window, and the other windows that are referred to."""
        base = window * WINDOW
        clusters = max(0, min(WINDOW, -(-self._image.file.size() >> self._image.header.cluster_bits) - base))
        counted = array(_TYPECODE, bytes(2 * clusters))
        others: set[int] = set()
        total = len(self.references.tables)
        for number, (first, count, times, _) in enumerate(self.references.walk()):
            if self._progress is not None and number % _PROGRESS_TABLES == 0:
                self._progress(min(number, total), total)
            if not base <= first < base + clusters or first + count > base + clusters:
                others.update(range(first // WINDOW, (first + count - 1) // WINDOW + 1))
            low, high = max(first - base, 0), min(first + count - base, clusters)
            if low >= high:
                continue
            if high - low > 1 and not any(counted[low:high]):
                counted[low:high] = array(_TYPECODE, [min(times, _LARGEST)]) * (high - low)
                continue
            for at in range(low, high):
                counted[at] = min(counted[at] + times, _LARGEST)
        others.discard(window)
        return counted, others

    def _compare(self, window: int, counted: array[int]) -> Iterator[Mismatch]:
        per_block = self._image.header.block_entries
        base = window * WINDOW
        first = base // per_block
        # A count of what lies behind the end of the file takes no space: it is no leak, nor is it to qemu-img.
        for index in range(first, -(-(base + len(counted)) // per_block)):
            start = index * per_block
            low, high = max(start, base), min(start + per_block, base + len(counted))
            wanted = counted[low - base : high - base]
            place = self.references.blocks.get(index)
            if place is None:
                yield from (Mismatch(low + at, 0, number) for at, number in enumerate(wanted) if number)
                continue
            numbers = self._numbers(place)[low - start : high - start]
            if numbers.typecode == _TYPECODE and numbers == wanted:
                continue
            for at, (number, references) in enumerate(zip(numbers, wanted, strict=True)):
                if number != references and not (references == _LARGEST and number > _LARGEST):
                    yield Mismatch(low + at, number, references)

    def _numbers(self, place: int) -> array[int]:
        if self._table_words is None or self._table_words[0] != place:
            size = self._image.header.cluster_size
            raw = self._image.file.read(place, size).ljust(size, b"\0")
            self._table_words = place, self._counting.numbers(raw)
        return self._table_words[1]

    def _tell(self, mismatch: Mismatch) -> None:
        size = self._image.header.cluster_size
        cluster, refcount, references = mismatch
        message = f"cluster {cluster} has refcount {refcount} and {references} references"
        if refcount > references:
            self.report.leaked_bytes += size
            self.report.add(Severity.LEAK, message, cluster * size)
        else:
            self.report.add(Severity.CORRUPTION, message, cluster * size)

    def _alone(self, place: int) -> bool:
        return self._all_alone(place >> self._image.header.cluster_bits, 1)

    def _all_alone(self, first: int, count: int) -> bool:
        """Whether the refcounts of clusters are all 1."""
        per_block = self._image.header.block_entries
        while count:
            index, inside = divmod(first, per_block)
            part = min(count, per_block - inside)
            place = self.references.blocks.get(index)
            if place is None:
                return False
            numbers = self._numbers(place)[inside : inside + part]
            if numbers.count(1) != part:
                return False
            first, count = first + part, count - part
        return True


def _bit_message(entry: int) -> str:
    if entry & COPIED:
        return f"{entry:#x} says that the cluster is owned alone, and its refcount is not 1"
    return f"{entry:#x} does not say that the cluster is owned alone, and its refcount is 1"
