"""Give a VDI image another parent: the UUIDs in its header, by which the parent is found.

One is that of the parent's creation, the other that of its last change. While a commit writes the parent the other is
null, which says nothing: an image without it matches the parent before and after.
"""

from __future__ import annotations

from tapfs.driver import BackingReference, Driver
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.uuid_links import NULL_UUID, link_to
from tapfs.formats.vdi.driver import VdiDriver
from tapfs.formats.vdi.header import HEAD_BYTES, Header, Type
from tapfs.plan import Plan, Write, plan

_SECTOR = 512


def rebase_plan(image: VdiDriver, backing: BackingReference | None, parent: Driver | None) -> Plan:
    """The plan that has the image name another parent, or none: one write inside the first sector.

    Raises ImageError(unsupported): the parent must be open, for it is known by its UUID alone.
    """
    header = image.header
    if backing is None:
        if not header.has_parent:
            return Plan()
        changed = header._replace(type=Type.DYNAMIC, link=NULL_UUID, parent_modification=NULL_UUID)
        return _switch(image, changed)
    link = link_to(parent)
    if link is None:
        found = "there is no parent" if parent is None else f"this {parent.format_name} image has none"
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"a VDI image finds its parent by a UUID, and {found}",
            path=image.file.path,
            op="rebase",
            remedy="convert the image to a format that has names, for example qcow2",
        )
    if header.type is Type.FIXED:
        raise ImageError(ErrorKind.UNSUPPORTED, "a fixed VDI image has no parent", path=image.file.path, op="rebase")
    kind = header.type if header.has_parent else Type.DIFFERENCING
    return _switch(image, header._replace(type=kind, link=link.creation, parent_modification=link.modification))


def expecting_plan(image: VdiDriver, parent: Driver | None) -> Plan:
    """The plan that has the image know its parent by the UUID of its creation alone, which no writing changes.

    Nothing where the UUID is not that of the parent, and where the image says nothing of the parent's last change.
    """
    header = image.header
    link = link_to(parent)
    known = parent is None or (link is not None and link.creation == header.link)
    if not known or header.parent_modification == NULL_UUID:
        return Plan()
    return _switch(image, header._replace(parent_modification=NULL_UUID))


def _switch(image: VdiDriver, header: Header) -> Plan:
    """The write of the fields that differ: they are in one sector, which is never torn."""
    old = image.file.read(0, HEAD_BYTES)
    places = header.places
    new = bytearray(old)
    new[places.type : places.type + 4] = header.type.to_bytes(4, "little")
    new[places.link : places.link + 16] = header.link.bytes_le
    if places.parent_modification is not None:
        new[places.parent_modification : places.parent_modification + 16] = header.parent_modification.bytes_le
    return plan([Write(0, 0, bytes(new[:_SECTOR]))])
