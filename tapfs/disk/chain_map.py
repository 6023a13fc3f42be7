"""The map of a whole chain: for each run of the virtual disk the layer and the place that the bytes come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from tapfs.disk.chain import Layer
from tapfs.driver import Driver, Sparse
from tapfs.extent import Extent, Kind, clip, merge_runs
from tapfs.records import NamedTuple

#: A driver is asked for the map of at most this many bytes at a time, unless there is nothing in them.
STRIDE = 64 << 20

_HAVE_DATA = (Kind.DATA, Kind.COMPRESSED)


class MappedExtent(NamedTuple):
    """A run of the virtual disk, all from one layer; what `tapfs map` prints.

    The fields mean what they mean in ``qemu-img map --output=json``: `depth` is the layer that
    decides (0 is the top), `present` that it is allocated somewhere in the chain, `zero` that
    it reads as zeros, `data` that its bytes are in a host file, `host_offset` where they are
    if they stand there as they are read (neither compressed nor encrypted).
    """

    offset: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    host_path: str | None
    host_offset: int | None

    @property
    def end(self) -> int:
        """The first byte of the virtual disk after this run."""
        return self.offset + self.length


def map_chain(
    layers: Sequence[Layer], offset: int, length: int, locks: Sequence[AbstractContextManager[object]] | None = None
) -> Iterator[MappedExtent]:
    """The map, not merged, of ``[offset, offset + length)``, which lies inside the top layer.

    With `locks`, one for each layer, a layer's is held while its driver is asked, and at no other time. The layers
    below the top do not change, so the map of each stride is that of one moment all the same.
    """
    return _resolve(layers, 0, offset, offset + length, [nullcontext()] * len(layers) if locks is None else locks)


def merge_mapped(runs: Iterable[MappedExtent]) -> Iterator[MappedExtent]:
    """The same map with as few runs as possible."""
    return merge_runs(runs, _joined)


def mapped_extents(
    runs: Iterable[tuple[int, int, int, int, int, int, int]], files: Sequence[Sequence[str]]
) -> list[MappedExtent]:
    """The engine's runs (`tapfs.kernel.chain_map.MappedRun`) as extents; `files` has the paths for each layer."""
    shapes: dict[tuple[int, ...], tuple[int, bool, bool, bool, bool, str | None]] = {}
    extents: list[MappedExtent] = []
    for run in runs:
        shape = run[3:]
        known = shapes.get(shape)
        if known is None:
            depth, file, kind, placed = shape
            data = kind in _HAVE_DATA
            path = files[depth][file] if data or placed else None
            known = (depth, kind != Kind.UNALLOCATED, not data, data, kind == Kind.COMPRESSED, path)
            shapes[shape] = known
        extents.append(MappedExtent(run[0], run[1], *known, run[2] if run[6] else None))
    return extents


class MappedRows:
    """Extents that drivers give, as rows of the engine's array. The layer of a row numbers those that are alike."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[object, ...], int] = {}
        self._likes: list[MappedExtent] = []

    def rows(self, extents: Iterable[MappedExtent]) -> list[tuple[int, int, int, int, int, int, int]]:
        """Each in the order of `tapfs.kernel.chain_map.MappedRun`."""
        return [
            (each.offset, each.length, each.host_offset or 0, self._number(each), 0, 0, each.host_offset is not None)
            for each in extents
        ]

    def extent_of(self, number: int) -> MappedExtent:
        """An extent like those of that number."""
        return self._likes[number]

    def _number(self, extent: MappedExtent) -> int:
        like = extent[2:8]
        number = self._numbers.setdefault(like, len(self._likes))
        if number == len(self._likes):
            self._likes.append(extent)
        return number


def _resolve(
    layers: Sequence[Layer], depth: int, offset: int, end: int, locks: Sequence[AbstractContextManager[object]]
) -> Iterator[MappedExtent]:
    layer = layers[depth]
    inside = min(end, layer.driver.geometry.virtual_size)
    while offset < inside:
        with locks[depth]:
            extents = _next_extents(layer.driver, offset, inside)
        for extent in extents:
            if extent.kind == Kind.UNALLOCATED and depth + 1 < len(layers):
                yield from _resolve(layers, depth + 1, extent.offset, extent.end, locks)
            else:
                yield _mapped(layer, depth, extent)
        offset = extents[-1].end
    if offset < end:  # past the end of a shorter parent: the child's own zeros, whatever lies below
        yield MappedExtent(offset, end - offset, depth - 1, False, True, False, False, None, None)


def _next_extents(driver: Driver, offset: int, end: int) -> list[Extent]:
    """The map from `offset` on, up to `end` or as far as it is known at once: a run of nothing whole, else a stride."""
    nothing = driver.empty_run(offset, end) if isinstance(driver, Sparse) else None
    if nothing is not None:
        return [nothing]
    length = min(STRIDE, end - offset)
    return list(clip(driver.map(offset, length), offset, length))


def _mapped(layer: Layer, depth: int, extent: Extent) -> MappedExtent:
    plain = layer.driver.geometry.cipher is None
    identity = layer.driver.geometry.identity is not None
    data = extent.kind in (Kind.DATA, Kind.COMPRESSED)
    # The last layer has a parent only where that was not opened (`tapfs.disk.inspection`).
    unknown = extent.kind == Kind.UNALLOCATED and layer.driver.geometry.backing is not None
    located = (extent.kind == Kind.DATA and plain) or (extent.kind == Kind.ZERO and identity)
    return MappedExtent(
        extent.offset,
        extent.length,
        depth + 1 if unknown else depth,
        present=extent.kind != Kind.UNALLOCATED,
        zero=not data and not unknown,
        data=data,
        compressed=extent.kind == Kind.COMPRESSED,
        host_path=layer.files[extent.file].path if data or located else None,
        host_offset=extent.host_offset if located else None,
    )


def _joined(left: MappedExtent, right: MappedExtent) -> MappedExtent | None:
    if left.end != right.offset or left[2:8] != right[2:8]:
        return None
    expected = None if left.host_offset is None else left.host_offset + left.length
    return left._replace(length=left.length + right.length) if right.host_offset == expected else None
