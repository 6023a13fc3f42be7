"""Fill a new qcow2 image as a stream: compressed clusters at any byte, plain ones on cluster boundaries."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import ChangedTable
from tapfs.formats.qcow2.entries import ALL_ALLOCATED, COPIED, SECTOR, compressed_word, packed_bits
from tapfs.formats.qcow2.header import WORD, Header
from tapfs.formats.qcow2.refcounts import Refcounts
from tapfs.formats.qcow2.space import Space
from tapfs.formats.rounding import round_up
from tapfs.plan import Plan


class StreamedImage(Protocol):
    """What a stream needs of the image that it fills."""

    header: Header
    refcounts: Refcounts
    space: Space

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changed tables and counts."""
        ...

    def owned_slice(self, unit: int) -> ChangedTable:
        """A slice of a table that belongs to this disk alone, to be changed."""
        ...

    def release(self, words: array[int], first: int, stop: int) -> None:
        """Lower the counts of what the entries ``[first, stop)`` of a slice refer to."""
        ...

    def take_for_refcounts(self, clusters: int) -> int:
        """The offset of clusters in a row for refcount blocks or their table."""
        ...

    def flush(self) -> Plan:
        """The plan that makes every change durable."""
        ...

    def flushed(self, executed: Plan) -> None:
        """It is durable."""
        ...


class Qcow2StreamWriter:
    """A :class:`tapfs.driver.BatchStreamWriter`.

    It holds the tables and counts of what was written until `drain` or `finish`.
    """

    def __init__(self, image: StreamedImage, path: str) -> None:
        self._image = image
        self._path = path
        self._unit = -1
        self._slice: ChangedTable | None = None
        #: The end of the last payload.
        self._at = 0

    def append(self, offset: int, host_length: int, *, compressed: bool) -> int:
        """The host offset for the payload of the cluster at guest `offset`.

        Raises ImageError(no_space) where an entry cannot hold the host offset, (out_of_bounds) for a compressed payload
        that is not smaller than a cluster.
        """
        header = self._image.header
        unit = (offset >> header.cluster_bits) // header.slice_entries
        if unit != self._unit or self._slice is None:
            self._slice, self._unit = self._image.owned_slice(unit), unit
        if compressed:
            host_offset = self._packed_place(host_length)
            word = compressed_word(host_offset, host_length, header.cluster_bits)
        else:
            host_offset = self._image.space.take_tail(header.cluster_size, alignment=header.cluster_size)
            self._count(host_offset, header.cluster_size)
            word = host_offset | COPIED
        self._link([offset >> header.cluster_bits], [word], 0 if compressed else ALL_ALLOCATED)
        return host_offset

    def append_all(self, offsets: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """The host offsets that `append` would give for each in turn: most follow the one before them.

        Raises as `append` does.
        """
        header = self._image.header
        places: list[int] = []
        while (at := len(places)) < len(offsets):
            packed = lengths[at] != 0
            places.append(self.append(offsets[at], lengths[at] or header.cluster_size, compressed=packed))
            end = (self._unit + 1) * header.unit
            stop = at = at + 1
            while stop < len(offsets) and offsets[stop] < end and (lengths[stop] != 0) == packed:
                stop += 1
            clusters = [offset >> header.cluster_bits for offset in offsets[at:stop]]
            if clusters:
                places += self._packed_after(clusters, lengths[at:stop]) if packed else self._plain_after(clusters)
        return places

    @property
    def unflushed_bytes(self) -> int:
        """The tables and counts that were changed."""
        return self._image.unflushed_bytes

    def drain(self) -> Plan:
        """The counts, the tables, then the L1 entries that point at them."""
        self._slice = None  # from now on it is changed on top of this plan
        return self._image.flush()

    def finish(self) -> Plan:
        """The same: what was appended is an image at any time."""
        return self.drain()

    def drained(self, executed: Plan) -> None:
        """The tables need not be held any more."""
        self._image.flushed(executed)

    def _packed_after(self, clusters: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Places for payloads of one slice that follow the last one; none where one of them may lie elsewhere."""
        image, bits = self._image, self._image.header.cluster_bits
        # The last one may have filled the room behind another, and then the next begins elsewhere.
        if self._at != image.space.end or max(lengths) >= image.header.cluster_size:
            return []
        starts = list(accumulate(lengths, initial=self._at))
        end = starts.pop()
        first, last = self._at >> bits, (round_up(end, SECTOR) - 1) >> bits
        if end > 1 << packed_bits(bits) or not image.refcounts.can_raise(first, last - first + 1, len(lengths)):
            return []
        image.space.take_tail(end - self._at, alignment=1)
        self._at = end
        numbers = [0] * (last - first + 1)
        for start, length in zip(starts, lengths, strict=True):
            low, high = (start >> bits) - first, ((round_up(start + length, SECTOR) - 1) >> bits) - first
            numbers[low] += 1
            if high > low:  # a payload is smaller than a cluster
                numbers[high] += 1
        image.refcounts.raise_by(first, numbers)
        pairs = zip(starts, lengths, strict=True)
        self._link(clusters, [compressed_word(start, length, bits) for start, length in pairs], 0)
        return starts

    def _plain_after(self, clusters: Sequence[int]) -> list[int]:
        """The places of plain clusters of one slice at the end; none where one may lie elsewhere."""
        image, header = self._image, self._image.header
        size, start = header.cluster_size, image.space.end
        if not image.refcounts.can_raise(start >> header.cluster_bits, len(clusters), 1):
            return []
        places = list(range(start, start + len(clusters) * size, size))
        image.space.take_tail(len(clusters) * size, alignment=size)
        image.refcounts.raise_counts(start >> header.cluster_bits, len(clusters))
        self._link(clusters, [place | COPIED for place in places], ALL_ALLOCATED)
        return places

    def _link(self, clusters: Sequence[int], words: Sequence[int], subclusters: int) -> None:
        """Set the entries of clusters of the slice at hand, of an extended one with the bits of its subclusters."""
        if self._slice is None:
            raise AssertionError("nothing was appended before")
        header, entries = self._image.header, self._slice.entries
        each, first = header.l2_entry_bytes // WORD, self._unit * header.slice_entries
        for cluster, word in zip(clusters, words, strict=True):
            at = (cluster - first) * each
            if each > 1:
                if entries[at]:  # a place that none of its subclusters uses
                    self._image.release(entries, cluster - first, cluster - first + 1)
                entries[at + 1] = subclusters
            entries[at] = word
        self._slice.mark((clusters[0] - first) * each, (clusters[-1] - first + 1) * each)

    def _packed_place(self, length: int) -> int:
        """Payloads follow one another. Each counts for every cluster that its sectors lie in."""
        header, space = self._image.header, self._image.space
        if not 0 < length < header.cluster_size:
            message = f"a compressed cluster of {length} bytes does not fit its entry"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=self._path, op="compress")
        follows = self._at == space.end
        if follows and self._at % header.cluster_size and not self._room_in_count(self._at):
            follows = False
        # Behind a plain cluster the last cluster of payloads has room left, for a payload that fits.
        fits = not follows and length <= -self._at % header.cluster_size and self._room_in_count(self._at)
        start = self._at if fits else space.take_tail(length, alignment=1 if follows else header.cluster_size)
        if start + length > 1 << packed_bits(header.cluster_bits):
            message = "the image file is too long for compressed clusters"
            raise ImageError(ErrorKind.NO_SPACE, message, path=self._path, offset=start, op="allocate")
        self._at = start + length
        self._count(start, round_up(self._at, SECTOR) - start)
        return start

    def _room_in_count(self, place: int) -> bool:
        """Whether the count of the cluster at a place can be raised once more."""
        cluster = place >> self._image.header.cluster_bits
        refcounts = self._image.refcounts
        return refcounts.get(cluster) < refcounts.counting.largest

    def _count(self, start: int, length: int) -> None:
        bits = self._image.header.cluster_bits
        first = start >> bits
        clusters = ((start + length - 1) >> bits) - first + 1
        self._image.refcounts.ensure(first, clusters, self._image.take_for_refcounts)
        self._image.refcounts.raise_counts(first, clusters)
