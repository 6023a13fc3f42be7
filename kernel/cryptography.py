"""The primitives that drivers of encrypted images ask for: ciphers of the engine, Argon2 of a package of Python."""

from __future__ import annotations

import errno
import os

from tapfs.ciphers import Argon2, Argon2Cost, Cipher
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.cipher_keys import fill_cipher, wipe_cipher

_KIB = 1024


class EngineCryptography:
    """A :class:`tapfs.ciphers.Cryptography`; `path` is the image, for messages."""

    def __init__(self, path: str | None) -> None:
        self._path = path

    def encrypt(self, cipher: Cipher, key: bytes | bytearray, plain: bytes | bytearray) -> bytes:
        """See :meth:`tapfs.ciphers.Cryptography.encrypt`."""
        return bytes(self._apply(cipher, key, plain, encrypt=True))

    def decrypt(self, cipher: Cipher, key: bytes | bytearray, encrypted: bytes) -> bytearray:
        """See :meth:`tapfs.ciphers.Cryptography.decrypt`."""
        return self._apply(cipher, key, encrypted, encrypt=False)

    def argon2(self, variant: Argon2, password: bytes, salt: bytes, cost: Argon2Cost, length: int) -> bytes:
        """See :meth:`tapfs.ciphers.Cryptography.argon2`."""
        try:
            from argon2.exceptions import HashingError
            from argon2.low_level import Type, hash_secret_raw
        except ImportError as error:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"a key slot needs {variant.value}, and the library for that is not installed",
                path=self._path,
                op="unlock",
                remedy="pip install 'tapfs[luks]', which brings argon2-cffi",
            ) from error
        try:
            return hash_secret_raw(
                password,
                salt,
                time_cost=cost.passes,
                memory_cost=cost.memory_bytes // _KIB,
                parallelism=cost.lanes,
                hash_len=length,
                type=Type.I if variant is Argon2.I else Type.ID,
            )
        except HashingError as error:
            raise ImageError(
                ErrorKind.NO_SPACE,
                f"a key slot needs {cost.memory_bytes >> 20} MiB of memory to be opened: {error}",
                path=self._path,
                op="unlock",
            ) from error

    def _apply(self, cipher: Cipher, key: bytes | bytearray, data: bytes | bytearray, *, encrypt: bool) -> bytearray:
        changed = bytearray(data)
        spec = ffi.new("tapfs_cipher *")
        try:
            fill_cipher(spec, cipher, key, self._path)
            with ffi.from_buffer("uint8_t[]", changed, require_writable=True) as buffer:
                result = lib.tapfs_cipher_apply(spec, encrypt, buffer, 0, len(changed))
        finally:
            wipe_cipher(spec)
        if result == -errno.ENOMEM:
            raise from_os_error(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), path=self._path, op="unlock")
        if result < 0:
            name = f"{cipher.algorithm.name}-{8 * cipher.key_bytes}-{cipher.mode.name}-{cipher.iv.name}".lower()
            raise ImageError(ErrorKind.UNSUPPORTED, f"this host cannot use {name}", path=self._path, op="unlock")
        return changed
