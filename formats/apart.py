"""The ranges of a host file that an image refers to, held apart before anybody writes to the image.

Where two of them overlap a write to one would change the other without a word. So such an image is only read.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from heapq import merge

from tapfs.errors import ErrorKind, ImageError

#: Ranges that are sorted together, 40 bytes each; sorted ones take 8 bytes.
_SORTED_TOGETHER = 1 << 18

#: A range is one number: its start, and in the low bits its length, both in units. A longer range is several.
_LENGTH_BITS = 20
_MOST_UNITS = (1 << _LENGTH_BITS) - 1


#: The advice of an error of this module.
REMEDY = "tapfs check names them; copy what can be read with tapfs convert"


def require_apart(ranges: Iterable[tuple[int, int]], unit: int, path: str, *, what: str, origin: int = 0) -> None:
    """Raise ImageError(read_only) if two of the ranges ``(start, length)`` overlap, with the place of the second.

    `ranges` are bytes in multiples of `unit` after `origin`, in any order; no start reaches ``unit << 44``. `what` they
    are, for the message: "blocks". An ImageError(corrupt) of `ranges`, for a place that cannot be, becomes one of
    read_only. Others pass.
    """
    try:
        for left, right in overlaps(ranges, unit, origin):
            message = f"two {what} overlap, at {left:#x} and {right:#x}"
            raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=right, op="open")
    except ImageError as error:
        if error.kind is not ErrorKind.CORRUPT or error.remedy is not None:
            raise
        raise ImageError(
            ErrorKind.READ_ONLY,
            f"{error.message}: the image can only be read",
            path=error.path,
            offset=error.offset,
            op="open",
            remedy=REMEDY,
        ) from error


def overlaps(ranges: Iterable[tuple[int, int]], unit: int, origin: int) -> Iterator[tuple[int, int]]:
    """The host offset of each range that begins inside an earlier one, after the host offset of the earlier one."""
    end = -1
    before = 0
    for number in _ascending(ranges, unit, origin):
        start, length = number >> _LENGTH_BITS, number & _MOST_UNITS
        if start < end:
            yield origin + before * unit, origin + start * unit
        if start + length > end:
            end, before = start + length, start


def _ascending(ranges: Iterable[tuple[int, int]], unit: int, origin: int) -> Iterator[int]:
    """The ranges as numbers."""
    held: list[int] = []
    done: list[array[int]] = []
    for start, length in ranges:
        at, left = (start - origin) // unit, length // unit
        while left > _MOST_UNITS:
            held.append(at << _LENGTH_BITS | _MOST_UNITS)
            at, left = at + _MOST_UNITS, left - _MOST_UNITS
        held.append(at << _LENGTH_BITS | left)
        if len(held) >= _SORTED_TOGETHER:
            held.sort()
            done.append(array("Q", held))
            held.clear()
    held.sort()
    return merge(*done, held) if done else iter(held)
