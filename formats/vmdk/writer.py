"""Write a VMDK: new grains in its sparse extents, and the marks of a disk that is being written.

Before the first write the disk gets another content ID, and each sparse extent says that it is open (`begin`). An
extent that was open already when it was found, after a crash, keeps saying so, until a repair has compared its tables.

What a flush makes durable, in this order, each stage after the one before (docs/specs/vmdk.md, "Sparse extent header
(KDMV), 512 bytes"):

1. the length of the files: an entry may otherwise point past the end;
2. tables, primary and redundant, new and changed (the data they point at is durable by the barrier that starts a plan);
3. entries of the primary directories, for new tables;
4. entries of the redundant directories, for the twins of new tables;
5. holes where grains were released, which nothing on disk points at any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from tapfs.driver import (
    BackingReference,
    Driver,
    HostFile,
    HostSpace,
    OpenRequest,
    Operation,
    Placement,
    Renewing,
    Reservation,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.apart import require_apart
from tapfs.formats.vmdk import cowd_header, sparse_header
from tapfs.formats.vmdk.content_id import named_by
from tapfs.formats.vmdk.descriptor import Descriptor, parse_descriptor
from tapfs.formats.vmdk.driver import VmdkDriver
from tapfs.formats.vmdk.extent_writer import ExtentWriter
from tapfs.formats.vmdk.host_extents import CowdExtent, HostedExtent, SeSparseExtent
from tapfs.formats.vmdk.identity_change import IdentityChange, identity_change
from tapfs.formats.vmdk.parts import ClosedPart, FlatPart, Part, SparsePart
from tapfs.formats.vmdk.rebase import expecting_plan, rebase_plan
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.sesparse_header import NOT_WRITTEN
from tapfs.formats.vmdk.survey import is_plain
from tapfs.formats.vmdk.uuid_link import identities
from tapfs.identifiers import Uuid
from tapfs.plan import Plan, Step, Write, plan

#: The operations that leave a part which is only read as it is.
_MAY_DO_LESS = (Operation.DISCARD, Operation.UNCOVER)


class WritableVmdkDriver(VmdkDriver):
    """An open disk, read-write: a :class:`tapfs.driver.WritableDriver` that is `Begun`."""

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        super().__init__(file, request)
        self._writers: dict[int, ExtentWriter] = {}
        for part in self.parts:
            if isinstance(part, SparsePart) and part.writable:
                self._writers[part.number] = self._writer(part)
        if not any(part.writable for part in self.parts):
            raise self._refused("has no extent that may be written: its descriptor has none whose access is RW")
        self._require_apart()
        if not request.lenient:
            for writer in self._writers.values():
                if not is_plain(writer.tables):
                    require_apart(writer.places(), SECTOR, writer.path, what="grains or tables")
        self._cid = None if self.descriptor is None else self.descriptor.cid
        self._modification: Uuid | None = None
        self._change: IdentityChange | None = None

    @property
    def identities(self) -> frozenset[str]:
        """The content ID and the UUIDs that the disk has now."""
        return named_by(self._cid) | identities(self.descriptor, self._modification)

    # -- the marks of writing -------------------------------------------------------------------

    @property
    def next_identities(self) -> frozenset[str]:
        """The content ID and the UUIDs that the disk will have once `begin` is executed."""
        change = self._identity_to_be
        return named_by(change.cid) | identities(self.descriptor, change.modification)

    def begin(self) -> Plan:
        """A new content ID, once for each opening, and the marks of extents that are open."""
        change = self._identity_to_be
        self._cid, self._modification = change.cid, change.modification
        return plan(change.grow, change.writes + self.marks(1))

    def end(self) -> Plan:
        """The extents are closed, unless a crash before this opening has left them open."""
        return plan(self.marks(0))

    @property
    def _identity_to_be(self) -> IdentityChange:
        """The change of the descriptor, the same one for each `begin`."""
        if self._change is None and self.descriptor is None:
            self._change = IdentityChange(None, None, [], [])
        elif self._change is None and self.descriptor is not None:
            self._change = identity_change(self.descriptor, self.file.path, self._room)
        return self._change or IdentityChange(None, None, [], [])

    @property
    def _room(self) -> int | None:
        """The bytes that an embedded descriptor may have; None for one in a file of its own."""
        embedded = (each for each in self.disk.sparse if each.number == 0 and isinstance(each, HostedExtent))
        return next((each.header.descriptor_sectors * SECTOR for each in embedded), None)

    def marks(self, value: int) -> list[Step]:
        """The steps that say whether the sparse extents are open: 1, or 0. A crash has left some open before."""
        steps: list[Step] = []
        for extent in self.disk.sparse:
            if extent.number not in self._writers or extent.unclean:
                continue
            if isinstance(extent, HostedExtent):
                steps.append(Write(extent.number, sparse_header.UNCLEAN_AT, bytes([value])))
            elif isinstance(extent, CowdExtent):
                steps.append(Write(extent.number, cowd_header.UNCLEAN_AT, value.to_bytes(4, "little")))
        return steps

    def rebase(self, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
        """See :mod:`tapfs.formats.vmdk.rebase`."""
        descriptor = self._linking_descriptor()
        yield rebase_plan(descriptor, self._link_room(descriptor), backing, parent, self.file.path)
        self._read_descriptor_again(descriptor)

    def expect(self, parent: Renewing | None) -> Iterator[Plan]:
        """See :func:`tapfs.formats.vmdk.rebase.expecting_plan`."""
        descriptor = self._linking_descriptor()
        yield expecting_plan(descriptor, self._link_room(descriptor), parent)
        self._read_descriptor_again(descriptor)

    def _linking_descriptor(self) -> Descriptor:
        if self.descriptor is None or not self.disk.sparse:
            raise self._refused("has no descriptor, or no entries that could show a parent", "rebase")
        return self.descriptor

    def _link_room(self, descriptor: Descriptor) -> int | None:
        return self._room if descriptor.base else None

    def _read_descriptor_again(self, old: Descriptor) -> None:
        """The text has changed: a new content ID must not bring the old one back."""
        room = self._link_room(old)
        raw = self.file.read(old.base, self.file.size() if room is None else room)
        self.descriptor = parse_descriptor(raw, self.file.path, old.base)
        self._change = None

    # -- reservations ---------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """See :meth:`tapfs.driver.WritableDriver.reserve`.

        Raises ImageError(corrupt) for a table that cannot be true, (no_space) where an extent cannot address more,
        (read_only) for an extent that may not be written.
        """
        placements: list[Placement] = []
        metadata: list[HostSpace] = []
        for offset, length in ranges:
            for part, start, end in self._pieces(offset, offset + length):
                placements += self._place(part, start, end, operation)
                writer = self._writer_of(part)
                if writer is not None:
                    metadata += writer.metadata(start, end - start, operation)
        for writer in self._writers.values():
            writer.note_growth()
        exact = operation is Operation.WRITE
        return Reservation(tuple(ranges), operation, tuple(placements), exact, tuple(metadata))

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map; durable after the next flush."""
        if reservation.operation is not Operation.WRITE:
            for offset, length in reservation.ranges:
                for part, start, end in self._pieces(offset, offset + length):
                    writer = self._writer_of(part)
                    uncovers = reservation.operation is Operation.UNCOVER
                    if writer is not None and (uncovers or not writer.zeros_take_places):
                        writer.unlink(start, end - start, reservation.operation)
        for placement in reservation.placements:
            if not placement.in_place:
                self._writers[placement.file].link(placement)

    def abort(self, reservation: Reservation) -> None:
        """Give the places back. They are punched by the next flush and used again after it."""
        for placement in reservation.placements:
            if not placement.in_place:
                self._writers[placement.file].release(placement)

    def _place(self, part: Part, start: int, end: int, operation: Operation) -> Iterator[Placement]:
        if not part.writable:
            if operation in _MAY_DO_LESS or (operation is Operation.ZERO and self._reads_zero(part)):
                return
            raise self._refused(
                f"bytes {part.offset} to {part.offset + part.length} of the disk are read-only", "write"
            )
        if isinstance(part, FlatPart):
            if operation is Operation.UNCOVER:
                return
            stop = min(end, part.offset + part.length)
            yield Placement(start, stop - start, part.host_offset + start - part.offset, part.number, in_place=True)
            return
        writer = self._writer_of(part)
        if writer is None:
            raise AssertionError("a writable part is flat or has a writer")
        if operation is Operation.WRITE:
            yield from writer.place_write(start, end - start)
        else:
            yield from writer.place_zeros(start, end - start, operation)

    def _reads_zero(self, part: Part) -> bool:
        return not isinstance(part, FlatPart | SparsePart | ClosedPart)

    @property
    def can_uncover(self) -> bool:
        """Whether every part of the disk has entries that can say that the parent shows."""
        return all(isinstance(part, SparsePart) and part.number in self._writers for part in self.parts)

    # -- flush ----------------------------------------------------------------------------------

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changed tables and released places."""
        return sum(writer.unflushed_bytes for writer in self._writers.values())

    def flush(self) -> Plan:
        """The plan described at the head of this module; empty where nothing has changed."""
        writers = list(self._writers.values())
        released = [step for writer in writers for step in writer.begin_plan()]
        if not released and not any(writer.changed for writer in writers):
            return Plan()
        return plan(
            [step for writer in writers for step in writer.grow_steps()],
            [step for writer in writers for step in writer.table_steps()],
            [step for writer in writers for step in writer.directory_steps(redundant=False)],
            [step for writer in writers for step in writer.directory_steps(redundant=True)],
            released,
        )

    def flushed(self, executed: Plan) -> None:
        """What the last plan wrote is durable, what it released may be used again."""
        if executed:
            for writer in self._writers.values():
                writer.plan_done()

    def drop_grains(self, number: int, first: int, stop: int) -> None:
        """Have the grains ``[first, stop)`` of the sparse extent in a host file, all of one table, be nowhere."""
        self._writers[number].drop(first, stop)

    # -- opening --------------------------------------------------------------------------------

    def _writer(self, part: SparsePart) -> ExtentWriter:
        extent = next(each for each in self.disk.sparse if each.number == part.number)
        if isinstance(extent, SeSparseExtent):
            message = f"the seSparse extent {extent.file.path} is only read: {NOT_WRITTEN}"
            raise self._refused(message, remedy="convert the disk, or write to an overlay")
        if isinstance(extent, HostedExtent) and extent.header.is_compressed:
            message = "a streamOptimized disk is written once, when it is made"
            raise self._refused(message, remedy="convert it to another subformat, or write to an overlay")
        if part.tables.grain != self._geometry.granule:
            message = "is only read: its extents have different grains, or do not begin on whole grains"
            raise self._refused(message, remedy="convert it to a disk of one extent")
        return ExtentWriter(extent, part, has_backing=self._geometry.backing is not None)

    def _require_apart(self) -> None:
        """Refuse a disk two of whose places are one: a write to one would change the other."""
        flat = sorted((part.number, part.host_offset, part.length, part.writable) for part in self._flat_parts())
        for left, right in pairwise(flat):
            overlaps = left[0] == right[0] and left[1] + left[2] > right[1]
            if overlaps and (left[3] or right[3]):
                raise self._refused("is only read: two of its extents are the same bytes of one file")
        if any(part.writable and part.number in self._writers for part in self._flat_parts()):
            raise self._refused("is only read: a file of its is a flat and a sparse extent")

    def _flat_parts(self) -> list[FlatPart]:
        return [part for part in self.parts if isinstance(part, FlatPart)]

    def _writer_of(self, part: Part) -> ExtentWriter | None:
        return self._writers.get(part.number) if isinstance(part, SparsePart) else None

    def _pieces(self, start: int, end: int) -> Iterator[tuple[Part, int, int]]:
        """The parts that a range touches, each with its piece; the last grain of the disk is whole."""
        for part in self._parts_between(start, min(end, self.disk.size)):
            stop = part.offset + part.length
            yield part, max(start, part.offset), end if stop == self.disk.size else min(end, stop)

    def _refused(self, message: str, op: str = "open", *, remedy: str | None = None) -> ImageError:
        return ImageError(ErrorKind.READ_ONLY, message, path=self.file.path, op=op, remedy=remedy)
