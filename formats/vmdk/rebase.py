"""Give a VMDK another parent: the lines of its descriptor that name the parent.

The text cannot be written at once without the risk of a torn line. So the new lines go to its end, where they say
nothing yet, because the first line of a key counts. Then one write of one sector makes comments of the old ones. A
content ID alone is changed where it stands.

The format has one content ID for the parent. While a commit writes the parent, and so gives it another one, a comment
of tapfs has that: `#parentCID2=`. Tapfs takes a parent with either, and others read no comments. A rebase ends it.
Where the text has no room for the comment, the line `parentCID=` itself becomes one for that time, by its first byte.

A disk of VirtualBox names its parent by UUIDs (`tapfs.formats.vmdk.uuid_link`). It keeps doing so while it keeps its
parent, and a rebase to another one ends it.
"""

from __future__ import annotations

import re

from tapfs.driver import BackingReference, Driver, Renewing
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk.content_id import cid_among, cid_of
from tapfs.formats.vmdk.descriptor import MAX_BYTES_OF_TEXT, NO_CID, SECOND_PARENT, Descriptor
from tapfs.formats.vmdk.new_descriptor import require_writable_name
from tapfs.formats.vmdk.uuid_link import expecting_steps, relinking_plan, unlinking_steps, uuid_link
from tapfs.patterns import pattern
from tapfs.plan import Grow, Plan, Step, Write, plan

_SECTOR = 512
_CID_KEY, _NAME_KEY = "parentcid", "parentfilenamehint"
_CID_DIGITS = 8
#: The line of the parent's content ID while it is out of use.
_OUT_OF_USE = pattern(rb"^[ \t]*(?P<first>#)arentcid[ \t]*=[ \t]*(?P<cid>[0-9a-f]{8})\b", re.IGNORECASE | re.MULTILINE)


def rebase_plan(
    descriptor: Descriptor, room: int | None, backing: BackingReference | None, parent: Driver | None, path: str
) -> Plan:
    """The plan that has a disk name another parent, or none; `room`: bytes for the text, None in a file of its own.

    Where the parent is not open its content ID stays what it was. Raises ImageError: unsupported for a parent without
    one and for a name that cannot stand in a descriptor, out_of_bounds where there is no room for it.
    """
    if backing is not None and backing.search is not None:
        return relinking_plan(descriptor, backing, parent, path)
    unlinked = unlinking_steps(descriptor)
    if backing is None and descriptor.parent_cid is None:
        return plan(unlinked)
    named = _named_plan(descriptor, room, backing, parent, path)
    # The content ID counts where there are both links.
    return plan(unlinked, *named.stages) if backing is None else plan(*named.stages, unlinked)


def _named_plan(
    descriptor: Descriptor, room: int | None, backing: BackingReference | None, parent: Driver | None, path: str
) -> Plan:
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
        if _in_one_sector(at):
            return plan([Write(0, at, _digits(cid))], _second_of_none(descriptor))
    unused = _OUT_OF_USE.search(descriptor.text)
    if keeps_name and old is None and unused is not None:
        digits = Write(0, descriptor.base + unused.start("cid"), _digits(cid))
        return plan([digits], [Write(0, descriptor.base + unused.start("first"), b"p")], _second_of_none(descriptor))
    lines = _line_end(descriptor) + b"parentCID=" + _digits(cid) + b"\n"
    if backing is not None:
        name = require_writable_name(backing.name).encode(descriptor.codec, "surrogateescape")
        lines += b'parentFileNameHint="' + name + b'"\n'
    end = descriptor.base + len(descriptor.text)
    if len(descriptor.text) + len(lines) > (MAX_BYTES_OF_TEXT if room is None else room):
        message = f"the descriptor has no room for {len(lines)} bytes more"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, offset=end, op="rebase")
    grown: list[Step] = [Grow(0, end + len(lines))] if room is None else []
    return plan(grown, [Write(0, end, lines)], _comments(descriptor, path), _second_of_none(descriptor))


def expecting_plan(descriptor: Descriptor, room: int | None, parent: Renewing | None) -> Plan:
    """The plan that has a disk take its parent with the next content ID, too; with any where there is no room for that.

    `room` as above. Without `parent` a comment is made of the content ID: one that is not there says nothing.
    """
    if uuid_link(descriptor, "") is not None:
        return plan(expecting_steps(descriptor))
    if parent is None:
        return _of_any_parent(descriptor)
    cid = cid_among(parent.next_identities)
    if cid is None:
        return Plan()
    second = descriptor.second_parent_cid
    if second is not None and _in_one_sector(descriptor.base + second.at):
        return plan([Write(0, descriptor.base + second.at, _digits(cid))])
    line, end = _line_end(descriptor), descriptor.base + len(descriptor.text)
    if not _in_one_sector(end + len(line) + len(SECOND_PARENT)):
        line += b"#" * (-(end + len(line)) % _SECTOR - 1) + b"\n"
    line += SECOND_PARENT + _digits(cid) + b"\n"
    if second is not None or len(descriptor.text) + len(line) > (MAX_BYTES_OF_TEXT if room is None else room):
        return _of_any_parent(descriptor)
    grown: list[Step] = [Grow(0, end + len(line))] if room is None else []
    return plan(grown, [Write(0, end, line)])


def _of_any_parent(descriptor: Descriptor) -> Plan:
    """The plan that puts the content ID of the parent out of use: one that is not there says nothing."""
    start = _line_start(descriptor, _CID_KEY)
    return Plan() if start is None else plan([Write(0, descriptor.base + start, b"#")])


def _second_of_none(descriptor: Descriptor) -> list[Step]:
    """The write after which the comment of tapfs has no content ID."""
    second = descriptor.second_parent_cid
    return [] if second is None or second.cid is None else [Write(0, descriptor.base + second.at, _digits(NO_CID))]


def _line_end(descriptor: Descriptor) -> bytes:
    return b"" if descriptor.text.endswith(b"\n") else b"\n"


def _digits(cid: int) -> bytes:
    return f"{cid:0{_CID_DIGITS}x}".encode("ascii")


def _in_one_sector(at: int) -> bool:
    """Whether no crash tears a content ID at this place of the file."""
    return at // _SECTOR == (at + _CID_DIGITS - 1) // _SECTOR


def _comments(descriptor: Descriptor, path: str) -> list[Step]:
    """The write that makes comments of the lines that name the parent now."""
    text = descriptor.text
    starts = [start for key in (_CID_KEY, _NAME_KEY) if (start := _line_start(descriptor, key)) is not None]
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


def _line_start(descriptor: Descriptor, key: str) -> int | None:
    """Where in the text the line of a key begins, behind blanks; None where there is none."""
    found = descriptor.values.get(key)
    if found is None:
        return None
    line = descriptor.text.rfind(b"\n", 0, found.at) + 1
    before = descriptor.text[line : found.at]
    return line + len(before) - len(before.lstrip())
