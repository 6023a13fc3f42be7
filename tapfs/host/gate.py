"""The gate: which host files may be opened because an image names them.

An image is hostile input, and it names files: its parent, its extents, its log. One gate decides for all of them. A
file that it refuses is not opened, and nothing is told of it, not even whether it exists (`tapfs.host.confine`).
"""

from __future__ import annotations

import os
from typing import Self

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.confine import LEAVING, look_up_below
from tapfs.host.file import look_up
from tapfs.host.remote.address import Address
from tapfs.records import dataclass


@dataclass(frozen=True, slots=True)
class Gate:
    """What the images of one chain may name. `Gate()`, the default: parents anywhere, further files beside the image.

    `roots`: folders; with them every named file must lie in or below one of them, symbolic links resolved. A root may
    be an address: nothing elsewhere is opened because an image names it, unless it lies below such a root.
    """

    roots: tuple[str, ...] | None = None

    @classmethod
    def inside(cls, *folders: str | os.PathLike[str]) -> Self:
        """Parents and further files must lie in or below one of the folders, or addresses."""
        return cls(tuple(os.fsdecode(folder) for folder in folders))

    @classmethod
    def nothing(cls) -> Self:
        """No file is opened because an image names it."""
        return cls(())

    def absolute(self) -> Gate:
        """The same from any folder."""
        if self.roots is None:
            return self
        return Gate(tuple(root if Address.parse(root) is not None else os.path.abspath(root) for root in self.roots))

    def look_up_parent(self, path: str, *, trusted: str) -> int:
        """An O_PATH descriptor of a parent; `trusted` is the folder at the start of `path` that no image named.

        Raises ImageError: denied with op LEAVING where the gate refuses, not_found.
        """
        return look_up(path) if self.roots is None else look_up_below(path, *self._folders, trusted=trusted)

    def look_up_further(self, path: str, *, folder: str) -> int:
        """An O_PATH descriptor of a host file that an image in `folder` names; raises as `look_up_parent` does."""
        roots = (folder or ".",) if self.roots is None else self._folders
        return look_up_below(path, *roots, trusted=folder)

    def judge_address(self, address: Address) -> None:
        """Raise ImageError(denied) with op LEAVING for an address that an image may not name."""
        if not any(root is not None and address.lies_below(root) for root in map(Address.parse, self.roots or ())):
            raise ImageError(ErrorKind.DENIED, self.refusal(address), path=str(address), op=LEAVING)

    @property
    def _folders(self) -> tuple[str, ...]:
        return tuple(root for root in self.roots or () if Address.parse(root) is None)

    def refusal(self, address: Address | None = None) -> str:
        """How a message goes on that begins with a file or address that the gate refuses: "its file X …"."""
        if address is not None and not self.roots:
            return "lies elsewhere, and nothing there is opened because an image names it"
        if self.roots is None:
            return "lies outside the folder of the image"
        return f"lies outside {' and '.join(self.roots)}" if self.roots else "is not opened: no named file may be"


#: The gate when the user says nothing: parents anywhere, further files beside the image.
ORDINARY = Gate()
