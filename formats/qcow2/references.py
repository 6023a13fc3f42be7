"""Every reference that a qcow2 image's metadata has to a cluster of its file: what the refcounts should be.

An L2 table that several L1 entries lead to is read once, and what it refers to counts as often. So the work is bounded
by the length of the file, whatever the L1 tables say.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from tapfs.driver import HostFile
from tapfs.errors import ImageError
from tapfs.extent import Kind
from tapfs.formats.changed_table import decode
from tapfs.formats.qcow2.bitmap_faults import faults_of_bitmaps, faults_of_table
from tapfs.formats.qcow2.bitmaps import clusters_of_bitmaps, directory_of, read_bitmaps
from tapfs.formats.qcow2.entries import (
    BYTE_ORDER,
    COMPRESSED,
    COPIED,
    OFFSET,
    RESERVED,
    TYPECODE,
    ZERO,
    EntryFault,
    Run,
    compressed_place,
)
from tapfs.formats.qcow2.extensions import CRYPTO_HEADER, data_of
from tapfs.formats.qcow2.guard import Guard, MetadataRange, guard_of
from tapfs.formats.qcow2.header import WORD
from tapfs.formats.qcow2.l1 import L1Table
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.snapshots import Snapshot
from tapfs.formats.rounding import round_up
from tapfs.records import NamedTuple

#: Told of what cannot be true: a message and the offset of the field in the file.
FaultCallback = Callable[[str, int | None], None]
#: A place so many bytes behind the end of the file, which a damaged entry names, keeps nobody from using the end.
_FAR_BYTES = 1 << 30
#: Of the L1 tables of snapshots so many bytes are looked at: those of a thousand snapshots of a disk of 64 TiB.
_MOST_L1_BYTES = 1 << 30
#: Bits 0 to 8 of a refcount table's entry are reserved.
_BLOCK_PLACE = ((1 << 64) - 1) & ~0x1FF


class Referred(NamedTuple):
    """Clusters from number `first` on, referred to `times` times each. `refcounts`: they hold the refcounts."""

    first: int
    clusters: int
    times: int = 1
    refcounts: bool = False


class TableUse(NamedTuple):
    """An L2 table and how many L1 entries lead to it; `current` ones are the current disk's."""

    place: int
    times: int
    current: int


class References:
    """Walks the metadata of one image, read leniently."""

    def __init__(self, image: Qcow2Reader, fault: FaultCallback) -> None:
        self._image = image
        self._file: HostFile = image.file
        self._fault = fault
        self._bits = image.header.cluster_bits
        self._size = image.file.size()
        #: Bytes of guest data of the current disk in the entries that were decoded since `begin`.
        self.allocated_bytes = 0
        #: The end of all that is referred to and lies past the end of the file, but for what is much too far away.
        self.dangling_end = 0
        #: The runs that the end of the file cuts, by the place of their table. The disk may end in them, too.
        self.cut: dict[int, Run] = {}
        #: Whether the refcount table or a block of it cannot be where it is said to be.
        self.broken_refcounts = False
        #: Whether a snapshot or a bitmap could not be looked at: what only it refers to is not free.
        self.incomplete = False
        #: Whether a bitmap, or their directory, cannot be true.
        self.untrue_bitmaps = False
        #: Whether the table of snapshots cannot be read, so that nobody knows which there are.
        self.snapshots_unread = False
        #: L2 tables in whose place something else is, too: a change of an entry would change that.
        self.doubled_tables: set[int] = set()
        #: The words that wrong entries can become without the disk reading otherwise, by the places of the entries.
        self.mendable: dict[int, int] = {}
        self._blocks = self._read_blocks()
        self._snapshots = self._read_snapshots()
        self._guard = self._make_guard()
        self._guarded = self._guard.places()
        #: Two tables that lie in one place, which nothing can be written to then.
        self.tangled = self._guard.tangled()
        self._uses = self._read_uses()

    @property
    def blocks(self) -> dict[int, int]:
        """The host offset of each refcount block that can be read, by its index in the table."""
        return self._blocks

    @property
    def tables(self) -> Sequence[TableUse]:
        """The L2 tables, ascending by place; each can be read."""
        return self._uses

    @property
    def snapshots(self) -> Sequence[Snapshot]:
        """The snapshots, none where their table cannot be read."""
        return self._snapshots

    def begin(self) -> None:
        """Everything is looked at anew."""
        self.allocated_bytes = 0

    def walk(self) -> Iterator[Referred]:
        """Every reference. It can be walked again; faults are told of each time."""
        self.begin()
        yield from self.fixed()
        for use in self._uses:
            yield Referred(use.place >> self._bits, 1, use.times)
            yield from self.of_entries(use, self.decoded(self.raw(use)), 0, self._image.header.l2_entries)

    def fixed(self) -> Iterator[Referred]:
        """The references of all but L2 tables."""
        header = self._image.header
        yield Referred(0, 1)
        yield from self._range(header.reftable_offset, header.reftable_length, refcounts=True)
        for place in self._blocks.values():
            yield Referred(place >> self._bits, 1, refcounts=True)
        yield from self._range(header.l1_offset, header.l1_length)
        for each in self._snapshots:
            yield from self._range(each.l1_offset, each.l1_length)
        if self._snapshots:
            end = self._snapshots[-1].offset + self._snapshots[-1].length
            yield from self._range(header.snapshots_offset, end - header.snapshots_offset)
        yield from self._of_extensions()

    def raw(self, use: TableUse) -> bytes:
        """An L2 table as it stands on the disk."""
        size = self._image.header.cluster_size
        return self._file.read(use.place, size).ljust(size, b"\0")

    def decoded(self, raw: bytes) -> array[int]:
        """The words of an L2 table."""
        return decode(raw, TYPECODE, BYTE_ORDER)

    def placed(self, use: TableUse, words: array[int], first: int, stop: int) -> Iterator[Run]:
        """The runs of entries that have clusters of their own, whose bit "owned alone" says something."""
        for run in self._runs(use, words, first, stop):
            if run.kind is not Kind.COMPRESSED and run.host_offset:
                yield run

    def of_entries(self, use: TableUse, words: array[int], first: int, stop: int) -> Iterator[Referred]:
        """The references of the entries ``[first, stop)`` of a table."""
        image, bits = self._image, self._bits
        per_entry = image.header.l2_entry_bytes // WORD
        last_entry = -1
        for run in self._runs(use, words, first, stop):
            if run.kind is Kind.COMPRESSED:
                start, length = compressed_place(words[run.first * per_entry], bits)
                last = min(start + length, max(start + 1, self._size)) - 1
                self.allocated_bytes += run.host_length if use.current else 0
                yield Referred(start >> bits, (last >> bits) - (start >> bits) + 1, use.times)
                continue
            self.allocated_bytes += run.length if use.current and run.kind is Kind.DATA else 0
            if image.data_number or image.header.has_data_file:
                continue
            if not image.header.extended_l2:
                if run.host_offset:
                    yield Referred(run.host_offset >> bits, run.length >> bits, use.times)
            elif run.first != last_entry and words[2 * run.first] & OFFSET:
                last_entry = run.first
                yield Referred((words[2 * run.first] & OFFSET) >> bits, 1, use.times)

    # -- inside ---------------------------------------------------------------------------------

    def _runs(self, use: TableUse, words: array[int], first: int, stop: int) -> Iterator[Run]:
        """The runs of entries of an L2 table; of each entry that cannot be true `fault` is told once."""
        header = self._image.header
        per_entry = header.l2_entry_bytes // WORD
        for entry, same in groupby(self._image.decoder.runs(words, first, stop), _first_entry):
            runs = list(same)  # several are of one entry where it has subclusters
            word = words[entry * per_entry]
            if isinstance(runs[0], EntryFault):
                self._tell(use, entry, runs[0].message)
                claimed = self._claimed(entry, word)
                if claimed is not None:
                    yield claimed
                continue
            placed = [run for run in runs if isinstance(run, Run)]
            entries = 1 if header.extended_l2 else placed[0].length >> self._bits
            wrong = next((wrong for run in placed if (wrong := self._wrong(run, word)) is not None), None)
            cut = [
                run for run in placed if run.kind is Kind.DATA and run.host_offset + run.length > self._image.data_size
            ]
            if (cut or wrong is not None) and entries > 1:
                for each in range(entry, entry + entries):
                    yield from self._runs(use, words, each, each + 1)
                continue
            reserved = word & RESERVED and placed[0].kind is not Kind.COMPRESSED
            if wrong is not None or reserved:
                for each in range(entry, entry + entries):
                    self._tell(use, each, wrong or f"has bits that are reserved ({word:#x})")
                    at = use.place + each * header.l2_entry_bytes
                    if wrong is None:
                        here = words[each * per_entry]
                        self.mendable[at] = here & ~RESERVED
                    elif all(run.kind in (Kind.ZERO, Kind.UNALLOCATED) for run in placed):
                        self.mendable[at] = word & ZERO  # it reads the same without a place
            if wrong is None:
                if cut:
                    self.cut[use.place] = cut[-1]
                yield from placed
            else:
                self._dangles(placed[0].host_offset, max(placed[0].length, placed[0].host_length))

    def _claimed(self, entry: int, word: int) -> Run | None:
        """What an entry refers to that cannot be true: nobody may use that for something else."""
        bits, size = self._bits, 1 << self._bits
        place = word & OFFSET
        if word & COMPRESSED:
            place, length = compressed_place(word, bits)
            claimed = Run(entry, entry << bits, size, Kind.COMPRESSED, place, length)
        else:
            claimed = Run(entry, entry << bits, size, Kind.ZERO, place, 0, word & COPIED != 0)
        return claimed if size <= place < self._size and (word & COMPRESSED or not place % size) else None

    def _wrong(self, run: Run, word: int) -> str | None:
        """What makes the place of a run impossible. A cluster of zeros has one, too."""
        image = self._image
        wrong = image.place_fault(run)
        place = word & OFFSET
        if wrong is not None or run.kind is Kind.COMPRESSED or not place or image.header.has_data_file:
            return wrong
        if place % image.header.cluster_size:
            return f"cluster at {place:#x} not aligned to a cluster"
        if image.header.extended_l2:
            return None if place < self._size else f"cluster at {place:#x} past the end of the file ({self._size:#x})"
        last = run.host_offset + run.length - image.header.cluster_size
        return None if last < self._size else f"cluster at {place:#x} past the end of the file ({self._size:#x})"

    def _tell(self, use: TableUse, entry: int, message: str) -> None:
        self._fault(f"L2 entry {entry}: {message}", use.place + entry * self._image.header.l2_entry_bytes)

    def _dangles(self, place: int, length: int) -> None:
        if place + length < self._size + _FAR_BYTES:
            self.dangling_end = max(self.dangling_end, place + length)

    def _range(self, start: int, length: int, *, refcounts: bool = False) -> Iterator[Referred]:
        self._dangles(start, length)
        if length and start % (1 << self._bits) == 0 and start < self._size:
            last = (min(start + length, self._size) - 1) >> self._bits
            yield Referred(start >> self._bits, last - (start >> self._bits) + 1, refcounts=refcounts)

    def _read_blocks(self) -> dict[int, int]:
        header = self._image.header
        found: dict[int, int] = {}
        seen: set[int] = set()
        aligned = header.reftable_offset % header.cluster_size == 0 and header.reftable_offset
        if not aligned or header.reftable_offset + header.reftable_length > self._size or not header.reftable_clusters:
            self.broken_refcounts = True
            self._fault(f"the refcount table at {header.reftable_offset:#x} cannot be there", 48)
            return found
        raw = self._file.read(header.reftable_offset, header.reftable_length)
        # Of a table of a cluster of 2 MiB most is zeros at the end.
        raw = raw[: round_up(len(raw.rstrip(b"\0")), WORD)]
        for index, entry in enumerate(decode(raw, TYPECODE, BYTE_ORDER)):
            if not entry:
                continue
            place = entry & _BLOCK_PLACE
            if entry != place:
                message = f"refcount block {index}: its entry has bits that are reserved ({entry:#x})"
                self._fault(message, header.reftable_offset + WORD * index)
                self.mendable[header.reftable_offset + WORD * index] = place
            if not place:
                continue
            inside = header.cluster_size <= place <= self._size - header.cluster_size
            over = any(
                start < place + header.cluster_size and place < stop for _, start, stop in self._image.reserved()
            )
            if place % header.cluster_size or not inside or over or place in seen:
                self.broken_refcounts = True
                message = f"refcount block {index} at {place:#x} is unaligned, outside the file, or over something else"
                self._fault(message, header.reftable_offset + WORD * index)
                self._dangles(place, header.cluster_size)
                continue
            seen.add(place)
            found[index] = place
        return found

    def _read_snapshots(self) -> list[Snapshot]:
        try:
            return self._image.read_snapshots()
        except ImageError as error:
            self.incomplete = self.snapshots_unread = True
            self._fault(error.message, error.offset)
            return []

    def _make_guard(self) -> Guard:
        """Where everything lies but L2 tables, data, and refcounts, which can be counted anew."""
        image = self._image
        refcounts = image.header.reftable_offset
        fixed = [
            MetadataRange(start, stop, f"the {name}") for name, start, stop in image.reserved() if start != refcounts
        ]
        fixed += [MetadataRange(image.l1_offset, image.l1_offset + WORD * len(image.l1), "the L1 table")]
        directory = directory_of(image.extensions)
        tables = set[int]()
        try:
            tables.update(clusters_of_bitmaps(image.file, image.extensions, image.header.cluster_size))
        except ImageError:  # which is told of where bitmaps are followed
            directory = None
        return guard_of(image.header, fixed, self._snapshots, directory, sorted(tables))

    def _read_uses(self) -> list[TableUse]:
        image = self._image
        current = Counter(self._places(image.l1, "L1 entry", image.header.l1_offset))
        uses = Counter(current)
        # Snapshots that share an L1 table are not known of any tool, but a damaged table may say so of thousands.
        sharing = Counter((each.l1_offset, each.l1_length) for each in self._snapshots)
        length = 0
        for each in self._snapshots:
            table = (each.l1_offset, each.l1_length)
            if each.l1_offset % image.header.cluster_size or each.l1_offset + each.l1_length > self._size:
                self._fault(f"the L1 table of snapshot {each.name or each.id} cannot be there", each.offset)
                self._dangles(*table)
                self.incomplete = True
            elif table in sharing:
                length += each.l1_length
                if length > _MOST_L1_BYTES:
                    self._fault(f"the L1 tables of snapshots have more than {_MOST_L1_BYTES} bytes", each.offset)
                    self.incomplete = True
                    break
                times = sharing.pop(table)
                what = f"snapshot {each.name or each.id}: L1 entry"
                for place in self._places(L1Table(bytearray(self._file.read(*table))), what, each.l1_offset):
                    uses[place] += times
        return [TableUse(place, times, current[place]) for place, times in sorted(uses.items())]

    def _places(self, l1: L1Table, what: str, offset: int) -> list[int]:
        places: list[int] = []
        for index, entry in l1.used():
            place = entry & OFFSET
            wrong = self._image.slices.table_fault(place) if place else None
            over = self._over(place) if place and wrong is None else None
            if wrong is None and over is not None:
                wrong = f"L2 table at {place:#x} lies over {over}"
                self.doubled_tables.add(place)
            if wrong is not None:
                self._dangles(place, 1 << self._bits)
                self.incomplete = True  # nobody knows which clusters the table has
            elif place:
                places.append(place)
            if wrong is None and entry & ~(OFFSET | COPIED):
                wrong = f"has bits that are reserved ({entry:#x})"
                self.mendable[offset + WORD * index] = entry & (OFFSET | COPIED)
            elif not place:
                wrong = "says that it owns a table alone, and names none"
                self.mendable[offset + WORD * index] = 0
            if wrong is not None:
                self._fault(f"{what} {index}: {wrong}", offset + WORD * index)
        return places

    def _over(self, place: int) -> str | None:
        """What a cluster lies over but L2 tables, data and refcounts. There may be many L1 tables of many entries."""
        places, size = self._guarded, 1 << self._bits
        at = bisect_left(places.ranges, (place + size, 0)) - 1
        table = bisect_left(places.places, place)
        is_over = (at >= 0 and places.ranges[at][1] > place) or places.places[table : table + 1] == array("Q", [place])
        return self._guard.over(place, size) if is_over else None

    def _of_extensions(self) -> Iterator[Referred]:
        image = self._image
        crypto = data_of(image.extensions, CRYPTO_HEADER)
        if crypto is not None and len(crypto) >= 2 * WORD:
            start, length = (int.from_bytes(crypto[at : at + WORD], "big") for at in (0, WORD))
            yield from self._range(start, length)
        directory = directory_of(image.extensions)
        for message, place in faults_of_bitmaps(image):
            self._fault_of_bitmap(message, place)
        if directory is None:
            return
        yield from self._range(directory.offset, directory.length)
        try:
            bitmaps = read_bitmaps(self._file, image.extensions)
        except ImageError as error:
            self._fault_of_bitmap(error.message, error.offset)
            self.incomplete = True
            return
        for each in bitmaps:
            length = WORD * each.table_entries
            if each.table_offset % image.header.cluster_size or each.table_offset + length > self._size:
                self._fault_of_bitmap(f"the table of bitmap {each.name} cannot be there", each.offset)
                self.incomplete = True
                continue
            yield from self._range(each.table_offset, length)
            for entry, wrong in faults_of_table(image, each):
                if wrong is not None:
                    self._fault_of_bitmap(f"the table of bitmap {each.name} {wrong}", each.table_offset)
                if entry & OFFSET:
                    yield from self._range(entry & OFFSET, 1)

    def _fault_of_bitmap(self, message: str, place: int | None) -> None:
        self.untrue_bitmaps = True
        self._fault(message, place)


def _first_entry(run: Run | EntryFault) -> int:
    return run.entry if isinstance(run, EntryFault) else run.first
