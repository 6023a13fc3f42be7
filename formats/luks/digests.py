"""Digests and PBKDF2 by the names that LUKS headers have for them."""

from __future__ import annotations

import hashlib
import time
from functools import cache

from tapfs.errors import ErrorKind, ImageError

#: The digests of cryptsetup and QEMU, and the names that libcrypto has for them where those differ.
_NAMES = {
    **{name: name for name in ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3", "whirlpool")},
    **{f"sha3-{bits}": f"sha3_{bits}" for bits in (224, 256, 384, 512)},
    "blake2b-512": "blake2b",
    "blake2s-256": "blake2s",
}

#: The clock that iterations are counted by runs at least so long, in seconds.
_MEASURED_SECONDS = 0.05
_FIRST_ITERATIONS = 10_000


@cache  # a key slot is spread over thousands of digests
def libcrypto_name(name: str) -> str:
    """A digest's name as hashlib and libcrypto know it. Raises ImageError(unsupported) for one that is not here."""
    found = _NAMES.get(name.lower())
    if found is None:
        remedy = "known to tapfs: " + ", ".join(_NAMES)
        raise ImageError(ErrorKind.UNSUPPORTED, f"the digest {name!r} is not known here", op="unlock", remedy=remedy)
    try:
        hashlib.new(found, usedforsecurity=False)
    except ValueError:
        message = f"the digest {name!r} is not in the libcrypto that this Python uses"
        remedy = "use a libcrypto that has it, or cryptsetup"
        raise ImageError(ErrorKind.UNSUPPORTED, message, op="unlock", remedy=remedy) from None
    return found


def digest(name: str, data: bytes | bytearray) -> bytes:
    """The digest of the data. Raises ImageError(unsupported)."""
    return hashlib.new(libcrypto_name(name), data, usedforsecurity=False).digest()


def digest_bytes(name: str) -> int:
    """The length of a digest. Raises ImageError(unsupported)."""
    return hashlib.new(libcrypto_name(name), usedforsecurity=False).digest_size


def pbkdf2(name: str, secret: bytes | bytearray, salt: bytes, iterations: int, length: int) -> bytes:
    """RFC 8018, section 5.2, over HMAC with the digest. Raises ImageError(unsupported)."""
    return hashlib.pbkdf2_hmac(libcrypto_name(name), secret, salt, iterations, length)


def iterations_in(name: str, milliseconds: int, length: int) -> int:
    """The iterations of PBKDF2 that take this long on this processor for a key of `length` bytes."""
    iterations = _FIRST_ITERATIONS
    while True:
        begun = time.thread_time()
        pbkdf2(name, b"password", b"salt" * 8, iterations, length)
        taken = time.thread_time() - begun
        if taken >= _MEASURED_SECONDS:
            return int(iterations * milliseconds / 1000 / taken)
        iterations *= 4
