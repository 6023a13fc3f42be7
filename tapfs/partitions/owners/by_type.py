"""The owners of ranges in a file system of a type: which reader is asked, and what no file has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tapfs.extent import Range, without
from tapfs.partitions.owners.ext import ext_owners
from tapfs.partitions.owners.fat import fat_owners
from tapfs.partitions.owners.ntfs import ntfs_owners
from tapfs.partitions.owners.search import Owner, Search
from tapfs.partitions.owners.xfs import xfs_owners
from tapfs.partitions.reader import Reader

_READERS: dict[str, Callable[[Search], None]] = {
    "ext2": ext_owners,
    "ext3": ext_owners,
    "ext4": ext_owners,
    "xfs": xfs_owners,
    "ntfs": ntfs_owners,
    "vfat": fat_owners,
    "exfat": fat_owners,
}


class Owners(NamedTuple):
    """What lies in the ranges; `unowned`: what no file and no known record has; `notes`: what was not understood."""

    owners: list[Owner]
    unowned: list[Range]
    notes: list[str]


def owners_of(disk: Reader, type_name: str, wanted: Sequence[Range]) -> Owners:
    """The owners of ranges of a partition, which ascend and do not overlap, in bytes of the partition.

    The file system may be damaged or in use: what it says is then as good as it is. Raises the ImageError of the disk
    but for io and corrupt, which become notes.
    """
    reader = _READERS.get(type_name)
    if reader is None:
        return Owners([], list(wanted), [f"tapfs does not read the files of {type_name}"])
    search = Search(disk, wanted)
    reader(search)
    found = search.owners()
    taken: list[Range] = []
    for each in sorted(owner.range for owner in found):
        if taken and each.offset <= taken[-1].end:
            last = taken.pop()
            each = Range(last.offset, max(last.end, each.end) - last.offset)  # noqa: PLW2901  joined with its neighbour
        taken.append(each)
    return Owners(found, list(without(wanted, taken)), search.notes)
