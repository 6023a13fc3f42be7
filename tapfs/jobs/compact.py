"""Compact an image: what it has in its files for nothing goes back to the host."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from tapfs.jobs.free_space import DiskSpace, FileSystemSpace, free_space
from tapfs.jobs.giving_back import GivingBack
from tapfs.jobs.progress import silent
from tapfs.records import dataclass, field

if TYPE_CHECKING:
    from tapfs.disk.image import Image


@dataclass(slots=True)
class CompactReport:
    """What was given back, or would be in a dry run.

    `file_systems`: in the order that the disk has them. `zero_bytes`: of the disk that read as zeros without the free
    blocks in them, and were in the image's files; None if zeros were not looked for. `host_bytes_before` and
    `host_bytes_after`: the image's files on their hosts, without its parents; in a dry run both are the same. `notes`:
    about the partition table.
    """

    dry_run: bool
    file_systems: list[FileSystemSpace] = field(default_factory=list[FileSystemSpace])
    zero_bytes: int | None = None
    host_bytes_before: int = 0
    host_bytes_after: int = 0
    notes: list[str] = field(default_factory=list[str])

    @property
    def given_back(self) -> int:
        """Bytes of the disk that the image had in its files and has no more."""
        return sum(each.given_back for each in self.file_systems) + (self.zero_bytes or 0)


def compact(
    image: Image,
    *,
    free: bool = True,
    zeros: bool = True,
    swap: bool = False,
    partitions: Collection[int] = (),
    sector_size: int | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CompactReport:
    """Give free blocks (`free`) and zeros (`zeros`) of an image, open for writing, back to its host.

    Every byte that a file system uses reads as before. A free byte reads as before or as zero. `partitions` and `swap`
    as for `tapfs.jobs.free_space.free_space`. A dry run looks at everything and changes nothing; the image may be
    open for reading then. Looking for zeros reads all data that the image has, without its parents.

    Everything is durable when it returns. A crash before leaves an image that reads as this docstring says.
    Raises ImageError.
    """
    space = (
        free_space(image, partitions=partitions, swap=swap, sector_size=sector_size)
        if free
        else DiskSpace(image, [], [])
    )
    report = CompactReport(dry_run, space.file_systems, notes=space.notes)
    report.host_bytes_before = report.host_bytes_after = _host_bytes(image)
    walk = GivingBack(image, space.ranges(), zeros=zeros, dry_run=dry_run)
    walk.run(progress or silent)
    report.zero_bytes = walk.zero_bytes if zeros else None
    if not dry_run:
        image.flush()
        report.host_bytes_after = _host_bytes(image)
    return report


def _host_bytes(image: Image) -> int:
    return image.layers[0].files.allocated_size()
