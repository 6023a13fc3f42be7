"""The identity of a VHD, by which the images over it know their parent.

Microsoft's programs show the UUID in the order of its bytes. VirtualBox takes the same bytes for a GUID of which the
first three fields are little-endian, and gives its children in VDI and VMDK that one (docs/specs/vhd.md,
"Differencing"). So an image answers to both.
"""

from __future__ import annotations

from tapfs.formats.vhd.footer import Footer
from tapfs.identifiers import Uuid

#: Old QEMU wrote this, and a tapdisk image with this as its parent is over a raw disk.
NULL_UUID = bytes(16)
#: The creator of VirtualBox's images, whose parents may have another format.
VIRTUALBOX = b"vbox"


def identity_of(uuid: bytes, creator: bytes = b"") -> str | None:
    """How a child of this creator names the parent with this UUID; None for the null UUID, which names nothing."""
    if uuid == NULL_UUID:
        return None
    return f"uuid:{Uuid.of_bytes_le(uuid) if creator == VIRTUALBOX else Uuid(uuid)}"


def identities(footer: Footer) -> frozenset[str]:
    """What the children of an image may name it."""
    both = identity_of(footer.uuid), identity_of(footer.uuid, VIRTUALBOX)
    return frozenset(name for name in both if name is not None)


def link_uuid(footer: Footer) -> Uuid | None:
    """The UUID by which children in VirtualBox's formats name an image; None for the null UUID."""
    return None if footer.uuid == NULL_UUID else Uuid.of_bytes_le(footer.uuid)
