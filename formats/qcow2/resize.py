"""Give a qcow2 disk another size (docs/specs/qcow2.md, "Preallocation, measure, amend").

A larger disk needs a longer L1 table. Where the clusters of the table have room behind it, the table grows in place;
otherwise a longer copy is made. One write of the header's two fields leads to either. The size itself is one field.

A smaller size is told first. Then the entries behind it are cleared and their clusters freed, table by table. So a
crash leaves entries behind the end that nobody reads. The next growth zeroes what they refer to.

Snapshots keep their sizes. In version 2 the table of snapshots need not say them, so such an image keeps its size, as
with QEMU. Bitmaps follow the size (:mod:`tapfs.formats.qcow2.bitmap_sizes`).
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.driver import Operation
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.qcow2.bitmap_sizes import bitmap_without_room, keep_bitmaps, resized_bitmaps
from tapfs.formats.qcow2.entries import OFFSET, new_words
from tapfs.formats.qcow2.header import (
    AUTOCLEAR_AT,
    L1_ENTRIES_AT,
    MAX_L1_BYTES,
    SIZE_AT,
    WORD,
    l1_entries_for,
)
from tapfs.formats.qcow2.writer import WritableQcow2Driver
from tapfs.formats.rounding import round_up
from tapfs.plan import Grow, Plan, Shorten, Step, Write, plan

_SECTOR = 512
#: Metadata in memory that is worth a flush while a disk is cut.
_FLUSH_BYTES = 4 << 20
#: The place of the length of the extra data in a snapshot's entry, and the bytes of extra data with a disk's size.
_EXTRA_LENGTH_AT, _EXTRA_WITH_SIZE = 36, 16


def make_room(image: WritableQcow2Driver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.make_room`."""
    _require(image, size)
    header = image.header
    entries = l1_entries_for(round_up(size, _SECTOR), header)
    if entries * WORD > MAX_L1_BYTES:
        most = MAX_L1_BYTES // WORD * header.table_span
        message = f"{size} bytes are too many for clusters of {header.cluster_size} bytes, the limit is {most}"
        raise _refused(image, message, "convert the image to one with larger clusters", ErrorKind.OUT_OF_BOUNDS)
    return _roomy(image, size, entries)


def resize(image: WritableQcow2Driver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.resize`."""
    _require(image, size)
    return _resized(image, round_up(size, _SECTOR))


def _resized(image: WritableQcow2Driver, size: int) -> Iterator[Plan]:
    header = image.header
    autoclear = header.kept_autoclear
    if autoclear != header.autoclear:
        yield plan([Write(0, AUTOCLEAR_AT, autoclear.to_bytes(WORD, "big"))])
    kept = keep_bitmaps(image)
    if kept:
        yield plan([each.mark_in_use() for each in kept])
    yield plan([Write(0, SIZE_AT, size.to_bytes(WORD, "big"))])
    if size < header.size:
        yield from _cut(image, size)
    elif image.data_number:
        yield plan([Grow(image.data_number, size)])
    yield from resized_bitmaps(image, kept, size)
    if size < header.size:
        yield from _shortened(image, size)


def _require(image: WritableQcow2Driver, size: int) -> None:
    if size < 0 or size >= 1 << 63:
        raise _refused(image, f"a disk cannot have {size} bytes", None, ErrorKind.OUT_OF_BOUNDS)
    for each in image.read_snapshots():
        extra = int.from_bytes(image.file.read(each.offset + _EXTRA_LENGTH_AT, 4), "big")
        if image.header.version == 2 or extra < _EXTRA_WITH_SIZE:
            message = f"has a snapshot ({each.name or each.id}) that need not say its size, so the size must stay"
            raise _refused(image, message, "delete its snapshots (tapfs snapshot -d)")
    bitmap = bitmap_without_room(image, round_up(size, _SECTOR))
    if bitmap is not None:
        pieces = f"with pieces of {bitmap.granularity} bytes"
        message = f"bitmap {bitmap.name!r} {pieces} cannot follow a disk of {size} bytes"
        raise _refused(image, message, "remove it (tapfs bitmap --remove)", ErrorKind.OUT_OF_BOUNDS)


def _refused(
    image: WritableQcow2Driver, message: str, remedy: str | None, kind: ErrorKind = ErrorKind.UNSUPPORTED
) -> ImageError:
    return ImageError(kind, message, path=image.file.path, op="resize", remedy=remedy)


# -- growing ------------------------------------------------------------------------------------


def _roomy(image: WritableQcow2Driver, size: int, entries: int) -> Iterator[Plan]:
    header = image.header
    room = round_up(header.l1_length, header.cluster_size) // WORD
    if entries > room:
        yield from _moved_l1(image, entries)
    elif entries > header.l1_entries:
        # What stands behind the table in its last cluster may be anything.
        yield plan(
            [Write(0, header.l1_offset + header.l1_length, bytes((entries - header.l1_entries) * WORD))],
            [Write(0, L1_ENTRIES_AT, entries.to_bytes(4, "big"))],
        )
        image.l1.raw.extend(bytes((entries - header.l1_entries) * WORD))
    if image.data_number:
        # It may end with the disk, in a cluster that will be inside the disk.
        yield plan([Grow(image.data_number, round_up(size, _SECTOR))])
    if header.has_raw_data_file:
        # Whoever knows the data file alone must read the same, so every cluster has its place in it.
        image.header = image.header._replace(size=round_up(size, _SECTOR), l1_entries=len(image.l1))
        image.size = image.header.size
        yield from _placed(image, header.size, image.size)


def _moved_l1(image: WritableQcow2Driver, entries: int) -> Iterator[Plan]:
    """A longer copy of the L1 table at a place of its own, and the old one freed."""
    header, bits = image.header, image.header.cluster_bits
    clusters = -(-entries * WORD >> bits)
    place = image.take_for_refcounts(clusters)
    image.ensure_counts(place, clusters << bits)
    image.refcounts.raise_counts(place >> bits, clusters)
    yield from image.flushed_plan()
    longer = bytes(image.l1.raw).ljust(clusters << bits, b"\0")
    fields = entries.to_bytes(4, "big") + place.to_bytes(WORD, "big")
    yield plan([Write(0, place, longer)], [Write(0, L1_ENTRIES_AT, fields)])
    image.l1.raw.extend(bytes(entries * WORD - len(image.l1.raw)))
    image.l1_offset = place
    if header.l1_entries:
        image.refcounts.lower_counts(header.l1_offset >> bits, -(-header.l1_length >> bits))
        yield from image.flushed_plan()


def _placed(image: WritableQcow2Driver, start: int, stop: int) -> Iterator[Plan]:
    """Entries for the clusters of a raw data file, each at its own offset."""
    size = image.header.cluster_size
    at, end, step = round_up(start, size), round_up(stop, size), image.header.table_span
    while at < end:
        piece = min(end, (at // step + 1) * step) - at
        image.commit(image.reserve([Range(at, piece)], Operation.WRITE))
        yield from image.flushed_plan()
        at += piece


# -- shrinking ----------------------------------------------------------------------------------


def _cut(image: WritableQcow2Driver, size: int) -> Iterator[Plan]:
    """Clear what lies behind `size`, tables first whose whole range does."""
    header = image.header
    span = header.table_span
    index = size // span
    if size % span:
        start = round_up(size, header.cluster_size)
        if start < (index + 1) * span and image.l1.table(index):
            image.keep_tables(list(image.pieces(start, (index + 1) * span - start, used=True)))
            _clear(image, start, (index + 1) * span - start)
        index += 1
    while (index := image.l1.next_used(index, len(image.l1))) < len(image.l1):
        _drop_table(image, index)
        if image.unflushed_bytes > _FLUSH_BYTES:
            yield from image.flushed_plan()
        index += 1
    yield from image.flushed_plan()


def _clear(image: WritableQcow2Driver, offset: int, length: int) -> None:
    """Have entries say that nothing was ever there, whatever a parent has."""
    words_each = image.header.l2_entry_bytes // WORD
    for unit, first, stop in image.pieces(offset, length, used=True):
        words = image.slices.load(unit)
        low, high = first * words_each, stop * words_each
        if words is None or not any(words[low:high]):
            continue
        changed = image.owned_slice(unit)
        image.release(changed.entries, first, stop)
        changed.entries[low:high] = new_words(high - low)
        changed.mark(low, high)


def _drop_table(image: WritableQcow2Driver, index: int) -> None:
    """Clear an L1 entry, and let go of its table and of all that the table refers to."""
    header = image.header
    for unit in range(index * header.slices, (index + 1) * header.slices):
        words = image.slices.load(unit)
        if words is not None:
            image.release(words, 0, header.slice_entries)
    table = image.l1[index] & OFFSET
    if table:
        image.refcounts.lower_counts(table >> header.cluster_bits, 1)
    image.l1[index] = 0
    image.l1_pending.add(index)


def _shortened(image: WritableQcow2Driver, size: int) -> Iterator[Plan]:
    """Give back the ends of the files, which nothing refers to any more."""
    end = image.refcounts.counted_end() << image.header.cluster_bits
    steps: list[Step] = [Shorten(image.data_number, size)] if image.data_number else []
    if end < image.file.size():
        steps.append(Shorten(0, end))
    if steps:
        yield plan(steps)
