"""The gate: which host files may be opened because an image names them.

An image is hostile input, and it names files: its parent, its extents, its log. One gate decides for all of them. A
file that it refuses is not opened, and nothing is told of it, not even whether it exists (`tapfs.host.confine`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from tapfs.host.confine import look_up_below
from tapfs.host.file import look_up


@dataclass(frozen=True, slots=True)
class Gate:
    """What the images of one chain may name. `Gate()`, the default: parents anywhere, further files beside the image.

    `roots`: folders; with them every named file must lie in or below one of them, symbolic links resolved.
    """

    roots: tuple[str, ...] | None = None

    @classmethod
    def inside(cls, *folders: str | os.PathLike[str]) -> Self:
        """Parents and further files must lie in or below one of the folders."""
        return cls(tuple(os.fsdecode(folder) for folder in folders))

    @classmethod
    def nothing(cls) -> Self:
        """No file is opened because an image names it."""
        return cls(())

    def look_up_parent(self, path: str, *, trusted: str) -> int:
        """An O_PATH descriptor of a parent; `trusted` is the folder at the start of `path` that no image named.

        Raises ImageError: denied with op LEAVING where the gate refuses, not_found.
        """
        return look_up(path) if self.roots is None else look_up_below(path, *self.roots, trusted=trusted)

    def look_up_further(self, path: str, *, folder: str) -> int:
        """An O_PATH descriptor of a host file that an image in `folder` names; raises as `look_up_parent` does."""
        roots = (folder or ".",) if self.roots is None else self.roots
        return look_up_below(path, *roots, trusted=folder)

    def refusal(self) -> str:
        """How a message goes on that begins with a file that the gate refuses: "its file X …"."""
        if self.roots is None:
            return "lies outside the folder of the image"
        return f"lies outside {' and '.join(self.roots)}" if self.roots else "is not opened: no named file may be"


#: The gate when the user says nothing: parents anywhere, further files beside the image.
ORDINARY = Gate()
