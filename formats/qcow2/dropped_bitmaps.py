"""Drop the bitmaps of a qcow2 image that cannot be true: the part of a repair for which a user gives them up.

QEMU opens no image whose bitmaps break a rule (bitmap_faults.py), and no edit of bitmaps is made in one. Where the
directory can be read, a new one is written that lists the others, its clusters are counted first, and one write of the
header leads to it (bitmap_extension.py). Where the directory or the refcounts cannot be relied on all bitmaps go. What
only dropped ones referred to has leaked then, and the repair goes on to free it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from tapfs.errors import ImageError
from tapfs.formats.qcow2.bitmap_extension import removed, require_place, require_removable, switched
from tapfs.formats.qcow2.bitmap_faults import fault_of_bitmap, faults_of_directory
from tapfs.formats.qcow2.bitmaps import Bitmap, pack_directory, read_bitmaps
from tapfs.formats.qcow2.edited_image import EditedImage, marked
from tapfs.formats.qcow2.extensions import BITMAPS, data_of
from tapfs.formats.qcow2.header import BITMAPS as KEPT
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.plan import Plan, Write, plan

#: Of the plan that loses something: what a user has to do.
_LOST = "a backup by it has to be a full one"

#: Makes the counts of so many bytes of new metadata durable: the plan, and the place.
Counted = Callable[[int], tuple[Plan, int]]


def dropped_bitmaps(image: Qcow2Reader, counted: Counted | None) -> Iterator[Plan]:
    """The plans that drop what cannot be true; none where all can. `counted` is None where refcounts are unusable."""
    if data_of(image.extensions, BITMAPS) is None or image.header.version == VERSIONS[0]:
        return
    listed = _readable(image)
    lost = [] if listed is None else [each for each in listed if fault_of_bitmap(image, each) is not None]
    if listed is not None and not lost and not any(faults_of_directory(image)):
        return
    edited = cast("EditedImage", image)  # these edits look at the header only
    kept = [] if listed is None or counted is None else [each for each in listed if each not in lost]
    if kept and counted is not None and _allows(require_place, edited):
        content = pack_directory([each.raw for each in kept])
        counts, place = counted(len(content))
        yield plan(*counts.stages, [Write(0, place, content)])
        plans = list(switched(edited, len(kept), len(content), place))
        names: list[str] | None = [each.name for each in lost]
    else:
        removable = _allows(require_removable, edited)
        plans = list(removed(edited) if removable else marked(edited, without=KEPT))
        names = None if listed is None else [each.name for each in listed]
    yield from plans[:-1]
    if plans:
        yield Plan(plans[-1].stages, _said(names))


def _readable(image: Qcow2Reader) -> list[Bitmap] | None:
    """What the directory lists, None where it cannot be read."""
    try:
        return read_bitmaps(image.file, image.extensions)
    except ImageError:
        return None


def _allows(require: Callable[[EditedImage], None], image: EditedImage) -> bool:
    try:
        require(image)
    except ImageError:
        return False
    return True


def _said(names: list[str] | None) -> str:
    if names is None:
        return f"a directory of bitmaps that cannot be read, with every bitmap of it dropped: {_LOST}"
    if not names:
        return "a directory of bitmaps that could not be true, written anew"
    what = "bitmap" if len(names) == 1 else "bitmaps"
    return f"{what} {', '.join(names)}, dropped because of what cannot be true: {_LOST}"
