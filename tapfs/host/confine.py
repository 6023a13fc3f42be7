"""Look up a file below a folder without a look at anything outside, and without telling what is there.

An image says where its backing file is, and an image is hostile input. With a root, no component of that name outside
the root is looked at, except symbolic links beside the way to the root. So the answer is the same whether or not
something is outside, and no device or fifo there is opened.
"""

from __future__ import annotations

import errno
import os

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.walk import Step, path_of, walk

#: `op` of the error that says that a name leads outside.
LEAVING = "stay below the root"


def look_up_below(path: str, *roots: str, trusted: str = "") -> int:
    """An O_PATH descriptor of the file `path`, which lies below one of the folders `roots`; the file is not opened.

    `trusted` is the part of the path, a folder, that does not come from an image. Raises ImageError: denied with op
    LEAVING whatever lies outside, and not_found where something is missing inside.
    """
    real_roots = [os.path.realpath(root) for root in roots]

    def judge(step: Step) -> None:
        folder = path_of(step.folder)
        entry = os.path.join(folder, step.name)
        for root in real_roots:
            on_the_way = _is_below(root, entry)
            link_beside_the_way = step.is_link and _is_below(root, folder)
            if _is_below(entry, root) or on_the_way or link_beside_the_way:
                return
        raise ImageError(ErrorKind.DENIED, f"lies outside {' and '.join(roots)}", path=path, op=LEAVING)

    try:
        base, rest = _split(path, (trusted, *map(os.path.abspath, roots)))
        place = walk(rest, judge, base=base)
    except OSError as error:
        raise from_os_error(error, path=path, op="open the image") from error
    except ValueError as error:
        raise ImageError(ErrorKind.NOT_FOUND, f"is no file name: {error}", path=repr(path), op="open") from error
    os.close(place.folder)
    if place.entry is None:
        raise from_os_error(FileNotFoundError(errno.ENOENT, ""), path=path, op="open the image")
    return place.entry


def _split(path: str, folders: tuple[str, ...]) -> tuple[str, str]:
    """The first of the folders that the path begins with, and the rest of the path."""
    for folder in folders:
        if folder and path.startswith(f"{folder}/"):
            return folder, path[len(folder) :].lstrip("/")
    return ".", path


def _is_below(path: str, folder: str) -> bool:
    """Whether an absolute path without links is the folder or lies below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")
