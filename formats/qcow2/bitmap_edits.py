"""Add, remove, enable, disable and store the bitmaps of a qcow2 image: generators of plans (`tapfs.edit_protocols`).

* *add*, *remove*: a new directory is written beside the old one, the header is led to it (`bitmap_extension.py`), then
  the old one and what only it referred to are freed;
* *store*: new clusters of bits and a new table are written, one word of the directory's entry leads to the table, then
  the old table and its clusters are freed;
* *enable*, *disable*: one write of the flags in the entry.

The counts of new clusters are durable before anything leads there. A writer that does not know bitmaps takes their
autoclear bit away. What it left is marked as inconsistent before the bit is set again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.changed_table import encode
from tapfs.formats.qcow2.bitmap_bits import (
    ALL_ONES,
    MAX_BITMAP_BYTES,
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
    clusters_of,
    table_entries,
    usable_entries,
)
from tapfs.formats.qcow2.bitmap_extension import removed, require_place, require_removable, switched
from tapfs.formats.qcow2.bitmaps import (
    AUTO,
    IN_USE,
    MAX_BITMAPS,
    MAX_DIRECTORY_BYTES,
    MAX_NAME_BYTES,
    Bitmap,
    bitmap_named,
    directory_of,
    entry_with_flags,
    new_entry,
    pack_directory,
    read_bitmaps,
)
from tapfs.formats.qcow2.edited_image import EditedImage, durable, marked, refused, release, require_sound, take
from tapfs.formats.qcow2.entries import BYTE_ORDER, OFFSET, TYPECODE
from tapfs.formats.qcow2.header import BITMAPS, WORD
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.plan import Plan, Step, Write, plan

#: As QEMU chooses: the clusters of the image, within these bounds.
_LEAST_USUAL, _MOST_USUAL = 4 << 10, 64 << 10
_OP = "change the bitmaps"


def add_bitmap(
    image: EditedImage, name: str, granularity: int | None, *, enabled: bool, ranges: Sequence[Range]
) -> Iterator[Plan]:
    """See :meth:`tapfs.edit_protocols.BitmapKeeper.add_bitmap`."""
    header = image.header
    if header.version == VERSIONS[0]:
        remedy = "convert it into an image of version 3"
        raise refused(image, "is of version 2, which cannot say that bitmaps follow the disk", _OP, remedy)
    listed = read_bitmaps(image.file, image.extensions)
    _require_name(image, name, listed)
    chosen = _granularity(image, granularity)
    entries = table_entries(header.size, chosen, header.cluster_size)
    if not entries:
        raise refused(image, "has a disk of no bytes, of which nothing can be marked", _OP)
    if entries * header.cluster_size > MAX_BITMAP_BYTES:
        least = next(
            1 << bits for bits in range(MAX_GRANULARITY_BITS + 1) if header.size >> bits <= MAX_BITMAP_BYTES * 8
        )
        message = f"a bitmap with a granularity of {chosen} bytes is too large for a disk of {header.size} bytes"
        raise refused(image, message, _OP, f"the least granularity is {max(512, least)}")
    require_place(image)
    require_sound(image, _OP)
    table, steps = _table(image, chosen, entries, ranges)
    kept = _entries(image, listed)
    new = new_entry(name, chosen, AUTO if enabled else 0, table, entries)
    yield from _replaced(image, [*kept, new], steps)


def remove_bitmap(image: EditedImage, name: str) -> Iterator[Plan]:
    """See :meth:`tapfs.edit_protocols.BitmapKeeper.remove_bitmap`."""
    listed = read_bitmaps(image.file, image.extensions)
    unwanted = bitmap_named(listed, name, image.file.path)
    require_sound(image, _OP)
    kept = [raw for raw, each in zip(_entries(image, listed), listed, strict=True) if each is not unwanted]
    # What leads to clusters of bits is read before anything is freed; the check has found it right.
    table = image.file.read(unwanted.table_offset, WORD * unwanted.table_entries)
    (require_place if kept else require_removable)(image)
    yield from _replaced(image, kept, [])
    _release_bits(image, unwanted, table)
    yield from durable(image)


def enable_bitmap(image: EditedImage, name: str, *, enabled: bool) -> Iterator[Plan]:
    """See :meth:`tapfs.edit_protocols.BitmapKeeper.enable_bitmap`."""
    wanted = _consistent(image, name)
    flags = wanted.flags | AUTO if enabled else wanted.flags & ~AUTO
    yield from marked(image)
    if flags != wanted.flags:
        yield plan([wanted.flagged(flags)])


def store_bitmap(image: EditedImage, name: str, ranges: Sequence[Range]) -> Iterator[Plan]:
    """See :meth:`tapfs.edit_protocols.BitmapKeeper.store_bitmap`."""
    wanted = _consistent(image, name)
    usable_entries(image.file, image.header, wanted)
    require_sound(image, _OP)
    old = image.file.read(wanted.table_offset, WORD * wanted.table_entries)
    place, steps = _table(image, wanted.granularity, wanted.table_entries, ranges)
    yield from marked(image)
    yield from durable(image)
    yield plan(steps)
    yield plan([Write(0, wanted.offset, place.to_bytes(WORD, "big"))])
    _release_bits(image, wanted, old)
    yield from durable(image)


def _table(image: EditedImage, granularity: int, entries: int, ranges: Sequence[Range]) -> tuple[int, list[Step]]:
    """The place of a new table whose bits mark these ranges, and the steps that write table and bits."""
    size = image.header.cluster_size
    inside = [Range(at, min(length, image.header.size - at)) for at, length in ranges if at < image.header.size]
    words = array(TYPECODE, bytes(WORD * entries))
    steps: list[Step] = []
    for index, content in clusters_of(inside, granularity, size):
        if content.count(0xFF) == size:
            words[index] = ALL_ONES
            continue
        words[index], step = take(image, content)
        steps.append(step)
    place, step = take(image, encode(words, BYTE_ORDER))
    return place, [*steps, step]


def _consistent(image: EditedImage, name: str) -> Bitmap:
    """The bitmap of that name. Raises ImageError(not_found), (corrupt) where it does not follow the disk."""
    found = bitmap_named(read_bitmaps(image.file, image.extensions), name, image.file.path)
    if not found.consistent or not image.header.autoclear & BITMAPS:
        message = f"bitmap {name!r} is inconsistent: the disk has changed without it"
        raise ImageError(
            ErrorKind.CORRUPT, message, path=image.file.path, op=_OP, remedy="remove it, and add a new one"
        )
    return found


def _entries(image: EditedImage, listed: Sequence[Bitmap]) -> list[bytes]:
    """The entries of bitmaps as they are to stand in a new directory."""
    if image.header.autoclear & BITMAPS:
        return [each.raw for each in listed]
    return [entry_with_flags(each.raw, each.flags | IN_USE) for each in listed]


def _replaced(image: EditedImage, entries: Sequence[bytes], steps: list[Step]) -> Iterator[Plan]:
    """Put a directory of these entries in the old one's place, with `steps` for what it leads to; free the old one."""
    old = directory_of(image.extensions)
    content = pack_directory(entries)
    if len(entries) > MAX_BITMAPS or len(content) > MAX_DIRECTORY_BYTES:
        raise refused(image, f"{len(entries)} bitmaps are too many", _OP)
    place = 0
    if entries:
        place, step = take(image, content)
        steps = [*steps, step]
    yield from marked(image)
    yield from durable(image)
    if steps:
        yield plan(steps)
    yield from switched(image, len(entries), len(content), place) if entries else removed(image)
    if old is not None:
        release(image, old.offset, old.length)
    yield from durable(image)


def _release_bits(image: EditedImage, bitmap: Bitmap, table: bytes) -> None:
    """Free the table of a bitmap, whose bytes these are, and the clusters that it leads to."""
    release(image, bitmap.table_offset, len(table))
    for at in range(0, len(table), WORD):
        place = int.from_bytes(table[at : at + WORD], "big") & OFFSET
        if place:
            release(image, place, 1)


def _require_name(image: EditedImage, name: str, listed: Sequence[Bitmap]) -> None:
    path = image.file.path
    if not name or "\0" in name or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        message = f"a bitmap's name has 1 to {MAX_NAME_BYTES} bytes"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=path, op=_OP)
    if any(each.name == name for each in listed):
        remedy = "choose another name, or clear that one"
        raise ImageError(ErrorKind.EXISTS, f"has a bitmap {name!r}", path=path, op=_OP, remedy=remedy)


def _granularity(image: EditedImage, wanted: int | None) -> int:
    if wanted is None:
        return min(max(image.header.cluster_size, _LEAST_USUAL), _MOST_USUAL)
    bits = wanted.bit_length() - 1
    if wanted != 1 << max(bits, 0) or not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        least, most = 1 << MIN_GRANULARITY_BITS, 1 << MAX_GRANULARITY_BITS
        message = f"a granularity of {wanted} bytes is no power of two from {least} to {most}"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=image.file.path, op=_OP)
    return wanted
