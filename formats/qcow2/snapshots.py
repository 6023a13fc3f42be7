"""The snapshot table of a qcow2 image: the disks that the image keeps beside its current one.

QEMU's docs/interop/qcow2, "Snapshots"; docs/specs/qcow2.md, "Snapshots".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from tapfs.driver import HostFile, SnapshotRecord
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2.header import MAX_L1_BYTES, MAX_SNAPSHOTS, SNAPSHOTS_OFFSET_AT, WORD, Header
from tapfs.formats.rounding import round_up
from tapfs.patterns import pattern
from tapfs.records import NamedTuple

_ENTRY = struct.Struct(">QIHHIIQII")
_ALIGNMENT = 8
_LARGEST_OLD_SIZE = (1 << 32) - 1
#: An id that is a number, as those of QEMU are.
_NUMBER = pattern(r"[0-9]{1,18}", re.ASCII)
#: The extra data that every entry should have: the size of the VM's state, and the size of the disk.
_EXTRA = struct.Struct(">QQ")
#: The third number there is the VM's count of instructions; this one says that none were counted.
_NO_COUNT = b"\xff" * 8
#: QEMU opens no image with more of a snapshot table, or with more extra data in an entry.
_MAX_TABLE_BYTES = 64 << 20
_MAX_EXTRA_BYTES = 1024
_PIECE = 64 << 10
#: The beginning of qemu-img's words for an id or a name.
_OPTION = "snapshot."


class Snapshot(NamedTuple):
    """One snapshot. `offset` and `length` are those of its entry in the file; `seconds` since 1970.

    `disk_size` is in bytes, of an entry without it that of the current disk. `state_bytes`: of the saved VM. The VM's
    clock stood at `clock_nanoseconds`. `extra` is the extra data of the entry as it stands in the file.
    """

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    disk_size: int
    seconds: int
    state_bytes: int
    offset: int = 0
    length: int = 0
    nanoseconds: int = 0
    clock_nanoseconds: int = 0
    extra: bytes = b""

    @property
    def record(self) -> SnapshotRecord:
        """What is told of it."""
        times = (self.seconds, self.nanoseconds)
        return SnapshotRecord(self.id, self.name, self.disk_size, *times, self.state_bytes, self.clock_nanoseconds)

    @property
    def has_sizes(self) -> bool:
        """Whether its entry says the sizes of its disk and of the state of its VM."""
        return len(self.extra) >= _EXTRA.size

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


def pack_snapshots(snapshots: Sequence[Snapshot], path: str) -> bytes:
    """The table of these snapshots. Extra data that a reader does not know stays.

    Every entry gets its sizes, for an entry without them means whatever size the current disk has. Raises
    ImageError(out_of_bounds) for a table that QEMU would not read.
    """
    table = b"".join(_pack_entry(each) for each in snapshots)
    if len(snapshots) > MAX_SNAPSHOTS or len(table) > _MAX_TABLE_BYTES:
        message = f"{len(snapshots)} snapshots in a table of {len(table)} bytes are too many"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="write the snapshots")
    return table


def _pack_entry(each: Snapshot) -> bytes:
    identifier, name = (text.encode("utf-8", "surrogateescape") for text in (each.id, each.name))
    extra = _EXTRA.pack(each.state_bytes, each.disk_size) + (each.extra[_EXTRA.size :] or _NO_COUNT)
    fields = (each.l1_offset, each.l1_entries, len(identifier), len(name), each.seconds, each.nanoseconds)
    # The old field of the state's size has 32 bits, and readers of today take the other one.
    old_size = min(each.state_bytes, _LARGEST_OLD_SIZE)
    entry = _ENTRY.pack(*fields, each.clock_nanoseconds, old_size, len(extra)) + extra + identifier + name
    return entry.ljust(round_up(len(entry), _ALIGNMENT), b"\0")


def new_id(snapshots: Sequence[Snapshot]) -> str:
    """The id of the next snapshot: one more than the largest number that is an id."""
    return str(1 + max((int(each.id) for each in snapshots if _NUMBER.fullmatch(each.id)), default=0))


def snapshot_named(snapshots: Sequence[Snapshot], name: str, path: str) -> Snapshot:
    """The snapshot with an id or a name, the id first, as QEMU looks. Raises ImageError(not_found).

    In qemu-img's words "snapshot.id=ID", "snapshot.name=NAME" and both of them only that is meant.
    """
    by_id, by_name = _found(snapshots, name)
    found = by_id or by_name
    if not found:
        raise _missing(snapshots, name, path)
    return found[0]


def snapshot_to_change(snapshots: Sequence[Snapshot], name: str, path: str) -> Snapshot:
    """The one snapshot that a name or an id means. Raises ImageError(not_found), (invalid_argument) for several."""
    by_id, by_name = _found(snapshots, name)
    found = [each for each in snapshots if each in by_id or each in by_name]
    if not found:
        raise _missing(snapshots, name, path)
    if len(found) > 1:
        ids = ", ".join(each.id for each in found)
        message = f"{name!r} means several snapshots, with the ids {ids}"
        remedy = f"say snapshot.id={found[0].id}"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=path, op="find a snapshot", remedy=remedy)
    return found[0]


def _found(snapshots: Sequence[Snapshot], name: str) -> tuple[list[Snapshot], list[Snapshot]]:
    """The snapshots that a text means as an id, and as a name."""
    by_id = [each for each in snapshots if each.id == name]
    by_name = [each for each in snapshots if each.name == name]
    if by_id or by_name or not name.startswith(_OPTION):
        return by_id, by_name
    wanted: dict[str, str] = {}
    for part in _parts(name):
        option, _, value = part.removeprefix(_OPTION).partition("=")
        wanted[option] = value
    if not wanted or not wanted.keys() <= {"id", "name"}:
        return [], []
    both = [
        each
        for each in snapshots
        if wanted.get("id", each.id) == each.id and wanted.get("name", each.name) == each.name
    ]
    return both, []


def _parts(text: str) -> list[str]:
    """The options of a text, with a comma before each option but the first; other commas belong to a value."""
    first, *others = text.split(f",{_OPTION}")
    return [first, *(_OPTION + each for each in others)]


def _missing(snapshots: Sequence[Snapshot], name: str, path: str) -> ImageError:
    known = ", ".join(each.name or each.id for each in snapshots)
    remedy = f"there are: {known}" if known else None
    return ImageError(ErrorKind.NOT_FOUND, f"has no snapshot {name!r}", path=path, op="open", remedy=remedy)


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
    l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, clock, state_bytes, extra_length = fields
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
    return Snapshot(
        id=identifier,
        name=name,
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        disk_size=size,
        seconds=seconds,
        state_bytes=state_bytes,
        offset=start,
        length=end - start,
        nanoseconds=nanoseconds,
        clock_nanoseconds=clock,
        extra=extra,
    )
