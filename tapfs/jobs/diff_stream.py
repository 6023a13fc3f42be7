"""The stream of a difference between two disks: its records as bytes, written and read in one pass.

docs/diff-stream.md is the specification. Every header has a checksum, every payload a digest, and the last record has
a digest of all headers. So a stream that was cut or has changed is known before the record that is wrong is used, and a
stream that lacks its end is never taken for a whole one. One record at a time is held in memory.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tapfs.driver import MAX_DISK_BYTES
from tapfs.errors import ErrorKind, ImageError, from_os_error

if TYPE_CHECKING:
    from tapfs.kernel.engine import Buffer

MAGIC, VERSION = b"TAPFDIFF", 1
#: Magic number, version, flags, size of the old disk and of the new one, unit of comparison; then its checksum.
_HEADER = struct.Struct("<8sIIQQI24xI")
#: Kind, offset, length, length of the payload, digest of the old bytes and of the new ones; then its checksum.
_RECORD = struct.Struct("<IQQI16s16s4xI")
DIGEST_BYTES = 16
_NO_DIGEST = bytes(DIGEST_BYTES)

#: A record is about so many bytes of the disk at most, but for those of zeros in both.
MAX_RECORD_BYTES = 4 << 20


class RecordKind(IntEnum):
    """What a record says of its range."""

    #: The new disk has the payload there.
    DATA = 1
    #: The new disk has zeros there, and the old one had other bytes.
    ZERO = 2
    #: Both have the same bytes there.
    KEEP = 3
    #: Both have zeros there.
    KEEP_ZERO = 4
    #: There are no more records.
    END = 5


class StreamHeader(NamedTuple):
    """The start of a stream; all sizes in bytes."""

    old_size: int
    new_size: int
    granule: int


class Record(NamedTuple):
    """A range of the disk, the digests of what both disks have there, and of DATA the new bytes.

    `old` is of the old disk, which has zeros behind its end; `new` of the new one (of KEEP it is the same).
    """

    kind: RecordKind
    offset: int
    length: int
    old: bytes
    new: bytes
    payload: Buffer = b""

    @property
    def end(self) -> int:
        """The first byte of the disk behind its range."""
        return self.offset + self.length


class Readable(Protocol):
    """A file that is read from its start to its end."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none only at the end."""
        ...


class Writable(Protocol):
    """A file that is written from its start to its end."""

    def write(self, data: Buffer, /) -> int | None:
        """Write some of the bytes; how many, None for all."""
        ...


def digest_of(data: Buffer) -> bytes:
    """The digest of bytes of a disk: BLAKE2b of 16 bytes."""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


class DiffWriter:
    """Writes a stream; the records come in the order of the disk."""

    def __init__(self, file: Writable, header: StreamHeader) -> None:
        self._file = file
        self._headers = blake2b(digest_size=DIGEST_BYTES)
        self._records = 0
        #: Bytes of the stream so far.
        self.written = 0
        self._put_header(
            _with_sum(_HEADER.pack(MAGIC, VERSION, 0, header.old_size, header.new_size, header.granule, 0))
        )

    def put(self, record: Record) -> None:
        """Write a record. Raises ImageError where the file cannot be written."""
        payload = memoryview(record.payload)
        self._records += 1
        self._put_header(_packed(record.kind, record.offset, record.length, len(payload), record.old, record.new))
        self._put(payload)

    def finish(self) -> None:
        """Write the last record, without which the stream is no whole one."""
        self._put_header(_packed(RecordKind.END, 0, self._records, 0, self._headers.digest(), _NO_DIGEST))

    def _put_header(self, header: bytes) -> None:
        self._headers.update(header)
        self._put(memoryview(header))

    def _put(self, data: memoryview) -> None:
        while data:
            try:
                count = self._file.write(data)
            except BrokenPipeError:
                raise  # whoever reads standard output has gone: the command knows what to do
            except OSError as error:
                raise from_os_error(error, path=None, op="write the difference") from error
            done = len(data) if count is None else count
            self.written += done
            data = data[done:]


class DiffReader:
    """Reads a stream once. `path` is its name, for errors."""

    def __init__(self, file: Readable, path: str | None) -> None:
        self._file = file
        self._path = path
        self._at = 0
        self._headers = blake2b(digest_size=DIGEST_BYTES)
        self.header = self._read_header()

    def records(self) -> Iterator[Record]:
        """The records in the order of the disk, but for the last one; it has been proved when the iterator ends.

        Raises ImageError(corrupt) for a stream that is damaged or cut, before the record that is.
        """
        count = end = 0
        while True:
            start = self._at
            before = self._headers.digest()
            kind, offset, length, packed, old, new = self._read_record()
            if kind == RecordKind.END:
                if length != count or old != before or offset or packed:
                    raise self._fault("the last record does not belong to the others", start)
                if self._file.read(1):
                    raise self._fault("there are bytes behind the last record", self._at)
                return
            self._require_possible(kind, offset, length, packed, end, start)
            payload = self._exactly(packed)
            if kind == RecordKind.DATA and digest_of(payload) != new:
                raise self._fault("the bytes of a record are not those that were written", start)
            count, end = count + 1, offset + length
            yield Record(RecordKind(kind), offset, length, old, new, payload)

    def _read_header(self) -> StreamHeader:
        raw = self._file.read(len(MAGIC))
        if raw != MAGIC:
            raise ImageError(
                ErrorKind.INVALID_FORMAT,
                "is no difference that tapfs diff has written",
                path=self._path,
                offset=0,
                op="apply",
            )
        self._at = len(raw)
        raw += self._exactly(_HEADER.size - len(raw))
        _, version, flags, old_size, new_size, granule, _ = _HEADER.unpack(raw)
        if raw != _with_sum(raw):
            raise self._fault("the checksum of the header is wrong", 0)
        if version != VERSION or flags:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"is a difference of version {version} with the flags {flags:#x}; tapfs knows version {VERSION}",
                path=self._path,
                op="apply",
            )
        if max(old_size, new_size) > MAX_DISK_BYTES:
            raise self._fault("it is about impossible sizes", 0)
        self._headers.update(raw)
        return StreamHeader(old_size, new_size, granule)

    def _read_record(self) -> tuple[int, int, int, int, bytes, bytes]:
        start = self._at
        raw = self._exactly(_RECORD.size)
        if raw != _with_sum(raw):
            raise self._fault("the checksum of a record is wrong", start)
        self._headers.update(raw)
        kind, offset, length, packed, old, new, _ = _RECORD.unpack(raw)
        return kind, offset, length, packed, old, new

    def _require_possible(self, kind: int, offset: int, length: int, packed: int, end: int, start: int) -> None:
        sizes = self.header
        size = sizes.new_size if kind in {RecordKind.DATA, RecordKind.ZERO} else min(sizes.old_size, sizes.new_size)
        known = RecordKind.DATA <= kind <= RecordKind.KEEP_ZERO
        bounded = length <= MAX_RECORD_BYTES or kind == RecordKind.KEEP_ZERO
        if (
            not known
            or not length
            or not bounded
            or offset < end
            or offset + length > size
            or packed != (length if kind == RecordKind.DATA else 0)
        ):
            raise self._fault("a record is impossible", start)

    def _exactly(self, count: int) -> bytes:
        pieces: list[bytes] = []
        left = count
        while left:
            try:
                piece = self._file.read(left)
            except OSError as error:
                raise from_os_error(error, path=self._path, op="read the difference", offset=self._at) from error
            if not piece:
                raise self._fault("the difference ends before its last record: it was cut", self._at)
            pieces.append(piece)
            self._at += len(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _fault(self, message: str, offset: int) -> ImageError:
        return ImageError(ErrorKind.CORRUPT, message, path=self._path, offset=offset, op="apply")


def _packed(kind: RecordKind, offset: int, length: int, packed: int, old: bytes, new: bytes) -> bytes:
    return _with_sum(_RECORD.pack(kind, offset, length, packed, old, new, 0))


def _with_sum(header: bytes) -> bytes:
    """A header with its last four bytes made the CRC-32 of those before."""
    return header[:-4] + zlib.crc32(header[:-4]).to_bytes(4, "little")
