"""Ciphers as data, and what the core does for a driver that has a secret to open or to make."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Protocol

from tapfs.records import NamedTuple, dataclass


class CipherAlgorithm(IntEnum):
    """A block cipher. The engine's C enum has the same values."""

    AES = 1
    SERPENT = 2
    TWOFISH = 3
    CAST5 = 4


class CipherMode(IntEnum):
    """How the blocks of a sector are chained. The engine's C enum has the same values."""

    ECB = 1
    CBC = 2
    CTR = 3
    XTS = 4


class InitialVector(IntEnum):
    """How the IV of a sector is made of its number, little-endian. The engine's C enum has the same values."""

    #: There is none: only with ECB.
    NONE = 0
    #: The low 32 bits of the number.
    PLAIN = 1
    PLAIN64 = 2
    #: The number, encrypted by the same algorithm under a digest of the key (`Cipher.iv_digest`).
    ESSIV = 3


@dataclass(frozen=True, slots=True)
class Cipher:
    """The transform of DATA extents, sector by sector; COMPRESSED payloads are never encrypted.

    `key_bytes` is the length of the whole key: that of XTS is two keys of the algorithm. The number of the sector that
    begins at an offset is ``(offset - iv_offset) / iv_bytes``, of the offset in the disk, or in the host file with
    `iv_from_host`. `iv_offset` may be negative. `iv_digest` is the digest of ESSIV by libcrypto's name.
    """

    algorithm: CipherAlgorithm
    mode: CipherMode
    key_bytes: int
    iv: InitialVector = InitialVector.PLAIN64
    iv_digest: str = ""
    sector_bytes: int = 512
    iv_bytes: int = 512
    iv_from_host: bool = False
    iv_offset: int = 0


class Argon2(StrEnum):
    """A variant of Argon2 (RFC 9106)."""

    I = "argon2i"  # noqa: E741  its name
    ID = "argon2id"


class Argon2Cost(NamedTuple):
    """The work of a derivation: passes over the memory, its bytes (whole KiB), and lanes that may run side by side."""

    passes: int
    memory_bytes: int
    lanes: int


class Cryptography(Protocol):
    """The primitives that a driver cannot have: it may not reach a library of the host. Digests are in `hashlib`."""

    def encrypt(self, cipher: Cipher, key: bytes | bytearray, plain: bytes | bytearray) -> bytes:
        """Whole sectors, encrypted as if they began at offset 0. Raises ImageError(unsupported)."""
        ...

    def decrypt(self, cipher: Cipher, key: bytes | bytearray, encrypted: bytes) -> bytearray:
        """Whole sectors, decrypted as if they began at offset 0. Raises ImageError(unsupported)."""
        ...

    def argon2(self, variant: Argon2, password: bytes, salt: bytes, cost: Argon2Cost, length: int) -> bytes:
        """A key of `length` bytes. Raises ImageError(unsupported) without the library, (no_space) without memory."""
        ...


def wipe(secret: bytearray) -> None:
    """Overwrite a secret that is not needed any more."""
    secret[:] = bytes(len(secret))
