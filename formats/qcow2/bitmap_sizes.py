"""Have the bitmaps of a qcow2 image follow a new size of its disk (docs/specs/qcow2.md, "Persistent bitmaps").

While the size changes a bitmap says that it is in use, which makes readers take it for inconsistent. So a crash loses
what the bitmap said, and never makes it say what is not so. What a disk gains is not marked, as with QEMU.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.formats.qcow2.bitmap_bits import is_possible_table, table_entries
from tapfs.formats.qcow2.bitmaps import Bitmap, read_bitmaps
from tapfs.formats.qcow2.entries import OFFSET
from tapfs.formats.qcow2.header import BITMAPS, WORD
from tapfs.formats.qcow2.writer import WritableQcow2Driver
from tapfs.formats.rounding import round_up
from tapfs.plan import Plan, Write, plan

#: In an entry of the directory: the length of the table, and the flags.
_ENTRIES_AT, _FLAGS_AT = 8, 12


def keep_bitmaps(image: WritableQcow2Driver) -> list[Bitmap]:
    """The bitmaps that say the truth now, so that they are to do so afterwards. Raises ImageError(corrupt)."""
    if not image.header.autoclear & BITMAPS:
        return []
    return [each for each in read_bitmaps(image.file, image.extensions) if each.consistent]


def bitmap_without_room(image: WritableQcow2Driver, size: int) -> Bitmap | None:
    """The first bitmap that cannot follow the disk to `size` bytes: QEMU would not open an image that has it."""
    cluster = image.header.cluster_size
    for each in keep_bitmaps(image):
        if not is_possible_table(table_entries(size, each.granularity, cluster), cluster):
            return each
    return None


def resized_bitmaps(image: WritableQcow2Driver, kept: list[Bitmap], size: int) -> Iterator[Plan]:
    """Give the bitmaps, which are marked as in use, tables for a disk of `size` bytes, and take the marks away."""
    for bitmap in kept:
        table = bytearray(image.file.read(bitmap.table_offset, bitmap.table_entries * WORD))
        pieces = -(-min(size, image.header.size) // bitmap.granularity)
        yield from _cleared(image, table, pieces)
        wanted = table_entries(size, bitmap.granularity, image.header.cluster_size)
        if wanted > bitmap.table_entries:
            yield from _longer(image, bitmap, table, wanted)
        elif wanted < bitmap.table_entries:
            yield plan([Write(0, bitmap.offset + _ENTRIES_AT, wanted.to_bytes(4, "big"))])
            yield from _freed(image, bitmap, table, wanted)
    if kept:
        yield plan([Write(0, each.offset + _FLAGS_AT, each.flags.to_bytes(4, "big")) for each in kept])


def _cleared(image: WritableQcow2Driver, table: bytearray, pieces: int) -> Iterator[Plan]:
    """Clear the bits behind the first `pieces` in the cluster that has the last of them.

    A cluster that the table calls full stays so: it marks more than it need.
    """
    size = image.header.cluster_size
    index, inside = divmod(pieces, size * 8)
    place = int.from_bytes(table[index * WORD : (index + 1) * WORD], "big") & OFFSET
    if not place:
        return
    content = bytearray(image.file.read(place, size).ljust(size, b"\0"))
    wanted = content[: -(-inside // 8)].ljust(size, b"\0")
    if inside % 8:
        wanted[inside // 8] &= (1 << inside % 8) - 1
    if wanted != content:
        yield plan([Write(0, place, bytes(wanted))])


def _longer(image: WritableQcow2Driver, bitmap: Bitmap, table: bytearray, wanted: int) -> Iterator[Plan]:
    bits = image.header.cluster_bits
    old_clusters = -(-len(table) >> bits)
    length = wanted * WORD
    count = Write(0, bitmap.offset + _ENTRIES_AT, wanted.to_bytes(4, "big"))
    if length <= old_clusters << bits:
        yield plan([Write(0, bitmap.table_offset + len(table), bytes(length - len(table)))], [count])
        return
    clusters = -(-length >> bits)
    place = image.take_for_refcounts(clusters)
    image.ensure_counts(place, clusters << bits)
    image.refcounts.raise_counts(place >> bits, clusters)
    yield from image.flushed_plan()
    longer = bytes(table).ljust(round_up(length, 1 << bits), b"\0")
    # The new table begins as the old one does, so either length is right for it.
    yield plan([Write(0, place, longer)], [Write(0, bitmap.offset, place.to_bytes(WORD, "big"))], [count])
    image.refcounts.lower_counts(bitmap.table_offset >> bits, old_clusters)
    yield from image.flushed_plan()


def _freed(image: WritableQcow2Driver, bitmap: Bitmap, table: bytearray, wanted: int) -> Iterator[Plan]:
    """Free what only entries behind the first `wanted` refer to, and the clusters of the table that have no other."""
    bits = image.header.cluster_bits
    for at in range(wanted * WORD, len(table), WORD):
        place = int.from_bytes(table[at : at + WORD], "big") & OFFSET
        if place:
            image.refcounts.lower_counts(place >> bits, 1)
    kept, had = -(-wanted * WORD >> bits), -(-len(table) >> bits)
    if had > kept:
        image.refcounts.lower_counts((bitmap.table_offset >> bits) + kept, had - kept)
    yield from image.flushed_plan()
