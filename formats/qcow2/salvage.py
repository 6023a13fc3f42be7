"""Salvages a qcow2 image whose header or L1 table is damaged, by the L2 tables that a scan of the file finds.

An L2 table does not say which part of the disk it maps; only an L1 entry does. So the order of trust is: the entries of
the L1 table that lead to tables; other L1 tables in the file (those of snapshots, and what an L1 table that grew left
behind), but only for entries that are damaged; and, if the user asks, the order of the tables in the file.
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
from tapfs.formats.qcow2.entries import BYTE_ORDER, COMPRESSED, COPIED, OFFSET, TYPECODE, compressed_place, new_words
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
#: An L1 entry that no driver follows: it stands for a table that is lost.
_LOST = COPIED | 1 << 55
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
#: So many places are named in one message.
_MOST_NAMED = 5


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
        self._spare = set(self._tables.second)
        #: The table that each index of the L1 table leads to; those that are lost are not in it.
        self._placed: dict[int, int] = {}
        #: Indexes whose entry is damaged.
        self._lost: list[int] = []

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
        return Salvage(patch, tuple(self._rebuilt), tuple(self._doubts), unplaced, guessed)

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
        first = self._runs_of_first()
        if self._header is not None:
            own = self._own_entries(self._header)
            bad = [index for index, word in enumerate(own) if word and not self._leads(word)]
            good = sum(1 for word in own if word) - len(bad)
            if good or not (bad or self._spare):
                self._take(own)
                self._lost = list(bad)
                return self._settle(len(own), first) or bool(bad)
        self._without_own(first)
        return True

    def _own_entries(self, header: Header) -> array[int]:
        """The words of the L1 table that the header names, as far as the file has them."""
        start, length = header.l1_offset, header.l1_length
        if start % header.cluster_size or start + length > self._file.size() or start == 0:
            return array(TYPECODE)
        return self._scan.words(start, length)

    def _without_own(self, first: list[tuple[int, array[int]]]) -> None:
        """Where the header leads to no L1 table: take the fullest one of the file, if there is one."""
        kept = {each.l1_offset for each in self._snapshots}
        free = [each for each in first if each[0] not in kept] or first
        if not free:
            self._rebuilt.append("the L1 table, of which nothing is left")
            self._settle(0, [])
            return
        place, words = max(free, key=lambda each: sum(self._leads(word) for word in each[1]))
        self._rebuilt.append(f"the place of the L1 table: one was found at {place:#x}")
        self._take(words)
        self._lost = [index for index, word in enumerate(words) if word and index not in self._placed]
        self._settle(len(words), [each for each in first if each[0] != place])

    def _runs_of_first(self) -> list[tuple[int, array[int]]]:
        """The L1 tables of the file: clusters that follow one another are one, without zeros at the end."""
        cluster = self._scan.rules.cluster
        runs: list[list[int]] = []
        for place in self._tables.first:
            if runs and runs[-1][1] == place:
                runs[-1][1] += cluster
            else:
                runs.append([place, place + cluster])
        found: list[tuple[int, array[int]]] = []
        for start, end in runs:
            words = self._scan.words(start, end - start)
            while words and not words[-1]:
                words.pop()
            found.append((start, words))
        return found

    def _leads(self, word: int) -> bool:
        """Whether an entry leads to a table, or to a cluster of zeros, which is a table of nothing."""
        place = word & OFFSET
        if place in self._spare or place in self._placed.values():
            return True
        rules = self._scan.rules
        if place % rules.cluster or not rules.cluster <= place < rules.file_size:
            return False
        return not self._file.read(place, rules.cluster).strip(b"\0")

    def _take(self, words: Sequence[int]) -> None:
        """Place the tables that these entries lead to."""
        for index, word in enumerate(words):
            if word and self._leads(word):
                self._placed[index] = word & OFFSET
        self._spare.difference_update(self._placed.values())

    def _settle(self, count: int, others: Sequence[tuple[int, array[int]]]) -> bool:
        """Fill what is damaged of `count` entries from other L1 tables and, if asked, by order; whether by order."""
        for each in self._snapshots:
            if not each.l1_offset % self._scan.rules.cluster and each.l1_length <= self._file.size():
                self._spare.difference_update(
                    word & OFFSET for word in self._scan.words(each.l1_offset, each.l1_length)
                )
        for index in list(self._lost):
            copies = {word[index] & OFFSET: place for place, word in others if index < len(word)}
            for table, place in copies.items():
                if table in self._tables.second and table not in self._placed.values():
                    self._placed[index] = table
                    self._spare.discard(table)
                    self._lost.remove(index)
                    self._rebuilt.append(f"L1 entry {index}, from an L1 table at {place:#x}")
                    break
        self._spare -= self._data_of_placed()
        guess = bool(self._spare) and self._request.in_order
        if guess:
            self._place_in_order(count)
        self._tell_lost()
        return guess

    def _data_of_placed(self) -> set[int]:
        """Of the tables that nothing names, those that are data: the guest may keep images of its own."""
        spare = self._spare
        return {target for place in self._placed.values() for target in self._scan.targets(place) if target in spare}

    def _place_in_order(self, count: int) -> None:
        """Put tables that nothing names where one is missing: before those that lie behind them in the file."""
        anchors = sorted(self._placed.items())
        guessed = 0
        for table in sorted(self._spare):
            after = max((index for index, place in anchors if place < table), default=-1)
            index = next((lost for lost in sorted(self._lost) if lost > after), None)
            if index is None:
                index = next(
                    free for free in range(after + 1, count + len(self._spare) + after + 2) if self._free(free)
                )
            if index in self._lost:
                self._lost.remove(index)
            self._placed[index] = table
            anchors.append((index, table))
            guessed += 1
        self._spare.clear()
        self._doubts.append(
            f"the places of {guessed} L2 tables on the disk are guessed by their order in the file: each maps"
            f" {entries_per_table(self._scan.rules) * self._scan.rules.cluster} bytes"
        )

    def _free(self, index: int) -> bool:
        return index not in self._placed

    def _tell_lost(self) -> None:
        if self._lost:
            span = entries_per_table(self._scan.rules) * self._scan.rules.cluster
            self._doubts.append(
                f"{len(self._lost)} L1 entries are damaged and have no copy: {_some(self._lost)};"
                f" each maps {span} bytes"
            )
        if self._spare:
            places = _some(sorted(self._spare), "{:#x}")
            self._doubts.append(f"{len(self._spare)} L2 tables are named by no L1 entry: at {places}")

    # -- what is told and written ---------------------------------------------------------------

    def _size(self) -> tuple[int, bool]:
        """Bytes of the disk, and whether nothing has said so."""
        if self._request.virtual_size is not None:
            return self._request.virtual_size, False
        if self._header is not None:
            return self._header.size, False
        per_table = entries_per_table(self._scan.rules)
        for index, place in sorted(self._placed.items(), reverse=True):
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
        for place in {*self._placed.values(), *metadata}:
            named[place // rules.cluster] = 1
        for first, last in self._places_named({*self._placed.values(), *self._tables_of_snapshots()}):
            if last < len(named):
                named[first : last + 1] = b"\1" * (last + 1 - first)
        for start, length in self._known_metadata():
            first, last = start // rules.cluster, -(-(start + length) // rules.cluster)
            named[first:last] = b"\1" * max(0, min(last, len(named)) - first)
        return named

    def _tables_of_snapshots(self) -> Iterator[int]:
        second = set(self._tables.second)
        for each in self._snapshots:
            for word in self._scan.words(each.l1_offset, each.l1_length):
                if word & OFFSET in second:
                    yield word & OFFSET

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
        """The L1 table of a disk of `size` bytes. No entry says that its table is owned alone: nothing is written."""
        rules = self._scan.rules
        needed = -(-size // (entries_per_table(rules) * rules.cluster))
        if WORD * needed > MAX_L1_BYTES:
            message = f"a disk of {size} bytes needs an L1 table of {needed} entries, more than {MAX_L1_BYTES} bytes"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=self._file.path, op="salvage")
        words = new_words(max([needed, *(index + 1 for index in (*self._placed, *self._lost))]))
        for index in self._lost:
            words[index] = _LOST
        for index, place in self._placed.items():
            words[index] = place
        return words

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
        for place in self._placed.values():
            for word in self._scan.entries(place):
                if word & COMPRESSED:
                    start = compressed_place(word, bits)[0]
                    return COMPRESSION_ZSTD if self._file.read(start, 4) == _ZSTD_MAGIC else COMPRESSION_DEFLATE
        return COMPRESSION_DEFLATE


def _some(numbers: Sequence[int], form: str = "{}") -> str:
    named = ", ".join(form.format(each) for each in numbers[:_MOST_NAMED])
    return f"{named} …" if len(numbers) > _MOST_NAMED else named
