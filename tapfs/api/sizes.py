"""Sizes of images: `measure` and `resize` of `import tapfs`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tapfs.api.jobs import Progress, opened_image
from tapfs.disk.chain import OpenOptions
from tapfs.disk.image import Image

if TYPE_CHECKING:
    from tapfs.jobs.copying import CopyOptions
    from tapfs.jobs.measure import Measured


def measure(
    source: str | os.PathLike[str] | Image | Sequence[str | os.PathLike[str] | Image] | None,
    *,
    target_format: str,
    format: str | None = None,  # noqa: A002 - the word of the field
    password: bytes | None = None,
    size: int | None = None,
    compressed: bool = False,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    options: Mapping[str, str] | None = None,
    target_password: bytes | None = None,
    name: str | os.PathLike[str] = "new-image",
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    copying: CopyOptions | None = None,
    progress: Progress | None = None,
) -> Measured:
    """How many bytes the files of a new image have, before anything of it is written.

    `source` is what `convert` would copy into it: the name of an image (`format` and `password` say how it is opened),
    an open Image, or several of them. The new image gets its size, unless `size` says another one. Without a source
    (None) the image is measured as `create` makes it. The other words are those of `convert`. A `target_password` may
    be any. A VMDK of several files holds its `name`, and a relative `backing` starts at the folder of that. `bitmaps`
    measures those of the one source as well. Nothing is written. All data of the source is read. Raises ImageError.
    """
    from tapfs.jobs.bitmap_copy import bitmaps_to_copy
    from tapfs.jobs.create import NewImage
    from tapfs.jobs.measure import measure as measured
    from tapfs.jobs.sources import one_disk

    parent = None if backing is None else os.fsdecode(backing)

    def new(size: int | None) -> NewImage:
        return NewImage(target_format, size, parent, backing_format, dict(options or {}), target_password, compressed)

    if source is None:
        return measured(None, new(size), name=os.fsdecode(name), progress=progress)
    given = [source] if isinstance(source, str | os.PathLike | Image) else source
    if bitmaps and len(given) > 1:
        raise ValueError("bitmaps are those of one disk, not of several")
    with ExitStack() as stack:
        images = [stack.enter_context(opened_image(each, format, password)) for each in given]
        disk = one_disk(images)
        return measured(
            disk,
            new(disk.size if size is None else size),
            name=os.fsdecode(name),
            options=copying,
            bitmaps=bitmaps_to_copy(images[0], skip_broken=skip_broken_bitmaps) if bitmaps else None,
            progress=progress,
        )


def resize(
    path: str | os.PathLike[str],
    size: int | Callable[[int], int],
    *,
    format: str | None = None,  # noqa: A002 - as above
    password: bytes | None = None,
    backing: str | None = None,
    backing_formats: Sequence[str] = (),
    shrink: bool = False,
    preallocation: str = "off",
    write_base: bool = False,
) -> int:
    """Give an image that nobody uses another size, in bytes, and return the size that it has then.

    `size` may be a function of the size that the image has now. What is added reads as zeros. A smaller size needs
    `shrink`: what lies behind it is lost. A raw image needs `format`. `backing` and `backing_formats` say where and
    what the parents are, `preallocation` how what is added gets its space: "off", "full", for qcow2 and raw images
    "falloc", for qcow2 "metadata". `write_base` resizes an image that overlays lie over. The new size is durable when
    this returns; a crash before leaves the old one or the new one, or of a bare LUKS container one in between.
    Raises ImageError.
    """
    from tapfs.jobs.resize import resize_image

    options = OpenOptions(format=format, backing=backing, backing_formats=tuple(backing_formats), write_base=write_base)

    def wanted(now: int) -> int:
        return size(now) if callable(size) else size

    return resize_image(
        os.fsdecode(path), wanted, options, shrink=shrink, preallocation=preallocation, password=password
    )
