"""Measure how long the files of a new image will be, before anything of it is written.

The image is made in files in memory that take its metadata and none of the guest's bytes (`tapfs.disk.placed_writes`).
It is filled by the same copy that `tapfs.jobs.convert` makes, so the lengths are those that a conversion then writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tapfs.disk.placed_writes import PlacedImage
from tapfs.jobs.convert import fill_new
from tapfs.jobs.pipeline import WINDOW_BYTES
from tapfs.jobs.placed_image import placed_image
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from tapfs.jobs.bitmap_copy import CopiedBitmaps
    from tapfs.jobs.copying import CopyOptions
    from tapfs.jobs.create import NewImage
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
    with placed_image(name, new, PlacedImage, "measure") as image:
        if source is not None:
            fill_new(source, image, new, options=options, progress=progress)
            image.end_writing()
        required = image.file_bytes()
        if bitmaps is not None and bitmaps.kept_by(image):
            bitmaps.into(image)
            kept = image.file_bytes() - required
    with placed_image(name, new, PlacedImage, "measure") as image:
        image.place_all(WINDOW_BYTES, packed=new.compressed or image.only_streamed)
        return Measured(required, image.file_bytes(), kept)
