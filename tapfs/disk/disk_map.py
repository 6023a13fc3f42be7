"""The map of one open disk over its whole chain: as extents, as lines of text, as ranges that hold data.

The engine makes it where it knows every layer's tables, the drivers otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from tapfs.disk.chain_map import MappedExtent, MappedRows, map_chain, mapped_extents, merge_mapped
from tapfs.driver import Sparse
from tapfs.extent import Range

if TYPE_CHECKING:
    from tapfs.disk.engine_chain import EngineChain
    from tapfs.kernel.chain_map import MappedRun, Runs
    from tapfs.kernel.engine import Outcome
    from tapfs.kernel.map_lines import Words
    from tapfs.kernel.ranges import Ranges

#: Extents that drivers give in one list.
_BLOCK_EXTENTS = 1024

#: Looks at the map in one step of a search.
_SEARCH_LOOKUPS = 64


class DiskMap:
    """The map of a disk that is open; every range lies inside the disk."""

    def __init__(self, chain: EngineChain) -> None:
        self._chain = chain

    def blocks(self, offset: int, end: int) -> Iterator[list[MappedExtent]]:
        """The map of the whole chain, merged, in lists. A layer's lock is held for a piece at a time only."""
        if self._chain.engine_maps:
            from tapfs.kernel.chain_map import map_blocks

            for runs in map_blocks(self._chain.engine, offset, end, self._chain.supply_map):
                yield mapped_extents(runs, self._paths)
            return
        extents = merge_mapped(map_chain(self._chain.layers, offset, end - offset, self._chain.map_locks))
        while block := list(islice(extents, _BLOCK_EXTENTS)):
            yield block

    def lines(
        self, offset: int, end: int, words: Callable[[MappedExtent], Words | None], *, json: bool
    ) -> Iterator[str]:
        """The same map as text, with the words that `words` has for each kind of extent, or none.

        As JSON zeros that have a place say where.
        """
        from tapfs.kernel.map_lines import MapLines

        like, blocks = self._placed_runs(offset, end) if json else self.runs(offset, end)
        lines = MapLines(lambda run: words(like(run)), json=json)
        for runs in blocks:
            yield from lines.of(runs)

    def runs(self, offset: int, end: int) -> tuple[Callable[[MappedRun], MappedExtent], Iterator[Runs]]:
        """The same map as arrays, and what tells of a run of them an extent that is like it."""
        if self._chain.engine_maps:
            return self._engine_runs(offset, end, places=False)
        rows = MappedRows()
        return lambda run: rows.extent_of(run.layer), self._rows(rows, self.blocks(offset, end))

    def _engine_runs(
        self, offset: int, end: int, *, places: bool
    ) -> tuple[Callable[[MappedRun], MappedExtent], Iterator[Runs]]:
        from tapfs.kernel.chain_map import map_runs

        paths = self._paths
        runs = map_runs(self._chain.engine, offset, end, self._chain.supply_map, places=places)
        return lambda run: mapped_extents([run], paths)[0], runs

    def _placed_runs(self, offset: int, end: int) -> tuple[Callable[[MappedRun], MappedExtent], Iterator[Runs]]:
        """The same, with the places of zeros."""
        if self._chain.engine_maps and not self._chain.top.file.writable:
            return self._engine_runs(offset, end, places=True)
        from tapfs.disk.placed_zeros import PlacedZeros

        zeros = PlacedZeros(self._chain.layers, self._chain.map_locks)
        rows = MappedRows()
        placed = (list(zeros.in_extents(block)) for block in self.blocks(offset, end))
        return lambda run: rows.extent_of(run.layer), self._rows(rows, placed)

    def _rows(self, rows: MappedRows, blocks: Iterable[list[MappedExtent]]) -> Iterator[Runs]:
        from tapfs.kernel.chain_map import runs_of

        for block in blocks:
            yield runs_of(rows.rows(block))

    @property
    def _paths(self) -> list[list[str]]:
        return [[file.path for file in layer.files] for layer in self._chain.layers]

    def data_ranges(self, offset: int, end: int, *, gap: int = 0, align: int = 1, most_bytes: int) -> Ranges:
        """The first ranges in ``[offset, end)`` that are not known to be zeros, of at most `most_bytes` in all.

        It costs a bounded amount of work, so there may be none before `until`; the next call goes on from there. Gaps
        of up to `gap` bytes join two, and each is widened to multiples of `align`, of which `most_bytes` is one.
        """
        return self._data(offset, end, align, gap=gap, most_bytes=most_bytes)

    def look(self, offset: int) -> tuple[bool, int]:
        """Whether no layer's map can be true at a byte of the disk, and how far that is so at least."""
        return self._chain.look(offset)

    def search(self, offset: int, end: int, *, data: bool) -> tuple[int, bool]:
        """Look from `offset` on for data, or for what is known to read as zeros, with a small amount of work.

        Where it is and True, or where to look next (`end`: it is not there) and False.
        """
        bounds = {"most_bytes": 1} if data else {}
        found = self._data(offset, end, 1, most=1, lookups=_SEARCH_LOOKUPS, **bounds)
        first = next(iter(found), Range(found.until, 0))
        if data:
            return first.offset, first.length > 0
        # A range that begins here is data as far as it goes; that it ends there is known only if the walk went on.
        place = first.end if first.offset == offset else offset
        return place, place < found.until

    def _data(self, offset: int, end: int, align: int, **bounds: int) -> Ranges:
        from tapfs.kernel.ranges import data_ranges

        found, outcome = data_ranges(self._chain.engine, offset, end, align=align, **bounds)
        if outcome.needs_map:
            until = self._empty_until(outcome)
            if until < end:
                until -= until % align
            if until > found.until:
                found.until = until
            else:
                self._chain.supply_map(outcome)
        return found

    def _empty_until(self, outcome: Outcome) -> int:
        """How far there is no data from where the walk lacks a map, if a driver says so without making one; else 0."""
        driver = self._chain.layers[outcome.layer].driver
        if outcome.layer + 1 < len(self._chain.layers) or not isinstance(driver, Sparse):
            return 0
        with self._chain.map_locks[outcome.layer]:
            nothing = driver.empty_run(outcome.offset, outcome.offset + outcome.length)
        return 0 if nothing is None else nothing.end
