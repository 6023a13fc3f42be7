"""L1 and L2 entries of qcow2: their bits, and the words of a part of an L2 table as runs.

QEMU's docs/interop/qcow2, "Cluster mapping"; what its text leaves open is in docs/specs/qcow2.md, "Refcounts, L1, L2".
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.extent import Kind
from tapfs.formats.changed_table import ByteOrder
from tapfs.formats.qcow2.header import SUBCLUSTERS, Header
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.records import NamedTuple

BYTE_ORDER: ByteOrder = "big"
TYPECODE = "Q"

#: The refcount of what an entry points at is exactly one, so it may be written in place.
COPIED = 1 << 63
COMPRESSED = 1 << 62
#: Bits 9 to 55.
OFFSET = (1 << 56) - (1 << 9)
#: Bits 1 to 8 and 56 to 61 of an entry that is not compressed are reserved.
RESERVED = 0x3F000000000001FE
ZERO = 1
#: Of a compressed entry's length: sectors of 512 bytes.
SECTOR = 512
#: A longer payload is not needed for any cluster, and the engine takes none.
MAX_PAYLOAD = (1 << 22) - 1

#: Bits of the second word of an extended entry: every subcluster is allocated, or reads as zeros.
ALL_ALLOCATED = (1 << SUBCLUSTERS) - 1
ALL_ZERO = ALL_ALLOCATED << SUBCLUSTERS


def new_words(count: int) -> array[int]:
    """`count` words of zero."""
    return array(TYPECODE, bytes(8 * count))


def consecutive(start: int, count: int, step: int) -> array[int]:
    """The words of `count` plain clusters that follow one another from host offset `start`, owned alone."""
    return array(TYPECODE, range(start | COPIED, (start | COPIED) + count * step, step))


def packed_bits(cluster_bits: int) -> int:
    """How many low bits of a compressed entry are the place of its payload."""
    return 62 - (cluster_bits - 8)


def compressed_place(word: int, cluster_bits: int) -> tuple[int, int]:
    """Where the payload of a compressed entry begins, and the bytes that it may have: whole sectors' ends."""
    bits = packed_bits(cluster_bits)
    start = word & ((1 << bits) - 1)
    further = word >> bits & ((1 << (cluster_bits - 8)) - 1)
    return start, (further + 1) * SECTOR - start % SECTOR


def compressed_word(start: int, length: int, cluster_bits: int) -> int:
    """The entry of a payload of `length` bytes at `start`."""
    further = (start % SECTOR + length - 1) // SECTOR
    return COMPRESSED | further << packed_bits(cluster_bits) | start


class Run(NamedTuple):
    """A run of a slice whose bytes all come from the same place. `start` and `length` are bytes from the slice's start.

    `first` is the entry that it begins in. DATA and allocated ZERO lie at `host_offset`, a COMPRESSED payload is
    ``[host_offset, host_offset + host_length)``. `copied`: the place belongs to this disk alone.
    """

    first: int
    start: int
    length: int
    kind: Kind
    host_offset: int = 0
    host_length: int = 0
    copied: bool = False


class EntryFault(NamedTuple):
    """An entry that cannot be true, and why."""

    entry: int
    message: str


class Decoder:
    """Decodes the words of slices of one image.

    `file_size` bounds what compressed entries point at; whoever uses the decoder moves it as the file grows.
    """

    def __init__(self, header: Header, file_size: int) -> None:
        self._header = header
        self.file_size = file_size
        self._zero = ZERO if header.version > VERSIONS[0] and not header.extended_l2 else 0

    def kind(self, word: int) -> Kind:
        """The kind of an entry by its first word; of an extended one what it is if the second has all bits."""
        if word & COMPRESSED:
            return Kind.COMPRESSED
        if word & self._zero:
            return Kind.ZERO
        # With a data file offset 0 is a place like any other, and the bit tells it from nothing.
        if word & OFFSET or (self._header.has_data_file and word & COPIED):
            return Kind.DATA
        return Kind.UNALLOCATED

    def runs(self, words: array[int], first: int, stop: int) -> Iterator[Run | EntryFault]:
        """The entries ``[first, stop)`` of a slice as runs, ascending, and its faults."""
        if self._header.extended_l2:
            yield from self._extended_runs(words, first, stop)
            return
        bits = self._header.cluster_bits
        step = 1 << bits
        index = first
        while index < stop:
            word = words[index]
            kind = self.kind(word)
            if kind is Kind.COMPRESSED or (word & ZERO and not self._zero):
                yield self._single(index, word)
                index += 1
                continue
            advance = step if word & OFFSET or kind is Kind.DATA else 0
            after = index + 1
            # A whole run is usual (a filled, an empty table), so that is tried before stepping through.
            if after < stop and words[stop - 1] == word + (stop - 1 - index) * advance:
                whole = array(TYPECODE, range(word, word + (stop - index) * advance, step)) if advance else None
                if words[index:stop] == (array(TYPECODE, [word]) * (stop - index) if whole is None else whole):
                    after = stop
            expected = word + (after - index) * advance
            while after < stop and words[after] == expected:
                after += 1
                expected += advance
            copied = word & COPIED != 0
            yield Run(index, index << bits, after - index << bits, kind, word & OFFSET, 0, copied)
            index = after

    def _single(self, index: int, word: int) -> Run | EntryFault:
        bits = self._header.cluster_bits
        if not word & COMPRESSED:
            return EntryFault(index, "has the bit of zeros, which version 2 does not know")
        if word & COPIED:
            return EntryFault(index, "is compressed and says that it is owned alone")
        start, length = compressed_place(word, bits)
        length = min(length, MAX_PAYLOAD)
        if start < self.file_size:  # the sectors that the entry names are an upper bound
            length = min(length, self.file_size - start)
        return Run(index, index << bits, 1 << bits, Kind.COMPRESSED, start, length)

    def _extended_runs(self, words: array[int], first: int, stop: int) -> Iterator[Run | EntryFault]:
        header = self._header
        bits, granule = header.cluster_bits, header.granule
        for index in range(first, stop):
            word, bitmap = words[2 * index], words[2 * index + 1]
            at, place = index << bits, word & OFFSET
            if word & COMPRESSED:
                if bitmap:
                    yield EntryFault(index, f"is compressed and has subclusters ({bitmap:#x})")
                else:
                    yield self._single(index, word)
                continue
            allocated, zeros = bitmap & ALL_ALLOCATED, bitmap >> SUBCLUSTERS
            if allocated & zeros:
                yield EntryFault(index, f"has subclusters that are allocated and zero ({bitmap:#x})")
                continue
            if allocated and self.kind(word) is not Kind.DATA:
                yield EntryFault(index, f"has allocated subclusters and no place ({bitmap:#x})")
                continue
            copied = word & COPIED != 0
            sub = 0
            while sub < SUBCLUSTERS:
                one = bitmap >> sub & (1 << SUBCLUSTERS | 1)
                after = sub + 1
                while after < SUBCLUSTERS and bitmap >> after & (1 << SUBCLUSTERS | 1) == one:
                    after += 1
                kind = Kind.DATA if one == 1 else Kind.ZERO if one else Kind.UNALLOCATED
                host = place + sub * granule if place or kind is Kind.DATA else 0
                yield Run(index, at + sub * granule, (after - sub) * granule, kind, host, 0, copied)
                sub = after
