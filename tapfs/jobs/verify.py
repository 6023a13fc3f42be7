"""Verify a disk against its sidecar: find the ranges that are not what was hashed, and tell damage from change."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk.leaves import differing_leaves, ranges_of_leaves
from tapfs.disk.stamps import stamps_of, unchanged
from tapfs.extent import Range
from tapfs.jobs.hashing import hashed_windows
from tapfs.jobs.sources import Part, Salvaged

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.disk.sidecar import Sidecar
    from tapfs.errors import ImageError
    from tapfs.jobs.sources import Source


class Verdict(Enum):
    """What a verification has found."""

    #: A guest reads what was hashed.
    SAME = "same"
    #: It does not, and nobody has written to the files since.
    DAMAGED = "damaged"
    #: It does not, and the files were written since, or do not tell.
    CHANGED = "changed"


class Verification(NamedTuple):
    """The result: the ranges of the disk that are not what was hashed, ascending, neighbours joined.

    `unreadable` are those of them that could not be read, with the first error each. `untouched`: the files of the
    image are as they were when it was hashed, as far as their stamps tell.
    """

    verdict: Verdict
    differing: list[Range]
    unreadable: list[tuple[Range, ImageError]]
    disk_bytes: int
    untouched: bool


def verify(
    image: Image,
    sidecar: Sidecar,
    *,
    rate: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Read all of the disk that holds data, and compare it with the sidecar.

    Disks of different sizes are compared as far as both go; the rest differs. `rate` bounds the bytes that are read in
    a second. Raises ImageError where the sidecar is damaged.
    """
    hashed = sidecar.hashed
    size = hashed.leaf_bytes
    source = Salvaged(image)
    both = image.size
    if image.size != hashed.disk_bytes:
        both = min(image.size, hashed.disk_bytes) // size * size
    # A disk that is cut short ends at a leaf, so that each leaf is as long as it was.
    compared: Source = source if both == image.size else Part(source, 0, both)
    leaves: list[int] = []
    for window, digests in hashed_windows(compared, size, rate=rate, progress=progress):
        leaves += differing_leaves(sidecar, window, digests)
    unreadable = source.lost
    lost = {leaf for found, _ in unreadable for leaf in range(found.offset // size, -(-found.end // size))}
    differing = ranges_of_leaves(sorted(lost.union(leaves)), size, both)
    if image.size != hashed.disk_bytes:
        differing.append(Range(both, max(image.size, hashed.disk_bytes) - both))
    untouched = unchanged(hashed.stamps, stamps_of(image))
    verdict = Verdict.SAME
    if differing:
        verdict = Verdict.DAMAGED if untouched else Verdict.CHANGED
    return Verification(verdict, differing, unreadable, image.size, untouched)
