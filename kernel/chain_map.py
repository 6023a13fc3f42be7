"""The map of a chain from the engine: blocks of runs, thousands in one call, as arrays or as plain tuples."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tapfs.errors import ImageError
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import EngineDisk, Outcome
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData

#: Runs that one call brings, and looks at the map that it may take, which bounds how long it lasts.
_BLOCK_RUNS = 8192
_LOOKUPS = 8192

#: struct tapfs_mapped.
_RUN = struct.Struct("=QQQIIBB6x")


class MappedRun(NamedTuple):
    """A run of the disk, all from one layer. `host_offset` holds only if `placed`; `kind` is an extent's."""

    offset: int
    length: int
    host_offset: int
    layer: int
    file: int
    kind: int
    placed: int


class Runs(NamedTuple):
    """So many runs in a `tapfs_mapped[]`, which holds others after the next step of who makes them."""

    array: CData
    length: int

    def tuples(self) -> list[tuple[int, int, int, int, int, int, int]]:
        """The runs in the order of the fields of :class:`MappedRun`."""
        return list(_RUN.iter_unpack(ffi.buffer(self.array, self.length * _RUN.size)))


def runs_of(rows: Sequence[tuple[int, int, int, int, int, int, int]]) -> Runs:
    """Runs that something else than the engine knows."""
    return Runs(ffi.new("tapfs_mapped[]", rows), len(rows))


def map_runs(
    disk: EngineDisk, offset: int, end: int, supply: Callable[[Outcome], None], *, places: bool = False
) -> Iterator[Runs]:
    """The map of ``[offset, end)``, merged. `supply` is called for a map that the engine lacks.

    With `places` zeros that keep a place in the file are placed, and parted from others.
    Raises ImageError where there is no map, after what lies before that place.
    """
    runs = ffi.new("tapfs_mapped[]", _BLOCK_RUNS)
    outcome = ffi.new("tapfs_outcome *")
    count = 0
    step = lib.tapfs_map_places if places else lib.tapfs_map
    while offset < end:
        count = step(disk.handle, offset, end - offset, _LOOKUPS, runs, count, _BLOCK_RUNS, outcome)
        ended = disk.finished(outcome)
        offset += ended.done
        if offset < end and count > 1:
            yield Runs(runs, count - 1)
            runs[0] = runs[count - 1]  # the next call may go on with it
            count = 1
        if offset < end and ended.needs_map:
            try:
                supply(ended)
            except ImageError:
                if count:
                    yield Runs(runs, count)  # what lies before the fault is known
                raise
    if count:
        yield Runs(runs, count)


def map_blocks(
    disk: EngineDisk, offset: int, end: int, supply: Callable[[Outcome], None]
) -> Iterator[list[tuple[int, int, int, int, int, int, int]]]:
    """The map of ``[offset, end)``, merged: lists of tuples in the order of :class:`MappedRun`.

    `supply` is called for a map that the engine lacks. Raises ImageError.
    """
    for runs in map_runs(disk, offset, end, supply):
        yield runs.tuples()
