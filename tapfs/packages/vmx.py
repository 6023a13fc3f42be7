"""VMware's .vmx: the disks that are attached to a virtual machine, by bus, controller and unit."""

from __future__ import annotations

import codecs
import re

from tapfs.packages.contents import Package, PackagedDisk, numbered

#: A value may stand without quotes, as people write it; a remark has a blank before it. The time of a match is linear.
_LINE = re.compile(r'\s*([A-Za-z0-9_.:\-]+)\s*=\s*(?:"([^"]*)"|([^"#\s](?:[^"]*?[^"\s])??)(?:\s+#.*)?\s*$)')
_ENCODING = re.compile(rb'^[ \t]*\.encoding[ \t]*=[ \t]*"?([A-Za-z0-9_\-]{1,40})', re.MULTILINE)
_DEVICE = re.compile(r"(ide|scsi|sata|nvme)(\d{1,2}):(\d{1,3})\.(filename|present|devicetype)")
_ESCAPE = re.compile(r"\|([0-9A-Fa-f]{2})")
#: Buses in the order of their disks' numbers.
_BUSES = ("ide", "scsi", "sata", "nvme")


def read_vmx(content: bytes) -> Package:
    """The package that a .vmx is. Raises ImageError."""
    settings = _settings(content)
    devices: dict[tuple[int, int, int], dict[str, str]] = {}
    for key, value in settings.items():
        match = _DEVICE.fullmatch(key)
        if match is not None:
            place = _BUSES.index(match[1]), int(match[2]), int(match[3])
            devices.setdefault(place, {})[match[4]] = value
    disks: list[PackagedDisk] = []
    for _, device in sorted(devices.items()):
        file = device.get("filename", "")
        absent = device.get("present", "true").lower() == "false"
        # A drive for CDs names an .iso, a device of the host, or nothing.
        if absent or not file.lower().endswith(".vmdk") or "cdrom" in device.get("devicetype", "").lower():
            continue
        disks.append(PackagedDisk(len(disks) + 1, file, files=(file,)))
    return Package("vmx", numbered(disks))


def _settings(content: bytes) -> dict[str, str]:
    """Keys in lower case, and their values; of a key that stands there twice the last value."""
    text = content.decode(_encoding(content), errors="surrogateescape")
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is not None:
            found[match[1].lower()] = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), match[2] or match[3] or "")
    return found


def _encoding(content: bytes) -> str:
    match = _ENCODING.search(content)
    name = "utf-8" if match is None else match[1].decode()
    try:
        # Of the codecs of Python only those of texts that are ASCII where ASCII is.
        plain = codecs.lookup(name).name
        return plain if 'a="'.encode(plain) == b'a="' else "utf-8"
    except (LookupError, UnicodeError, TypeError):
        return "utf-8"
