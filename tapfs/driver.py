"""What a format driver is: the protocols between drivers and everything else.

Drivers map, the engine moves. A driver parses metadata through :class:`HostFile`, answers
`map`, decides in `reserve` where new data will go, and says in a :class:`~tapfs.plan.Plan`
what must reach the disk in which order. It never touches guest data and never writes.

A driver is called by one thread at a time (:class:`tapfs.disk.image.Image` holds its lock), so it
needs no locking of its own. `formats/README.md` is the guide to writing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

from tapfs.extent import Extent
from tapfs.plan import Plan


class Codec(IntEnum):
    """How a COMPRESSED extent is packed. The engine's C enum has the same values."""

    NONE = 0
    RAW_DEFLATE = 1


class Cipher(IntEnum):
    """The image-level transform of DATA extents. The engine's C enum has the same values."""

    NONE = 0
    #: AES-128-CBC per 512-byte sector, IV = little-endian guest sector number (QEMU's "aes").
    AES_128_CBC_SECTOR = 1


class HostFile(Protocol):
    """A host file as a driver sees it: metadata reads only."""

    @property
    def path(self) -> str:
        """The name for messages."""
        ...

    def size(self) -> int:
        """Length in bytes now (of a block device: its capacity)."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end of the file.

        Raises ImageError(io) when the host cannot read.
        """
        ...

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The ``(offset, length)`` ranges inside the request that may hold other than zeros.

        Ascending and disjoint. What lies between them is a hole of the host file system and
        reads as zeros. A host that cannot tell answers the whole request.
        """
        ...


class BackingReference(NamedTuple):
    """The parent that an image names. `format` is None where the header is silent."""

    name: str
    format: str | None = None


#: The largest disk, in bytes: no map unit that begins in it ends past the largest offset of a host file.
MAX_DISK_BYTES = (1 << 63) - 1 - (1 << 30)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The constants of an open image, all lengths in bytes.

    `virtual_size`: at most `MAX_DISK_BYTES`; an image of a larger disk is refused when it is opened.
    `granule`: the smallest piece mapped on its own; reservations are aligned to it (the last
    one may reach past `virtual_size`). `map_unit`: a multiple of `granule` whose map `map`
    answers whole, and which the engine caches whole (one L2 table, one grain table); at most
    1 GiB. `identity`: every byte is at the same offset of file 0, writable in place for a
    writable image; the engine then asks for no map at all. `files`: the number of host files.
    A COMPRESSED extent is one granule.
    """

    virtual_size: int
    granule: int
    map_unit: int
    identity: bool = False
    files: int = 1
    backing: BackingReference | None = None
    codec: Codec = Codec.NONE
    cipher: Cipher = Cipher.NONE


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


class Severity(StrEnum):
    """How bad a finding is."""

    CORRUPTION = "corruption"
    LEAK = "leak"
    NOTE = "note"


class Finding(NamedTuple):
    """One thing that check found; `host_offset` is where in the image file, if anywhere."""

    severity: Severity
    message: str
    host_offset: int | None = None


@dataclass(slots=True)
class CheckReport:
    """The result of a check. `findings` is bounded; the counts are not."""

    #: Findings of one severity beyond this many are counted but not kept.
    MAX_KEPT = 100

    findings: list[Finding] = field(default_factory=list[Finding])
    corruptions: int = 0
    leaks: int = 0
    leaked_bytes: int = 0
    allocated_bytes: int = 0
    #: What a repair has mended before this check, in words (`Plan.mends`).
    mended: list[str] = field(default_factory=list[str])

    def add(self, severity: Severity, message: str, host_offset: int | None = None) -> None:
        """Count a finding and keep it while there is room."""
        if severity is Severity.CORRUPTION:
            self.corruptions += 1
        elif severity is Severity.LEAK:
            self.leaks += 1
        if sum(kept.severity is severity for kept in self.findings) < self.MAX_KEPT:
            self.findings.append(Finding(severity, message, host_offset))


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


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """How to open an image.

    `lenient`: for check and repair, which must get as far as a damaged image allows.
    """

    writable: bool = False
    lenient: bool = False


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """What to create. `options` are the `-o` pairs; a driver refuses those it does not know.

    `backing_mtime` is the parent's modification time in whole seconds since 1970.
    """

    virtual_size: int
    backing: BackingReference | None = None
    backing_mtime: int = 0
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    encrypted: bool = False


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
