"""Ciphers by the names that LUKS headers have for them: "aes" with "xts-plain64", "serpent" with "cbc-essiv:sha256"."""

from __future__ import annotations

from tapfs.driver import Cipher, CipherAlgorithm, CipherMode, InitialVector
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.luks.digests import digest_bytes, libcrypto_name

ALGORITHMS = {
    "aes": CipherAlgorithm.AES,
    "serpent": CipherAlgorithm.SERPENT,
    "twofish": CipherAlgorithm.TWOFISH,
    "cast5": CipherAlgorithm.CAST5,
}
MODES = {mode.name.lower(): mode for mode in CipherMode}
INITIAL_VECTORS = {vector.name.lower(): vector for vector in InitialVector if vector is not InitialVector.NONE}


def key_lengths(algorithm: CipherAlgorithm) -> tuple[int, ...]:
    """The lengths in bytes that keys of the block cipher have."""
    return (16,) if algorithm is CipherAlgorithm.CAST5 else (16, 24, 32)


def cipher_named(name: str, mode: str, key_bytes: int) -> Cipher:
    """The cipher `name` in `mode`, a mode and perhaps a generator of IVs. Raises ImageError(unsupported) naming it."""
    chaining, _, vector = mode.lower().partition("-")
    generator, _, digest_name = vector.partition(":")
    found = ALGORITHMS.get(name.lower()), MODES.get(chaining)
    algorithm, chained = found
    iv = InitialVector.NONE if chained is CipherMode.ECB else INITIAL_VECTORS.get(generator)
    said = f"{name}-{mode} with a key of {8 * key_bytes} bits"
    if algorithm is None or chained is None or iv is None:
        raise _refused(said)
    lengths = key_lengths(algorithm)
    if chained is CipherMode.XTS:
        lengths = () if algorithm is CipherAlgorithm.CAST5 else tuple(2 * length for length in lengths)
    if key_bytes not in lengths:
        raise _refused(said)
    iv_digest = ""
    if iv is InitialVector.ESSIV:
        iv_digest = libcrypto_name(digest_name)
        if digest_bytes(digest_name) not in key_lengths(algorithm):
            raise _refused(f"{said}, for {digest_name} gives no key of it,")
    return Cipher(algorithm, chained, key_bytes, iv, iv_digest)


def _refused(said: str) -> ImageError:
    return ImageError(
        ErrorKind.UNSUPPORTED,
        f"the cipher {said} is not known to tapfs",
        op="open",
        remedy="cryptsetup may open it",
    )
