"""Multiples of a unit next to a number, which every driver needs for its clusters and sectors."""

from __future__ import annotations


def round_up(value: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def round_down(value: int, unit: int) -> int:
    """The largest multiple of `unit` that is not above `value`."""
    return value - value % unit
