"""VirtualBox's link of a VMDK to its parent: UUIDs in the disk database, where VMware has a content ID and a name.

VirtualBox writes `parentCID=ffffffff` into each image, also into the differencing ones of snapshots, and no name
(docs/specs/vmdk.md, "VirtualBox's links"). So a descriptor without a parentCID has a parent where `ddb.uuid.parent` is
not null.

No change of a link may be torn by a crash. A line is put out of use, and into use again, by its first byte: `#` makes a
comment of it. The UUID of the parent's last change is written while its line is a comment.
"""

from __future__ import annotations

import re

from tapfs.driver import BackingReference, Driver
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.uuid_links import NULL_UUID, UuidLink, identities_of, link_to, parsed_uuid
from tapfs.formats.vmdk.descriptor import Descriptor
from tapfs.identifiers import Uuid
from tapfs.patterns import pattern
from tapfs.plan import Plan, Step, Write, plan

MODIFICATION = "ddb.uuid.modification"
_IMAGE, _PARENT, _PARENT_MODIFICATION = "ddb.uuid.image", "ddb.uuid.parent", "ddb.uuid.parentmodification"
_KEY_START, _COMMENT = b"d", b"#"
_CHANGE_LINE = pattern(
    rb"^[ \t]*(?P<first>[d#])db\.uuid\.parentmodification[ \t]*=[ \t]*\"?(?P<uuid>[0-9a-f-]{36})\b",
    re.IGNORECASE | re.MULTILINE,
)


def identities(descriptor: Descriptor | None, modification: Uuid | None = None) -> frozenset[str]:
    """What VirtualBox's children of a disk say that it is; `modification` is another one than the descriptor has."""
    creation = None if descriptor is None else _uuid(descriptor, _IMAGE)
    if descriptor is None or creation is None:
        return frozenset()
    return identities_of(creation, modification or _uuid(descriptor, MODIFICATION) or NULL_UUID)


def uuid_link(descriptor: Descriptor, path: str) -> UuidLink | None:
    """The link of a descriptor whose parent no content ID names; None where it has no parent.

    Raises ImageError(corrupt) for a link that is no UUID: without its parent the disk would show zeros.
    """
    found = descriptor.values.get(_PARENT)
    if found is None or descriptor.parent_cid is not None or not found.content:
        return None
    parent = _uuid(descriptor, _PARENT)
    if parent is None:
        raise ImageError(
            ErrorKind.CORRUPT,
            f"the {_PARENT} of the descriptor is no UUID: {found.content[:40].decode('utf-8', 'replace')!r}",
            path=path,
            offset=descriptor.base + found.at,
            op="open",
        )
    if parent == NULL_UUID:
        return None
    return UuidLink(parent, _uuid(descriptor, _PARENT_MODIFICATION) or NULL_UUID)


def expecting_steps(descriptor: Descriptor) -> list[Step]:
    """The write after which the disk knows its parent by the UUID of its creation alone."""
    return _put_out_of_use(descriptor, _PARENT_MODIFICATION)


def unlinking_steps(descriptor: Descriptor) -> list[Step]:
    """The write after which the disk has no parent by a UUID."""
    return _put_out_of_use(descriptor, _PARENT)


def relinking_plan(descriptor: Descriptor, backing: BackingReference, parent: Driver | None, path: str) -> Plan:
    """The plan that has the disk know by a UUID the parent that it has, as that is now.

    Raises ImageError(unsupported) for another parent.
    """
    link, now = link_to(parent), uuid_link(descriptor, path)
    if link is None or now is None or backing.search is None or link.creation != now.creation:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "names its parent by a UUID, which this parent does not have",
            path=path,
            op="rebase",
            remedy="name the parent by its file",
        )
    found = _CHANGE_LINE.search(descriptor.text)
    if found is None or link.modification == NULL_UUID:
        return plan(expecting_steps(descriptor))
    first = descriptor.base + found.start("first")
    digits = Write(0, descriptor.base + found.start("uuid"), str(link.modification).encode("ascii"))
    return plan(expecting_steps(descriptor), [digits], [Write(0, first, _KEY_START)])


def _uuid(descriptor: Descriptor, key: str) -> Uuid | None:
    return parsed_uuid(descriptor.value(key))


def _put_out_of_use(descriptor: Descriptor, key: str) -> list[Step]:
    found = descriptor.values.get(key)
    if found is None:
        return []
    line = descriptor.text.rfind(b"\n", 0, found.at) + 1
    before = descriptor.text[line : found.at]
    return [Write(0, descriptor.base + line + len(before) - len(before.lstrip()), _COMMENT)]
