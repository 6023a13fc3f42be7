"""The layout and the places of L2 slices, from which the engine decodes the maps of a qcow2 image itself."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from tapfs.extent import Kind
from tapfs.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET, SECTOR, TYPECODE, ZERO, packed_bits
from tapfs.formats.qcow2.header import SUBCLUSTERS, WORD, Header
from tapfs.formats.qcow2.l1 import L1Table
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.qcow2.slices import Slices
from tapfs.tables import ASK, Bitmap, Rule, TableLayout, Where


def slice_layout(
    header: Header, host_size: int, data_number: int, reserved: Sequence[tuple[str, int, int]]
) -> TableLayout:
    """The layout of entries, of one word or with the bits of subclusters in a second.

    No data lies in the `reserved` ranges of file 0, the image itself.
    """
    bits = packed_bits(header.cluster_bits)
    rules = [Rule(COMPRESSED | COPIED, COMPRESSED, Kind.COMPRESSED)]
    zero_mask = COMPRESSED
    if not header.extended_l2:  # subclusters say by their bits that they are zeros, or nothing
        if header.version > VERSIONS[0]:
            rules.append(Rule(COMPRESSED | ZERO, ZERO, Kind.ZERO))
        else:
            zero_mask |= ZERO
        # With a data file offset 0 is a place, and the other bit tells it from nothing.
        nothing = OFFSET | COMPRESSED | ZERO | (COPIED if header.has_data_file else 0)
        rules.append(Rule(nothing, 0, Kind.UNALLOCATED))
    return TableLayout(
        entry_bytes=WORD,
        big_endian=True,
        host_size=host_size,
        rules=tuple(rules),
        place_mask=OFFSET,
        place_alignment=header.cluster_size,
        data_whole=True,
        in_place_mask=COPIED,
        in_place_value=COPIED,
        zero_mask=zero_mask,
        packed_place_mask=(1 << bits) - 1,
        packed_length_shift=bits,
        packed_length_mask=(1 << header.cluster_bits - 8) - 1,
        packed_sector_bytes=SECTOR,
        entry_granules=SUBCLUSTERS if header.extended_l2 else 1,
        bitmap=Bitmap(Where.IN_ENTRY) if header.extended_l2 else None,
        table_alignment=header.slice_bytes,
        flagged_places=True,
        place_is_offset=data_number != 0,
        zeros_keep_places=True,
        least_place=0 if data_number else header.cluster_size,
        reserved=() if data_number else tuple((start, stop) for _, start, stop in reserved),
        data_file=data_number,
    )


def slice_places(
    header: Header, l1: L1Table, slices: Slices, first: int, count: int, stays: Callable[[int], bool]
) -> array[int]:
    """The places of `count` slices; ASK where the table cannot be true, or the slice differs from the disk.

    The places of a shared table are flagged: nothing in it is written in place. `stays` says of such a one whether it
    is still there when this disk has got a copy of it.
    """
    per_table = header.slices
    start, stop = first // per_table, -(-(first + count) // per_table)
    places = array(TYPECODE, bytes(WORD * (stop - start) * per_table))
    last = min(stop, len(l1))
    index = start
    while (index := l1.next_used(index, last)) < last:
        table = l1.table(index)
        at = (index - start) * per_table
        owned = l1[index] & COPIED != 0
        if table and (slices.table_fault(table) is not None or not (owned or stays(table))):
            places[at : at + per_table] = array(TYPECODE, [ASK]) * per_table
        elif table:
            end = table + per_table * header.slice_bytes
            table, end = (table, end) if owned else (table | 1, end | 1)
            places[at : at + per_table] = array(TYPECODE, range(table, end, header.slice_bytes))
        index += 1
    skip = first - start * per_table
    places = places[skip : skip + count]
    for unit in slices.changed_between(first, first + count):
        places[unit - first] = ASK
    return places
