"""The tables of one disk of a qcow2 image, the current one or a snapshot's: what they refer to, and their bits.

A cluster counts once for each L1 entry and L2 entry that leads to it. The bit "owned alone" (COPIED) of an entry says
that its cluster has the count 1. In the tables of a snapshot nobody looks at it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import decode
from tapfs.formats.qcow2.counted_entries import WINDOW_BITS, counter_of
from tapfs.formats.qcow2.edited_image import EditedImage, changed_sectors
from tapfs.formats.qcow2.entries import BYTE_ORDER, COMPRESSED, COPIED, OFFSET, TYPECODE, compressed_place
from tapfs.formats.qcow2.header import WORD
from tapfs.formats.qcow2.l1 import L1Table
from tapfs.plan import Step
from tapfs.references import CountedWindow

#: COPIED is the highest bit of the first byte of a word.
_CLEARED = bytes(byte & 0x7F for byte in range(256))


class DiskTables:
    """The L1 table of a disk and the L2 tables that it leads to."""

    def __init__(self, image: EditedImage, l1: L1Table) -> None:
        self._image = image
        self._l1 = l1
        self._bits = image.header.cluster_bits
        self._entry_bytes = image.header.l2_entry_bytes
        self._counter = counter_of(image)

    def places(self) -> list[int]:
        """The host offsets of the L2 tables, in the order of the L1 table."""
        return [entry & OFFSET for _, entry in self._l1.used() if entry & OFFSET]

    def windows(self) -> Iterator[CountedWindow]:
        """The references of the L2 entries, counted window by window, those of the L1 entries left out.

        The tables are read for each window. Raises ImageError(corrupt).
        """
        waiting, done = {0}, set[int]()
        while waiting:
            number = min(waiting)
            window = CountedWindow(number, WINDOW_BITS, -(-self._image.file.size() >> self._bits))
            for place in self.places():
                self._count_table(place, window)
            done.add(number)
            waiting = (waiting | window.others) - done
            yield window

    def window_numbers(self) -> range:
        """The numbers of all windows of the file."""
        clusters = -(-self._image.file.size() >> self._bits)
        return range(-(-clusters >> WINDOW_BITS))

    def l1_without_bits(self) -> L1Table:
        """A copy of the L1 table in which no entry says that its table is owned alone."""
        return L1Table(_without_bits(bytes(self._l1.raw), WORD))

    def clear_bits(self) -> Iterator[Step]:
        """Writes after which no entry of the L2 tables says that its cluster is owned alone."""
        for place in dict.fromkeys(self.places()):
            raw = self._read(place)
            yield from changed_sectors(place, raw, _without_bits(raw, self._entry_bytes))

    def set_bits(self, number: int) -> Iterator[Step]:
        """Writes after which the entries of L2 tables say that their clusters in a window are owned alone, if they are.

        A table that is shared refers to nothing that is owned alone. The writes must be durable before those of the
        next window are asked for.
        """
        base = number << WINDOW_BITS
        alone = self._alone_in(base)
        for place in self.places():
            if not self._is_alone(place >> self._bits):
                continue
            raw = self._read(place)
            changed = bytearray(raw)
            if self._counter is not None:
                self._counter.mark_owned(changed, base, alone)
            else:
                self._mark_owned(changed, base, alone)
            yield from changed_sectors(place, raw, changed)

    def l1_with_bits(self) -> L1Table:
        """A copy of the L1 table whose entries say that their tables are owned alone where that is so."""
        changed = L1Table(bytearray(self._l1.raw))
        for index, entry in self._l1.used():
            if entry & OFFSET and self._is_alone((entry & OFFSET) >> self._bits):
                changed[index] = entry | COPIED
        return changed

    # -- inside ---------------------------------------------------------------------------------

    def _read(self, place: int) -> bytes:
        size = 1 << self._bits
        return self._image.file.read(place, size).ljust(size, b"\0")

    def _count_table(self, place: int, window: CountedWindow) -> None:
        """Count what one L2 table refers to."""
        raw = self._read(place)
        at, entries = 0, self._image.header.l2_entries
        words: array[int] | None = None
        while at < entries:
            stop = entries
            if self._counter is not None:
                at = self._counter.count(raw, at, entries, 1, window)
                stop = min(at + 1, entries)
            if at < stop:
                words = decode(raw, TYPECODE, BYTE_ORDER) if words is None else words
                for first, clusters in self._of_entries(place, words, at, stop):
                    window.add(first, clusters, 1)
            at = stop

    def _of_entries(self, place: int, words: array[int], first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The first cluster and the number of clusters that each of these entries refers to, if it does."""
        bits, size, step = self._bits, self._image.file.size(), self._entry_bytes // WORD
        for index in range(first, stop):
            word = words[index * step]
            host = word & OFFSET
            if word & COMPRESSED:
                start, length = compressed_place(word, bits)
                # The sectors that the entry names are an upper bound, and the file may end before.
                last = min(start + length, max(start + 1, size)) - 1
                yield start >> bits, (last >> bits) - (start >> bits) + 1
            elif host & ((1 << bits) - 1):
                raise self._error(place + index * self._entry_bytes, f"cluster at {host:#x} not aligned")
            elif host:
                yield host >> bits, 1

    def _mark_owned(self, raw: bytearray, base: int, alone: bytearray) -> None:
        """What `tapfs.references.EntryCounter.mark_owned` does."""
        words = decode(bytes(raw), TYPECODE, BYTE_ORDER)
        for index in range(0, len(words), self._entry_bytes // WORD):
            word = words[index]
            cluster = ((word & OFFSET) >> self._bits) - base
            if word & OFFSET and not word & (COMPRESSED | COPIED) and 0 <= cluster < len(alone) and alone[cluster]:
                raw[index * WORD] |= 0x80

    def _alone_in(self, base: int) -> bytearray:
        """For each cluster of the window at `base` whether its count is 1, a byte each."""
        refcounts = self._image.refcounts
        clusters = min(1 << WINDOW_BITS, max(0, -(-self._image.file.size() >> self._bits) - base))
        alone = bytearray(clusters)
        for at in range(0, clusters, refcounts.per_block):
            block = refcounts.block((base + at) // refcounts.per_block)
            if block is not None:
                found = refcounts.counting.alone(block.tobytes())
                alone[at : at + len(found)] = found[: clusters - at]
        return alone

    def _is_alone(self, cluster: int) -> bool:
        """Whether the count of a cluster is 1."""
        return self._image.refcounts.get(cluster) == 1

    def _error(self, offset: int, message: str) -> ImageError:
        return ImageError(ErrorKind.CORRUPT, message, path=self._image.file.path, offset=offset, op="read the tables")


def _without_bits(raw: bytes, entry_bytes: int) -> bytearray:
    changed = bytearray(raw)
    changed[::entry_bytes] = bytes(changed[::entry_bytes]).translate(_CLEARED)
    return changed
