"""Fill a new qcow2 image as a stream: compressed clusters at any byte, plain ones on cluster boundaries."""

from __future__ import annotations

from array import array
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
    """A :class:`tapfs.driver.StreamWriter`.

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
        unit, inside = divmod(offset >> header.cluster_bits, header.slice_entries)
        if unit != self._unit or self._slice is None:
            self._slice, self._unit = self._image.owned_slice(unit), unit
        if compressed:
            host_offset = self._packed_place(host_length)
            word = compressed_word(host_offset, host_length, header.cluster_bits)
        else:
            host_offset = self._image.space.take_tail(header.cluster_size, alignment=header.cluster_size)
            self._count(host_offset, header.cluster_size)
            word = host_offset | COPIED
        words = header.l2_entry_bytes // WORD
        if words > 1:
            if self._slice.entries[inside * words]:  # a place that none of its subclusters uses
                self._image.release(self._slice.entries, inside, inside + 1)
            self._slice.entries[inside * words + 1] = 0 if compressed else ALL_ALLOCATED
        self._slice.entries[inside * words] = word
        self._slice.mark(inside * words, (inside + 1) * words)
        return host_offset

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
