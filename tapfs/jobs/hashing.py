"""Hash a disk into a sidecar: all processors hash, what the map knows as zeros is not read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from tapfs.disk.leaves import WINDOW_BYTES, LeafDigest, Leaves, Window
from tapfs.disk.sidecar import (
    LEAST_LEAF_BYTES,
    MOST_LEAF_BYTES,
    USUAL_LEAF_BYTES,
    Hashed,
    SidecarWriter,
    leaf_size_is_possible,
)
from tapfs.disk.stamps import stamps_of
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.jobs.output_file import output_file
from tapfs.jobs.pace import Pace
from tapfs.jobs.pipeline import BufferPool, in_order, processors
from tapfs.jobs.progress import silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tapfs.disk.image import Image
    from tapfs.disk.leaves import Disk

_OP = "hash the disk"
#: Windows that wait to be taken while each thread hashes another one.
_WAITING = 2


def write_sidecar(
    image: Image,
    path: str,
    *,
    leaf_bytes: int = USUAL_LEAF_BYTES,
    overwrite: bool = False,
    rate: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Hashed:
    """Hash what a guest reads from `image` into the sidecar `path`, which has its name only when it is whole.

    `rate` bounds the bytes that are read in a second. Raises ImageError; exists if there is such a file, unless
    `overwrite`; locked if the image was changed meanwhile.
    """
    if not leaf_size_is_possible(leaf_bytes):
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            f"a leaf has a power of two from {LEAST_LEAF_BYTES} to {MOST_LEAF_BYTES} bytes, not {leaf_bytes}",
            op=_OP,
        )
    stamps = stamps_of(image)
    # Who may not read the image shall not learn from the sidecar whether it holds what he suspects.
    readable_by = stat.S_IMODE(os.fstat(image.layers[0].file.descriptor).st_mode)
    with output_file(path, [image], overwrite=overwrite, op=_OP, at_most=readable_by) as file:

        def write(offset: int, data: bytes) -> None:
            try:
                while data:
                    count = os.pwrite(file.descriptor, data, offset)
                    data, offset = data[count:], offset + count
            except OSError as error:
                raise from_os_error(error, path=path, op="write the sidecar", offset=offset) from error

        writer = SidecarWriter(image.size, leaf_bytes, stamps, write)
        try:
            os.ftruncate(file.descriptor, writer.size)
        except OSError as error:
            raise from_os_error(error, path=path, op="write the sidecar") from error
        for _, digests in hashed_windows(image, leaf_bytes, rate=rate, progress=progress):
            for leaf, digest in digests:
                writer.put(leaf, digest)
        if stamps_of(image) != stamps:
            raise ImageError(
                ErrorKind.LOCKED,
                "was changed while it was hashed, so the sidecar was not kept",
                path=image.path,
                op=_OP,
                remedy="hash it again when nobody writes to it",
            )
        return writer.finish()


def hashed_windows(
    disk: Disk,
    leaf_bytes: int,
    *,
    rate: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Window, list[LeafDigest]]]:
    """The windows of a disk in their order, each with the digests of its leaves that are not known to be zeros."""
    leaves = Leaves(disk, leaf_bytes)
    buffers = BufferPool(WINDOW_BYTES)
    report = silent if progress is None else progress
    pace = Pace(rate)

    def work(window: Window) -> tuple[Window, list[LeafDigest]]:
        if not window.ranges.count:
            return window, []
        buffer = buffers.take()
        try:
            return window, leaves.digests(window, buffer)
        finally:
            buffers.give_back(buffer)

    workers = processors()
    for window, digests in in_order(leaves.windows(0, disk.size), work, workers=workers, ahead=workers + _WAITING):
        yield window, digests
        report(window.end, disk.size)
        pace.moved(window.ranges.packed)
    report(disk.size, disk.size)
