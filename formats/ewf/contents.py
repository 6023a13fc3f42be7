"""The contents of chunks, compared with their checksums and with the MD5 that the image has of its disk.

A packed chunk is a zlib stream, which ends with a checksum. A plain one has its checksum behind it. An image whose
chunks all stand where the tables say, and one of which was changed, shows the changed bytes to every reader that does
not look. So a check reads all of them, as `ewfverify` does.
"""

from __future__ import annotations

import hashlib
import zlib

from tapfs.driver import CheckReport, HostFile, Severity
from tapfs.extent import Extent, Kind

_CHECKSUM_BYTES = 4
#: A packed chunk that is longer than two plain ones and this is none: deflate adds less.
_SPARE_BYTES = 4096


class Contents:
    """The chunks of a disk that were compared so far, in their order."""

    def __init__(self, virtual_size: int, report: CheckReport) -> None:
        self._size = virtual_size
        self._report = report
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._next = 0
        self._bad: tuple[int, int, str, int] | None = None

    def compare(self, number: int, file: HostFile, chunk: Extent) -> None:
        """Read chunk `number` and compare it with its checksum; neighbours that are damaged are one finding."""
        wanted = min(chunk.length, self._size - chunk.offset)
        data = _packed(file, chunk, wanted) if chunk.kind is Kind.COMPRESSED else _plain(file, chunk, wanted)
        if data is not None:
            if self._next == chunk.offset:
                self._md5.update(data)
                self._next += wanted
            return
        if self._bad is not None and self._bad[1] == number and self._bad[2] == file.path:
            self._bad = (self._bad[0], number + 1, *self._bad[2:])
            return
        self.tell()
        self._bad = (number, number + 1, file.path, chunk.host_offset)

    def tell(self) -> None:
        """Put the damaged chunks that were not told yet into the report."""
        if self._bad is None:
            return
        first, stop, path, at = self._bad
        which = f"chunk {first} is" if stop == first + 1 else f"chunks {first} to {stop - 1} are"
        self._report.add(Severity.CORRUPTION, f"{path}: {which} damaged: the checksum does not fit", at)
        self._bad = None

    def compare_digest(self, wanted: str | None) -> None:
        """Compare the disk with the MD5 that the image has of it, where every chunk was whole."""
        if wanted is None or self._next != self._size:
            return
        found = self._md5.hexdigest()
        if found != wanted:
            self._report.add(Severity.CORRUPTION, f"the disk has the MD5 {found}, and the image says {wanted}")


def _packed(file: HostFile, chunk: Extent, wanted: int) -> bytes | None:
    """The bytes of a packed chunk, None where it cannot be unpacked to what the disk has of it."""
    unpacking = zlib.decompressobj()
    raw = file.read(chunk.host_offset, min(chunk.host_length, 2 * chunk.length + _SPARE_BYTES))
    try:
        data = unpacking.decompress(raw, chunk.length + 1)
    except zlib.error:
        return None
    return data[:wanted] if unpacking.eof and wanted <= len(data) <= chunk.length else None


def _plain(file: HostFile, chunk: Extent, wanted: int) -> bytes | None:
    """The bytes of a plain chunk, None where its checksum does not fit."""
    raw = file.read(chunk.host_offset, wanted + _CHECKSUM_BYTES)
    data, checksum = raw[:wanted], raw[wanted:]
    return data if len(data) == wanted and int.from_bytes(checksum, "little") == zlib.adler32(data) else None
