"""The changes of a descriptor before the disk is written: a new content ID, and an end of VMware's change tracking.

docs/specs/vmdk.md, "Delta links" and "Descriptor". Disks over this one have its content ID written down, so whoever
writes it gives it another one, and they are known to be stale. The list of changed blocks (changeTrackPath) would be
false after this, so its line becomes a comment. VirtualBox has a UUID for what the content ID is for. Each change is as
long as what it replaces: no other byte moves.
"""

from __future__ import annotations

import secrets
import uuid

from tapfs.formats.vmdk.descriptor import Descriptor
from tapfs.plan import Step, Write

_CHANGE_TRACKING = "changetrackpath"
_LONG_CID = "ddb.longcontentid"
_VIRTUALBOX_UUID = "ddb.uuid.modification"
#: Digits of the long content ID; it ends with the short one.
_LONG_DIGITS, _CID_DIGITS, _UUID_DIGITS = 32, 8, 36


def identity_steps(descriptor: Descriptor, cid: int) -> list[Step]:
    """The steps that give the disk the content ID `cid`, in file 0."""
    steps: list[Step] = []
    found = descriptor.values.get("cid")
    if found is not None:
        digits = len(found.content)
        steps.append(Write(0, descriptor.base + found.at, f"{cid:0{digits}x}".encode("ascii")))
    long = descriptor.values.get(_LONG_CID)
    if found is not None and long is not None and len(long.content) == _LONG_DIGITS:
        begin = secrets.token_hex((_LONG_DIGITS - _CID_DIGITS) // 2)
        steps.append(Write(0, descriptor.base + long.at, f"{begin}{cid:08x}".encode("ascii")))
    changed = descriptor.values.get(_VIRTUALBOX_UUID)
    if changed is not None and len(changed.content) == _UUID_DIGITS:
        random = str(uuid.UUID(int=secrets.randbits(128), version=4))
        steps.append(Write(0, descriptor.base + changed.at, random.encode("ascii")))
    tracked = descriptor.values.get(_CHANGE_TRACKING)
    if tracked is not None:
        start = descriptor.text.rfind(b"\n", 0, tracked.at) + 1
        line = descriptor.text[start : tracked.at]
        steps.append(Write(0, descriptor.base + start + len(line) - len(line.lstrip()), b"#"))
    return steps
