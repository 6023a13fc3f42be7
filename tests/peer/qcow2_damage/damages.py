"""Damages of a sound qcow2 image: each changes one thing that a check has to notice, or must not be misled by."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.peer.qcow2_damage.anatomy import BITMAPS, COMPRESSED, COPIED, CRYPTO, OFFSET, Anatomy

#: Changes an image; False if the image has nothing of the kind.
Damage = Callable[[Anatomy, random.Random], bool]

#: A number that is changed: the place of a field, or None where there is none.
_Field = Callable[[Anatomy, random.Random], int | None]
#: The number that a field with a place of the file becomes.
_Value = Callable[[Anatomy, random.Random, int], int]


# -- places that cannot be, or are another's -------------------------------------------------------

_PLACES: dict[str, _Value] = {
    "unaligned": lambda a, _, old: old + 512 if a.cluster > 512 else old,
    "outside": lambda a, c, old: old & ~OFFSET | a.end + a.cluster * c.choice([1, 5, 1000]),
    "far outside": lambda _, __, old: old & ~OFFSET | 1 << 55,
    "at the end": lambda a, _, old: old & ~OFFSET | a.end,
    "the header": lambda _, __, old: old & ~OFFSET | COPIED if old & COPIED else old & ~OFFSET,
    "the L1 table": lambda a, _, old: old & ~OFFSET | a.l1_at,
    "the refcount table": lambda a, _, old: old & ~OFFSET | a.reftable_at,
    "a refcount block": lambda a, _, old: old & ~OFFSET | a.blocks[0],
    "an L2 table": lambda a, c, old: old & ~OFFSET | c.choice(a.tables),
    "another's data": lambda a, c, old: old & ~OFFSET | _placed(a, c, "data"),
    "the snapshots": lambda a, _, old: old & ~OFFSET | a.snapshots_at if a.snapshots else old,
    "a snapshot's L1 table": lambda a, c, old: old & ~OFFSET | c.choice(a.snapshots).l1_at if a.snapshots else old,
    "a bitmap's table": lambda a, c, old: old & ~OFFSET | c.choice(a.bitmaps())[1] if a.bitmaps() else old,
    "zero": lambda _, __, ___: 0,
}


def _placed(anatomy: Anatomy, choice: random.Random, sort: str) -> int:
    found = anatomy.entries(sort)
    return anatomy.number(choice.choice(found)) & OFFSET if found else 0


def _any_of(places: Callable[[Anatomy], list[int]]) -> _Field:
    def field(anatomy: Anatomy, choice: random.Random) -> int | None:
        found = places(anatomy)
        return choice.choice(found) if found else None

    return field


def _header(at: int) -> _Field:
    return lambda _, __: at


def _extension(kind: int, at: int) -> _Field:
    return lambda anatomy, _: anatomy.extensions[kind] + at if kind in anatomy.extensions else None


def _of_snapshots(anatomy: Anatomy) -> list[int]:
    """The entries of tables that only snapshots have."""
    found: list[int] = []
    for each in anatomy.snapshots:
        for at in anatomy.l1_of(each):
            table = anatomy.number(at) & OFFSET
            if table not in anatomy.tables:
                places = range(table, table + anatomy.cluster, anatomy.entry)
                found += [at for at in places if anatomy.number(at) & OFFSET and not anatomy.number(at) & COMPRESSED]
    return found


#: Each field of 8 bytes that leads somewhere.
_LEADING: dict[str, _Field] = {
    "header's L1": _header(40),
    "header's refcount table": _header(48),
    "header's snapshots": lambda a, _: 64 if a.snapshots else None,
    "refcount table": _any_of(lambda a: a.reftable_used),
    "L1": _any_of(lambda a: a.l1_used),
    "data": _any_of(lambda a: a.entries("data")),
    "placed zero": _any_of(lambda a: a.entries("placed zero")),
    "snapshot": _any_of(lambda a: [each.at for each in a.snapshots]),
    "snapshot's L1": _any_of(lambda a: [at for each in a.snapshots for at in a.l1_of(each)]),
    "snapshot's data": _any_of(_of_snapshots),
    "encryption": _extension(CRYPTO, 0),
    "bitmap directory": _extension(BITMAPS, 16),
    "bitmap": _any_of(lambda a: [at for at, _ in a.bitmaps()]),
    "bitmap's table": _any_of(lambda a: [table for _, table in a.bitmaps()]),
}


def _changed(field: _Field, value: _Value, width: int = 8) -> Damage:
    def damage(anatomy: Anatomy, choice: random.Random) -> bool:
        at = field(anatomy, choice)
        if at is None:
            return False
        old = anatomy.number(at, width)
        anatomy.put(at, value(anatomy, choice, old), width)
        return anatomy.number(at, width) != old

    return damage


DAMAGES: dict[str, Damage] = {
    f"{name} leads to {place}": _changed(field, value)
    for name, field in _LEADING.items()
    for place, value in _PLACES.items()
}


# -- bits of entries ---------------------------------------------------------------------------------


def _flip(bits: int) -> _Value:
    return lambda _, __, old: old ^ bits


_BITS = {
    "the lowest bit": 1,
    "bit 1": 2,
    "bit 8": 1 << 8,
    "bit 56": 1 << 56,
    "bit 61": 1 << 61,
    "bit 62": 1 << 62,
    "the bit of sole ownership": COPIED,
}
_WITH_BITS = ("refcount table", "L1", "data", "placed zero", "snapshot's L1", "snapshot's data", "bitmap's table")


def _sort_of(sort: str) -> _Field:
    return _any_of(lambda a: a.entries(sort))


DAMAGES.update(
    {f"{name}: {bit}": _changed(_LEADING[name], _flip(bits)) for name in _WITH_BITS for bit, bits in _BITS.items()}
)
DAMAGES.update(
    {
        f"{sort}: {bit}": _changed(_sort_of(sort), _flip(bits))
        for sort in ("empty", "zero", "compressed")
        for bit, bits in _BITS.items()
        if (sort, bits) != ("compressed", COMPRESSED)
    }
)


# -- compressed clusters -------------------------------------------------------------------------------

_COMPRESSED = _any_of(lambda a: a.entries("compressed"))


def _packed(anatomy: Anatomy, old: int, start: int | None = None, further: int | None = None) -> int:
    """An entry with another place, or another number of further sectors."""
    bits = 62 - (anatomy.bits - 8)
    mask, most = (1 << bits) - 1, (1 << anatomy.bits - 8) - 1
    start = old & mask if start is None else start & mask
    return COMPRESSED | (old >> bits & most if further is None else further & most) << bits | start


DAMAGES.update(
    {
        "compressed: of most sectors": _changed(_COMPRESSED, lambda a, _, old: _packed(a, old, further=-1)),
        "compressed: of one sector": _changed(_COMPRESSED, lambda a, _, old: _packed(a, old, further=0)),
        "compressed: outside": _changed(_COMPRESSED, lambda a, _, old: _packed(a, old, a.end + 5 * a.cluster)),
        "compressed: far outside": _changed(_COMPRESSED, lambda a, _, old: _packed(a, old, -1)),
        "compressed: in the header": _changed(_COMPRESSED, lambda a, _, old: _packed(a, old, 100)),
        "compressed: in an L2 table": _changed(_COMPRESSED, lambda a, _, old: _packed(a, old, a.tables[0] + 8)),
        "compressed: over the end": _changed(_COMPRESSED, lambda a, _, old: _packed(a, old, len(a.data) - 9, -1)),
    }
)


# -- subclusters ---------------------------------------------------------------------------------------


def _extended(sort: str, value: _Value) -> Damage:
    """Change the second word of an entry."""

    def damage(anatomy: Anatomy, choice: random.Random) -> bool:
        entries = anatomy.entries(sort) if anatomy.extended else []
        return bool(entries) and _changed(lambda _, __: choice.choice(entries) + 8, value)(anatomy, choice)

    return damage


DAMAGES.update(
    {
        "subclusters: allocated and zero": _extended("data", lambda _, __, old: old | old << 32),
        "subclusters: one more allocated": _extended("data", lambda _, __, old: old | (old + 1 & ~old & 0xFFFFFFFF)),
        "subclusters: none allocated": _extended("data", lambda _, __, ___: 0),
        "subclusters: allocated without a place": _extended("empty", lambda _, __, ___: 7),
        "subclusters: zeros without a place": _extended("empty", lambda _, __, ___: 7 << 32),
        "subclusters: of a compressed cluster": _extended("compressed", lambda _, c, ___: c.choice([1, 1 << 40])),
    }
)


# -- refcounts -------------------------------------------------------------------------------------------


def _packed_place(anatomy: Anatomy, choice: random.Random) -> int | None:
    entries = anatomy.entries("compressed")
    if not entries:
        return None
    return anatomy.number(choice.choice(entries)) & (1 << 62 - (anatomy.bits - 8)) - 1


_COUNTED: dict[str, _Field] = {
    "header": lambda _, __: 0,
    "refcount table": lambda a, _: a.reftable_at,
    "refcount block": _any_of(lambda a: a.blocks),
    "L1 table": lambda a, _: a.l1_at,
    "L2 table": _any_of(lambda a: a.tables),
    "data": lambda a, c: None if a.external else _placed(a, c, "data") or None,
    "placed zeros": lambda a, c: None if a.external else _placed(a, c, "placed zero") or None,
    "compressed data": _packed_place,
    "snapshots": lambda a, _: a.snapshots_at if a.snapshots else None,
    "snapshot's L1 table": _any_of(lambda a: [each.l1_at for each in a.snapshots]),
    "bitmap directory": lambda a, _: a.bitmaps()[0][0] if a.bitmaps() else None,
    "bitmap's table": _any_of(lambda a: [table for _, table in a.bitmaps()]),
    "encryption": lambda a, _: a.number(a.extensions[CRYPTO]) if CRYPTO in a.extensions else None,
    "cluster behind the end": lambda a, c: a.end + a.cluster * c.choice([0, 1, 5]),
}
_NUMBERS: dict[str, Callable[[Anatomy, int], int]] = {
    "no references": lambda _, __: 0,
    "one less": lambda _, old: old - 1,
    "one more": lambda _, old: old + 1,
    "the most references": lambda a, _: (1 << a.refcount_bits) - 1,
}


def _counted(place: _Field, number: Callable[[Anatomy, int], int]) -> Damage:
    def damage(anatomy: Anatomy, choice: random.Random) -> bool:
        at = place(anatomy, choice)
        if at is None or at // anatomy.cluster // (anatomy.cluster * 8 // anatomy.refcount_bits) >= len(anatomy.blocks):
            return False
        cluster = at // anatomy.cluster
        return anatomy.count(cluster, number(anatomy, anatomy.refcount(cluster)))

    return damage


DAMAGES.update(
    {
        f"{what} counted: {how}": _counted(place, number)
        for what, place in _COUNTED.items()
        for how, number in _NUMBERS.items()
    }
)


def _fill_block(byte: int) -> Damage:
    def damage(anatomy: Anatomy, choice: random.Random) -> bool:
        at = choice.choice(anatomy.blocks)
        anatomy.data[at : at + anatomy.cluster] = bytes([byte]) * anatomy.cluster
        return True

    return damage


def _second_block(value: Callable[[Anatomy], int]) -> Damage:
    """Give the entry behind the last one that is used a value."""

    def damage(anatomy: Anatomy, _: random.Random) -> bool:
        at = anatomy.reftable_used[-1] + 8
        if at >= anatomy.reftable_at + anatomy.reftable_clusters * anatomy.cluster:
            return False
        anatomy.put(at, value(anatomy))
        return True

    return damage


DAMAGES.update(
    {
        "a refcount block of zeros": _fill_block(0),
        "a refcount block of ones": _fill_block(0xFF),
        "a refcount block twice": _second_block(lambda a: a.blocks[0]),
        "a second refcount block over an L2 table": _second_block(lambda a: a.tables[0]),
        "a second refcount block behind the end": _second_block(lambda a: a.end),
        "a second refcount block of reserved bits alone": _second_block(lambda _: 7),
    }
)


# -- two owners ------------------------------------------------------------------------------------------


def _doubled(sort: str) -> Damage:
    """An empty entry becomes what another entry is."""

    def damage(anatomy: Anatomy, choice: random.Random) -> bool:
        found, empty = anatomy.entries(sort), anatomy.entries("empty")
        if not found or not empty:
            return False
        source, target = choice.choice(found), choice.choice(empty)
        anatomy.data[target : target + anatomy.entry] = anatomy.data[source : source + anatomy.entry]
        return True

    return damage


def _doubled_table(anatomy: Anatomy, choice: random.Random) -> bool:
    if len(anatomy.l1_used) < 2:
        return False
    source, target = choice.sample(anatomy.l1_used, 2)
    anatomy.put(target, anatomy.number(source))
    return True


DAMAGES.update({f"{sort} twice": _doubled(sort) for sort in ("data", "placed zero", "compressed")})
DAMAGES["an L2 table twice"] = _doubled_table


# -- the header and other fields ---------------------------------------------------------------------------


def _put(at: int, number: int, width: int, *, later: bool = False) -> Damage:
    """Set a field of the header; `later`: only version 3 has it."""

    def damage(anatomy: Anatomy, _: random.Random) -> bool:
        if (later and anatomy.version == 2) or anatomy.number(at, width) == number:
            return False
        anatomy.put(at, number, width)
        return True

    return damage


def _added(field: _Field, number: int, width: int) -> Damage:
    return _changed(field, lambda _, __, old: old + number, width)


def _bit_of_header(at: int, bits: int) -> Damage:
    def damage(anatomy: Anatomy, _: random.Random) -> bool:
        if anatomy.version > 2:
            anatomy.put(at, anatomy.number(at) ^ bits)
        return anatomy.version > 2

    return damage


_SNAPSHOT = _LEADING["snapshot"]
_BITMAP = _LEADING["bitmap"]


def _inside(field: _Field, at: int) -> _Field:
    def inside(anatomy: Anatomy, choice: random.Random) -> int | None:
        found = field(anatomy, choice)
        return None if found is None else found + at

    return inside


DAMAGES.update(
    {
        "header: not closed": _bit_of_header(72, 1),
        "header: marked as corrupt": _bit_of_header(72, 2),
        "header: an unknown incompatible feature": _bit_of_header(72, 1 << 40),
        "header: an unknown compatible feature": _bit_of_header(80, 1 << 40),
        "header: an unknown autoclear feature": _bit_of_header(88, 1 << 40),
        "header: a raw data file, without one": lambda a, c: not a.external and _bit_of_header(88, 2)(a, c),
        "header: bitmaps not kept": lambda a, c: BITMAPS in a.extensions and _bit_of_header(88, 1)(a, c),
        "header: subclusters": _bit_of_header(72, 16),
        "header: a data file": _bit_of_header(72, 4),
        "header: another compression": _bit_of_header(72, 8),
        "header: version 4": _put(4, 4, 4),
        "header: clusters of 256 bytes": _put(20, 8, 4),
        "header: clusters of 4 MiB": _put(20, 22, 4),
        "header: another size of clusters": lambda a, c: _put(20, a.bits + c.choice([-1, 1]), 4)(a, c),
        "header: a disk of a byte more": _added(_header(24), 1, 8),
        "header: a disk that L1 is too small for": _put(24, 1 << 50, 8),
        "header: a disk that ends earlier": lambda a, c: _added(_header(24), -a.cluster * 2, 8)(a, c),
        "header: encryption of an unknown kind": _put(32, 3, 4),
        "header: an L1 table of too many entries": _put(36, 1 << 23, 4),
        "header: an L1 table that goes on": lambda a, c: _added(_header(36), a.cluster // 8, 4)(a, c),
        "header: an L1 table of one entry more": _added(_header(36), 1, 4),
        "header: an L1 table without entries": _put(36, 0, 4),
        "header: a refcount table without clusters": _put(56, 0, 4),
        "header: a refcount table that goes on": _added(_header(56), 1, 4),
        "header: a refcount table that is too long": _put(56, 1 << 28, 4),
        "header: a snapshot more": lambda a, c: bool(a.snapshots) and _added(_header(60), 1, 4)(a, c),
        "header: a snapshot less": lambda a, c: bool(a.snapshots) and _added(_header(60), -1, 4)(a, c),
        "header: no snapshots": lambda a, c: bool(a.snapshots) and _put(60, 0, 4)(a, c),
        "header: too many snapshots": _put(60, 1 << 20, 4),
        "header: refcounts of another width": lambda a, c: (
            a.version > 2 and _added(_header(96), c.choice([-1, 1]), 4)(a, c)
        ),
        "header: too wide refcounts": _put(96, 7, 4, later=True),
        "header: too short": _put(100, 96, 4, later=True),
        "header: too long": lambda a, c: a.version > 2 and _put(100, a.cluster + 8, 4)(a, c),
        "snapshot: an L1 table that goes on": lambda a, c: _added(_inside(_SNAPSHOT, 8), a.cluster // 8, 4)(a, c),
        "snapshot: an L1 table of too many entries": _changed(_inside(_SNAPSHOT, 8), lambda _, __, ___: 1 << 23, 4),
        "snapshot: an L1 table without entries": _changed(_inside(_SNAPSHOT, 8), lambda _, __, ___: 0, 4),
        "snapshot: a long name": _changed(_inside(_SNAPSHOT, 14), lambda _, __, ___: 0xFFFF, 2),
        "snapshot: much extra data": _changed(_inside(_SNAPSHOT, 36), lambda _, __, ___: 1 << 20, 4),
        "snapshot: no extra data": _changed(_inside(_SNAPSHOT, 36), lambda _, __, ___: 0, 4),
        "snapshot: a larger disk": _changed(_inside(_SNAPSHOT, 48), lambda _, __, old: old + (1 << 40)),
        "bitmap directory: longer": _added(_extension(BITMAPS, 8), 8, 8),
        "bitmap directory: much longer": _added(_extension(BITMAPS, 8), 1 << 40, 8),
        "bitmap directory: one more": _added(_extension(BITMAPS, 0), 1, 4),
        "bitmap directory: none": _changed(_extension(BITMAPS, 0), lambda _, __, ___: 0, 4),
        "bitmap directory: reserved bits": _changed(_extension(BITMAPS, 4), lambda _, __, ___: 1, 4),
        "bitmap: an empty table": _changed(_inside(_BITMAP, 8), lambda _, __, ___: 0, 4),
        "bitmap: a longer table": _added(_inside(_BITMAP, 8), 1, 4),
        "bitmap: a far longer table": _changed(_inside(_BITMAP, 8), lambda _, __, ___: 1 << 30, 4),
        "bitmap: in use": _changed(_inside(_BITMAP, 12), lambda _, __, old: old | 1, 4),
        "bitmap: flags that are reserved": _changed(_inside(_BITMAP, 12), lambda _, __, old: old | 1 << 20, 4),
        "bitmap: another type": _changed(_inside(_BITMAP, 16), lambda _, __, ___: 2, 1),
        "bitmap: a granularity that is too large": _changed(_inside(_BITMAP, 17), lambda _, __, ___: 70, 1),
        "bitmap: a long name": _changed(_inside(_BITMAP, 18), lambda _, __, ___: 0xFFFF, 2),
        "bitmap: extra data": _changed(_inside(_BITMAP, 20), lambda _, __, ___: 8, 4),
        "encryption: longer": _added(_extension(CRYPTO, 8), 1 << 30, 8),
        "encryption: shorter": _changed(_extension(CRYPTO, 8), lambda _, __, ___: 100),
    }
)


def _length_of(kind: int, length: int) -> Damage:
    """Have a header extension say that it has so many bytes."""
    return _changed(_inside(_extension(kind, 0), -4), lambda _, __, ___: length, 4)


DAMAGES.update(
    {
        f"extension {kind:#x}: of {length} bytes": _length_of(kind, length)
        for kind in (CRYPTO, BITMAPS, 0x44415441, 0x6803F857)
        for length in (0, 1 << 20)
    }
)


# -- the file's end ----------------------------------------------------------------------------------------


def _cut(where: Callable[[Anatomy, random.Random], int]) -> Damage:
    def damage(anatomy: Anatomy, choice: random.Random) -> bool:
        end = where(anatomy, choice)
        if not 0 < end < len(anatomy.data):
            return False
        del anatomy.data[end:]
        return True

    return damage


def _appended(length: Callable[[Anatomy], int]) -> Damage:
    def damage(anatomy: Anatomy, _: random.Random) -> bool:
        anatomy.data += b"x" * length(anatomy)
        return True

    return damage


DAMAGES.update(
    {
        "cut by a byte": _cut(lambda a, _: len(a.data) - 1),
        "cut by a cluster": _cut(lambda a, _: (len(a.data) - 1) // a.cluster * a.cluster),
        "cut in the middle": _cut(lambda a, _: a.end // a.cluster // 2 * a.cluster),
        "cut anywhere": _cut(lambda a, c: c.randrange(a.cluster, len(a.data))),
        "cut in an L2 table": _cut(lambda a, c: c.choice(a.tables) + 100),
        "cut behind the header": _cut(lambda a, _: a.cluster),
        "longer by a sector": _appended(lambda _: 512),
        "longer by 3 clusters": _appended(lambda a: 3 * a.cluster),
    }
)
