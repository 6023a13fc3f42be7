"""Fill a new image as a stream: compressed clusters at any byte, plain ones on cluster boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.allocation import Allocation
from tapfs.formats.changed_table import ChangedTable
from tapfs.formats.qcow.entries import compressed_entry
from tapfs.formats.qcow.header import Header
from tapfs.formats.qcow.tables import Tables
from tapfs.plan import Plan


class FilledImage(Protocol):
    """What filling needs of the image: the writable driver has it."""

    file: HostFile
    header: Header
    tables: Tables
    allocation: Allocation

    def changed_table(self, index: int) -> ChangedTable:
        """The L2 table of L1 entry `index`, to be changed; allocated if there is none."""
        ...

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changed tables."""
        ...

    def flush(self) -> Plan:
        """The plan that makes them durable."""
        ...

    def flushed(self, executed: Plan) -> None:
        """The plan has been executed."""
        ...


class QcowStreamWriter:
    """A :class:`tapfs.driver.BatchStreamWriter`.

    It holds the L2 tables of what was written, 8 bytes a cluster, until `drain` or `finish`.
    """

    def __init__(self, image: FilledImage) -> None:
        self._image = image
        self._index = -1
        self._table: ChangedTable | None = None

    def append(self, offset: int, host_length: int, *, compressed: bool) -> int:
        """The host offset for the payload of the cluster at guest `offset`.

        Raises ImageError(no_space) where the entry cannot hold the host offset, (out_of_bounds) for
        a compressed payload that is not smaller than a cluster.
        """
        header, allocation = self._image.header, self._image.allocation
        index = offset // header.unit
        if index != self._index or self._table is None:
            self._table = self._image.changed_table(index)
            self._index = index
        if compressed:
            if not 0 < host_length < header.cluster_size:
                message = f"a compressed cluster of {host_length} bytes does not fit its entry"
                raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=self._image.file.path, op="compress")
            host_offset = allocation.tail(host_length, alignment=1)
            if host_offset + host_length > 1 << (63 - header.cluster_bits):
                raise ImageError(
                    ErrorKind.NO_SPACE,
                    "the image file is too long for compressed clusters",
                    path=self._image.file.path,
                    offset=host_offset,
                    op="allocate",
                )
            entry = compressed_entry(host_offset, host_length, header.cluster_bits)
        else:
            entry = host_offset = allocation.tail(header.cluster_size)
        allocation.commit(host_offset, host_length if compressed else header.cluster_size)
        at = (offset >> header.cluster_bits) & (header.l2_entries - 1)
        self._table.entries[at] = entry
        self._table.mark(at, at + 1)
        return host_offset

    def append_all(self, offsets: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """The host offsets that `append` would give for each in turn: payloads follow the one before them.

        Raises as `append` does.
        """
        header = self._image.header
        places: list[int] = []
        while (at := len(places)) < len(offsets):
            length = lengths[at]
            places.append(self.append(offsets[at], length or header.cluster_size, compressed=length != 0))
            end = (self._index + 1) * header.unit
            stop = at = at + 1
            while stop < len(offsets) and offsets[stop] < end and lengths[stop]:
                stop += 1
            if stop > at:
                places += self._packed_after(offsets[at:stop], lengths[at:stop])
        return places

    def _packed_after(self, offsets: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """The places of payloads of one table at the end of the file."""
        header, allocation, table = self._image.header, self._image.allocation, self._table
        end = allocation.end + sum(lengths)
        if table is None or max(lengths) >= header.cluster_size or end > 1 << (63 - header.cluster_bits):
            pairs = zip(offsets, lengths, strict=True)
            return [self.append(offset, length, compressed=True) for offset, length in pairs]
        start = allocation.tail(sum(lengths), alignment=1)
        allocation.commit(start, sum(lengths))
        places = list(accumulate(lengths[:-1], initial=start))
        slots = [(offset >> header.cluster_bits) & (header.l2_entries - 1) for offset in offsets]
        for slot, place, length in zip(slots, places, lengths, strict=True):
            table.entries[slot] = compressed_entry(place, length, header.cluster_bits)
        table.mark(slots[0], slots[-1] + 1)
        return places

    @property
    def unflushed_bytes(self) -> int:
        """The L2 tables that were changed."""
        return self._image.unflushed_bytes

    def drain(self) -> Plan:
        """The tables, then the L1 entries that point at them."""
        self._image.tables.file_size = self._image.allocation.end
        self._table = None  # from now on it is changed on top of this plan
        return self._image.flush()

    def finish(self) -> Plan:
        """The same: what was appended is an image at any time."""
        return self.drain()

    def drained(self, executed: Plan) -> None:
        """The tables need not be held any more."""
        self._image.flushed(executed)
