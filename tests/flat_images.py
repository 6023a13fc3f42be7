"""A toy format of several host files, for tests of what the core promises to such formats.

FLAT1, then a line for each extent: its length in bytes, how it is used (rw or ro), the host offset, the file name. Each
extent's bytes stand in its file as they are. A line "snapshot NAME" begins the extents of a snapshot. The last line of
a descriptor may be "parent NAME". A counter of flushes
stands behind the lines, so that a flush has something to plan: it is written to the descriptor and to every file that
is named only to be a log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tapfs.driver import (
    BackingReference,
    CreateRequest,
    Geometry,
    HostFile,
    OpenRequest,
    Operation,
    Placement,
    Reservation,
    Role,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, Range
from tapfs.plan import Grow, Plan, Write, plan

MAGIC = b"FLAT1\n"
COUNTER_AT = 4096
_ROLES = {"rw": Role.DATA, "ro": Role.READ_ONLY_DATA, "log": Role.LOG}


class Part(NamedTuple):
    """One extent: a run of the disk and its place on the host."""

    offset: int
    length: int
    file: int
    host_offset: int
    writable: bool


class FlatDriver:
    """An open image of the toy format."""

    format_name = "flat"

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        text = file.read(0, COUNTER_AT).split(b"\0", 1)[0]
        if not text.startswith(MAGIC):
            raise ImageError(ErrorKind.INVALID_FORMAT, "not a flat image", path=file.path, offset=0, op="open")
        self.parts: list[Part] = []
        self.logs: list[int] = []
        backing = None
        offset = 0
        self._snapshots: list[str] = []
        current: str | None = None
        for line in text.decode().splitlines()[1:]:
            if line.startswith("snapshot "):
                current = line.removeprefix("snapshot ")
                self._snapshots.append(current)
                continue
            if current != request.snapshot:
                continue
            if line.startswith("parent "):
                backing = BackingReference(line.removeprefix("parent "), "raw")
                continue
            length, use, host_offset, name = line.split(" ", 3)
            number = request.further.open(name, _ROLES[use]).number
            if use == "log":
                self.logs.append(number)
                continue
            writable = request.writable and use == "rw"
            self.parts.append(Part(offset, int(length), number, int(host_offset), writable))
            offset += int(length)
        if request.snapshot is not None and request.snapshot not in self._snapshots:
            raise ImageError(ErrorKind.NOT_FOUND, f"has no snapshot {request.snapshot!r}", path=file.path, op="open")
        self.geometry = Geometry(virtual_size=offset, granule=512, map_unit=1 << 20, backing=backing)
        self.flushes = int.from_bytes(file.read(COUNTER_AT, 8), "big")

    def map(self, offset: int, length: int) -> list[Extent]:
        return [
            Extent(p.offset, p.length, Kind.DATA, p.file, p.host_offset, in_place=p.writable)
            for p in self.parts
            if p.offset < offset + length and offset < p.offset + p.length
        ]

    def snapshots(self) -> Sequence[str]:
        return self._snapshots

    def details(self) -> Mapping[str, object]:
        return {"flushes": self.flushes}

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        return Reservation(tuple(ranges), operation, tuple(place for each in ranges for place in self._places(*each)))

    def _places(self, offset: int, length: int) -> list[Placement]:
        end = offset + length
        placements = [
            Placement(
                max(p.offset, offset),
                min(p.offset + p.length, end) - max(p.offset, offset),
                p.host_offset + max(p.offset, offset) - p.offset,
                p.file,
                in_place=True,
            )
            for p in self.parts
            if p.offset < end and offset < p.offset + p.length
        ]
        if not all(p.writable for p in self.parts if p.offset < end and offset < p.offset + p.length):
            raise ImageError(ErrorKind.READ_ONLY, "this extent is read-only", op="write")
        return placements

    def commit(self, reservation: Reservation) -> None:
        del reservation

    def abort(self, reservation: Reservation) -> None:
        del reservation

    @property
    def unflushed_bytes(self) -> int:
        return 0

    def flush(self) -> Plan:
        counter = (self.flushes + 1).to_bytes(8, "big")
        return plan([Write(number, 0, counter) for number in self.logs], [Write(0, COUNTER_AT, counter)])

    def flushed(self, executed: Plan) -> None:
        del executed
        self.flushes += 1


class FlatFormat:
    """The toy format; `-o extents=N` makes an image of N equal extents and a log."""

    name = "flat"
    create_options: Mapping[str, str] = {"extents": "number of extents"}

    def probe(self, head: bytes, size: int) -> int:
        del size
        return 100 if head.startswith(MAGIC) else 0

    def open(self, file: HostFile, request: OpenRequest) -> FlatDriver:
        return FlatDriver(file, request)

    def further_names(self, request: CreateRequest) -> Sequence[str]:
        count = int(request.options.get("extents", "1"))
        stem = request.name.removesuffix(".flat")
        return [*(f"{stem}-{i}.bin" for i in range(count)), f"{stem}.log"]

    def create(self, request: CreateRequest) -> Plan:
        *extents, log = self.further_names(request)
        part = request.virtual_size // len(extents)
        lines = [f"{part} rw 0 {name}\n" for name in extents] + [f"0 log 0 {log}\n"]
        if request.backing is not None:
            lines.append(f"parent {request.backing.name}\n")
        text = MAGIC + "".join(lines).encode()
        grown = [Grow(number, part) for number in range(1, len(extents) + 1)]
        return plan([*grown, Grow(0, COUNTER_AT + 8)], [Write(0, 0, text)])


FORMAT = FlatFormat()
