"""The changes of a descriptor before the disk is written: a new content ID, and an end of VMware's change tracking.

docs/specs/vmdk.md, "Delta links" and "Descriptor". Disks over this one have its content ID written down, so whoever
writes it gives it another one, and they are known to be stale. The list of changed blocks (changeTrackPath) would be
false after this, so its line becomes a comment. VirtualBox has a UUID for what the content ID is for.

Most changes are as long as what they replace. A content ID of fewer than eight digits, or none, gets its digits where
the rest of its sector can take them up: at the end of the text, or in a comment. So a crash leaves the old text or the
new one. Where there is no such room a short content ID keeps its length, and a descriptor without one stays without.
"""

from __future__ import annotations

from tapfs.formats.vmdk.content_id import new_cid
from tapfs.formats.vmdk.descriptor import Descriptor, parse_descriptor
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.uuid_link import MODIFICATION
from tapfs.identifiers import Uuid, new_uuid, random_bytes
from tapfs.plan import Grow, Step, Write
from tapfs.records import NamedTuple

_CHANGE_TRACKING = "changetrackpath"
_LONG_CID = "ddb.longcontentid"
#: Digits of the long content ID; it ends with the short one.
_LONG_DIGITS, _CID_DIGITS, _UUID_DIGITS = 32, 8, 36


class IdentityChange(NamedTuple):
    """The new content ID, None where the descriptor has no room for one, and the steps in file 0.

    `modification` is VirtualBox's UUID of the last change, None where the descriptor has none. `grow` is to be durable
    before `writes`.
    """

    cid: int | None
    modification: Uuid | None
    grow: list[Step]
    writes: list[Step]


def identity_change(descriptor: Descriptor, path: str, room: int | None) -> IdentityChange:
    """The change of the descriptor in the file `path`.

    `room` is the bytes that an embedded descriptor may have; one in a file of its own grows with its file.
    """
    widened = parse_descriptor(_with_all_digits(descriptor, room), path, descriptor.base)
    text = bytearray(widened.text)
    found = widened.values.get("cid")
    cid = None if found is None else new_cid(descriptor.cid, len(found.content))
    if found is not None and cid is not None:
        digits = len(found.content)
        text[found.at : found.at + digits] = f"{cid:0{digits}x}".encode("ascii")
        long = widened.values.get(_LONG_CID)
        if long is not None and len(long.content) == _LONG_DIGITS:
            begin = random_bytes((_LONG_DIGITS - _CID_DIGITS) // 2).hex()
            text[long.at : long.at + _LONG_DIGITS] = f"{begin}{cid:08x}".encode("ascii")
    changed = widened.values.get(MODIFICATION)
    modification = new_uuid() if changed is not None and len(changed.content) == _UUID_DIGITS else None
    if changed is not None and modification is not None:
        text[changed.at : changed.at + _UUID_DIGITS] = str(modification).encode("ascii")
    tracked = widened.values.get(_CHANGE_TRACKING)
    if tracked is not None:
        start = text.rfind(b"\n", 0, tracked.at) + 1
        line = text[start : tracked.at]
        text[start + len(line) - len(line.lstrip())] = ord("#")
    longer = len(text) > len(descriptor.text) and room is None
    grow: list[Step] = [Grow(0, descriptor.base + len(text))] if longer else []
    return IdentityChange(cid, modification, grow, _writes(descriptor, bytes(text)))


def _writes(descriptor: Descriptor, text: bytes) -> list[Step]:
    """One write for each sector of the text that changes. The text on disk has zeros behind its end."""
    steps: list[Step] = []
    for start in range(0, len(text), SECTOR):
        new = text[start : start + SECTOR]
        old = descriptor.text[start : start + SECTOR].ljust(len(new), b"\0")
        different = [at for at, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
        if different:
            first, stop = different[0], different[-1] + 1
            steps.append(Write(0, descriptor.base + start + first, new[first:stop]))
    return steps


def _with_all_digits(descriptor: Descriptor, room: int | None) -> bytes:
    """The text with eight digits in its content ID, if there is room for them; their values are of no meaning yet."""
    text = descriptor.text
    found = descriptor.values.get("cid")
    if found is not None:
        missing = _CID_DIGITS - len(found.content)
        return _inserted(text, found.at, b"0" * missing, room) if missing > 0 else text
    version = descriptor.values.get("version")
    head = text.find(b"\n", 0 if version is None else version.at) + 1
    ending = b"\r\n" if text[:head].endswith(b"\r\n") else b"\n"
    return _inserted(text, head, b"CID=" + b"0" * _CID_DIGITS + ending, room) if head else text


def _inserted(text: bytes, at: int, more: bytes, room: int | None) -> bytes:
    """The text with `more` at a place, changed in one sector alone; the old text where that cannot be."""
    sector_end = (at // SECTOR + 1) * SECTOR
    limit = sector_end if room is None else min(sector_end, room)
    if len(text) + len(more) <= limit:
        return text[:at] + more + text[at:]
    start = text.find(b"\n", at) + 1
    while 0 < start < sector_end:
        line = text[start:sector_end].split(b"\n", 1)
        comment = line[0].rstrip(b"\r")
        kept = len(comment) - len(more)
        # The encoding of the whole text is told by what is not ASCII in it.
        if len(line) == 2 and comment.startswith(b"#") and comment.isascii() and kept > 0:
            return text[:at] + more + text[at:start] + b"#" * kept + text[start + len(comment) :]
        start = text.find(b"\n", start) + 1
    return text
