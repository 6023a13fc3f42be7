"""Tell or write what differs between two disks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tapfs.extent import merge_runs
from tapfs.jobs.diff_stream import DiffWriter, RecordKind, StreamHeader
from tapfs.jobs.differences import GRANULE, Proof, differences
from tapfs.jobs.output_file import output_file

if TYPE_CHECKING:
    from tapfs.disk.image import Image
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
    with output_file(
        path,
        (old, new),
        overwrite=overwrite,
        op="write the difference",
        instead="write to standard output, and redirect",
    ) as file:
        return write_diff(old, new, _Descriptor(file.descriptor), proof=proof, progress=progress)


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
