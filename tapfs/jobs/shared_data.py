"""Two chains side by side by their maps: where both have zeros, where both have the same bytes, and the rest.

What both disks take from one place needs no look at the bytes. That is a run of one image that both chains have, at one
offset of the disk, and a run of one host file at one offset, as internal snapshots have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from tapfs.extent import Range, merge_runs

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer
    from tapfs.disk.chain_map import MappedExtent
    from tapfs.disk.image import Image


class Likeness(Enum):
    """What the maps of two disks say of a range."""

    ZEROS = "zeros"
    SAME = "same"
    PERHAPS = "perhaps"


class Compared(NamedTuple):
    """A range of both disks, and what their maps say of it."""

    range: Range
    likeness: Likeness


def compared_maps(old: Image, new: Image) -> Iterator[Compared]:
    """The disks in order, as far as the new one goes; the old one has zeros behind its end."""
    return merge_runs(_compared(old, new), _joined)


def _compared(old: Image, new: Image) -> Iterator[Compared]:
    same = _SamePlaces(old.layers, new.layers)
    end = new.size
    of_old, of_new = old.extents(0, min(old.size, end)), new.extents()
    left = right = None
    offset = 0
    while offset < end:
        if left is None or left.end <= offset:
            left = next(of_old, None)
        if right is None or right.end <= offset:
            right = next(of_new)
        stop = min(right.end, end, end if left is None else left.end)
        zeros = left is None or left.zero
        if zeros and right.zero:
            likeness = Likeness.ZEROS
        elif left is not None and not zeros and same.have(left, right):
            likeness = Likeness.SAME
        else:
            likeness = Likeness.PERHAPS
        yield Compared(Range(offset, stop - offset), likeness)
        offset = stop


def _joined(left: Compared, right: Compared) -> Compared | None:
    if left.likeness is not right.likeness or left.range.end != right.range.offset:
        return None
    return Compared(Range(left.range.offset, left.range.length + right.range.length), left.likeness)


class _SamePlaces:
    """Whether two extents, one of each chain, at one offset of the disk, take their bytes from one place."""

    def __init__(self, old: Sequence[Layer], new: Sequence[Layer]) -> None:
        self._images = frozenset(
            (depth, other)
            for depth, layer in enumerate(old)
            for other, found in enumerate(new)
            if _are_one_disk(layer, found)
        )
        self._files_of_old = [_places(layer) for layer in old]
        self._files_of_new = [_places(layer) for layer in new]

    def have(self, old: MappedExtent, new: MappedExtent) -> bool:
        """Whether they do; extents of data."""
        if (old.depth, new.depth) in self._images:
            return True
        if old.host_offset is None or new.host_offset is None or old.host_path is None or new.host_path is None:
            return False
        file = self._files_of_old[old.depth].get(old.host_path)
        moved = old.host_offset - old.offset == new.host_offset - new.offset
        return moved and file is not None and file == self._files_of_new[new.depth].get(new.host_path)


def _are_one_disk(left: Layer, right: Layer) -> bool:
    """Whether two layers are one disk of one image: a snapshot inside an image is another than its current disk."""
    same = left.driver.format_name == right.driver.format_name and left.snapshot == right.snapshot
    return same and left.file.place == right.file.place


def _places(layer: Layer) -> dict[str, tuple[tuple[int, int], int]]:
    return {file.path: file.place for file in layer.files}
