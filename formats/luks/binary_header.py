"""The two binary headers of LUKS2, each with a JSON area behind it; the newer valid one counts.

LUKS2 specification, section 2.1 "Binary Header" and 2.4 "Metadata Recovery" (docs/specs/luks.md).
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.luks.digests import libcrypto_name
from tapfs.formats.luks.signature import MAGIC, SECOND_MAGIC, VERSION_2
from tapfs.formats.luks.volume import Read

HEADER_BYTES = 4096
#: The lengths that a header has with its JSON area. The second header begins where the first with its area ends.
SIZES = tuple(1 << bits for bits in range(14, 23))

_HEAD = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_CHECKSUM_AT, _CHECKSUM_BYTES = 448, 64


class Metadata(NamedTuple):
    """A valid header: its number, which grows with each change, its texts, and the value of its JSON area.

    `offset` is where the header stands. `other_fault` says what is wrong with the other one of the two, if anything.
    """

    offset: int
    header_bytes: int
    sequence: int
    label: str
    uuid: str
    json: object
    other_fault: str | None = None


def read_metadata(read: Read, path: str) -> Metadata:
    """The header that counts. Raises ImageError: invalid_format, corrupt where neither is valid."""
    first, first_fault = _read_header(read, 0, MAGIC)
    # Where the first is damaged nothing says how long it is.
    places = SIZES if first is None else (first.header_bytes,)
    second, second_fault = None, "there is no second header"
    for place in places:
        second, fault = _read_header(read, place, SECOND_MAGIC)
        second_fault = fault or second_fault
        if second is not None:
            break
    if first is None:
        if second is not None:
            return second._replace(other_fault=first_fault or "there is no first header")
        if first_fault is None:
            raise ImageError(ErrorKind.INVALID_FORMAT, "is no LUKS container", path=path, offset=0, op="open")
        message = f"neither of the two LUKS2 headers is valid: {first_fault}; {second_fault}"
        raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=0, op="open")
    if second is None:
        return first._replace(other_fault=second_fault)
    if first.sequence >= second.sequence:
        return first._replace(other_fault=None)
    return second._replace(other_fault="the first header is older than the second")


def _read_header(read: Read, offset: int, magic: bytes) -> tuple[Metadata | None, str | None]:
    """A valid header, or what is wrong with it; neither where there is no trace of one."""
    head = read(offset, HEADER_BYTES)
    if len(head) < HEADER_BYTES or not head.startswith(magic):
        return None, None
    _, version, size, sequence, label, checksum_name, _, uuid, _, place, _, checksum = _HEAD.unpack_from(head)
    where = f"the header at {offset:#x}"
    if version != VERSION_2 or size not in SIZES or place != offset or (offset and size != offset):
        return None, f"{where} contradicts itself"
    whole = head + read(offset + HEADER_BYTES, size - HEADER_BYTES)
    if len(whole) < size:
        return None, f"{where} is cut by the end of the file"
    try:
        name = libcrypto_name(_text(checksum_name))
    except ImageError as error:
        return None, f"{where} has a checksum that cannot be computed: {error.message}"
    cleared = whole[:_CHECKSUM_AT] + bytes(_CHECKSUM_BYTES) + whole[_CHECKSUM_AT + _CHECKSUM_BYTES :]
    computed = hashlib.new(name, cleared, usedforsecurity=False).digest()
    if computed != checksum[: len(computed)]:
        return None, f"{where} has another checksum"
    try:
        value: object = json.loads(whole[HEADER_BYTES:].split(b"\0", 1)[0])
    except (ValueError, RecursionError):
        return None, f"{where} has no JSON behind it"
    return Metadata(offset, size, sequence, _text(label), _text(uuid), value), None


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
