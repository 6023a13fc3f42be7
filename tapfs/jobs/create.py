"""Making new images.

A new file appears under its name only when it is complete and durable: until then it has no
name at all (O_TMPFILE), or a hidden one where the host has no such files. So whatever ends
the work leaves either the finished image or what was there before.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field

from tapfs.disk.chain import OpenOptions, layer_of_file, open_layer
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image_on
from tapfs.disk.probe import format_named
from tapfs.driver import MAX_DISK_BYTES, BackingReference, CreatableFormat, CreateRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.file import LocalFile
from tapfs.host.location import locate, locate_parent
from tapfs.host.unnamed_file import UnnamedFile
from tapfs.plan import Plan


@dataclass(frozen=True, slots=True)
class NewImage:
    """What to make. `size` in bytes; None takes the parent's. `options` are the -o pairs.

    `backing` is written into the image as it is given; `backing_format` only says what the
    parent is. A `password` makes an encrypted image.
    """

    format: str
    size: int | None
    backing: str | None = None
    backing_format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    password: bytes | None = None


def create_image(path: str, new: NewImage, *, overwrite: bool = False) -> None:
    """Create an empty image; raises ImageError(exists) unless `overwrite`."""
    target, plan = _planned(path, new, overwrite=overwrite)
    if _is_block_device(target):
        with new_image(path, new, overwrite=overwrite):
            return
    with UnnamedFile(path, target) as unnamed:
        with contextlib.closing(unnamed.open()) as file:
            _execute(file, path, plan)
        unnamed.publish(overwrite=overwrite)


@contextlib.contextmanager
def new_image(path: str, new: NewImage, *, overwrite: bool = False) -> Generator[Image]:
    """A new image, open for writing; when the block ends well it is complete, durable and named.

    If the block raises, or the process ends in it, nothing is left and what was there stays.
    A block device is written in place and keeps what was written. The new image reads as
    zeros (or as its parent) wherever nothing has been written to it.
    """
    target, plan = _planned(path, new, overwrite=overwrite)
    if _is_block_device(target):
        yield from _on_device(path, target, new, plan)
    else:
        yield from _as_file(path, target, new, plan, overwrite=overwrite)


def _planned(path: str, new: NewImage, *, overwrite: bool) -> tuple[str, Plan]:
    """The file to make and the plan that makes an image of it, once nothing speaks against it."""
    target = _target_path(path)
    found = format_named(new.format)
    if locate(path).in_memory != (new.format == "ram"):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "a RAM disk has the format ram and a name like ram:NAME",
            path=path,
            op="create",
        )
    if not isinstance(found, CreatableFormat):
        raise ImageError(ErrorKind.UNSUPPORTED, f"tapfs does not make {new.format} images", path=path, op="create")
    plan = found.create(_request(path, new))
    _check_replaceable(path, target, overwrite=overwrite)
    return target, plan


def _as_file(path: str, target: str, new: NewImage, plan: Plan, *, overwrite: bool) -> Iterator[Image]:
    with UnnamedFile(path, target) as unnamed:
        image = _open_filled(path, unnamed.open(), new, plan)
        try:
            yield image
        except BaseException:
            image.abandon()
            raise
        image.close()
        unnamed.publish(overwrite=overwrite)


def _on_device(path: str, target: str, new: NewImage, plan: Plan) -> Iterator[Image]:
    if new.format != "raw":
        raise ImageError(
            ErrorKind.UNSUPPORTED, f"a block device cannot hold a growing {new.format} image", path=path, op="create"
        )
    with _open_filled(path, LocalFile.open(target, writable=True), new, plan) as image:
        image.write_zeroes(0, image.size)
        yield image


def _open_filled(path: str, file: LocalFile, new: NewImage, plan: Plan) -> Image:
    """Execute the creation plan on an open file and open the image in it."""
    try:
        _execute(file, path, plan)
    except BaseException:
        file.close()
        raise
    formats = () if new.backing_format is None else (new.backing_format,)
    options = OpenOptions(format=new.format, writable=True, backing_formats=formats)
    return open_image_on(layer_of_file(path, file, options), options, password=new.password)


def _execute(file: LocalFile, path: str, plan: Plan) -> None:
    from tapfs.kernel.engine import execute_on_file  # importing this module needs no engine

    execute_on_file(file.descriptor, path, plan)


def _request(path: str, new: NewImage) -> CreateRequest:
    size = new.size
    mtime = 0
    if new.backing is not None:
        options = OpenOptions(format=new.backing_format, say_raw="say -F raw (backing_format='raw')")
        parent = open_layer(locate_parent(path, new.backing).name, options)
        mtime = parent.file.modified_seconds()
        if size is None:
            size = parent.driver.geometry.virtual_size
        parent.file.close()
    if size is None:
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, "needs a size", path=path, op="create")
    if size > MAX_DISK_BYTES:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS,
            f"a disk of {size} bytes is too large: tapfs serves at most {MAX_DISK_BYTES} bytes",
            path=path,
            op="create",
        )
    return CreateRequest(
        virtual_size=size,
        backing=None if new.backing is None else BackingReference(new.backing, new.backing_format),
        backing_mtime=mtime,
        options=new.options,
        encrypted=new.password is not None,
    )


def _target_path(path: str) -> str:
    """The file to make: behind a symbolic link the one it points to is replaced, not the link."""
    location = locate(path)
    return location.host_path if location.in_memory else os.path.realpath(path)


def _check_replaceable(path: str, target: str, *, overwrite: bool) -> None:
    """Refuse to replace what holds data (unless told to), what is in use, what is no file."""
    if not os.path.lexists(target):
        return
    with contextlib.closing(LocalFile.open(target, writable=True)) as existing:
        if not overwrite and not existing.is_block_device and existing.size() > 0:
            raise ImageError(
                ErrorKind.EXISTS, "exists and is not empty", path=path, op="create", remedy="say --force to replace it"
            )


def _is_block_device(target: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(target).st_mode)
    except OSError:
        return False
