"""The anti-forensic splitter: a key spread over many stripes, so that a part of them is worth nothing.

LUKS1 specification, section "Anti-forensic Splitter"; LUKS2 keeps it (section 2.3, "Keyslots area").
"""

from __future__ import annotations

import secrets

from tapfs.formats.luks.digests import digest, digest_bytes


def split(key: bytes | bytearray, stripes: int, digest_name: str) -> bytearray:
    """The key in `stripes` stripes of its length, all but the last of them random."""
    length = len(key)
    material = bytearray(secrets.token_bytes(length * (stripes - 1)))
    mixed = _mixed(material, length, stripes - 1, digest_name)
    material += _xor(mixed, key)
    return material


def merge(material: bytes | bytearray, length: int, stripes: int, digest_name: str) -> bytearray:
    """The key of `length` bytes in so many stripes."""
    mixed = _mixed(material, length, stripes - 1, digest_name)
    return bytearray(_xor(mixed, material[length * (stripes - 1) :]))


def _mixed(material: bytes | bytearray, length: int, stripes: int, digest_name: str) -> bytes:
    size = digest_bytes(digest_name)
    block = bytes(length)
    for stripe in range(stripes):
        block = _diffused(_xor(block, material[length * stripe : length * (stripe + 1)]), size, digest_name)
    return block


def _diffused(block: bytes, size: int, digest_name: str) -> bytes:
    """Each piece of a digest's length becomes the digest of its number and itself; the last is cut."""
    pieces = (
        digest(digest_name, number.to_bytes(4, "big") + block[at : at + size])[: len(block) - at]
        for number, at in enumerate(range(0, len(block), size))
    )
    return b"".join(pieces)


def _xor(left: bytes | bytearray, right: bytes | bytearray) -> bytes:
    both = int.from_bytes(left, "big") ^ int.from_bytes(right, "big")
    return both.to_bytes(len(left), "big")
