"""Records of the master file table of NTFS, and where the values of their attributes lie.

What is read here decides over data, so each record is proved: its signature, its own number, and the update sequence
at the end of each 512 bytes, which a torn write breaks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tapfs.extent import Range
from tapfs.partitions.fat import boot_sector
from tapfs.partitions.free_space.refusal import damaged, require_bytes
from tapfs.partitions.ntfs import NAME
from tapfs.partitions.reader import Reader

_BLOCK = 512
_IN_USE = 0x1
ATTRIBUTE_LIST, DATA = 0x20, 0x80
_END = 0xFFFFFFFF
#: An attribute of the system files is neither compressed, encrypted nor sparse.
_SPECIAL_FLAGS = 0xFFFF
#: Runs of one attribute, and bytes of a list of attributes (NTFS allows 256 KiB).
_MAX_RUNS, _MAX_LIST_BYTES = 1 << 20, 256 << 10
_NUMBER = (1 << 48) - 1
#: Bytes of the table that are read together.
_PIECE = 1 << 20


class Volume(NamedTuple):
    """The constants of a volume, in bytes and clusters."""

    cluster_size: int
    clusters: int
    record_size: int
    table_cluster: int
    mirror_cluster: int


class Attribute(NamedTuple):
    """An attribute in a record: its type, its name's length, its bytes; `first` is the first cluster that it maps."""

    kind: int
    name_length: int
    raw: bytes

    @property
    def resident(self) -> bool:
        """Whether its value lies in the record."""
        return not self.raw[8]

    @property
    def first(self) -> int:
        """The first cluster of the value that a part of an attribute maps."""
        return 0 if self.resident else int.from_bytes(self.raw[16:24], "little")

    @property
    def value(self) -> bytes:
        """The value of one that is resident."""
        size, start = struct.unpack_from("<IH", self.raw, 16)
        return require_bytes(self.raw[start : start + size], size, "the value of an attribute")


def read_volume(disk: Reader) -> Volume:
    """What the boot sector says. Raises ImageError if that cannot be."""
    sector = boot_sector(disk)
    if sector is None or sector[3:11] != NAME:
        raise damaged("it has no boot sector of NTFS")
    sector_size, per_cluster = struct.unpack_from("<HB", sector, 11)
    sectors, table, mirror, record_clusters = struct.unpack_from("<QQQb", sector, 0x28)
    cluster = sector_size * (per_cluster if per_cluster <= 0x80 else 1 << min(256 - per_cluster, 31))
    record_size = record_clusters * cluster if record_clusters > 0 else 1 << min(-record_clusters, 31)
    if (
        sector_size not in {512, 1024, 2048, 4096}
        or not 512 <= cluster <= 2 << 20
        or cluster & (cluster - 1)
        or record_size not in {512, 1024, 2048, 4096}
        or not sectors
    ):
        raise damaged("the boot sector has impossible sizes")
    if sectors * sector_size > disk.size:
        raise damaged(f"it claims {sectors * sector_size} bytes of the {disk.size} of its partition")
    clusters = sectors * sector_size // cluster
    if max(table, mirror) >= clusters:
        raise damaged("the master file table lies behind the end")
    return Volume(cluster, clusters, record_size, table, mirror)


class MasterFileTable:
    """The table, once its own runs are known. Each record is read and proved when it is asked for."""

    def __init__(self, disk: Reader, volume: Volume) -> None:
        self._disk = disk
        self._volume = volume
        # Record 0, where the boot sector says, describes the table.
        self.runs: list[Range] = [Range(volume.table_cluster, -(-volume.record_size // volume.cluster_size))]
        record = self.record(0)
        runs = self.mapped(record, 0, DATA)
        self._written = min(self.sizes(record, 0, DATA))
        if not runs or runs[0].offset != volume.table_cluster:
            raise damaged("the boot sector and the master file table disagree on its place")

    def record(self, number: int) -> bytes:
        """The record of that number with its update sequence put back."""
        size = self._volume.record_size
        raw = b"".join(self._pieces(self.runs, number * size, size))
        if len(raw) != size or raw[:4] != b"FILE":
            raise damaged(f"record {number} of the master file table is not there")
        if not int.from_bytes(raw[22:24], "little") & _IN_USE:
            raise damaged(f"record {number} of the master file table is not in use")
        record = restored(raw, f"record {number} of the master file table")
        start = int.from_bytes(raw[4:6], "little")
        # Older versions have no number there: their update sequence begins in its place.
        if start >= 48 and int.from_bytes(raw[44:48], "little") != number & 0xFFFFFFFF:
            raise damaged(f"record {number} of the master file table has the number of another")
        return record

    def mapped(self, record: bytes, number: int, kind: int) -> list[Range]:
        """The runs of the unnamed attribute of that type, in clusters, wherever parts of it are described."""
        runs: list[Range] = []
        for part in self._parts(record, number, kind):
            if part.resident or part.first != sum(run.length for run in runs):
                raise damaged(f"a part of the attribute {kind:#x} of record {number} is missing")
            runs += self._runs_of(part)
            if number == 0:
                self.runs = runs  # the next part may lie in a record that this one maps
        return runs

    def require_allocated(self, record: bytes, number: int, kind: int, runs: Sequence[Range]) -> None:
        """Raise ImageError unless an attribute says that it has so many bytes as its runs have.

        It does not where the boot sector has the wrong size of a cluster.
        """
        first = next(self._parts(record, number, kind), None)
        allocated = 0 if first is None else int.from_bytes(first.raw[40:48], "little")
        if allocated != sum(run.length for run in runs) * self._volume.cluster_size:
            raise damaged(f"record {number} and the boot sector differ on the size of a cluster")

    def _parts(self, record: bytes, number: int, kind: int) -> Iterator[Attribute]:
        """The parts of an unnamed attribute in the order of its value."""
        own = [each for each in attributes(record) if each.kind == kind and not each.name_length]
        listed = next((each for each in attributes(record) if each.kind == ATTRIBUTE_LIST), None)
        if listed is None:
            yield from own
            return
        for other in self._records_with(listed, kind):
            if other == number:
                yield from own
                continue
            further = self.record(other)
            if int.from_bytes(further[32:38], "little") != number:
                raise damaged(f"record {other} of the master file table continues another than record {number}")
            yield from (each for each in attributes(further) if each.kind == kind and not each.name_length)

    def sizes(self, record: bytes, number: int, kind: int) -> tuple[int, int]:
        """The length of an attribute's value in bytes, and how much of that was ever written."""
        first = next((each for each in self._parts(record, number, kind)), None)
        if first is None or first.resident:
            raise damaged(f"record {number} has no attribute {kind:#x} of its own clusters")
        size, initialised = struct.unpack_from("<QQ", first.raw, 48)
        return size, initialised

    def read(self, runs: Sequence[Range], offset: int, length: int) -> bytes:
        """Bytes of a value."""
        return require_bytes(b"".join(self._pieces(runs, offset, length)), length, "the value of an attribute")

    def _pieces(self, runs: Sequence[Range], offset: int, length: int) -> Iterator[bytes]:
        size = self._volume.cluster_size
        for run in runs:
            if offset < run.length * size and length:
                count = min(length, run.length * size - offset)
                yield self._disk.read_once(run.offset * size + offset, count)
                offset, length = 0, length - count
            else:
                offset -= run.length * size

    def _records_with(self, listed: Attribute, kind: int) -> Iterator[int]:
        """Each of the records that a list of attributes names for that type, in the order of the value."""
        if listed.resident:
            entries = listed.value
        else:
            (size,) = struct.unpack_from("<Q", listed.raw, 48)
            if size > _MAX_LIST_BYTES:
                raise damaged("a list of attributes is too long")
            entries = self.read(self._runs_of(listed), 0, size)
        seen: set[int] = set()
        at = 0
        while at + 26 <= len(entries):
            found, length, name_length = struct.unpack_from("<IHB", entries, at)
            if length < 26:
                break
            number = int.from_bytes(entries[at + 16 : at + 24], "little") & _NUMBER
            if found == kind and not name_length and number not in seen:
                seen.add(number)
                yield number
            at += length

    def every_run(self) -> Iterator[tuple[int, Range]]:
        """The runs of all files, each with the number of the record that names it. Reads the whole table.

        Raises ImageError(corrupt) for a record in use that is torn, or that names what cannot be.
        """
        size = self._volume.record_size
        total = min(sum(run.length for run in self.runs) * self._volume.cluster_size, self._written)
        for start in range(0, total, _PIECE):
            piece = self.read(self.runs, start, min(_PIECE, total - start))
            for at in range(0, len(piece) - size + 1, size):
                raw = piece[at : at + size]
                if raw[:4] == b"BAAD":
                    raise damaged(f"record {(start + at) // size} of the master file table is marked as bad")
                if raw[:4] != b"FILE" or not raw[22] & _IN_USE:
                    continue  # never used, or of a file that was deleted
                number = (start + at) // size
                for each in attributes(restored(raw, f"record {number} of the master file table")):
                    if not each.resident:
                        yield from ((number, run) for run in runs_in(each, self._volume.clusters))

    def _runs_of(self, part: Attribute) -> list[Range]:
        """The runs that one attribute of a system file maps, none of them sparse."""
        if part.resident or int.from_bytes(part.raw[12:14], "little") & _SPECIAL_FLAGS:
            raise damaged("a system file is compressed, encrypted or sparse")
        first, last = struct.unpack_from("<QQ", part.raw, 16)
        runs = list(runs_in(part, self._volume.clusters))
        if sum(run.length for run in runs) != last + 1 - first:
            raise damaged("a system file has runs for other clusters than it says")
        return runs


def runs_in(part: Attribute, clusters: int) -> Iterator[Range]:
    """The runs that one attribute maps, but for holes."""
    first, last, at = struct.unpack_from("<qqH", part.raw, 16)  # the last one of an attribute without clusters is -1
    place = mapped = 0
    raw = part.raw
    for _ in range(_MAX_RUNS):
        if at >= len(raw) or not raw[at]:
            break
        of_length, of_place = raw[at] & 15, raw[at] >> 4
        length = int.from_bytes(raw[at + 1 : at + 1 + of_length], "little", signed=True)
        moved = int.from_bytes(raw[at + 1 + of_length : at + 1 + of_length + of_place], "little", signed=True)
        at += 1 + of_length + of_place
        place += moved
        if at > len(raw) or length <= 0 or not 0 <= place <= clusters - length * bool(of_place):
            raise damaged("a file has an impossible run")
        mapped += length
        if of_place:
            yield Range(place, length)
    if mapped != last + 1 - first:
        raise damaged("a file has runs for other clusters than it says")


def attributes(record: bytes) -> Iterator[Attribute]:
    """The attributes of a record."""
    at = int.from_bytes(record[20:22], "little")
    used = int.from_bytes(record[24:28], "little")
    while at + 8 <= min(used, len(record)):
        kind, length = struct.unpack_from("<II", record, at)
        if kind == _END:
            return
        if length < 24 or at + length > len(record):
            break
        raw = record[at : at + length]
        if raw[8] and length < 64:
            break
        yield Attribute(kind, raw[9], raw)
        at += length
    raise damaged("a record of the master file table has no end")


def restored(raw: bytes, name: str) -> bytes:
    """A record with the last two bytes of each 512 put back, each proved to belong to the same write."""
    start, count = struct.unpack_from("<HH", raw, 4)
    blocks = len(raw) // _BLOCK
    if count != blocks + 1 or start + 2 * count > _BLOCK - 2:
        raise damaged(f"{name} has no update sequence")
    mark = raw[start : start + 2]
    fixed = bytearray(raw)
    for block in range(1, count):
        end = block * _BLOCK
        if raw[end - 2 : end] != mark:
            raise damaged(f"{name} was torn while it was written")
        fixed[end - 2 : end] = raw[start + 2 * block : start + 2 * block + 2]
    return bytes(fixed)
