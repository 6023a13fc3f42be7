"""Give back what an image has in its own files for nothing: free blocks, and blocks of zeros.

Only what the top image of a chain has is looked at; its parents stay as they are. Of that the whole granules that are
free are discarded. The rest is read in windows, in other threads. Free bytes in a window count as zeros, whatever they
are, so a granule of zeros and free blocks goes, too.

Formats with large blocks (VDI, VHDX) can let go of a block as a whole only. Pieces of one are given to the host in
place: the image's map stays, and its file has a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tapfs.extent import Range, merge_runs, without
from tapfs.jobs.copying import ZERO_GRANULE
from tapfs.jobs.pipeline import WINDOW_BYTES, BufferPool, in_order, processors
from tapfs.kernel.ranges import ranges_of
from tapfs.kernel.segments import find_segments

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.jobs.free_space import FileSystemSpace, FreeRange

#: Holes in the host file are at least so large where the granule of the format is larger.
_LARGEST_PIECE = 64 << 10
#: Windows that wait while each thread looks at another one.
_WAITING = 2
#: So many pieces of used data are read together at most.
_MAX_PIECES = 1024


class _Piece(NamedTuple):
    """A part of the image's own data: all of it free (`owner`), or used but for the ranges in `free`."""

    range: Range
    owner: FileSystemSpace | None
    free: list[Range]


class GivingBack:
    """One walk over a disk from its start to its end; the image is open for writing, or it is a dry run."""

    def __init__(self, image: Image, free: Iterable[FreeRange], *, zeros: bool, dry_run: bool) -> None:
        self._image = image
        self._free = iter(free)
        self._zeros = zeros
        self._dry_run = dry_run
        packed = image.layers[0].driver.geometry.packed_unit
        #: The image lets go of whole multiples of this, and the host of whole multiples of the piece.
        self._unit = packed * -(-ZERO_GRANULE // packed)
        self._piece = _LARGEST_PIECE if self._unit % _LARGEST_PIECE == 0 else self._unit
        self._buffers = BufferPool(WINDOW_BYTES)
        #: Bytes of the disk that were zeros, or zeros and free, and were in the image's files.
        self.zero_bytes = 0

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Walk, but for a flush. `progress` is told the bytes of the disk that are done, and of how many."""
        workers = processors()
        for until, zeros in in_order(self._windows(), self._zeros_in, workers=workers, ahead=workers + _WAITING):
            for found in zeros:
                self.zero_bytes += found.length
                self._let_go(found, discard=False)
            progress(until, self._image.size)
        progress(self._image.size, self._image.size)

    # -- giving back ----------------------------------------------------------------------------

    def _let_go(self, wanted: Range, *, discard: bool) -> None:
        """Whole units by the format, what is left at both ends by the host."""
        if self._dry_run:
            return
        image = self._image
        first, last = _inside(wanted, self._unit, image.size)
        if first >= last:
            image.zero_in_place(wanted.offset, wanted.length, discard=discard)
            return
        if wanted.offset < first:
            image.zero_in_place(wanted.offset, first - wanted.offset, discard=discard)
        if discard:
            image.discard(first, last - first)
        else:
            image.write_zeroes(first, last - first)
        if last < wanted.end:
            image.zero_in_place(last, wanted.end - last, discard=discard)

    # -- looking for zeros ----------------------------------------------------------------------

    def _windows(self) -> Iterator[list[_Piece]]:
        """Used pieces of a window of bytes in all; free ones are given back meanwhile, by the caller's thread."""
        window: list[_Piece] = []
        held = 0
        for piece in self._pieces():
            if piece.owner is not None:
                piece.owner.given_back += piece.range.length
                self._let_go(piece.range, discard=True)
                continue
            if not self._zeros:
                continue
            for part in _cut(piece):
                if held + part.range.length > WINDOW_BYTES or len(window) == _MAX_PIECES:
                    yield window
                    window, held = [], 0
                window.append(part)
                held += part.range.length
        if window:
            yield window

    def _zeros_in(self, window: list[_Piece]) -> tuple[int, list[Range]]:
        """The runs of a window's pieces that are zeros but for free bytes, and where the window ends."""
        buffer = self._buffers.take()
        try:
            until = window[-1].range.end
            ranges = ranges_of([piece.range for piece in window], until)
            self._image.read_ranges(ranges, buffer)
            at = 0
            for piece in window:
                for free in piece.free:
                    start = at + free.offset - piece.range.offset
                    buffer[start : start + free.length] = bytes(free.length)
                at += piece.range.length
            segments, _ = find_segments(ranges, buffer, self._piece)
            return until, list(without([piece.range for piece in window], segments.ranges()))
        finally:
            self._buffers.give_back(buffer)

    # -- pieces ---------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[_Piece]:
        """The image's own data, cut where free space begins and ends, at multiples of the piece."""
        size = self._image.size
        free = next(self._free, None)
        for own in self._own_data():
            at, partly = own.offset, list[Range]()
            while free is not None and free.range.offset < own.end:
                part = _common(free.range, own)
                first, last = _inside(part, self._piece, size)
                if first < last:
                    partly += _part(part.offset, first)
                    if at < first:
                        yield _Piece(Range(at, first - at), None, partly)
                    yield _Piece(Range(first, last - first), free.owner, [])
                    at, partly = last, _part(last, part.end)
                else:
                    partly += _part(part.offset, part.end)
                if free.range.end > own.end:
                    break  # it goes on in what comes next
                free = next(self._free, None)
            if at < own.end:
                yield _Piece(Range(at, own.end - at), None, partly)

    def _own_data(self) -> Iterator[Range]:
        """What the top image of the chain has in its own files, widened to multiples of the piece."""
        size = self._image.size
        reached = 0
        runs = (Range(run.offset, run.length) for run in self._image.extents() if run.data and run.depth == 0)
        for run in merge_runs(runs, _touching):
            start = max(run.offset - run.offset % self._piece, reached)
            reached = min(-(-run.end // self._piece) * self._piece, size)
            if start < reached:
                yield Range(start, reached - start)


def _inside(wanted: Range, unit: int, size: int) -> tuple[int, int]:
    """The whole units in a range; the one that the end of the disk cuts is whole."""
    last = wanted.end if wanted.end == size else wanted.end - wanted.end % unit
    return -(-wanted.offset // unit) * unit, last


def _common(left: Range, right: Range) -> Range:
    start = max(left.offset, right.offset)
    return Range(start, max(min(left.end, right.end) - start, 0))


def _part(start: int, end: int) -> list[Range]:
    return [Range(start, end - start)] if start < end else []


def _touching(left: Range, right: Range) -> Range | None:
    return Range(left.offset, left.length + right.length) if left.end == right.offset else None


def _cut(piece: _Piece) -> Iterator[_Piece]:
    """A used piece in parts of a window at most, which begin at multiples of a window."""
    start, end = piece.range.offset, piece.range.end
    while start < end:
        stop = min(start - start % WINDOW_BYTES + WINDOW_BYTES, end)
        part = Range(start, stop - start)
        inside = [_common(free, part) for free in piece.free if free.offset < stop and start < free.end]
        yield _Piece(part, None, inside)
        start = stop
