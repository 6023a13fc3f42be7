"""Raw images: byte i of the disk is byte i of the file. A hole of the host file is a ZERO run of the map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tapfs.driver import (
    Ability,
    CreateRequest,
    Driver,
    Geometry,
    HostFile,
    Identity,
    OpenRequest,
    Operation,
    Placement,
    Reservation,
    Trait,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, Range, merge
from tapfs.formats.preallocation import FALLOC, FULL, preallocation_of, space_stages
from tapfs.plan import Grow, Plan, Shorten, Step, plan

#: A host file offset is a signed 64-bit number.
MAX_SIZE = (1 << 63) - 1

_MAP_UNIT = 1 << 30


class IdentityDriver:
    """A disk that is one host file as it stands, of any length in bytes, or the first `size` bytes of one."""

    def __init__(self, file: HostFile, format_name: str, *, size: int | None = None) -> None:
        self.format_name = format_name
        length = file.size() if size is None else size
        self.geometry = Geometry(virtual_size=length, granule=1, map_unit=_MAP_UNIT, identity=Identity())
        self._file = file

    def map(self, offset: int, length: int) -> list[Extent]:
        """DATA where the host has allocated space, ZERO where the host file has a hole."""
        return list(merge(self._extents(offset, offset + length)))

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The hole of the host file at `offset`."""
        start, _ = next(self._file.data_ranges(offset, end - offset), (end, 0))
        return Extent(offset, start - offset, Kind.ZERO, host_offset=offset, in_place=True) if start > offset else None

    def _extents(self, offset: int, end: int) -> list[Extent]:
        found: list[Extent] = []
        for start, length in self._file.data_ranges(offset, end - offset):
            if offset < start:
                found.append(Extent(offset, start - offset, Kind.ZERO, host_offset=offset, in_place=True))
            found.append(Extent(start, length, Kind.DATA, host_offset=start, in_place=True))
            offset = start + length
        if offset < end:
            found.append(Extent(offset, end - offset, Kind.ZERO, host_offset=offset, in_place=True))
        return found

    def details(self) -> Mapping[str, object]:
        """Nothing: a raw image has no metadata."""
        return {}

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """Every byte has its place already."""
        placements = tuple(Placement(offset, length, offset, in_place=True) for offset, length in ranges)
        return Reservation(tuple(ranges), operation, placements)

    def commit(self, reservation: Reservation) -> None:
        """There is no map to change."""

    def abort(self, reservation: Reservation) -> None:
        """There is nothing to give back."""

    @property
    def unflushed_bytes(self) -> int:
        """Always 0: there is no metadata."""
        return 0

    def flush(self) -> Plan:
        """The empty plan: the barrier before it makes the data durable."""
        return Plan()

    def flushed(self, executed: Plan) -> None:
        """Nothing was freed."""


class RawDriver(IdentityDriver):
    """A disk that is the whole of a host file, so that another length of the file is another size of the disk."""

    def make_room(self, size: int) -> Iterator[Plan]:
        """Nothing: the length is the size. Raises ImageError(out_of_bounds) for one that no file can have."""
        if not 0 <= size <= MAX_SIZE:
            message = f"{size} bytes are more than a file can have"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=self._file.path, op="resize")
        return iter(())

    def resize(self, size: int) -> Iterator[Plan]:
        """Give the file another length. What a file gains reads as zeros."""
        yield plan([Grow(0, size) if size > self.geometry.virtual_size else Shorten(0, size)])


class IdentityFormat:
    """A format whose images are the disk as it stands, under one of the names that this has."""

    abilities = frozenset({Ability.WRITE, Ability.RESIZE})

    def __init__(self, name: str, traits: frozenset[Trait], create_options: Mapping[str, str]) -> None:
        self.name = name
        self.traits = traits
        self.create_options = create_options

    def probe(self, head: bytes, size: int) -> int:
        """0: nothing in a file says that it is the disk itself."""
        del head, size
        return 0

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        """Any file is such an image."""
        del request
        return RawDriver(file, self.name)

    def create(self, request: CreateRequest) -> Plan:
        """A file of exactly the virtual size: all hole, unless `preallocation` says otherwise."""
        for option in request.options:
            if option not in self.create_options:
                known = ", ".join(self.create_options)
                raise ImageError(
                    ErrorKind.UNSUPPORTED,
                    f"unknown option {option!r} for {self.name}",
                    op="create",
                    remedy=f"the options are {known}" if known else f"{self.name} has no options",
                )
        if request.backing is not None:
            raise ImageError(ErrorKind.UNSUPPORTED, f"a {self.name} image has no backing file", op="create")
        if request.encrypted:
            raise ImageError(ErrorKind.UNSUPPORTED, f"a {self.name} image is never encrypted", op="create")
        if not 0 <= request.virtual_size <= MAX_SIZE:
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, f"size {request.virtual_size} is out of range", op="create")
        grown: list[Step] = [Grow(0, request.virtual_size)]
        mode = preallocation_of(request.options, FALLOC, FULL)
        return plan(grown, *space_stages(mode, 0, 0, request.virtual_size))


FORMAT = IdentityFormat(
    "raw",
    frozenset({Trait.GUESSED, Trait.NAMED_TO_WRITE, Trait.ON_DEVICE}),
    {
        "preallocation": "off: the file is all hole (default); falloc: the host reserves its space; full: zeros are"
        " written into all of it"
    },
)
