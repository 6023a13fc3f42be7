"""A chain of drivers and the engine disk that serves it: the engine asks for maps, drivers answer.

The engine reads until it lacks a map of some layer. Then that layer's driver is asked for the map, the map is
installed in the engine, and the read goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tapfs.disk.around_end import around_end
from tapfs.disk.around_faults import PASSABLE, unit_around_faults, unit_with_faults
from tapfs.disk.around_patch import around_patch
from tapfs.disk.chain import Layer, is_encrypted
from tapfs.disk.chain_map import STRIDE
from tapfs.disk.password import password_missing, password_of
from tapfs.driver import Begun, Encrypted, wipe
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, clip
from tapfs.geometry import Geometry
from tapfs.host.presence import Presence
from tapfs.records import replace
from tapfs.tables import Guarded, Tabled

if TYPE_CHECKING:
    from tapfs.kernel.engine import Buffer, EngineDisk, Outcome, Statistics
    from tapfs.kernel.ranges import Ranges

#: The places of at most this many tables of a layer are held, 8 bytes each; the driver maps a layer with more.
_MAX_TABLES = 4 << 20


class EngineChain:
    """The layers of a disk, top first, and its engine disk. `close` must come last.

    Each layer has a lock (`map_locks`). It covers the layer's driver and every change of the engine's map cache for
    that layer, so that a map and its installation are one step. The engine moves no data while one is held, and no
    thread holds two: a driver that waits for its host stops who needs the map of its layer, and nobody else.

    Layers below the top do not change, with one exception (`tapfs.disk.writable_base`): layer 1 may be the top layer of
    another chain, `below`, which writes it. Then both have one driver and one map lock for it. `below` tells of each
    change of its map, and waits for the requests of this chain, too, before it uses again what it has freed.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        writable: bool,
        password: bytes | None,
        cache_bytes: int,
        below: EngineChain | None = None,
    ) -> None:
        """Take over an open chain, of which at most the top layer is writable."""
        self.layers = tuple(layers)
        self.writable = writable
        own = [threading.Lock() for _ in self.layers]
        if below is not None:
            own[1] = below.map_lock
        self.map_locks = tuple(own)
        self._below = below
        #: The chains whose layer 1 this one writes.
        self._above: tuple[EngineChain, ...] = ()
        if below is not None:
            below.lies_below(self)
        self.closed = False
        self._life_lock = threading.Lock()
        self._needs_password = password is None and is_encrypted(layers)
        #: Kept until the engine has the keys.
        self._password = password
        self._cache_bytes = cache_bytes
        self._engine: EngineDisk | None = None
        #: The layers whose tables the engine reads itself.
        self._tabled: set[int] = set()
        #: The `Guarded.guard_changes` of the places that the engine knows.
        self._guard_changes = -1

    @property
    def top(self) -> Layer:
        """The layer that names the disk and takes its writes."""
        return self.layers[0]

    @property
    def map_lock(self) -> threading.Lock:
        """The lock of the top layer, the only one that changes: commits and flushes take it."""
        return self.map_locks[0]

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""
        return self.top.driver.geometry.virtual_size

    @property
    def needs_password(self) -> bool:
        """Whether a layer is encrypted and no password was given."""
        return self._needs_password

    def check_open(self) -> None:
        """Raise ImageError if the chain was closed."""
        if self.closed:
            raise ImageError(ErrorKind.IO, "is closed", path=self.top.path, op="use")

    @property
    def started(self) -> bool:
        """Whether the engine has been asked for anything, so whether bytes can have changed."""
        return self._engine is not None

    @property
    def engine(self) -> EngineDisk:
        """The engine's disk, made when the first bytes are to move."""
        self.check_open()
        if self._engine is None:
            with self._life_lock:
                self.check_open()
                if self._engine is None:
                    self._engine = self._start_engine()
                    # Only now: who gives up blocks of a file waits here for the lock that is held.
                    for presence in self._presences():
                        presence.quiesce.append(self.quiesce_if_open)
        return self._engine

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view from the disk at `offset`; the range lies inside the disk."""
        engine = self.engine
        while view:
            outcome = engine.read_into(view, offset)
            view = view[outcome.done :]
            offset += outcome.done
            if view:
                self.supply_map(outcome)

    def read_ranges(self, ranges: Ranges, buffer: Buffer) -> None:
        """Read the ranges into the buffer, one behind the other; zeros past the end of the disk."""
        from tapfs.kernel.ranges import read_ranges

        engine, done = self.engine, 0
        while done < ranges.packed:
            outcome = read_ranges(engine, ranges, buffer, done)
            done = outcome.done
            if done < ranges.packed:
                self.supply_map(outcome)

    def supply_map(self, outcome: Outcome) -> None:
        """Give the engine what a request lacked: map units, or bytes of a host file that are not here."""
        engine = self.engine
        layer = self.layers[outcome.layer]
        if outcome.needs_fetch:
            layer.files[outcome.file].require_present(outcome.offset, outcome.length)
            return
        with self.map_locks[outcome.layer]:
            try:
                extents = _whole_units(layer, outcome.offset, outcome.length)
            except ImageError as error:
                if error.kind not in PASSABLE:
                    raise
                extents = unit_around_faults(layer.driver, outcome.offset)
            extents = around_end(layer, around_patch(layer, extents, outcome.offset), outcome.offset)
            engine.install(outcome.layer, extents)

    def look(self, offset: int) -> tuple[bool, int]:
        """Whether the map has what cannot be true at byte `offset` of the disk, and how far that is so at least."""
        end = self.size
        for depth, layer in enumerate(self.layers):
            size = layer.driver.geometry.virtual_size
            if offset >= size:
                break
            with self.map_locks[depth]:
                extents = around_end(layer, around_patch(layer, unit_with_faults(layer.driver, offset), -1), -1)
            here = next(extent for extent in extents if extent.offset <= offset < extent.end)
            end = min(end, here.end, size)
            if here.kind is not Kind.UNALLOCATED:
                return here.kind is Kind.BROKEN, end
        return False, end

    @property
    def engine_maps(self) -> bool:
        """Whether the engine maps every layer by itself, but for what is not flushed."""
        # What a parent decides that was not opened (`tapfs.disk.inspection`) is zeros to the engine.
        if self.layers[-1].driver.geometry.backing is not None or self.needs_password:
            return False
        _ = self.engine
        return all(depth in self._tabled or _geometry(layer).identity for depth, layer in enumerate(self.layers))

    def statistics(self) -> Statistics:
        """The engine's counters, for any thread: of a chain that is being closed, too, or an ImageError."""
        engine = self.engine
        with self._life_lock:
            self.check_open()
            return engine.statistics()

    def lies_below(self, above: EngineChain, *, no_more: bool = False) -> None:
        """From now on, or no more, this chain writes layer 1 of the chain `above`."""
        with self.map_lock:
            others = tuple(each for each in self._above if each is not above)
            self._above = others if no_more else (*others, above)

    def changed(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The map of these ranges of the top layer has changed, the map lock held: tell who reads them from above."""
        for above in self._above:
            above.forget_below(ranges)

    def forget_below(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The map of layer 1 has changed in these ranges, the layer's map lock held."""
        with self._life_lock:
            if self._engine is not None and not self.closed:
                for offset, length in ranges:
                    self._engine.forget(1, offset, length)

    def quiesce(self) -> None:
        """Wait until every request that runs now has ended, those of the chains above, too."""
        self.engine.quiesce()
        for above in self._above:
            above.quiesce_if_open()

    def quiesce_if_open(self) -> None:
        """Wait until no request runs that has begun before."""
        with self._life_lock:
            if self._engine is not None and not self.closed:
                self._engine.quiesce()

    def close(self) -> None:
        """Let go of the engine's disk and the files. Closing twice is allowed."""
        with self._life_lock:
            if self.closed:
                return
            self.closed = True
        if self._below is not None:
            self._below.lies_below(self, no_more=True)
        if self._engine is not None:
            for presence in self._presences():
                presence.quiesce.remove(self.quiesce_if_open)
            self._engine.quiesce()
            with self._life_lock:
                self._engine.close()
        for layer in self.layers:
            layer.close()

    def _start_engine(self) -> EngineDisk:
        from tapfs.kernel.engine import EngineDisk, HostDescriptor  # opening and mapping need none

        if self.needs_password:
            raise password_missing(self.top.path)
        engine = EngineDisk(self._cache_bytes)
        for depth, layer in enumerate(self.layers):
            writable = self.writable and depth == 0
            with _key(self.layers[depth:], self._password) as key:
                engine.add_layer(
                    _geometry(layer),
                    key=key,
                    writable=writable,
                    files=[
                        HostDescriptor(
                            file.data_descriptor,
                            file.path,
                            file.direct,
                            writable and file.writable,
                            file.presence,
                            file.window,
                        )
                        for file in layer.files
                    ],
                )
            # What another chain writes is known to its driver first, and to its tables on the host only later.
            shared = depth == 1 and self._below is not None
            if not shared and _describe_tables(engine, depth, layer):
                self._tabled.add(depth)
        self._password = None
        if self.writable and isinstance(self.top.driver, Begun):
            engine.seal(sealed=True)
        self._guard(engine)
        # The engine knows a file from now on only. What was lost since the drivers saw it is found here.
        self._require_whole()
        return engine

    def _presences(self) -> list[Presence]:
        """Of those files of the chain that come block by block."""
        return [file.presence for layer in self.layers for file in layer.files if file.presence is not None]

    def _require_whole(self) -> None:
        """Raise ImageError if a file of the chain has become shorter than it was."""
        for layer in self.layers:
            for file in layer.files:
                file.require_whole()

    def guard_metadata(self) -> None:
        """Have the engine know where a plan is about to write metadata, or has given it up, the map lock held."""
        self._guard(self.engine)

    def _guard(self, engine: EngineDisk) -> None:
        driver = self.top.driver
        if not self.writable or not isinstance(driver, Guarded) or driver.guard_changes == self._guard_changes:
            return
        from tapfs.kernel.tables import guard

        changes = driver.guard_changes
        guard(engine, driver.guarded_places())
        self._guard_changes = changes  # where it has failed the next one has to do it

    def tables_flushed(self, touched: Iterable[tuple[int, int]]) -> None:
        """Have the engine read the tables of these map units of the top layer again, as far as they are durable.

        Each pair is ``(first, stop)``. The map lock is held from before the driver's `flushed` to here, so that no
        commit comes between.
        """
        from tapfs.kernel.tables import set_places

        driver = self.top.driver
        if not isinstance(driver, Tabled):
            return
        if 0 not in self._tabled:
            return
        units = -(-self.size // driver.geometry.map_unit)
        for first, stop in touched:
            places = driver.table_places(first, min(stop, units) - first)
            set_places(self.engine, 0, first, places, driver.host_size)


def _geometry(layer: Layer) -> Geometry:
    """What the engine is to know of a layer.

    Holes that are known elsewhere only have to be mapped by the driver, and so has a file that was cut.
    """
    geometry = layer.driver.geometry
    if geometry.identity is None:
        return geometry
    file = layer.files[geometry.identity.file]
    cut = layer.files.cut and file.size() < geometry.identity.host_offset + geometry.virtual_size
    if not (cut or file.tells_holes):
        return geometry
    return replace(geometry, identity=None)


@contextmanager
def _key(layers: Sequence[Layer], password: bytes | None) -> Generator[bytearray | None]:
    """The key of the first layer, None for a plain one; wiped in the end. Raises ImageError(denied)."""
    layer = layers[0]
    driver = layer.driver
    if driver.geometry.cipher is None or not isinstance(driver, Encrypted):
        yield None
        return
    from tapfs.kernel.cryptography import EngineCryptography  # few images are encrypted

    chosen = password_of(password, [each.path for each in layers])
    key = driver.unlock(chosen, EngineCryptography(layer.path))
    try:
        yield key
    finally:
        wipe(key)


def _describe_tables(engine: EngineDisk, depth: int, layer: Layer) -> bool:
    """Have the engine read the layer's tables itself, where they are plain and not too many; whether it does."""
    driver = layer.driver
    layout = driver.table_layout() if isinstance(driver, Tabled) else None
    units = -(-driver.geometry.virtual_size // driver.geometry.map_unit)
    # Tables under a patch are not on the host as they are, and the engine knows of no data over a file's end.
    if (
        not isinstance(driver, Tabled)
        or layout is None
        or units > _MAX_TABLES
        or layer.files.patched
        or layer.files.cut
    ):
        return False
    from tapfs.kernel.tables import set_tables

    set_tables(engine, depth, layout, driver.table_places(0, units))
    return True


def _whole_units(layer: Layer, offset: int, length: int) -> list[Extent]:
    """The map of the units that hold the range (a bounded number of them), for the engine."""
    geometry = layer.driver.geometry
    start = offset - offset % geometry.map_unit
    units = min(-(-(offset + length - start) // geometry.map_unit), max(1, STRIDE // geometry.map_unit))
    end = min(start + units * geometry.map_unit, geometry.virtual_size)
    rounded = -(-end // geometry.granule) * geometry.granule
    return list(clip(layer.driver.map(start, end - start), start, rounded - start))
