"""The map of a chain from the engine: blocks of runs as plain tuples, thousands in one call."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import EngineDisk, Outcome

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


def map_blocks(
    disk: EngineDisk, offset: int, end: int, supply: Callable[[Outcome], None]
) -> Iterator[list[tuple[int, int, int, int, int, int, int]]]:
    """The map of ``[offset, end)``: lists of tuples in the order of :class:`MappedRun`, merged inside a list.

    `supply` is called for a map that the engine lacks. Raises ImageError.
    """
    runs = ffi.new("tapfs_mapped[]", _BLOCK_RUNS)
    outcome = ffi.new("tapfs_outcome *")
    while offset < end:
        count = lib.tapfs_map(disk.handle, offset, end - offset, _LOOKUPS, runs, _BLOCK_RUNS, outcome)
        ended = disk.finished(outcome)
        if count:
            yield list(_RUN.iter_unpack(ffi.buffer(runs, count * _RUN.size)))
        offset += ended.done
        if offset < end and ended.needs_map:
            supply(ended)
