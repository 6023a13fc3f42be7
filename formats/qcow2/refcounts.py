"""The refcounts of an open qcow2 image that are raised and lowered, and the plans that make that durable.

A count is raised in memory at once, and the plan brings it to the disk before anything that refers to the cluster. A
count is lowered by the last stages of a plan, when nothing on the disk refers to the cluster any more, and in memory
only when that plan is done. So a crash leaves counts that are too high, never too low.

The table itself grows by a whole new table, which one write of the header's fields puts in the old one's place.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

from tapfs.driver import HostFile, HostSpace
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.blank_pages import blank_entries
from tapfs.formats.changed_table import ChangedTable, encode
from tapfs.formats.qcow2.counted_changes import lower_block, raise_block, sectors_of
from tapfs.formats.qcow2.entries import BYTE_ORDER
from tapfs.formats.qcow2.header import MAX_REFTABLE_BYTES, REFTABLE_OFFSET_AT, WORD, Header
from tapfs.formats.qcow2.refcount_blocks import PLACE, RefcountBlocks
from tapfs.plan import Step, Write
from tapfs.records import NamedTuple
from tapfs.references import CountedBlock

#: Bytes in memory of a run of clusters whose counts are to be lowered.
_LOWERED_BYTES = 128


class ClusterRun(NamedTuple):
    """Clusters from the number `first` on, as many as `clusters` says."""

    first: int
    clusters: int


class Refcounts(RefcountBlocks):
    """The refcounts of one image, by cluster number."""

    def __init__(self, file: HostFile, header: Header) -> None:
        super().__init__(file, header)
        #: Where the table is on the disk, and in the plan that is being executed; in memory it is at `place`.
        self._durable_place = self._place_in_plan = self.place
        self._durable_clusters = self._clusters_in_plan = header.reftable_clusters
        #: The numbers of the blocks that were asked for to be changed since the last plan, or the last addition to it.
        self._recent: set[int] = set()
        #: The clusters whose counts are to be lowered by one: since the last plan, and by it. One may be there twice.
        self._to_lower: list[ClusterRun] = []
        self._lowering: list[ClusterRun] = []
        #: The same as whole blocks, of edits that let go of a disk.
        self._blocks_to_lower: list[CountedBlock] = []
        self._blocks_lowering: list[CountedBlock] = []
        #: Of the plan: each block with its counts lowered, and what is free then.
        self._lowered: dict[int, ChangedTable] = {}
        self._freed: list[ClusterRun] = []
        #: The end of the last cluster whose count was raised, in bytes.
        self.end = 0
        #: Places that are kept for blocks, by their index, and for a larger table with its clusters: they are made
        #: when a count is raised that needs them, so that a reservation that fails leaves nothing to be written.
        self._kept_blocks: dict[int, int] = {}
        self._kept_table: tuple[int, int] | None = None

    @property
    def durable_table(self) -> tuple[int, int]:
        """The offset of the table on the disk, and its clusters."""
        return self._durable_place, self._durable_clusters

    # -- changing -------------------------------------------------------------------------------

    def ensure(self, first: int, count: int, allocate: Callable[[int], int]) -> None:
        """Have a place for a block for each of `count` clusters; `allocate` gives the offset of so many in a row.

        Raises ImageError(no_space) where the table cannot grow further. What was kept until then is not: the count of
        one of these places may be what has none.
        """
        kept = dict(self._kept_blocks), self._kept_table
        try:
            for index in range(first // self.per_block, (first + count - 1) // self.per_block + 1):
                self._ensure_block(index, allocate)
        except BaseException:
            self._kept_blocks, self._kept_table = kept
            raise

    def metadata(self, first: int, count: int) -> list[HostSpace]:
        """What the host may have no space for when the counts of these clusters are raised; `ensure` was called."""
        bits = self._header.cluster_bits
        found: list[HostSpace] = []
        waiting = [ClusterRun(first, count)]
        made: set[int] = set()
        while waiting:
            for index, inside, part in self._parts([waiting.pop()]):
                block = self.block(index)
                if block is not None:
                    place = self._table.entries[index] & PLACE
                    found += blank_entries(place, block, *self.counting.byte_range(inside, part))
                elif index not in made:
                    # A block and a larger table are counted themselves, perhaps in a block that is to be made, too.
                    if index < len(self._table.entries):
                        found += blank_entries(self.place, self._table.entries, index, index + 1)
                    elif self._kept_table is not None:
                        place, clusters = self._kept_table
                        if not any(each >= len(self._table.entries) for each in made):
                            found.append(HostSpace(place, clusters << bits))
                            waiting.append(ClusterRun(place >> bits, clusters))
                    made.add(index)
                    place = self._kept_blocks[index]
                    found.append(HostSpace(place, 1 << bits, unused=True))
                    waiting.append(ClusterRun(place >> bits, 1))
        return found

    def raise_counts(self, first: int, count: int) -> None:
        """Raise the counts of `count` clusters by one; their blocks exist (`ensure`), and no count is the largest."""
        while count:
            index, inside = divmod(first, self.per_block)
            part = min(count, self.per_block - inside)
            changed = self._change(index)
            block = changed.entries
            if not self.counting.fill(block, inside, part, 0, 1):
                for slot in range(inside, inside + part):
                    self.counting.put(block, slot, self.counting.get(block, slot) + 1)
            changed.mark(*self.counting.byte_range(inside, part))
            first, count = first + part, count - part
            self.end = max(self.end, first << self._header.cluster_bits)

    def can_raise(self, first: int, count: int, by: int) -> bool:
        """Whether the last `count` clusters of the file have blocks, and their counts can be raised `by` so much.

        Only the first of them may have a count already.
        """
        if self.get(first) + by > self.counting.largest:
            return False
        indices = range(first // self.per_block, (first + count - 1) // self.per_block + 1)
        return all(self.block(index) is not None for index in indices)

    def raise_by(self, first: int, numbers: Sequence[int]) -> None:
        """Raise the counts of clusters from `first` on by one number each, as far as `can_raise` says."""
        at = 0
        for index, inside, part in self._parts([ClusterRun(first, len(numbers))]):
            changed = self._change(index)
            for slot, number in enumerate(numbers[at : at + part], inside):
                self.counting.put(changed.entries, slot, self.counting.get(changed.entries, slot) + number)
            changed.mark(*self.counting.byte_range(inside, part))
            at += part
        self.end = max(self.end, (first + len(numbers)) << self._header.cluster_bits)

    def share(self, first: int, count: int) -> None:
        """Raise the counts of `count` clusters that are in use by one, for another disk that refers to them.

        Raises ImageError(corrupt) for a count of 0, (out_of_bounds) for one that is the largest; then counts in memory
        are half changed, and the image is to be opened anew.
        """
        counting = self.counting
        for index, inside, part in self._parts([ClusterRun(first, count)]):
            if self.block(index) is None:
                raise self._cannot_share(index * self.per_block + inside, 0)
            changed = self._change(index)
            block = changed.entries
            number = counting.get(block, inside)
            whole = 0 < number < counting.largest and counting.fill(block, inside, part, number, number + 1)
            for slot in () if whole else range(inside, inside + part):
                number = counting.get(block, slot)
                if number in (0, counting.largest):
                    raise self._cannot_share(index * self.per_block + slot, number)
                counting.put(block, slot, number + 1)
            changed.mark(*counting.byte_range(inside, part))

    def share_counted(self, block: CountedBlock) -> None:
        """Raise the counts of a block, row `number`, as `share` does: each as often as its cluster was counted."""
        first = block.number * self.per_block
        if self.block(block.number) is None:
            raise self._cannot_share(first + next(at for at, _ in block.counted()), 0)
        changed = self._change(block.number)
        sectors = sectors_of(changed.entries)
        at = raise_block(self.counting, changed.entries, block, sectors)
        if at < block.clusters:
            raise self._cannot_share(first + at, self.counting.get(changed.entries, at))
        changed.mark_sectors(sectors)

    def _cannot_share(self, cluster: int, number: int) -> ImageError:
        if number == 0:
            kind, message = ErrorKind.CORRUPT, f"cluster {cluster} is in use and has the refcount 0"
            remedy = "run tapfs repair"
        else:
            width = "1 bit" if number == 1 else f"{self._header.refcount_bits} bits"
            kind = ErrorKind.OUT_OF_BOUNDS
            message = f"refcounts of {width} cannot count another reference to cluster {cluster}"
            remedy = "give it wider ones: tapfs amend -o refcount_bits=16, or more"
        offset = cluster << self._header.cluster_bits
        return ImageError(kind, message, path=self._file.path, offset=offset, op="count", remedy=remedy)

    def set_count(self, cluster: int, number: int) -> None:
        """Set the count of a cluster whose block exists, for a repair; at most to the largest that there is."""
        index, inside = divmod(cluster, self.per_block)
        changed = self._change(index)
        self.counting.put(changed.entries, inside, min(number, self.counting.largest))
        changed.mark(*self.counting.byte_range(inside, 1))

    def lower_counts(self, first: int, count: int) -> None:
        """Lower the counts of `count` clusters by one, when the plan that unlinks them is done."""
        for index in range(first // self.per_block, (first + count - 1) // self.per_block + 1):
            if self.block(index) is not None:
                self._change(index)  # from now on its bytes in memory are the ones that count
        if self._to_lower and first == self._to_lower[-1].first + self._to_lower[-1].clusters:
            first, count = self._to_lower[-1].first, self._to_lower.pop().clusters + count
        self._to_lower.append(ClusterRun(first, count))

    def lower_counted(self, block: CountedBlock) -> None:
        """Lower the counts of a block, row `number`, each as often as its cluster was counted; as `lower_counts`."""
        if self.block(block.number) is not None:
            self._change(block.number)
            self._blocks_to_lower.append(block)

    @property
    def changed_bytes(self) -> int:
        """Memory held by changes."""
        blocks = len(self._changed) * self._header.cluster_size
        return blocks + (len(self._to_lower) + len(self._lowering)) * _LOWERED_BYTES

    @property
    def is_changed(self) -> bool:
        """Whether a plan would have anything."""
        table = bool(self._table.pending or self._table.in_plan) or self.place != self._durable_place
        return table or bool(self._changed or self._to_lower or self._lowering)

    # -- plans ----------------------------------------------------------------------------------

    def begin_plan(self) -> None:
        """All that is pending is in the plan that is being made."""
        self._recent.clear()
        self._table.begin_plan()
        for changed in self._changed.values():
            changed.begin_plan()
        self._place_in_plan, self._clusters_in_plan = self.place, self.table_length >> self._header.cluster_bits
        self._lowering += self._to_lower
        self._blocks_lowering += self._blocks_to_lower
        self._to_lower, self._blocks_to_lower = [], []
        self._lowered, self._freed = {}, []
        for index, inside, part in self._parts(self._lowering):
            if (copy := self._lowered_copy(index)) is not None:
                self._freed += self._lower(copy, index, inside, part)
        for counted in self._blocks_lowering:
            if (copy := self._lowered_copy(counted.number)) is not None:
                self._freed += self._lower_counted(copy, counted)
        for copy in self._lowered.values():
            copy.begin_plan()

    @property
    def only_raised(self) -> bool:
        """Whether counts were only raised since the last plan that is durable, in a table that stays where it is."""
        lowered = self._to_lower or self._lowering or self._blocks_to_lower or self._blocks_lowering
        return not lowered and self.place == self._durable_place

    def added_steps(self) -> tuple[list[Step], list[Step]]:
        """The writes of blocks and of the table that a plan needs besides since the last one or the last addition.

        They are in the plan from now on. Only while `only_raised`.
        """
        recent, self._recent = self._recent, set()
        blocks = ((self._table.entries[index] & PLACE, self._changed.get(index)) for index in recent)
        raised: list[Step] = [
            Write(0, at + start, data) for at, each in blocks if each for start, data in each.added_runs()
        ]
        return raised, [Write(0, self.place + at, data) for at, data in self._table.added_runs()]

    def raise_steps(self) -> list[Step]:
        """The blocks with counts that were raised, and a new table whole: nothing on the disk refers to them yet."""
        steps: list[Step] = []
        for index, changed in self._changed.items():
            place = self._table.entries[index] & PLACE
            steps.extend(Write(0, place + at, data) for at, data in changed.sector_runs())
        if self.place != self._durable_place:
            steps.append(Write(0, self.place, encode(self._table.entries, BYTE_ORDER)))
        return steps

    def table_steps(self) -> list[Step]:
        """The table's entries of new blocks, or the header's two fields that lead to the new table."""
        if self.place == self._durable_place:
            return [Write(0, self.place + at, data) for at, data in self._table.sector_runs()]
        clusters = self.table_length >> self._header.cluster_bits
        return [Write(0, REFTABLE_OFFSET_AT, self.place.to_bytes(8, "big") + clusters.to_bytes(4, "big"))]

    def lower_steps(self) -> list[Step]:
        """The blocks with the counts lowered, of what nothing on the disk refers to any more."""
        steps: list[Step] = []
        for index, copy in self._lowered.items():
            place = self._table.entries[index] & PLACE
            steps.extend(Write(0, place + at, data) for at, data in copy.sector_runs())
        return steps

    @property
    def freed(self) -> list[ClusterRun]:
        """The clusters that the plan leaves without any reference."""
        return self._freed

    def plan_done(self) -> None:
        """The plan is durable."""
        for index, inside, part in self._parts(self._lowering):
            changed = self._changed.get(index)
            if changed is not None:
                # Counts that were raised meanwhile stay: the same clusters are lowered, not the same bytes written.
                self._lower(ChangedTable(changed.entries, BYTE_ORDER), index, inside, part)
        for counted in self._blocks_lowering:
            changed = self._changed.get(counted.number)
            if changed is not None:
                self._lower_counted(ChangedTable(changed.entries, BYTE_ORDER), counted)
        self._lowering, self._blocks_lowering, self._lowered, self._freed = [], [], {}, []
        self._durable_place, self._durable_clusters = self._place_in_plan, self._clusters_in_plan
        self._table.plan_done()
        waiting = {index for index, _, _ in self._parts(self._to_lower)}
        waiting |= {counted.number for counted in self._blocks_to_lower}
        for index, changed in list(self._changed.items()):
            changed.plan_done()
            if not changed.pending and index not in waiting:
                self._keep(index, self._changed.pop(index).entries)

    # -- inside ---------------------------------------------------------------------------------

    def _parts(self, runs: list[ClusterRun]) -> Iterator[tuple[int, int, int]]:
        """The runs cut at the ends of blocks: block, first number in it, how many."""
        for run in runs:
            first, count = run
            while count:
                index, inside = divmod(first, self.per_block)
                part = min(count, self.per_block - inside)
                yield index, inside, part
                first, count = first + part, count - part

    def _lower(self, block: ChangedTable, index: int, inside: int, part: int) -> list[ClusterRun]:
        """Lower counts in a block; what is 0 already, in a damaged image, stays so. The result is what became free."""
        block.mark(*self.counting.byte_range(inside, part))
        base = index * self.per_block
        if self.counting.fill(block.entries, inside, part, 1, 0):
            return [ClusterRun(base + inside, part)]
        freed: list[ClusterRun] = []
        for slot in range(inside, inside + part):
            number = self.counting.get(block.entries, slot)
            if number:
                self.counting.put(block.entries, slot, number - 1)
            if number == 1:
                freed.append(ClusterRun(base + slot, 1))
        return freed

    def _lowered_copy(self, index: int) -> ChangedTable | None:
        """The copy of a block that the plan lowers; None where there is no such block."""
        copy = self._lowered.get(index)
        block = self.block(index) if copy is None else None
        if block is not None:
            copy = self._lowered[index] = ChangedTable(block[:], BYTE_ORDER)
        return copy

    def _lower_counted(self, copy: ChangedTable, counted: CountedBlock) -> list[ClusterRun]:
        """Lower the counts of a block as it was counted. The result is what became free."""
        sectors = sectors_of(copy.entries)
        marks = lower_block(self.counting, copy.entries, counted, sectors)
        copy.mark_sectors(sectors)
        freed: list[ClusterRun] = []
        at = marks.find(1)
        while at >= 0:
            stop = marks.find(0, at) if marks.find(0, at) >= 0 else len(marks)
            freed.append(ClusterRun(counted.number * self.per_block + at, stop - at))
            at = marks.find(1, stop)
        return freed

    def _ensure_block(self, index: int, allocate: Callable[[int], int]) -> None:
        """Keep a place for a block that is not there, and for a table that has an entry for it."""
        entries = len(self._table.entries)
        if self._kept_table is not None:
            entries = self._kept_table[1] * self._header.cluster_size // WORD
        if index >= entries:
            self._keep_table(index + 1, entries, allocate)
        if index < len(self._table.entries) and self._table.entries[index]:
            self._block_place(index)
        elif index not in self._kept_blocks:
            place = self._kept_blocks[index] = allocate(1)
            # A block may count itself. Where it lies in another one, that one may have to be made, and so on.
            self.ensure(place >> self._header.cluster_bits, 1, allocate)

    def _keep_table(self, least: int, entries: int, allocate: Callable[[int], int]) -> None:
        """Keep a place for a larger table, half as large again. A smaller one that was kept is not made."""
        header = self._header
        per_cluster = header.cluster_size // WORD
        clusters = -(-max(least, entries * 3 // 2) // per_cluster)
        if clusters << header.cluster_bits > MAX_REFTABLE_BYTES:
            clusters = -(-least // per_cluster)
        if clusters << header.cluster_bits > MAX_REFTABLE_BYTES:
            message = f"the refcount table cannot grow beyond {MAX_REFTABLE_BYTES} bytes"
            raise ImageError(ErrorKind.NO_SPACE, message, path=self._file.path, op="allocate")
        place = allocate(clusters)
        self._kept_table = place, clusters
        self.ensure(place >> header.cluster_bits, clusters, allocate)

    def _make_block(self, index: int) -> None:
        """Make the block for which a place is kept, and the larger table first where it has no entry for the block."""
        if index >= len(self._table.entries):
            self._make_table()
        place = self._kept_blocks.pop(index, 0)
        if place == 0:  # the larger table is counted in this block, and so was made after it
            return
        self._table.entries[index] = place
        self._table.mark(index, index + 1)
        self._recent.add(index)
        block = self._changed[index] = ChangedTable(array("B", bytes(self._header.cluster_size)), BYTE_ORDER)
        block.mark(0, len(block.entries))
        self.raise_counts(place >> self._header.cluster_bits, 1)

    def _make_table(self) -> None:
        """Move the table to the larger place that is kept."""
        if self._kept_table is None:
            raise AssertionError("no place is kept for a larger refcount table")
        (place, clusters), self._kept_table = self._kept_table, None
        bits = self._header.cluster_bits
        old_first, old_count = self.place >> bits, self.table_length >> bits
        entries = self._table.entries[:]
        entries.frombytes(bytes((clusters << bits) - WORD * len(entries)))
        self._table = ChangedTable(entries, BYTE_ORDER)
        self.place = place
        self.raise_counts(place >> bits, clusters)
        if old_count:
            self.lower_counts(old_first, old_count)

    def _change(self, index: int) -> ChangedTable:
        self._recent.add(index)
        changed = self._changed.get(index)
        if changed is None and index in self._kept_blocks:
            self._make_block(index)
            return self._changed[index]
        if changed is None:
            block = self.block(index)
            if block is None:
                raise AssertionError(f"refcount block {index} does not exist")
            self._clean.pop(index, None)
            changed = self._changed[index] = ChangedTable(block, BYTE_ORDER)
        return changed
