"""The engine as Python sees it: typed, memory-safe, still without any format knowledge.

Calls release the GIL while C runs. A request that finishes returns None or an
:class:`Outcome` that says what is missing; a failure of the host raises ImageError with the
host file's name and offset.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

from tapfs.driver import Codec, Geometry, HostSpace, Identity, Placement
from tapfs.errors import ErrorKind, ImageError, from_os_error, truncated
from tapfs.extent import Extent
from tapfs.host_files import Presence
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.cipher_keys import fill_cipher, wipe_cipher
from tapfs.kernel.codec_libraries import CODECS_OF_LIBRARIES, load_codec
from tapfs.kernel.crc32c import use_instruction
from tapfs.plan import Allocate, Copy, Discard, Grow, Plan, Shorten, Write
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from mmap import mmap

    from tapfs.kernel._engine import CData

use_instruction()

Buffer: TypeAlias = "bytes | bytearray | memoryview | mmap"

#: Room that the engine fills: the host gives pages for what is filled alone.
_not_cleared = ffi.new_allocator(should_clear_after_alloc=False)


class Status(IntEnum):
    """How a request ended, as in engine/engine.h; a failure is an exception instead."""

    DONE = 0
    MISS = 1
    RESERVE = 2
    AGAIN = 3
    FETCH = 5


class Outcome(NamedTuple):
    """How far a request came: `done` bytes from its start are finished.

    Unless DONE, what is missing is the guest range ``[offset, offset + length)`` of `layer`; with FETCH it is that
    range of its host file `file`.
    """

    status: Status
    done: int
    layer: int
    offset: int
    length: int
    file: int = 0

    @property
    def incomplete(self) -> bool:
        """Whether something is missing: the request goes on once that is supplied."""
        return self.status != Status.DONE

    @property
    def needs_fetch(self) -> bool:
        """Whether bytes of a host file are not here."""
        return self.status == Status.FETCH

    @property
    def needs_map(self) -> bool:
        """Whether it is the map of the range that is missing."""
        return self.status == Status.MISS

    @property
    def needs_reservation(self) -> bool:
        """Whether a write needs the range reserved; else it is the map that is missing."""
        return self.status == Status.RESERVE


class HostDescriptor(NamedTuple):
    """An open host file for the engine. The descriptor stays the caller's."""

    descriptor: int
    path: str
    direct: bool = False
    writable: bool = False
    presence: Presence | None = None
    #: Where the file begins in what the descriptor names, and its length; None: it is all of that.
    window: tuple[int, int] | None = None


class Statistics(NamedTuple):
    """Counters since the disk was made, and the bytes that its map cache holds."""

    cache_hits: int
    cache_misses: int
    cache_fills: int
    cache_bytes: int
    bytes_read: int
    bytes_written: int


class EngineDisk:
    """One virtual disk in the engine: layers, top first, each with its host files."""

    def __init__(self, cache_bytes: int) -> None:
        disk = lib.tapfs_disk_new(cache_bytes)
        if disk == ffi.NULL:
            raise MemoryError
        self._open: CData | None = ffi.gc(disk, lib.tapfs_disk_free)
        self._tracked = False
        self._paths: list[list[str]] = []
        self._alive: list[CData] = []

    @property
    def handle(self) -> CData:
        """The `tapfs_disk`, for other parts of the engine that use it; valid until `close`."""
        if self._open is None:
            raise ValueError("the disk is closed")
        return self._open

    def close(self) -> None:
        """Free the disk. No request may be running; closing twice is allowed."""
        if self._open is not None:
            ffi.release(self._open)
            self._open = None

    def add_layer(
        self,
        geometry: Geometry,
        *,
        files: Iterable[HostDescriptor],
        key: bytes | bytearray | None = None,
        writable: bool = False,
    ) -> int:
        """Add the next layer below; `key` goes with a cipher and is as long as that says.

        Raises ImageError(io) for a geometry that the engine cannot serve, (unsupported) for a library that is missing.
        """
        files = list(files)
        if geometry.packing is not None and geometry.packing.codec in CODECS_OF_LIBRARIES:
            load_codec(geometry.packing.codec, files[0].path if files else None)
        layer = ffi.new("tapfs_layer *")
        layer.virtual_size = geometry.virtual_size
        layer.granule = geometry.granule
        layer.packed_unit = geometry.packed_unit
        layer.map_unit = geometry.map_unit
        layer.writable = writable
        if geometry.identity is not None:
            layer.identity = True
            layer.identity_file, layer.identity_offset = geometry.identity
        if geometry.packing is not None:
            for name in ("codec", "header_bytes", "length_at", "length_bytes", "own_units"):
                setattr(layer.packing, name, getattr(geometry.packing, name))
        if geometry.cipher is not None:
            fill_cipher(layer.cipher, geometry.cipher, key or b"", files[0].path if files else None)
        try:
            index = self._checked(lib.tapfs_disk_add_layer(self.handle, layer), "add a layer")
        finally:
            wipe_cipher(layer.cipher)
        paths: list[str] = []
        for file in files:
            flags = (lib.TAPFS_FILE_DIRECT if file.direct else 0) | (lib.TAPFS_FILE_WRITABLE if file.writable else 0)
            number = self._checked(lib.tapfs_disk_add_file(self.handle, index, file.descriptor, flags), "add a file")
            if file.presence is not None:
                self._set_presence(index, number, file.presence)
            if file.window is not None:
                self._checked(lib.tapfs_disk_set_window(self.handle, index, number, *file.window), "add a window")
            paths.append(file.path)
        self._paths.append(paths)
        return index

    def _set_presence(self, layer: int, file: int, presence: Presence) -> None:
        present = ffi.from_buffer("uint8_t[]", presence.blocks)
        self._alive.append(present)  # and the bytes with it
        result = lib.tapfs_disk_set_presence(
            self.handle, layer, file, presence.block_bytes, present, len(presence.blocks)
        )
        self._checked(result, "say what of a file is here")

    def install(self, layer: int, extents: Sequence[Extent]) -> None:
        """Cache the map of whole map units (see engine/engine.h)."""
        self._checked(lib.tapfs_disk_install(self.handle, layer, _extents(extents), len(extents)), "install a map")

    def forget(self, layer: int, offset: int, length: int) -> None:
        """Drop the cached units that touch the range."""
        lib.tapfs_disk_forget(self.handle, layer, offset, length)

    def seal(self, *, sealed: bool) -> None:
        """While it is sealed every write in place ends with RESERVE, so that the caller comes to know of it."""
        lib.tapfs_disk_seal(self.handle, sealed)

    def read_into(self, buffer: Buffer, offset: int, *, nowait: bool = False) -> Outcome:
        """Fill `buffer` from the virtual disk at `offset`."""
        outcome = ffi.new("tapfs_outcome *")
        with ffi.from_buffer(buffer, require_writable=True) as target:
            flags = lib.TAPFS_NOWAIT if nowait else 0
            lib.tapfs_read(self.handle, target, offset, len(target), flags, outcome)
        return self.finished(outcome)

    def zero_placements(self, placements: Sequence[Placement], *, discard: bool) -> None:
        """Make reserved places read as zeros; with `discard` only where that frees space."""
        outcome = ffi.new("tapfs_outcome *")
        lib.tapfs_zero_placements(self.handle, _placements(placements), len(placements), discard, outcome)
        self.finished(outcome)

    def take_space(self, spaces: Sequence[HostSpace]) -> None:
        """Take space on the host for ranges of layer 0's files. Raises ImageError(no_space); see tapfs_take_space."""
        outcome = ffi.new("tapfs_outcome *")
        lib.tapfs_take_space(
            self.handle, ffi.new("tapfs_space[]", [tuple(each) for each in spaces]), len(spaces), outcome
        )
        self.finished(outcome)

    def write_host(self, file: int, host_offset: int, buffer: Buffer, *, guest_offset: int | None = None) -> None:
        """Write a payload at a host offset of layer 0, encrypted for `guest_offset` if given."""
        outcome = ffi.new("tapfs_outcome *")
        guest = (1 << 64) - 1 if guest_offset is None else guest_offset
        with ffi.from_buffer(buffer) as source:
            lib.tapfs_write_host(self.handle, file, host_offset, source, len(source), guest, outcome)
        self.finished(outcome)

    def execute(self, plan: Plan) -> None:
        """Execute a plan on layer 0: its stages with the barriers that `tapfs.plan` describes."""
        barriers = len(plan.stages) + plan.starts_with_barrier
        count = barriers + sum(len(stage) for stage in plan.stages)
        steps = ffi.new("tapfs_step[]", count)
        alive: list[object] = []
        index = 0
        if plan.starts_with_barrier:
            steps[0].step = lib.TAPFS_STEP_BARRIER
            index = 1
        for stage in plan.stages:
            for step in stage:
                slot = steps[index]
                index += 1
                slot.file = step.file
                match step:
                    case Write():
                        data = ffi.from_buffer("uint8_t[]", step.data)
                        alive.append(data)
                        slot.step = lib.TAPFS_STEP_WRITE
                        slot.host_offset = step.host_offset
                        slot.length = len(step.data)
                        slot.data = data
                    case Grow():
                        slot.step = lib.TAPFS_STEP_GROW
                        slot.host_offset = step.size
                    case Shorten():
                        slot.step = lib.TAPFS_STEP_SHORTEN
                        slot.host_offset = step.size
                    case Copy():
                        slot.step = lib.TAPFS_STEP_COPY
                        slot.host_offset = step.host_offset
                        slot.length = step.length
                        slot.source = step.source
                    case Allocate():
                        slot.step = lib.TAPFS_STEP_ALLOCATE
                        slot.host_offset = step.host_offset
                        slot.length = step.length
                    case Discard():
                        slot.step = lib.TAPFS_STEP_DISCARD
                        slot.host_offset = step.host_offset
                        slot.length = step.length
            steps[index].step = lib.TAPFS_STEP_BARRIER
            index += 1
        outcome = ffi.new("tapfs_outcome *")
        lib.tapfs_execute(self.handle, steps, count, outcome)
        self.finished(outcome)

    def sync(self) -> None:
        """Make every finished write of layer 0 durable."""
        outcome = ffi.new("tapfs_outcome *")
        lib.tapfs_sync(self.handle, outcome)
        self.finished(outcome)

    def start_writeback(self) -> None:
        """Have the host begin to write what it holds in memory of layer 0's files; it may wait for the host."""
        lib.tapfs_start_writeback(self.handle)

    def track(self, unit: int) -> int:
        """Have writes leave marks in units of so many bytes (`tapfs.kernel.written`); 0 or -errno."""
        self._tracked = True
        return lib.tapfs_disk_track(self.handle, unit)

    def untrack(self) -> None:
        """Have writes leave no more marks."""
        self._tracked = False
        lib.tapfs_disk_untrack(self.handle)

    def note_written(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Mark ranges ``(offset, length)`` as written, if there are marks."""
        if self._tracked:
            for offset, length in ranges:
                lib.tapfs_disk_note_written(self.handle, offset, length)

    def quiesce(self) -> None:
        """Wait until every request that runs now has ended."""
        lib.tapfs_disk_quiesce(self.handle)

    def statistics(self) -> Statistics:
        """The counters now."""
        counters = ffi.new("tapfs_statistics *")
        lib.tapfs_disk_statistics(self.handle, counters)
        return Statistics(
            counters.cache_hits,
            counters.cache_misses,
            counters.cache_fills,
            counters.cache_bytes,
            counters.bytes_read,
            counters.bytes_written,
        )

    def _checked(self, result: int, op: str) -> int:
        if result < 0:
            raise from_os_error(OSError(-result, ""), path=None, op=op)
        return result

    def _path(self, layer: int, file: int) -> str | None:
        if layer < len(self._paths) and file < len(self._paths[layer]):
            return self._paths[layer][file]
        return None

    def finished(self, outcome: CData) -> Outcome:
        """What a `tapfs_outcome` says. Raises the ImageError of a failure."""
        if outcome.status == lib.TAPFS_FAILED:
            op = ffi.string(outcome.operation).decode() if outcome.operation != ffi.NULL else "move data"
            path = self._path(outcome.layer, outcome.file)
            if outcome.error == errno.ERANGE:
                raise ImageError(
                    ErrorKind.OUT_OF_BOUNDS,
                    f"cannot {op}: the request reaches past the end of the disk",
                    path=path,
                    offset=outcome.offset,
                    op=op,
                )
            if outcome.error == errno.EBADFD:
                raise truncated(path, offset=outcome.offset)
            if outcome.error == errno.EUCLEAN:
                raise ImageError(
                    ErrorKind.CORRUPT, f"damaged data: cannot {op}", path=path, offset=outcome.offset, op=op
                )
            raise from_os_error(OSError(outcome.error, ""), path=path, op=op, offset=outcome.offset)
        return Outcome(
            Status(outcome.status), outcome.done, outcome.layer, outcome.offset, outcome.length, outcome.file
        )


def execute_on_files(files: Iterable[HostDescriptor], plan: Plan) -> None:
    """Execute a plan on host files, which its steps call by their place in `files`."""
    disk = EngineDisk(0)
    try:
        disk.add_layer(Geometry(0, granule=1, map_unit=1, identity=Identity()), files=files, writable=True)
        for stage in plan.stages or ((),):  # one by one, so that a long plan can be ended between two of them
            disk.execute(Plan((stage,)))
    finally:
        disk.close()


def is_zero(buffer: Buffer) -> bool:
    """Whether all bytes are zero."""
    with ffi.from_buffer(buffer) as source:
        return bool(lib.tapfs_is_zero(source, len(source)))


def find_data(buffer: Buffer, granule: int) -> list[tuple[int, int]]:
    """The ``(offset, length)`` runs of granules of `buffer` that are not all zero."""
    runs: list[tuple[int, int]] = []
    with ffi.from_buffer(buffer) as source:
        total = len(source)
        capacity = min(1024, total // granule // 2 + 2)
        pairs = ffi.new("uint64_t[]", 2 * capacity)
        scanned = ffi.new("uint64_t *")
        start = 0
        while start < total:
            found = lib.tapfs_find_data(source + start, total - start, granule, pairs, capacity, scanned)
            runs.extend((start + pairs[2 * i], pairs[2 * i + 1]) for i in range(found))
            start += scanned[0]
    return runs


def first_difference(left: Buffer, right: Buffer) -> int | None:
    """The offset of the first byte that differs between two buffers of one length, or None."""
    with ffi.from_buffer(left) as a, ffi.from_buffer(right) as b:
        length = min(len(a), len(b))
        at: int = lib.tapfs_first_difference(a, b, length)
    return None if at == length else at


def compress(codec: Codec, buffer: Buffer, granule: int) -> list[bytes | None]:
    """Each granule of `buffer` packed on its own; None for one that does not shrink."""
    with ffi.from_buffer(buffer) as source:
        count = len(source) // granule
        out = _not_cleared("uint8_t[]", len(source))  # most of it is never touched
        sizes = ffi.new("uint64_t[]", count)
        result = lib.tapfs_compress(codec, source, granule, count, out, sizes)
        if result < 0:
            raise from_os_error(OSError(-result, ""), path=None, op="compress")
        packed: list[bytes | None] = []
        at = 0
        for size in sizes:
            packed.append(ffi.buffer(out + at, size)[:] if size else None)
            at += size
    return packed


def _extents(extents: Sequence[Extent]) -> CData:
    # In the order of tapfs_extent; one call with tuples is far quicker than assigning field by field.
    return ffi.new(
        "tapfs_extent[]",
        [(e.offset, e.length, e.host_offset, e.host_length, e.file, e.skip, e.kind, e.in_place) for e in extents],
    )


def _placements(placements: Sequence[Placement]) -> CData:
    return ffi.new(
        "tapfs_placement[]",
        [(p.offset, p.length, p.host_offset, p.file, p.fresh, p.in_place) for p in placements],
    )
