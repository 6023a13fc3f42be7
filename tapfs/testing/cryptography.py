"""Primitives for drivers under test: ciphers that change nothing, as the engine in Python takes every cipher to be."""

from __future__ import annotations

import hashlib

from tapfs.driver import Argon2, Argon2Cost, Cipher


class PlainCryptography:
    """A :class:`tapfs.ciphers.Cryptography` without libraries."""

    def encrypt(self, cipher: Cipher, key: bytes | bytearray, plain: bytes | bytearray) -> bytes:
        """The same bytes."""
        del cipher, key
        return bytes(plain)

    def decrypt(self, cipher: Cipher, key: bytes | bytearray, encrypted: bytes) -> bytearray:
        """The same bytes."""
        del cipher, key
        return bytearray(encrypted)

    def argon2(self, variant: Argon2, password: bytes, salt: bytes, cost: Argon2Cost, length: int) -> bytes:
        """Some bytes that depend on password and salt, at no cost."""
        del variant, cost
        return hashlib.shake_128(password + salt).digest(length)
