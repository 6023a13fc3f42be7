"""The file identifier and the two headers (docs/specs/vhdx.md, "Header section (first 1 MiB)")."""

from __future__ import annotations

import struct

from tapfs.driver import Finding, HostFile, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vhdx.crc32c import crc32c_without
from tapfs.formats.vhdx.guids import NO_GUID
from tapfs.formats.vhdx.signature import IDENTIFIER
from tapfs.formats.vhdx.units import MAX_FILE_BYTES, MIB, PAGE
from tapfs.plan import Step, Write
from tapfs.records import NamedTuple

#: The identifier's own structure, with the name of the program that made the file.
IDENTIFIER_BYTES = 64 << 10
#: The places of the two headers.
SLOTS = (64 << 10, 128 << 10)

#: The longest log that is replayed or written; Windows and QEMU make 1 MiB.
MAX_LOG_BYTES = 256 << 20

_SIGNATURE = b"head"
_VERSION = 1
_MAX_SEQUENCE = 1 << 63
_CRC_AT, _SEQUENCE_AT = 4, 8
_LOG_VERSION_AT, _VERSION_AT, _LOG_LENGTH_AT, _LOG_OFFSET_AT = 64, 66, 68, 72
#: Signature, checksum, sequence, three GUIDs, the log's version, the version, the log's length and offset.
_LAYOUT = struct.Struct("<4sIQ16s16s16sHHIQ")


class Header(NamedTuple):
    """The fields of a header; the log's offset and length are bytes."""

    sequence: int
    file_write: bytes
    data_write: bytes
    log: bytes
    log_version: int
    version: int
    log_length: int
    log_offset: int

    def pack(self) -> bytes:
        """The 4096 bytes on disk. Only the first sector is ever other than zeros, so that no crash tears a header."""
        raw = _LAYOUT.pack(_SIGNATURE, 0, *self).ljust(PAGE, b"\0")
        return raw[:_CRC_AT] + crc32c_without(raw, _CRC_AT).to_bytes(4, "little") + raw[_CRC_AT + 4 :]

    @property
    def log_end(self) -> int:
        """The first byte after the log."""
        return self.log_offset + self.log_length


class Headers(NamedTuple):
    """The header that counts, the slot (0 or 1) where it stands, and what is wrong with the other."""

    current: Header
    slot: int
    findings: tuple[Finding, ...]


def header_steps(header: Header, slot: int) -> list[Step]:
    """The write of a header to one of the two slots."""
    return [Write(0, SLOTS[slot], header.pack())]


def read_headers(file: HostFile) -> Headers:
    """The headers of a file.

    Raises ImageError: invalid_format where this is no VHDX file, corrupt where no header is whole or two contradict
    each other, unsupported for another version.
    """
    if file.read(0, len(IDENTIFIER)) != IDENTIFIER:
        raise ImageError(
            ErrorKind.INVALID_FORMAT, "not a VHDX image: no identifier", path=file.path, offset=0, op="open"
        )
    found = [_parse(file.read(at, PAGE)) for at in SLOTS]
    whole = [slot for slot, header in enumerate(found) if header is not None]
    if not whole:
        raise ImageError(
            ErrorKind.CORRUPT, "both headers are damaged: no checksum fits", path=file.path, offset=SLOTS[0], op="open"
        )
    first, second = found
    if first is not None and second is not None and first.sequence == second.sequence and first != second:
        raise ImageError(
            ErrorKind.CORRUPT,
            f"the headers differ and have the same sequence number {first.sequence}",
            path=file.path,
            offset=SLOTS[1],
            op="open",
        )
    headers = {slot: header for slot, header in enumerate(found) if header is not None}
    # Of two identical ones the first counts.
    slot = max(whole, key=lambda slot: (headers[slot].sequence, -slot))
    damaged = [each for each in (0, 1) if each not in headers]
    findings = tuple(
        Finding(Severity.NOTE, f"header {each + 1} is damaged; the other one is whole", SLOTS[each]) for each in damaged
    )
    _check(headers[slot], SLOTS[slot], file)
    return Headers(headers[slot], slot, findings)


def _parse(raw: bytes) -> Header | None:
    if len(raw) < PAGE or not raw.startswith(_SIGNATURE):
        return None
    fields = _LAYOUT.unpack_from(raw)
    return Header(*fields[2:]) if crc32c_without(raw, _CRC_AT) == fields[1] else None


def _check(header: Header, at: int, file: HostFile) -> None:
    def refuse(kind: ErrorKind, message: str, field: int) -> ImageError:
        return ImageError(kind, message, path=file.path, offset=at + field, op="open")

    if header.version != _VERSION:
        raise refuse(ErrorKind.UNSUPPORTED, f"VHDX version {header.version}, only 1 is known", _VERSION_AT)
    if header.sequence > _MAX_SEQUENCE:
        raise refuse(ErrorKind.CORRUPT, f"sequence number {header.sequence:#x}: it cannot be counted on", _SEQUENCE_AT)
    logged = header.log != NO_GUID
    if logged and header.log_version:
        message = f"the log waits to be replayed and has version {header.log_version}, only 0 is known"
        raise refuse(ErrorKind.UNSUPPORTED, message, _LOG_VERSION_AT)
    if not header.log_length and not logged:
        return
    if not header.log_length or header.log_length % MIB:
        message = f"the log has {header.log_length:#x} bytes, which is no multiple of 1 MiB"
        raise refuse(ErrorKind.CORRUPT, message, _LOG_LENGTH_AT)
    if header.log_length > MAX_LOG_BYTES:
        message = f"the log has {header.log_length} bytes, the limit is {MAX_LOG_BYTES}"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, _LOG_LENGTH_AT)
    if header.log_offset < MIB or header.log_offset % MIB or header.log_offset > MAX_FILE_BYTES:
        message = f"the log's offset is {header.log_offset:#x}, where no log can be"
        raise refuse(ErrorKind.CORRUPT, message, _LOG_OFFSET_AT)
    if header.log_end > file.size():
        message = f"the log [{header.log_offset:#x}, {header.log_end:#x}) lies past the end of the file"
        raise refuse(ErrorKind.CORRUPT, message, _LOG_OFFSET_AT)
