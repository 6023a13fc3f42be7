"""Content IDs: by these a delta knows that its parent is what it was (docs/specs/vmdk.md, "Delta links")."""

from __future__ import annotations

from collections.abc import Iterable

from tapfs.driver import Driver, Identified
from tapfs.formats.vmdk.descriptor import NO_CID
from tapfs.identifiers import random_bits

_PREFIX = "cid:"

#: Content IDs that no new image may have.
_RESERVED = (NO_CID, NO_CID - 1, 0)


def content_identity(cid: int) -> str:
    """A content ID as the core compares it."""
    return f"{_PREFIX}{cid:08x}"


def named_by(cid: int | None) -> frozenset[str]:
    """The identities of a disk by its content ID; none where it has none."""
    return frozenset() if cid is None else frozenset({content_identity(cid)})


def cid_of(parent: Driver | None) -> int | None:
    """The content ID of a parent; None where it has none."""
    if parent is None or not isinstance(parent, Identified):
        return None
    return cid_among(parent.identities)


def cid_among(identities: Iterable[str]) -> int | None:
    """The content ID among identities; None where there is none."""
    found = [each for each in identities if each.startswith(_PREFIX)]
    return int(found[0].removeprefix(_PREFIX), 16) if found else None


def new_cid(old: int | None, digits: int = 8) -> int:
    """A content ID that is not the old one and has at most so many hexadecimal digits."""
    while True:
        cid = random_bits(4 * digits)
        if cid != old and (cid not in _RESERVED or digits == 1):
            return cid
