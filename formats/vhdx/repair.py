"""Repair an image: make its copies agree and give leaked space back, without touching guest data.

A log that waits is replayed at the opening, before this. The plans, each of which a crash may cut off anywhere:

1. a header that is damaged becomes a copy of the one that counts, with the next sequence number;
2. a region table that is damaged becomes a copy of the other one;
3. space that nothing refers to is given back, if the metadata is free of contradictions.

An entry of the block table that cannot be true is left: nothing says what the guest's data was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.formats.vhdx.check import Check
from tapfs.formats.vhdx.header import header_steps
from tapfs.formats.vhdx.regions import TABLE_BYTES, TABLES
from tapfs.plan import Discard, Plan, Step, Write, plan

if TYPE_CHECKING:
    from tapfs.formats.vhdx.reader import VhdxReader


def repair_plans(image: VhdxReader) -> list[Plan]:
    """The plans for an image, to be executed one after the other; empty if all is well."""
    check = Check(image)
    plans: list[Plan] = []
    if check.damaged_header:
        again = image.header._replace(sequence=image.header.sequence + 1)
        plans.append(plan(header_steps(again, 1 - image.slot), mends="a damaged header"))
    for number in check.damaged_tables:
        whole = image.file.read(TABLES[1 - number], TABLE_BYTES)
        plans.append(plan([Write(0, TABLES[number], whole)], mends="a damaged region table"))
    if check.leaks and not check.report.corruptions:
        leaked = sum(length for _, length in check.leaks)
        steps: list[Step] = [Discard(0, offset, length) for offset, length in check.leaks]
        plans.append(plan(steps, mends=f"leaked space of {leaked} bytes"))
    return plans
