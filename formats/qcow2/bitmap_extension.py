"""Have the header of a qcow2 image lead to another directory of bitmaps, or to the first one, or to none.

The header extension with the directory's place lies anywhere in the first cluster. A host disk writes whole sectors, so
what is switched is one write inside a sector wherever that can be. Otherwise the autoclear bit of bitmaps is taken away
meanwhile: a crash then leaves bitmaps that count as inconsistent, and none that lies. The first bitmap is in the header
before that bit is set, and the last one after the bit is cleared: the bit without the extension would be an error.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import SECTOR
from tapfs.formats.qcow2.bitmaps import pack_extension
from tapfs.formats.qcow2.edited_image import EditedImage, marked, refused
from tapfs.formats.qcow2.extensions import BITMAPS as BITMAPS_EXTENSION
from tapfs.formats.qcow2.extensions import Extension
from tapfs.formats.qcow2.header import BACKING_OFFSET_AT, BITMAPS, WORD
from tapfs.formats.rounding import round_up
from tapfs.plan import Plan, Write, plan

#: Bytes of an extension's type and length, of the data of this one, and of the mark of the end.
_PREFIX_BYTES, _DATA_BYTES, _END_BYTES = 8, 24, 8
_OP = "change the bitmaps"


def require_place(image: EditedImage) -> None:
    """Raise ImageError if the header cannot be led to another directory: a plan would stop half way."""
    if len(_extensions(image)) > 1:
        raise refused(image, "the header names two directories of bitmaps", _OP, "run tapfs convert into a new image")
    if not _extensions(image):
        _new_place(image)


def require_removable(image: EditedImage) -> None:
    """Raise ImageError if the extension cannot be taken out of the header by one write."""
    require_place(image)
    for found in _extensions(image):
        start, end = found.offset - _PREFIX_BYTES, _end_of_list(image)
        if not _is_last(image, found) and start // SECTOR != (min(end + _END_BYTES, _limit(image)) - 1) // SECTOR:
            message = "the bitmaps' header extension is followed by others, and their move could be torn"
            raise refused(image, message, _OP, "keep one bitmap, disabled")


def switched(image: EditedImage, count: int, length: int, place: int) -> Iterator[Plan]:
    """Lead to a directory of `count` bitmaps, at least one, in `length` bytes at `place`, which is durable."""
    data = pack_extension(count, length, place)
    for found in _extensions(image):
        start = found.offset
        torn = start // SECTOR != (start + _DATA_BYTES - 1) // SECTOR
        if torn:
            yield from marked(image, without=BITMAPS)
        yield plan([Write(0, start, data)])
        yield from marked(image, also=BITMAPS)
        return
    yield from _added(image, data)
    yield from marked(image, also=BITMAPS)


def removed(image: EditedImage) -> Iterator[Plan]:
    """Lead to no directory any more."""
    yield from marked(image, without=BITMAPS)
    for found in _extensions(image):
        start = found.offset - _PREFIX_BYTES
        if _is_last(image, found):
            yield plan([Write(0, start, bytes(_END_BYTES))])
            return
        after = start + _PREFIX_BYTES + round_up(len(found.data), WORD)
        end = _end_of_list(image)
        rest = image.file.read(after, end - after)
        yield plan([Write(0, start, rest + bytes(min(end + _END_BYTES, _limit(image)) - start - len(rest)))])


def _added(image: EditedImage, data: bytes) -> Iterator[Plan]:
    """The first directory: what follows the list's end is written before the mark of the end becomes the extension."""
    start, name_at = _new_place(image)
    header = image.header
    if name_at != header.backing_offset:
        yield plan([Write(0, name_at, image.file.read(header.backing_offset, header.backing_size))])
        yield plan([Write(0, BACKING_OFFSET_AT, name_at.to_bytes(WORD, "big"))])
        image.header = header._replace(backing_offset=name_at)
    following = data + bytes(min(_END_BYTES, _limit(image) - start - _PREFIX_BYTES - _DATA_BYTES))
    yield plan([Write(0, start + _PREFIX_BYTES, following)])
    yield plan([Write(0, start, BITMAPS_EXTENSION.to_bytes(4, "big") + _DATA_BYTES.to_bytes(4, "big"))])


def _new_place(image: EditedImage) -> tuple[int, int]:
    """Where a new extension goes, and where the name of the parent is to be then. Raises ImageError(no_space)."""
    header = image.header
    start = _end_of_list(image)
    needed = start + _PREFIX_BYTES + _DATA_BYTES
    if not header.has_backing:
        if needed <= header.cluster_size:
            return start, 0
    else:
        if needed <= header.backing_offset:
            return start, header.backing_offset
        # The old name stays whole until the header leads to the new one.
        name_at = max(needed + _END_BYTES, header.backing_offset + header.backing_size)
        ended = start + _END_BYTES <= header.backing_offset
        if ended and name_at + header.backing_size <= header.cluster_size:
            return start, name_at
    message = f"the first cluster of {header.cluster_size} bytes has no room for the bitmaps' header extension"
    raise ImageError(ErrorKind.NO_SPACE, message, path=image.file.path, offset=start, op=_OP)


def _extensions(image: EditedImage) -> list[Extension]:
    return [each for each in image.extensions if each.type == BITMAPS_EXTENSION]


def _is_last(image: EditedImage, found: Extension) -> bool:
    return image.extensions[-1] is found


def _end_of_list(image: EditedImage) -> int:
    """The offset behind the last extension."""
    if not image.extensions:
        return image.header.header_length
    last = image.extensions[-1]
    return last.offset + round_up(len(last.data), WORD)


def _limit(image: EditedImage) -> int:
    return image.header.backing_offset or image.header.cluster_size
