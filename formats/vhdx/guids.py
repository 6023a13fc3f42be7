"""GUIDs as VHDX stores them: 16 bytes, of which the first three fields are little-endian."""

from __future__ import annotations

from tapfs.identifiers import new_uuid
from tapfs.patterns import pattern

#: The GUID that means "none".
NO_GUID = bytes(16)

_TEXT = pattern(r"\{?([0-9a-fA-F]{8})-([0-9a-fA-F]{4})-([0-9a-fA-F]{4})-([0-9a-fA-F]{4})-([0-9a-fA-F]{12})\}?")


def guid(text: str) -> bytes:
    """The bytes of a GUID that is written in the usual way. Raises ValueError."""
    found = parse_guid(text)
    if found is None:
        raise ValueError(text)
    return found


def parse_guid(text: str) -> bytes | None:
    """The same for a text that may be no GUID; braces around it are allowed."""
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        return None
    first, second, third, *rest = (bytes.fromhex(field) for field in found.groups())
    return first[::-1] + second[::-1] + third[::-1] + b"".join(rest)


def guid_text(stored: bytes) -> str:
    """The GUID in lower case and without braces."""
    digits = (stored[3::-1] + stored[5:3:-1] + stored[7:5:-1] + stored[8:]).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def new_guid() -> bytes:
    """A GUID that no other image has."""
    return new_uuid().bytes_le
