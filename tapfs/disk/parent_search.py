"""The search for a parent that its child names by an identity and not by a file.

The images of a few folders are asked what they are. Nothing below these folders is looked at, and no symbolic link. The
gate (`tapfs.host.gate`) judges each file as if the child had named it. Two files that answer alike are a choice that
only the user can make.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from tapfs.driver import BackingReference, Identified, ParentSearch
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.location import Location, file_name

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer

#: At most so many files of a folder are looked at.
_MAX_FILES = 4096


def sought_parent(
    child: str,
    reference: BackingReference,
    search: ParentSearch,
    folders: Sequence[str],
    open_image: Callable[[Location], Layer],
    *,
    op: str,
) -> Location:
    """Where the image is that has the identity of the search; its format is known then.

    `folders` are those that the user names. `open_image` opens a file as an image by itself, and raises ImageError.
    Raises ImageError: not_found, and invalid_argument where several files have the identity.
    """
    own = os.path.dirname(child)
    searched = [*(os.path.normpath(os.path.join(own, folder)) for folder in search.folders), *folders]
    found: dict[tuple[int, int], tuple[Location, bool]] = {}
    for location in _files_in(searched):
        identity = location.identity()
        if identity is None or identity in found:
            continue
        try:
            layer = open_image(location)
        except ImageError:
            continue
        layer.close()
        if isinstance(layer.driver, Identified) and search.identity in layer.driver.identities:
            exact = reference.identity in layer.driver.identities
            found[identity] = location.known_as(layer.driver.format_name), exact
    if not found:
        raise ImageError(
            ErrorKind.NOT_FOUND,
            f"its parent, the image {search.identity}, is not in {', '.join(dict.fromkeys(searched))}",
            path=child,
            op=op,
            remedy="name the folder that it is in with {parent_folder=DIR}",
        )
    # A copy of the parent that was changed since has another identity beside the one that is sought.
    fitting = [location for location, exact in found.values() if exact or len(found) == 1]
    if len(fitting) != 1:
        names = " or ".join(sorted(location.name for location, _ in found.values()))
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            f"its parent, the image {search.identity}, may be {names}",
            path=child,
            op=op,
            remedy="name the right one with {backing=FILE}, or move the others away",
        )
    return fitting[0]


def _files_in(folders: Sequence[str]) -> Iterator[Location]:
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in islice(entries, _MAX_FILES) if entry.is_file(follow_symlinks=False)]
        except OSError:
            continue
        for name in sorted(names):
            path = file_name(os.path.join(folder, name))
            yield Location(path, path, trusted=folder)
