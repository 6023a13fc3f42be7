"""The free space of all file systems on a disk, each of which has been proved before anything is made of it.

What is in the free blocks of a file system matters to nobody: it was deleted, or never written. So these blocks may
be given back, if the file system's own records of them can be trusted. Where they cannot, or where it is not sure
that the partition is the file system's alone, it is left alone, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.partitions.free_space.by_type import SWAP, free_ranges
from tapfs.partitions.free_space.refusal import is_refusal
from tapfs.partitions.reader import Reader
from tapfs.records import NamedTuple, dataclass

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.partitions.table import FileSystem, Partition

#: Types of partitions whose volumes may go on in others: dynamic disks of Windows, MBR and GPT.
_DYNAMIC = frozenset({"42", "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "af9b60a0-1431-4f62-bc68-3311714a69ad"})


@dataclass(slots=True)
class FileSystemSpace:
    """One file system of a disk and its free space; sizes and offsets are bytes of the disk.

    `partition`: its number, None for a file system that fills the disk. `free`: of its own blocks. `given_back`: of
    those, what the image had in its own files and has no more (or would have no more, in a dry run). `left_alone`:
    why nothing is done with it.
    """

    partition: int | None
    type: str | None
    label: str | None
    start: int
    size: int
    free: int | None = None
    given_back: int = 0
    left_alone: str | None = None


class FreeRange(NamedTuple):
    """A free range of the disk, in bytes, and whose it is."""

    range: Range
    owner: FileSystemSpace


class DiskSpace:
    """The file systems of a disk, in the order of their places."""

    def __init__(self, image: Image, file_systems: list[FileSystemSpace], notes: list[str]) -> None:
        self._disk = Reader(image.read, image.size)
        self.file_systems = file_systems
        self.notes = notes
        for each in file_systems:
            if each.left_alone is None:
                self._prove(each)

    def ranges(self) -> Iterator[FreeRange]:
        """The free ranges of those file systems that are proved, ascending."""
        for each in sorted(self.file_systems, key=lambda space: space.start):
            if each.left_alone is None:
                yield from (FreeRange(found, each) for found in self._ranges_of(each))

    def _prove(self, space: FileSystemSpace) -> None:
        """Walk all of the free space once: only at its end do all records of it agree."""
        try:
            space.free = sum(found.length for found in self._ranges_of(space))
        except ImageError as error:
            if not is_refusal(error):
                raise
            space.left_alone = error.message

    def _ranges_of(self, space: FileSystemSpace) -> Iterator[Range]:
        window = self._disk.window(space.start, space.size)
        end = 0
        for offset, length in free_ranges(window, space.type or ""):
            if offset < end or length <= 0 or offset + length > space.size:
                raise AssertionError(f"a free range of {space.type} at {offset} is out of order")
            end = offset + length
            yield Range(space.start + offset, length)


def free_space(
    image: Image,
    *,
    partitions: Collection[int] = (),
    swap: bool = False,
    sector_size: int | None = None,
) -> DiskSpace:
    """Look for the file systems of a disk and prove the free space of each.

    `partitions`: the numbers of those that are looked at, 0 for a file system that fills the disk; empty: all.
    `swap`: swap space is free, too. `sector_size` as for `Image.contents`. Raises ImageError: not_found for a number
    that the disk has no partition of, and what the image cannot read.
    """
    contents = image.contents(sector_size=sector_size)
    found = [each for each in contents.table.partitions if not each.container]
    spaces: list[FileSystemSpace] = []
    if contents.file_system is not None:
        spaces.append(_space(None, contents.file_system, 0, image.size))
    spaces += [_space(each.number, each.file_system, each.start, each.size) for each in found]
    _require_numbers(image, spaces, partitions)
    for space in spaces:
        space.left_alone = _reason(space, contents.file_system, found, swap=swap)
    wanted = [each for each in spaces if not partitions or (each.partition or 0) in partitions]
    return DiskSpace(image, wanted, list(contents.table.notes))


def _space(number: int | None, file_system: FileSystem | None, start: int, size: int) -> FileSystemSpace:
    kind, label = (None, None) if file_system is None else (file_system.type, file_system.label)
    return FileSystemSpace(number, kind, label, start, size)


def _require_numbers(image: Image, spaces: list[FileSystemSpace], wanted: Collection[int]) -> None:
    numbers = {each.partition or 0 for each in spaces}
    for number in wanted:
        if number not in numbers:
            what = "file system over the whole disk" if number == 0 else f"partition {number}"
            raise ImageError(ErrorKind.NOT_FOUND, f"there is no {what}", path=image.path, op="compact")


def _reason(space: FileSystemSpace, whole: FileSystem | None, partitions: list[Partition], *, swap: bool) -> str | None:
    """The reason for which a file system is left alone before anybody looks into it; None if there is none."""
    if space.type is None:
        return "nothing in it shows what it is"
    if whole is not None and partitions:
        return "the disk has both a partition table and a file system over all of it, and one of them is not true"
    own = next((each for each in partitions if each.number == space.partition), None)
    if own is not None:
        others = [each.number for each in partitions if each is not own and _overlap(own, each)]
        if others:
            return f"it overlaps partition {others[0]}"
        if own.type.lower() in _DYNAMIC:
            return "it is a part of a dynamic disk of Windows, whose volumes may go on elsewhere"
    if space.type == SWAP and not swap:
        return "swap space is given back only if that is asked for"
    return None


def _overlap(left: Partition, right: Partition) -> bool:
    return left.start < right.end and right.start < left.end
