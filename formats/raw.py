"""Raw images: byte i of the disk is byte i of the file. Holes of the host file are its zeros."""

from __future__ import annotations

from collections.abc import Mapping

from tapfs.driver import (
    Ability,
    CreateRequest,
    Driver,
    Geometry,
    HostFile,
    OpenRequest,
    Operation,
    Placement,
    Reservation,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, merge
from tapfs.plan import Grow, Plan, plan

#: A host file offset is a signed 64-bit number.
MAX_SIZE = (1 << 63) - 1

_MAP_UNIT = 1 << 30


class IdentityDriver:
    """A disk that is one host file as it stands, of any length in bytes."""

    def __init__(self, file: HostFile, format_name: str) -> None:
        self.format_name = format_name
        self.geometry = Geometry(virtual_size=file.size(), granule=1, map_unit=_MAP_UNIT, identity=True)
        self._file = file

    def map(self, offset: int, length: int) -> list[Extent]:
        """DATA where the host has allocated space, ZERO where the host file has a hole."""
        return list(merge(self._extents(offset, offset + length)))

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

    def reserve(self, offset: int, length: int, operation: Operation) -> Reservation:
        """Every byte has its place already."""
        return Reservation(offset, length, operation, (Placement(offset, length, offset, in_place=True),))

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


class IdentityFormat:
    """A format whose images are the disk as it stands, under one of the names that this has."""

    create_options: Mapping[str, str] = {}
    abilities = frozenset({Ability.WRITE})

    def __init__(self, name: str) -> None:
        self.name = name

    def probe(self, head: bytes, size: int) -> int:
        """0: nothing in a file says that it is the disk itself."""
        del head, size
        return 0

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        """Any file is such an image."""
        del request
        return IdentityDriver(file, self.name)

    def create(self, request: CreateRequest) -> Plan:
        """A file of exactly the virtual size, all hole."""
        if request.backing is not None:
            raise ImageError(ErrorKind.UNSUPPORTED, f"a {self.name} image has no backing file", op="create")
        if request.encrypted:
            raise ImageError(ErrorKind.UNSUPPORTED, f"a {self.name} image is never encrypted", op="create")
        if not 0 <= request.virtual_size <= MAX_SIZE:
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, f"size {request.virtual_size} is out of range", op="create")
        return plan([Grow(0, request.virtual_size)])


FORMAT = IdentityFormat("raw")
