"""A file that a job writes beside images: named only when it is complete and durable, and never one of the images."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.location import locate
from tapfs.host.new_file import UnnamedFile
from tapfs.host.target import Target

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.host.file import LocalFile


@contextmanager
def output_file(
    path: str,
    images: Sequence[Image],
    *,
    overwrite: bool,
    op: str,
    at_most: int | None = None,
    instead: str = "name a file",
) -> Generator[LocalFile]:
    """The new file `path`, open and empty; when the block ends well it is durable and has its name.

    `at_most` bounds its permissions; `instead` is the remedy for what is no file. Raises ImageError; exists if there
    is such a file, unless `overwrite`, or if it is one of the images or of their parents.
    """
    with Target(locate(path)) as target:
        held = None
        if target.is_there:
            _refuse_images(path, target, images, op)
            if not overwrite:
                raise ImageError(
                    ErrorKind.EXISTS, "exists already", path=path, op=op, remedy="remove it, or say {force}"
                )
            held = _held(target, op, instead)
        with file_in_place_of(held, target, overwrite=overwrite, op=op, at_most=at_most) as file:
            yield file


@contextmanager
def file_in_place_of(
    held: LocalFile | None, target: Target, *, overwrite: bool, op: str, at_most: int | None = None
) -> Generator[LocalFile]:
    """The new file of a target, as `output_file` gives it, in place of what is held open and locked; that is closed."""
    try:
        with UnnamedFile.replaceable(target, held) as unnamed:
            if at_most is not None:
                unnamed.restrict(at_most)
            with closing(unnamed.open()) as file:
                yield file
                try:
                    os.fsync(file.descriptor)
                except OSError as error:
                    raise from_os_error(error, path=target.path, op=op) from error
                unnamed.publish(overwrite=overwrite)
    finally:
        if held is not None:
            held.close()


def _held(target: Target, op: str, instead: str) -> LocalFile:
    """The file that is to be replaced, open and locked. Raises ImageError for what is no file."""
    try:
        held = target.open()
    except ImageError as error:
        if error.kind is ErrorKind.INVALID_FORMAT:
            error.message, error.remedy = "is no regular file", instead
        raise
    if not held.is_block_device:
        return held
    held.close()
    raise ImageError(ErrorKind.UNSUPPORTED, "is a block device", path=target.path, op=op, remedy="name a file")


def _refuse_images(path: str, target: Target, images: Sequence[Image], op: str) -> None:
    if target.identity() in {file.identity for image in images for layer in image.layers for file in layer.files}:
        raise ImageError(ErrorKind.EXISTS, "is one of the images, or a parent of one", path=path, op=op)
