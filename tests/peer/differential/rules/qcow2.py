"""Known disagreements about qcow2. Each holds by the bytes of the image, not by what is said alone."""

from __future__ import annotations

from collections.abc import Callable

from tests.peer.differential.rules.qcow2_facts import (
    changed,
    is_cut,
    is_elsewhere,
    is_placed_beside,
    is_unsound,
    leads_nowhere,
    means_nothing,
)
from tests.peer.differential.rules.rule import Right, Rule, of_the_file
from tests.peer.differential.run import Difference, Sort

_QCOW2 = ("qcow2",)
_READ, _REFUSED = (Sort.TAPFS_CANNOT_READ,), (Sort.TAPFS_REFUSES,)


def _shows_the_file(holds: Callable[[Difference], bool]) -> Callable[[Difference], bool]:
    """Whether an entry of the sector is so, and QEMU shows what the file has somewhere."""
    return lambda difference: holds(difference) and of_the_file(difference)


def _known_verdicts(difference: Difference) -> bool:
    """Whether the image is what tapfs says of it, or tapfs finds none of what it does not count: see the sheet."""
    if "tapfs clean" not in difference.said:
        return is_unsound(difference) or changed(difference, *_OF_DISK, *_OF_CHECKS)
    # Bitmaps that are not kept, and payloads that go on past the end: see the sheet.
    return changed(difference, "autoclear", "file", "L2") or difference.seed.kind.endswith("data file")


#: Parts of an image of which the check alone says something.
_OF_CHECKS = (
    "snapshots",
    "snapshot table",
    "snapshot's L1",
    "bitmaps",
    "refcounts",
    "refcount table",
    "refcount width",
)
#: Parts that say what the disk is.
_OF_DISK = (
    *("version", "backing", "cluster bits", "size", "encryption", "L1 size", "L1 offset", "incompatible"),
    *("header length", "compression", "extensions", "LUKS header"),
)


def _of_checks(difference: Difference) -> bool:
    """Whether a part was changed of which the check alone says something; a bitmap has to fit the size of the disk."""
    fits = ("size",) if "itmap" in difference.said else ()
    return changed(difference, *_OF_CHECKS, "autoclear", "extensions", "file", *fits)


def _of(*parts: str) -> Callable[[Difference], bool]:
    return lambda difference: changed(difference, *parts)


RULES = (
    Rule(
        _QCOW2,
        _READ,
        "past the end of the file|inside the (header|L1 table|refcount table|snapshot)|not aligned|not on a cluster",
        "Entries that lead past the end of the file, into tables, or beside clusters",
        "says so",
        "shows zeros, or the tables",
        Right.TAPFS,
        "that is not what the guest wrote",
        _shows_the_file(leads_nowhere),
    ),
    Rule(
        _QCOW2,
        _READ,
        "the file was cut",
        "A file that ends before what the disk has of a cluster",
        "says so, for the whole cluster",
        "shows what is left, then zeros",
        Right.TAPFS,
        "no zeros were ever there",
        _shows_the_file(is_cut),
    ),
    Rule(
        _QCOW2,
        _READ,
        "in the data file|elsewhere|data file|past the end of the file",
        "An entry that leads to another place of a data file than its guest offset, or past its end",
        "says so",
        "shows that place, or zeros",
        Right.TAPFS,
        "the text has data at its guest offset",
        is_elsewhere,
    ),
    Rule(
        _QCOW2,
        _READ,
        "reserved|version 2|allocated and|subcluster|compressed",
        "Entries with bits that mean nothing, or that mean two things",
        "says so",
        "ignores the bits",
        Right.TAPFS,
        "nobody knows what was meant",
        means_nothing,
    ),
    Rule(
        _QCOW2,
        (Sort.QEMU_CANNOT_READ,),
        "",
        "An entry of zeros, or of no subcluster, whose place is beside a cluster",
        "as if it had no place; `repair` takes that away",
        "an error",
        Right.EITHER,
        "the place says nothing about what is not in it",
        is_placed_beside,
    ),
    Rule(
        _QCOW2,
        (Sort.QEMU_REFUSES,),
        "[Ss]napshot|[Bb]itmap|[Rr]eference count table|refcount|data-file-raw|[Ff]eature name|header extension",
        "Snapshots, bitmaps, refcounts or names of features that cannot be true",
        "reads the disk; a check finds it",
        "refuses the image",
        Right.EITHER,
        "no byte of the disk depends on them",
        _of_checks,
    ),
    Rule(
        _QCOW2,
        (Sort.QEMU_REFUSES,),
        "encryption format|[Ee]ncrypt|LUKS|[Kk]eyslot|password|L1|Could not open|backing|invalid|too (large|small|big)",
        "Headers whose parts do not fit each other, where the disk can be read by one of them",
        "reads it",
        "refuses",
        Right.EITHER,
        "the disk can be read",
        _of(*_OF_DISK, "file"),
    ),
    Rule(
        _QCOW2,
        _REFUSED,
        "L1 table|LUKS header|name|extension|refcount|unsupported|out_of_bounds|header|size",
        "A header that cannot be true where QEMU does not look",
        "refuses",
        "reads on, zeros for what is not in the file",
        Right.TAPFS,
        "the disk would be another one",
        _of(*_OF_DISK, *_OF_CHECKS, "file"),
    ),
    Rule(
        _QCOW2,
        (Sort.CHECK,),
        "",
        "Verdicts of the two checks",
        "says what is wrong, also of images that QEMU does not open",
        "counts otherwise",
        Right.TAPFS,
        'see "Where tapfs check and qemu-img check differ"',
        _known_verdicts,
    ),
)
