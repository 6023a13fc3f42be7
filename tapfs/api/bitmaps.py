"""The bitmaps of what has changed in an image, for `import tapfs`: list, read and change them.

A change is of an image that nobody uses. After a crash a bitmap says what it said or what it is to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tapfs.disk.chain import OpenOptions

if TYPE_CHECKING:
    from tapfs.edit_protocols import Bitmap
    from tapfs.jobs.bitmaps import ReadBitmap

Path = str | os.PathLike[str]


def bitmaps(path: Path, *, format: str | None = None) -> Sequence[Bitmap]:  # noqa: A002 - the word of the field
    """The bitmaps that an image keeps, in its order. Raises ImageError."""
    from tapfs.jobs import bitmaps as jobs

    return jobs.list_bitmaps(os.fsdecode(path), OpenOptions(format=format))


def read_bitmap(
    path: Path,
    name: str,
    *,
    format: str | None = None,  # noqa: A002 - as above
) -> AbstractContextManager[ReadBitmap]:
    """For a `with` block: a bitmap, the size of its disk, and the ranges that it marks, ascending and merged.

    Raises ImageError(not_found), (corrupt) where it is inconsistent.
    """
    from tapfs.jobs import bitmaps as jobs

    return jobs.read_bitmap(os.fsdecode(path), name, OpenOptions(format=format))


def add_bitmap(
    path: Path,
    name: str,
    *,
    granularity: int | None = None,
    enabled: bool = True,
    format: str | None = None,  # noqa: A002 - as above
) -> None:
    """Keep a new bitmap that marks nothing. `granularity`: bytes of the disk for each bit. Raises ImageError."""
    from tapfs.jobs import bitmaps as jobs

    jobs.add_bitmap(os.fsdecode(path), name, granularity, OpenOptions(format=format), enabled=enabled)


def remove_bitmap(path: Path, name: str, *, format: str | None = None) -> None:  # noqa: A002 - as above
    """Forget a bitmap, which may be inconsistent. Raises ImageError."""
    from tapfs.jobs import bitmaps as jobs

    jobs.remove_bitmap(os.fsdecode(path), name, OpenOptions(format=format))


def clear_bitmap(path: Path, name: str, *, format: str | None = None) -> None:  # noqa: A002 - as above
    """Have a bitmap mark nothing. Raises ImageError."""
    store_bitmap(path, name, (), format=format)


def enable_bitmap(path: Path, name: str, *, format: str | None = None) -> None:  # noqa: A002 - as above
    """Have a bitmap note what is written from now on. Raises ImageError."""
    from tapfs.jobs import bitmaps as jobs

    jobs.enable_bitmap(os.fsdecode(path), name, OpenOptions(format=format), enabled=True)


def disable_bitmap(path: Path, name: str, *, format: str | None = None) -> None:  # noqa: A002 - as above
    """Have a bitmap stay as it is, whatever is written. Raises ImageError."""
    from tapfs.jobs import bitmaps as jobs

    jobs.enable_bitmap(os.fsdecode(path), name, OpenOptions(format=format), enabled=False)


def store_bitmap(
    path: Path,
    name: str,
    ranges: Iterable[tuple[int, int]],
    *,
    format: str | None = None,  # noqa: A002 - as above
) -> None:
    """Have a bitmap mark these ``(offset, length)`` and no others, in whole pieces. Raises ImageError."""
    from tapfs.jobs import bitmaps as jobs

    jobs.store_bitmap(os.fsdecode(path), name, ranges, OpenOptions(format=format))


def merge_bitmap(
    path: Path,
    name: str,
    source: str,
    *,
    source_path: Path | None = None,
    format: str | None = None,  # noqa: A002 - as above
    source_format: str | None = None,
) -> None:
    """Have a bitmap also mark what the bitmap `source` marks, of the same image or of that at `source_path`.

    Raises ImageError.
    """
    from tapfs.jobs import bitmaps as jobs

    jobs.merge_bitmap(
        os.fsdecode(path),
        name,
        source,
        OpenOptions(format=format),
        source_path=None if source_path is None else os.fsdecode(source_path),
        source_options=OpenOptions(format=source_format),
    )
