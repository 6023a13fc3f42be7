"""BLAKE3 digests, by the library `blake3`, which is loaded when the first thing is hashed.

The library works on the caller's thread without the GIL, so several threads hash at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError

if TYPE_CHECKING:
    from tapfs.kernel.engine import Buffer

DIGEST_BYTES = 32

#: Gives the digest of bytes.
Digest = Callable[["Buffer"], bytes]


def blake3_digest() -> Digest:
    """The function that hashes. Raises ImageError(unsupported) where the library is missing."""
    library = _library()

    def digest(data: Buffer) -> bytes:
        return library(data).digest()

    return digest


def derived_digest(context: str, data: bytes) -> bytes:
    """The digest in BLAKE3's mode of key derivation: no other use of BLAKE3 gives it. Raises as `blake3_digest`."""
    return _library()(data, derive_key_context=context).digest()


if TYPE_CHECKING:
    from blake3 import blake3

    _Library = type[blake3]


def _library() -> _Library:
    try:
        from blake3 import blake3
    except ImportError as error:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "hashing needs the Python package blake3",
            op="hash the disk",
            remedy='pip install "tapfs[hash]"',
        ) from error
    return blake3
