"""Measure how long the files of a new image will be, before anything of it is written.

The image is made in files in memory that take its metadata and none of the guest's bytes (`tapfs.disk.placed_writes`).
It is filled by the same copy that `tapfs.jobs.convert` makes, so the lengths are those that a conversion then writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk.placed_writes import PlacedImage, execute_without_space
from tapfs.disk.probe import format_named
from tapfs.driver import CreatableFormat, MultiFileFormat, Trait, has_trait
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.file import LocalFile
from tapfs.jobs.convert import fill_new
from tapfs.jobs.create import NewImage, create_request, files_of_image, open_created
from tapfs.jobs.pipeline import WINDOW_BYTES

if TYPE_CHECKING:
    from tapfs.jobs.bitmap_copy import CopiedBitmaps
    from tapfs.jobs.copying import CopyOptions
    from tapfs.jobs.sources import Source

#: The name of the image, where its user has not said one.
_NAME = "new-image"


class Measured(NamedTuple):
    """Bytes of all files of a new image together: their lengths, of which a host may take less where they have holes.

    `required` holds what was asked for, `fully_allocated` a disk of the same size without a byte left out. `bitmaps`
    come on top of either; None: the source has none to ask for, or the new image cannot keep any.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


def measure(
    source: Source | None,
    new: NewImage,
    *,
    name: str = _NAME,
    options: CopyOptions | None = None,
    bitmaps: CopiedBitmaps | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """What a conversion of `source` into `new` takes, to the byte; None: what `new` takes when it was just made.

    The `name` of the new image is written into a VMDK of several files, and a relative `backing` starts at its folder.
    All of the source's data is read, because a conversion leaves out zeros, and packed for a compressed image.
    Raises ImageError as a conversion does.
    """
    kept = None
    with _placed(name, new) as image:
        if source is not None:
            fill_new(source, image, new, options=options, progress=progress)
            image.end_writing()
        required = image.file_bytes()
        if bitmaps is not None and bitmaps.kept_by(image):
            bitmaps.into(image)
            kept = image.file_bytes() - required
    with _placed(name, new) as image:
        image.place_all(WINDOW_BYTES, packed=new.compressed or image.only_streamed)
        return Measured(required, image.file_bytes(), kept)


@contextmanager
def _placed(name: str, new: NewImage) -> Generator[PlacedImage]:
    """The new image in files in memory, empty, to be filled and looked at."""
    found = format_named(new.format)
    if not isinstance(found, CreatableFormat):
        raise ImageError(ErrorKind.UNSUPPORTED, f"tapfs does not make {new.format} images", op="measure")
    if has_trait(found, Trait.IN_MEMORY):
        raise ImageError(ErrorKind.UNSUPPORTED, "a RAM disk is no file that has a length", op="measure")
    with create_request(name, new) as (request, _):
        plan = found.create(request)
        further = tuple(found.further_names(request)) if isinstance(found, MultiFileFormat) else ()
    opened = [_in_memory(name) for _ in range(1 + len(further))]
    files = files_of_image(opened, further)
    try:
        execute_without_space(opened, plan)
    except BaseException:
        files.close()
        raise
    image = open_created(name, new, files, PlacedImage)
    try:
        yield image
    finally:
        image.abandon()


def _in_memory(name: str) -> LocalFile:
    return LocalFile(name, os.memfd_create("tapfs-measure", os.MFD_CLOEXEC), writable=True)
