"""One open virtual disk: a chain of drivers and the engine disk that moves its bytes.

The life of a read: the engine reads; where it has no map it says so, the driver of that
layer is asked, its answer is installed in the engine, and the read goes on.

The life of a write: the engine writes in place as far as the map allows; for the rest the
driver reserves places, the engine writes there (filling partial granules with the old
contents), the driver commits. Metadata reaches the disk at `flush`, by the driver's plan.

Locking. `_map_lock` covers the drivers and every change of the engine's map cache, so that a
map and its installation are one step, and so are a commit and the new map. Reservations that
are being filled are in `_pending`; who wants to reserve what overlaps one waits until it is
gone and maps afresh. So does who saw the map before an overlapping commit: what it takes for
unallocated may be another writer's by now. `_flush_lock` lets one flush run at a time; it is taken before
`_map_lock`, never the other way. The engine is never called with `_map_lock` held, except to
install and forget maps. kernel/CONCURRENCY.md has the engine's side.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from tapfs.chain import Layer, OpenOptions, open_chain, open_parents, password_missing
from tapfs.chain_map import MappedExtent, map_chain, merge_mapped
from tapfs.description import describe
from tapfs.driver import Cipher, Operation, Reservation, Streamable, WritableDriver
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, clip
from tapfs.stream_target import StreamTarget

if TYPE_CHECKING:
    from tapfs.kernel.engine import Buffer, EngineDisk, Outcome, Statistics
    from tapfs.partitions.table import DiskContents

#: The engine's map cache, whatever the size of the image.
DEFAULT_CACHE_BYTES = 32 << 20

#: Metadata that waits for a flush is held in memory up to about this many bytes.
_UNFLUSHED_LIMIT = 32 << 20

#: Commits that a writer can miss before it must look at the map again, whatever they were.
_RECENT_COMMITS = 64

#: A request is mapped, zeroed or discarded at most this many bytes at a time.
_STRIDE = 64 << 20

#: AES-128 keys: the first 16 bytes of the password, zero padded (the legacy cipher's rule).
_KEY_BYTES = 16


class Image:
    """An open virtual disk. All methods are thread-safe and block; `close` must come last.

    Offsets and lengths are bytes. Any method may raise ImageError. A write is durable when a
    `flush` called after it has returned; after a crash the disk holds all that, and each
    sector written later is old or new.
    """

    def __init__(self, layers: Sequence[Layer], *, writable: bool, password: bytes | None, cache_bytes: int) -> None:
        """Take over an open chain. Use `tapfs.open`."""
        self._layers = tuple(layers)
        self._top = layers[0]
        self._writable = writable
        self._password = password
        self._cache_bytes = cache_bytes
        self._size = self._top.driver.geometry.virtual_size
        self._engine: EngineDisk | None = None
        self._closed = False
        self._map_lock = threading.Lock()
        self._changed = threading.Condition(self._map_lock)
        self._flush_lock = threading.Lock()
        self._pending: list[Reservation] = []
        #: How many commits there were, and the ranges of the last of them.
        self._commits = 0
        self._recent_commits: deque[tuple[int, int]] = deque(maxlen=_RECENT_COMMITS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What it is

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""
        return self._size

    @property
    def path(self) -> str:
        """The image's name as it was opened."""
        return self._top.path

    @property
    def format_name(self) -> str:
        """The image's format."""
        return self._top.driver.format_name

    @property
    def granule(self) -> int:
        """The smallest piece, in bytes, that the image maps on its own."""
        return self._top.driver.geometry.granule

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writable

    @property
    def parents(self) -> tuple[str, ...]:
        """The backing files, nearest first."""
        return tuple(layer.path for layer in self._layers[1:])

    @property
    def info(self) -> dict[str, object]:
        """What ``tapfs info --json`` prints; of an encrypted image without password only its metadata."""
        return self.description(None if self.needs_password else self.contents())

    def description(self, contents: DiskContents | None) -> dict[str, object]:
        """What `info` says, with contents of the disk that were looked at before."""
        with self._map_lock:
            described = describe(self._layers)
        return described if contents is None else described | contents.description()

    def contents(self) -> DiskContents:
        """The partition table and the file systems' names; reads a few sectors."""
        from tapfs.partitions.contents import disk_contents  # only those who ask pay for it

        return disk_contents(self.read, self._size)

    @property
    def needs_password(self) -> bool:
        """Whether an image of the chain is encrypted and no password was given."""
        encrypted = any(layer.driver.geometry.cipher != Cipher.NONE for layer in self._layers)
        return encrypted and self._password is None

    def statistics(self) -> Statistics:
        """The engine's counters."""
        return self._mover().statistics()

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[MappedExtent]:
        """The map of the range over the whole chain, merged; holes of raw files are zeros."""
        end = self._size if length is None else offset + length
        self._check_range(offset, end - offset)
        return merge_mapped(self._mapped(offset, end))

    def _mapped(self, offset: int, end: int) -> Iterator[MappedExtent]:
        """The unmerged map, the lock held only for a stride at a time."""
        while offset < end:
            step = min(_STRIDE, end - offset)
            with self._map_lock:
                runs = list(map_chain(self._layers, offset, step))
            yield from runs
            offset += step

    # Reading

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; the range must lie inside the disk."""
        self._check_range(offset, length)
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill a writable buffer from the disk at `offset`."""
        view = memoryview(buffer)
        self._check_range(offset, len(view))
        engine = self._mover()
        while view:
            outcome = engine.read_into(view, offset)
            view = view[outcome.done :]
            offset += outcome.done
            if view:
                self._supply_map(engine, outcome)

    def try_read(self, offset: int, length: int) -> bytes | None:
        """The bytes, or None if they are not to be had without waiting for the host."""
        self._check_range(offset, length)
        buffer = bytearray(length)
        outcome = self._mover().read_into(buffer, offset, nowait=True)
        return bytes(buffer) if outcome.done == length else None

    def _supply_map(self, engine: EngineDisk, outcome: Outcome) -> None:
        """Give the engine the map units that a request missed."""
        layer = self._layers[outcome.layer]
        with self._map_lock:
            engine.install(outcome.layer, _whole_units(layer, outcome.offset, outcome.length))

    # Writing

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`; the disk does not grow."""
        view = memoryview(data).cast("B")
        self._check_write(offset, len(view))
        engine = self._mover()
        while view:
            commits_seen = self._commits
            outcome = engine.write(view, offset)
            view = view[outcome.done :]
            offset += outcome.done
            if not view:
                break
            if outcome.needs_reservation:
                self._write_reserved(engine, offset, view[: outcome.length], commits_seen)
            else:
                self._supply_map(engine, outcome)
        self._bound_unflushed()

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeros, without taking space for it where the format can."""
        self._check_write(offset, length)
        end = offset + length
        for start, stop, whole in self._granules(offset, end):
            if whole:
                self._change(start, stop - start, Operation.ZERO)
            elif any(self.read(start, stop - start)):
                self.write(start, bytes(stop - start))
        self._bound_unflushed()

    def discard(self, offset: int, length: int) -> None:
        """The range's contents are not needed any more. Free what the format and host can."""
        self._check_write(offset, length)
        for start, stop, whole in self._granules(offset, offset + length):
            if whole:
                self._change(start, stop - start, Operation.DISCARD)
        self._bound_unflushed()

    def flush(self) -> None:
        """Make every write, zeroing and discard that has returned durable."""
        self._check_open()
        if not self._writable:
            return
        engine = self._mover()
        driver = self._driver()
        with self._flush_lock:
            with self._map_lock:
                executed = driver.flush()
            engine.execute(executed)
            engine.quiesce()
            with self._map_lock:
                driver.flushed(executed)

    def stream_writer(self) -> StreamTarget:
        """Fill this new, empty image as a stream (compressed, append-only targets).

        Nothing else may be done with the image until the stream has finished.
        """
        driver = self._top.driver
        if not isinstance(driver, Streamable):
            raise ImageError(
                ErrorKind.UNSUPPORTED, f"a {self.format_name} image is not written compressed", path=self.path
            )
        geometry = driver.geometry
        return StreamTarget(self._mover(), driver.stream(), granule=geometry.granule, codec=geometry.codec)

    @property
    def unflushed_bytes(self) -> int:
        """Bytes of metadata that only a flush will bring to the disk."""
        return self._driver().unflushed_bytes if self._writable else 0

    def close(self) -> None:
        """Flush if writable, and let go of the files; closing twice is allowed.

        Raises what the flush met, after everything is closed.
        """
        try:
            if self._writable and self._engine is not None and not self._closed:  # else nothing was written
                self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the files without a flush: what was not flushed may be lost."""
        if self._closed:
            return
        self._closed = True
        if self._engine is not None:
            self._engine.quiesce()
            self._engine.close()
        for layer in self._layers:
            layer.file.close()

    def _write_reserved(self, engine: EngineDisk, offset: int, data: memoryview, commits_seen: int) -> None:
        """Allocate for a run that was not in place after `commits_seen` commits, and write it there."""
        granule = self.granule
        start = offset - offset % granule
        end = -(-(offset + len(data)) // granule) * granule
        reservation = self._reserve(start, end - start, Operation.WRITE, commits_seen)
        if reservation is None:
            return  # another writer had it; the caller looks at the map again
        with self._filling(engine, reservation):
            while (outcome := engine.write_reserved(data, offset, reservation.placements)).done < len(data):
                self._supply_map(engine, outcome)

    def _change(self, offset: int, length: int, operation: Operation) -> None:
        """Zero or discard whole granules."""
        engine = self._mover()
        while (reservation := self._reserve(offset, length, operation)) is None:
            pass
        with self._filling(engine, reservation):
            engine.zero_placements(reservation.placements, discard=operation is Operation.DISCARD)

    def _reserve(
        self, offset: int, length: int, operation: Operation, commits_seen: int | None = None
    ) -> Reservation | None:
        """A reservation that is now pending.

        None if the caller must look at the map again: it had to wait for a reservation that
        overlapped this one, or such a one was committed since `commits_seen`.
        """
        with self._map_lock:
            if commits_seen is not None and self._changed_since(commits_seen, offset, offset + length):
                return None
            waited = False
            while any(held.offset < offset + length and offset < held.end for held in self._pending):
                waited = True
                self._changed.wait()
            if waited:
                return None
            reservation = self._driver().reserve(offset, length, operation)
            self._pending.append(reservation)
            return reservation

    @contextmanager
    def _filling(self, engine: EngineDisk, reservation: Reservation) -> Generator[None]:
        """A reservation while the engine fills it: committed if that goes well, else aborted."""
        try:
            yield
        except BaseException:
            self._settle(engine, reservation, written=False)
            raise
        self._settle(engine, reservation, written=True)

    def _changed_since(self, commits_seen: int, offset: int, end: int) -> bool:
        newer = self._commits - commits_seen
        if newer > len(self._recent_commits):
            return True
        recent = list(self._recent_commits)[len(self._recent_commits) - newer :]
        return any(start < end and offset < stop for start, stop in recent)

    def _settle(self, engine: EngineDisk, reservation: Reservation, *, written: bool) -> None:
        """Commit or abort a pending reservation and publish the map that holds then."""
        with self._map_lock:
            try:
                if written:
                    self._driver().commit(reservation)
                    engine.forget(0, reservation.offset, reservation.length)
                    # Only now: a writer that has seen this commit counted must not meet the old map.
                    self._recent_commits.append((reservation.offset, reservation.end))
                    self._commits += 1
                else:
                    self._driver().abort(reservation)
            finally:
                self._pending.remove(reservation)
                self._changed.notify_all()

    def _bound_unflushed(self) -> None:
        if self.unflushed_bytes > _UNFLUSHED_LIMIT:
            self.flush()

    def _granules(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Split a range into ``(start, stop, whole)``: partial granules and runs of whole ones.

        A last granule that the end of the disk cuts counts as whole.
        """
        granule = self.granule
        limit = -(-self._size // granule) * granule
        first = min(-(-offset // granule) * granule, end)
        last = limit if end == self._size else end - end % granule
        if first >= last:
            yield offset, end, False
            return
        if offset < first:
            yield offset, first, False
        unit = max(self._top.driver.geometry.map_unit, _STRIDE)
        while first < last:
            stop = min(first - first % unit + unit, last)
            yield first, stop, True
            first = stop
        if last < end:
            yield last, end, False

    # Checks and the engine

    def _check_open(self) -> None:
        if self._closed:
            raise ImageError(ErrorKind.IO, "is closed", path=self.path, op="use")

    def _check_range(self, offset: int, length: int) -> None:
        self._check_open()
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ImageError(
                ErrorKind.OUT_OF_BOUNDS,
                f"[{offset}, {offset + length}) reaches outside the disk of {self._size} bytes",
                path=self.path,
                op="access",
            )

    def _check_write(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        if not self._writable:
            raise ImageError(ErrorKind.READ_ONLY, "was opened read-only", path=self.path, op="write")

    def _driver(self) -> WritableDriver:
        return cast("WritableDriver", self._top.driver)

    def _mover(self) -> EngineDisk:
        """The engine's disk, made when the first bytes are to move."""
        if self._engine is None:
            with self._map_lock:
                if self._engine is None:
                    self._engine = self._start_engine()
        return self._engine

    def _start_engine(self) -> EngineDisk:
        from tapfs.kernel.engine import EngineDisk, HostDescriptor  # info needs no engine

        self._check_open()
        if self.needs_password:
            raise password_missing(self.path)
        engine = EngineDisk(self._cache_bytes)
        for depth, layer in enumerate(self._layers):
            geometry = layer.driver.geometry
            encrypted = geometry.cipher != Cipher.NONE
            writable = self._writable and depth == 0
            engine.add_layer(
                virtual_size=geometry.virtual_size,
                granule=geometry.granule,
                map_unit=geometry.map_unit,
                identity=geometry.identity,
                codec=geometry.codec,
                cipher=geometry.cipher,
                key=(self._password or b"")[:_KEY_BYTES].ljust(_KEY_BYTES, b"\0") if encrypted else None,
                writable=writable,
                files=[HostDescriptor(layer.file.data_descriptor, layer.path, layer.file.direct, writable)],
            )
        return engine


def open_image(
    path: str,
    options: OpenOptions,
    *,
    password: bytes | None = None,
    metadata_only: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> Image:
    """Open a chain as an Image. `metadata_only`: an encrypted one needs no password yet.

    With an overlay the Image is writable, and the image at `path` is not touched.
    """
    if options.overlaid:
        from tapfs.overlay import open_overlaid

        layers = open_overlaid(path, options, unlocked=password is not None)
    else:
        layers = open_chain(path, options)
    writable = options.writable or options.overlaid
    image = Image(layers, writable=writable, password=password, cache_bytes=cache_bytes)
    if image.needs_password and not metadata_only:
        image.close()
        raise password_missing(path)
    return image


def open_image_on(layer: Layer, options: OpenOptions, *, password: bytes | None) -> Image:
    """The Image of a top layer that is open already; its parents are opened here."""
    layers = open_parents([layer], options)
    return Image(layers, writable=options.writable, password=password, cache_bytes=DEFAULT_CACHE_BYTES)


def _whole_units(layer: Layer, offset: int, length: int) -> list[Extent]:
    """The map of the units that hold the range (a bounded number of them), for the engine."""
    geometry = layer.driver.geometry
    start = offset - offset % geometry.map_unit
    units = min(-(-(offset + length - start) // geometry.map_unit), max(1, _STRIDE // geometry.map_unit))
    end = min(start + units * geometry.map_unit, geometry.virtual_size)
    rounded = -(-end // geometry.granule) * geometry.granule
    return list(clip(layer.driver.map(start, end - start), start, rounded - start))
