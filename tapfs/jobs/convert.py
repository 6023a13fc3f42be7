"""Copy one disk into another: only data is moved, and zeros stay holes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tapfs.disk.image import Image
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.location import locate
from tapfs.jobs.copying import Baseline, Copy, CopyOptions
from tapfs.jobs.progress import silent
from tapfs.records import replace

if TYPE_CHECKING:
    from tapfs.jobs.bitmap_copy import CopiedBitmaps
    from tapfs.jobs.create import NewImage
    from tapfs.jobs.sources import Source

__all__ = ["Baseline", "CopyOptions", "convert", "convert_to_new", "refuse_own_chain"]


def convert(
    source: Source,
    target: Image,
    *,
    baseline: Baseline = Baseline.ZEROS,
    compressed: bool = False,
    options: CopyOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make `target`, open for writing and at least as large, read the same as `source`.

    What lies past the source's end reads as zeros, but is left as it is on a block device, where zeroing it may take
    as long as the device is large. `compressed` packs every granule that
    shrinks; the target must be new, without a parent or over one, and of a format that can. Everything is
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
    report = progress if progress is not None else silent
    if compressed:
        if baseline is Baseline.ANYTHING:
            message = "only a new image can be compressed"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=target.path, op="convert")
        if baseline is Baseline.PARENT:
            from tapfs.jobs.packed_differences import pack_over_parent  # few copies pack over a parent

            pack_over_parent(source, target, report, options)
            target.flush()
            return
        from tapfs.jobs.packing import copy_packed

        copy_packed(source, target, report, options)
        return
    Copy(source, target, baseline, options).run(report)
    target.flush()


def convert_to_new(
    source: Source,
    path: str,
    new: NewImage,
    *,
    compressed: bool = False,
    options: CopyOptions | None = None,
    bitmaps: CopiedBitmaps | None = None,
    verified: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Copy `source` into a new image `path`, which replaces what has that name.

    It appears under its name only when it is complete and durable; whatever ends the copy
    before leaves nothing of it, and an existing file as it was (a block device excepted). `bitmaps` go into it, too.
    `verified`: it is read back from the host's disk and compared before it has its name. Raises ImageError; exists if
    `path` is `source` or one of its parents; io if it does not read back as the source.
    """
    from tapfs.jobs.create import new_image

    new = replace(new, compressed=compressed)
    _refuse_what_packed_is_not(new, path)
    if isinstance(source, Image):
        refuse_own_chain(source, path)
    proved = partial(require_copied, source) if verified else None
    with new_image(path, new, overwrite=True, zeroed=False, proved=proved) as target:
        if bitmaps is not None:
            bitmaps.require_kept(target)
        fill_new(source, target, new, options=options, progress=progress)
        if bitmaps is not None:
            target.end_writing()
            bitmaps.into(target)


def fill_new(
    source: Source,
    target: Image,
    new: NewImage,
    *,
    options: CopyOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Copy `source` into `target`, an image that was just made as `new` says. Raises ImageError as `convert`."""
    from tapfs.jobs.create import starts_as_noise

    _refuse_what_packed_is_not(new, target.path)
    baseline = Baseline.ZEROS if new.backing is None else Baseline.PARENT
    if starts_as_noise(target):
        baseline = Baseline.ANYTHING
    packed = new.compressed or target.only_streamed
    convert(source, target, baseline=baseline, compressed=packed, options=options, progress=progress)


def require_copied(source: Source, target: Image, progress: Callable[[int, int], None] | None = None) -> None:
    """Read back what was copied into `target`, which was opened anew since, and compare it with the source.

    What the host has in memory of the target's files is given up first, so the bytes come from the disk below, as far
    as the host heeds that. What lies behind the end of the source does not count. Raises ImageError(io).
    """
    from tapfs.jobs.compare import compare
    from tapfs.jobs.sources import Part

    for file in target.layers[0].files:
        file.forget_cached()
    difference = compare(source, Part(target, 0, source.size), progress=progress)
    if difference is not None:
        raise ImageError(
            ErrorKind.IO,
            "what was written does not read back as the source",
            path=target.path,
            offset=difference.offset,
            op="verify the copy",
            remedy="do not trust this storage, or the memory of this host, before you have tested it",
        )


def _refuse_what_packed_is_not(new: NewImage, path: str) -> None:
    if new.compressed and new.password is not None:
        message = "compressed data is never encrypted in such an image"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="convert")
    wanted = new.options.get("preallocation", "off")
    if new.compressed and wanted != "off":
        message = f"compressed data takes no places that were made before it (preallocation={wanted})"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="convert", remedy="leave one of the two out")


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
