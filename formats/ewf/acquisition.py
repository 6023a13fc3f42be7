"""The acquisition of an image: its header sections, and the digests of the disk (docs/specs/ewf.md)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from tapfs.driver import HostFile
from tapfs.formats.ewf.sections import Section

#: The identifiers of the first category of a header, with the key of `details` for each.
_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "a": "description",
        "c": "case",
        "n": "evidence_number",
        "e": "examiner",
        "t": "notes",
        "md": "model",
        "sn": "serial_number",
        "l": "label",
        "av": "program",
        "ov": "platform",
        "m": "acquired",
    }
)
#: Bytes of a header section that are read, and that it may unpack to.
_PACKED_LIMIT, _TEXT_LIMIT = 1 << 20, 4 << 20


def acquisition(file: HostFile, sections: Iterable[Section]) -> dict[str, str]:
    """The values of the best header: "header2", which is UTF-16, before "header". Empty if none can be read."""
    for kind in ("header2", "header"):
        for section in sections:
            if section.kind == kind:
                found = _values(_text(file.read(section.content, min(section.end - section.content, _PACKED_LIMIT))))
                if found:
                    return found
    return {}


def _text(packed: bytes) -> str:
    try:
        raw = zlib.decompressobj().decompress(packed, _TEXT_LIMIT)
    except zlib.error:
        return ""
    # EnCase's second header begins with a byte order mark.
    return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1", "replace")


def _values(text: str) -> dict[str, str]:
    """Of the category "main": a line of identifiers, then a line of values, both separated by tabs."""
    lines = text.replace("\r", "").split("\n")
    if "main" not in lines:
        return {}
    names, values = [*lines[lines.index("main") + 1 :], "", ""][:2]
    pairs = zip(names.split("\t"), values.split("\t"), strict=False)
    found = {_KEYS[name]: value for name, value in pairs if name in _KEYS and value}
    if "acquired" in found:
        found["acquired"] = _moment(found["acquired"])
    return found


def _moment(value: str) -> str:
    """A moment in the form of ISO 8601: from seconds since 1970, or from six numbers in the examiner's own time."""
    from datetime import UTC, datetime  # few images are of this format

    try:
        if value.isdigit():
            return datetime.fromtimestamp(int(value), UTC).isoformat().replace("+00:00", "Z")
        return datetime.strptime(value, "%Y %m %d %H %M %S").isoformat()  # noqa: DTZ007  it names no zone
    except (ValueError, OverflowError, OSError):
        return value


def digests(file: HostFile, sections: Iterable[Section]) -> dict[str, str]:
    """The MD5 and SHA-1 of the disk in hexadecimal, as far as the image has them."""
    found: dict[str, str] = {}
    for section in sections:
        if section.kind not in ("hash", "digest"):
            continue
        raw = file.read(section.content, 36)
        if any(raw[:16]):
            found["md5"] = raw[:16].hex()
        if section.kind == "digest" and any(raw[16:36]):
            found["sha1"] = raw[16:36].hex()
    return found


def bad_ranges(file: HostFile, sections: Iterable[Section]) -> int:
    """How many ranges of sectors could not be read when the image was made. They are zeros in the image."""
    return sum(
        int.from_bytes(file.read(section.content, 4), "little") for section in sections if section.kind == "error2"
    )
