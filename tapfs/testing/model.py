"""The engine in pure Python over an in-memory host file: what driver tests run plans and writes with.

:class:`MemoryFile` is a host file that remembers what reached it in which order, so that a test can
ask for the file as a crash at any moment may leave it. :class:`ModelDisk` does to a writable driver
what the engine and :class:`tapfs.disk.image.Image` do: reserve, write, commit, flush, flushed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from tapfs.driver import (
    Begun,
    Driver,
    HostFile,
    HostSpace,
    NumberedFile,
    Operation,
    PartlyZeroing,
    Placement,
    Reservation,
    Role,
    WritableDriver,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind, Range
from tapfs.plan import Allocate, Copy, Discard, Grow, Plan, Shorten, Step, Write
from tapfs.records import dataclass, field

SECTOR = 512
_BLOCK = 4096


def is_zero(data: bytes | bytearray) -> bool:
    """Whether all bytes are zero."""
    return data == bytes(len(data))


def apply_step(data: bytearray, step: Step) -> None:
    """Do one step to the bytes of a file."""
    match step:
        case Write(_, host_offset, written):
            if len(data) < host_offset:
                data.extend(bytes(host_offset - len(data)))
            data[host_offset : host_offset + len(written)] = written
        case Grow(_, size):
            data.extend(bytes(max(0, size - len(data))))
        case Discard(_, host_offset, length):
            end = min(len(data), host_offset + length)
            data[host_offset:end] = bytes(max(0, end - host_offset))
        case Copy(_, host_offset, source, length):
            copied = bytes(data[source : source + length])
            apply_step(data, Write(0, host_offset, copied.ljust(length, b"\0")))
        case Shorten(_, size):
            del data[size:]
        case Allocate():
            pass


def torn(step: Step) -> Iterator[Step]:
    """The pieces of a step that a crash may leave done or undone on their own: host sectors."""
    match step:
        case Write(file, host_offset, written):
            at = 0
            while at < len(written):
                stop = min(len(written), at + SECTOR - (host_offset + at) % SECTOR)
                yield Write(file, host_offset + at, written[at:stop])
                at = stop
        case Discard(file, host_offset, length):
            at = host_offset
            while at < host_offset + length:
                stop = min(host_offset + length, at + _BLOCK - at % _BLOCK)
                yield Discard(file, at, stop - at)
                at = stop
        case Copy(file, host_offset, source, length):
            for at in range(0, length, SECTOR):
                yield Copy(file, host_offset + at, source + at, min(SECTOR, length - at))
        case Grow() | Allocate() | Shorten():
            yield step


def _blocks(host_offset: int, length: int) -> range:
    """The blocks of the host that a range touches."""
    return range(host_offset // _BLOCK, -(-(host_offset + length) // _BLOCK))


class MemoryFile(HostFile):
    """A host file in memory: a :class:`tapfs.driver.HostFile` that can be written and crashed.

    `epochs[i]` holds the steps between barrier `i` and the next one. `further` are the other host files of an image of
    several, by their names: file 1, 2 and so on. This one, file 0, opens them for the driver, and keeps all steps.
    """

    def __init__(
        self, data: bytes | bytearray = b"", path: str = "memory.img", further: Mapping[str, MemoryFile] | None = None
    ) -> None:
        self._path = path
        #: The bytes before the first step; None: none was done.
        self._before: bytes | None = None
        self.data = bytearray(data)
        self.further = dict(further or {})
        self.epochs: list[list[Step]] = [[]]
        self._spaced: set[int] | None = None

    @property
    def start(self) -> bytes:
        """The bytes before the first step."""
        return bytes(self.data) if self._before is None else self._before

    @property
    def spaced(self) -> set[int]:
        """The blocks that have space on the host: those that hold anything, at first. Counted when first needed."""
        if self._spaced is None:
            data = self.start
            self._spaced = {at // _BLOCK for at in range(0, len(data), _BLOCK) if not is_zero(data[at : at + _BLOCK])}
        return self._spaced

    @property
    def path(self) -> str:
        """The name for messages."""
        return self._path

    def size(self) -> int:
        """Length in bytes now."""
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`."""
        return bytes(self.data[offset : offset + length])

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The blocks that hold other than zeros, as a host file system with holes would say."""
        end = min(offset + length, len(self.data))
        at = offset
        while at < end:
            block = at - at % _BLOCK
            stop = min(end, block + _BLOCK)
            if not is_zero(self.data[block : block + _BLOCK]):
                yield at, stop - at
            at = stop

    def numbered(self, number: int) -> MemoryFile:
        """The host file with this number."""
        return (self, *self.further.values())[number]

    def open(self, name: str, role: Role) -> NumberedFile:
        """A further file by its name: a :class:`tapfs.driver.FurtherFiles`."""
        del role  # a file in memory takes everything
        if name not in self.further:
            raise ImageError(ErrorKind.NOT_FOUND, f"there is no file {name}", path=self._path, op="open")
        number = 1 + list(self.further).index(name)
        return NumberedFile(number, self.numbered(number))

    def do(self, step: Step) -> None:
        """One step, not durable yet."""
        self.epochs[-1].append(step)
        file = self.numbered(step.file)
        file._before = file.start  # noqa: SLF001  ours
        apply_step(file.data, step)
        match step:
            case Write(_, host_offset, written):
                file.spaced.update(_blocks(host_offset, len(written)))
            case Copy(_, host_offset, _, length) | Allocate(_, host_offset, length):
                file.spaced.update(_blocks(host_offset, length))
            case Discard(_, host_offset, length):
                file.spaced.difference_update(range(-(-host_offset // _BLOCK), (host_offset + length) // _BLOCK))
            case Shorten(_, size):
                file.spaced.difference_update([block for block in file.spaced if block * _BLOCK >= size])
            case Grow():
                pass

    def take_space(self, spaces: Sequence[HostSpace]) -> None:
        """Set space of the host aside for ranges that may be holes."""
        for host_offset, length, number, _ in spaces:
            self.numbered(number).spaced.update(_blocks(host_offset, length))

    def without_space(self, plan: Plan) -> list[tuple[int, int]]:
        """The blocks ``(file, host offset)`` that a plan would write to and that have no space on the host."""
        found: list[tuple[int, int]] = []
        for step in (step for stage in plan.stages for step in stage if isinstance(step, Write)):
            blocks = set(_blocks(step.host_offset, len(step.data))) - self.numbered(step.file).spaced
            found += [(step.file, block * _BLOCK) for block in sorted(blocks)]
        return found

    def barrier(self) -> None:
        """Everything so far is durable."""
        self.epochs.append([])

    def apply(self, plan: Plan) -> None:
        """A whole plan with its barriers."""
        self.barrier()
        for stage in plan.stages:
            for step in stage:
                self.do(step)
            self.barrier()

    def apply_all(self, plans: list[Plan]) -> None:
        """Plans, one after the other."""
        for plan in plans:
            self.apply(plan)

    def copy(self) -> MemoryFile:
        """The same files as they are now, with everything durable."""
        copied = type(self)(self.data, self._path, {name: file.copy() for name, file in self.further.items()})
        if self._spaced is not None:  # else nothing was done, so the copy counts the same
            copied._spaced = set(self._spaced)  # noqa: SLF001  ours
        return copied

    def crashed(self, epoch: int, choice: random.Random) -> bytes:
        """File 0 after a crash; see `crashed_files`."""
        return bytes(self.crashed_files(epoch, choice).data)

    def crashed_files(self, epoch: int, choice: random.Random) -> MemoryFile:
        """The files after a crash in `epoch`: all before it, and any part of what it did, torn."""
        ((_, left),) = self._crashes([epoch], choice)
        return left

    def crashes(self, count: int, choice: random.Random) -> Iterator[tuple[int, MemoryFile]]:
        """So many crashes in any epochs, ascending: the epoch, and the files after it. One pass over the steps."""
        return self._crashes(sorted(choice.randrange(len(self.epochs)) for _ in range(count)), choice)

    def _crashes(self, epochs: Iterable[int], choice: random.Random) -> Iterator[tuple[int, MemoryFile]]:
        files = [bytearray(self.numbered(number).start) for number in range(1 + len(self.further))]
        reached = 0
        for epoch in epochs:
            for done in self.epochs[reached:epoch]:
                for step in done:
                    apply_step(files[step.file], step)
            reached = epoch
            yield epoch, self._torn([bytearray(data) for data in files], epoch, choice)

    def _torn(self, files: list[bytearray], epoch: int, choice: random.Random) -> MemoryFile:
        """The files with any part of what an epoch did, torn."""
        pieces = [piece for step in self.epochs[epoch] for piece in torn(step)]
        if pieces and choice.random() < 0.4:
            # The sharpest questions: what if one piece alone is there, or one alone is missing?
            alone, inverted = choice.randrange(len(pieces)), choice.random() < 0.5
            done = [piece for at, piece in enumerate(pieces) if (at == alone) != inverted]
        else:
            share = choice.choice([0.0, 0.2, 0.5, 0.8, 1.0])
            done = [piece for piece in pieces if choice.random() < share]
        for piece in done:
            apply_step(files[piece.file], piece)
        further = {name: MemoryFile(data, name) for name, data in zip(self.further, files[1:], strict=True)}
        return MemoryFile(files[0], self._path, further)


def may_zero(driver: PartlyZeroing, offset: int, end: int) -> bool:
    """Whether a driver can say of a range of whole granules that it reads as zeros."""
    unit = driver.geometry.packed_unit
    edges = [offset, *range(offset - offset % unit + unit, end, unit), end]
    parts = [(start, stop) for start, stop in pairwise(edges) if stop - start < unit]
    return all(driver.can_zero(start, stop - start) for start, stop in parts)


def read_extents(driver: Driver, file: MemoryFile, offset: int, length: int, backing: bytes = b"") -> bytes:
    """Bytes of a virtual disk through its driver's map. A cipher is taken to be the identity."""
    out = bytearray(length)
    for extent in driver.map(offset, length):
        start, end = max(extent.offset, offset), min(extent.end, offset + length)
        if start >= end:
            continue
        match extent.kind:
            case Kind.DATA:
                at = extent.host_offset + start - extent.offset
                found: bytes | bytearray = file.numbered(extent.file).data[at : at + end - start]
            case Kind.COMPRESSED:
                packed = file.read(extent.host_offset, extent.host_length)
                unit = driver.geometry.packed_unit
                unpacked = zlib.decompressobj(-15).decompress(packed, unit).ljust(unit, b"\0")
                found = unpacked[start % unit : start % unit + end - start]
            case Kind.UNALLOCATED:
                found = backing[start:end]
            case Kind.ZERO:
                continue
            case Kind.BROKEN:
                raise AssertionError(f"no driver answers with BROKEN, as of [{start}, {end})")
        # What is short ends in zeros.
        out[start - offset : start - offset + len(found)] = found
    return bytes(out)


@dataclass
class ModelDisk:
    """A writable driver, its host file and the bytes of the disk below it."""

    driver: WritableDriver
    file: MemoryFile
    backing: bytes = b""
    _begun: bool = field(default=False, init=False)

    @property
    def begun(self) -> bool:
        """Whether anything was changed since the opening, or the last end."""
        return self._begun

    def read(self, offset: int, length: int) -> bytes:
        """Read from the virtual disk."""
        return read_extents(self.driver, self.file, offset, length, self.backing)

    def whole(self) -> bytes:
        """All of the virtual disk."""
        return self.read(0, self.driver.geometry.virtual_size)

    def begin(self) -> None:
        """Have the image say that it is being written, if it is to say so, before the first change."""
        if not self._begun and isinstance(self.driver, Begun):
            self.file.apply(self.driver.begin())
        self._begun = True

    def end(self) -> None:
        """Flush, and have the image say that it is not being written any more."""
        self.flush()
        if self._begun and isinstance(self.driver, Begun):
            self.file.apply(self.driver.end())
        self._begun = False

    def write(self, offset: int, data: bytes) -> None:
        """Write as the engine does: in place where the map allows, else to reserved places."""
        self.begin()
        at, end = offset, offset + len(data)
        while at < end:
            place, stop = self._state(at, end)
            piece = data[at - offset : stop - offset]
            if place is not None:
                self._put(*place, piece)
            else:
                self.driver.commit(self.start_write(at, piece))
            at = stop

    def start_write(self, offset: int, data: bytes) -> Reservation:
        """Reserve and write, but do not commit."""
        return self.start_writes([(offset, data)])

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """Reserve, and take the space that the reservation names."""
        reservation = self.driver.reserve(ranges, operation)
        self.file.take_space(reservation.metadata)
        return reservation

    def refuse(self, offset: int, length: int, operation: Operation) -> None:
        """Reserve whole granules on a host that is full, which has no space for what the reservation names."""
        self.begin()
        self.driver.abort(self.driver.reserve([Range(offset, length)], operation))

    def start_writes(self, pieces: Sequence[tuple[int, bytes]]) -> Reservation:
        """Reserve and write several pieces at once, which ascend and share no granule; do not commit."""
        self.begin()
        ranges = [self._aligned_out(offset, len(data)) for offset, data in pieces]
        reservation = self.reserve([Range(start, end - start) for start, end in ranges], Operation.WRITE)
        at = placed = 0
        for placement in reservation.placements:
            assert placement.offset >= at
            at = placement.offset + placement.length
            placed += self._fill(placement, pieces)
        assert placed == sum(len(data) for _, data in pieces), "a part of a write has no place"
        return reservation

    def _fill(self, placement: Placement, pieces: Sequence[tuple[int, bytes]]) -> int:
        """Write what goes to a place; the bytes of the pieces in it. A place may be wider than what was asked for."""
        start, end = placement.offset, placement.offset + placement.length
        inside = [
            (max(offset, start), data[max(0, start - offset) : end - offset])
            for offset, data in pieces
            if offset < end and start < offset + len(data)
        ]
        fresh = placement.fresh and self.driver.geometry.cipher is None
        if fresh:
            self._require_fresh(placement)
        if placement.in_place:
            for offset, data in inside:
                self._put(placement.file, placement.host_offset + offset - start, data)
        else:
            # The old contents fill the rest of it.
            wanted = bytearray(self.read(start, min(end, self.driver.geometry.virtual_size) - start))
            wanted.extend(bytes(placement.length - len(wanted)))
            for offset, data in inside:
                wanted[offset - start : offset - start + len(data)] = data
            self._write_fill(placement.file, placement.host_offset, bytes(wanted), fresh=fresh)
        return sum(len(data) for _, data in inside)

    def zero(self, offset: int, length: int, operation: Operation = Operation.ZERO) -> None:
        """Zero or discard whole granules."""
        self.begin()
        reservation = self.reserve([Range(offset, length)], operation)
        at = offset
        for placement in reservation.placements:
            assert placement.offset >= at
            assert placement.offset + placement.length <= offset + length
            at = placement.offset + placement.length
            if placement.fresh:
                self._require_fresh(placement)
            else:
                self._put(placement.file, placement.host_offset, bytes(placement.length))
        self.driver.commit(reservation)

    def flush(self) -> None:
        """All that is committed becomes durable. The plan takes no space that was not taken for it before."""
        plan = self.driver.flush()
        missing = self.file.without_space(plan)
        places = ", ".join(f"{offset} of file {number}" for number, offset in sorted(set(missing))[:4])
        said = f"no `Reservation.metadata` has named what the plan writes at host offset {places}"
        assert not missing, f"{said}, where a full host has no space"
        self.file.apply(plan)
        self.driver.flushed(plan)

    def _require_fresh(self, placement: Placement) -> None:
        there = self.file.numbered(placement.file).read(placement.host_offset, placement.length)
        assert is_zero(there), "a fresh place holds data"

    def _put(self, number: int, host_offset: int, data: bytes) -> None:
        """Write guest data as it reaches the disk: whole sectors, with what the page cache has of the rest of them."""
        file = self.file.numbered(number)
        end = host_offset + len(data)
        start = host_offset - host_offset % SECTOR
        stop = max(end, min(-(-end // SECTOR) * SECTOR, file.size()))
        whole = file.read(start, host_offset - start).ljust(host_offset - start, b"\0") + data
        self.file.do(Write(number, start, whole + file.read(end, stop - end)))

    def _write_fill(self, number: int, host_offset: int, data: bytes, *, fresh: bool) -> None:
        if not fresh:
            self._put(number, host_offset, data)
            return
        for at in range(0, len(data), SECTOR):
            if not is_zero(data[at : at + SECTOR]):
                self._put(number, host_offset + at, data[at : at + SECTOR])

    def _state(self, offset: int, end: int) -> tuple[tuple[int, int] | None, int]:
        """The file and the place that take the bytes at `offset`, None if they are to be reserved; and up to where."""
        stop = offset
        place: tuple[int, int] | None = None
        for extent in self.driver.map(offset, end - offset):
            if extent.end <= offset:
                continue
            if extent.offset <= offset:
                if extent.in_place:
                    place = extent.file, extent.host_offset + offset - extent.offset
            elif extent.in_place or place is not None:
                break
            stop = extent.end
        return place, min(stop, end)

    def _aligned_out(self, offset: int, length: int) -> tuple[int, int]:
        granule = self.driver.geometry.granule
        return offset // granule * granule, -(-(offset + length) // granule) * granule
