"""Tar archives: the members of one, each with the place of its bytes; POSIX, GNU and old headers.

The reader is tapfs's own, because an archive is hostile input: names and extended headers are bounded, every place lies
in the file, and nothing is unpacked. Links, devices and sparse members have no place.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from tapfs.packages.contents import Place, Read, damaged
from tapfs.records import NamedTuple

BLOCK = 512

#: Extended headers and long names are not longer.
_MOST_HEADER_BYTES = 1 << 20
_MOST_NAME_BYTES = 4096
#: So many bytes are read at once.
_NEAR_BYTES = 4 * BLOCK
#: So many members are read; a disk of 4 TiB in an .xva has half as many.
_MOST_MEMBERS = 1 << 24

_REGULAR = b"0\x007"
_LONG_NAME, _LONG_LINK = b"L", b"K"
_EXTENDED, _EXTENDED_FOR_ALL = (b"x", b"X"), b"g"
_WITHOUT_BYTES = b"123456"
_SPARSE = b"S"


class Member(NamedTuple):
    """A member: `place` is None for what has no bytes of its own as they are. `folder`: it is one."""

    name: str
    place: Place | None
    header: int
    folder: bool = False


def members(read: Read, size: int) -> Iterator[Member]:
    """The members of an archive of `size` bytes, in its order. Raises ImageError(corrupt)."""
    at = count = 0
    name: str | None = None
    length: int | None = None
    sparse = False
    near, near_at = b"", 0
    while True:
        if not near_at <= at <= near_at + len(near) - BLOCK:
            # Small members lie near each other.
            near, near_at = read(at, _NEAR_BYTES), at
        header = near[at - near_at : at - near_at + BLOCK]
        if not header.strip(b"\0"):
            # Two blocks of zeros end an archive, one is allowed, and some writers leave both out.
            return
        if len(header) < BLOCK:
            raise damaged("ends in the middle of a member's header", offset=at)
        _check_sum(header, at)
        count += 1
        if count > _MOST_MEMBERS:
            raise damaged(f"has more than {_MOST_MEMBERS} members", offset=at)
        kind = header[156:157]
        own = _number(header[124:136], at)
        data = at + BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _EXTENDED_FOR_ALL, *_EXTENDED):
            if own > _MOST_HEADER_BYTES:
                raise damaged(f"has an extended header of {own} bytes", offset=at)
            content = read(data, own)
            if len(content) < own:
                raise damaged("ends in the middle of an extended header", offset=at)
            if kind == _LONG_NAME:
                name = _text(content.split(b"\0")[0], at)
            elif kind in _EXTENDED:
                found = _records(content, at)
                called = found.get(b"GNU.sparse.name", found.get(b"path"))
                name = name if called is None else _text(called, at)
                length = _decimal(found[b"size"], at) if b"size" in found else length
                sparse = sparse or any(key.startswith(b"GNU.sparse.") for key in found)
            at = _next(data, own, size, at)
            continue
        own_name = name if name is not None else _text(_short_name(header), at)
        folder = kind == b"5" or (kind in _REGULAR and own_name.endswith("/"))
        plain = kind in _REGULAR and not folder
        stored = own if length is None else length
        stored = 0 if kind in _WITHOUT_BYTES else stored
        after = _next(data, stored, size, at)
        if kind == _SPARSE:
            after = _behind_sparse_maps(read, header, data, stored, size)
        yield Member(own_name, Place(data, stored) if plain and not sparse else None, at, folder)
        at, name, length, sparse = after, None, None, False


def _check_sum(header: bytes, at: int) -> None:
    """The sum of all bytes, its own field counted as blanks; old writers took the bytes as signed."""
    field = header[148:156]
    told = _number(field, at) + sum(field) - len(field) * ord(" ")
    # The low half of Adler-32 is the sum of the bytes and one, modulo this prime, in a tenth of the time.
    if (zlib.adler32(header) & 0xFFFF) == (told + 1) % 65521:
        return
    if told != sum(header) - 256 * (sum(byte > 127 for byte in header) - sum(byte > 127 for byte in field)):
        raise damaged("has a header of a member with a wrong checksum", offset=at)


def _number(field: bytes, at: int) -> int:
    """Octal digits, or a number to the base 256 after a first byte of 0x80, as GNU writes large ones."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise damaged("has a negative number in the header of a member", offset=at)
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise damaged("has a header of a member with a number that is none", offset=at)
    return int(digits or b"0", 8)


def _short_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes, at: int) -> str:
    if len(name) > _MOST_NAME_BYTES:
        raise damaged(f"has a member with a name of {len(name)} bytes", offset=at)
    return name.decode(errors="surrogateescape")


def _records(content: bytes, at: int) -> dict[bytes, bytes]:
    """The records "length key=value" of an extended header of POSIX."""
    found: dict[bytes, bytes] = {}
    place = 0
    while place < len(content) and content[place]:
        space = content.find(b" ", place, place + 20)
        digits = content[place:space]
        if space < 0 or not digits.isdigit():
            raise damaged("has a damaged extended header", offset=at)
        end = place + int(digits)
        record = content[space + 1 : end - 1]
        if end <= space or end > len(content) or b"=" not in record:
            raise damaged("has a damaged extended header", offset=at)
        key, _, value = record.partition(b"=")
        found[key] = value
        place = end
    return found


def _decimal(value: bytes, at: int) -> int:
    if not value.isdigit() or len(value) > 20:
        raise damaged("has an extended header with a size that is none", offset=at)
    return int(value)


def _next(data: int, length: int, size: int, at: int) -> int:
    """Where the next header is behind the bytes of a member, which must lie in the file."""
    if length > size - data:
        raise damaged(f"has a member of {length} bytes, and ends before them", offset=at)
    return data + -(-length // BLOCK) * BLOCK


def _behind_sparse_maps(read: Read, header: bytes, data: int, stored: int, size: int) -> int:
    """Where the next header is behind a sparse member of GNU tar's old kind: its map may go on in blocks of its own."""
    extended, maps = header[482], 0
    while extended:
        block = read(data + maps * BLOCK, BLOCK)
        maps += 1
        if len(block) < BLOCK or maps > _MOST_HEADER_BYTES // BLOCK:
            raise damaged("has a sparse member with a damaged map", offset=data)
        extended = block[504]
    return _next(data + maps * BLOCK, stored, size, data - BLOCK)
