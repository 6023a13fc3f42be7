"""Give a VHDX disk another size (docs/specs/vhdx.md, "BAT").

The size is a field of the metadata. The block table that has no room for a larger disk is copied to the end of the
file, longer, and both region tables lead to it by one entry of the log. So does the size change by one entry. Blocks of
a smaller disk are given up after the size is durable.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.rounding import round_down, round_up
from tapfs.formats.vhdx.blocks import BITMAP_BYTES, ENTRY_BYTES, PLACE_MASK, STATE_MASK, BlockTable, State
from tapfs.formats.vhdx.metadata import MAX_DISK_BYTES, SIZE, item_place
from tapfs.formats.vhdx.regions import TABLES, moved_block_table
from tapfs.formats.vhdx.units import MIB, PAGE
from tapfs.formats.vhdx.writer import WritableVhdxDriver
from tapfs.plan import Discard, Grow, Plan, Shorten, Step, Write, plan

#: Bytes of the table that one step writes, and changed pages in memory that are worth a flush.
_PIECE_BYTES = 4 << 20
_FLUSH_BYTES = 4 << 20


def make_room(image: WritableVhdxDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.make_room`."""
    return _roomy(image, _wanted(image, size))


def resize(image: WritableVhdxDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.resize`."""
    return _resized(image, _wanted(image, size))


def _wanted(image: WritableVhdxDriver, size: int) -> BlockTable:
    """The block table of a disk of that size. Raises ImageError(out_of_bounds)."""
    rounded = round_up(size, image.metadata.logical_sector)
    if not 0 < rounded <= MAX_DISK_BYTES:
        message = f"a VHDX disk has 1 to {MAX_DISK_BYTES} bytes, not {size}"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=image.file.path, op="resize")
    return BlockTable.of(image.metadata._replace(size=rounded), image.table.host_offset)


def _roomy(image: WritableVhdxDriver, wanted: BlockTable) -> Iterator[Plan]:
    old = image.table
    if wanted.entries == old.entries:
        return
    yield image.begin()
    yield from longer_table(image, wanted)
    if image.metadata.leave_allocated:
        for block in range(old.blocks, wanted.blocks):
            place = image.space.allocation.tail(old.block_size)
            image.space.link(block, State.PRESENT, place)
            if image.unflushed_bytes > _FLUSH_BYTES:
                yield from flushed(image)
    yield from flushed(image)
    yield image.end()


def longer_table(image: WritableVhdxDriver, wanted: BlockTable) -> Iterator[Plan]:
    """Have room for the entries of a longer table, and zeros in those that are new. The headers name a log."""
    if wanted.place.length > image.regions.bat.length:
        yield from _moved(image, wanted)
    else:
        # Entries behind the end of the table may be left of a disk that was longer.
        yield from _changed(image, _used_words(image, image.table.place.end, wanted.place.end))


def _moved(image: WritableVhdxDriver, wanted: BlockTable) -> Iterator[Plan]:
    """The table at the end of the file, longer, and the region tables lead to it."""
    old = image.regions.bat
    length = round_up(wanted.place.length, MIB)
    place = Range(image.space.allocation.tail(length, alignment=MIB), length)
    image.space.allocation.commit(place.offset, length)
    used = image.table.place.length
    steps: list[Step] = [
        Write(0, place.offset + at, image.pages.read(image.table.host_offset + at, min(_PIECE_BYTES, used - at)))
        for at in range(0, used, _PIECE_BYTES)
    ]
    yield plan([Grow(0, place.end)], steps)
    for at in TABLES:
        page = moved_block_table(image.file, place)
        image.pages.change(at)[:] = page
    yield from flushed(image)
    image.block_table_moved(place)
    yield plan([Discard(0, old.offset, old.length)])


def _used_words(image: WritableVhdxDriver, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The host offset of every word of a range that is not zero, with 0 as what it is to be."""
    for offset, length in image.file.data_ranges(start, stop - start):
        first = round_down(offset, ENTRY_BYTES)
        for at in range(first, offset + length, PAGE):
            raw = image.pages.read(at, min(PAGE, offset + length - at))
            if raw.count(0) < len(raw):
                yield from ((at + index, 0) for index in range(0, len(raw), ENTRY_BYTES) if any(raw[index : index + 8]))


def _changed(image: WritableVhdxDriver, words: Iterator[tuple[int, int]]) -> Iterator[Plan]:
    for at, word in words:
        image.pages.set_word(at, word)
        if image.unflushed_bytes > _FLUSH_BYTES:
            yield from flushed(image)
    yield from flushed(image)


def flushed(image: WritableVhdxDriver) -> Iterator[Plan]:
    """The plan of a flush. The headers name a log."""
    made = image.flush()
    yield made
    image.flushed(made)


# -- the size -----------------------------------------------------------------------------------


def _resized(image: WritableVhdxDriver, wanted: BlockTable) -> Iterator[Plan]:
    yield image.begin()
    field = item_place(image.file, image.regions.metadata, SIZE)
    data = wanted.disk_bytes.to_bytes(8, "little")
    for at in range(field.offset, field.offset + len(data)):
        page = round_down(at, PAGE)
        image.pages.change(page)[at - page] = data[at - field.offset]
    yield from flushed(image)
    shorter = wanted.blocks < image.table.blocks
    if shorter:
        yield from _cut(image, wanted)
    yield image.end()
    if shorter:
        end = _end_of(image, wanted)
        if end < image.file.size():
            yield plan([Shorten(0, end)])


def _cut(image: WritableVhdxDriver, wanted: BlockTable) -> Iterator[Plan]:
    """Give up the blocks behind the end, and the sector bitmaps that no block has any more."""
    table = image.table
    for first, entries in image.chunks():
        for block, entry in enumerate(entries, first):
            if block >= wanted.blocks and entry:
                image.space.uncover(block)
        chunk = table.chunk_of(first)
        if table.has_parent and chunk > wanted.chunk_of(wanted.blocks - 1):
            image.space.forget_bitmap(chunk)
        if image.unflushed_bytes > _FLUSH_BYTES:
            yield from flushed(image)
    yield from flushed(image)


def _end_of(image: WritableVhdxDriver, wanted: BlockTable) -> int:
    """The end of all that the image has, in whole MiB."""
    table = image.table
    ends = [place.end for place in image.reserved]
    for first, entries in image.chunks():
        placed = [entry & PLACE_MASK for entry in entries if entry & PLACE_MASK and entry & STATE_MASK]
        ends.append(max(placed, default=-table.block_size) + table.block_size)
        if table.has_parent and table.chunk_of(first) <= wanted.chunk_of(wanted.blocks - 1):
            entry = image.pages.word(table.entry_offset(table.bitmap_index(table.chunk_of(first))))
            ends.append((entry & PLACE_MASK) + BITMAP_BYTES if entry & STATE_MASK == State.PRESENT else 0)
    return round_up(max(ends), MIB)
