"""The disagreements of `tapfs check` and `qemu-img check` that are known, each with who is right and why.

docs/specs/qcow2.md, "Where tapfs check and qemu-img check differ", has the same list, and a test holds it to this one.
QEMU 7.2, 10.0 and 11.1 say the same of all of these images.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.peer.qcow2_damage.checkers import Verdict, Word


class Known(NamedTuple):
    """Damages and kinds by patterns of their names, the two verdicts, and why these differ: the words of the sheet."""

    damages: str
    ours: Word
    theirs: Word
    why: str
    kinds: str = ".*"


_GARBAGE = "What is no table is read as one"
_SNAPSHOTS = "Snapshots that cannot be read"

#: Both call the image corrupt, and count otherwise.
_BOTH = {
    "(header's .*|L1|snapshot.*|bitmap.*|refcount table|encryption) leads to .*": _GARBAGE,
    ".*(L1|refcount) table that goes on": _GARBAGE,
    "header: (subclusters|a data file|another size of clusters|another compression)": _GARBAGE,
    "(data|placed zero|snapshot's data) leads to .*": "An entry with a place that cannot be",
    "refcount table: .*": "Reserved bits of the refcount table",
    "a (second )?refcount block .*": "Two entries for one refcount block",
    ".*: bit 62|compressed: .*|subclusters: .*": "A compressed entry that cannot be true",
    "(data|empty|zero|placed zero|compressed|snapshot's data): .*": "An entry of a table that snapshots share",
    "header: a refcount table without clusters": "A refcount table that is not there",
    "header: refcounts of another width": "More references than a refcount can have",
    "snapshot: .*|header: .* snapshots?.*|cut .*": _SNAPSHOTS,
    "encryption: longer": "An encryption header behind the end",
}
_ZEROS = "The bit of zeros in version 2"
_DATA_FILE, _OUTSIDE = "Entries of a data file", ".*data file"

KNOWN = (
    Known(".*", Word.CORRUPT, Word.REFUSED, "An image that QEMU does not open"),
    *(Known(damages, Word.CORRUPT, Word.CORRUPT, why) for damages, why in _BOTH.items()),
    Known("compressed: .*", Word.CLEAN, Word.CORRUPT, "A payload that goes on past the end"),
    Known("header: bitmaps not kept", Word.CLEAN, Word.LEAKS, "Bitmaps that are not kept"),
    Known("cut .*", Word.CORRUPT, Word.LEAKS, "A bitmap's table behind the end"),
    Known("(data|empty|snapshot's data): the lowest bit", Word.CORRUPT, Word.CLEAN, _ZEROS, "version 2.*"),
    Known(".* (twice|leads to .*|allocated|place)", Word.CORRUPT, Word.CLEAN, _DATA_FILE, _OUTSIDE),
)


def known(kind: str, damage: str, ours: Verdict, theirs: Verdict) -> Known | None:
    """The disagreement that this one is, or None if nobody knows why."""
    verdicts = ours.word, theirs.word
    for each in KNOWN:
        if (
            (each.ours, each.theirs) == verdicts
            and re.fullmatch(each.damages, damage)
            and re.fullmatch(each.kinds, kind)
        ):
            return each
    return None
