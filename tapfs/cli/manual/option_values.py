"""The values that an `-o` option of a format takes, read out of the line of help that the driver gives.

The lines have one form: `off (default); falloc: what it does; or full`. A line whose first word is no value, as in
"bytes, a power of two", has none that a shell could offer.
"""

from __future__ import annotations

import re

_BRACKETS = re.compile(r"\([^)]*\)")
_CONDITION = re.compile(r"^of [^:]*: ")
_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: A choice that follows within the sentence of the one before it: "dynamic: grows, or fixed: every block".
_LATER = re.compile(r", (?:or )?([A-Za-z0-9._-]+): ")
_SWITCH = {"on": ("on", "off"), "off": ("off",)}


def values_of(line: str) -> tuple[str, ...]:
    """The values in a line of help, in its order; empty where it names none."""
    found: list[str] = []
    pieces = _CONDITION.sub("", _BRACKETS.sub("", line)).split(";")
    for piece in pieces:
        head, colon, rest = piece.partition(":")
        words, whole = _leading_values(head)
        if not words or (len(words) == 1 and not colon and len(pieces) == 1):
            break
        found += words
        found += _LATER.findall(f"{rest} ") if colon else []
        if not whole:
            break
    if len(found) == 1:
        return _SWITCH.get(found[0], tuple(found))
    # In "serpent-N" the N stands for numbers.
    return tuple(dict.fromkeys(each for each in found if not each.endswith("-N")))


def _leading_values(text: str) -> tuple[list[str], bool]:
    """The words at the start of a text that are values, and whether they are all of it."""
    words = [word.strip().removeprefix("or ") for word in re.split(r", | or ", text.strip().removeprefix("or "))]
    values: list[str] = []
    for word in words:
        if not _VALUE.fullmatch(word):
            return values, False
        values.append(word)
    return values, True
