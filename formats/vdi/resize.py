"""Give a VDI disk another size (docs/specs/vdi.md, "Pre-header and header").

The size, the number of entries of the map, the place of the map and that of the first slot stand in the first sector of
the file, so a change of all of them is one write. The map lies before the slots. Where it has no room to grow, the
first slots are moved behind the last ones, as VirtualBox does, and a longer map is written in their place, in which the
slots that stay have smaller numbers. The header then leads to the new map.

A smaller size is told first. Then the last slots are moved into those that became free, for slots in use have numbers
without gaps, and the file is cut off behind the last.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind
from tapfs.formats.changed_table import decode, encode
from tapfs.formats.rounding import round_up
from tapfs.formats.vdi.header import (
    BLOCKS_AT,
    MAP_AT,
    MOST_BLOCKS,
    OLD_VERSION,
    SECTOR,
    SIZE_AT,
    Type,
)
from tapfs.formats.vdi.reader import FREE, ZERO
from tapfs.formats.vdi.writer import WritableVdiDriver
from tapfs.identifiers import new_uuid
from tapfs.plan import Copy, Discard, Grow, Plan, Shorten, Step, Write, plan

#: Entries that one step writes, and blocks that one plan moves.
_PIECE_ENTRIES = 1 << 20
_MOVED_AT_ONCE = 64
_COUNT_AT = 388
#: The new map begins at a multiple of this in the slots that made way for it.
_MAP_ALIGNMENT = 512


def make_room(image: WritableVdiDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.make_room`."""
    _require(image, size)
    return _roomy(image, -(-size // image.header.block_bytes))


def resize(image: WritableVdiDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.resize`."""
    _require(image, size)
    return _resized(image, round_up(size, SECTOR))


def _require(image: WritableVdiDriver, size: int) -> None:
    header = image.header
    blocks = -(-size // header.block_bytes)
    if size < 1 or blocks > MOST_BLOCKS:
        message = f"a VDI disk with these blocks has 1 to {MOST_BLOCKS * header.block_bytes} bytes, not {size}"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=image.file.path, op="resize")
    if header.version == OLD_VERSION:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "has a header of version 0.2, in which the number of blocks says where the data begins",
            path=image.file.path,
            op="resize",
            remedy="make a copy of it with tapfs convert -O vdi",
        )


# -- growing ------------------------------------------------------------------------------------


def _roomy(image: WritableVdiDriver, blocks: int) -> Iterator[Plan]:
    header, layout = image.header, image.layout
    old = layout.blocks
    if blocks == old:
        return
    map_offset, data_offset, slots = header.map_offset, header.data_offset, image.used_slots()
    if map_offset + 4 * blocks > data_offset:
        count = -(-(4 * blocks + _MAP_ALIGNMENT) // layout.slot_bytes)
        yield from _vacated(image, count, max(slots, count))
        slots = max(0, image.used_slots() - count)
        map_offset, data_offset = round_up(data_offset, _MAP_ALIGNMENT), data_offset + count * layout.slot_bytes
        yield plan(
            [Grow(0, data_offset)],
            [*_old_entries(image, map_offset, count), *_free_entries(map_offset, old, blocks)],
            [_header_step(image, map_offset=map_offset, data_offset=data_offset, count=slots)],
            [Discard(0, header.map_offset, 4 * old)],
        )
    else:
        yield plan(list(_free_entries(map_offset, old, blocks)))
    if header.type is Type.FIXED:
        end = data_offset + (slots + blocks - old) * layout.slot_bytes
        entries = encode(array("I", range(slots, slots + blocks - old)), "little")
        yield plan([Grow(0, end)], [Write(0, map_offset + 4 * old, entries)])


def _vacated(image: WritableVdiDriver, count: int, slots: int) -> Iterator[Plan]:
    """Move the blocks in the first `count` slots behind the first `slots`."""
    layout = image.layout
    blocks = [
        (run.first + at, run.entry + at)
        for run in image.runs(0, layout.blocks)
        if run.kind is Kind.DATA and run.entry < count
        for at in range(min(run.blocks, count - run.entry))
    ]
    yield from _moved(image, [(index, entry, slots + at) for at, (index, entry) in enumerate(blocks)])


def _moved(image: WritableVdiDriver, moves: list[tuple[int, int, int]]) -> Iterator[Plan]:
    """Move blocks from one slot to another: ``(index of the block, number of its slot, number of the new one)``."""
    layout = image.layout
    for start in range(0, len(moves), _MOVED_AT_ONCE):
        piece = moves[start : start + _MOVED_AT_ONCE]
        end = max(layout.slot(to) for _, _, to in piece) + layout.slot_bytes
        copies: list[Step] = [Copy(0, layout.slot(to), layout.slot(old), layout.slot_bytes) for _, old, to in piece]
        yield plan([Grow(0, end)], copies)
        image.host_bytes = max(image.host_bytes, end)
        image.move_entries({index: to for index, _, to in piece})
        made = image.flush()
        yield made
        image.flushed(made)


def _old_entries(image: WritableVdiDriver, map_offset: int, less: int) -> Iterator[Step]:
    """The entries of the map for one at another place, each slot with a number that is smaller by `less`."""
    layout = image.layout
    for first in range(0, layout.blocks, _PIECE_ENTRIES):
        stop = min(first + _PIECE_ENTRIES, layout.blocks)
        raw = image.file.read(layout.entry_place(first), 4 * (stop - first))
        words = decode(raw.ljust(4 * (stop - first), b"\xff"), "I", "little")
        changed = array("I", [word - less if word < ZERO else word for word in words])
        yield Write(0, map_offset + 4 * first, encode(changed, "little"))


def _free_entries(map_offset: int, first: int, stop: int) -> Iterator[Step]:
    for at in range(first, stop, _PIECE_ENTRIES):
        count = min(_PIECE_ENTRIES, stop - at)
        yield Write(0, map_offset + 4 * at, FREE.to_bytes(4, "little") * count)


def _header_step(image: WritableVdiDriver, **fields: int) -> Step:
    """One write of the fields of the header from the place of the map to the count of slots."""
    end = _COUNT_AT + 4
    raw = bytearray(image.file.read(MAP_AT, end - MAP_AT))
    places = {"map_offset": (MAP_AT, 4), "data_offset": (MAP_AT + 4, 4), "size": (SIZE_AT, 8)}
    places |= {"blocks": (BLOCKS_AT, 4), "count": (_COUNT_AT, 4)}
    for name, value in fields.items():
        at, length = places[name]
        raw[at - MAP_AT : at - MAP_AT + length] = value.to_bytes(length, "little")
    return Write(0, MAP_AT, bytes(raw))


# -- the size -----------------------------------------------------------------------------------


def _resized(image: WritableVdiDriver, size: int) -> Iterator[Plan]:
    header = image.header
    blocks = -(-size // header.block_bytes)
    fields = {"size": size, "blocks": blocks}
    if header.type is Type.FIXED and blocks > image.layout.blocks:
        fields["count"] = max(header.allocated, image.used_slots() + blocks - image.layout.blocks)
    changed = Write(0, header.places.modification, new_uuid().bytes_le)
    yield plan([changed], [_header_step(image, **fields)])
    if blocks < image.layout.blocks:
        yield from _closed(image, blocks)


def _closed(image: WritableVdiDriver, blocks: int) -> Iterator[Plan]:
    """Move the last slots into the gaps, and cut the file off behind those that are left."""
    layout = image.layout
    used = [
        (run.entry + at, run.first + at)
        for run in image.runs(0, blocks)
        if run.kind is Kind.DATA
        for at in range(run.blocks)
    ]
    taken = {entry for entry, _ in used}
    count = len(used)
    gaps = iter([slot for slot in range(count) if slot not in taken])
    moves = [(index, entry, next(gaps)) for entry, index in sorted(used) if entry >= count]
    yield from _moved(image, moves)
    yield plan([Write(0, _COUNT_AT, count.to_bytes(4, "little"))], [Shorten(0, layout.slot(count))])
