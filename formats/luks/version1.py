"""The header of LUKS1: 592 bytes, eight key slots, the payload behind their stripes.

LUKS1 specification, section "The partition header" (docs/specs/luks.md).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.luks.cipher_names import cipher_named
from tapfs.formats.luks.digests import libcrypto_name
from tapfs.formats.luks.signature import MAGIC, VERSION_1
from tapfs.formats.luks.volume import SECTOR, KeyDigest, KeySlot, Pbkdf2Cost, Read, Volume, slot_details
from tapfs.formats.rounding import round_up

HEADER_BYTES = 592
SLOTS = 8
DIGEST_BYTES = 20
SALT_BYTES = 32
#: Every writer uses so many stripes; more than `_MAX_STRIPES` are refused.
STRIPES = 4000
_MAX_STRIPES = 1 << 16

_HEAD = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
_ENABLED, _DISABLED = 0x00AC71F3, 0x0000DEAD
_CIPHER_NAME_AT, _DIGEST_NAME_AT, _PAYLOAD_AT, _DIGEST_ITERATIONS_AT = 8, 72, 104, 164


class SlotField(NamedTuple):
    """A key slot as it stands in the header; the material's place in sectors."""

    enabled: bool
    iterations: int
    salt: bytes
    material_sector: int
    stripes: int

    def pack(self) -> bytes:
        """The 48 bytes of the slot."""
        state = _ENABLED if self.enabled else _DISABLED
        return _SLOT.pack(state, self.iterations, self.salt, self.material_sector, self.stripes)


class Header1(NamedTuple):
    """The fields of the header; `payload_sector` counts 512 bytes."""

    cipher_name: str
    cipher_mode: str
    digest_name: str
    payload_sector: int
    key_bytes: int
    key_digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[SlotField, ...]

    def with_slot(self, number: int, slot: SlotField) -> Header1:
        """The header with another slot of that number."""
        return self._replace(slots=(*self.slots[:number], slot, *self.slots[number + 1 :]))

    def pack(self) -> bytes:
        """The 592 bytes of the header."""
        head = _HEAD.pack(
            *(MAGIC, VERSION_1, self.cipher_name.encode(), self.cipher_mode.encode(), self.digest_name.encode()),
            *(self.payload_sector, self.key_bytes, self.key_digest, self.digest_salt, self.digest_iterations),
            self.uuid.encode(),
        )
        return head + b"".join(slot.pack() for slot in self.slots)


def read_version1(read: Read, path: str, base: int = 0) -> Volume:
    """The volume of a header at the start of a container, which begins at `base` in the file `path`.

    Raises ImageError(invalid_format, unsupported, corrupt) naming the field.
    """
    header = parse_header1(read(0, HEADER_BYTES), path, base)
    try:
        cipher = cipher_named(header.cipher_name, header.cipher_mode, header.key_bytes)
    except ImageError as error:
        raise _placed(error, path, base + _CIPHER_NAME_AT) from None
    try:
        libcrypto_name(header.digest_name)
    except ImageError as error:
        raise _placed(error, path, base + _DIGEST_NAME_AT) from None
    slots: list[KeySlot] = []
    for number, slot in enumerate(header.slots):
        if slot.enabled:
            at = base + _HEAD.size + number * _SLOT.size
            _require_slot(number, slot, header, path, at)
            cost = Pbkdf2Cost(header.digest_name, slot.iterations)
            offset = slot.material_sector * SECTOR
            slots.append(
                KeySlot(number, header.key_bytes, slot.stripes, header.digest_name, offset, cipher, cost, slot.salt)
            )
    proof = KeyDigest(
        Pbkdf2Cost(header.digest_name, header.digest_iterations),
        header.digest_salt,
        header.key_digest,
        frozenset(range(SLOTS)),
    )
    return Volume(cipher, header.payload_sector * SECTOR, None, slots, [proof], _details(header, slots))


def parse_header1(raw: bytes, path: str, base: int) -> Header1:
    """The fields of a header that begins at `base` in the file `path`. Raises ImageError as `read_version1`."""
    if len(raw) < HEADER_BYTES or not raw.startswith(MAGIC):
        raise ImageError(ErrorKind.INVALID_FORMAT, "is no LUKS container", path=path, offset=base, op="open")
    _, version, *texts, payload, key_bytes, key_digest, salt, iterations, uuid = _HEAD.unpack_from(raw)
    if version != VERSION_1:
        message = f"LUKS version {version} is not known here"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, offset=base + len(MAGIC), op="open")
    name, mode, digest_name = (_text(each) for each in texts)
    slots: list[SlotField] = []
    for number in range(SLOTS):
        at = _HEAD.size + number * _SLOT.size
        state, *fields = _SLOT.unpack_from(raw, at)
        if state not in {_ENABLED, _DISABLED}:
            message = f"key slot {number} is neither in use nor free: its state is {state:#010x}"
            raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=base + at, op="open")
        slots.append(SlotField(state == _ENABLED, *fields))
    return Header1(name, mode, digest_name, payload, key_bytes, key_digest, salt, iterations, _text(uuid), tuple(slots))


def require_own_material(number: int, header: Header1, path: str, base: int) -> None:
    """Raise ImageError(corrupt) unless a slot's material lies between header and payload, apart from slots in use.

    To be asked before the material is written: nobody looks at the place of a slot that is not in use.
    """
    at = base + _HEAD.size + number * _SLOT.size
    _require_slot(number, header.slots[number], header, path, at)
    start, stop = _material(header, header.slots[number])
    for other, slot in enumerate(header.slots):
        first, last = _material(header, slot)
        if slot.enabled and other != number and first < stop and start < last:
            message = f"the stripes of key slots {number} and {other} overlap"
            raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=at, op="open")


def _material(header: Header1, slot: SlotField) -> tuple[int, int]:
    """Where the stripes of a slot begin and end, in bytes of the container."""
    start = slot.material_sector * SECTOR
    return start, start + round_up(header.key_bytes * slot.stripes, SECTOR)


def _require_slot(number: int, slot: SlotField, header: Header1, path: str, at: int) -> None:
    start, stop = _material(header, slot)
    message = None
    if not 1 <= slot.stripes <= _MAX_STRIPES:
        message = f"key slot {number} has {slot.stripes} stripes"
    elif start < HEADER_BYTES or (header.payload_sector and stop > header.payload_sector * SECTOR):
        message = f"the stripes of key slot {number} at {start:#x} do not lie between header and payload"
    if message is not None:
        raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=at, op="open")


def _details(header: Header1, slots: Sequence[KeySlot]) -> dict[str, object]:
    return {
        "version": VERSION_1,
        "uuid": header.uuid,
        "label": None,
        "cipher": f"{header.cipher_name}-{header.cipher_mode}",
        "key_bits": 8 * header.key_bytes,
        "sector_size": SECTOR,
        "payload_offset": header.payload_sector * SECTOR,
        "slots": [slot_details(slot) for slot in slots],
        "header_fault": None,
    }


def _placed(error: ImageError, path: str, offset: int) -> ImageError:
    error.path, error.offset, error.op = path, offset, "open"
    return error


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
