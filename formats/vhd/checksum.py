"""The checksum of VHD's structures: the ones' complement of the sum of their bytes, the field itself taken as zeros."""

from __future__ import annotations

_MASK = 0xFFFFFFFF


def complement_sum(raw: bytes) -> int:
    """The checksum of bytes that do not contain it."""
    return ~sum(raw) & _MASK


def signed_complement_sum(raw: bytes) -> int:
    """The same over signed bytes, as tapdisk 1.1 summed its batmap (docs/specs/vhd.md, "Tapdisk / xapi extensions")."""
    return ~(sum(raw) - 256 * sum(byte > 127 for byte in raw)) & _MASK


def checksum_without(raw: bytes, at: int) -> int:
    """The checksum of a structure whose 4-byte field lies `at` that offset."""
    return complement_sum(raw[:at] + raw[at + 4 :])
