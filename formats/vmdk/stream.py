"""Write a streamOptimized disk: packed grains one after the other, each table behind its grains, the directory last.

This is the layout that VMware's tools write, and that ESXi and the importers of clouds take (docs/specs/vmdk.md,
"streamOptimized"): version 3, markers, tables without entries left out, a footer, and a marker of the end. The last
grain is whole, too.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from tapfs.driver import HostFile, OpenRequest, Operation, Reservation
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.changed_table import encode
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk.driver import VmdkDriver
from tapfs.formats.vmdk.host_extents import HostedExtent
from tapfs.formats.vmdk.markers import Marker, MarkerType, footer_sectors, packed_grain
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.sparse_header import DIRECTORY_AT_END, SparseHeader
from tapfs.plan import Plan, Step, Write, plan

_MAX_HOST_SIZE = SECTOR << 32


class VmdkStreamWriter:
    """A :class:`tapfs.driver.FramedStreamWriter` of an empty disk with this header.

    It is a :class:`tapfs.driver.ForwardStreamWriter`, too: the footer says what the header cannot know.
    """

    goes_forward = True

    def __init__(self, header: SparseHeader, path: str) -> None:
        self._header = header
        self._path = path
        self._at = header.overhead_sectors * SECTOR
        self._directory = array("I", bytes(4 * header.directory_entries))
        self._index = -1
        self._table = array("I")
        self._steps: list[Step] = []

    def frame(self, offset: int, payload: bytes) -> bytes:
        """The payload of the grain at guest `offset` with its marker, in whole sectors."""
        return packed_grain(offset // SECTOR, payload)

    def append(self, offset: int, host_length: int, *, compressed: bool) -> int:
        """The place of the framed grain at guest `offset`. Raises ImageError(no_space) behind 2 TiB."""
        if not compressed:
            raise AssertionError("every grain of a streamOptimized disk is packed")
        header = self._header
        index, rest = divmod(offset, header.table_span)
        if index != self._index:
            self._close_table()
            self._index, self._table = index, array("I", bytes(header.table_bytes))
        place = self._taken(host_length)
        self._table[rest // header.grain] = place // SECTOR
        return place

    @property
    def unflushed_bytes(self) -> int:
        """The tables that wait for `drain`."""
        return sum(len(step.data) for step in self._steps if isinstance(step, Write))

    def drain(self) -> Plan:
        """The tables behind whose grains others were appended."""
        return plan(self._steps)

    def finish(self) -> Plan:
        """The last table, the directory and the footer."""
        self._close_table()
        directory = encode(self._directory, "little")
        directory += bytes(self._header.directory_bytes - len(directory))
        marker = Marker(len(directory) // SECTOR, MarkerType.DIRECTORY).pack()
        place = self._at + SECTOR
        footer = footer_sectors(self._header._replace(directory_sector=place // SECTOR))
        content = marker + directory + footer
        self._steps.append(Write(0, self._taken(len(content)), content))
        return plan(self._steps)

    def drained(self, executed: Plan) -> None:
        """The tables of the plan need not be held any more."""
        del executed
        self._steps = []

    def _close_table(self) -> None:
        if not any(self._table):
            return
        content = encode(self._table, "little")
        content = Marker(len(content) // SECTOR, MarkerType.TABLE).pack() + content
        place = self._taken(len(content))
        self._directory[self._index] = (place + SECTOR) // SECTOR
        self._steps.append(Write(0, place, content))
        self._table = array("I")

    def _taken(self, length: int) -> int:
        place = self._at
        self._at += round_up(length, SECTOR)
        if self._at > _MAX_HOST_SIZE:
            message = "the file would be longer than 2 TiB, which its tables cannot address"
            raise ImageError(ErrorKind.NO_SPACE, message, path=self._path, offset=place, op="allocate")
        return place


class NewVmdkStream(VmdkDriver):
    """A new, empty streamOptimized disk, which is filled as a stream: a :class:`tapfs.driver.OnlyStreamed`."""

    #: There is no other way to write such a disk.
    only_streamed = True

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        super().__init__(file, request)
        (extent,) = self.disk.sparse
        if not isinstance(extent, HostedExtent):
            raise self._refusal()
        self._header = extent.header._replace(directory_sector=DIRECTORY_AT_END)

    def stream(self) -> VmdkStreamWriter:
        """The writer. The driver must not be used otherwise until it has finished."""
        return VmdkStreamWriter(self._header, self.file.path)

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """Raise ImageError(read_only)."""
        del ranges, operation
        raise self._refusal()

    def commit(self, reservation: Reservation) -> None:
        """Nothing was reserved."""

    def abort(self, reservation: Reservation) -> None:
        """Nothing was reserved."""

    @property
    def unflushed_bytes(self) -> int:
        """Always 0: the stream writer has what there is."""
        return 0

    def flush(self) -> Plan:
        """The empty plan."""
        return Plan()

    def flushed(self, executed: Plan) -> None:
        """Nothing was freed."""

    def _refusal(self) -> ImageError:
        message = "a streamOptimized disk is written once, from its start to its end"
        return ImageError(
            ErrorKind.READ_ONLY,
            message,
            path=self.file.path,
            op="write",
            remedy="convert a disk to it, or write to another subformat",
        )
