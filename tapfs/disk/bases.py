"""Keep an image that lies below overlays from being written: what changes in it would shine through them.

Whoever makes an overlay notes it on the parent (`tapfs.host.base_marks`). A note counts as long as the overlay is there
and still lies over the parent. An overlay that has got another name since is not found, so the note protects where it
can and proves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.base_marks import note_overlay, overlays_over
from tapfs.host.file import LocalFile


def refuse_written_base(
    image: LocalFile,
    files_below: Callable[[str], set[tuple[int, int]]],
    *,
    own: Collection[tuple[int, int]] = (),
) -> None:
    """Raise ImageError(read_only) if an open file is the parent of an overlay, or lies further below it.

    `files_below` finds device and inode of every file that an image's chain consists of, the image included. Overlays
    among `own`, which are files by device and inode, do not count: a commit of one writes the image.
    """
    for overlay in overlays_over(image.descriptor):
        if image.identity in files_below(overlay) and _identity(overlay) not in {image.identity, *own}:
            raise ImageError(
                ErrorKind.READ_ONLY,
                f"is the base of the overlay {overlay}, which what is written here would spoil",
                path=image.path,
                op="open",
                remedy=f"write to {overlay}, or say {{write_base}} if nobody needs that any more",
            )


def note_parent(parent: LocalFile, overlay: str) -> bool:
    """Note on an open parent that `overlay` lies over it; whether the host keeps the note.

    A parent that this process may not change keeps none.
    """
    return note_overlay(parent.descriptor, os.path.abspath(overlay))


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
