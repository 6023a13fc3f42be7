"""Check a qcow2 image: compare its refcounts with the references to each cluster, and both with the entries' bits.

The references are counted in windows of the file's clusters, so memory stays bounded however long the file is. A leak
is a cluster whose refcount is too high, a corruption one whose refcount is too low; each cluster counts once, as
`qemu-img check` counts.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain, groupby

from tapfs.driver import CheckReport, ProgressCallback, Severity
from tapfs.formats.qcow2.counted_entries import WINDOW_BITS
from tapfs.formats.qcow2.counts import Counting
from tapfs.formats.qcow2.entries import COPIED, OFFSET, Run
from tapfs.formats.qcow2.header import AUTOCLEAR_AT, CORRUPT, DIRTY, INCOMPATIBLE_AT, SIZE_AT, WORD
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.references import References, TableUse
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.qcow2.tally import Tally
from tapfs.records import NamedTuple
from tapfs.references import CountedWindow

#: The largest count of references that is told from a larger one.
_LARGEST = 0xFFFF


class Mismatch(NamedTuple):
    """Clusters from the number `first` on whose refcount is not what it should be."""

    first: int
    clusters: int
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
        self._note_snapshots()
        self._counting = Counting(image.header.refcount_order)
        self._tally = Tally(image, self.references)
        self._windows: set[int] = set()
        #: Whether each count is right and none is larger than 1.
        self._all_single = True
        for mismatch in self.mismatches():
            self._tell(mismatch)
        self.report.allocated_bytes = self._tally.data_bytes
        for message, offset in chain(self.cut_clusters(), self._displaced_clusters(), self.wrong_bits()):
            self.report.add(Severity.CORRUPTION, message, offset)
        if self.references.untrue_bitmaps:
            said = (
                "QEMU opens no image with such bitmaps; tapfs repair --drop-bitmaps gives up those that cannot be true"
            )
            self.report.add(Severity.NOTE, said)

    @property
    def largest(self) -> int:
        """The largest refcount that the image can have."""
        return self._counting.largest

    def mismatches(self) -> Iterator[Mismatch]:
        """The clusters whose refcounts are wrong, ascending in each window."""
        per_block = self._image.header.block_entries
        # Blocks say which windows there are besides those that are referred to.
        waiting = {0} | {index * per_block >> WINDOW_BITS for index in self.references.blocks}
        self._windows = set()
        self._all_single = True
        while waiting:
            number = waiting.pop()
            window = self._tally.window(number, self._progress)
            self._windows.add(number)
            self._telling = False
            waiting |= window.others - self._windows
            self._all_single &= window.width == 1 and not window.counts.translate(None, b"\0\1")
            self._note_doubled(window)
            for mismatch in self._compare(window):
                self._all_single = False
                yield mismatch
        self._telling = True

    def _note_doubled(self, window: CountedWindow) -> None:
        """Tables and refcount blocks in whose place something else is, too, must not be written where they are."""
        references, header, bits = self.references, self._image.header, self._image.header.cluster_bits

        def is_doubled(place: int, times: int = 1) -> bool:
            inside = 0 <= (place >> bits) - window.base < window.clusters
            return inside and window.references(place >> bits, (place >> bits) + 1)[0] > times

        for index, place in references.blocks.items():
            if is_doubled(place):
                references.broken_refcounts = True
                message = f"refcount block {index} at {place:#x} has something else in its place, too"
                self.report.add(Severity.CORRUPTION, message, header.reftable_offset + WORD * index)
        clusters = range(header.reftable_offset, header.reftable_offset + header.reftable_length, header.cluster_size)
        references.broken_refcounts |= any(map(is_doubled, clusters))
        if references.incomplete:  # so that a repair changes no table anyway
            return
        references.doubled_tables.update(use.place for use in references.tables if is_doubled(use.place, use.times))
        first_levels = Counter((each.l1_offset, each.l1_length) for each in references.snapshots)
        first_levels[header.l1_offset, header.l1_length] += 1
        for (start, length), times in first_levels.items():
            clusters = range(start, min(start + length, self._image.file.size()), header.cluster_size)
            references.doubled_tables.update(place for place in clusters if is_doubled(place, times))

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
            yield from self._shared_in_data_file()
            return
        # Where each cluster has one reference and each entry says so nothing is left to look for.
        if self._all_single and not self._tally.shared:
            return
        self._telling = False
        for number in sorted(self._windows):
            yield from self._wrong_entries(number << WINDOW_BITS)
        self._telling = True

    # -- inside ---------------------------------------------------------------------------------

    def _displaced_clusters(self) -> Iterator[tuple[str, int]]:
        """The runs of entries that lead elsewhere in a data file than the disk has them: a message, the place."""
        image, references = self._image, self.references
        span = image.header.slices * image.header.unit
        for index, entry in image.l1.used() if image.data_number else ():
            place = entry & OFFSET
            if not place or image.slices.table_fault(place) is not None:
                continue
            words = references.decoded(references.raw(TableUse(place, 1, 1)))
            for run in image.decoder.runs(words, 0, image.header.l2_entries):
                wrong = image.displaced(run, index * span) if isinstance(run, Run) else None
                if isinstance(run, Run) and wrong is not None:
                    at = place + run.first * image.header.l2_entry_bytes
                    yield f"L2 entry {run.first} of table {index}: {wrong}", at

    def _shared_in_data_file(self) -> Iterator[tuple[str, int]]:
        """The entries that do not say that their place in the data file is the disk's alone, as each has to."""
        image, references = self._image, self.references
        step, size = image.header.l2_entry_bytes, image.header.cluster_size
        for use in references.tables:
            words = references.decoded(references.raw(use))
            seen = -1
            for run in image.decoder.runs(words, 0, image.header.l2_entries):
                if not isinstance(run, Run) or run.copied or not run.host_offset:
                    continue
                for at in range(max(seen + 1, run.start // size), -(-(run.start + run.length) // size)):
                    message = "does not say that the cluster is the disk's alone, as each of a data file is"
                    yield f"L2 entry {at}: {message}", use.place + at * step
                    seen = at

    def _wrong_entries(self, base: int) -> Iterator[tuple[str, int]]:
        step = self._image.header.l2_entry_bytes
        alone = self._owned_alone(base)
        for use in self.references.tables:
            if not use.current:
                continue
            for at in self._tally.wrong_owners(use, base, alone):
                word = int.from_bytes(self._image.file.read(use.place + at * step, WORD), "big")
                yield f"L2 entry {at}: {_bit_message(word)}", use.place + at * step

    def _owned_alone(self, base: int) -> bytearray:
        """For each cluster of a window whether its refcount is 1, one byte each."""
        clusters = min(1 << WINDOW_BITS, (-(-self._image.file.size() >> self._image.header.cluster_bits)) - base)
        alone = bytearray(max(0, clusters))
        for low, high, raw in self._blocks(base, len(alone)):
            start = low - low % self._image.header.block_entries
            if raw:
                alone[low - base : high - base] = self._counting.alone(raw)[low - start : high - start]
        return alone

    def _blocks(self, base: int, clusters: int) -> Iterator[tuple[int, int, bytes]]:
        """The refcount blocks of a window: the clusters ``[low, high)`` that each counts, and its bytes or none."""
        per_block = self._image.header.block_entries
        size = self._image.header.cluster_size
        # A count of what lies behind the end of the file takes no space: it is no leak, nor is it to qemu-img.
        for index in range(base // per_block, -(-(base + clusters) // per_block)):
            low, high = max(index * per_block, base), min((index + 1) * per_block, base + clusters)
            place = self.references.blocks.get(index)
            yield low, high, b"" if place is None else self._image.file.read(place, size).ljust(size, b"\0")

    def _compare(self, window: CountedWindow) -> Iterator[Mismatch]:
        per_block = self._image.header.block_entries
        for low, high, raw in self._blocks(window.base, window.clusters):
            wanted = window.references(low, high)
            start = low - low % per_block
            if not raw and wanted.count(0) == high - low:
                continue
            if not raw:
                numbers = array("B", bytes(high - low))
            elif window.width == 1 and self._counting.capped(raw)[low - start : high - start] == wanted.tobytes():
                continue
            else:
                numbers = self._counting.numbers(raw)[low - start : high - start]
            at = low
            for (number, references), same in groupby(zip(numbers, wanted, strict=True)):
                count = sum(1 for _ in same)
                if number != references and not (references == _LARGEST and number > _LARGEST):
                    yield Mismatch(at, count, number, references)
                at += count

    def _fault(self, message: str, offset: int | None) -> None:
        if self._telling:
            self.report.add(Severity.CORRUPTION, message, offset)

    def _note_header(self) -> None:
        image, report = self._image, self.report
        if image.header.incompatible & DIRTY:
            report.add(Severity.NOTE, "the image was not closed after writing", INCOMPATIBLE_AT)
        if image.header.incompatible & CORRUPT:
            report.add(Severity.NOTE, "the image is marked as corrupt", INCOMPATIBLE_AT)
        if image.header.lacks_raw_data_file:
            message = "says that its data file is raw, and it has none: QEMU does not open it, repair clears the bit"
            report.add(Severity.CORRUPTION, message, AUTOCLEAR_AT)
        lost = image.header.size % 512
        if lost:
            report.add(Severity.NOTE, f"size is no multiple of 512: QEMU does not show the last {lost} bytes", SIZE_AT)

    def _note_snapshots(self) -> None:
        """An entry without the size of its disk is an error in version 3, which requires it."""
        for each in () if self._image.header.version == VERSIONS[0] else self.references.snapshots:
            if not each.has_sizes:
                message = f"the entry of snapshot {each.name or each.id} does not say the size of its disk"
                self.report.add(Severity.CORRUPTION, message, each.offset)

    def _tell(self, mismatch: Mismatch) -> None:
        size = self._image.header.cluster_size
        first, clusters, refcount, references = mismatch
        severity = Severity.LEAK if refcount > references else Severity.CORRUPTION
        if severity is Severity.LEAK and self.references.snapshots_unread:
            return  # it may be a snapshot's
        if severity is Severity.LEAK:
            self.report.leaked_bytes += size * clusters
        for cluster in range(first, first + clusters):
            message = f"cluster {cluster} has refcount {refcount} and {references} references"
            self.report.add(severity, message, cluster * size)

    def _alone(self, place: int) -> bool:
        """Whether the refcount of the cluster at a place is 1."""
        index, inside = divmod(place >> self._image.header.cluster_bits, self._image.header.block_entries)
        block = self.references.blocks.get(index)
        if block is None:
            return False
        first, stop = self._counting.byte_range(inside, 1)
        raw = self._image.file.read(block + first, stop - first)
        if len(raw) < stop - first:
            return False
        return self._counting.get(raw, inside - (8 * first >> self._image.header.refcount_order)) == 1


def _bit_message(entry: int) -> str:
    if entry & COPIED:
        return f"{entry:#x} says that the cluster is owned alone, and its refcount is not 1"
    # So it is after a repair counted two owners and a write gave one of them a copy.
    owner = "does not say that the cluster is owned alone, and its refcount is 1"
    return f"{entry:#x} {owner}: no data is at risk, a write copies the cluster first, and a repair mends it"
