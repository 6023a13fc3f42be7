"""The protocols of a driver: what every open image answers, and what some can do besides.

`Driver` is all that a read-only format needs, `WritableDriver` the life of a write. Each further protocol is optional;
the core asks whether a driver has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from tapfs.ciphers import Cryptography
from tapfs.extent import Extent, Kind, Range
from tapfs.findings import CheckReport
from tapfs.geometry import Geometry
from tapfs.plan import Plan
from tapfs.records import NamedTuple
from tapfs.reservation import Operation, Reservation


@runtime_checkable
class Driver(Protocol):
    """All that a read-only format needs."""

    @property
    def format_name(self) -> str:
        """The name that `-f` takes."""
        ...

    @property
    def geometry(self) -> Geometry:
        """The constants of the image; never change while it is open."""
        ...

    def map(self, offset: int, length: int) -> list[Extent]:
        """The map of at least ``[offset, offset + length)``, which lies inside the disk.

        Ascending, contiguous, merged, covering the request; it may cover more (whole map
        units, which is what the engine asks for). The last extent may reach past
        `virtual_size`, never past the end of its granule. Raises ImageError(corrupt) naming
        the host offset of the field where the metadata cannot be true. It raises only for
        what the entries of the range itself say, so that their neighbours can still be read
        (`tapfs.disk.around_faults`): the whole granules, packed units and blocks that it touches.
        """
        ...

    def details(self) -> Mapping[str, object]:
        """What `tapfs info` shows beyond the geometry: JSON-able, keys in snake_case."""
        ...


@runtime_checkable
class Sparse(Driver, Protocol):
    """A driver that finds the end of a long run of nothing without a look at all of it.

    Without this a map costs the more the larger the disk is, however little is in it.
    """

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """One UNALLOCATED or ZERO extent from `offset` on, at most to `end`, which lies inside the disk.

        None: there is data at `offset`, or only `map` can tell. It must cost the same however long the run is.
        """
        ...


class ZeroPlace(NamedTuple):
    """A run of the disk that reads as zeros, and where it has a place in a host file all the same; None: nowhere."""

    offset: int
    length: int
    file: int = 0
    host_offset: int | None = None

    @property
    def end(self) -> int:
        """The first byte of the disk after the run."""
        return self.offset + self.length


@runtime_checkable
class ZeroPlacing(Driver, Protocol):
    """A driver of a format whose zeros may have a place, which they get back when they are written.

    Maps leave such places out: nobody reads them, and runs of zeros are one extent.
    """

    @property
    def placed_kinds(self) -> frozenset[Kind]:
        """The kinds of extents that may have such places: ZERO, and UNALLOCATED where nothing lies below."""
        ...

    def zero_places(self, offset: int, length: int) -> list[ZeroPlace]:
        """The places of a range of such kinds: runs from `offset` on that follow one another and cover the range."""
        ...


@runtime_checkable
class PlainDetails(Driver, Protocol):
    """A driver some of whose details are for everybody."""

    @property
    def plain_details(self) -> frozenset[str]:
        """The keys of `details` that `tapfs info` shows without -v; of other drivers it shows none."""
        ...


@runtime_checkable
class Encrypted(Driver, Protocol):
    """A driver whose geometry has a cipher, for images that a password opens."""

    def unlock(self, password: bytes, cryptography: Cryptography) -> bytearray:
        """The key of the cipher, `Cipher.key_bytes` long; the caller wipes it.

        Raises ImageError(denied) for a wrong password, where the format can tell, and (unsupported) for a secret that
        cannot be opened here.
        """
        ...


@runtime_checkable
class PasswordProving(Encrypted, Protocol):
    """A driver of an encrypted image that may be able to tell a wrong password."""

    @property
    def proves_password(self) -> bool:
        """Whether `unlock` raises for every wrong password; else the disk is noise with one."""
        ...


@runtime_checkable
class WritableDriver(Driver, Protocol):
    """A format that can be written.

    The life of a write: `reserve` → the engine writes the data to the placements → `commit`
    (visible to `map`) or `abort`. Later `flush` returns the plan that makes all committed
    changes durable; the engine executes it; `flushed` says that it is on the platter. When a
    plan fails `flushed` is not called and the next `flush` must return those steps again.
    """

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """Find places for granule-aligned ranges, which ascend and do not overlap.

        Those of ZERO and DISCARD are whole packed units (`Geometry.packed_unit`), where these are larger than granules,
        but for a ZERO where a `PartlyZeroing` driver has allowed it.
        The caller guarantees that no other reservation overlaps one of them. For WRITE no granule in
        the ranges is `in_place` in the current map. For DISCARD a driver may do nothing for
        granules that it cannot free. Raises ImageError(no_space) or (corrupt).
        """
        ...

    def commit(self, reservation: Reservation) -> None:
        """The data is written: publish the new map in memory."""
        ...

    def abort(self, reservation: Reservation) -> None:
        """The data could not be written: give the places back."""
        ...

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changes that are not durable yet; the caller flushes when it is large."""
        ...

    def flush(self) -> Plan:
        """The plan that makes every committed change durable. Its bytes are copies."""
        ...

    def flushed(self, executed: Plan) -> None:
        """What `executed`, the last plan that `flush` returned, freed may be used again.

        It is durable, and no request still holds a map older than it.
        """
        ...


@runtime_checkable
class PartlyZeroing(WritableDriver, Protocol):
    """A driver whose map can say of some granules of a packed unit that they read as zeros."""

    def can_zero(self, offset: int, length: int) -> bool:
        """Whether a ZERO of these granules, all of one packed unit, may be reserved by itself.

        Where it may not, the caller writes zeros. The answer holds while nobody else has a reservation there.
        """
        ...


@runtime_checkable
class Uncovering(WritableDriver, Protocol):
    """A driver of an image over a parent that can forget what it holds, so that the parent shows (`Operation.UNCOVER`).

    Such a reservation has no placements: a commit unlinks what the range covers, and a plan frees the places. Of a map
    unit that it covers in part the driver may keep what it cannot unlink.
    """

    @property
    def can_uncover(self) -> bool:
        """Whether this image can: its entries say of every granule whether the parent shows."""
        ...


@runtime_checkable
class PlaceKeeping(Uncovering, Protocol):
    """An uncovering driver of which each granule may have one place only, and the same for ever.

    So no plan of a flush can free the place of what was uncovered: a writer may have taken it again meanwhile.
    """

    def unused_places(self) -> Plan:
        """The discards of all places that no granule has; nobody writes until they are executed."""
        ...


@runtime_checkable
class Additive(WritableDriver, Protocol):
    """A writable driver that says what a commit adds to the plan of the next flush, at a cost of the commit alone.

    A plan that outlives its process is kept with every commit (`tapfs.disk.plan_log`). To build and keep all of it anew
    costs the more the larger it is.
    """

    def added(self) -> Plan | None:
        """What all commits since the last `flush` or `added` add to that plan, which has it from now on.

        None where only the whole plan says it; nothing has changed then. The stages are always the same, empty ones
        too. Each has writes and growth alone. The plan before, and then this one, executed one after the other, give
        what the whole plan gives. So do several of these merged stage by stage, later writes over earlier ones.
        """
        ...


@runtime_checkable
class Begun(WritableDriver, Protocol):
    """A writable driver whose image says that it is being written, or that it was: dirty bits, GUIDs, content IDs.

    In-place writes never meet the driver, so the core asks at the first write of any kind and at the end.
    """

    def begin(self) -> Plan:
        """What must be durable before the first write, zeroing or discard of this opening is let in.

        If it cannot be executed it is asked for again by the next write, and that write has failed.
        """
        ...

    def end(self) -> Plan:
        """What becomes true at the end of writing: executed after the last flush, if that was good. Perhaps nothing."""
        ...


@runtime_checkable
class Identified(Driver, Protocol):
    """A driver whose image has an identity that the images over it have written down."""

    @property
    def identities(self) -> frozenset[str]:
        """What `BackingReference.identity` of an image over this one may be: "cid:…", "uuid:…"; lower case."""
        ...


@runtime_checkable
class Renewing(Identified, Begun, Protocol):
    """A driver whose `begin` gives its image another identity, which is known before: images over it can be told."""

    @property
    def next_identities(self) -> frozenset[str]:
        """What `identities` will be once the next `begin` is executed; the same until then."""
        ...


@runtime_checkable
class Snapshotted(Driver, Protocol):
    """A driver whose image may hold several disks: the current one, and snapshots with names.

    `OpenRequest.snapshot` chooses; a snapshot is only read. The driver of one is opened by itself, beside others.
    """

    def snapshots(self) -> Sequence[str]:
        """The names of the snapshots, in the order that the image has them."""
        ...


@runtime_checkable
class Recoverable(Driver, Protocol):
    """A driver whose image may have a journal that a crash has left to be replayed."""

    def recovery(self) -> Plan | None:
        """The plan that makes the image consistent, None if it is. The driver is opened anew after it.

        An image opened for writing gets the plan executed. One that is only read stays as it is: the core lays the
        plan's writes over the files (`tapfs.host.patched`), and the driver reads through them. A plan writes metadata
        only: an extent of guest data in a range that the plan writes is refused as corrupt.
        """
        ...


class StreamWriter(Protocol):
    """An append-only writer of a new image: compressed targets, and formats without updates."""

    def append(self, offset: int, host_length: int, *, compressed: bool) -> int:
        """The host offset in file 0 for the granule at guest `offset`, ascending over calls.

        `host_length` is the payload's length if `compressed`, else the granule.
        """
        ...

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by metadata that waits for `drain` or `finish`."""
        ...

    def drain(self) -> Plan:
        """The metadata of what has been appended so far; those payloads are written."""
        ...

    def finish(self) -> Plan:
        """All metadata that is left, once every payload is written."""
        ...

    def drained(self, executed: Plan) -> None:
        """The plan that `drain` or `finish` returned last has been executed."""
        ...


@runtime_checkable
class BatchStreamWriter(StreamWriter, Protocol):
    """A stream writer that finds the places of many granules in one call."""

    def append_all(self, offsets: Sequence[int], lengths: Sequence[int]) -> Sequence[int]:
        """The host offsets that `append` would give for each in turn.

        A length is that of a compressed payload, 0 for a granule that is not compressed.
        """
        ...


@runtime_checkable
class FramedStreamWriter(StreamWriter, Protocol):
    """A stream writer whose payloads stand between other bytes, and which has every granule packed.

    A granule that does not shrink is packed all the same. The length that `append` is told is that of the frame.
    """

    def frame(self, offset: int, payload: bytes) -> bytes:
        """The payload of the granule at guest `offset` as it is to stand in the file."""
        ...


@runtime_checkable
class ForwardStreamWriter(StreamWriter, Protocol):
    """A stream writer whose file can be written from its start to its end, into a pipe.

    What creates the image is its start. What `append` leaves for `drain` lies before the place that `append` returned,
    and `finish` writes behind all of it.
    """

    @property
    def goes_forward(self) -> bool:
        """Whether this file can."""
        ...


@runtime_checkable
class Streamable(Driver, Protocol):
    """A driver that can be filled as a stream right after creation."""

    def stream(self) -> StreamWriter:
        """The writer. The driver must not be used otherwise until it has finished."""
        ...


@runtime_checkable
class PackedAppending(Streamable, Protocol):
    """A driver whose stream can also add to an image that holds data already, each granule where it holds nothing."""

    @property
    def appends_packed(self) -> bool:
        """Whether this image can be added to so."""
        ...


@runtime_checkable
class OnlyStreamed(Streamable, Protocol):
    """A driver of a new image that may have no other way to be filled: then nobody need ask for packing."""

    @property
    def only_streamed(self) -> bool:
        """Whether this image is of the kind."""
        ...


#: Called with bytes done and bytes in all.
ProgressCallback = Callable[[int, int], None]


@runtime_checkable
class Checkable(Driver, Protocol):
    """A format with metadata that can be inconsistent."""

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Read all metadata and compare it with itself and the file.

        Never raises for what it finds, only ImageError(io) for what it cannot read.
        """
        ...

    def repair(self) -> Sequence[Plan]:
        """Plans, executed one after the other, that mend what can be without losing guest data.

        Each says in `mends` what it is for. The driver must be opened anew afterwards. Empty if nothing is to be done.
        """
        ...


@runtime_checkable
class BitmapDropper(Checkable, Protocol):
    """A format whose bitmaps can be damaged, and whose user may give up those that are."""

    def repair_dropping_bitmaps(self) -> Sequence[Plan]:
        """As `repair`, and bitmaps that cannot be true are dropped; the plan that drops some names them in `mends`."""
        ...


class Scratch(Protocol):
    """Space on the host for what a check cannot hold in memory: written from front to back, then read."""

    def append(self, data: bytes) -> None:
        """Add to the end. Raises ImageError(no_space, io)."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end."""
        ...

    def close(self) -> None:
        """Give the space back."""
        ...
