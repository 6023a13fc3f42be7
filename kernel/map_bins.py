"""The map of a chain as numbers: bytes of each kind in each piece of the disk, fragments, and disk against file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.chain_map import MappedRun, Runs

#: A place that is nowhere on the disk.
_NOWHERE = (1 << 64) - 1


class Counted(NamedTuple):
    """How runs of one kind are counted. `plotted`: they lie in the file that is plotted."""

    column: int
    data: bool
    plotted: bool


class Plot(NamedTuple):
    """A grid of disk (across) against file (down). `x` and `y` are the bytes of a cell."""

    across: int
    down: int
    x: int
    y: int


class MapBins:
    """Counts runs into `count` bins of `width` bytes from `start` on. `counted` is asked once for each kind of run.

    `places` are offsets in the plotted file, ascending, whose place on the disk is looked for. Time is linear in
    runs, bins and cells, memory in bins and cells.
    """

    def __init__(
        self,
        counted: Callable[[MappedRun], Counted],
        *,
        columns: int,
        width: int,
        count: int,
        start: int = 0,
        plot: Plot | None = None,
        places: Sequence[int] = (),
    ) -> None:
        self._counted = counted
        self._columns = columns
        self._count = count
        self._places = places
        self._plot = Plot(0, 0, 1, 1) if plot is None else plot
        self._cells = self._plot.across * self._plot.down
        self._bytes = ffi.new("uint64_t[]", count * columns)
        self._runs = ffi.new("uint64_t[]", columns)
        self._grid = ffi.new("uint64_t[]", self._cells)
        self._wanted = ffi.new("uint64_t[]", list(places))
        self._found = ffi.new("uint64_t[]", [_NOWHERE] * len(places))
        self._into = ffi.new("tapfs_map_bins *")
        into = self._into
        into.start, into.width, into.count, into.columns = start, width, count, columns
        into.bytes, into.runs, into.plot = self._bytes, self._runs, self._grid
        into.plot_across, into.plot_down, into.plot_x, into.plot_y = self._plot
        into.places, into.found, into.place_count = self._wanted, self._found, len(places)
        self._shapes: list[tuple[int, ...]] = []
        self._array = ffi.new("tapfs_bin_shape[]", 0)

    def add(self, runs: Runs) -> None:
        """Count these runs, which follow those before."""
        done = 0
        while done < runs.length:
            left = runs.length - done
            part = lib.tapfs_map_count(self._into, runs.array + done, left, self._array, len(self._shapes))
            done += part
            if part < left:
                self._learn(MappedRun(*Runs(runs.array + done, 1).tuples()[0]))

    def finish(self) -> None:
        """There are no more runs."""
        lib.tapfs_map_count_end(self._into)

    def rows(self) -> list[list[int]]:
        """For each bin the bytes in each column."""
        flat = ffi.unpack(self._bytes, self._count * self._columns)
        return [flat[at : at + self._columns] for at in range(0, len(flat), self._columns)]

    def runs(self) -> list[int]:
        """For each column how many runs it had."""
        return ffi.unpack(self._runs, self._columns)

    def plot(self) -> list[int]:
        """The bytes in each cell of the plot, row by row."""
        return ffi.unpack(self._grid, self._cells) if self._cells else []

    def fragments(self) -> list[int]:
        """How many pieces of files lie in one, by the power of two at or below their length."""
        return ffi.unpack(self._into.fragments, 64)

    def places(self) -> list[int | None]:
        """For each of the places that were asked for its offset on the disk, None: no data of the disk is there."""
        found = ffi.unpack(self._found, len(self._places)) if self._places else []
        return [None if offset == _NOWHERE else offset for offset in found]

    def _learn(self, run: MappedRun) -> None:
        counted = self._counted(run)
        if not 0 <= counted.column < self._columns:
            raise ValueError("there is no such column")
        self._shapes.append((run.layer, run.file, run.kind, run.placed, counted.data, counted.plotted, counted.column))
        self._array = ffi.new("tapfs_bin_shape[]", self._shapes)
