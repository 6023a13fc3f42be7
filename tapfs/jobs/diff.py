"""Tell or write what differs between two disks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.extent import merge_runs
from tapfs.host.location import locate
from tapfs.host.new_file import UnnamedFile
from tapfs.host.target import Target
from tapfs.jobs.diff_stream import DiffWriter, RecordKind, StreamHeader
from tapfs.jobs.differences import GRANULE, Proof, differences

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.host.file import LocalFile
    from tapfs.jobs.diff_stream import Writable
    from tapfs.kernel.engine import Buffer

_CHANGES = {RecordKind.DATA: False, RecordKind.ZERO: True}


class ChangedExtent(NamedTuple):
    """A range, in bytes, in which the new disk differs from the old one; `zero`: it has zeros there."""

    offset: int
    length: int
    zero: bool

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


class DiffReport(NamedTuple):
    """The bytes of the disk that a stream has data for, that it clears, and the bytes of the stream itself."""

    data_bytes: int
    zero_bytes: int
    stream_bytes: int


def changed_extents(
    old: Image, new: Image, progress: Callable[[int, int], None] | None = None
) -> Iterator[ChangedExtent]:
    """The ranges in which the new disk differs, ascending, as few as there can be, in units of 4096 bytes.

    The disks are compared as far as the new one goes; the old one has zeros behind its end. What both take from the
    same place is not read. Raises ImageError when a disk cannot be read.
    """
    records = differences(old, new, Proof.NONE, progress)
    changes = (ChangedExtent(each.offset, each.length, _CHANGES[each.kind]) for each in records)
    return merge_runs(changes, _joined)


def write_diff(
    old: Image,
    new: Image,
    file: Writable,
    *,
    proof: Proof = Proof.SAMPLE,
    progress: Callable[[int, int], None] | None = None,
) -> DiffReport:
    """Write the stream (docs/diff-stream.md) that makes the new disk of the old one, from front to back.

    `proof`: how much of what both disks have it says, so that `apply` knows the right base. Raises ImageError when a
    disk cannot be read or the file cannot be written.
    """
    writer = DiffWriter(file, StreamHeader(old.size, new.size, GRANULE))
    sums = dict.fromkeys(RecordKind, 0)
    for record in differences(old, new, proof, progress):
        writer.put(record)
        sums[record.kind] += record.length
    writer.finish()
    return DiffReport(sums[RecordKind.DATA], sums[RecordKind.ZERO], writer.written)


def write_diff_file(
    old: Image,
    new: Image,
    path: str,
    *,
    proof: Proof = Proof.SAMPLE,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DiffReport:
    """The same into the file `path`, which has its name only when it is complete and durable.

    Raises ImageError; exists if there is such a file, unless `overwrite`, or if it is one of the images.
    """
    with Target(locate(path)) as target:
        held = None
        if target.is_there:
            _refuse_images(path, target, old, new)
            if not overwrite:
                raise ImageError(
                    ErrorKind.EXISTS,
                    "exists already",
                    path=path,
                    op="write the difference",
                    remedy="remove it, or say {force}",
                )
            held = _held(target)
        try:
            with UnnamedFile.replaceable(target, held) as unnamed, closing(unnamed.open()) as file:
                report = write_diff(old, new, _Descriptor(file.descriptor), proof=proof, progress=progress)
                try:
                    os.fsync(file.descriptor)
                except OSError as error:
                    raise from_os_error(error, path=path, op="write the difference") from error
                unnamed.publish(overwrite=overwrite)
        finally:
            if held is not None:
                held.close()
    return report


def _held(target: Target) -> LocalFile:
    """The file that is to be replaced, open and locked. Raises ImageError for what is no file."""
    try:
        held = target.open()
    except ImageError as error:
        if error.kind is ErrorKind.INVALID_FORMAT:
            error.message, error.remedy = "is no regular file", "write to standard output, and redirect that"
        raise
    if not held.is_block_device:
        return held
    held.close()
    raise ImageError(
        ErrorKind.UNSUPPORTED, "is a block device", path=target.path, op="write the difference", remedy="name a file"
    )


def _refuse_images(path: str, target: Target, *images: Image) -> None:
    if target.identity() in {file.identity for image in images for layer in image.layers for file in layer.files}:
        raise ImageError(
            ErrorKind.EXISTS, "is one of the images, or a parent of one", path=path, op="write the difference"
        )


class _Descriptor:
    """A descriptor as a file that is written from its start to its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: Buffer, /) -> int:
        """Write some of the bytes; how many."""
        return os.write(self._descriptor, data)


def _joined(left: ChangedExtent, right: ChangedExtent) -> ChangedExtent | None:
    if left.end != right.offset or left.zero != right.zero:
        return None
    return ChangedExtent(left.offset, left.length + right.length, left.zero)
