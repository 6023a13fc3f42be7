"""Every reference that a qcow2 image's metadata has to a cluster of its file: what the refcounts should be.

An L2 table that several L1 entries lead to is read once, and what it refers to counts as often. So the work is bounded
by the length of the file, whatever the L1 tables say.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.errors import ImageError
from tapfs.extent import Kind
from tapfs.formats.changed_table import decode
from tapfs.formats.qcow2.bitmaps import directory_of, read_bitmaps
from tapfs.formats.qcow2.entries import BYTE_ORDER, OFFSET, TYPECODE, EntryFault, Run, compressed_place
from tapfs.formats.qcow2.extensions import CRYPTO_HEADER, data_of
from tapfs.formats.qcow2.header import MAX_L1_BYTES, WORD
from tapfs.formats.qcow2.l1 import L1Table
from tapfs.formats.qcow2.reader import Qcow2Reader

#: Told of what cannot be true: a message and the offset of the field in the file.
FaultCallback = Callable[[str, int | None], None]
#: A damaged entry that refers to a place so many bytes behind the end of the file keeps nobody from using the end.
_FAR_BYTES = 1 << 30
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
        #: Bytes of guest data of the current disk, as far as `walk` has come.
        self.allocated_bytes = 0
        #: The end of all that is referred to and lies past the end of the file, but for what is much too far away.
        self.dangling_end = 0
        #: The runs that the end of the file cuts, by the place of their table. The disk may end in them, too.
        self.cut: dict[int, Run] = {}
        #: Whether the refcount table or a block of it cannot be where it is said to be.
        self.broken_refcounts = False
        self._blocks = self._read_blocks()
        self._uses = self._read_uses()

    @property
    def blocks(self) -> dict[int, int]:
        """The host offset of each refcount block that can be read, by its index in the table."""
        return self._blocks

    @property
    def tables(self) -> Sequence[TableUse]:
        """The L2 tables, ascending by place; each can be read."""
        return self._uses

    def walk(self) -> Iterator[Referred]:
        """Every reference. It can be walked again; faults are told of each time."""
        self.allocated_bytes = 0
        yield from self.fixed()
        for use in self._uses:
            yield Referred(use.place >> self._bits, 1, use.times)
            yield from self._in_table(use)

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

    def words(self, use: TableUse) -> array[int]:
        """The words of an L2 table."""
        size = self._image.header.cluster_size
        return decode(self._file.read(use.place, size).ljust(size, b"\0"), TYPECODE, BYTE_ORDER)

    def runs(self, use: TableUse, words: array[int]) -> Iterator[Run]:
        """The runs of an L2 table; of what cannot be true `fault` is told."""
        image = self._image
        entries = image.header.l2_entries
        for run in image.decoder.runs(words, 0, entries):
            entry = run.entry if isinstance(run, EntryFault) else run.first
            wrong = run.message if isinstance(run, EntryFault) else image.place_fault(run)
            if wrong is not None:
                self._fault(f"L2 entry {entry}: {wrong}", use.place + entry * image.header.l2_entry_bytes)
                if isinstance(run, Run):
                    self._dangles(run.host_offset, max(run.length, run.host_length))
            elif isinstance(run, Run):
                if run.kind is Kind.DATA and run.host_offset + run.length > image.data_size:
                    self.cut[use.place] = run
                yield run

    def _dangles(self, place: int, length: int) -> None:
        if place < self._size + _FAR_BYTES:
            self.dangling_end = max(self.dangling_end, place + length)

    # -- inside ---------------------------------------------------------------------------------

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
        for index, entry in enumerate(decode(raw, TYPECODE, BYTE_ORDER)):
            if not entry:
                continue
            place = entry & _BLOCK_PLACE
            inside = header.cluster_size <= place < self._size
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

    def _read_uses(self) -> list[TableUse]:
        image = self._image
        try:
            self._snapshots = image.read_snapshots()
        except ImageError as error:
            self._snapshots = []
            self._fault(error.message, error.offset)
        current = self._places(image.l1, "L1 entry", image.header.l1_offset)
        others: list[int] = []
        length = 0
        for each in self._snapshots:
            length += each.l1_length
            if each.l1_offset % image.header.cluster_size or each.l1_offset + each.l1_length > self._size:
                self._fault(f"the L1 table of snapshot {each.name or each.id} cannot be there", each.offset)
                self._dangles(each.l1_offset, each.l1_length)
            elif length <= 2 * MAX_L1_BYTES:
                raw = bytearray(self._file.read(each.l1_offset, each.l1_length))
                others += self._places(L1Table(raw), f"snapshot {each.name or each.id}: L1 entry", each.l1_offset)
        uses: dict[int, int] = {place: len(list(group)) for place, group in groupby(sorted(current))}
        all_uses = [(place, len(list(group))) for place, group in groupby(sorted(current + others))]
        return [TableUse(place, times, uses.get(place, 0)) for place, times in all_uses]

    def _places(self, l1: L1Table, what: str, offset: int) -> list[int]:
        places: list[int] = []
        for index, entry in l1.used():
            place = entry & OFFSET
            wrong = self._image.slices.table_fault(place) if place else None
            if wrong is not None:
                self._fault(f"{what} {index}: {wrong}", offset + WORD * index)
                self._dangles(place, 1 << self._bits)
            elif place:
                places.append(place)
        return places

    def _in_table(self, use: TableUse) -> Iterator[Referred]:
        image, bits = self._image, self._bits
        words = self.words(use)
        per_entry = image.header.l2_entry_bytes // WORD
        last_entry = -1
        for run in self.runs(use, words):
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
                    yield from self._data(run, run.host_offset, run.length >> bits, use)
            elif run.first != last_entry and words[2 * run.first] & OFFSET:
                last_entry = run.first
                yield from self._data(run, words[2 * run.first] & OFFSET, 1, use)

    def _data(self, run: Run, place: int, clusters: int, use: TableUse) -> Iterator[Referred]:
        if place % (1 << self._bits) or place >= self._size:
            self._fault(f"L2 entry {run.first}: cluster at {place:#x} cannot be there", use.place)
            self._dangles(place, clusters << self._bits)
            return
        most = -(-self._size >> self._bits) - (place >> self._bits)
        yield Referred(place >> self._bits, min(clusters, most), use.times)

    def _of_extensions(self) -> Iterator[Referred]:
        image = self._image
        crypto = data_of(image.extensions, CRYPTO_HEADER)
        if crypto is not None and len(crypto) >= 2 * WORD:
            start, length = (int.from_bytes(crypto[at : at + WORD], "big") for at in (0, WORD))
            yield from self._range(start, length)
        directory = directory_of(image.extensions)
        if directory is None:
            return
        yield from self._range(directory.offset, directory.length)
        try:
            bitmaps = read_bitmaps(self._file, image.extensions)
        except ImageError as error:
            self._fault(error.message, error.offset)
            return
        for each in bitmaps:
            length = WORD * each.table_entries
            if each.table_offset % image.header.cluster_size or each.table_offset + length > self._size:
                self._fault(f"the table of bitmap {each.name} cannot be there", each.offset)
                continue
            yield from self._range(each.table_offset, length)
            for entry in decode(self._file.read(each.table_offset, length), TYPECODE, BYTE_ORDER):
                if entry & OFFSET:
                    yield from self._range(entry & OFFSET, 1)
