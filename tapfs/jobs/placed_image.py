"""Make a new image in files in memory that take its metadata and none of the guest's bytes."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from tapfs.disk.placed_writes import PlacedImage, execute_without_space
from tapfs.disk.probe import format_named
from tapfs.driver import CreatableFormat, MultiFileFormat, Trait, has_trait
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.file import LocalFile
from tapfs.jobs.create import create_request, files_of_image, open_created

if TYPE_CHECKING:
    from tapfs.jobs.create import NewImage

_Placed = TypeVar("_Placed", bound=PlacedImage)


@contextmanager
def placed_image(name: str, new: NewImage, kind: type[_Placed], op: str) -> Generator[_Placed]:
    """The new image, empty, to be filled and looked at; `kind` is the class of it, `op` stands in errors.

    `name` is what the image is called in itself, and where a relative `backing` starts. Raises ImageError as
    `tapfs.jobs.create.create_image` does.
    """
    found = format_named(new.format)
    if not isinstance(found, CreatableFormat):
        raise ImageError(ErrorKind.UNSUPPORTED, f"tapfs does not make {new.format} images", op=op)
    if has_trait(found, Trait.IN_MEMORY):
        raise ImageError(ErrorKind.UNSUPPORTED, "a RAM disk is no file that has a length", op=op)
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
    image = open_created(name, new, files, kind)
    try:
        yield image
    finally:
        image.abandon()


def _in_memory(name: str) -> LocalFile:
    return LocalFile(name, os.memfd_create("tapfs-placed", os.MFD_CLOEXEC), writable=True)
