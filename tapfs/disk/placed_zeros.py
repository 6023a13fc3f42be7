"""The places of zeros that have one, in the map of a chain: what `tapfs map --json` prints of them, as qemu-img does.

Maps leave these places out. The engine finds them in the tables of images that are only read. Elsewhere the drivers
are asked for them, and only about the runs of zeros of layers whose format has such entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tapfs.disk.chain_map import STRIDE, MappedExtent
from tapfs.driver import Sparse, ZeroPlace, ZeroPlacing
from tapfs.extent import Kind, merge_runs

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer


class PlacedZeros:
    """The zeros of one chain; with `locks` as for `tapfs.disk.chain_map.map_chain`."""

    def __init__(self, layers: Sequence[Layer], locks: Sequence[AbstractContextManager[object]]) -> None:
        self._layers = layers
        self._locks = locks
        drivers = [layer.driver for layer in layers]
        #: The kinds that may have a place, of layers that have any. Under a cipher a place is none of what is read.
        self._kinds = {
            depth: driver.placed_kinds
            for depth, driver in enumerate(drivers)
            if driver.geometry.cipher is None and isinstance(driver, ZeroPlacing) and driver.placed_kinds
        }

    def in_extents(self, extents: Iterable[MappedExtent]) -> Iterator[MappedExtent]:
        """The map of the chain, runs of zeros parted by their places."""
        for extent in extents:
            kind = Kind.ZERO if extent.present else Kind.UNALLOCATED
            if not extent.zero or extent.host_offset is not None or kind not in self._kinds.get(extent.depth, ()):
                yield extent
                continue
            files = self._layers[extent.depth].files
            for each in self._places(extent.depth, extent.offset, extent.length):
                path = None if each.host_offset is None else files[each.file].path
                yield extent._replace(
                    offset=each.offset, length=each.length, host_path=path, host_offset=each.host_offset
                )

    def _places(self, depth: int, offset: int, length: int) -> Iterator[ZeroPlace]:
        """The places of a run of zeros that the layer decides; neighbours joined."""
        inside = min(offset + length, self._layers[depth].driver.geometry.virtual_size)
        yield from merge_runs(self._found(depth, offset, inside), _joined)
        if inside < offset + length:  # past the end of a shorter parent
            start = max(offset, inside)
            yield ZeroPlace(start, offset + length - start)

    def _found(self, depth: int, offset: int, end: int) -> Iterator[ZeroPlace]:
        driver = self._layers[depth].driver
        while offset < end and isinstance(driver, ZeroPlacing):
            with self._locks[depth]:
                nothing = driver.empty_run(offset, end) if isinstance(driver, Sparse) else None
                if nothing is None:
                    found = driver.zero_places(offset, min(STRIDE, end - offset))
                else:
                    found = [ZeroPlace(nothing.offset, nothing.length)]
            yield from found
            offset = found[-1].end


def _joined(left: ZeroPlace, right: ZeroPlace) -> ZeroPlace | None:
    expected = None if left.host_offset is None else left.host_offset + left.length
    alike = left.end == right.offset and left.file == right.file and right.host_offset == expected
    return left._replace(length=left.length + right.length) if alike else None
