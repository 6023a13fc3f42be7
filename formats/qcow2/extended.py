"""Write a qcow2 image with extended L2 entries, whose clusters have 32 subclusters each.

A write takes only the subclusters that it touches, in a new cluster or in one that has some of them already. A cluster
that is compressed, or that a snapshot shares, is copied whole: its reservation is widened to all of it, and so is the
place that the engine fills. Discards come in whole clusters (`Geometry.packed_unit`), and so do zeros of a data file
and of compressed clusters. Zeros of a part of another cluster are bits of its entry, and its place stays as it is.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from tapfs.driver import HostFile, OpenRequest, Operation, Placement, Reservation
from tapfs.extent import Kind, Range
from tapfs.formats.qcow2.entries import ALL_ZERO, COMPRESSED, COPIED, OFFSET, compressed_place, new_words
from tapfs.formats.qcow2.header import SUBCLUSTERS
from tapfs.formats.qcow2.writer import WritableQcow2Driver
from tapfs.formats.rounding import round_down, round_up
from tapfs.records import NamedTuple


class _Wish(NamedTuple):
    """Subclusters ``[start, stop)`` of one cluster, in bytes of the disk, for the range of that number.

    `host` is the place of the whole cluster, None if it is to be a new one.
    """

    number: int
    cluster: int
    start: int
    stop: int
    host: int | None


class ExtendedQcow2Driver(WritableQcow2Driver):
    """An open image with subclusters, read-write."""

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        super().__init__(file, request)
        #: The clusters that reservations have taken: the guest's and the host's offset.
        self._taken: dict[Reservation, dict[int, int]] = {}

    @property
    def rounded_size(self) -> int:
        """The end of the last subcluster of the disk."""
        return round_up(self.header.size, self.header.granule)

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """See :meth:`tapfs.driver.WritableDriver.reserve`."""
        if operation is Operation.ZERO and not self.data_number:
            return self._reserve_zeros(ranges)
        if operation is not Operation.WRITE:
            return super().reserve(ranges, operation)
        size = self.header.cluster_size
        self.take_metadata()  # of a reservation that failed
        wishes: list[_Wish] = []
        wide: list[Range] = []
        for number, (offset, length) in enumerate(ranges):
            start, stop = round_down(offset, size), round_up(offset + length, size)
            pieces = list(self.pieces(start, stop - start, used=False))
            self.require_runs(pieces)
            self.keep_tables(pieces)
            at = max(offset, wishes[-1].stop) if wishes else offset
            while at < offset + length:
                wish = self._wish(number, at, offset + length)
                wishes.append(wish)
                _widen(wide, wish.start, wish.stop)
                if wish.host is None:  # nobody else may take another place for this cluster
                    _widen(wide, wish.cluster, min(wish.cluster + size, self.rounded_size))
                at = wish.stop
        taken, fresh = self._take(wishes)
        placements: list[Placement] = []
        last_number = -1
        for wish in wishes:
            host = taken[wish.cluster] if wish.host is None else wish.host
            place = host + wish.start - wish.cluster
            placement = Placement(wish.start, wish.stop - wish.start, place, self.data_number, fresh=host in fresh)
            if wish.number == last_number and _continues(placements[-1], placement):
                last = placements.pop()
                placement = last._replace(length=last.length + placement.length)
            placements.append(placement)
            last_number = wish.number
        self.note_growth()
        reservation = Reservation(tuple(wide), operation, tuple(placements), metadata=self.take_metadata())
        self._open.add(reservation)
        self._taken[reservation] = taken
        return reservation

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map; durable after the next flush."""
        self._taken.pop(reservation, None)
        super().commit(reservation)

    def abort(self, reservation: Reservation) -> None:
        """Give the places back."""
        self._open.remove(reservation)
        if not self.data_number:
            for host in self._taken.pop(reservation, {}).values():
                self.space.give_back(host, self.header.cluster_size)

    def can_zero(self, offset: int, length: int) -> bool:
        """See :meth:`tapfs.driver.PartlyZeroing.can_zero`: whether the cluster has an entry that can say it."""
        del length
        if self.data_number:
            return False
        unit, entry = divmod(offset >> self.header.cluster_bits, self.header.slice_entries)
        words = self.slices.load(unit)
        return words is None or not words[2 * entry] & COMPRESSED

    # -- placing --------------------------------------------------------------------------------

    def _reserve_zeros(self, ranges: Sequence[Range]) -> Reservation:
        """Have the tables that a commit changes. Zeros need no place of their own."""
        size = self.header.cluster_size
        self.take_metadata()  # of a reservation that failed
        for offset, length in ranges:
            start, stop = round_down(offset, size), round_up(offset + length, size)
            self.require_runs(list(self.pieces(start, stop - start, used=True)))
            self.keep_tables(list(self.pieces(start, stop - start, used=self.backing is None)))
        self.note_growth()
        reservation = Reservation(tuple(ranges), Operation.ZERO, (), metadata=self.take_metadata())
        self._open.add(reservation)
        return reservation

    def _wish(self, number: int, at: int, end: int) -> _Wish:
        """What of ``[at, end)`` lies in the cluster of `at`, and where that cluster is, if it can be written there."""
        size = self.header.cluster_size
        cluster = round_down(at, size)
        stop = min(cluster + size, self.rounded_size)
        unit, entry = divmod(cluster >> self.header.cluster_bits, self.header.slice_entries)
        words = self.slices.load(unit)
        word = 0 if words is None else words[2 * entry]
        allocated = self.decoder.kind(word)
        if allocated is Kind.UNALLOCATED:
            return _Wish(number, cluster, at, min(end, stop), None)
        if allocated is Kind.DATA and word & COPIED and self.owns_table(unit // self.header.slices):
            return _Wish(number, cluster, at, min(end, stop), word & OFFSET)
        return _Wish(number, cluster, cluster, stop, None)

    def _take(self, wishes: Sequence[_Wish]) -> tuple[dict[int, int], set[int]]:
        """Host clusters for the clusters that have none yet, and which of them read as zeros."""
        size = self.header.cluster_size
        clusters = sorted({wish.cluster for wish in wishes if wish.host is None})
        if self.data_number:
            return {cluster: cluster for cluster in clusters}, set()
        taken: dict[int, int] = {}
        fresh: set[int] = set()
        waiting = iter(clusters)
        for piece in self.space.take(len(clusters) * size) if clusters else ():
            self.ensure_counts(piece.host_offset, piece.length)
            for host in range(piece.host_offset, piece.host_offset + piece.length, size):
                taken[next(waiting)] = host
                if piece.fresh:
                    fresh.add(host)
        return taken, fresh

    # -- publishing -----------------------------------------------------------------------------

    def link(self, placements: Sequence[Placement]) -> None:
        """Have the entries of the placements point at them."""
        for placement in placements:
            self._link(placement)

    def _link(self, placement: Placement) -> None:
        header = self.header
        for cluster, start, stop in self._clusters(placement.offset, placement.length):
            unit, entry = divmod(cluster >> header.cluster_bits, header.slice_entries)
            changed = self.owned_slice(unit)
            word, bitmap = changed.entries[2 * entry], changed.entries[2 * entry + 1]
            host = placement.host_offset + cluster - placement.offset
            first, last = (start - cluster) // header.granule, (stop - cluster) // header.granule
            placed = (1 << last) - (1 << first)
            kind = self.decoder.kind(word)
            if kind is Kind.DATA and word & OFFSET == host:
                bitmap |= placed
            else:
                if not self.data_number:
                    self.refcounts.raise_counts(host >> header.cluster_bits, 1)
                self._release_word(word)
                # Zeros of a cluster without a place stay; of one that was copied whole everything is in its new place.
                bitmap = placed | (bitmap & ALL_ZERO if kind is Kind.UNALLOCATED else 0)
            changed.entries[2 * entry] = host | COPIED
            changed.entries[2 * entry + 1] = bitmap & ~(placed << SUBCLUSTERS)
            changed.mark(2 * entry, 2 * entry + 2)

    def unlink(self, offset: int, length: int, operation: Operation) -> None:
        """Let go of clusters: nothing is there any more, or zeros where a parent would show through."""
        size, end = self.header.cluster_size, offset + length
        first_whole, last_whole = round_up(offset, size), round_down(end, size)
        if end == self.rounded_size:  # the disk may end inside its last cluster
            last_whole = round_up(end, size)
        if first_whole > last_whole:
            self._zero_part(offset, end)
            return
        if offset < first_whole:
            self._zero_part(offset, min(first_whole, end))
        self._unlink_whole(first_whole, last_whole - first_whole, operation)
        if last_whole < end:
            self._zero_part(last_whole, end)

    def _unlink_whole(self, offset: int, length: int, operation: Operation) -> None:
        """The same of whole clusters, which give up their places."""
        below = self.backing is not None and operation is not Operation.UNCOVER
        absent = below and operation is Operation.ZERO
        for unit, first, stop in self.pieces(offset, length, used=not absent):
            words = self.slices.load(unit)
            if words is None:
                words = new_words(2 * self.header.slice_entries)
            zeros = array(words.typecode, [0, ALL_ZERO if below else 0])
            for entry in range(first, stop):
                pair = words[2 * entry : 2 * entry + 2]
                untouched = operation is Operation.DISCARD and not pair[0] & (OFFSET | COMPRESSED)
                if pair == zeros or untouched:
                    continue
                changed = self.owned_slice(unit)
                self._release_word(pair[0])
                changed.entries[2 * entry : 2 * entry + 2] = zeros
                changed.mark(2 * entry, 2 * entry + 2)
                words = changed.entries

    def _zero_part(self, start: int, stop: int) -> None:
        """Have subclusters of one cluster read as zeros. Others of it may be written meanwhile, so its place stays."""
        header = self.header
        cluster = round_down(start, header.cluster_size)
        unit, entry = divmod(cluster >> header.cluster_bits, header.slice_entries)
        words = self.slices.load(unit)
        word, bitmap = (0, 0) if words is None else (words[2 * entry], words[2 * entry + 1])
        if word & COMPRESSED:
            raise AssertionError(f"the cluster at {cluster} is compressed, and {start} is inside it")
        zeroed = (1 << (stop - cluster) // header.granule) - (1 << (start - cluster) // header.granule)
        shown = self.backing is not None or word & OFFSET
        wanted = bitmap & ~zeroed | (zeroed << SUBCLUSTERS if shown else 0)
        if wanted != bitmap:
            changed = self.owned_slice(unit)
            changed.entries[2 * entry + 1] = wanted
            changed.mark(2 * entry, 2 * entry + 2)

    def hide_parent(self, offset: int, length: int) -> None:
        """Zeros where nothing of a data file was used, because a parent would show through."""
        for unit, first, stop in self.pieces(offset, length, used=False):
            changed = self.owned_slice(unit)
            for entry in range(first, stop):
                bitmap = changed.entries[2 * entry + 1]
                changed.entries[2 * entry + 1] = bitmap | (~bitmap << SUBCLUSTERS & ALL_ZERO)
            changed.mark(2 * first, 2 * stop)

    def release(self, words: array[int], first: int, stop: int) -> None:
        """Lower the counts of what the entries ``[first, stop)`` of a slice refer to."""
        for entry in range(first, stop):
            self._release_word(words[2 * entry])

    def _release_word(self, word: int) -> None:
        """Lower the counts of what the first word of an entry refers to."""
        bits = self.header.cluster_bits
        if self.data_number:
            return
        if word & COMPRESSED:
            start, length = compressed_place(word, bits)
            last = (start + length - 1) >> bits
            self.refcounts.lower_counts(start >> bits, last - (start >> bits) + 1)
        elif word & OFFSET:
            self.refcounts.lower_counts((word & OFFSET) >> bits, 1)

    def _clusters(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The clusters that a range touches: where each begins, and the part of the range in it."""
        size = self.header.cluster_size
        for cluster in range(round_down(offset, size), offset + length, size):
            yield cluster, max(offset, cluster), min(offset + length, cluster + size)


def _widen(wide: list[Range], start: int, stop: int) -> None:
    """Add a range that begins in or behind the last one of the list."""
    if wide and start <= wide[-1].end:
        last = wide.pop()
        start, stop = min(last.offset, start), max(last.end, stop)
    wide.append(Range(start, stop - start))


def _continues(left: Placement, right: Placement) -> bool:
    follows = left.offset + left.length == right.offset and left.host_offset + left.length == right.host_offset
    return follows and left.fresh == right.fresh
