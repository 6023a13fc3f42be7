"""The picture of one disk: how many bytes of each kind are where, counted in one pass over its map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk.around_faults import PASSABLE
from tapfs.errors import ImageError
from tapfs.extent import Kind
from tapfs.kernel.chain_map import MappedRun, Runs, runs_of
from tapfs.kernel.map_bins import Counted, MapBins, Plot

if TYPE_CHECKING:
    from tapfs.disk.chain_map import MappedExtent
    from tapfs.disk.image import Image

#: Layers that have a column of their own; those below them share the last one.
LAYERS = 6

#: The columns: data of each layer, compressed data of each layer, then these four.
ZEROS, EMPTY, UNKNOWN, DAMAGED = 2 * LAYERS, 2 * LAYERS + 1, 2 * LAYERS + 2, 2 * LAYERS + 3
COLUMNS = DAMAGED + 1

#: Pieces of the disk that are counted, at most, and the size that they have at least.
_BINS = 16384
_LEAST_WIDTH = 512

#: After so many faults a fault costs the whole map unit that it is in, or an image of nothing else would take hours.
_MOST_FAULTS = 64

#: Cells of the plot of disk against file.
_ACROSS, _DOWN = 160, 80


class Run(NamedTuple):
    """A run of the disk, in bytes. `host_offset` is in the file of its layer, None: not as it is read."""

    offset: int
    length: int
    column: int
    host_offset: int | None


class Picture(NamedTuple):
    """A disk of `size` bytes in pieces of `width`: for each of them the bytes in each column.

    `runs` is the whole map if it has few runs. `counts` has the runs of each column. `fragments` counts the pieces of
    files that are read on without a jump, by the power of two at or below their length. `plot` and `cells` are a grid
    of disk against image file, `places` the offsets on the disk of the places in the file that were asked for.
    """

    size: int
    width: int
    bins: list[list[int]]
    totals: list[int]
    counts: list[int]
    runs: list[Run] | None
    plot: Plot
    cells: list[int]
    fragments: list[int]
    places: list[int | None]

    @property
    def data_bytes(self) -> int:
        """Bytes that are in a file of the chain, compressed or not."""
        return sum(self.totals[:ZEROS])

    @property
    def packed_bytes(self) -> int:
        """Those that are compressed."""
        return sum(self.totals[LAYERS:ZEROS])


def depth_of(column: int) -> int | None:
    """The layer whose data a column has, None for the columns of no layer."""
    return column % LAYERS if column < ZEROS else None


def picture_of(image: Image, places: Sequence[int] = (), *, most_runs: int = 0) -> Picture:
    """Count the map of a disk. `places`: offsets in the image file, ascending, to be found on the disk.

    Up to `most_runs` runs are kept as they are. Time is linear in the runs of the map, memory bounded.
    Raises ImageError.
    """
    width = _LEAST_WIDTH
    while width * _BINS < image.size:
        width *= 2
    image_file = image.layers[0].file
    plot = Plot(_ACROSS, _DOWN, max(1, -(-image.size // _ACROSS)), max(1, -(-image_file.size() // _DOWN)))
    like, blocks = _around_faults(image)
    counted = MapBins(
        lambda run: _counted(run, like(run), image_file.path),
        columns=COLUMNS,
        width=width,
        count=-(-image.size // width),
        plot=plot,
        places=places,
    )
    kept: list[Run] | None = []
    columns: dict[tuple[int, ...], int] = {}
    for runs in blocks:
        counted.add(runs)
        if kept is None or len(kept) + runs.length > most_runs:
            kept = None
            continue
        for run in runs.tuples():
            if run[3:] not in columns:
                columns[run[3:]] = _column(MappedRun(*run), like(MappedRun(*run)))
            kept.append(Run(run[0], run[1], columns[run[3:]], run[2] if run[6] else None))
    counted.finish()
    rows = counted.rows()
    return Picture(
        size=image.size,
        width=width,
        bins=rows,
        totals=[sum(column) for column in zip(*rows, strict=True)] or [0] * COLUMNS,
        counts=counted.runs(),
        runs=kept,
        plot=plot,
        cells=counted.plot(),
        fragments=counted.fragments(),
        places=counted.places(),
    )


def column_bytes(image: Image, offset: int, length: int, count: int) -> list[list[int]]:
    """Of `count` equal pieces of a range the bytes in each column. Raises ImageError."""
    like, blocks = image.disk_map.runs(offset, offset + length)
    counted = MapBins(
        lambda run: _counted(run, like(run), ""),
        columns=COLUMNS,
        width=max(1, -(-length // count)),
        count=count,
        start=offset,
    )
    for runs in blocks:
        counted.add(runs)
    return counted.rows()


def _around_faults(image: Image) -> tuple[Callable[[MappedRun], MappedExtent], Iterator[Runs]]:
    """The map of a disk, with runs of the kind BROKEN where it has none."""
    like, blocks = image.disk_map.runs(0, image.size)
    return like, _going_on(image, blocks) if image.engine_chain.engine_maps else blocks


def _going_on(image: Image, blocks: Iterator[Runs]) -> Iterator[Runs]:
    geometries = [layer.driver.geometry for layer in image.layers]
    piece = max(max(geometry.granule, geometry.packed_unit) for geometry in geometries)
    unit = max(piece, *(geometry.map_unit for geometry in geometries))
    at = faults = 0
    while at < image.size:
        try:
            for runs in blocks:
                yield runs
                last = MappedRun(*Runs(runs.array + (runs.length - 1), 1).tuples()[0])
                at = last.offset + last.length
        except ImageError as error:
            if error.kind not in PASSABLE:
                raise
            faults += 1
            step = piece if faults < _MOST_FAULTS else unit
            end = min(image.size, (at // step + 1) * step)
            yield runs_of([(at, end - at, 0, 0, 0, Kind.BROKEN, 0)])
            at = end
            _, blocks = image.disk_map.runs(at, image.size)


def _column(run: MappedRun, extent: MappedExtent) -> int:
    if run.kind == Kind.BROKEN:
        return DAMAGED
    if extent.data:
        return min(extent.depth, LAYERS - 1) + (LAYERS if extent.compressed else 0)
    if not extent.zero:
        return UNKNOWN
    return ZEROS if extent.present else EMPTY


def _counted(run: MappedRun, extent: MappedExtent, image_file: str) -> Counted:
    in_image = extent.depth == 0 and extent.host_path == image_file
    return Counted(_column(run, extent), data=extent.data, plotted=extent.data and in_image)
