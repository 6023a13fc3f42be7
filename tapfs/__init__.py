"""tapfs: disk images served from userspace.

``with tapfs.open("image.qcow") as disk: disk.read(0, 512)`` opens any image of a known format
with its whole backing chain; `open_async` is the same under trio. Errors are `ImageError`.
"""

from __future__ import annotations

#: Type checkers take this name for true. Its owner, `typing`, takes longer to load than Ctrl-C to come.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from tapfs.disk.async_image import AsyncImage, open_async
    from tapfs.disk.chain_map import MappedExtent
    from tapfs.disk.image import Image
    from tapfs.errors import ErrorKind, ImageError
    from tapfs.findings import CheckReport
    from tapfs.host.gate import Gate
    from tapfs.jobs.create import NewImage, create_image

__all__ = [
    "AsyncImage",
    "CheckReport",
    "ErrorKind",
    "Gate",
    "Image",
    "ImageError",
    "MappedExtent",
    "NewImage",
    "check",
    "create_image",
    "open",
    "open_async",
    "repair",
]

#: What is loaded when it is first asked for: importing tapfs costs next to nothing.
_LAZY = {
    "AsyncImage": "tapfs.disk.async_image",
    "ErrorKind": "tapfs.errors",
    "CheckReport": "tapfs.findings",
    "Gate": "tapfs.host.gate",
    "Image": "tapfs.disk.image",
    "ImageError": "tapfs.errors",
    "MappedExtent": "tapfs.disk.chain_map",
    "NewImage": "tapfs.jobs.create",
    "create_image": "tapfs.jobs.create",
    "open_async": "tapfs.disk.async_image",
}


def open(  # noqa: A001 - `tapfs.open` is the name one expects
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word of the field
    writable: bool = False,
    password: bytes | None = None,
    backing: str | None = None,
    backing_formats: Sequence[str] = (),
    backing_root: str | None = None,
    gate: Gate | None = None,
    direct: bool = False,
    shared: bool = False,
    metadata_only: bool = False,
    overlay: str | os.PathLike[str] | None = None,
    temporary: bool = False,
) -> Image:
    """Open an image and its backing chain.

    `format` is probed if None; a raw image must be named to be writable. `password` unlocks
    encrypted images. `backing` replaces the parent that the image names, `backing_formats` say
    what the parents are (nearest first), `backing_root` is a directory that they must lie in,
    with every other file that the image names; `gate` says it in full (`tapfs.Gate`).
    `direct` moves guest data past the host's page cache. `shared` neither refuses other users
    of the files nor is refused. `metadata_only` opens an encrypted image without its password.
    `overlay` is a file that takes all writes, made if it is not there; with `temporary` a file
    without name does, which is gone at the end. Either way the disk is writable, of whatever
    format it is, and the image itself stays as it is.
    Raises ImageError.
    """
    from tapfs.disk.chain import OpenOptions  # lazy, see above
    from tapfs.disk.opening import open_image
    from tapfs.host.gate import Gate
    from tapfs.host.lock import Sharing

    options = OpenOptions(
        format=format,
        writable=writable,
        backing=backing,
        backing_formats=backing_formats,
        gate=gate or (Gate() if backing_root is None else Gate.inside(backing_root)),
        direct=direct,
        sharing=Sharing.ANYBODY if shared else Sharing.ALONE,
        overlay=None if overlay is None else _text(overlay),
        temporary=temporary,
    )
    return open_image(_text(path), options, password=password, metadata_only=metadata_only)


def check(path: str | os.PathLike[str], *, format: str | None = None) -> CheckReport:  # noqa: A002 - as above
    """Check an image's metadata; changes nothing."""
    from tapfs.disk.chain import OpenOptions
    from tapfs.jobs.check import check_image

    return check_image(_text(path), OpenOptions(format=format))


def repair(path: str | os.PathLike[str], *, format: str | None = None) -> CheckReport:  # noqa: A002 - as above
    """Repair an image's metadata, crash-safe and without losing guest data; check it again."""
    from tapfs.disk.chain import OpenOptions
    from tapfs.jobs.check import repair_image

    return repair_image(_text(path), OpenOptions(format=format))


def _text(path: str | os.PathLike[str]) -> str:
    import os

    return os.fsdecode(path)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tapfs' has no attribute {name!r}")
