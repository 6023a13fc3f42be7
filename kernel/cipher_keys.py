"""Ciphers as the engine takes them: a description with its key, and the library that a few of them need."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tapfs.ciphers import Cipher, CipherAlgorithm, CipherMode
from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel._engine import ffi, lib

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData

_LIBRARIES = (b"libnettle.so.8",)

#: Of AES libcrypto has every mode with every key but this one: XTS with keys of two times 24 bytes.
_AES_192_XTS_KEY_BYTES = 48


def fill_cipher(target: CData, cipher: Cipher, key: bytes | bytearray, path: str | None) -> None:
    """Describe a cipher with its key in a `tapfs_cipher`, which the caller wipes (`wipe_cipher`) once it is used.

    Raises ImageError(unsupported) for one whose library is not there, for the image `path`.
    """
    if len(key) != cipher.key_bytes:
        raise ValueError(f"the key of the cipher has {cipher.key_bytes} bytes")
    if len(key) > len(target.key):
        raise ValueError(f"the engine takes keys of at most {len(target.key)} bytes")
    load_cipher(cipher, path)
    for name in ("algorithm", "mode", "iv", "key_bytes", "sector_bytes", "iv_bytes", "iv_from_host"):
        setattr(target, name, getattr(cipher, name))
    target.iv_offset = cipher.iv_offset % (1 << 64)
    target.iv_digest = cipher.iv_digest.encode()
    ffi.memmove(target.key, key, len(key))


def wipe_cipher(target: CData) -> None:
    """Overwrite the key."""
    ffi.memmove(target.key, bytes(len(target.key)), len(target.key))


def load_cipher(cipher: Cipher, path: str | None) -> None:
    """Have the engine open the library of a cipher, if it needs one. Raises ImageError(unsupported) without it."""
    aes_192_xts = cipher.mode is CipherMode.XTS and cipher.key_bytes == _AES_192_XTS_KEY_BYTES
    if cipher.algorithm is CipherAlgorithm.AES and not aes_192_xts:
        return
    if any(lib.tapfs_cipher_library(os.fsencode(name)) == 0 for name in _LIBRARIES):
        return
    name = f"{cipher.algorithm.name.lower()}-{cipher.mode.name.lower()}"
    raise ImageError(
        ErrorKind.UNSUPPORTED,
        f"is encrypted with {name}, and the library for that is not installed",
        path=path,
        op="unlock",
        remedy="install libnettle (on Debian the package libnettle8)",
    )
