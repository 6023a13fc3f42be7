"""What a format driver is: the protocols between drivers and everything else.

Drivers map, the engine moves. A driver parses metadata through :class:`HostFile`, answers
`map`, decides in `reserve` where new data will go, and says in a :class:`~tapfs.plan.Plan`
what must reach the disk in which order. It never touches guest data and never writes.

A driver is called by one thread at a time (:class:`tapfs.disk.image.Image` holds its lock), so it
needs no locking of its own. `formats/README.md` is the guide to writing one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

from tapfs.extent import Extent
from tapfs.findings import CheckReport, Finding, Severity
from tapfs.geometry import (
    MAX_DISK_BYTES,
    BackingReference,
    Cipher,
    CipherAlgorithm,
    Codec,
    Geometry,
    Identity,
    Packing,
)
from tapfs.host_files import FurtherFiles, HostFile, NoFurtherFiles, NumberedFile, Role
from tapfs.plan import Plan

#: The whole contract of a driver but extents and plans, wherever its parts stand.
__all__ = [
    "MAX_DISK_BYTES",
    "Ability",
    "BackingReference",
    "Begun",
    "CheckReport",
    "Checkable",
    "Cipher",
    "CipherAlgorithm",
    "Codec",
    "CreatableFormat",
    "CreateRequest",
    "DescribedFormat",
    "Driver",
    "Encrypted",
    "Finding",
    "Format",
    "FurtherFiles",
    "Geometry",
    "HostFile",
    "Identity",
    "MultiFileFormat",
    "NoFurtherFiles",
    "NumberedFile",
    "OpenRequest",
    "Operation",
    "Packing",
    "Placement",
    "ProgressCallback",
    "Recoverable",
    "Reservation",
    "Role",
    "Severity",
    "Snapshotted",
    "StreamWriter",
    "Streamable",
    "WritableDriver",
]


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
        the host offset of the field where the metadata cannot be true.
        """
        ...

    def details(self) -> Mapping[str, object]:
        """What `tapfs info` shows beyond the geometry: JSON-able, keys in snake_case."""
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

    def unlock(self, password: bytes) -> bytes:
        """The key of the cipher, `Cipher.key_bytes` long.

        Raises ImageError(denied) for a wrong password, where the format can tell.
        """
        ...


class Operation(Enum):
    """What a reservation is for."""

    WRITE = "write"
    #: The range must read as zeros afterwards.
    ZERO = "zero"
    #: The range's contents are not needed any more; what can be freed is.
    DISCARD = "discard"


class Placement(NamedTuple):
    """Where the engine puts the bytes of one reserved run.

    `fresh`: the host range reads as zeros already, so zeros need not be written there (the
    engine ignores it under a cipher). `in_place`: the run already belongs to the image and
    keeps its bytes where the request does not cover them; otherwise the engine fills what the
    request leaves open in the run from the old contents of the disk (copy-on-write fill).
    """

    offset: int
    length: int
    host_offset: int
    file: int = 0
    fresh: bool = False
    in_place: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """Granule-aligned guest range ``[offset, offset + length)`` that is about to change.

    It may be wider than what was asked for, where a commit changes the map of more: nobody else
    writes in it as long as it is open.

    WRITE: the placements cover what was asked for; the engine writes the data there.
    ZERO and DISCARD: the engine makes each placement read as zeros (gives its space back
    where the host can, writes zeros where it must); a range without placement needs nothing
    from the engine. Nothing is visible before `commit`.

    `exact`, of a WRITE: `commit` maps the range to its placements, in place, and changes the map
    nowhere else, so nobody need ask for it again.
    """

    offset: int
    length: int
    operation: Operation
    placements: tuple[Placement, ...]
    exact: bool = False

    @property
    def end(self) -> int:
        """The first byte of the virtual disk after the range."""
        return self.offset + self.length


@runtime_checkable
class WritableDriver(Driver, Protocol):
    """A format that can be written.

    The life of a write: `reserve` → the engine writes the data to the placements → `commit`
    (visible to `map`) or `abort`. Later `flush` returns the plan that makes all committed
    changes durable; the engine executes it; `flushed` says that it is on the platter. When a
    plan fails `flushed` is not called and the next `flush` must return those steps again.
    """

    def reserve(self, offset: int, length: int, operation: Operation) -> Reservation:
        """Find a place for a granule-aligned range.

        The caller guarantees that no other reservation overlaps it. For WRITE no granule in
        the range is `in_place` in the current map. For DISCARD a driver may do nothing for
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
class Streamable(Driver, Protocol):
    """A driver that can be filled as a stream right after creation."""

    def stream(self) -> StreamWriter:
        """The writer. The driver must not be used otherwise until it has finished."""
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


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """How to open an image.

    `lenient`: for check and repair, which must get as far as a damaged image allows. `further`
    opens the other host files that the image names; their number follows the order of opening. `snapshot` is the
    name of the disk inside the image that is wanted, None the current one; a `Snapshotted` driver raises
    ImageError(not_found) for a name that it has not.
    `scratch` makes space for a check to work in. A check without it keeps in memory what it needs.
    """

    writable: bool = False
    lenient: bool = False
    snapshot: str | None = None
    further: FurtherFiles = field(default_factory=NoFurtherFiles)
    scratch: Callable[[], Scratch] | None = None


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """What to create. `options` are the `-o` pairs; a driver refuses those it does not know.

    `backing_mtime` is the parent's modification time in whole seconds since 1970. `name` is the
    file name of the new image without its folder, for formats that write it into their metadata.
    """

    virtual_size: int
    backing: BackingReference | None = None
    backing_mtime: int = 0
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    encrypted: bool = False
    name: str = ""


@runtime_checkable
class Format(Protocol):
    """A format as the registry knows it: a module-level object, also the entry-point target."""

    @property
    def name(self) -> str:
        """The name that `-f` and `-O` take."""
        ...

    def probe(self, head: bytes, size: int) -> int:
        """Confidence 0 to 100 that a file of `size` bytes starting with `head` is one of these."""
        ...

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        """A driver for this file. Raises ImageError(invalid_format, unsupported, corrupt)."""
        ...


@runtime_checkable
class CreatableFormat(Format, Protocol):
    """A format of which new images can be made."""

    @property
    def create_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        ...

    def create(self, request: CreateRequest) -> Plan:
        """The plan that turns an empty host file into a new image.

        Raises ImageError(unsupported, out_of_bounds) for what the format cannot hold.
        """
        ...


class Ability(StrEnum):
    """What the images of a format can do besides being read."""

    #: The disk can be written in place.
    WRITE = "write"
    #: An image can name a parent.
    BACKING = "backing"
    #: New images can be compressed, or encrypted.
    COMPRESS = "compress"
    ENCRYPT = "encrypt"
    CHECK = "check"
    REPAIR = "repair"


@runtime_checkable
class DescribedFormat(Format, Protocol):
    """A format that says what it can do, for `tapfs formats`. Nothing else depends on it."""

    @property
    def abilities(self) -> frozenset[Ability]:
        """All that it can do besides being read and created."""
        ...


class Trait(StrEnum):
    """What is special about a format, so that nobody needs to compare its name."""

    #: A file that no format claims is taken for one of these.
    GUESSED = "guessed"
    #: What a file contains is not enough to write to it: the user must name the format.
    NAMED_TO_WRITE = "named to write"
    #: A new image may be a block device, because it has its full length from the start.
    ON_DEVICE = "on device"
    #: Its images live in memory, under names of their own (`tapfs.host.ram`).
    IN_MEMORY = "in memory"


@runtime_checkable
class SpecialFormat(Format, Protocol):
    """A format with traits. Most have none, and then nothing is special about them."""

    @property
    def traits(self) -> frozenset[Trait]:
        """What is special about it."""
        ...


def has_trait(found: Format, trait: Trait) -> bool:
    """Whether a format has a trait."""
    return isinstance(found, SpecialFormat) and trait in found.traits


@runtime_checkable
class MultiFileFormat(CreatableFormat, Protocol):
    """A creatable format whose images may consist of several host files."""

    def further_names(self, request: CreateRequest) -> Sequence[str]:
        """The names of files 1, 2, … that the plan of `create` writes, in the folder of the image.

        Empty for a request that makes a single file. Raises ImageError as `create` does.
        """
        ...
