"""The snapshot table of a qcow2 image: the disks that the image keeps beside its current one.

QEMU's docs/interop/qcow2, "Snapshots"; docs/specs/qcow2.md, "Snapshots".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2.header import MAX_L1_BYTES, SNAPSHOTS_OFFSET_AT, WORD, Header
from tapfs.formats.rounding import round_up

_ENTRY = struct.Struct(">QIHHIIQII")
_ALIGNMENT = 8
#: The extra data that QEMU knows: the size of the VM's state, and the size of the disk.
_EXTRA = struct.Struct(">QQ")
#: QEMU opens no image with more of a snapshot table, or with more extra data in an entry.
_MAX_TABLE_BYTES = 64 << 20
_MAX_EXTRA_BYTES = 1024
_PIECE = 64 << 10


class Snapshot(NamedTuple):
    """One snapshot. `offset` and `length` are those of its entry in the file; `seconds` since 1970.

    `disk_size` is in bytes, of an entry without it that of the current disk. `state_bytes`: of the saved VM.
    """

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    disk_size: int
    seconds: int
    state_bytes: int
    offset: int
    length: int

    @property
    def l1_length(self) -> int:
        """Bytes of its L1 table."""
        return WORD * self.l1_entries


def read_snapshots(file: HostFile, header: Header) -> list[Snapshot]:
    """The snapshots, in the order of the table. Raises ImageError(corrupt, out_of_bounds) where it cannot be true."""
    if header.snapshot_count == 0:
        return []
    if header.snapshots_offset % header.cluster_size or header.snapshots_offset == 0:
        message = f"snapshots_offset is {header.snapshots_offset:#x}, not on a cluster"
        raise ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=SNAPSHOTS_OFFSET_AT, op="open")
    reader = _Reader(file, header.snapshots_offset)
    return [_read_entry(reader, header, file.path) for _ in range(header.snapshot_count)]


def snapshot_named(snapshots: list[Snapshot], name: str, path: str) -> Snapshot:
    """The snapshot with an id or a name, the id first, as QEMU looks. Raises ImageError(not_found)."""
    for wanted in ([each for each in snapshots if each.id == name], [each for each in snapshots if each.name == name]):
        if wanted:
            return wanted[0]
    known = ", ".join(each.name or each.id for each in snapshots)
    remedy = f"there are: {known}" if known else None
    raise ImageError(ErrorKind.NOT_FOUND, f"has no snapshot {name!r}", path=path, op="open", remedy=remedy)


class _Reader:
    """Reads a table of unknown length from front to back, in bounded pieces."""

    def __init__(self, file: HostFile, start: int) -> None:
        self._file = file
        self._start = start
        self._piece = b""
        self._piece_at = start
        self.at = start

    def take(self, length: int) -> bytes:
        """The next bytes. Raises ImageError(corrupt) where the file or the patience ends."""
        end = self.at + length
        if end - self._start > _MAX_TABLE_BYTES:
            raise self._error(f"the snapshot table is longer than {_MAX_TABLE_BYTES} bytes")
        if end > self._piece_at + len(self._piece):
            self._piece_at, self._piece = self.at, self._file.read(self.at, max(length, _PIECE))
        taken = self._piece[self.at - self._piece_at : end - self._piece_at]
        if len(taken) < length:
            raise self._error("the snapshot table goes on past the end of the file")
        self.at = end
        return taken

    def align(self) -> None:
        """Go on at the next entry; the padding of the last one may be missing."""
        self.at = round_up(self.at, _ALIGNMENT)

    def _error(self, message: str) -> ImageError:
        return ImageError(ErrorKind.CORRUPT, message, path=self._file.path, offset=self.at, op="read the snapshots")


def _read_entry(reader: _Reader, header: Header, path: str) -> Snapshot:
    start = reader.at
    fields = _ENTRY.unpack(reader.take(_ENTRY.size))
    l1_offset, l1_entries, id_length, name_length, seconds, _, _, state_bytes, extra_length = fields
    if extra_length > _MAX_EXTRA_BYTES:
        message = f"a snapshot has {extra_length} bytes of extra data, the limit is {_MAX_EXTRA_BYTES}"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, offset=start, op="read the snapshots")
    if WORD * l1_entries > MAX_L1_BYTES:
        message = f"a snapshot has an L1 table of {l1_entries} entries, the limit is {MAX_L1_BYTES // WORD}"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, offset=start, op="read the snapshots")
    extra = reader.take(extra_length)
    size = header.size
    if len(extra) >= _EXTRA.size:
        state_bytes, size = _EXTRA.unpack_from(extra)
    elif len(extra) >= WORD:
        state_bytes = int.from_bytes(extra[:WORD], "big")
    identifier = reader.take(id_length).decode("utf-8", "surrogateescape")
    name = reader.take(name_length).decode("utf-8", "surrogateescape")
    end = reader.at
    reader.align()
    return Snapshot(identifier, name, l1_offset, l1_entries, size, seconds, state_bytes, start, end - start)
