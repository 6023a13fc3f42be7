"""Raise and lower the counts of a refcount block by those of a window, by the engine or without it in Python."""

from __future__ import annotations

from array import array

from tapfs.formats.changed_table import SECTOR
from tapfs.formats.qcow2.counts import Counting
from tapfs.references import CountedBlock, count_changer

#: A counter of references of two bytes stays at this number, whatever comes.
_UNCERTAIN = 0xFFFF


def raise_block(counting: Counting, raw: array[int], block: CountedBlock, sectors: bytearray) -> int:
    """See :meth:`tapfs.references.CountChanger.raise_counts`."""
    if block.width > 1:
        for at, times in block.counted():
            if times == _UNCERTAIN:
                return at
    changer = count_changer()
    if changer is not None:
        return changer.raise_counts(raw, counting.order, block, sectors)
    for at, times in block.counted():
        number = counting.get(raw, at)
        if number == 0 or number + times > counting.largest:
            return at
        counting.put(raw, at, number + times)
        _note(counting, at, sectors)
    return block.clusters


def lower_block(counting: Counting, raw: array[int], block: CountedBlock, sectors: bytearray) -> bytearray:
    """See :meth:`tapfs.references.CountChanger.lower_counts`; a byte for each cluster, 1 where its count became 0."""
    freed = bytearray(block.clusters)
    changer = count_changer()
    if changer is not None:
        changer.lower_counts(raw, counting.order, block, sectors, freed)
        return freed
    for at, times in block.counted():
        number = counting.get(raw, at)
        if number:
            counting.put(raw, at, max(0, number - times))
            _note(counting, at, sectors)
            freed[at] = times >= number
    return freed


def sectors_of(raw: array[int]) -> bytearray:
    """A mark for each sector of a block."""
    return bytearray(-(-len(raw) // SECTOR))


def _note(counting: Counting, at: int, sectors: bytearray) -> None:
    sectors[counting.byte_range(at, 1)[0] // SECTOR] = 1
