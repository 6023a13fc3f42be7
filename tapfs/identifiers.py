"""UUIDs as images store them, 16 bytes in one of two orders, and the random numbers by which images know each other.

The standard library's `uuid` loads `platform`, whose regular expressions take longer to compile than a small image to
convert, and its `secrets` loads OpenSSL.
"""

from __future__ import annotations

import os

from tapfs.records import NamedTuple


class Uuid(NamedTuple):
    """A UUID, by its bytes in the order of its text."""

    raw: bytes

    @classmethod
    def of_bytes_le(cls, raw: bytes) -> Uuid:
        """The UUID of which the first three fields are stored as little-endian numbers."""
        return cls(_turned(raw))

    @property
    def bytes_le(self) -> bytes:
        """The bytes with the first three fields as little-endian numbers."""
        return _turned(self.raw)

    def __str__(self) -> str:
        digits = self.raw.hex()
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def new_uuid() -> Uuid:
    """A random UUID (version 4), which no other image has."""
    raw = bytearray(random_bytes(16))
    raw[6] = raw[6] & 0x0F | 0x40  # the version
    raw[8] = raw[8] & 0x3F | 0x80  # the variant: RFC 9562, "UUID Version 4"
    return Uuid(bytes(raw))


def random_bytes(count: int) -> bytes:
    """So many bytes that nobody can foresee."""
    return os.urandom(count)


def random_bits(count: int) -> int:
    """A number of so many bits that nobody can foresee."""
    return int.from_bytes(os.urandom(-(-count // 8)), "little") >> -count % 8


def _turned(raw: bytes) -> bytes:
    return raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]
