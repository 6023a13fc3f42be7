"""The folders in which a disk in use may open and make images, beside those of its chain.

What operators name later (swap, mirror) must lie in the folder of the image, or in one of those that
TAPFS_SANDBOX_FOLDERS names.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from tapfs.errors import ImageError
from tapfs.host.location import locate
from tapfs.host.sandbox.confinement import folder_of

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Folders, with ":" between them, in which disks in use may open and make images besides.
FOLDERS_VARIABLE = "TAPFS_SANDBOX_FOLDERS"


def folders_of_disks(images: Iterable[str]) -> tuple[str, ...]:
    """Folders in which disks in use make files: those of images that are written, and those that the user allows."""
    allowed = tuple(filter(None, os.environ.get(FOLDERS_VARIABLE, "").split(":")))
    return (*allowed, *(folder for image in images for folder in _below(image)))


def _below(image: str) -> tuple[str, ...]:
    """The folder of the image, for the overlay of a snapshot; a device has none."""
    with suppress(ImageError):
        location = locate(image)
        folder = folder_of(location.host_path)
        if location.address is None and folder != "/" and (location.in_memory or not folder.startswith("/dev")):
            return (folder,)
    return ()
