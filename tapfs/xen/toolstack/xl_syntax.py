"""Parse the disks of xl's configurations, such as `vdev=xvda,access=ro,target=FILE`.

Strings of other kinds are those of tapfs/xen/specification.py. The keys are those of xl-disk-configuration(5).
What `tapfs attach` cannot do, or does otherwise, is refused in words.
"""

from __future__ import annotations

import re

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.device import parse_vdev
from tapfs.xen.specification import DiskSpecification, parse_mode, parse_specification

_KEY_VALUE = re.compile(r"([a-z][a-z-]*)=(.*)", re.DOTALL)
_KEYS = ("target", "format", "vdev", "access", "devtype", "script", "backendtype", "backend")
#: Words without a value, and whether the disk is a CD-ROM.
_FLAGS = {"cdrom": True, "discard": False, "no-discard": False, "direct-io-safe": False}
#: xl's name of the way in which tapfs serves a disk. A string from a configuration may have it.
_OURS = {"script": "block-tapfs", "backendtype": "phy"}


def parse_disk(text: str) -> DiskSpecification:
    """What a disk of xl's or blktap's configurations means. Raises ImageError(invalid_argument)."""
    first = _KEY_VALUE.match(text)
    if first is None or not (first[1] in _KEYS or ",target=" in text):
        return parse_specification(text)
    values, cdrom = _values(text)
    target = parse_specification(values.get("target", ""))
    named = values.get("format")
    if named == "empty" or "target" not in values:
        raise _refused(text, "has no target, and a drive without a disk is nothing to serve")
    if named is not None and target.format not in (None, named):
        raise _refused(text, f"has the format {named} and a target of the format {target.format}")
    for key, ours in _OURS.items():
        if values.get(key, ours) != ours:
            raise _refused(text, f"wants another to serve the disk: {key}={values[key]}", "leave that out")
    if values.get("backend", "0") not in ("0", "Domain-0"):
        raise _refused(text, f"wants domain {values['backend']} to serve the disk", "leave backend= out")
    return target._replace(
        format=target.format if named is None else named,
        vdev=parse_vdev(values["vdev"]) if "vdev" in values else target.vdev,
        mode="r" if cdrom else parse_mode(values["access"]) if "access" in values else target.mode,
    )


def _values(text: str) -> tuple[dict[str, str], bool]:
    """The values by key, and whether the disk is a CD-ROM. `target` comes last and may hold commas."""
    values: dict[str, str] = {}
    cdrom = False
    while text:
        found = _KEY_VALUE.match(text)
        if found is not None and found[1] == "target":
            values["target"] = found[2]
            break
        piece, _, text = text.partition(",")
        key, equals, value = piece.partition("=")
        if not equals and key in _FLAGS:
            cdrom = cdrom or _FLAGS[key]
        elif equals and key in _KEYS:
            values[key] = value
        else:
            raise _refused(
                piece, "is nothing that tapfs knows of a disk", f"the keys are {', '.join(_KEYS)}; target= comes last"
            )
    return values, cdrom or values.get("devtype") == "cdrom"


def _refused(text: str, message: str, remedy: str | None = None) -> ImageError:
    return ImageError(ErrorKind.INVALID_ARGUMENT, f"{text!r} {message}", op="parse", remedy=remedy)
