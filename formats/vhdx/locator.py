"""The parent locator: names of the parent, and its identity (docs/specs/vhdx.md, "Differencing")."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from tapfs.driver import BackingReference
from tapfs.formats.vhdx.guids import guid, guid_text, parse_guid

#: The key of the identity that the parent had when this image was made.
LINKAGE = "parent_linkage"
#: The key of the identity that the parent may have instead, while a disk is merged into it.
SECOND_LINKAGE = "parent_linkage2"
RELATIVE, VOLUME, ABSOLUTE = "relative_path", "volume_path", "absolute_win32_path"

#: The type of locator of a parent that is a VHDX file.
_TYPE = guid("b04aefb7-d19e-4a81-b789-25b8e9445913")
_COUNT_AT, _ENTRIES_AT = 18, 20
#: Offsets of key and value from the start of the locator, their lengths, all in bytes.
_ENTRY = struct.Struct("<IIHH")
_MAX_VALUE_BYTES = (1 << 16) - 2


def identity(linkage: bytes) -> str:
    """The GUID of data as `BackingReference.identity` and `Identified` have it."""
    return f"uuid:{guid_text(linkage)}"


def linkage_of(name: str) -> bytes | None:
    """The GUID in an identity, None for an identity of another kind."""
    kind, _, text = name.partition(":")
    return parse_guid(text) if kind == "uuid" else None


def parse_locator(raw: bytes) -> dict[str, str]:
    """The keys and values of a locator. Raises ValueError saying what cannot be true."""
    if len(raw) < _ENTRIES_AT or raw[:16] != _TYPE:
        raise ValueError("the parent locator is not of the type for VHDX parents")
    count = int.from_bytes(raw[_COUNT_AT : _COUNT_AT + 2], "little")
    if _ENTRIES_AT + count * _ENTRY.size > len(raw):
        raise ValueError(f"the parent locator has {count} entries in {len(raw)} bytes")
    found: dict[str, str] = {}
    for index in range(count):
        key_at, value_at, key_length, value_length = _ENTRY.unpack_from(raw, _ENTRIES_AT + index * _ENTRY.size)
        found[_text(raw, key_at, key_length)] = _text(raw, value_at, value_length)
    return found


def _text(raw: bytes, at: int, length: int) -> str:
    if at + length > len(raw) or length % 2 or not length:
        raise ValueError(f"a string of the parent locator is said to be at [{at:#x}, {at + length:#x})")
    return raw[at : at + length].decode("utf-16-le", "surrogatepass").rstrip("\0")


def pack_locator(entries: Mapping[str, str]) -> bytes:
    """A locator on disk. Raises ValueError for a text that is too long."""
    head = _TYPE + bytes(2) + len(entries).to_bytes(2, "little")
    start = _ENTRIES_AT + len(entries) * _ENTRY.size
    table = strings = b""
    for key, value in entries.items():
        stored_key, stored_value = key.encode("utf-16-le"), value.encode("utf-16-le", "surrogatepass")
        if not 0 < len(stored_value) <= _MAX_VALUE_BYTES:
            raise ValueError(f"{key} has {len(stored_value)} bytes, at most {_MAX_VALUE_BYTES} fit")
        at = start + len(strings)
        table += _ENTRY.pack(at, at + len(stored_key), len(stored_key), len(stored_value))
        strings += stored_key + stored_value
    return head + table + strings


def parent_entries(name: str, linkage: bytes) -> dict[str, str]:
    """The entries for a parent under a name of this system, relative to the folder of the image or absolute."""
    link = {LINKAGE: "{" + guid_text(linkage) + "}"}
    if name.startswith("/"):
        return {**link, ABSOLUTE: name}
    written = name.replace("/", "\\")
    return {**link, RELATIVE: written if written.startswith("..\\") else ".\\" + written.removeprefix(".\\")}


def parent_reference(entries: Mapping[str, str]) -> BackingReference | None:
    """The parent that a locator names, None if no name can be used.

    Windows's absolute names mean nothing on another system, so of these the last component is looked for beside the
    image. The format is known: a parent of this type of locator is a VHDX file.
    """
    names: list[str] = []
    for key in (RELATIVE, VOLUME, ABSOLUTE):
        value = entries.get(key, "")
        name = value if value.startswith("/") else value.replace("\\", "/")
        if key != RELATIVE and not value.startswith("/"):
            name = name.rpartition("/")[2]
        name = name.removeprefix("./")
        if _can_be_a_name(name) and name not in names:
            names.append(name)
    if not names:
        return None
    linkages = [found for key in (LINKAGE, SECOND_LINKAGE) if (found := parse_guid(entries.get(key, ""))) is not None]
    identities = [identity(linkage) for linkage in linkages]
    first = identities[0] if identities else None
    return BackingReference(names[0], "vhdx", tuple(names[1:]), first, other_identities=tuple(identities[1:]))


def _can_be_a_name(name: str) -> bool:
    try:
        return b"\0" not in name.encode("utf-8", "surrogateescape") and name != ""
    except UnicodeEncodeError:
        return False
