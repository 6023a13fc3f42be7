"""UUIDs as images store them, 16 bytes in one of two orders, and the random numbers by which images know each other.

An image that is made twice is the same one where both times all of this comes from one seed (`derived_from`).

The standard library's `uuid` loads `platform`, whose regular expressions take longer to compile than a small image to
convert, and its `secrets` loads OpenSSL.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Generator


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
    """So many bytes that nobody can foresee who does not know the seed."""
    source = _source.get()
    return os.urandom(count) if source is None else source.take(count)


def random_bits(count: int) -> int:
    """A number of so many bits that nobody can foresee who does not know the seed."""
    return int.from_bytes(random_bytes(-(-count // 8)), "little") >> -count % 8


def time_of_making() -> int:
    """The time that a new image says it was made at, in whole seconds since 1970."""
    source = _source.get()
    return int(time.time()) if source is None else source.seconds


@contextmanager
def derived_from(seed: bytes, seconds: int) -> Generator[None]:
    """In the block, in this thread: random numbers follow from a seed, and new images are made at `seconds`."""
    token = _source.set(_Derived(seed, seconds))
    try:
        yield
    finally:
        _source.reset(token)


class _Derived:
    """The random numbers that follow from a seed, one after the other."""

    def __init__(self, seed: bytes, seconds: int) -> None:
        self.seconds = seconds
        self._seed = seed
        self._taken = 0

    def take(self, count: int) -> bytes:
        from hashlib import shake_256  # few images are made from a seed

        self._taken += 1
        return shake_256(b"%b%d" % (self._seed, self._taken)).digest(count)


_source: ContextVar[_Derived | None] = ContextVar("source", default=None)


def _turned(raw: bytes) -> bytes:
    return raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]
