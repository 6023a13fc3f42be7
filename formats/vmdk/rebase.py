"""Give a VMDK another parent: the lines of its descriptor that name the parent.

The text cannot be written at once without the risk of a torn line. So the new lines go to its end, where they say
nothing yet, because the first line of a key counts. Then one write of one sector makes comments of the old ones. A
content ID alone is changed where it stands.
"""

from __future__ import annotations

from tapfs.driver import BackingReference, Driver
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk.content_id import cid_of
from tapfs.formats.vmdk.descriptor import MAX_BYTES_OF_TEXT, NO_CID, Descriptor
from tapfs.formats.vmdk.new_descriptor import require_writable_name
from tapfs.plan import Grow, Plan, Step, Write, plan

_SECTOR = 512
_CID_KEY, _NAME_KEY = "parentcid", "parentfilenamehint"
_CID_DIGITS = 8


def rebase_plan(
    descriptor: Descriptor, room: int | None, backing: BackingReference | None, parent: Driver | None, path: str
) -> Plan:
    """The plan that has a disk name another parent, or none; `room`: bytes for the text, None in a file of its own.

    Where the parent is not open its content ID stays what it was. Raises ImageError: unsupported for a parent without
    one and for a name that cannot stand in a descriptor, out_of_bounds where there is no room for it.
    """
    if parent is None:
        cid = NO_CID if backing is None or descriptor.parent_cid is None else descriptor.parent_cid
    else:
        found = cid_of(parent)
        if found is None:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"the parent of a VMDK is a VMDK with a content ID, not a {parent.format_name} image",
                path=path,
                op="rebase",
                remedy="convert the parent to vmdk, or this image to another format",
            )
        cid = found
    old = descriptor.values.get(_CID_KEY)
    keeps_name = backing is not None and backing.name == descriptor.parent_name
    if keeps_name and old is not None and len(old.content) == _CID_DIGITS:
        at = descriptor.base + old.at
        if at // _SECTOR == (at + _CID_DIGITS - 1) // _SECTOR:
            return plan([Write(0, at, f"{cid:0{_CID_DIGITS}x}".encode("ascii"))])
    lines = b"" if descriptor.text.endswith(b"\n") else b"\n"
    lines += f"parentCID={cid:08x}\n".encode("ascii")
    if backing is not None:
        name = require_writable_name(backing.name).encode(descriptor.codec, "surrogateescape")
        lines += b'parentFileNameHint="' + name + b'"\n'
    end = descriptor.base + len(descriptor.text)
    if len(descriptor.text) + len(lines) > (MAX_BYTES_OF_TEXT if room is None else room):
        message = f"the descriptor has no room for {len(lines)} bytes more"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, offset=end, op="rebase")
    grown: list[Step] = [Grow(0, end + len(lines))] if room is None else []
    return plan(grown, [Write(0, end, lines)], _comments(descriptor, path))


def _comments(descriptor: Descriptor, path: str) -> list[Step]:
    """The write that makes comments of the lines that name the parent now."""
    text, starts = descriptor.text, list[int]()
    for key in (_CID_KEY, _NAME_KEY):
        found = descriptor.values.get(key)
        if found is not None:
            line = text.rfind(b"\n", 0, found.at) + 1
            starts.append(line + len(text[line : found.at]) - len(text[line : found.at].lstrip()))
    if not starts:
        return []
    first, last = min(starts), max(starts)
    if (descriptor.base + first) // _SECTOR != (descriptor.base + last) // _SECTOR:
        message = "the lines of the descriptor that name the parent lie in two sectors of the file"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, offset=descriptor.base + first, op="rebase")
    changed = bytearray(text[first : last + 1])
    for start in starts:
        changed[start - first] = ord("#")
    return [Write(0, descriptor.base + first, bytes(changed))]
