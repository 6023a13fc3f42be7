"""The differences between two disks, as records of a stream in the order of the disk.

The maps say what both disks have from one place, and where both have zeros: of that nothing is read. The rest is read
from both in windows, by threads, and compared in small units.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from tapfs.extent import Range, without
from tapfs.jobs.diff_stream import Record, RecordKind, digest_of
from tapfs.jobs.pipeline import WINDOW_BYTES, BufferPool, in_order, processors
from tapfs.jobs.shared_data import Likeness, compared_maps
from tapfs.kernel.ranges import ranges_of
from tapfs.kernel.segments import find_segments

if TYPE_CHECKING:
    import mmap

    from tapfs.disk.image import Image

#: Disks are compared in units of so many bytes.
GRANULE = 4096
#: Samples of what both have are taken in so many places at most, which lie about as far from each other.
_MOST_SAMPLES = 1024
#: So many pieces are looked at together at most.
_MAX_PIECES = 1024
#: Windows that wait to be taken while each thread prepares another one.
_WAITING = 2

_NO_DIGEST = bytes(16)


class Proof(Enum):
    """How much of what both disks have is to be in the records, so that the base of a difference can be known by it."""

    #: Nothing.
    NONE = "none"
    #: A small unit of data once in a while, the more often the smaller the disk.
    SAMPLE = "sample"
    #: All of it, which reads both disks from one end to the other.
    ALL = "all"


class _Piece(NamedTuple):
    """A range, and whether it is to be compared (PERHAPS), is to be kept (SAME), or is zeros in both."""

    range: Range
    likeness: Likeness


class _Window(NamedTuple):
    pieces: list[_Piece]
    sampled: bool


class _Found(NamedTuple):
    """The records of a window, which point into a buffer, and where the window ends."""

    records: list[Record]
    buffer: mmap.mmap
    until: int


def differences(
    old: Image, new: Image, proof: Proof, progress: Callable[[int, int], None] | None = None
) -> Iterator[Record]:
    """The records that make the new disk of the old one; each holds until the next one is asked for.

    Those of one kind are not joined. `progress` is told the bytes of the disk that are done, and of how many. Raises
    ImageError where a disk cannot be read.
    """
    return _Walk(old, new, proof).run(progress)


class _Walk:
    def __init__(self, old: Image, new: Image, proof: Proof) -> None:
        self._old = old
        self._new = new
        self._proof = proof
        self._buffers = BufferPool(WINDOW_BYTES)
        self._stride = max(new.size // _MOST_SAMPLES, GRANULE)

    def run(self, progress: Callable[[int, int], None] | None) -> Iterator[Record]:
        workers = processors()
        for found in in_order(self._windows(), self._examine, workers=workers, ahead=workers + _WAITING):
            yield from found.records
            self._buffers.give_back(found.buffer)
            if progress is not None:
                progress(found.until, self._new.size)
        if progress is not None:
            progress(self._new.size, self._new.size)

    # -- what is looked at ----------------------------------------------------------------------

    def _windows(self) -> Iterator[_Window]:
        pieces: list[_Piece] = []
        held = 0
        last_slot = slot = -1
        for piece in self._pieces():
            length = 0 if piece.likeness is Likeness.ZEROS else piece.range.length
            if pieces and (held + length > WINDOW_BYTES or len(pieces) == _MAX_PIECES):
                slot = pieces[0].range.offset // self._stride
                yield _Window(pieces, sampled=slot != last_slot)
                last_slot = slot
                pieces, held = [], 0
            pieces.append(piece)
            held += length
        if pieces:
            yield _Window(pieces, sampled=pieces[0].range.offset // self._stride != last_slot)

    def _pieces(self) -> Iterator[_Piece]:
        """The parts of the disk that are to be looked at, none larger than a window but of zeros."""
        every = self._proof is Proof.ALL
        next_sample = 0
        for found, likeness in compared_maps(self._old, self._new):
            if likeness is Likeness.ZEROS:
                end = min(found.end, self._old.size)
                if every and found.offset < end:
                    yield _Piece(Range(found.offset, end - found.offset), likeness)
            elif likeness is Likeness.PERHAPS or every:
                yield from (_Piece(part, likeness) for part in _cut(found))
            elif self._proof is Proof.SAMPLE:
                at = max(found.offset, next_sample)
                while at + GRANULE <= found.end:
                    yield _Piece(Range(at, GRANULE), likeness)
                    next_sample = at - at % self._stride + self._stride
                    at = next_sample

    # -- looking --------------------------------------------------------------------------------

    def _examine(self, window: _Window) -> _Found:
        """The records of a window. Their payloads lie in the buffer with the new bytes."""
        new, old = self._buffers.take(), self._buffers.take()
        try:
            records = self._records(window, new, old)
        except BaseException:
            self._buffers.give_back(new)
            raise
        finally:
            self._buffers.give_back(old)
        return _Found(records, new, window.pieces[-1].range.end)

    def _records(self, window: _Window, new: mmap.mmap, old: mmap.mmap) -> list[Record]:
        read = [piece for piece in window.pieces if piece.likeness is not Likeness.ZEROS]
        ranges = ranges_of([piece.range for piece in read], window.pieces[-1].range.end)
        self._old.read_ranges(ranges, old)
        # Of what is kept the old bytes are the new ones, too.
        wanted = [piece.range for piece in read if piece.likeness is Likeness.PERHAPS]
        records = [
            Record(RecordKind.KEEP_ZERO, *piece.range, _NO_DIGEST, _NO_DIGEST)
            for piece in window.pieces
            if piece.likeness is Likeness.ZEROS
        ]
        view = memoryview(old)
        old_bytes = _Packed([piece.range for piece in read], view)
        records += [self._kept(piece.range, old_bytes) for piece in read if piece.likeness is Likeness.SAME]
        if wanted:
            # The old bytes of what is compared, packed as the new ones are.
            below = b"".join(old_bytes.of(part) for part in wanted) if len(wanted) < len(read) else view
            packed = ranges_of(wanted, wanted[-1].end)
            self._new.read_ranges(packed, new)
            segments, zeros = find_segments(packed, new, GRANULE, below)
            new_bytes = _Packed(wanted, memoryview(new))
            changed = _within(segments.ranges(), wanted)
            records += [self._data(part, old_bytes, new_bytes) for part in changed]
            cleared = _within(zeros, wanted)
            records += [Record(RecordKind.ZERO, *part, digest_of(old_bytes.of(part)), _NO_DIGEST) for part in cleared]
            records += self._equal(wanted, sorted(changed + cleared), old_bytes, sampled=window.sampled)
        return sorted(records, key=lambda record: record.offset)

    def _data(self, part: Range, old: _Packed, new: _Packed) -> Record:
        payload = new.of(part)
        return Record(RecordKind.DATA, *part, digest_of(old.of(part)), digest_of(payload), payload)

    def _kept(self, part: Range, old: _Packed) -> Record:
        digest = digest_of(old.of(part))
        return Record(RecordKind.KEEP, *part, digest, digest)

    def _equal(self, looked_at: list[Range], changed: list[Range], old: _Packed, *, sampled: bool) -> Iterator[Record]:
        """What was compared and is equal, as far as the proof wants it and the old disk goes."""
        size = self._old.size
        for found in without(looked_at, changed):
            part = Range(found.offset, min(found.end, size) - found.offset)
            if part.length <= 0:
                return
            if self._proof is Proof.ALL:
                yield self._kept(part, old)
            elif self._proof is Proof.SAMPLE and sampled and part.length >= GRANULE:
                first = Range(part.offset, GRANULE)
                if any(old.of(first)):
                    yield self._kept(first, old)
                    return


class _Packed:
    """The bytes of ascending ranges, one behind the other."""

    def __init__(self, ranges: list[Range], view: memoryview) -> None:
        self._view = view
        self._starts: list[int] = []
        self._ranges = ranges
        at = 0
        for each in ranges:
            self._starts.append(at)
            at += each.length

    def of(self, part: Range) -> memoryview:
        """Those of a part of one of the ranges."""
        number = bisect_right(self._ranges, part.offset, key=lambda each: each.offset) - 1
        start = self._starts[number] + part.offset - self._ranges[number].offset
        return self._view[start : start + part.length]


def _cut(found: Range) -> Iterator[Range]:
    start = found.offset
    while start < found.end:
        stop = min(start - start % WINDOW_BYTES + WINDOW_BYTES, found.end)
        yield Range(start, stop - start)
        start = stop


def _within(found: list[Range], ranges: list[Range]) -> list[Range]:
    """Ascending ranges, cut where one of the others, which may touch, goes over to the next."""
    parts: list[Range] = []
    number = 0
    for each in found:
        while ranges[number].end <= each.offset:
            number += 1
        start = each.offset
        while start < each.end:
            stop = min(each.end, ranges[number].end)
            parts.append(Range(start, stop - start))
            start = stop
            if start < each.end:
                number += 1
    return parts
