"""The snapshots inside an image, for `import tapfs`: list, create, apply and delete them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tapfs.disk.chain import OpenOptions

if TYPE_CHECKING:
    from tapfs.driver import SnapshotRecord


def snapshots(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word of the field
) -> Sequence[SnapshotRecord]:
    """The snapshots that an image keeps beside its current disk, in its order. Raises ImageError."""
    from tapfs.jobs.snapshots import list_snapshots

    return list_snapshots(os.fsdecode(path), OpenOptions(format=format))


def create_snapshot(
    path: str | os.PathLike[str],
    name: str,
    *,
    format: str | None = None,  # noqa: A002 - as above
) -> None:
    """Keep the disk of an image that nobody uses as it is now, under `name`. Raises ImageError.

    After a crash the image reads as it did, with the snapshot or without.
    """
    from tapfs.jobs import snapshots as jobs

    jobs.create_snapshot(os.fsdecode(path), name, OpenOptions(format=format))


def apply_snapshot(
    path: str | os.PathLike[str],
    name: str,
    *,
    format: str | None = None,  # noqa: A002 - as above
    write_base: bool = False,
) -> None:
    """Make the current disk what the snapshot with that name or id holds. What it held before is lost.

    The disk also gets the size that it had then. After a crash it is the one disk or the other. `write_base` does it
    even if overlays lie over the image. Raises ImageError.
    """
    from tapfs.jobs import snapshots as jobs

    jobs.apply_snapshot(os.fsdecode(path), name, OpenOptions(format=format, write_base=write_base))


def delete_snapshot(
    path: str | os.PathLike[str],
    name: str,
    *,
    format: str | None = None,  # noqa: A002 - as above
) -> None:
    """Forget the snapshot with that name or id; what only it refers to is free. Raises ImageError."""
    from tapfs.jobs import snapshots as jobs

    jobs.delete_snapshot(os.fsdecode(path), name, OpenOptions(format=format))
