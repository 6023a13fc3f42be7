"""A new image whose files take metadata only, so that their lengths can be known before anything is written.

The driver finds places as for any write, and its plans are executed. The guest's bytes go nowhere: a file gets the
length that it would have with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

from tapfs.disk.image import Image
from tapfs.disk.stream_target import StreamTarget, stream_of
from tapfs.driver import Begun, Operation, Placement, WritableDriver
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind, Range
from tapfs.plan import Allocate, Plan, Step, Write

if TYPE_CHECKING:
    from tapfs.disk.engine_chain import EngineChain
    from tapfs.host.file import LocalFile
    from tapfs.kernel.engine import Buffer
    from tapfs.kernel.writes import Segments

#: Metadata is executed when it has grown to this many bytes, as in every write path.
_UNFLUSHED_LIMIT = 32 << 20
#: Zeros of more bytes than this are no metadata: they fill a file (`preallocation=full`).
_MANY_ZEROS = 1 << 20
#: A whole disk is placed by writes of up to so many map units.
_UNITS_AT_ONCE = 64


class PlacedImage(Image):
    """A new, empty image over files in memory that is written once, ascending, by one thread.

    What was placed must not be read. `whole_file` is None, so that nobody shares blocks with its file.
    """

    @cached_property
    def _places(self) -> PlacedWrites:
        return PlacedWrites(self._chain)

    def file_bytes(self) -> int:
        """The length of all files of the image, as they are now."""
        return sum(file.size() for file in self.layers[0].files)

    def place_all(self, window_bytes: int, *, packed: bool) -> None:
        """Place every byte of the disk, by writes of `window_bytes`; `packed`: as units that do not shrink."""
        if packed:
            self._places.stream_all()
        else:
            self._places.write_all(window_bytes)

    def write_segments(self, segments: Segments) -> None:
        """See :meth:`Image.write_segments`."""
        if segments.count:
            self._places.write(segments.ranges())

    def write_zeroes(self, offset: int, length: int, *, hide: bool = False) -> None:
        """See :meth:`Image.write_zeroes`; what starts as noise has its full length, so there is nothing to place."""
        del hide
        self._places.zero(Range(offset, length))

    def flush(self) -> None:
        """See :meth:`Image.flush`."""
        self._places.flush()

    def end_writing(self) -> None:
        """See :meth:`Image.end_writing`."""
        self._places.end()

    def whole_file(self) -> int | None:
        """No file has the bytes of this disk."""
        return None

    def stream_writer(self) -> StreamTarget:
        """See :meth:`Image.stream_writer`."""
        return self._places.stream()


class PlacedWrites:
    """Writes of ascending ranges to the top layer of a chain: they are placed, and not written."""

    def __init__(self, chain: EngineChain) -> None:
        self._chain = chain
        self._driver = cast("WritableDriver", chain.top.driver)
        self._geometry = self._driver.geometry
        self._begun = False

    def write(self, ranges: Sequence[Range]) -> None:
        """Place all of the ranges."""
        self._begin()
        gaps = list(self._gaps(ranges))
        if gaps:
            self._place(gaps, Operation.WRITE, ranges)
        self._bound()

    def zero(self, wanted: Range) -> None:
        """Have whole granules read as zeros, where a parent would show."""
        self._begin()
        if self._geometry.identity is None:
            self._place([wanted], Operation.ZERO, [])
            self._bound()

    def write_all(self, window_bytes: int) -> None:
        """Place the whole disk, by writes of so many bytes, or of more where map units are large.

        Places depend on the length of writes only where tables move often, which small map units do.
        """
        size = self._geometry.virtual_size
        stride = max(window_bytes, _UNITS_AT_ONCE * self._geometry.map_unit)
        if self._geometry.identity is None:
            for start in range(0, size, stride):
                self.write([Range(start, min(stride, size - start))])
        self.end()

    def stream_all(self) -> None:
        """Append every unit of the disk as it is."""
        stream = self.stream()
        unit = bytes(stream.granule)
        for offset in range(0, self._geometry.virtual_size, stream.granule):
            stream.write_plain(offset, unit)
        stream.finish()

    def flush(self) -> None:
        """Execute what the driver has to write."""
        executed = self._driver.flush()
        self.execute(executed)
        self._driver.flushed(executed)

    def end(self) -> None:
        """Flush, and end writing as the format has it."""
        self.flush()
        if self._begun and isinstance(self._driver, Begun):
            self.execute(self._driver.end())
        self._begun = False

    def stream(self) -> StreamTarget:
        """The stream that fills the image, of which only metadata is written."""
        return stream_of(self, self._driver, self._chain.top.path)

    def write_host(self, file: int, host_offset: int, buffer: Buffer, *, guest_offset: int | None = None) -> None:
        """Let a payload go, and have the file as long as with it."""
        del guest_offset
        self._grow(file, host_offset + len(memoryview(buffer)))

    def execute(self, plan: Plan) -> None:
        """Execute a plan, but for the space that it allocates."""
        execute_without_space(self._chain.top.files, plan)

    def _begin(self) -> None:
        if not self._begun and isinstance(self._driver, Begun):
            self.execute(self._driver.begin())
        self._begun = True

    def _bound(self) -> None:
        if self._driver.unflushed_bytes > _UNFLUSHED_LIMIT:
            self.flush()

    def _gaps(self, ranges: Iterable[Range]) -> Iterable[Range]:
        """The whole granules under ascending ranges that are not in place, merged."""
        if self._geometry.identity is not None:
            return
        granule = self._geometry.granule
        start = stop = 0
        for low, high in _widened(ranges, granule):
            for extent in self._driver.map(low, high - low):
                begin, end = max(low, extent.offset), min(high, extent.offset + extent.length)
                if begin >= end or (extent.kind is Kind.DATA and extent.in_place):
                    continue
                if begin > stop:
                    if stop > start:
                        yield Range(start, stop - start)
                    start = begin
                stop = -(-end // granule) * granule
        if stop > start:
            yield Range(start, stop - start)

    def _place(self, gaps: Sequence[Range], operation: Operation, ranges: Sequence[Range]) -> None:
        reservation = self._driver.reserve(gaps, operation)
        for place in reservation.placements:
            self._grow(place.file, self._end_of(place, ranges))
        self._driver.commit(reservation)

    def _end_of(self, place: Placement, ranges: Sequence[Range]) -> int:
        """Where the engine's writes to a place end: it leaves out what a fresh place reads as already."""
        if not place.fresh or self._geometry.cipher is not None:
            return place.host_offset + place.length
        ends = [
            min(each.end, place.offset + place.length) for each in ranges if each.offset < place.offset + place.length
        ]
        last = max(ends, default=place.offset)
        return place.host_offset + max(0, last - place.offset)

    def _grow(self, file: int, size: int) -> None:
        opened = self._chain.top.files[file]
        if size > opened.size():
            try:
                os.ftruncate(opened.descriptor, size)
            except OSError as error:
                message = f"has no place for a file of {size} bytes"
                raise ImageError(ErrorKind.NO_SPACE, message, path=opened.path, op="measure") from error


def execute_without_space(files: Iterable[LocalFile], plan: Plan) -> None:
    """Execute a plan on files in memory, but for the space that it allocates."""
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # importing this module needs no engine

    zeros: set[int] = set()  # the pieces of zeros of a plan are one object, which is looked through once
    stages = tuple(tuple(step for step in stage if not _takes_space(step, zeros)) for stage in plan.stages)
    execute_on_files([HostDescriptor(file.descriptor, file.path, writable=True) for file in files], Plan(stages))


def _takes_space(step: Step, zeros: set[int]) -> bool:
    """Whether a step only has the host take space inside a file: by allocating it, or by many zeros.

    `zeros` has the identities of the contents that were seen to be zeros.
    """
    if not isinstance(step, Write):
        return isinstance(step, Allocate)
    if id(step.data) not in zeros and len(step.data) >= _MANY_ZEROS and step.data.count(0) == len(step.data):
        zeros.add(id(step.data))
    return id(step.data) in zeros


def _widened(ranges: Iterable[Range], granule: int) -> Iterable[tuple[int, int]]:
    """Ranges in whole granules, where they touch or overlap as one."""
    start = stop = -1
    for offset, length in ranges:
        low, high = offset // granule * granule, -(-(offset + length) // granule) * granule
        if low > stop or stop < 0:
            if stop > start:
                yield start, stop
            start = low
        stop = max(stop, high)
    if stop > start:
        yield start, stop
