"""Making new images.

A new file appears under its name only when it is complete and durable: until then it has no
name at all (O_TMPFILE), or a hidden one where the host has no such files. So whatever ends
the work leaves either the finished image or what was there before.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tapfs.disk.chain import OpenOptions, layer_of_files, open_layer
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image_on
from tapfs.disk.password import require_bytes
from tapfs.disk.probe import format_named
from tapfs.driver import MAX_DISK_BYTES, BackingReference, CreatableFormat, CreateRequest, MultiFileFormat
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.file import LocalFile
from tapfs.host.files import LocalFiles
from tapfs.host.location import locate, locate_parent
from tapfs.host.new_files import NewFiles
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

    def __post_init__(self) -> None:
        require_bytes(self.password)


def create_image(path: str, new: NewImage, *, overwrite: bool = False) -> None:
    """Create an empty image; raises ImageError(exists) unless `overwrite`."""
    planned = _planned(path, new, overwrite=overwrite)
    if _is_block_device(planned.target):
        with new_image(path, new, overwrite=overwrite):
            return
    with NewFiles(path, planned.target, planned.further) as unnamed:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(contextlib.closing(file)) for file in unnamed.open()]
            _execute(files, planned.plan)
        unnamed.publish(overwrite=overwrite)


@contextlib.contextmanager
def new_image(path: str, new: NewImage, *, overwrite: bool = False) -> Generator[Image]:
    """A new image, open for writing; when the block ends well it is complete, durable and named.

    If the block raises, or the process ends in it, nothing is left and what was there stays.
    A block device is written in place and keeps what was written. The new image reads as
    zeros (or as its parent) wherever nothing has been written to it.
    """
    planned = _planned(path, new, overwrite=overwrite)
    if _is_block_device(planned.target):
        yield from _on_device(path, new, planned)
    else:
        yield from _as_files(path, new, planned, overwrite=overwrite)


class _Planned(NamedTuple):
    """The file to make, the names of the files beside it that belong to the image, and the plan that fills them."""

    target: str
    further: tuple[str, ...]
    plan: Plan


def _planned(path: str, new: NewImage, *, overwrite: bool) -> _Planned:
    """What to make, once nothing speaks against it."""
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
    request = _request(path, new)
    plan = found.create(request)
    further = tuple(found.further_names(request)) if isinstance(found, MultiFileFormat) else ()
    for name in (target, *(os.path.join(os.path.dirname(target), name) for name in further)):
        _check_replaceable(path, name, overwrite=overwrite)
    return _Planned(target, further, plan)


def _as_files(path: str, new: NewImage, planned: _Planned, *, overwrite: bool) -> Iterator[Image]:
    with NewFiles(path, planned.target, planned.further) as unnamed:
        image = _open_filled(path, unnamed.open(), new, planned)
        try:
            yield image
        except BaseException:
            image.abandon()
            raise
        image.close()
        unnamed.publish(overwrite=overwrite)


def _on_device(path: str, new: NewImage, planned: _Planned) -> Iterator[Image]:
    if new.format != "raw":
        raise ImageError(
            ErrorKind.UNSUPPORTED, f"a block device cannot hold a growing {new.format} image", path=path, op="create"
        )
    with _open_filled(path, [LocalFile.open(planned.target, writable=True)], new, planned) as image:
        image.write_zeroes(0, image.size)
        yield image


def _open_filled(path: str, opened: Sequence[LocalFile], new: NewImage, planned: _Planned) -> Image:
    """Execute the creation plan on open files and open the image in them."""
    image, *further = opened
    files = LocalFiles(image, given=dict(zip(planned.further, further, strict=True)))
    try:
        _execute(opened, planned.plan)
    except BaseException:
        files.close()
        raise
    formats = () if new.backing_format is None else (new.backing_format,)
    options = OpenOptions(format=new.format, writable=True, backing_formats=formats)
    return open_image_on(layer_of_files(path, files, options), options, password=new.password)


def _execute(files: Sequence[LocalFile], plan: Plan) -> None:
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # importing this module needs no engine

    execute_on_files([HostDescriptor(file.descriptor, file.path, writable=True) for file in files], plan)


def _request(path: str, new: NewImage) -> CreateRequest:
    size = new.size
    mtime = 0
    if new.backing is not None:
        options = OpenOptions(format=new.backing_format, say_raw="say {parent_format=raw}")
        parent = open_layer(locate_parent(path, new.backing).name, options)
        mtime = parent.file.modified_seconds()
        if size is None:
            size = parent.driver.geometry.virtual_size
        parent.close()
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
        name=os.path.basename(path),
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
                ErrorKind.EXISTS, "exists and is not empty", path=path, op="create", remedy="say {force} to replace it"
            )


def _is_block_device(target: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(target).st_mode)
    except OSError:
        return False
