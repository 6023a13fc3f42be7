"""A mutated qcow2 image beside its sound one: its parts that were changed, and the entries that stand for a place."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tests.peer.differential.run import Difference
from tests.peer.qcow2_damage.anatomy import CRYPTO, Anatomy
from tests.peer.qcow2_damage.sound import DATA_FILE, IMAGE
from tests.qcow2_images import COMPRESSED, COPIED, ZERO, Fields, audit, packed_range

#: Fields of the header: where each begins and ends.
HEADER = {
    "version": (4, 8),
    "backing": (8, 20),
    "cluster bits": (20, 24),
    "size": (24, 32),
    "encryption": (32, 36),
    "L1 size": (36, 40),
    "L1 offset": (40, 48),
    "refcount table": (48, 60),
    "snapshots": (60, 72),
    "incompatible": (72, 80),
    "compatible": (80, 88),
    "autoclear": (88, 96),
    "refcount width": (96, 100),
    "header length": (100, 104),
    "compression": (104, 112),
}
_OFFSET, _ALL = (1 << 56) - 1, 0xFFFFFFFF
#: Bits that mean nothing in an entry of L1, and of L2 that is not compressed.
_L1_RESERVED, _L2_RESERVED = 0x7F00000000000000 | 0x1FF, 0x3F00000000000000 | 0x1FE


class Entry(NamedTuple):
    """The entries that stand for a sector of the disk: of L1, of L2, and the bits of its subclusters."""

    fields: Fields
    cluster: int
    l1: int
    l2: int
    bitmap: int


def image_of(difference: Difference) -> bytes:
    """The mutated image."""
    return difference.files[IMAGE]


def changed(difference: Difference, *parts: str) -> bool:
    """Whether one of these parts of the sound image was changed."""
    now, before = image_of(difference), difference.seed.files[IMAGE]
    if "file" in parts and len(now) != len(before):
        return True
    return any(part in parts and now[start:end] != before[start:end] for part, start, end in _parts(before))


def _parts(sound: bytes) -> Iterator[tuple[str, int, int]]:
    anatomy, fields = Anatomy(bytearray(sound)), Fields(sound)
    later = anatomy.version > 2
    for part, (start, end) in HEADER.items():
        if later or end <= 72:
            yield part, start, end
    yield "extensions", fields.number(100, 4) if later else 72, min(anatomy.cluster, 4096)
    for each in anatomy.snapshots:
        yield "snapshot table", each.at, each.at + 64
        yield "snapshot's L1", each.l1_at, each.l1_at + 8 * each.l1_entries
    for at, table in anatomy.bitmaps():
        yield "bitmaps", at, at + 24
        yield "bitmaps", table, table + anatomy.cluster
    if CRYPTO in anatomy.extensions:
        at, length = struct.unpack_from(">QQ", sound, anatomy.extensions[CRYPTO])
        yield "LUKS header", at, at + min(length, 4096)
    yield "L1", anatomy.l1_at, anatomy.l1_at + 8 * anatomy.l1_entries
    for table in anatomy.tables:
        yield "L2", table, table + anatomy.cluster
    length = anatomy.reftable_clusters * anatomy.cluster
    yield "refcounts", anatomy.reftable_at, anatomy.reftable_at + length
    for block in anatomy.blocks:
        yield "refcounts", block, block + anatomy.cluster


def entry_of(difference: Difference) -> Entry:
    """The entries of the sector in which the two differ."""
    fields = Fields(image_of(difference))
    number = difference.place >> fields.bits
    index, inside = divmod(number, fields.per_table)
    l1 = fields.number(fields.l1_at + 8 * index, 8) if index < fields.l1_entries else 0
    table = l1 & _OFFSET & ~0x1FF
    l2 = bitmap = 0
    if table:
        l2 = fields.number(table + fields.entry * inside, 8)
        bitmap = fields.number(table + fields.entry * inside + 8, 8) if fields.extended else 0
    return Entry(fields, number << fields.bits, l1, l2, bitmap)


def _is_over_metadata(fields: Fields, place: int, length: int) -> bool:
    """Whether a range of the file lies over what the header leads to, or over itself."""
    metadata = [
        (0, fields.cluster),
        (fields.l1_at, 8 * fields.l1_entries),
        (fields.reftable_at, fields.reftable_clusters * fields.cluster),
        (fields.snapshots_at, 64 * fields.snapshot_count),
    ]
    return any(size and place < start + size and start < place + length for start, size in metadata)


def _is_wrong_place(fields: Fields, place: int) -> bool:
    """Whether no cluster can be at a place: beside a boundary, over metadata of the header, or past the end."""
    beside = place % fields.cluster != 0 or place >= len(fields.data)
    return beside or _is_over_metadata(fields, place, fields.cluster)


def leads_nowhere(difference: Difference) -> bool:
    """Whether the table, the cluster or the payload of the sector is where none can be."""
    entry = entry_of(difference)
    table, place = entry.l1 & _OFFSET & ~0x1FF, entry.l2 & _OFFSET & ~0x1FF
    if table and _is_wrong_place(entry.fields, table):
        return True
    if entry.l2 & COMPRESSED:
        start, length = packed_range(entry.fields, entry.l2)
        return start + length > len(entry.fields.data) or _is_over_metadata(entry.fields, start, length)
    return place != 0 and not entry.fields.external and _is_wrong_place(entry.fields, place)


def is_cut(difference: Difference) -> bool:
    """Whether the end of the file is inside the table or the cluster of the sector, or inside that of the data file."""
    entry = entry_of(difference)
    length = entry.fields.cluster
    places = [(entry.l1, len(entry.fields.data))]
    if not entry.l2 & COMPRESSED:
        outside = difference.files.get(DATA_FILE, b"")
        places.append((entry.l2, len(outside) if entry.fields.external else len(entry.fields.data)))
    return any((place & _OFFSET & ~0x1FF) < end < (place & _OFFSET & ~0x1FF) + length for place, end in places)


def is_elsewhere(difference: Difference) -> bool:
    """Whether the sector is another place of a data file than its own, or behind the end of that file."""
    entry = entry_of(difference)
    place = entry.l2 & _OFFSET & ~0x1FF
    end = len(difference.files.get(DATA_FILE, b""))
    return entry.fields.external and (place != entry.cluster or place + entry.fields.cluster > end)


def means_nothing(difference: Difference) -> bool:
    """Whether an entry of the sector has bits that mean nothing, or that mean two things, or is a damaged payload."""
    entry = entry_of(difference)
    l1, l2, bitmap = entry.l1, entry.l2, entry.bitmap
    if l2 & COMPRESSED or l1 & _L1_RESERVED or l2 & _L2_RESERVED:
        return True
    if entry.fields.extended:
        return bool(bitmap & bitmap >> 32 & _ALL or (bitmap & _ALL and not l2 & _OFFSET) or l2 & ZERO)
    return bool(l2 & ZERO) and entry.fields.version < 3


def is_placed_beside(difference: Difference) -> bool:
    """Whether the entry of the sector has none of its bytes in the file, and a place where no cluster can be."""
    entry = entry_of(difference)
    if entry.fields.extended:
        part = (difference.place - entry.cluster) * 32 // entry.fields.cluster
        elsewhere = not entry.bitmap >> part & 1
    else:
        elsewhere = bool(entry.l2 & ZERO)
    return elsewhere and not entry.l2 & COMPRESSED and _is_wrong_place(entry.fields, entry.l2 & _OFFSET & ~0x1FF)


def is_unsound(difference: Difference) -> bool:
    """Whether the second checker, or a look at each entry, finds that an image has leaks or is corrupt."""
    data = image_of(difference)
    try:
        found = audit(data)
    except Exception:  # noqa: BLE001 what it cannot read is not sound
        return True
    return bool(found.corruptions or found.leaks) or any(_odd_entries(Fields(data), difference))


def _odd_entries(fields: Fields, difference: Difference) -> Iterator[bool]:
    reftable = fields.reftable_clusters * fields.cluster // 8
    yield any(word & 0x1FF or word >> 56 for _, word in fields.words(fields.reftable_at, reftable))
    tables = [(fields.l1_at, fields.l1_entries)]
    tables += [(each.l1_at, each.l1_entries) for each in Anatomy(bytearray(fields.data)).snapshots]
    outside = len(difference.files.get(DATA_FILE, b""))
    for l1_at, entries in tables:
        for index, l1 in fields.words(l1_at, entries):
            yield bool(l1 & _L1_RESERVED) or _is_wrong_place(fields, l1 & _OFFSET & ~0x1FF)
            first = (index - l1_at) // 8 * fields.per_table
            table = l1 & _OFFSET & ~0x1FF
            for number in range(fields.per_table):
                at = table + number * fields.entry
                word = fields.number(at, 8)
                bitmap = fields.number(at + 8, 8) if fields.extended else 0
                if word | bitmap == 0:
                    continue
                place = word & _OFFSET & ~0x1FF
                if word & COMPRESSED:
                    start, length = packed_range(fields, word)
                    yield bool(word & COPIED) or start + length > len(fields.data) or fields.external
                    continue
                yield bool(word & _L2_RESERVED) or (bool(word & ZERO) and fields.version < 3)
                yield bool(bitmap & bitmap >> 32 & _ALL or (bitmap & _ALL and not (place or fields.external)))
                own = (first + number) * fields.cluster
                yield place != 0 and (place not in (own, 0) or own >= outside if fields.external else False)
                yield place != 0 and not fields.external and place + fields.cluster > len(fields.data)
