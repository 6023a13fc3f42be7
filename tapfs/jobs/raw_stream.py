"""Make an image of a raw disk that comes through a pipe, from its first byte to its last.

A raw disk is read in order anyway, so it needs no scratch file. Memory holds one window of it. Its size is known
when the pipe ends, so the image grows meanwhile (`tapfs.jobs.growing_image`); a block device has its size already.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from tapfs.disk.probe import format_named
from tapfs.driver import Trait, has_trait
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.host.location import locate
from tapfs.jobs.copying import ZERO_GRANULE, CopyOptions
from tapfs.jobs.create import new_image
from tapfs.jobs.growing_image import can_grow, growing_image
from tapfs.jobs.pace import Pace
from tapfs.kernel.ranges import ranges_of
from tapfs.kernel.segments import find_segments
from tapfs.kernel.writes import window_segments
from tapfs.records import replace

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.jobs.create import NewImage
    from tapfs.jobs.growing_image import GrowingImage
    from tapfs.jobs.streamed_image import Pipe

#: Fills a piece of memory as far as the pipe goes; the bytes. Fewer than there is room for: it has ended.
Fill = Callable[[memoryview], int]

_WINDOW_BYTES = 4 << 20
_SECTOR = 512


def can_be_streamed(path: str, new: NewImage) -> bool:
    """Whether :func:`image_of_stream` makes such an image at `path`. Raises ImageError as `create_image` does."""
    location = locate(path)
    if location.address is not None or location.in_memory:
        return False
    if _device_bytes(path) is not None:
        return has_trait(format_named(new.format), Trait.GUESSED)
    return can_grow(new)


def image_of_stream(fill: Fill, path: str, new: NewImage, options: CopyOptions | None = None) -> None:
    """Make the image `path` of what `fill` brings.

    It appears under its name, and replaces what has that, only when it is complete and durable. A block device is
    written in place, and keeps what it holds behind the end of the stream. Raises ImageError.
    """
    options = options or CopyOptions()
    capacity = _device_bytes(path)
    if capacity is not None:
        with new_image(path, replace(new, size=capacity), overwrite=True, zeroed=False) as image:
            _copy(fill, options, _OnDevice(image))
            image.flush()
        return
    with growing_image(path, new) as growing:
        growing.finish(_copy(fill, options, _InFile(growing)))


def copy_stream(fill: Fill, out: Pipe) -> None:
    """Write what `fill` brings into a pipe. Raises ImageError for a stream that is empty."""
    view = _buffer()
    done = 0
    while count := fill(view):
        out.write(view[:count])
        done += count
    _require_some(done)


class _InFile:
    """A new file, in which nothing but data is written."""

    zeroes = False

    def __init__(self, growing: GrowingImage) -> None:
        self._growing = growing

    def image_for(self, size: int) -> Image:
        """The image, as soon as it has so many bytes."""
        self._growing.have_room(size)
        return self._growing.image


class _OnDevice:
    """A block device, whose old bytes zeros have to replace."""

    zeroes = True

    def __init__(self, image: Image) -> None:
        self._image = image

    def image_for(self, size: int) -> Image:
        """The image. Raises ImageError if it has fewer bytes."""
        if size > self._image.size:
            message = f"the device has {self._image.size} bytes, and standard input has more"
            raise ImageError(ErrorKind.NO_SPACE, message, path=self._image.path, op="convert")
        return self._image


def _copy(fill: Fill, options: CopyOptions, target: _InFile | _OnDevice) -> int:
    """Write the stream; its length."""
    pace = Pace(options.rate)
    view = _buffer()
    done = 0
    while count := fill(view):
        image = target.image_for(done + count)
        _write(image, done, view[:count], options, zeroes=target.zeroes)
        pace.moved(count)
        done += count
    _require_some(done)
    return done


def _write(image: Image, offset: int, window: memoryview, options: CopyOptions, *, zeroes: bool) -> None:
    if options.sparse_bytes == 0:
        with window_segments(offset, window, [(0, len(window))]) as segments:
            image.write_segments(segments)
        return
    granule = max((options.sparse_bytes or ZERO_GRANULE) // _SECTOR * _SECTOR, _SECTOR)
    end = offset + len(window)
    segments, _ = find_segments(ranges_of([Range(offset, len(window))], end), window, granule)
    if segments.count:
        image.write_segments(segments)
    if zeroes:
        at = offset
        for start, length in [*segments.ranges(), (end, 0)]:
            if at < start:
                image.write_zeroes(at, start - at)
            at = start + length


def _require_some(length: int) -> None:
    if not length:
        from tapfs.host.standard_input import nothing_came

        raise nothing_came()


def _buffer() -> memoryview:
    """Memory for a window, at a page boundary."""
    return memoryview(mmap.mmap(-1, _WINDOW_BYTES))


def _device_bytes(path: str) -> int | None:
    """The length of the block device that has the name, None for anything else."""
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None  # whoever makes the image says what is wrong with the name
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
