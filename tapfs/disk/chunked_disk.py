"""A disk in chunks that lie apart in one host file, such as the members of an archive: the driver that maps it."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

from tapfs.driver import Geometry
from tapfs.extent import Extent, Kind, merge
from tapfs.packages.contents import Chunks

#: Chunks begin at multiples of so many bytes of the host file, and end so.
_GRANULE = 512
#: The engine maps so much at once.
_MAP_UNIT = 64 << 20


class ChunkedDisk:
    """A read-only `tapfs.driver.Driver`; what no chunk holds is zeros."""

    def __init__(self, chunks: Chunks, format_name: str) -> None:
        """`format_name` is that of the package which has the chunks."""
        self._chunks = chunks
        self._format_name = format_name
        self._geometry = Geometry(chunks.virtual_size, _GRANULE, _MAP_UNIT)

    @property
    def format_name(self) -> str:
        """See `tapfs.driver.Driver`."""
        return self._format_name

    @property
    def geometry(self) -> Geometry:
        """See `tapfs.driver.Driver`."""
        return self._geometry

    def details(self) -> Mapping[str, object]:
        """See `tapfs.driver.Driver`."""
        return {"chunks": len(self._chunks.places.numbers), "chunk_bytes": self._chunks.chunk_bytes}

    def map(self, offset: int, length: int) -> list[Extent]:
        """See `tapfs.driver.Driver`."""
        return list(merge(self._runs(offset, offset + length)))

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """See `tapfs.driver.Sparse`."""
        chunk_bytes, places = self._chunks.chunk_bytes, self._chunks.places
        index = bisect.bisect_left(places.numbers, offset // chunk_bytes)
        first = places.numbers[index] * chunk_bytes if index < len(places.numbers) else end
        return Extent(offset, min(first, end) - offset, Kind.ZERO) if first > offset else None

    def _runs(self, at: int, end: int) -> list[Extent]:
        chunk_bytes, places = self._chunks.chunk_bytes, self._chunks.places
        size = -(-self._geometry.virtual_size // _GRANULE) * _GRANULE
        found: list[Extent] = []
        index = bisect.bisect_left(places.numbers, at // chunk_bytes)
        at -= at % _GRANULE
        while at < end:
            if index == len(places.numbers):
                found.append(Extent(at, min(-(-end // _GRANULE) * _GRANULE, size) - at, Kind.ZERO))
                break
            start = places.numbers[index] * chunk_bytes
            stop = min(start + places.lengths[index], size)
            if at < start:
                found.append(Extent(at, min(start, -(-end // _GRANULE) * _GRANULE) - at, Kind.ZERO))
                at = start
                continue
            if at < stop:
                found.append(Extent(at, stop - at, Kind.DATA, host_offset=places.offsets[index] + at - start))
                at = stop
            rest = min(start + chunk_bytes, size)
            if at < rest:
                found.append(Extent(at, rest - at, Kind.ZERO))
                at = rest
            index += 1
        return found
