"""Work on whole images: `create`, `check`, `repair`, `amend`, `compact`, `convert`, `compare` of `tapfs`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from tapfs.api import opening
from tapfs.disk.chain import OpenOptions
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image

if TYPE_CHECKING:
    from tapfs.extent import Range
    from tapfs.findings import CheckReport
    from tapfs.jobs.compact import CompactReport
    from tapfs.jobs.compare import Difference
    from tapfs.jobs.convert import CopyOptions

#: Called with the bytes that are done and the bytes in all.
Progress = Callable[[int, int], None]


def create(
    path: str | os.PathLike[str],
    format: str,  # noqa: A002 - the word of the field
    size: int | None = None,
    *,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    options: Mapping[str, str] | None = None,
    password: bytes | None = None,
    overwrite: bool = False,
) -> None:
    """Create an empty image of `size` bytes. It is whole and durable when this returns; a crash before leaves nothing.

    With `backing` the image is an overlay over that parent, whose size it takes where none is given. The name is
    written into the image as it is, and a relative one starts at the image's own folder. `options` are what
    `tapfs create -o` takes. A `password` makes an encrypted image. Raises ImageError: exists, unless `overwrite`,
    if there is something already.
    """
    from tapfs.jobs.create import NewImage, create_image

    parent = None if backing is None else os.fsdecode(backing)
    new = NewImage(format, size, parent, backing_format, dict(options or {}), password)
    create_image(os.fsdecode(path), new, overwrite=overwrite)


def check(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word of the field
    disk: int | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Check an image's metadata; changes nothing. Raises ImageError for what cannot be checked.

    Of a package all disks are checked, or the one with the number `disk`, and the digests that it has of its files.
    """
    from tapfs.jobs.check import check_image
    from tapfs.jobs.check_package import check_package

    name, options = os.fsdecode(path), OpenOptions(format=format, disk=disk)
    return check_package(name, options, progress=progress) or check_image(name, options, progress=progress)


def repair(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - as above
    drop_bitmaps: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Repair an image's metadata without losing guest data; the report is that of a check afterwards.

    `drop_bitmaps`: bitmaps that cannot be true are given up, and `mended` names them (qcow2).

    Each step is crash-safe: whatever interrupts it leaves an image that reads as before or better. Raises ImageError.
    """
    from tapfs.jobs.check import repair_image

    options = OpenOptions(format=format)
    return repair_image(os.fsdecode(path), options, drop_bitmaps=drop_bitmaps, progress=progress)


def amend(
    path: str | os.PathLike[str],
    options: Mapping[str, str],
    *,
    format: str | None = None,  # noqa: A002 - as above
    password: bytes | None = None,
) -> None:
    """Change options of an image that nobody uses, as `tapfs amend -o` names them; the disk reads the same.

    The image is as wanted, and durable, when this returns. A crash before leaves it as it was or as it is wanted.
    Raises ImageError(unsupported) for what the format or this image cannot be.
    """
    from tapfs.jobs.amend import amend_image

    amend_image(os.fsdecode(path), options, OpenOptions(format=format), password=password)


def compact(
    image: str | os.PathLike[str] | Image,
    *,
    format: str | None = None,  # noqa: A002 - as above
    password: bytes | None = None,
    free: bool = True,
    zeros: bool = True,
    swap: bool = False,
    partitions: Collection[int] = (),
    sector_size: int | None = None,
    dry_run: bool = False,
    write_base: bool = False,
    progress: Progress | None = None,
) -> CompactReport:
    """Give back to the host what an image has for nothing: free blocks of the file systems on it, and zeros.

    `image` is the name of an image (`format` and `password` say how it is opened) or an Image that is open for
    writing. `free`: the free blocks of ext, XFS, NTFS and FAT that were unmounted cleanly, of those `partitions` only
    that are named, of `swap` space if that is said. `zeros`: what is zeros, for which all of the image's own data is
    read. `sector_size` is as for `open_file`. A `dry_run` changes nothing. `write_base` compacts an image that overlays
    lie over. Every byte in use reads as before, a free one as before or as zero, also after a crash; all is durable
    when this returns. Raises ImageError.
    """
    from tapfs.jobs.compact import compact as give_back

    with opened_image(image, format, password, writable=not dry_run, write_base=write_base) as disk:
        return give_back(
            disk,
            free=free,
            zeros=zeros,
            swap=swap,
            partitions=partitions,
            sector_size=sector_size,
            dry_run=dry_run,
            progress=progress,
        )


def convert(
    source: str | os.PathLike[str] | Image | Sequence[str | os.PathLike[str] | Image],
    target: str | os.PathLike[str],
    *,
    target_format: str,
    format: str | None = None,  # noqa: A002 - as above
    password: bytes | None = None,
    compressed: bool = False,
    offset: int = 0,
    length: int | None = None,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    options: Mapping[str, str] | None = None,
    target_password: bytes | None = None,
    create: bool = True,
    write_base: bool = False,
    zeroed: bool = False,
    salvage: bool = False,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    verify: bool = False,
    copying: CopyOptions | None = None,
    progress: Progress | None = None,
) -> list[Range]:
    """Copy what a guest reads from `source` into the new image `target`. Zeros take no space.

    `source` is the name of an image (`format` and `password` say how it is opened), an open Image, or several of them,
    which become one disk, one behind the other. Of that disk `length` bytes from `offset` on are copied, all of them
    if nothing is said. The target appears under its name, and replaces what was there, only
    when it is complete and durable: whatever ends the copy before changes nothing, a block device excepted. With
    `backing` the target is an overlay over that parent and only what differs is written. `options` are the creation
    options of the target's format. `target_password` makes an encrypted image. Without `create` the existing disk
    `target` is overwritten (with `write_base` even if overlays lie over it), zeros included, unless it is `zeroed`, so
    that it reads as zeros before. `copying` bounds the rate and the threads, and says how zeros are looked for
    (`CopyOptions`). With `salvage` what cannot be read
    becomes zeros: the result is a list of these ranges. Of a block that the end of a cut file has left in part that
    part is read, where `source` is a name. `bitmaps` copies those of the one source into the new image,
    without the inconsistent ones if `skip_broken_bitmaps`. `verify` reads the target back from the host's disk and
    compares it, before a new one has its name. Raises ImageError.
    """
    from tapfs.jobs.bitmap_copy import bitmaps_to_copy
    from tapfs.jobs.convert import Baseline, convert_to_new, refuse_own_chain, require_copied
    from tapfs.jobs.convert import convert as copy_disk
    from tapfs.jobs.create import NewImage
    from tapfs.jobs.sources import Part, Salvaged, one_disk

    name = os.fsdecode(target)
    if bitmaps and not create:
        raise ValueError("bitmaps are copied into new images only")
    given = [source] if isinstance(source, str | os.PathLike | Image) else source
    with ExitStack() as stack:
        images = [stack.enter_context(opened_image(each, format, password, cut=salvage)) for each in given]
        for image in images:
            refuse_own_chain(image, name)
        if bitmaps and len(images) > 1:
            raise ValueError("bitmaps are those of one disk, not of several")
        disk = one_disk(images)
        if offset or length is not None:
            disk = Part(disk, offset, disk.size - offset if length is None else length)
        salvaged = Salvaged(disk)
        disk = salvaged if salvage else disk
        if create:
            new = NewImage(
                target_format,
                disk.size,
                backing=None if backing is None else os.fsdecode(backing),
                backing_format=backing_format,
                options=dict(options or {}),
                password=target_password,
            )
            copied = bitmaps_to_copy(images[0], skip_broken=skip_broken_bitmaps) if bitmaps else None
            convert_to_new(
                disk,
                name,
                new,
                compressed=compressed,
                options=copying,
                bitmaps=copied,
                verified=verify,
                progress=progress,
            )
        elif compressed or backing is not None or backing_format is not None or options:
            raise ValueError(
                "without create the target stays as it is: compressed, backing and options are for new ones"
            )
        else:
            baseline = Baseline.ZEROS if zeroed else Baseline.ANYTHING
            with opening.open(
                name, format=target_format, writable=True, password=target_password, write_base=write_base
            ) as existing:
                copy_disk(disk, existing, baseline=baseline, options=copying, progress=progress)
            if verify:
                with opening.open(name, format=target_format, password=target_password) as written:
                    require_copied(disk, written)
    return [lost for lost, _ in salvaged.lost]


def compare(
    left: str | os.PathLike[str] | Image,
    right: str | os.PathLike[str] | Image,
    *,
    left_format: str | None = None,
    right_format: str | None = None,
    password: bytes | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Difference | None:
    """The first difference between what a guest reads from two images, or None if it reads the same.

    Each is the name of an image or an open Image. Where one is longer, the rest of it must read as zeros; with `strict`
    the sizes must be equal. `password` is for both. Raises ImageError when either cannot be read.
    """
    from tapfs.jobs.compare import compare as first_difference

    with opened_image(left, left_format, password) as a, opened_image(right, right_format, password) as b:
        return first_difference(a, b, strict=strict, progress=progress)


@contextmanager
def opened_image(
    image: str | os.PathLike[str] | Image,
    format_name: str | None,
    password: bytes | None,
    *,
    writable: bool = False,
    write_base: bool = False,
    cut: bool = False,
) -> Generator[Image]:
    """An image by its name, closed afterwards, or one that is open and stays the caller's.

    `cut`: of one that is opened here what the end of its file has left is read.
    """
    if isinstance(image, Image):
        yield image
    elif cut:
        options = OpenOptions(format=format_name, cut=True)
        with open_image(os.fsdecode(image), options, password=password) as opened:
            yield opened
    else:
        with opening.open(
            image, format=format_name, password=password, writable=writable, write_base=write_base
        ) as opened:
            yield opened
