"""Repair an image: bring it into the last layout of its kind, without touching guest data.

The plans, each of which a crash may cut off anywhere:

1. L2 tables under a stray header copy are rebuilt from L1.
2. L1 becomes big endian, the extended header gets the flag that says so and the right cksum. A new L1
   is written to a fresh place at the end of the file; one write of the header's sector then moves
   everything at once. `min_cluster_alloc` stays only where L1 really gives every cluster: with a
   right cksum it makes blktap believe that again.
3. Space that nothing refers to is given back, if the metadata is free of contradictions.

The 12-byte extended header of 2006 has no room for flags: the backing name stands there. The name
moves four bytes on, in the same write of the header's sector; where it is too long for that sector, to
the end of the file, before that write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.formats.qcow.check import Check
from tapfs.formats.qcow.entries import SECTOR, encode_entries
from tapfs.formats.qcow.extended import (
    FLAG_L1_BIG_ENDIAN,
    FLAG_SPARSE,
    L1_ALIGNMENT,
    OFFSET,
    ExtendedHeader,
    table_cksum,
)
from tapfs.formats.qcow.extended import LENGTH as EXTENDED_LENGTH
from tapfs.formats.rounding import round_up
from tapfs.plan import Discard, Grow, Plan, Step, Write, plan

if TYPE_CHECKING:
    from tapfs.formats.qcow.reader import QcowReader

#: The offset of the backing name after a full extended header.
_NAME_AT = OFFSET + EXTENDED_LENGTH


def repair_plans(image: QcowReader) -> list[Plan]:
    """The plans for an image, to be executed one after the other; empty if all is well."""
    check = Check(image)
    plans: list[Plan] = []
    if check.strays:
        tables = image.tables
        rebuilt = [(image.l1[index], tables.computed(image.l1[index])) for index in check.strays]
        plans.append(
            plan([Write(0, at, encode_entries(entries)) for at, entries in rebuilt], mends=_tables(len(rebuilt)))
        )
    # Where L1 makes sense in neither byte order, turning it round mends nothing.
    if not image.order_uncertain:
        normalised = _normalise(image, check)
        if normalised:
            plans.append(normalised)
    if check.leaks and not check.report.corruptions:
        leaked = sum(length for _, length in check.leaks)
        plans.append(
            plan(
                [Discard(0, offset, length) for offset, length in check.leaks], mends=f"leaked space of {leaked} bytes"
            )
        )
    return plans


def _normalise(image: QcowReader, check: Check) -> Plan:
    header, extended, file = image.header, image.extended, image.file
    end = round_up(file.size(), L1_ALIGNMENT)
    before: list[Step] = []
    after: list[Step] = []
    new_header = header
    l1 = bytes(image.l1.raw)
    if image.l1.order == "little":
        l1 = image.l1.swapped()
        new_header = new_header._replace(l1_table_offset=end)
        before.append(Write(0, end, l1))
        if not check.report.corruptions:
            after.append(Discard(0, header.l1_table_offset, header.l1_length))
        end = round_up(end + len(l1), L1_ALIGNMENT)
    name = b""
    new_extended: ExtendedHeader | None = None
    if extended is not None:
        new_extended = _final_words(image, check, table_cksum(l1))
        if extended.flags is None:
            stored = file.read(header.backing_file_offset, header.backing_file_size)
            if _NAME_AT + len(stored) <= SECTOR:
                name, name_at = stored, _NAME_AT
            else:
                before.append(Write(0, end, stored))
                name_at = end
                end = round_up(end + len(stored), L1_ALIGNMENT)
            new_header = new_header._replace(backing_file_offset=name_at)
    if new_header == header and new_extended == extended:
        return Plan()
    if before:
        before.append(Grow(0, end))
    words = b"" if new_extended is None else new_extended.pack()
    faults = ["the L1 table was little-endian"] if image.l1.order == "little" else []
    faults += ["the extended header was not of the last form"] if new_extended != extended else []
    return plan(before, [Write(0, 0, new_header.pack() + words + name)], after, mends="; ".join(faults))


def _tables(count: int) -> str:
    return f"{count} L2 {'table' if count == 1 else 'tables'} under a stray copy of the header"


def _final_words(image: QcowReader, check: Check, cksum: int) -> ExtendedHeader:
    extended = image.extended
    if extended is None:
        raise AssertionError("no extended header")
    min_cluster_alloc = extended.min_cluster_alloc
    if image.follows_formula and check.disagreements and not image.cksum_valid:
        min_cluster_alloc = 1
    flags = FLAG_SPARSE if extended.flags is None else extended.flags & FLAG_SPARSE
    return ExtendedHeader(cksum, min_cluster_alloc, flags | FLAG_L1_BIG_ENDIAN)
