"""A new image that grows while it is filled, because nobody knows the size of its disk before the end.

The image is made small. What is written behind its end first makes it twice as large, by the format's own plans for a
new size, and in the end it gets the size that the disk has. All of that happens in files without a name, so a crash
leaves nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING

from tapfs.disk.chain import OpenOptions, layer_of_files
from tapfs.disk.image import Image
from tapfs.disk.placed_writes import PlacedImage
from tapfs.disk.probe import format_named
from tapfs.driver import MAX_DISK_BYTES, MultiFileFormat, Resizable
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.location import locate
from tapfs.jobs.create import (
    BegunImage,
    NewImage,
    begun_image,
    create_request,
    files_of_image,
    open_created,
    open_filled,
)
from tapfs.jobs.editing import execute_edit
from tapfs.jobs.placed_image import placed_image
from tapfs.records import replace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tapfs.disk.chain import Layer
    from tapfs.host.files import LocalFiles
    from tapfs.plan import Plan

#: The size that an image has at first.
FIRST_BYTES = 64 << 20
#: An image of so many bytes is in more files than a small one, where a file of a disk has a bound.
_LARGE_BYTES = 1 << 40


def can_grow(new: NewImage) -> bool:
    """Whether an image as `new` says can be made so; the host gets no file. Raises ImageError as `create_image`."""
    if new.compressed or new.backing is not None or new.options.get("preallocation", "off") != "off":
        return False
    if _further_names(new, FIRST_BYTES) != _further_names(new, _LARGE_BYTES):
        return False
    with placed_image(f"disk.{new.format}", replace(new, size=FIRST_BYTES), PlacedImage, "convert") as image:
        layer = image.layers[0]
        geometry = layer.driver.geometry
        encrypted_whole = geometry.identity is not None and geometry.cipher is not None
        return isinstance(layer.driver, Resizable) and not encrypted_whole and not image.only_streamed


def _further_names(new: NewImage, size: int) -> Sequence[str]:
    """The files that an image of so many bytes has beside its own."""
    found = format_named(new.format)
    if not isinstance(found, MultiFileFormat):
        return ()
    with create_request(f"disk.{new.format}", replace(new, size=size)) as (request, _):
        return found.further_names(request)


class GrowingImage:
    """A new image that is being filled. `image` is what it is at the moment: another one after each growth."""

    def __init__(self, path: str, new: NewImage, begun: BegunImage) -> None:
        self._path = path
        self._new = new
        self._begun = begun
        self.image = open_filled(path, new, begun)

    def have_room(self, size: int) -> None:
        """Let the disk have at least `size` bytes. Raises ImageError; of one that is too large for the format, too."""
        now = self.image.size
        if size <= now:
            return
        if size > MAX_DISK_BYTES:
            message = f"a disk of more than {MAX_DISK_BYTES} bytes is too large"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=self._path, op="convert")
        try:
            self._resize(max(size, min(2 * now, MAX_DISK_BYTES)))
        except ImageError as error:
            # What is twice as large may be more than the format can hold.
            if error.kind is not ErrorKind.OUT_OF_BOUNDS or size == 2 * now:
                raise
            self._resize(size)

    def finish(self, size: int) -> None:
        """Give the disk the size that it is to have, and close the image."""
        if size != self.image.size:
            self._resize(size)
        self.image.close()

    def _resize(self, size: int) -> None:
        grows = size > self.image.size
        self.image.close()
        try:
            if grows:
                self._edit(size, told=False)
            self._edit(size, told=True)
        finally:
            self.image = open_created(self._path, self._new, self._files(), Image)

    def _edit(self, size: int, *, told: bool) -> None:
        options = OpenOptions(format=self._new.format, writable=True, created=True)
        with contextlib.closing(layer_of_files(self._path, self._files(), options)) as layer:
            execute_edit(layer, _plans(layer, size, told=told))

    def _files(self) -> LocalFiles:
        return files_of_image(self._begun.files.open(), self._begun.further)


def _plans(layer: Layer, size: int, *, told: bool) -> Iterator[Plan]:
    driver = layer.driver
    if not isinstance(driver, Resizable):
        raise TypeError(f"{driver.format_name} was resizable before")
    return driver.resize(size) if told else driver.make_room(size)


@contextlib.contextmanager
def growing_image(path: str, new: NewImage) -> Generator[GrowingImage]:
    """A new image that grows, see `can_grow`; what has the name is replaced once the block has ended well.

    The block must have called `finish`. If it raises, nothing is left and what was there stays. Raises ImageError.
    """
    path = locate(path).name
    new = replace(new, size=FIRST_BYTES)
    with begun_image(path, new, overwrite=True) as begun:
        growing = GrowingImage(path, new, begun)
        try:
            yield growing
        except BaseException:
            growing.image.abandon()
            raise
        begun.files.publish(overwrite=True)
