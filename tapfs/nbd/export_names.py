"""The names of the exports of an NBD server, as the command line gives them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tapfs.errors import ErrorKind, ImageError, printable
from tapfs.nbd.messages import MAX_STRING


def export_names(names: Sequence[str], images: Sequence[str]) -> list[str]:
    """The names of the exports: those that were given, then that of the image's file; one alone has none.

    Raises ImageError(invalid_argument).
    """
    if len(names) > len(images):
        raise _wrong(f"{len(names)} names were given for {len(images)} disks")
    found = [*names, *(os.path.basename(image) for image in images[len(names) :])]
    if len(images) == 1 and not names:
        return [""]
    for name in found:
        if len(name.encode(errors="surrogateescape")) > MAX_STRING or "\0" in name or printable(name) != name:
            raise _wrong(f"{name[:80]!r} cannot be the name of an export")
        if found.count(name) > 1:
            raise _wrong(f"two exports would have the name {name!r}; give each a name of its own")
    return found


def _wrong(message: str) -> ImageError:
    return ImageError(ErrorKind.INVALID_ARGUMENT, message, op="serve")
