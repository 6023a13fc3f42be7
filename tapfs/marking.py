"""Mark the units of a host file that the words of tables name: in Python, or in C once the engine's function is given.

A check marks what each table names and counts the marks: where they are fewer than the words, two words named one unit.
The engine gives its function by `use_marking`. Whoever marks need not know which one it is: both do the same.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable

from tapfs.records import NamedTuple

_WORD_BYTES = 8


class Marked(NamedTuple):
    """The words that named a unit: how many there are, and the greatest of them."""

    words: int
    greatest: int


def in_python(words: bytes, unit_bits: int, marks: bytearray) -> Marked | None:
    """See `mark_units`."""
    table = array("Q", words)
    if sys.byteorder == "little":
        table.byteswap()
    used = list(filter(None, table))
    if not used:
        return Marked(0, 0)
    greatest = max(used)
    if greatest >> unit_bits >= len(marks) or any(map(((1 << unit_bits) - 1).__and__, used)):
        return None
    for word in used:
        marks[word >> unit_bits] = 1
    return Marked(len(used), greatest)


_mark: Callable[[bytes, int, bytearray], Marked | None] = in_python


def mark_units(words: bytes, unit_bits: int, marks: bytearray) -> Marked | None:
    """Set ``marks[word >> unit_bits]`` to 1 for each big-endian word of 8 bytes, but for words that are zero.

    None where a word is no multiple of ``1 << unit_bits`` or has no mark; then any of the marks may be set. The length
    of `words` is a multiple of 8.
    """
    if len(words) % _WORD_BYTES:
        raise ValueError(f"{len(words)} bytes are no whole words")
    return _mark(words, unit_bits, marks)


def use_marking(function: Callable[[bytes, int, bytearray], Marked | None]) -> None:
    """Mark by this function from now on."""
    global _mark  # noqa: PLW0603  one function of the process, which only becomes faster
    _mark = function
