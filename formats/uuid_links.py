"""The UUIDs by which VirtualBox's images know their parents: as identities, and as the core searches for them.

An image has a UUID from its creation and another one of its last change. Its child has both written down, and no name
of a file. VDI has them in its header and VMDK in its disk database; a VHD has the first in its footer, and
no other (docs/specs/vdi.md, "Differencing"; docs/specs/vmdk.md, "VirtualBox's links").
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from tapfs.driver import BackingReference, Driver, Identified, ParentSearch
from tapfs.identifiers import Uuid
from tapfs.records import NamedTuple

NULL_UUID = Uuid(bytes(16))

_CREATION, _CHANGE = "uuid:", " modification:"
#: The formats of these identities whose UUID of creation stays when the image is written.
_LASTING = frozenset({"vdi", "vmdk"})
#: VirtualBox keeps the images of snapshots in a folder of this name beside that of the machine's disks.
_FOLDERS = ("", "Snapshots", "..")


@runtime_checkable
class UuidNamed(Driver, Protocol):
    """A driver of another format that VirtualBox knows: its UUID lasts, and it has none of its last change."""

    @property
    def link_uuid(self) -> Uuid | None:
        """The UUID by which a child names the image; None where it has none."""
        ...


class UuidLink(NamedTuple):
    """What a child has written down of its parent; `modification` is null where it says nothing of the last change."""

    creation: Uuid
    modification: Uuid

    @property
    def reference(self) -> BackingReference:
        """The parent, as the core searches for it."""
        changed = None if self.modification == NULL_UUID else self.modification
        search = ParentSearch(identity(self.creation), _FOLDERS)
        return BackingReference("", identity=identity(self.creation, changed), search=search)


def identity(creation: Uuid, modification: Uuid | None = None) -> str:
    """How the core compares a parent with what its child says of it."""
    return f"{_CREATION}{creation}" if modification is None else f"{_CREATION}{creation}{_CHANGE}{modification}"


def identities_of(creation: Uuid, modification: Uuid) -> frozenset[str]:
    """What the children of an image with these UUIDs may say that it is."""
    if creation == NULL_UUID:
        return frozenset()
    return frozenset({identity(creation), identity(creation, modification)})


def parsed_uuid(text: str) -> Uuid | None:
    """The UUID that a text is, perhaps in braces; None for anything else."""
    digits = text.removeprefix("{").removesuffix("}").replace("-", "")
    try:
        raw = bytes.fromhex(digits)
    except ValueError:
        return None
    return Uuid(raw) if len(raw) == len(NULL_UUID.raw) and not digits.startswith(" ") else None


def link_to(parent: Driver | None) -> UuidLink | None:
    """How a child names an open parent; None where the parent has no UUID that lasts."""
    if isinstance(parent, UuidNamed):
        return None if parent.link_uuid is None else UuidLink(parent.link_uuid, NULL_UUID)
    if parent is None or parent.format_name not in _LASTING or not isinstance(parent, Identified):
        return None
    for said in sorted(parent.identities, key=len, reverse=True):
        creation, _, modification = said.removeprefix(_CREATION).partition(_CHANGE)
        if said.startswith(_CREATION) and (uuid := parsed_uuid(creation)) is not None:
            return UuidLink(uuid, parsed_uuid(modification) or NULL_UUID)
    return None
