"""Give the disk of a VHD that grows another size (docs/specs/vhd.md, "Writing").

The block allocation table grows into the space behind it: the blocks there are moved to the end of the data first.
Where the table has parent locators behind it, it moves to the end itself. One sector of the dynamic header leads to it.

The footer has the size, and there are two footers, which must not contradict each other. So the last one is taken away,
the copy at the start is written, which is the moment at which the size changes, and then the last one is written anew.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.rounding import round_up
from tapfs.formats.vhd.batmap import FIRST_BATMAP, TAPDISK
from tapfs.formats.vhd.disk_size import LARGEST, MAX_SIZE
from tapfs.formats.vhd.dynamic_header import ENTRY_LENGTH, SECTOR, UNUSED, DynamicHeader
from tapfs.formats.vhd.footer import LENGTH, Footer
from tapfs.formats.vhd.writer import WritableDynamicDriver
from tapfs.plan import Copy, Discard, Plan, Shorten, Step, Write, plan

#: Blocks that one plan moves.
_MOVED_AT_ONCE = 16


def footer_of(footer: Footer, size: int, path: str) -> Footer:
    """The footer of a disk of `size` bytes. Raises ImageError(out_of_bounds).

    The largest geometry has every reader take the size from its own field, whoever made the image.
    """
    if not 1 <= size <= MAX_SIZE:
        message = f"the disk of a VHD has 1 to {MAX_SIZE} bytes (2040 GiB), not {size}"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="resize")
    return footer._replace(
        current_size=round_up(size, SECTOR),
        cylinders=LARGEST.cylinders,
        heads=LARGEST.heads,
        sectors_per_track=LARGEST.sectors_per_track,
    ).sealed()


def make_room(image: WritableDynamicDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.make_room`."""
    footer = footer_of(image.footer, size, image.file.path)
    entries = -(-footer.current_size // image.header.block_size)
    most = _most_before_batmap(image.header)
    if entries > most and _has_batmap(image):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"its block allocation table has room for {most} entries, which are {most * image.header.block_size} bytes "
            "of a disk, and tapdisk's batmap lies behind them",
            path=image.file.path,
            op="resize",
            remedy="make a copy of it with tapfs convert -O vhd, and resize that",
        )
    return _roomy(image, entries)


def resize(image: WritableDynamicDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.resize`."""
    return _resized(image, footer_of(image.footer, size, image.file.path))


def _most_before_batmap(header: DynamicHeader) -> int:
    """The entries up to the end of the table's last sector: the batmap has its place, and bits enough, behind that."""
    return (header.table_end - header.table_offset) // ENTRY_LENGTH


def _has_batmap(image: WritableDynamicDriver) -> bool:
    by_tapdisk = image.footer.creator == TAPDISK and image.footer.creator_version >= FIRST_BATMAP
    return image.batmap is not None or by_tapdisk


# -- growing ------------------------------------------------------------------------------------


def _roomy(image: WritableDynamicDriver, entries: int) -> Iterator[Plan]:
    header, old = image.header, len(image.table)
    if entries <= old:
        return
    wanted = header._replace(max_entries=max(entries, header.max_entries))
    if entries > header.max_entries and _is_shut_in(image, wanted):
        yield from _moved_table(image, wanted)
        return
    if entries > header.max_entries:
        yield from _cleared(image, wanted.table_end)
    at = header.table_offset + old * ENTRY_LENGTH
    unused = b"\xff" * (wanted.table_end - at if entries > header.max_entries else (entries - old) * ENTRY_LENGTH)
    switch = [_header_step(image, wanted)] if wanted != header else []
    yield plan([Write(0, at, unused)], switch)


def _is_shut_in(image: WritableDynamicDriver, wanted: DynamicHeader) -> bool:
    """Whether anything but blocks and the last footer lies in the way of a longer table."""
    start, stop = image.header.table_offset, wanted.table_end
    others = [(each.offset, each.offset + each.space_bytes) for each in image.header.locators if each.data_length]
    others += [(low, high) for low, high, _ in image.metadata_ranges if low != start]
    return any(start < high and low < stop for low, high in others)


def _cleared(image: WritableDynamicDriver, stop: int) -> Iterator[Plan]:
    """Move the blocks that begin before `stop` to the end of the data, and the last footer behind that."""
    length = image.header.bitmap_bytes + image.header.block_size
    image.places.end = max(image.places.end, stop)
    moves = sorted((place, index) for index, place in image.table.used() if place < stop)
    for start in range(0, len(moves), _MOVED_AT_ONCE):
        copies: list[Step] = []
        for place, index in moves[start : start + _MOVED_AT_ONCE]:
            to = image.places.take().offset
            copies.append(Copy(0, to, place, length))
            image.table.enter(index, to)
        image.file_size = max(image.file_size, image.places.end)
        yield plan(copies)
        made = image.flush()
        yield made
        image.flushed(made)
        yield plan([Discard(0, place, length) for place, _ in moves[start : start + _MOVED_AT_ONCE]])
    if not moves and image.footers.place < stop:
        yield plan([Write(0, image.places.end, image.footer.pack())])


def _moved_table(image: WritableDynamicDriver, wanted: DynamicHeader) -> Iterator[Plan]:
    """The whole table at the end of the data, the last footer behind it."""
    header = image.header
    place = round_up(max(image.places.end, image.footers.place), SECTOR)
    wanted = wanted._replace(table_offset=place)
    old = image.file.read(header.table_offset, len(image.table) * ENTRY_LENGTH)
    yield plan(
        [Write(0, wanted.table_end, image.footer.pack())],
        [Write(0, place, old.ljust(wanted.table_end - place, UNUSED.to_bytes(4, "big")[:1]))],
        [_header_step(image, wanted)],
        [Discard(0, header.table_offset, header.table_end - header.table_offset)],
    )


def _header_step(image: WritableDynamicDriver, header: DynamicHeader) -> Step:
    """The sector of the dynamic header that has all fields of the table, and the checksum."""
    return Write(0, image.footer.data_offset, header.sealed().pack()[:SECTOR])


# -- the size -----------------------------------------------------------------------------------


def _resized(image: WritableDynamicDriver, footer: Footer) -> Iterator[Plan]:
    place = max(image.places.end, image.footers.place)
    yield plan(
        [Write(0, image.footers.place, bytes(LENGTH))] if image.footers.last_good else [],
        [Write(0, 0, footer.pack())],
        [Write(0, place, footer.pack())],
    )
    image.footer = footer
    blocks = -(-footer.current_size // image.header.block_size)
    if blocks < len(image.table):
        for index, at in [(index, at) for index, at in image.table.used() if index >= blocks]:
            image.unlink_block(index, at)
        made = image.flush()
        yield made
        image.flushed(made)
        end = image.data_end()
        if end < place:
            yield plan([Write(0, end, footer.pack())], [Shorten(0, end + LENGTH)])
