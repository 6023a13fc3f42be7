"""A LUKS volume of either version: the cipher of its payload, and the key slots that hold the key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tapfs.driver import Argon2, Argon2Cost, Cipher, Cryptography, wipe
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.luks.digests import pbkdf2
from tapfs.formats.luks.splitter import merge
from tapfs.formats.rounding import round_up

#: Bytes of the unit that key material is encrypted and placed in.
SECTOR = 512

#: Iterations of PBKDF2 that one slot may ask for, and all slots together: a header can be hostile. They take minutes.
_MAX_ITERATIONS = 1 << 27
_MAX_ITERATIONS_IN_ALL = 1 << 28
#: Bytes of memory that Argon2 may ask for, as cryptsetup bounds it, and bytes that all passes of all slots may fill.
_MAX_MEMORY = 4 << 30
_MAX_FILLED_IN_ALL = 256 << 30
_MAX_LANES = 16
#: Argon2 needs so much memory for each lane (RFC 9106, section 3.1).
_LEAST_MEMORY_OF_A_LANE = 8 << 10

#: Reads bytes of the container: offset and length. Shorter only at the end.
Read = Callable[[int, int], bytes]


class Pbkdf2Cost(NamedTuple):
    """A derivation by PBKDF2: the digest by LUKS's name, and the iterations."""

    digest: str
    iterations: int


class Argon2Derivation(NamedTuple):
    """A derivation by Argon2."""

    variant: Argon2
    cost: Argon2Cost


class KeySlot(NamedTuple):
    """A key slot in use: the key of the volume in stripes, encrypted under a key derived from a password.

    `offset` in the container is where the stripes lie, `cipher` encrypts them, `digest` mixes them. `key_bytes` is the
    length of the volume's key.
    """

    number: int
    key_bytes: int
    stripes: int
    digest: str
    offset: int
    cipher: Cipher
    derivation: Pbkdf2Cost | Argon2Derivation
    salt: bytes

    @property
    def material_bytes(self) -> int:
        """The length of all stripes."""
        return self.key_bytes * self.stripes


class KeyDigest(NamedTuple):
    """The digest that tells whether a key is the volume's, and the numbers of the slots that hold that key."""

    cost: Pbkdf2Cost
    salt: bytes
    value: bytes
    slots: frozenset[int]


class Volume(NamedTuple):
    """A volume as its header says it.

    `payload_bytes` is None where the payload reaches to the end of the container. `details` are for `tapfs info`.
    `slots` are those in use, in the order in which they are tried.
    """

    cipher: Cipher
    payload_offset: int
    payload_bytes: int | None
    slots: Sequence[KeySlot]
    digests: Sequence[KeyDigest]
    details: Mapping[str, object]


def slot_details(slot: KeySlot) -> dict[str, object]:
    """A slot for `tapfs info`: how its key is derived."""
    if isinstance(slot.derivation, Pbkdf2Cost):
        kdf, cost = f"pbkdf2-{slot.derivation.digest}", Argon2Cost(slot.derivation.iterations, 0, 0)
    else:
        kdf, cost = slot.derivation.variant.value, slot.derivation.cost
    return {
        "number": slot.number,
        "kdf": kdf,
        "iterations": cost.passes,
        "memory": cost.memory_bytes or None,
        "lanes": cost.lanes or None,
    }


def unlock(volume: Volume, read: Read, password: bytes, cryptography: Cryptography, path: str) -> bytearray:
    """The key of the volume.

    Raises ImageError: denied if the password opens no slot, unsupported or no_space if a slot could not be tried and
    none of the others is opened by it.
    """
    work = _Work()
    untried: ImageError | None = None
    tried = 0
    for slot in volume.slots:
        try:
            key = _opened(volume, slot, read, password, cryptography, work)
        except ImageError as error:
            if error.kind not in {ErrorKind.UNSUPPORTED, ErrorKind.NO_SPACE, ErrorKind.OUT_OF_BOUNDS}:
                raise
            untried = error
            continue
        tried += 1
        if key is not None:
            return key
    if untried is not None:
        untried.path = path
        raise untried
    message = "the password opens none of its key slots" if tried else "no key slot is in use, so no password opens it"
    raise ImageError(ErrorKind.DENIED, message, path=path, op="unlock")


def _opened(
    volume: Volume, slot: KeySlot, read: Read, password: bytes, cryptography: Cryptography, work: _Work
) -> bytearray | None:
    """The key, or None if the password is not that of the slot. Raises ImageError(unsupported, out_of_bounds)."""
    proofs = [each for each in volume.digests if slot.number in each.slots]
    work.take(slot.number, slot.derivation)
    derived = bytearray(_derived(slot, password, cryptography))
    length = round_up(slot.material_bytes, SECTOR)
    encrypted = read(slot.offset, length).ljust(length, b"\0")
    material = cryptography.decrypt(slot.cipher, derived, encrypted)
    wipe(derived)
    key = merge(material[: slot.material_bytes], slot.key_bytes, slot.stripes, slot.digest)
    wipe(material)
    for proof in proofs:
        work.take(slot.number, proof.cost)
        if pbkdf2(proof.cost.digest, key, proof.salt, proof.cost.iterations, len(proof.value)) == proof.value:
            return key
    wipe(key)
    return None


def _derived(slot: KeySlot, password: bytes, cryptography: Cryptography) -> bytes:
    length = slot.cipher.key_bytes
    if isinstance(slot.derivation, Pbkdf2Cost):
        return pbkdf2(slot.derivation.digest, password, slot.salt, slot.derivation.iterations, length)
    return cryptography.argon2(slot.derivation.variant, password, slot.salt, slot.derivation.cost, length)


class _Work:
    """The derivations that a header may still ask for."""

    def __init__(self) -> None:
        self._iterations = _MAX_ITERATIONS_IN_ALL
        self._filled = _MAX_FILLED_IN_ALL

    def take(self, slot: int, derivation: Pbkdf2Cost | Argon2Derivation) -> None:
        """Count a derivation. Raises ImageError(out_of_bounds) if it would take too much."""
        if isinstance(derivation, Pbkdf2Cost):
            self._iterations -= derivation.iterations
            if not 0 < derivation.iterations <= _MAX_ITERATIONS or self._iterations < 0:
                raise _too_much(slot, f"{derivation.iterations} iterations, and tapfs does {_MAX_ITERATIONS}")
            return
        cost = derivation.cost
        filled = cost.passes * cost.memory_bytes
        self._filled -= filled
        if cost.memory_bytes > _MAX_MEMORY:
            raise _too_much(slot, f"{cost.memory_bytes >> 20} MiB of memory, and tapfs gives {_MAX_MEMORY >> 20}")
        if cost.passes < 1 or self._filled < 0:
            raise _too_much(slot, f"{cost.passes} passes over {cost.memory_bytes >> 20} MiB of memory")
        if not 1 <= cost.lanes <= _MAX_LANES or cost.memory_bytes < cost.lanes * _LEAST_MEMORY_OF_A_LANE:
            raise _too_much(slot, f"{cost.lanes} lanes in {cost.memory_bytes} bytes of memory")


def _too_much(slot: int, what: str) -> ImageError:
    message = f"key slot {slot} was not tried: it asks for {what}"
    return ImageError(ErrorKind.OUT_OF_BOUNDS, message, op="unlock")
