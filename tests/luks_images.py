"""LUKS containers by bytes, written from the two specifications: a second writer, with names of its own for everything.

The payload is AES in XTS mode by libcrypto's command line, so the engine has no part in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
from collections.abc import Mapping
from functools import cache
from typing import Any

from tests.unit.engine.test_ciphers import by_openssl, xts_sector

PASSWORD = b"correct horse"
KEY = bytes(range(64, 128))
HEADER_2 = 16384
MATERIAL_2 = 2 * HEADER_2
PAYLOAD_2 = 1 << 20
STRIPES = 40
FAST = 1000


def diffuse(block: bytes) -> bytes:
    pieces = [block[at : at + 32] for at in range(0, len(block), 32)]
    digests = [hashlib.sha256(struct.pack(">I", i) + piece).digest() for i, piece in enumerate(pieces)]
    return b"".join(digest[: len(piece)] for digest, piece in zip(digests, pieces, strict=True))


def anti_forensic(key: bytes, stripes: int, choice: random.Random) -> bytes:
    before, out = bytes(len(key)), b""
    for _ in range(stripes - 1):
        stripe = choice.randbytes(len(key))
        out += stripe
        before = diffuse(bytes(a ^ b for a, b in zip(before, stripe, strict=True)))
    return out + bytes(a ^ b for a, b in zip(before, key, strict=True))


@cache
def xts_sectors(key: bytes, plain: bytes, *, first: int = 0, sector: int = 512) -> bytes:
    """Sectors of `sector` bytes; their numbers count 512."""
    numbers = range(0, len(plain), sector)
    return b"".join(xts_sector(key, first + at // 512, plain[at : at + sector]) for at in numbers)


@cache
def cbc_sectors(key: bytes, plain: bytes) -> bytes:
    """AES in CBC mode, the IV is the number of the sector."""
    name = f"aes-{8 * len(key)}-cbc"
    return b"".join(
        by_openssl(name, key, (at // 512).to_bytes(16, "little"), plain[at : at + 512])
        for at in range(0, len(plain), 512)
    )


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def slot_2(
    derivation: Mapping[str, Any], derived: bytes, choice: random.Random, *, offset: int = MATERIAL_2
) -> tuple[dict[str, Any], bytes]:
    """A key slot and its material."""
    stripes = anti_forensic(KEY, STRIPES, choice)
    padded = stripes.ljust(-(-len(stripes) // 512) * 512, b"\0")
    described = {
        "type": "luks2",
        "key_size": len(KEY),
        "af": {"type": "luks1", "stripes": STRIPES, "hash": "sha256"},
        "area": {
            "type": "raw",
            "offset": str(offset),
            "size": str(len(padded)),
            "encryption": "aes-cbc-plain64",
            "key_size": len(derived),
        },
        "kdf": dict(derivation),
    }
    return described, cbc_sectors(derived, padded)


def metadata_2(choice: random.Random, *, sector: int = 512, tweak: int = 0) -> tuple[dict[str, Any], bytes]:
    """The JSON of a container with one slot by PBKDF2, and the slot's material."""
    salt, proof_salt = choice.randbytes(32), choice.randbytes(32)
    derivation = {"type": "pbkdf2", "hash": "sha256", "iterations": FAST, "salt": encoded(salt)}
    slot, material = slot_2(derivation, hashlib.pbkdf2_hmac("sha256", PASSWORD, salt, FAST, 32), choice)
    proof = hashlib.pbkdf2_hmac("sha256", KEY, proof_salt, FAST, 32)
    described = {
        "keyslots": {"0": slot},
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(PAYLOAD_2),
                "size": "dynamic",
                "iv_tweak": str(tweak),
                "encryption": "aes-xts-plain64",
                "sector_size": sector,
            }
        },
        "digests": {
            "0": {
                "type": "pbkdf2",
                "keyslots": ["0"],
                "segments": ["0"],
                "hash": "sha256",
                "iterations": FAST,
                "salt": encoded(proof_salt),
                "digest": encoded(proof),
            }
        },
        "config": {"json_size": str(HEADER_2 - 4096), "keyslots_size": str(PAYLOAD_2 - MATERIAL_2)},
    }
    return described, material


def header_2(described: object, *, offset: int, sequence: int = 3, text: bytes | None = None) -> bytes:
    """A binary header with its JSON area and a true checksum; `text` in place of the JSON."""
    body = (json.dumps(described).encode() if text is None else text).ljust(HEADER_2 - 4096, b"\0")

    def head(checksum: bytes) -> bytes:
        magic = b"SKUL\xba\xbe" if offset else b"LUKS\xba\xbe"
        packed = magic + struct.pack(">HQQ", 2, HEADER_2, sequence) + b"a label".ljust(48, b"\0")
        packed += b"sha256".ljust(32, b"\0") + bytes(64) + b"the-uuid".ljust(40, b"\0") + bytes(48)
        return (packed + struct.pack(">Q", offset) + bytes(184) + checksum.ljust(64, b"\0")).ljust(4096, b"\0")

    return head(hashlib.sha256(head(b"") + body).digest()) + body


def container_2(
    plain: bytes,
    described: object,
    material: bytes,
    *,
    sector: int = 512,
    tweak: int = 0,
    sequences: tuple[int, int] = (3, 3),
) -> bytes:
    """A whole container."""
    first = header_2(described, offset=0, sequence=sequences[0])
    second = header_2(described, offset=HEADER_2, sequence=sequences[1])
    payload = xts_sectors(KEY, plain, first=tweak, sector=sector)
    return (first + second + material).ljust(PAYLOAD_2, b"\0") + payload


def simple_2(plain: bytes, seed: int = 1, *, sector: int = 512, tweak: int = 0) -> bytes:
    """A container of LUKS2 with one slot."""
    described, material = metadata_2(random.Random(seed), sector=sector, tweak=tweak)
    return container_2(plain, described, material, sector=sector, tweak=tweak)
