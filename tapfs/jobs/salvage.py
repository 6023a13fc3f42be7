"""Salvage: a damaged image opened by what a scan of its file finds, and what of the file no table names any more."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk import opening
from tapfs.disk.around_faults import PASSABLE
from tapfs.driver import MAX_DISK_BYTES, Salvage
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.extent import Range
from tapfs.host.file import LocalFile
from tapfs.partitions.gpt import stated_size
from tapfs.partitions.mbr import end_of_entries, read_entries
from tapfs.partitions.reader import Reader
from tapfs.records import replace

if TYPE_CHECKING:
    from tapfs.disk.chain import OpenOptions
    from tapfs.disk.image import Image

_PIECE = 1 << 20


class Salvaged(NamedTuple):
    """A damaged image that is open to be read, and what the scan of its file has found."""

    image: Image
    found: Salvage


def open_salvaged(path: str, options: OpenOptions, *, password: bytes | None = None) -> Salvaged:
    """Open an image by a scan of its file (`OpenOptions.salvage`); the file and its parents are only read.

    Where nothing says how large the disk is, its partition table may. Raises ImageError, as `open_image` does and
    :meth:`tapfs.salvage.SalvageableFormat.salvage`.
    """
    image = opening.open_image(path, options, password=password)
    found = _found(image)
    if not found.size_guessed or options.salvage is None:
        return Salvaged(image, found)
    try:
        told = _told_size(image)
    except BaseException:
        image.close()
        raise
    reason = "nothing says it, so that it ends with its last data"
    if told > image.size:
        image.close()
        sized = options.salvage._replace(virtual_size=told)  # the L1 table that is made is longer
        image = opening.open_image(path, replace(options, salvage=sized), password=password)
        found = _found(image)
        reason = "its partition table says so"
    return Salvaged(image, found._replace(doubts=(*found.doubts, f"the disk is taken as {image.size} bytes: {reason}")))


def copy_unplaced(image: LocalFile, ranges: Sequence[Range], target: LocalFile) -> int:
    """Write ranges of an image's file behind each other into an empty file; the bytes that it has then."""
    at = 0
    for start, length in ranges:
        for offset in range(start, start + length, _PIECE):
            data = image.read(offset, min(_PIECE, start + length - offset))
            try:
                while data:
                    written = os.pwrite(target.descriptor, data, at)
                    data, at = data[written:], at + written
            except OSError as error:
                raise from_os_error(error, path=target.path, op="write what no table names") from error
    return at


def _found(image: Image) -> Salvage:
    found = image.layers[0].files.salvage
    assert found is not None  # noqa: S101  it was asked for
    return found


def _told_size(image: Image) -> int:
    """The size of a disk that its partition table says; 0 where it says none, or none that can be."""
    disk = Reader(image.read, image.size)
    sizes = (_attempt(lambda: stated_size(disk)), _attempt(lambda: end_of_entries(read_entries(disk, 0) or [])))
    return max(size if size <= MAX_DISK_BYTES else 0 for size in sizes)


def _attempt(look: Callable[[], int]) -> int:
    try:
        return look()
    except ImageError as error:
        if error.kind not in {*PASSABLE, ErrorKind.IO}:
            raise
        return 0
