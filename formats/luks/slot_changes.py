"""Change the key slots of a LUKS1 header: give a volume another password, or take one away, in crash-safe order.

A slot is taken into use by its material first, then by what the header says of it; the state of the slot comes last.
A slot is emptied the other way round but for the material, which goes first: a password that is to be gone must not
open anything, wherever the work is cut off. The fields of slot 6 lie in two sectors of the header.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

from tapfs.driver import Cryptography, HostFile, SlotChange, wipe
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.luks.cipher_names import cipher_named
from tapfs.formats.luks.digests import iterations_in, pbkdf2
from tapfs.formats.luks.splitter import split
from tapfs.formats.luks.version1 import (
    HEADER_BYTES,
    SALT_BYTES,
    SLOTS,
    STRIPES,
    Header1,
    SlotField,
    parse_header1,
    read_version1,
    require_own_material,
)
from tapfs.formats.luks.volume import SECTOR, Read, Volume, unlock
from tapfs.formats.rounding import round_up
from tapfs.plan import Plan, Step, Write, plan

_OP = "amend"
_LEAST_ITERATIONS = 1000
_MOST_ITERATIONS = 100_000_000


def change_slots(file: HostFile, base: int, change: SlotChange, cryptography: Cryptography) -> Iterator[Plan]:
    """The plans of a change to the header that begins at `base` of file 0.

    Raises ImageError: denied if the password opens nothing, unsupported for a slot that is in use or the last one,
    corrupt for one whose material would be written over something else.
    """

    def read(offset: int, length: int) -> bytes:
        return file.read(base + offset, length)

    raw = read(0, 2 * SECTOR)
    header = parse_header1(raw, file.path, base)
    volume = read_version1(read, file.path, base)
    if change.slot is not None and not 0 <= change.slot < SLOTS:
        raise _refused(f"keyslot={change.slot}: there are slots 0 to {SLOTS - 1}", file.path)
    head = _Head(raw, header, base)
    if change.adds:
        key = unlock(volume, read, change.password, cryptography, file.path)
        number = _free_slot(header, change.slot, file.path)
        with_stripes = header.with_slot(number, header.slots[number]._replace(stripes=STRIPES))
        require_own_material(number, with_stripes, file.path, base)
        yield from _filled(head, number, key, change, cryptography)
        return
    wanted = _slots_to_empty(volume, read, change, cryptography, file.path)
    left = [slot for slot in volume.slots if slot.number not in wanted]
    if not left:
        raise _refused("no password would open the image any more", file.path, "add another one first")
    try:  # whoever takes a password away must have one that stays
        wipe(unlock(volume._replace(slots=left), read, change.password, cryptography, file.path))
    except ImageError as error:
        if error.kind is ErrorKind.DENIED:
            error.remedy = "give with {password} one that stays"
        raise
    for number in wanted:
        require_own_material(number, header, file.path, base)
    for number in wanted:
        yield from _emptied(head, number)


class _Head:
    """The bytes of the header, which changes slot by slot."""

    def __init__(self, raw: bytes, header: Header1, base: int) -> None:
        self.raw = raw
        self.header = header
        self.base = base

    def put(self, number: int, slot: SlotField) -> list[Step]:
        """Writes of the sectors in which the header with that slot differs, in the order of the file."""
        self.header = self.header.with_slot(number, slot)
        new = self.header.pack() + self.raw[HEADER_BYTES:]
        steps: list[Step] = [
            Write(0, self.base + at, new[at : at + SECTOR])
            for at in range(0, len(new), SECTOR)
            if new[at : at + SECTOR] != self.raw[at : at + SECTOR]
        ]
        self.raw = new
        return steps


def _free_slot(header: Header1, wanted: int | None, path: str) -> int:
    free = [number for number, slot in enumerate(header.slots) if not slot.enabled]
    if wanted is not None and wanted not in free:
        raise _refused(f"key slot {wanted} is in use", path, "empty it first, or leave the number out")
    if not free:
        raise _refused(f"all {SLOTS} key slots are in use", path, "empty one first")
    return free[0] if wanted is None else wanted


def _filled(head: _Head, number: int, key: bytearray, change: SlotChange, cryptography: Cryptography) -> Iterator[Plan]:
    header = head.header
    cipher = cipher_named(header.cipher_name, header.cipher_mode, header.key_bytes)
    rate = iterations_in(header.digest_name, change.milliseconds, header.key_bytes)
    iterations = min(max(rate, _LEAST_ITERATIONS), _MOST_ITERATIONS)
    salt = secrets.token_bytes(SALT_BYTES)
    derived = bytearray(pbkdf2(header.digest_name, change.other, salt, iterations, header.key_bytes))
    stripes = split(key, STRIPES, header.digest_name)
    stripes += bytes(round_up(len(stripes), SECTOR) - len(stripes))
    material = cryptography.encrypt(cipher, derived, stripes)
    for secret in (key, derived, stripes):
        wipe(secret)
    place = header.slots[number].material_sector
    slot = SlotField(True, iterations, salt, place, STRIPES)
    first, *rest = reversed(head.put(number, slot))  # the state of the slot is in the first sector of several
    yield plan([Write(0, head.base + place * SECTOR, material)], [first], *([each] for each in rest))


def _emptied(head: _Head, number: int) -> Iterator[Plan]:
    slot = head.header.slots[number]
    length = round_up(head.header.key_bytes * slot.stripes, SECTOR)
    noise = Write(0, head.base + slot.material_sector * SECTOR, secrets.token_bytes(length))
    steps = head.put(number, SlotField(False, 0, bytes(SALT_BYTES), slot.material_sector, slot.stripes))
    yield plan([noise], *([each] for each in steps))


def _slots_to_empty(
    volume: Volume, read: Read, change: SlotChange, cryptography: Cryptography, path: str
) -> Sequence[int]:
    if change.slot is not None:
        if not any(slot.number == change.slot for slot in volume.slots):
            raise _refused(f"key slot {change.slot} is not in use", path)
        return [change.slot]
    found: list[int] = []
    for slot in volume.slots:
        try:
            wipe(unlock(volume._replace(slots=[slot]), read, change.other, cryptography, path))
        except ImageError as error:
            if error.kind is not ErrorKind.DENIED:
                raise
        else:
            found.append(slot.number)
    if not found:
        raise ImageError(ErrorKind.DENIED, "the password to be taken away opens no key slot", path=path, op="unlock")
    return found


def _refused(message: str, path: str, remedy: str | None = None) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED, message, path=path, op=_OP, remedy=remedy)
