"""The identity of a VHD, by which the images over it know their parent."""

from __future__ import annotations

from tapfs.formats.vhd.footer import Footer
from tapfs.identifiers import Uuid

#: Old QEMU wrote this, and a tapdisk image with this as its parent is over a raw disk.
NULL_UUID = bytes(16)


def identity_of(uuid: bytes) -> str | None:
    """How a child names the parent with this UUID; None for the null UUID, which names nothing."""
    return None if uuid == NULL_UUID else f"uuid:{Uuid(uuid)}"


def identities(footer: Footer) -> frozenset[str]:
    """What the children of an image may name it."""
    identity = identity_of(footer.uuid)
    return frozenset() if identity is None else frozenset({identity})
