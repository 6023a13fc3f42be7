"""Salvages a qcow2 image whose header or L1 table is damaged, by the L2 tables that a scan of the file finds.

An L2 table does not say which part of the disk it maps; only an L1 entry does (`placed_tables`).
L2 tables themselves are read as they are: an entry that cannot be true costs its cluster.
What is made anew is laid behind the end of the file, so that it covers no byte of it but those of the header.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

from tapfs.driver import HostFile, Salvage, SalvageRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import encode
from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.backing import format_word
from tapfs.formats.qcow2.entries import BYTE_ORDER, COMPRESSED, OFFSET, TYPECODE, compressed_place
from tapfs.formats.qcow2.header import (
    COMPRESSION_DEFLATE,
    COMPRESSION_TYPE,
    COMPRESSION_ZSTD,
    EXTENDED_L2,
    LENGTH_3,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    WORD,
    Header,
    parse_header,
)
from tapfs.formats.qcow2.placed_tables import OldTable, PlacedTables
from tapfs.formats.qcow2.snapshots import Snapshot, read_snapshots
from tapfs.formats.qcow2.table_scan import (
    FoundTables,
    TableRules,
    TableScan,
    entries_per_table,
    likely_cluster,
    unnamed_ranges,
)
from tapfs.formats.rounding import round_up
from tapfs.plan import Plan, Write, plan

_HEAD_BYTES = 4096
#: The sizes of clusters in the order in which they are tried: the usual ones first.
_USUAL_BITS = (16, 12, 21, 20)
_ALL_BITS = (*_USUAL_BITS, *(bits for bits in range(MAX_CLUSTER_BITS, MIN_CLUSTER_BITS - 1, -1)))
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def salvage(file: HostFile, request: SalvageRequest) -> Salvage:
    """See :meth:`tapfs.salvage.SalvageableFormat.salvage`."""
    return _Salvage(file, request).found()


class _Salvage:
    def __init__(self, file: HostFile, request: SalvageRequest) -> None:
        self._file = file
        self._request = request
        self._rebuilt: list[str] = []
        self._doubts: list[str] = []
        self._header = self._parsed()
        self._snapshots = self._read_snapshots()
        self._scan, self._tables = self._look()
        self._places = PlacedTables(file, self._scan, self._tables)

    def found(self) -> Salvage:
        """Everything."""
        header = self._header
        if header is None and not self._tables.second:
            message = "no table of a qcow2 image is in the file"
            raise ImageError(ErrorKind.INVALID_FORMAT, message, path=self._file.path, op="salvage")
        moved = self._place_tables()
        size, guessed = self._size()
        unplaced = tuple(unnamed_ranges(self._file, self._scan.rules, self._named()))
        changed = moved or header is None or size != header.size
        patch = self._patch(size, self._entries(size)) if changed else Plan()
        rebuilt, doubts = (*self._rebuilt, *self._places.rebuilt), (*self._places.doubts, *self._doubts)
        return Salvage(patch, rebuilt, doubts, unplaced, guessed)

    # -- the header -----------------------------------------------------------------------------

    def _parsed(self) -> Header | None:
        try:
            header = parse_header(self._file.read(0, _HEAD_BYTES), self._file)
        except ImageError as error:
            self._rebuilt.append(f"the header, which cannot be used: {error.message}")
            return None
        wanted = self._request.cluster_bytes
        if wanted not in (None, header.cluster_size):
            self._rebuilt.append(f"the header, which says clusters of {header.cluster_size} bytes, not of {wanted}")
            return None
        return header

    def _read_snapshots(self) -> list[Snapshot]:
        if self._header is None:
            return []
        try:
            return read_snapshots(self._file, self._header)
        except ImageError as error:
            self._doubts.append(f"the snapshots: {error.message}")
            return []

    def _look(self) -> tuple[TableScan, FoundTables]:
        """The scan with the right size of clusters, and what it has found."""
        size = self._file.size()
        if self._header is not None:
            rules = TableRules(self._header.cluster_size, size, self._header.extended_l2)
            scan = TableScan(self._file, rules)
            return scan, scan.find(self._request.progress)
        wanted = self._request.cluster_bytes
        bits = _ALL_BITS if wanted is None else (wanted.bit_length() - 1,)
        if wanted is not None and (wanted != 1 << bits[0] or bits[0] not in _ALL_BITS):
            message = f"clusters of {wanted} bytes: must be a power of two from 512 to {1 << MAX_CLUSTER_BITS}"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=self._file.path, op="salvage")
        best: tuple[TableScan, FoundTables] | None = None
        for rules in self._likely_rules(bits):
            scan = TableScan(self._file, rules)
            tables = scan.find(self._request.progress)
            larger = self._common_bits(scan, tables)
            if 1 << larger > rules.cluster and wanted is None:  # pieces of the tables of larger clusters
                scan = TableScan(self._file, rules._replace(cluster=1 << larger))
                tables = scan.find(self._request.progress)
            if best is None or (tables.second and not best[1].second):
                best = scan, tables
            if tables.first and tables.second:  # one leads to the other, so the size is right
                best = scan, tables
                break
        if best is None:
            raise AssertionError("there is always a size of clusters to try")
        return best

    def _likely_rules(self, bits: Iterable[int]) -> Iterator[TableRules]:
        """What may be the rules of the tables, the likeliest first."""
        size = self._file.size()
        likely = likely_cluster(self._file) if self._request.cluster_bytes is None else None
        if likely is not None:
            yield TableRules(likely[0], size, likely[1])
        for each in dict.fromkeys(bits):
            yield TableRules(1 << each, size)
            if each >= MIN_EXTENDED_CLUSTER_BITS:
                yield TableRules(1 << each, size, extended=True)

    @staticmethod
    def _common_bits(scan: TableScan, tables: FoundTables) -> int:
        """The exponent of the largest power of two that all places in the tables are multiples of."""
        every = 0
        for place in tables.second:
            for target in scan.targets(place):
                every |= target
        return min((every & -every).bit_length() - 1, MAX_CLUSTER_BITS) if every else 0

    # -- the L1 table ---------------------------------------------------------------------------

    def _place_tables(self) -> bool:
        """Find the table of each L1 entry; whether they are not those that the header leads to."""
        tables, others = self._places, self._first_tables()
        own = array(TYPECODE) if self._header is None else self._own_entries(self._header)
        used = [word for word in own if word]
        # An empty table is right where there is nothing to be in it.
        trusted = any(map(tables.leads, used)) or (self._header is not None and not used and not tables.spare)
        if trusted:
            tables.take(own)
        else:
            own = self._without_own(others)
        damaged = bool(tables.lost)
        for words in self._tables_of_others():
            tables.belong_elsewhere(words)
        tables.fill_from(others)
        tables.drop_data()
        guess = bool(tables.spare) and self._request.in_order
        if guess:
            tables.place_in_order()
        tables.tell_lost()
        return damaged or guess or not trusted

    def _own_entries(self, header: Header) -> array[int]:
        """The words of the L1 table that the header names, as far as the file has them."""
        start, length = header.l1_offset, header.l1_length
        if start % header.cluster_size or start + length > self._file.size() or start == 0:
            return array(TYPECODE)
        return self._scan.words(start, length)

    def _without_own(self, others: Sequence[OldTable]) -> array[int]:
        """Where the header leads to no L1 table: take the fullest one of the file, if there is one; its entries."""
        tables = self._places
        kept = {each.l1_offset for each in self._snapshots}
        free = [each for each in others if each.place not in kept] or others
        if not free:
            self._rebuilt.append("the L1 table, of which nothing is left")
            return array(TYPECODE)
        chosen = max(free, key=lambda each: sum(map(tables.leads, each.words)))
        self._rebuilt.append(f"the place of the L1 table: one was found at {chosen.place:#x}")
        tables.take(chosen.words)
        return chosen.words

    def _first_tables(self) -> list[OldTable]:
        """The L1 tables of the file: clusters that follow one another are one, without zeros at the end."""
        cluster = self._scan.rules.cluster
        runs: list[list[int]] = []
        for place in self._tables.first:
            if runs and runs[-1][1] == place:
                runs[-1][1] += cluster
            else:
                runs.append([place, place + cluster])
        found: list[OldTable] = []
        for start, end in runs:
            words = self._scan.words(start, end - start)
            while words and not words[-1]:
                words.pop()
            found.append(OldTable(start, words))
        return found

    # -- what is told and written ---------------------------------------------------------------

    def _size(self) -> tuple[int, bool]:
        """Bytes of the disk, and whether nothing has said so."""
        if self._request.virtual_size is not None:
            return self._request.virtual_size, False
        if self._header is not None:
            return self._header.size, False
        per_table = entries_per_table(self._scan.rules)
        for index, place in sorted(self._places.placed.items(), reverse=True):
            used = [number for number, word in enumerate(self._scan.entries(place)) if word]
            if used:
                return (index * per_table + used[-1] + 1) * self._scan.rules.cluster, True
        return self._scan.rules.cluster, True

    def _named(self) -> bytearray:
        """A byte for each cluster of the file: 1 if a table names it, or if it is known to be metadata."""
        rules = self._scan.rules
        named = bytearray(-(-rules.file_size // rules.cluster) + 1)
        named[0] = 1
        metadata = [*self._tables.second, *self._tables.first]
        for place in {*self._places.placed.values(), *metadata}:
            named[place // rules.cluster] = 1
        for first, last in self._places_named({*self._places.placed.values(), *self._tables_of_snapshots()}):
            if last < len(named):
                named[first : last + 1] = b"\1" * (last + 1 - first)
        for start, length in self._known_metadata():
            first, last = start // rules.cluster, -(-(start + length) // rules.cluster)
            named[first:last] = b"\1" * max(0, min(last, len(named)) - first)
        return named

    def _tables_of_snapshots(self) -> Iterator[int]:
        second = set(self._tables.second)
        for words in self._tables_of_others():
            yield from (word & OFFSET for word in words if word & OFFSET in second)

    def _tables_of_others(self) -> Iterator[array[int]]:
        """The words of the L1 tables of the snapshots, of those that can be read."""
        size = self._file.size()
        for start, length in {(each.l1_offset, each.l1_length) for each in self._snapshots}:
            if not start % self._scan.rules.cluster and start + length <= size:
                yield self._scan.words(start, length)

    def _places_named(self, tables: Iterable[int]) -> Iterator[tuple[int, int]]:
        """The first and the last cluster of the file that each entry of these tables leads to."""
        cluster = self._scan.rules.cluster
        bits = cluster.bit_length() - 1
        for place in tables:
            for word in self._scan.entries(place):
                if word & COMPRESSED:
                    start, length = compressed_place(word, bits)
                    yield start // cluster, (start + length - 1) // cluster
                elif word & OFFSET:
                    yield (word & OFFSET) // cluster, (word & OFFSET) // cluster

    def _known_metadata(self) -> Iterator[tuple[int, int]]:
        """The ranges of the refcounts, and of what a good header names."""
        header = self._header
        if header is None:
            return
        size = self._file.size()
        if header.reftable_offset + header.reftable_length <= size:
            yield header.reftable_offset, header.reftable_length
            for word in self._scan.words(header.reftable_offset, header.reftable_length):
                if word & OFFSET < size:
                    yield word & OFFSET, header.cluster_size
        yield header.l1_offset, header.l1_length
        for each in self._snapshots:
            yield each.l1_offset, each.l1_length
        if self._snapshots:
            yield header.snapshots_offset, self._snapshots[-1].offset + self._snapshots[-1].length

    def _entries(self, size: int) -> array[int]:
        """The L1 table of a disk of `size` bytes."""
        rules = self._scan.rules
        needed = -(-size // (entries_per_table(rules) * rules.cluster))
        if WORD * needed > MAX_L1_BYTES:
            message = f"a disk of {size} bytes needs an L1 table of {needed} entries, more than {MAX_L1_BYTES} bytes"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=self._file.path, op="salvage")
        return self._places.entries(needed)

    def _patch(self, size: int, words: array[int]) -> Plan:
        """The header and an L1 table behind the end of the file."""
        cluster = self._scan.rules.cluster
        l1_offset = round_up(self._file.size(), cluster) + cluster
        reftable = round_up(l1_offset + WORD * len(words), cluster)
        if self._header is None:
            head = self._new_head(size, l1_offset, len(words), reftable)
        else:
            header = self._header._replace(size=size, l1_entries=len(words), l1_offset=l1_offset)
            head = header.pack()
        tables = [Write(0, l1_offset, encode(words, BYTE_ORDER)), Write(0, reftable, bytes(cluster))]
        return plan([Write(0, 0, head), *tables], mends="the header and the L1 table")

    def _new_head(self, size: int, l1_offset: int, entries: int, reftable: int) -> bytes:
        """The first bytes of the file: header, extensions, the name of the parent."""
        rules, backing = self._scan.rules, self._request.backing
        codec = self._codec()
        features = (EXTENDED_L2 if rules.extended else 0) | (COMPRESSION_TYPE if codec else 0)
        header = Header(
            version=3,
            backing_offset=0,
            backing_size=0,
            cluster_bits=rules.cluster.bit_length() - 1,
            size=size,
            crypt_method=0,
            l1_entries=entries,
            l1_offset=l1_offset,
            reftable_offset=reftable,
            reftable_clusters=1,
            snapshot_count=0,
            snapshots_offset=0,
            incompatible=features,
            header_length=LENGTH_3,
            compression_type=codec,
        )
        found: list[ext.Extension] = []
        name = b""
        if backing is not None:
            name = backing.name.encode("utf-8", "surrogateescape")
            if backing.format is not None:
                found.append(ext.Extension(ext.BACKING_FORMAT, format_word(backing.format).encode()))
        tail = ext.pack_extensions(found)
        if name:
            header = header._replace(backing_offset=LENGTH_3 + len(tail), backing_size=len(name))
        else:
            self._doubts.append("the header is lost, so nothing says whether the disk had a parent: if so, name it")
        return header.pack() + tail + name

    def _codec(self) -> int:
        """How the clusters are packed, by the first bytes of one."""
        bits = self._scan.rules.cluster.bit_length() - 1
        for place in self._places.placed.values():
            for word in self._scan.entries(place):
                if word & COMPRESSED:
                    start = compressed_place(word, bits)[0]
                    return COMPRESSION_ZSTD if self._file.read(start, 4) == _ZSTD_MAGIC else COMPRESSION_DEFLATE
        return COMPRESSION_DEFLATE
