"""Opening an image that a file object holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.disk.chain import layer_of_file
from tapfs.disk.opening import open_image_on
from tapfs.disk.password import password_missing, require_bytes
from tapfs.host.file_object import LaterFile, PositionedFile, ReadableFile, object_file

if TYPE_CHECKING:
    from tapfs.disk.chain import OpenOptions
    from tapfs.disk.image import Image


def open_object(
    source: ReadableFile | PositionedFile | LaterFile,
    options: OpenOptions,
    *,
    password: bytes | None,
    metadata_only: bool,
) -> Image:
    """The Image in a file object, read-only. Raises ImageError, TypeError for what is no binary file."""
    if options.writable or options.overlaid or options.direct:
        raise ValueError("an image in a file object is only read: writable, overlay, temporary, direct need a name")
    require_bytes(password)
    file = object_file(source)
    layer = layer_of_file(file.path, file, options)
    image = open_image_on(layer, options, password=password)
    if image.needs_password and not metadata_only:
        path = image.path
        image.close()
        raise password_missing(path)
    return image
