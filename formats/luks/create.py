"""Make a LUKS1 header: a new key, and one slot that a password opens. The layout and the defaults are QEMU's."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from tapfs.driver import CipherMode, Cryptography, wipe
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.luks.cipher_names import ALGORITHMS, INITIAL_VECTORS, MODES, cipher_named, key_lengths
from tapfs.formats.luks.digests import iterations_in, libcrypto_name, pbkdf2
from tapfs.formats.luks.splitter import split
from tapfs.formats.luks.version1 import DIGEST_BYTES, SALT_BYTES, SLOTS, STRIPES, Header1, SlotField
from tapfs.formats.luks.volume import SECTOR
from tapfs.formats.rounding import round_up

_ALIGNMENT = 4096
_FIRST_MATERIAL = 4096
_LEAST_ITERATIONS = 1000
#: So much of the time of a slot goes to the digest that tells whether a key is right.
_DIGEST_SHARE = 8
_MOST_ITERATIONS = 100_000_000


class LuksOptions(NamedTuple):
    """The choices for a new header; `cipher_mode` holds the generator of IVs, too."""

    cipher_name: str
    cipher_mode: str
    key_bytes: int
    digest: str
    milliseconds: int

    @property
    def payload_offset(self) -> int:
        """Where the payload begins behind the header and the stripes of eight slots, in bytes."""
        return _FIRST_MATERIAL + SLOTS * self.slot_bytes

    @property
    def slot_bytes(self) -> int:
        """The distance between the stripes of two slots."""
        return round_up(self.key_bytes * STRIPES, _ALIGNMENT)


def parse_luks_options(given: Mapping[str, str], prefix: str = "") -> LuksOptions:
    """The choices that the `-o` pairs with this prefix make. Raises ImageError(unsupported) for what cannot be."""

    def option(name: str, default: str) -> str:
        return given.get(prefix + name, default)

    algorithm, mode = option("cipher-alg", "aes-256"), option("cipher-mode", "xts")
    name, _, bits = algorithm.partition("-")
    if name not in ALGORITHMS or not bits.isascii() or not bits.isdigit() or len(bits) > 3:
        raise _refused(f"{prefix}cipher-alg={algorithm}: is no cipher like aes-256 or twofish-128")
    if mode not in MODES:
        raise _refused(f"{prefix}cipher-mode={mode}: must be one of {', '.join(MODES)}")
    key_bytes = int(bits) // 8
    if key_bytes not in key_lengths(ALGORITHMS[name]):
        raise _refused(f"{prefix}cipher-alg={algorithm}: {name} has no keys of {bits} bits")
    if MODES[mode] is CipherMode.XTS:
        key_bytes *= 2
    generator = option("ivgen-alg", "plain64")
    if generator not in INITIAL_VECTORS:
        raise _refused(f"{prefix}ivgen-alg={generator}: must be one of {', '.join(INITIAL_VECTORS)}")
    suffix = f":{option('ivgen-hash-alg', 'sha256')}" if generator == "essiv" else ""
    cipher_mode = f"{mode}-{generator}{suffix}"  # QEMU reads no mode without a generator, which ECB does not use
    digest, time = option("hash-alg", "sha256"), option("iter-time", "2000")
    if not time.isascii() or not time.isdigit() or not 1 <= int(time[:10]) <= 100_000:
        raise _refused(f"{prefix}iter-time={time}: must be milliseconds, from 1 to 100000")
    try:
        cipher_named(name, cipher_mode, key_bytes)
        libcrypto_name(digest)
    except ImageError as error:
        raise _refused(error.message) from None
    return LuksOptions(name, cipher_mode, key_bytes, digest, int(time))


def make_header(options: LuksOptions, password: bytes, cryptography: Cryptography) -> bytes:
    """The header and the stripes of the first slot, from the start of the container on.

    What lies behind, up to `LuksOptions.payload_offset`, is for further slots. Raises ImageError(unsupported).
    """
    cipher = cipher_named(options.cipher_name, options.cipher_mode, options.key_bytes)
    rate = iterations_in(options.digest, options.milliseconds, options.key_bytes)
    iterations = min(max(rate, _LEAST_ITERATIONS), _MOST_ITERATIONS)
    digest_iterations = max(iterations // _DIGEST_SHARE, _LEAST_ITERATIONS)
    key = bytearray(secrets.token_bytes(options.key_bytes))
    digest_salt, slot_salt = secrets.token_bytes(SALT_BYTES), secrets.token_bytes(SALT_BYTES)
    slots = tuple(
        SlotField(
            enabled=number == 0,
            iterations=iterations if number == 0 else 0,
            salt=slot_salt if number == 0 else bytes(SALT_BYTES),
            material_sector=(_FIRST_MATERIAL + number * options.slot_bytes) // SECTOR,
            stripes=STRIPES,
        )
        for number in range(SLOTS)
    )
    header = Header1(
        cipher_name=options.cipher_name,
        cipher_mode=options.cipher_mode,
        digest_name=options.digest,
        payload_sector=options.payload_offset // SECTOR,
        key_bytes=options.key_bytes,
        key_digest=pbkdf2(options.digest, key, digest_salt, digest_iterations, DIGEST_BYTES),
        digest_salt=digest_salt,
        digest_iterations=digest_iterations,
        uuid=str(uuid.uuid4()),
        slots=slots,
    )
    derived = bytearray(pbkdf2(options.digest, password, slot_salt, iterations, options.key_bytes))
    stripes = split(key, STRIPES, options.digest)
    stripes += bytes(round_up(len(stripes), SECTOR) - len(stripes))
    material = cryptography.encrypt(cipher, derived, stripes)
    for secret in (key, derived, stripes):
        wipe(secret)
    return header.pack().ljust(_FIRST_MATERIAL, b"\0") + material


def _refused(message: str) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED, message, op="create")
