"""Fill a new image as a stream: compressed clusters at any byte, plain ones on cluster boundaries."""

from __future__ import annotations

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
    """A :class:`tapfs.driver.StreamWriter`.

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
