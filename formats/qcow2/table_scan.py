"""Finds L1 and L2 tables of a qcow2 image by their contents, in a file whose own words about them are damaged.

An entry of either table is zero or a multiple of the cluster inside the file, with bits that must be zero (QEMU's
docs/interop/qcow2, "Cluster mapping"). Data of a guest meets that for one word by chance, and for a whole table not.
A table whose entries lead to tables is an L1 table. A refcount table leads to blocks of small numbers.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator

from tapfs.driver import HostFile
from tapfs.extent import Range
from tapfs.formats.changed_table import decode
from tapfs.formats.qcow2.entries import (
    BYTE_ORDER,
    COMPRESSED,
    COPIED,
    OFFSET,
    RESERVED,
    TYPECODE,
    ZERO,
    compressed_place,
)
from tapfs.formats.qcow2.header import MAX_CLUSTER_BITS, SUBCLUSTERS, WORD
from tapfs.records import NamedTuple

#: So much of the start of a cluster tells of most that they are no tables.
_HEAD_BYTES = 512
#: One entry of so many may be damaged in what is still taken for a table.
_FAULTS_IN = 16
#: So many words tell of most clusters that they are no tables.
_FIRST_WORDS = 8
#: The first byte of an entry that owns its place alone.
_LOUD = 0x80
#: A sector with so many of them, and no word that cannot be true, is of a table; so many sectors are enough.
_LOUD_ENTRIES, _ENOUGH_VOTES = 2, 64
_PIECE = 1 << 20
#: A file that was cut had at most so many times its length.
_LONGER = 16
#: A refcount is smaller than this: an image has not so many snapshots.
_MOST_REFERENCES = 256


class TableRules(NamedTuple):
    """What bounds the entries of an image's tables, in bytes."""

    cluster: int
    file_size: int
    extended: bool = False

    @property
    def entry_words(self) -> int:
        """Words of an L2 entry."""
        return 2 if self.extended else 1


class Weight(NamedTuple):
    """How far a piece of a file looks like a table: entries that can be true, that cannot, and that say so loudly."""

    used: int = 0
    wrong: int = 0
    loud: int = 0

    @property
    def is_table(self) -> bool:
        """Whether it is one: hardly an entry is wrong, and one is owned alone or compressed, or several are true."""
        return self.wrong * _FAULTS_IN <= self.used and (self.loud > 0 or self.used > 1)


def weigh(words: array[int], rules: TableRules) -> Weight:
    """Weigh the words of an L1 table, or of an L2 table without subclusters.

    An entry that leads behind the end of the file speaks neither for a table nor against one: the file may be cut.
    """
    used = wrong = loud = 0
    cluster, size = rules.cluster, rules.file_size
    limit = _LONGER * size + cluster
    bits = cluster.bit_length() - 1
    for word in words:
        if not word:
            continue
        place = compressed_place(word, bits)[0] if word & COMPRESSED else word & OFFSET
        if size <= place < limit and not place % (1 if word & COMPRESSED else cluster):
            continue
        if word & COMPRESSED:
            true = not word & COPIED and cluster <= place < size
        else:
            inside = cluster <= place < size or (place == 0 and word == ZERO)
            true = inside and not word & RESERVED and not place % cluster
        if true:
            used += 1
            loud += word >> 62 > 0
        else:
            wrong += 1
    return Weight(used, wrong, loud)


def weigh_extended(words: array[int], rules: TableRules) -> Weight:
    """Weigh the words of an L2 table with subclusters: each entry has a word of bits behind it."""
    entries = weigh(words[::2], rules)
    wrong = sum(1 for bits in words[1::2] if bits & bits >> SUBCLUSTERS & ((1 << SUBCLUSTERS) - 1))
    return entries._replace(wrong=entries.wrong + wrong)


class FoundTables(NamedTuple):
    """The clusters that look like tables, by their places; ascending.

    `second` are L2 tables. `first` are clusters of L1 tables: the current one, those of snapshots, and those that
    an L1 table which grew has left behind.
    """

    second: tuple[int, ...]
    first: tuple[int, ...]


class TableScan:
    """One scan of a file with one size of clusters."""

    def __init__(self, file: HostFile, rules: TableRules) -> None:
        self._file = file
        self.rules = rules

    def words(self, place: int, length: int | None = None) -> array[int]:
        """The words of a cluster, or of the first `length` bytes at a place; past the end of the file they are zero."""
        length = self.rules.cluster if length is None else length
        return decode(self._file.read(place, length).ljust(length, b"\0"), TYPECODE, BYTE_ORDER)

    def entries(self, place: int) -> array[int]:
        """The entries of an L2 table, without the bits of subclusters."""
        return self.words(place)[:: self.rules.entry_words]

    def targets(self, place: int) -> list[int]:
        """Where the entries of a table lead to, in their order; 0 for those that lead nowhere."""
        return [0 if word & COMPRESSED else word & OFFSET for word in self.entries(place)]

    def find(self, progress: Callable[[int, int], None] | None = None) -> FoundTables:
        """Look at every cluster."""
        alike, maybe_first = self._alike(progress)
        second = set(alike)
        first = [place for place in maybe_first if self._leads_to(place, second)]
        second.difference_update(first)
        # What leads to what only looked like a table is none itself.
        second = {place for place in second if not self._is_refcounts(place)}
        return FoundTables(tuple(sorted(second)), tuple(sorted(first)))

    def _alike(self, progress: Callable[[int, int], None] | None) -> tuple[list[int], list[int]]:
        """The clusters whose words could be those of an L2 table, and of an L1 table."""
        second: list[int] = []
        first: list[int] = []
        rules = self.rules
        for place in _clusters(self._file, rules, progress):
            if place < rules.cluster:
                continue  # the header
            head = self.words(place, min(_HEAD_BYTES, rules.cluster))
            if _is_hopeless(head, rules):
                continue
            words = self.words(place)
            plain = weigh(words, rules)
            if plain.is_table:
                first.append(place)
            if (weigh_extended(words, rules) if rules.extended else plain).is_table:
                second.append(place)
        return second, first

    def _leads_to(self, place: int, tables: set[int]) -> bool:
        """Whether most of the entries of a cluster lead to tables, so that it is of an L1 table."""
        targets = [word & OFFSET for word in self.words(place) if word and not word & COMPRESSED]
        return 2 * sum(target in tables for target in targets) > len(targets)

    def _is_refcounts(self, place: int) -> bool:
        """Whether a cluster that no entry calls its own leads to blocks of refcounts."""
        words = self.words(place)
        if any(word & (COPIED | COMPRESSED) for word in words):
            return False
        target = next((word & OFFSET for word in words if word & OFFSET), 0)
        counts = decode(self._file.read(target, self.rules.cluster).ljust(self.rules.cluster, b"\0"), "H", BYTE_ORDER)
        return any(counts) and max(counts) < _MOST_REFERENCES


def _is_hopeless(head: array[int], rules: TableRules) -> bool:
    """Whether the start of a cluster shows that it is no table: of its first words most cannot be true."""
    words = array(TYPECODE, [word for word in head if word][:_FIRST_WORDS])
    plain = weigh(words, rules)
    if plain.wrong <= plain.used:
        return False
    other = weigh(array(TYPECODE, [word for word in head[::2] if word][:_FIRST_WORDS]), rules)
    return not rules.extended or other.wrong > other.used


def likely_cluster(file: HostFile) -> tuple[int, bool] | None:
    """Bytes of a cluster, and whether entries have subclusters, by pieces of tables in a file; None: none was found.

    A sector of an L2 table of plain clusters has words that are multiples of the cluster and of hardly more.
    """
    size = file.size()
    rules = TableRules(_HEAD_BYTES, size)
    votes: Counter[tuple[int, bool]] = Counter()
    for start, length in file.data_ranges(0, size):
        first = start // _HEAD_BYTES * _HEAD_BYTES
        for at in range(first, start + length, _PIECE):
            piece = file.read(at, _PIECE)
            loud, place = piece[::_HEAD_BYTES], -1
            while (place := loud.find(_LOUD, place + 1)) >= 0:
                sector = piece[place * _HEAD_BYTES : (place + 1) * _HEAD_BYTES]
                if len(sector) == _HEAD_BYTES and (vote := _vote(decode(sector, TYPECODE, BYTE_ORDER), rules)):
                    votes[vote] += 1
            if votes.total() >= _ENOUGH_VOTES:
                return votes.most_common(1)[0][0]
    return votes.most_common(1)[0][0] if votes else None


def _vote(words: array[int], rules: TableRules) -> tuple[int, bool] | None:
    """What a sector says of the cluster, if it is of a table: all entries can be true, and some are owned alone."""
    for step in (1, 2):
        weight = weigh(words[::step], rules)
        if weight.wrong or weight.loud < _LOUD_ENTRIES or (weigh_extended(words, rules).wrong and step == 2):
            continue
        every = 0
        for word in words[::step]:
            every |= word & OFFSET
        return min(every & -every, 1 << MAX_CLUSTER_BITS), step == 2
    return None


def _clusters(file: HostFile, rules: TableRules, progress: Callable[[int, int], None] | None) -> Iterator[int]:
    """The places of the clusters that are no holes of the file, ascending."""
    last = -1
    for start, length in file.data_ranges(0, rules.file_size):
        for place in range(start // rules.cluster * rules.cluster, start + length, rules.cluster):
            if place <= last:
                continue
            last = place
            yield place
            if progress is not None and not place % (16 << 20):
                progress(place, rules.file_size)
    if progress is not None:
        progress(rules.file_size, rules.file_size)


def unnamed_ranges(file: HostFile, rules: TableRules, named: bytearray) -> Iterator[Range]:
    """The ranges of a file that hold data in clusters whose byte in `named` is 0; ascending, joined."""
    start = end = 0
    for at, length in file.data_ranges(0, rules.file_size):
        for number in range(at // rules.cluster, -(-(at + length) // rules.cluster)):
            place = number * rules.cluster
            if named[number] or place < end:
                continue
            if place != end:
                if end > start:
                    yield Range(start, end - start)
                start = place
            end = min(place + rules.cluster, rules.file_size)
    if end > start:
        yield Range(start, end - start)


def entries_per_table(rules: TableRules) -> int:
    """L2 entries of a table."""
    return rules.cluster // (WORD * rules.entry_words)
