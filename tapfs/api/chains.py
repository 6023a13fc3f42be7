"""Work on a chain of images: `commit` and `rebase` of `import tapfs`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tapfs.disk.chain import OpenOptions

if TYPE_CHECKING:
    from tapfs.api.jobs import Progress
    from tapfs.jobs.commit import Committed
    from tapfs.jobs.rebase import Rebased


def commit(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word of the field
    base: str | os.PathLike[str] | None = None,
    keep: bool = False,
    backing_formats: Sequence[str] = (),
    any_parent: bool = False,
    write_base: bool = False,
    password: bytes | None = None,
    rate: int | None = None,
    progress: Progress | None = None,
) -> Committed:
    """Write what an overlay holds into its parent, or into `base` further down its chain, and empty the overlay.

    With `keep`, or a base further down, it keeps what it holds. The overlay reads the same at every moment, so a commit
    that was cut off is begun anew. `rate` bounds the bytes a second. `write_base` writes the base even if other
    overlays lie over it. Raises ImageError.
    """
    from tapfs.jobs.commit import commit_image

    options = OpenOptions(format=format, backing_formats=backing_formats, any_parent=any_parent, write_base=write_base)
    return commit_image(
        os.fsdecode(path),
        options,
        base=None if base is None else os.fsdecode(base),
        keep=keep,
        rate=rate,
        password=password,
        progress=progress,
    )


def rebase(
    path: str | os.PathLike[str],
    backing: str | None,
    *,
    format: str | None = None,  # noqa: A002 - as above
    new_formats: Sequence[str] = (),
    backing_formats: Sequence[str] = (),
    any_parent: bool = False,
    unsafe: bool = False,
    compressed: bool = False,
    password: bytes | None = None,
    progress: Progress | None = None,
) -> Rebased:
    """Have an image name another parent, or none (None), and keep its disk as it is.

    What the new parent has otherwise is written into the image first. A relative name starts at the image's folder.
    `new_formats` are those of the new parent and of its own parents, `backing_formats` those of the parents that the
    image has now, nearest first. With `unsafe` only the name changes, and no parent need be there. `compressed` packs
    what is written into the image. Raises ImageError.
    """
    from tapfs.jobs.rebase import rebase_image

    options = OpenOptions(format=format, backing_formats=backing_formats, any_parent=any_parent)
    return rebase_image(
        os.fsdecode(path),
        options,
        backing,
        backing_formats=new_formats,
        unsafe=unsafe,
        compressed=compressed,
        password=password,
        progress=progress,
    )
