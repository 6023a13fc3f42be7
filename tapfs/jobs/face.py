"""Faces: a disk as the file of an image of another format, its metadata made up and its data the disk's own.

The image is made in files in memory that take metadata only (`tapfs.disk.placed_writes`), by the map of the disk: none
of its data is read. What remains is that metadata and a table, which says what range of the disk stands where in the
file.
"""

from __future__ import annotations

import bisect
import os
import threading
from array import array
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tapfs.disk.chain_map import map_chain
from tapfs.disk.placed_writes import PlacedImage
from tapfs.disk.probe import format_named
from tapfs.driver import CreatableFormat, MultiFileFormat, Trait, has_trait
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.extent import Range
from tapfs.identifiers import derived_from
from tapfs.jobs.create import NewImage, create_request
from tapfs.jobs.placed_image import placed_image

if TYPE_CHECKING:
    from tapfs.disk.chain_map import MappedExtent

_OPERATION = "make the face"

#: Data is given places in pieces of so many bytes.
_PLACED_BYTES = 64 << 20
#: So many ranges are given places at once.
_RANGES_AT_ONCE = 1024


class FacedDisk(Protocol):
    """A disk that does not change: an `Image` that is open for reading."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def extents(self) -> Iterator[MappedExtent]:
        """The map of the whole disk."""
        ...


class DiskReader(Protocol):
    """What reads the bytes of a disk: an `Image`, or what proves each read of one."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly so many bytes. Raises ImageError."""
        ...

    def try_read(self, offset: int, length: int) -> bytes | None:
        """The bytes, or None if they are not to be had without waiting."""
        ...


class _Run(NamedTuple):
    """Bytes ``[start, start + length)`` of the file are those of the disk from `offset` on; `offset` None: metadata."""

    start: int
    length: int
    offset: int | None


class Face:
    """The file of an image, byte for byte, for any number of threads.

    `size` is its length. `pieces` are where it has bytes of the disk: starts in the file, ascending, offsets of the
    disk, lengths. What lies between them is read from the descriptor `metadata`, and is zeros behind the end of that.
    `disk` reads the disk, which must stay as it was.
    """

    def __init__(
        self, metadata: int, size: int, pieces: tuple[array[int], array[int], array[int]], disk: DiskReader
    ) -> None:
        """Take over the descriptor `metadata`; see :func:`made_face`."""
        self.size = size
        self.metadata = metadata
        self.pieces = pieces
        self._starts, self._offsets, self._lengths = pieces
        self._disk = disk
        self._lock = threading.Lock()
        self._readers = 0
        self._closed = False

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; fewer only at the end. Raises ImageError for what the disk cannot give."""
        with self._open():
            pieces = [self._piece(run) for run in self._runs(offset, min(offset + length, self.size))]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def try_read(self, offset: int, length: int) -> bytes | None:
        """The same, or None if it is not to be had without waiting for the host."""
        pieces: list[bytes] = []
        with self._open():
            for run in self._runs(offset, min(offset + length, self.size)):
                piece = self._metadata_of(run) if run.offset is None else self._disk.try_read(run.offset, run.length)
                if piece is None:
                    return None
                pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def runs(self) -> Iterator[_Run]:
        """The whole file, in its order."""
        return self._runs(0, self.size)

    def close(self) -> None:
        """Let go of the metadata when nobody reads any more; closing twice is allowed."""
        with self._lock:
            closing, self._closed = not self._closed, True
            if closing and self._readers == 0:
                os.close(self.metadata)

    @contextmanager
    def _open(self) -> Generator[None]:
        """Keep the metadata open until the end of the block."""
        with self._lock:
            if self._closed:
                raise ImageError(ErrorKind.IO, "is closed", op="read the face")
            self._readers += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._readers -= 1
            if self._closed and self._readers == 0:
                os.close(self.metadata)

    def _runs(self, at: int, end: int) -> Iterator[_Run]:
        index = bisect.bisect_right(self._starts, at) - 1
        if index < 0 or self._starts[index] + self._lengths[index] <= at:
            index += 1
        while at < end:
            start = self._starts[index] if index < len(self._starts) else end
            if at < start:
                stop = min(start, end)
                yield _Run(at, stop - at, None)
            else:
                stop = min(start + self._lengths[index], end)
                yield _Run(at, stop - at, self._offsets[index] + at - start)
                index += 1
            at = stop

    def _piece(self, run: _Run) -> bytes:
        return self._metadata_of(run) if run.offset is None else self._disk.read(run.offset, run.length)

    def _metadata_of(self, run: _Run) -> bytes:
        pieces: list[bytes] = []
        at, end = run.start, run.start + run.length
        try:
            while at < end and (piece := os.pread(self.metadata, end - at, at)):
                pieces.append(piece)
                at += len(piece)
        except OSError as error:
            raise from_os_error(error, path=None, op="read the face") from error
        # Behind the last metadata the file in memory ends, and the image's is zeros.
        return b"".join([*pieces, bytes(end - at)])


def require_face(format_name: str, size: int) -> None:
    """See that a disk of `size` bytes can have a face of a format. Raises ImageError: unsupported, out_of_bounds."""
    found = format_named(format_name)
    if not isinstance(found, CreatableFormat):
        raise ImageError(ErrorKind.UNSUPPORTED, f"tapfs does not make {format_name} images", op=_OPERATION)
    special = (Trait.IN_MEMORY, Trait.ALWAYS_ENCRYPTED, Trait.GUESSED)
    if any(has_trait(found, trait) for trait in special):
        message = f"a disk has no face of the format {format_name}"
        raise ImageError(ErrorKind.UNSUPPORTED, message, op=_OPERATION)
    name = f"disk.{format_name}"
    with create_request(name, NewImage(format_name, size)) as (request, _):
        found.create(request)
        if isinstance(found, MultiFileFormat) and found.further_names(request):
            message = f"a {format_name} image of {size} bytes is several files"
            raise ImageError(ErrorKind.UNSUPPORTED, message, op=_OPERATION)


class Birth(NamedTuple):
    """What faces of one disk have in common, so that each is the same however often it is made.

    Their identifiers follow from `seed`. They say that they were made at `seconds` since 1970.
    """

    seed: bytes
    seconds: int


def made_face(disk: FacedDisk, format_name: str, reader: DiskReader, birth: Birth) -> Face:
    """The face of a disk; `reader` is for its bytes. It takes as long as a look at the map. Raises ImageError."""
    name = f"disk.{format_name}"
    born = derived_from(birth.seed + name.encode(), birth.seconds)
    with born, placed_image(name, NewImage(format_name, disk.size), _FaceImage, _OPERATION) as image:
        image.place(_data_of(disk))
        places = image.places(disk.size)
        starts, _, lengths = places
        end = starts[-1] + lengths[-1] if starts else 0
        try:
            metadata = os.dup(image.layers[0].file.descriptor)
        except OSError as error:
            raise from_os_error(error, path=name, op=_OPERATION) from error
        return Face(metadata, max(image.file_bytes(), end), places, reader)


def _data_of(disk: FacedDisk) -> Iterator[Range]:
    """The ranges of a disk that are not known to be zeros, ascending, in bounded pieces."""
    for extent in disk.extents():
        if not extent.zero:
            for start in range(extent.offset, extent.offset + extent.length, _PLACED_BYTES):
                yield Range(start, min(_PLACED_BYTES, extent.offset + extent.length - start))


class _FaceImage(PlacedImage):
    """A new image that is given places for ranges of a disk."""

    def place(self, ranges: Iterator[Range]) -> None:
        """Give each range its place, and finish the image."""
        gathered: list[Range] = []
        length = 0
        for each in ranges:
            gathered.append(each)
            length += each.length
            if len(gathered) >= _RANGES_AT_ONCE or length >= _PLACED_BYTES:
                self._places.write(gathered)
                gathered, length = [], 0
        if gathered:
            self._places.write(gathered)
        self.end_writing()

    def places(self, disk_size: int) -> tuple[array[int], array[int], array[int]]:
        """Where the file has bytes of a disk of this size: starts in the file, offsets of the disk, lengths.

        The starts ascend, and ranges that go on in both are one.
        """
        starts, offsets, lengths = array("Q"), array("Q"), array("Q")
        for start, offset, placed in self._placed():
            length = min(placed, disk_size - offset)
            if length <= 0:
                continue
            if starts and starts[-1] + lengths[-1] == start and offsets[-1] + lengths[-1] == offset:
                lengths[-1] += length
                continue
            starts.append(start)
            offsets.append(offset)
            lengths.append(length)
        if any(starts[index] > starts[index + 1] for index in range(len(starts) - 1)):
            order = sorted(range(len(starts)), key=starts.__getitem__)
            starts, offsets, lengths = (array("Q", map(each.__getitem__, order)) for each in (starts, offsets, lengths))
        return starts, offsets, lengths

    def _placed(self) -> Iterator[tuple[int, int, int]]:
        identity = self.layers[0].driver.geometry.identity
        if identity is not None:
            yield identity.host_offset, 0, self.size
            return
        # As the driver says, because the engine has not seen what was placed.
        for extent in map_chain(self.layers[:1], 0, self.size):
            if extent.data and extent.host_offset is not None:
                yield extent.host_offset, extent.offset, extent.length
