"""Open what a packed file holds in its place: disk.qcow2.xz is the image disk.qcow2, read-only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.disk.foreign import HEAD_BYTES, ForeignFormat, may_be_packed
from tapfs.disk.format_choice import named_format
from tapfs.disk.probe import detect
from tapfs.driver import Trait, has_trait
from tapfs.errors import ErrorKind, ImageError

if TYPE_CHECKING:
    from tapfs.host.file import LocalFile


def contents_of(file: LocalFile, named: str | None, *, writable: bool) -> LocalFile:
    """What the file holds if it is packed as a whole, else the file; it is closed on an error.

    `named` is the format that somebody has said: raw means the bytes as they are. Raises ImageError: read_only for
    who wants to write, corrupt, unsupported, no_space.
    """
    try:
        kind = _kind_of(file, named)
        if kind is None:
            return file
        if writable:
            raise ImageError(
                ErrorKind.READ_ONLY,
                f"is {kind.what}, and what it holds is only read",
                path=file.path,
                op="open",
                remedy=f"{kind.remedy}, or write to an overlay over it: {{overlay=FILE}} or {{temp}}",
            )
    except BaseException:
        file.close()
        raise
    from tapfs.host.packed.file import unpacked  # few images are packed

    return unpacked(file, kind.name)


def _kind_of(file: LocalFile, named: str | None) -> ForeignFormat | None:
    if named is not None and has_trait(named_format(named, file.path), Trait.GUESSED):
        return None
    if not may_be_packed(file.read(0, HEAD_BYTES)):
        return None
    found = detect(file)  # an Apple image may begin with packed data, and says at its end what it is
    return found if isinstance(found, ForeignFormat) and found.packed else None
