"""A quick pass over the tables of one sparse extent in which every grain plainly has a place of its own.

One byte for each grain of the file says that an entry names it, so no entry is looked at by itself. What is out of the
ordinary is left to the thorough way (`ExtentWriter.places`), which names it.
"""

from __future__ import annotations

from array import array
from itertools import pairwise

from tapfs.formats.changed_table import encode
from tapfs.formats.vmdk.grain_runs import ZERO_GRAIN
from tapfs.formats.vmdk.grain_tables import GrainTables
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.marking import mark_units

#: A file of more grains is not surveyed: the marks would take too much memory.
_MAX_GRAINS = 64 << 20


def is_plain(tables: GrainTables) -> bool:
    """Whether all grains and tables are known to lie apart, whole in the file and behind the metadata.

    False says nothing: the extent may be sound all the same.
    """
    layout = tables.layout
    step = layout.grain // SECTOR
    count = tables.file_size // layout.grain
    if step & (step - 1) or not count <= _MAX_GRAINS:
        return False
    marks = bytearray(count)
    least = max(end for _, end in layout.metadata) // SECTOR
    places: list[int] = []
    claimed = 0
    stop = layout.directory_entries
    grains = -(-tables.disk_bytes // layout.grain)
    index = tables.next_used(0, stop)
    while index < stop:
        place, twin = tables.table_at(index), tables.table_at(index, redundant=True)
        places += [place, twin] if twin else [place]
        if not place or any(tables.table_fault(each) is not None for each in (place, twin or place)):
            return False
        # Entries behind the end of the disk are nobody's.
        table = tables.read_table(place)[: max(0, grains - index * layout.table_entries)]
        if layout.rules.zeroed:
            table = array(table.typecode, filter(ZERO_GRAIN.__ne__, table))
        used = array("Q", filter(None, table))
        if used and min(used) < least:
            return False
        # A grain that the end of the file cuts has no mark.
        marked = mark_units(encode(used, "big"), step.bit_length() - 1, marks)
        if marked is None:
            return False
        claimed += marked.words
        index = tables.next_used(index + 1, stop)
    return marks.count(1) == claimed and _apart(places, layout.table_bytes, marks, layout.grain)


def _apart(places: list[int], length: int, marks: bytearray, grain: int) -> bool:
    """Whether tables at these places meet neither each other nor a marked grain."""
    places.sort()
    if any(right - left < length for left, right in pairwise(places)):
        return False
    return all(marks.find(1, place // grain, -(-(place + length) // grain)) < 0 for place in places)
