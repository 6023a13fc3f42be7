"""Sectors of 512 bytes: the unit of every place and length in the metadata of a VMDK (docs/specs/vmdk.md)."""

from __future__ import annotations

#: Bytes of a sector, whatever the sectors of the host or the guest are.
SECTOR = 512

#: No extent may end past this many bytes; a disk is bounded by the core besides.
MAX_BYTES = 1 << 63


def is_power_of_two(value: int) -> bool:
    """Whether `value` is 1, 2, 4 and so on."""
    return value > 0 and value & (value - 1) == 0
