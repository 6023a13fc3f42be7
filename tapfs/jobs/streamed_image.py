"""Write a new image into a pipe, from its first byte to its last.

Most formats have tables before the data that they refer to. So the image is made twice: the first pass finds the place
of everything and keeps the metadata in memory (`tapfs.jobs.placed_image`); the second writes the file, with the guest's
bytes read from the source where they have their places. What packs the data into places that depend on its contents
takes one pass, where the format allows that (`tapfs.driver.ForwardStreamWriter`), and else a scratch file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from tapfs.disk.chain_map import map_chain
from tapfs.disk.placed_writes import PlacedImage
from tapfs.disk.stream_target import StreamTarget, stream_of
from tapfs.driver import ForwardStreamWriter, Streamable
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.host.scratch import scratch_folder
from tapfs.jobs.convert import convert_to_new, fill_new
from tapfs.jobs.pipeline import WINDOW_BYTES, BufferPool, in_order, processors
from tapfs.jobs.placed_image import placed_image
from tapfs.jobs.progress import silent
from tapfs.kernel.ranges import ranges_of
from tapfs.plan import Plan, Write

if TYPE_CHECKING:
    import mmap

    from tapfs.jobs.copying import CopyOptions
    from tapfs.jobs.create import NewImage
    from tapfs.jobs.sources import Source
    from tapfs.kernel.engine import Buffer

#: Windows that wait to be written while each thread reads another one.
_WAITING = 2


class Pipe(Protocol):
    """What takes bytes in order; a binary file object is one."""

    def write(self, data: Buffer, /) -> object:
        """Take all of them. Raises OSError."""
        ...


class _Place(NamedTuple):
    """Bytes of the guest's disk and where the file has them."""

    host_offset: int
    offset: int
    length: int

    @property
    def host_end(self) -> int:
        """The first byte of the file after them."""
        return self.host_offset + self.length


class _Piece(NamedTuple):
    """A piece of the file: metadata where `places` is empty, else what adjacent places hold of an ascending disk."""

    start: int
    stop: int
    places: list[_Place]


def write_image(
    source: Source,
    new: NewImage,
    out: Pipe,
    *,
    name: str,
    options: CopyOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_scratch: Callable[[str], None] | None = None,
) -> None:
    """Write the image that `tapfs.jobs.convert.convert_to_new` would make to `out`, which takes bytes in order only.

    `name` is what the image is called in itself, and a relative `backing` starts at its folder. `on_scratch` is told
    the folder of a scratch file that is as large as the image, before one is made: packed or encrypted data needs it.
    Raises ImageError; BrokenPipeError if nobody reads any more.
    """
    report = progress if progress is not None else silent
    with placed_image(name, new, _ForwardImage, "convert") as image:
        _require_one_file(image)
        if image.can_go_forward:
            image.begin_forward(out)
            fill_new(source, image, new, options=options, progress=report)
            return
        if not new.compressed and image.layers[0].driver.geometry.cipher is None:
            _write_placed(source, new, image, out, options, report)
            return
    if new.backing is not None and not os.path.isabs(new.backing):
        message = "a packed or encrypted overlay is written to a file only, whose folder its parent's name starts at"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=name, op="convert")
    folder = scratch_folder()
    if on_scratch is not None:
        on_scratch(folder)
    with _made_in(folder, source, new, os.path.basename(name), options, report) as made:
        while piece := made.read(WINDOW_BYTES):
            out.write(piece)


def _require_one_file(image: PlacedImage) -> None:
    if len(image.layers[0].files) > 1:
        message = "an image of several files is not written into a pipe"
        raise ImageError(ErrorKind.UNSUPPORTED, message, op="convert", remedy="choose a subformat of one file")


def _made_in(
    folder: str,
    source: Source,
    new: NewImage,
    name: str,
    options: CopyOptions | None,
    progress: Callable[[int, int], None],
) -> BinaryIO:
    """The image as a file that has no name any more."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="tapfs-") as own:
        path = Path(own, name)
        convert_to_new(source, str(path), new, compressed=new.compressed, options=options, progress=progress)
        return path.open("rb")


def _write_placed(
    source: Source,
    new: NewImage,
    image: PlacedImage,
    out: Pipe,
    options: CopyOptions | None,
    progress: Callable[[int, int], None],
) -> None:
    """Find the places, and write the file in its order."""
    identity = image.layers[0].driver.geometry.identity
    if identity is not None:
        places = [_Place(identity.host_offset, 0, image.size)]
    else:
        fill_new(source, image, new, options=options, progress=lambda done, total: progress(done, 2 * total))
        image.end_writing()
        places = sorted(_places_of(image))
    total = max(image.file_bytes(), places[-1].host_end if identity is not None else 0)
    metadata = image.layers[0].file.descriptor
    buffers = BufferPool(WINDOW_BYTES)

    def read(piece: _Piece) -> tuple[_Piece, mmap.mmap]:
        buffer = buffers.take()
        with memoryview(buffer)[: piece.stop - piece.start] as view:
            if piece.places:
                wanted = [Range(each.offset, each.length) for each in piece.places]
                source.read_ranges(ranges_of(wanted, wanted[-1].end), view)
            else:
                _read_metadata(metadata, piece.start, view)
        return piece, buffer

    workers = processors()
    for piece, buffer in in_order(_pieces(places, total), read, workers=workers, ahead=workers + _WAITING):
        with memoryview(buffer) as view:
            out.write(view[: piece.stop - piece.start])
        buffers.give_back(buffer)
        progress(total + piece.stop, 2 * total)


def _places_of(image: PlacedImage) -> Iterator[_Place]:
    """Where the image itself has data, in the order of the disk, as its driver says: the engine has not seen it."""
    for extent in map_chain(image.layers[:1], 0, image.size):
        if extent.data and extent.host_offset is not None:
            yield _Place(extent.host_offset, extent.offset, extent.length)


def _pieces(places: list[_Place], total: int) -> Iterator[_Piece]:
    """The file from its start to its end in pieces of at most a window; `places` ascend in the file."""
    at = 0
    gathered: list[_Place] = []
    for place in places:
        if gathered and (place.host_offset != at or place.offset < gathered[-1].offset + gathered[-1].length):
            yield _Piece(gathered[0].host_offset, at, gathered)
            gathered = []
        yield from _metadata(at, place.host_offset)
        at = place.host_offset
        while at < place.host_end:
            room = WINDOW_BYTES - (at - gathered[0].host_offset if gathered else 0)
            length = min(room, place.host_end - at)
            gathered.append(_Place(at, place.offset + at - place.host_offset, length))
            at += length
            if length == room:
                yield _Piece(gathered[0].host_offset, at, gathered)
                gathered = []
    if gathered:
        yield _Piece(gathered[0].host_offset, at, gathered)
    yield from _metadata(at, total)


def _metadata(start: int, end: int) -> Iterator[_Piece]:
    for at in range(start, end, WINDOW_BYTES):
        yield _Piece(at, min(at + WINDOW_BYTES, end), [])


def _read_metadata(descriptor: int, offset: int, view: memoryview) -> None:
    """Bytes of a file in memory, and zeros behind its end."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            view[done:] = bytes(len(view) - done)
            return
        done += count


class _ForwardImage(PlacedImage):
    """A new image whose stream, where the format has one that only goes forward, is written into a pipe."""

    _out: Pipe | None = None

    @property
    def can_go_forward(self) -> bool:
        """Whether the image is filled by such a stream."""
        driver = self.layers[0].driver
        return (
            self.only_streamed and isinstance(driver, Streamable) and isinstance(driver.stream(), ForwardStreamWriter)
        )

    def begin_forward(self, out: Pipe) -> None:
        """Have the stream written to `out`."""
        self._out = out

    def stream_writer(self) -> StreamTarget:
        """See :meth:`Image.stream_writer`."""
        if self._out is None:
            return super().stream_writer()
        layer = self.layers[0]
        host = _ForwardHost(self._out, layer.file.descriptor)
        return stream_of(host, layer.driver, layer.path, forwards=True)


class _ForwardHost:
    """A :class:`tapfs.disk.stream_target.StreamHost` that writes into a pipe, gaps as zeros."""

    def __init__(self, out: Pipe, header: int) -> None:
        """`header` is the descriptor of an empty image, of which what lies before the first write is the start."""
        self._out = out
        self._header = header
        self._at = 0

    def write_host(self, file: int, host_offset: int, buffer: Buffer, *, guest_offset: int | None = None) -> None:
        """Write bytes behind what was written."""
        del file, guest_offset
        if host_offset < self._at:
            raise AssertionError(f"a forward stream went back from {self._at} to {host_offset}")
        between = bytearray(host_offset - self._at)
        if self._at == 0:
            _read_metadata(self._header, 0, memoryview(between))
        self._out.write(between)
        self._out.write(buffer)
        self._at = host_offset + len(memoryview(buffer))

    def execute(self, plan: Plan) -> None:
        """Write what a plan writes; a forward stream has no other steps."""
        for stage in plan.stages:
            for step in stage:
                if isinstance(step, Write):
                    self.write_host(step.file, step.host_offset, step.data)
