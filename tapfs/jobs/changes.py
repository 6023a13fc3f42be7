"""The ranges of a disk that the images above a snapshot hold: all that can have changed since the snapshot.

The maps say it, so no data is read, and it costs what the images above the snapshot hold. What was written with what it
was before is in it. `tapfs.jobs.differences` looks at the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk.commit_layers import depth_in_chain
from tapfs.extent import merge_runs

if TYPE_CHECKING:
    from tapfs.disk.image import Image


class ChangedRange(NamedTuple):
    """``[offset, offset + length)`` of the disk; `zero`: it reads as zeros now."""

    offset: int
    length: int
    zero: bool


def changed_since(image: Image, snapshot: str | None) -> Iterator[ChangedRange]:
    """The ranges that may differ from `snapshot`, an image of the chain; None: the parent. They ascend, joined.

    Raises ImageError: unsupported (no parent), invalid_argument (the snapshot is not in the chain).
    """
    depth = depth_in_chain(image.layers, snapshot, op="look for changes")
    found = (
        ChangedRange(extent.offset, extent.length, extent.zero) for extent in image.extents() if extent.depth < depth
    )
    return merge_runs(found, _joined)


def _joined(left: ChangedRange, right: ChangedRange) -> ChangedRange | None:
    if left.offset + left.length != right.offset or left.zero != right.zero:
        return None
    return left._replace(length=left.length + right.length)
