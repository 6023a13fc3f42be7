"""LUKS2: the segments, key slots and digests that the JSON area describes.

LUKS2 specification, sections 3.2 "Keyslots Object", 3.3 "Segments Object", 3.4 "Digests Object" (docs/specs/luks.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.driver import Argon2, Argon2Cost, Cipher
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.luks.binary_header import Metadata, read_metadata
from tapfs.formats.luks.cipher_names import cipher_named
from tapfs.formats.luks.json_fields import Fields
from tapfs.formats.luks.signature import VERSION_2
from tapfs.formats.luks.volume import (
    SECTOR,
    Argon2Derivation,
    KeyDigest,
    KeySlot,
    Pbkdf2Cost,
    Read,
    Volume,
    slot_details,
)
from tapfs.formats.rounding import round_up
from tapfs.records import replace

#: Of the JSON object; a hostile header could name slots without end.
_MAX_SLOTS = 32
_MAX_KEY_BYTES = 64
_MAX_STRIPES = 1 << 16
_SECTOR_SIZES = (512, 1024, 2048, 4096)
#: Slots of this priority are only tried where somebody names them.
_IGNORED = 0
_NORMAL = 1


def read_version2(read: Read, path: str) -> Volume:
    """The volume of a container with a LUKS2 header. Raises ImageError(invalid_format, unsupported, corrupt)."""
    metadata = read_metadata(read, path)
    fields = Fields(metadata.json, "", path, metadata.offset)
    _require_known(fields, path, metadata.offset)
    number, segment = _only_segment(fields, path, metadata.offset)
    digests = [(each, set(digest.texts("segments"))) for digest, each in _digests(fields)]
    proofs = [each for each, segments in digests if str(number) in segments]
    held = {slot for each in proofs for slot in each.slots}
    slots = [slot for _, slot in sorted(_slots(fields, held, metadata), key=_order)]
    if not slots:  # then nothing says how long the key is either
        message = "no key slot holds the key of its payload"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, offset=metadata.offset, op="open")
    cipher = _payload_cipher(segment, slots[0].key_bytes, path, metadata.offset)
    offset = segment.number("offset")
    length = None if segment.text("size") == "dynamic" else segment.number("size")
    return Volume(cipher, offset, length, slots, proofs, _details(metadata, segment, cipher, slots))


def _order(each: tuple[int, KeySlot]) -> tuple[int, int]:
    """High priority first."""
    priority, slot = each
    return -priority, slot.number


def _require_known(fields: Fields, path: str, offset: int) -> None:
    config = fields.inner("config")
    needed = config.inner("requirements").texts("mandatory") if "requirements" in config else []
    if needed:
        names = ", ".join(each[:40] for each in needed[:8])
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"needs what tapfs does not know: {names}",
            path=path,
            offset=offset,
            op="open",
            remedy="if it is being re-encrypted, let cryptsetup reencrypt finish that",
        )


def _only_segment(fields: Fields, path: str, offset: int) -> tuple[int, Fields]:
    segments = list(fields.numbered("segments"))
    wrong = None
    if len(segments) != 1:
        wrong = f"has {len(segments)} segments, and tapfs reads volumes of one"
    elif segments[0][1].text("type") != "crypt":
        wrong = f"has a segment of type {segments[0][1].text('type')[:40]!r}"
    elif "integrity" in segments[0][1]:
        wrong = "has data integrity protection (dm-integrity)"
    if wrong is not None:
        raise ImageError(
            ErrorKind.UNSUPPORTED, wrong, path=path, offset=offset, op="open", remedy="cryptsetup may open it"
        )
    return segments[0]


def _payload_cipher(segment: Fields, key_bytes: int, path: str, offset: int) -> Cipher:
    cipher = _cipher(segment.text("encryption"), key_bytes, path, offset)
    sector, start, tweak = (segment.number(name) for name in ("sector_size", "offset", "iv_tweak"))
    if sector not in _SECTOR_SIZES or start % SECTOR or tweak >= 1 << 54:
        message = f"a payload of sectors of {sector} bytes from {start} on cannot be"
        raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=offset, op="open")
    return replace(cipher, sector_bytes=sector, iv_offset=-tweak * SECTOR)


def _cipher(text: str, key_bytes: int, path: str, offset: int) -> Cipher:
    name, _, mode = text.partition("-")
    try:
        return cipher_named(name, mode, key_bytes)
    except ImageError as error:
        error.path, error.offset = path, offset
        raise


def _digests(fields: Fields) -> Iterator[tuple[Fields, KeyDigest]]:
    for _, each in fields.numbered("digests"):
        if each.text("type") == "pbkdf2":
            slots = frozenset(int(text) for text in each.texts("keyslots") if text.isascii() and text.isdigit())
            cost = Pbkdf2Cost(each.text("hash"), each.number("iterations"))
            yield each, KeyDigest(cost, each.data("salt"), each.data("digest"), slots)


def _slots(fields: Fields, held: set[int], metadata: Metadata) -> Iterator[tuple[int, KeySlot]]:
    """The slots that hold the key, each with its priority."""
    for number, each in list(fields.numbered("keyslots"))[:_MAX_SLOTS]:
        if number not in held or each.text("type") != "luks2":
            continue
        priority = each.number("priority") if "priority" in each else _NORMAL
        if priority != _IGNORED:
            yield priority, _slot(number, each, metadata)


def _slot(number: int, fields: Fields, metadata: Metadata) -> KeySlot:
    area, splitter, kdf = (fields.inner(name) for name in ("area", "af", "kdf"))
    path, at = fields.path, metadata.offset
    key_bytes, stripes = fields.number("key_size"), splitter.number("stripes")
    offset, size = area.number("offset"), area.number("size")
    if area.text("type") != "raw" or splitter.text("type") != "luks1":
        message = f"key slot {number} is stored in a way that tapfs does not know"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, offset=at, op="open")
    material = round_up(key_bytes * stripes, SECTOR)
    possible = 1 <= key_bytes <= _MAX_KEY_BYTES and 1 <= stripes <= _MAX_STRIPES
    if not possible or offset < 2 * metadata.header_bytes or offset % SECTOR or material > size:
        message = f"the stripes of key slot {number} at {offset:#x} cannot be there"
        raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=at, op="open")
    cipher = _cipher(area.text("encryption"), area.number("key_size"), path, at)
    derivation = _derivation(number, kdf, path, at)
    return KeySlot(number, key_bytes, stripes, splitter.text("hash"), offset, cipher, derivation, kdf.data("salt"))


def _derivation(number: int, kdf: Fields, path: str, offset: int) -> Pbkdf2Cost | Argon2Derivation:
    name = kdf.text("type")
    if name == "pbkdf2":
        return Pbkdf2Cost(kdf.text("hash"), kdf.number("iterations"))
    if name in {variant.value for variant in Argon2}:
        cost = Argon2Cost(kdf.number("time"), kdf.number("memory") << 10, kdf.number("cpus"))
        return Argon2Derivation(Argon2(name), cost)
    message = f"key slot {number} derives its key by {name[:40]!r}, which tapfs does not know"
    raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, offset=offset, op="open")


def _details(metadata: Metadata, segment: Fields, cipher: Cipher, slots: Sequence[KeySlot]) -> dict[str, object]:
    return {
        "version": VERSION_2,
        "uuid": metadata.uuid,
        "label": metadata.label or None,
        "cipher": segment.text("encryption"),
        "key_bits": 8 * cipher.key_bytes,
        "sector_size": cipher.sector_bytes,
        "payload_offset": segment.number("offset"),
        "slots": [slot_details(slot) for slot in slots],
        "header_fault": metadata.other_fault,
    }
