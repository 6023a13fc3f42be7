"""Copy one disk into another: only data is moved, and zeros stay holes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.host.location import locate
from tapfs.jobs.compare import read_within, split, unequal_candidates
from tapfs.jobs.pipeline import WINDOW_BYTES, BufferPool, in_order
from tapfs.kernel.engine import compress, find_data, first_difference, is_zero
from tapfs.kernel.writes import window_segments

if TYPE_CHECKING:
    import mmap

    from tapfs.disk.image import Image
    from tapfs.jobs.create import NewImage

#: Zeros are looked for in pieces of at least this many bytes: smaller holes save no space on the host.
ZERO_GRANULE = 4096
#: In a target of larger granules zeros are looked for in pieces of so many bytes.
_LARGEST_ZERO_GRANULE = 64 << 10
#: A gap between two pieces of data up to this long is read (as zeros) rather than jumped over.
_GAP_BYTES = 64 << 10
#: So many zeros are written at a time, so that the progress is seen and the copy can be ended.
_ZERO_WINDOW_BYTES = 1 << 30
#: Of a run of zeros that would be more windows than this, each is longer.
_MOST_ZERO_WINDOWS = 1 << 12
#: Windows being read, packed or waiting to be written.
_AHEAD = 4


class Baseline(Enum):
    """What the target reads as before anything is copied."""

    #: A new image without a parent.
    ZEROS = "zeros"
    #: A new image over a parent: only what differs from the parent is written.
    PARENT = "parent"
    #: An existing disk: zeros are written too.
    ANYTHING = "anything"


class _Piece(NamedTuple):
    """A range that is known to be zeros (`zero`), or has to be read."""

    offset: int
    length: int
    zero: bool


class _Run(NamedTuple):
    """A part of a window's buffer to be written at `start` from the window's offset."""

    start: int
    length: int
    zero: bool


class _Prepared(NamedTuple):
    """A window that was read: what of it is to be written, and the buffer that holds it."""

    window: _Piece
    buffer: mmap.mmap | None
    runs: list[_Run]


class _Packed(NamedTuple):
    """A window whose granules of data were packed: a payload for each, None if it did not shrink."""

    window: Range
    buffer: mmap.mmap
    granules: list[tuple[int, bytes | None]]


def convert(
    source: Image,
    target: Image,
    *,
    baseline: Baseline = Baseline.ZEROS,
    compressed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make `target`, open for writing and at least as large, read the same as `source`.

    What lies past the source's end reads as zeros, but is left as it is on a block device, where zeroing it may take
    as long as the device is large. `compressed` packs every granule that
    shrinks; the target must be new (baseline ZEROS) and of a format that can. Everything is
    flushed when it returns; after an exception the target holds a part of the copy. Raises
    ImageError; out_of_bounds if the target is smaller, unsupported if it cannot compress.
    """
    if target.size < source.size:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS,
            f"the target has {target.size} bytes, the source {source.size}",
            path=target.path,
            op="convert",
        )
    report = progress if progress is not None else _silent
    if compressed:
        if baseline is not Baseline.ZEROS:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "only a new image without a parent can be compressed",
                path=target.path,
                op="convert",
            )
        _convert_compressed(source, target, report)
        return
    _Copy(source, target, baseline).run(report)
    target.flush()


def convert_to_new(
    source: Image,
    path: str,
    new: NewImage,
    *,
    compressed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Copy `source` into a new image `path`, which replaces what has that name.

    It appears under its name only when it is complete and durable; whatever ends the copy
    before leaves nothing of it, and an existing file as it was (a block device excepted).
    Raises ImageError; exists if `path` is `source` or one of its parents.
    """
    from tapfs.jobs.create import new_image

    if compressed and new.password is not None:
        raise ImageError(
            ErrorKind.UNSUPPORTED, "compressed data is never encrypted in such an image", path=path, op="convert"
        )
    refuse_own_chain(source, path)
    new = replace(new, compressed=compressed)
    baseline = Baseline.ZEROS if new.backing is None else Baseline.PARENT
    with new_image(path, new, overwrite=True, zeroed=False) as target:
        if target.is_device:
            baseline = Baseline.ANYTHING
        packed = compressed or target.only_streamed
        convert(source, target, baseline=baseline, compressed=packed, progress=progress)


def refuse_own_chain(source: Image, path: str) -> None:
    """Raise ImageError(exists) if `path` is one of the files that `source` reads."""
    if locate(path).identity() in {layer.file.identity for layer in source.layers}:
        raise ImageError(
            ErrorKind.EXISTS,
            "is the source, or a parent of it",
            path=path,
            op="convert",
            remedy="choose another name for the target",
        )


class _Copy:
    """A copy through the target's ordinary writes: one thread reads and scans, the caller's writes."""

    def __init__(self, source: Image, target: Image, baseline: Baseline) -> None:
        self._source = source
        self._target = target
        self._baseline = baseline
        #: The bytes behind the end of the image on the target stay as they are.
        self._end = source.size if target.is_device else target.size
        self._granule = max(target.granule, ZERO_GRANULE)
        if baseline is not Baseline.PARENT:
            # Zeros inside a large granule stay holes of its place, which is new and reads as zeros.
            self._granule = min(self._granule, _LARGEST_ZERO_GRANULE)
        self._window = whole_granules(WINDOW_BYTES, self._granule)
        self._buffers = BufferPool(self._window)

    def run(self, progress: Callable[[int, int], None]) -> None:
        for done in in_order(self._windows(), self._prepare, workers=1, ahead=_AHEAD):
            self._write(done)
            progress(done.window.offset + done.window.length, self._end)

    def _windows(self) -> Iterator[_Piece]:
        if self._baseline is Baseline.PARENT:
            for window in split(unequal_candidates(self._source, self._target), self._window):
                yield _Piece(window.offset, window.length, zero=False)
            return
        for piece in _pieces(self._source, self._end):
            if not piece.zero or self._baseline is Baseline.ANYTHING:
                most = max(_ZERO_WINDOW_BYTES, piece.length // _MOST_ZERO_WINDOWS) if piece.zero else self._window
                for window in split(iter([Range(piece.offset, piece.length)]), most):
                    yield _Piece(window.offset, window.length, piece.zero)

    def _prepare(self, window: _Piece) -> _Prepared:
        if window.zero:
            return _Prepared(window, None, [_Run(0, window.length, zero=True)])
        buffer = self._buffers.take()
        with memoryview(buffer) as view:
            content = view[: window.length]
            read = read_within(self._source, Range(window.offset, window.length), content)
            content[read:] = bytes(window.length - read)
            if self._baseline is Baseline.PARENT:
                runs = self._differing_runs(window, content)
            else:
                data = find_data(content, self._granule)
                runs = [_Run(start, length, zero=False) for start, length in data]
                if self._baseline is Baseline.ANYTHING:
                    runs = _with_zero_runs(runs, window.length)
        return _Prepared(window, buffer, runs)

    def _differing_runs(self, window: _Piece, content: memoryview) -> list[_Run]:
        """The granules that differ from what the target reads now, which is its parent."""
        parent = self._buffers.take()
        try:
            with memoryview(parent) as view:
                below = view[: window.length]
                self._target.read_into(window.offset, below)
                return list(_differences(content, below, self._target.granule))
        finally:
            self._buffers.give_back(parent)

    def _write(self, prepared: _Prepared) -> None:
        offset = prepared.window.offset
        if prepared.buffer is None:
            self._target.write_zeroes(offset, prepared.window.length)
            return
        data = [(run.start, run.length) for run in prepared.runs if not run.zero]
        with window_segments(offset, prepared.buffer, data) as segments:
            self._target.write_segments(segments)
        for run in prepared.runs:
            if run.zero:
                self._target.write_zeroes(offset + run.start, run.length)
        self._buffers.give_back(prepared.buffer)


def _convert_compressed(source: Image, target: Image, progress: Callable[[int, int], None]) -> None:
    """Two threads read and pack whole granules, the caller's appends them in order."""
    writer = target.stream_writer()
    granule = writer.granule
    window_bytes = whole_granules(WINDOW_BYTES, granule)
    buffers = BufferPool(window_bytes)

    def prepare(window: Range) -> _Packed:
        length = whole_granules(window.length, granule)
        buffer = buffers.take()
        granules: list[tuple[int, bytes | None]] = []
        with memoryview(buffer) as view:
            content = view[:length]
            read = read_within(source, window, content)
            content[read:] = bytes(length - read)
            for start, size in find_data(content, granule):
                payloads = compress(writer.codec, content[start : start + size], granule)
                granules += zip(range(start, start + size, granule), payloads, strict=True)
        return _Packed(window, buffer, granules)

    data = (Range(piece.offset, piece.length) for piece in _pieces(source, source.size) if not piece.zero)
    windows = split(_granule_aligned(data, granule, source.size), window_bytes)
    for packed in in_order(windows, prepare, workers=2, ahead=_AHEAD):
        with memoryview(packed.buffer) as view:
            for start, payload in packed.granules:
                if payload is None:
                    writer.write_plain(packed.window.offset + start, view[start : start + granule])
                else:
                    writer.write_compressed(packed.window.offset + start, payload)
        buffers.give_back(packed.buffer)
        progress(packed.window.offset + packed.window.length, source.size)
    writer.finish()


def whole_granules(length: int, granule: int) -> int:
    """`length` rounded up to a multiple of `granule`."""
    return -(-length // granule) * granule


def _pieces(source: Image, end: int) -> Iterator[_Piece]:
    """The disk up to `end` in long pieces; zeros after the source's own end."""
    start, at, zero = 0, 0, True
    for extent in source.extents():
        if extent.zero != zero and not (extent.zero and extent.length <= _GAP_BYTES):
            if at > start:
                yield _Piece(start, at - start, zero)
            start, zero = at, extent.zero
        at = extent.offset + extent.length
    if not zero and at < end:
        yield _Piece(start, at - start, zero)
        start, zero = at, True
    if start < end:
        yield _Piece(start, end - start, zero)


def _granule_aligned(ranges: Iterator[Range], granule: int, size: int) -> Iterator[Range]:
    """Ranges widened to whole granules (the last may end with the disk), disjoint again."""
    done = 0
    for offset, length in ranges:
        start = max(offset - offset % granule, done)
        done = min(whole_granules(offset + length, granule), size)
        if start < done:
            yield Range(start, done - start)


def _with_zero_runs(runs: list[_Run], length: int) -> list[_Run]:
    """The runs of data with the zeros between them."""
    complete: list[_Run] = []
    at = 0
    for run in runs:
        if at < run.start:
            complete.append(_Run(at, run.start - at, zero=True))
        complete.append(run)
        at = run.start + run.length
    if at < length:
        complete.append(_Run(at, length - at, zero=True))
    return complete


def _differences(content: memoryview, below: memoryview, granule: int) -> Iterator[_Run]:
    """The runs of granules that differ between two buffers of one length."""
    at, end = 0, len(content)
    while at < end:
        first = first_difference(content[at:], below[at:])
        if first is None:
            return
        start = at + first - (at + first) % granule
        stop = start + granule
        while stop < end and first_difference(content[stop : stop + granule], below[stop : stop + granule]) is not None:
            stop += granule
        stop = min(stop, end)
        yield _Run(start, stop - start, is_zero(content[start:stop]))
        at = stop


def _silent(done: int, total: int) -> None:
    """No progress is wanted."""
