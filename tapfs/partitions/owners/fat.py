"""The files of FAT and exFAT that lie in ranges, by a walk of all directories and chains of clusters."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tapfs.partitions.fat import boot_sector, fat_parameters
from tapfs.partitions.owners.search import MOST_DIRECTORIES, Search

_FIRST = 2
_FIRST_FAT16, _FIRST_FAT32 = 4085, 65525
_ENTRY = 32
_END, _DELETED, _DOT, _KANJI = 0x00, 0xE5, 0x2E, 0x05
_VOLUME_LABEL, _DIRECTORY, _LONG_NAME = 0x08, 0x10, 0x0F
_LONG_ORDER, _LAST_LONG = 0x3F, 0x40
_MOST_DIRECTORY_BYTES = 256 << 20
_MOST_TABLE_BYTES = 1 << 30

_EXFAT = b"EXFAT   "
_EXFAT_FILE, _EXFAT_STREAM, _EXFAT_NAME, _EXFAT_BITMAP, _EXFAT_CASE = 0x85, 0xC0, 0xC1, 0x81, 0x82
_NO_CHAIN = 0x02


class _Entry(NamedTuple):
    """An entry of a directory; `contiguous`: its clusters follow each other, `size` says how many."""

    name: str
    cluster: int
    size: int
    is_directory: bool
    contiguous: bool = False


class _Volume(NamedTuple):
    """Sizes in bytes; `bits` of an entry of the table; `root` is a cluster, or 0 with `root_at` and `root_bytes`."""

    cluster_bytes: int
    clusters: int
    data_at: int
    table_at: int
    table_bytes: int
    bits: int
    root: int
    root_at: int
    root_bytes: int
    tables: int
    is_exfat: bool

    @property
    def stop(self) -> int:
        """The first number that no cluster has."""
        return self.clusters + _FIRST


def fat_owners(search: Search) -> None:
    """Say to the search which files lie in its ranges."""
    volume = _volume(search)
    if volume is None:
        search.note("the boot sector cannot be read, or makes no sense")
        return
    search.metadata_has("<boot sector>", 0, 512)
    for copy in range(volume.tables):
        name = f"<file allocation table {copy + 1}>"
        search.metadata_has(name, volume.table_at + copy * volume.table_bytes, volume.table_bytes)
    if volume.root_bytes:
        search.metadata_has("<root directory>", volume.root_at, volume.root_bytes)
    _Fat(search, volume).run()


def _volume(search: Search) -> _Volume | None:
    sector = boot_sector(search.disk) if search.read(0, 512, "the boot sector") is not None else None
    if sector is None:
        return None
    if sector[3:11] == _EXFAT:
        return _exfat_volume(search, sector)
    found = fat_parameters(sector)
    if found is None or found.clusters <= 0 or found.data_start >= search.disk.size:
        return None
    size = found.sector_size
    bits = 12 if found.clusters < _FIRST_FAT16 else 16 if found.clusters < _FIRST_FAT32 else 32
    if not found.fat_sectors16:
        bits = 32
    root_bytes = found.root_entries * _ENTRY if bits != 32 else 0
    return _Volume(
        cluster_bytes=found.sectors_per_cluster * size,
        clusters=found.clusters,
        data_at=found.data_start,
        table_at=found.reserved * size,
        table_bytes=found.fat_sectors * size,
        bits=bits,
        root=found.root_cluster if bits == 32 else 0,
        root_at=(found.reserved + found.fats * found.fat_sectors) * size,
        root_bytes=root_bytes,
        tables=found.fats,
        is_exfat=False,
    )


def _exfat_volume(search: Search, sector: bytes) -> _Volume | None:
    table, table_sectors, heap, clusters, root = struct.unpack_from("<5I", sector, 80)
    sector_shift, cluster_shift = sector[108], sector[109]
    if not 9 <= sector_shift <= 12 or cluster_shift > 25 - sector_shift or heap << sector_shift >= search.disk.size:
        return None
    return _Volume(
        cluster_bytes=1 << (sector_shift + cluster_shift),
        clusters=clusters,
        data_at=heap << sector_shift,
        table_at=table << sector_shift,
        table_bytes=table_sectors << sector_shift,
        bits=32,
        root=root,
        root_at=0,
        root_bytes=0,
        tables=max(1, min(sector[110], 2)),
        is_exfat=True,
    )


class _Fat:
    def __init__(self, search: Search, volume: _Volume) -> None:
        self._search = search
        self._volume = volume
        self._table = b""
        #: Numbers that stand for files, which have none.
        self._count = 0

    def run(self) -> None:
        volume = self._volume
        self._table = self._read_table()
        if volume.root_bytes:
            content = self._search.read(volume.root_at, volume.root_bytes, "the root directory") or b""
            waiting = [("", content)]
        else:
            waiting = [("", self._take(_Entry("", volume.root, 0, is_directory=True), "/"))]
        seen = {volume.root}
        while waiting and len(seen) < MOST_DIRECTORIES:
            path, content = waiting.pop()
            for entry in _exfat_entries(content) if volume.is_exfat else _fat_entries(content):
                below = entry.name if entry.name.startswith("<") else f"{path}/{entry.name}"
                if not entry.cluster or (entry.is_directory and entry.cluster in seen):
                    continue
                inner = self._take(entry, below)
                if entry.is_directory:
                    seen.add(entry.cluster)
                    waiting.append((below, inner))

    def _read_table(self) -> bytes:
        volume = self._volume
        needed = min(-(-volume.stop * volume.bits // 8), volume.table_bytes, _MOST_TABLE_BYTES)
        for copy in range(volume.tables):
            found = self._search.read(
                volume.table_at + copy * volume.table_bytes, needed, f"file allocation table {copy + 1}"
            )
            if found is not None:
                return found
        return b""

    def _take(self, entry: _Entry, path: str) -> bytes:
        """Note the clusters of a file; the bytes of a directory."""
        number = self._count
        self._count += 1
        volume = self._volume
        content = bytearray()
        part = "directory" if entry.is_directory else "data"
        for cluster in self._chain(entry, path):
            place = volume.data_at + (cluster - _FIRST) * volume.cluster_bytes
            self._search.file_has(number, place, volume.cluster_bytes, part)
            if entry.is_directory and len(content) < _MOST_DIRECTORY_BYTES:
                raw = self._search.read(place, volume.cluster_bytes, f"a cluster of the directory {path}")
                content += bytes(volume.cluster_bytes) if raw is None else raw
        self._search.named(number, path)
        return bytes(content)

    def _chain(self, entry: _Entry, path: str) -> Iterator[int]:
        volume, cluster = self._volume, entry.cluster
        if entry.contiguous:
            count = -(-entry.size // volume.cluster_bytes)
            yield from range(cluster, min(cluster + count, volume.stop))
            return
        for _ in range(volume.clusters):
            if not _FIRST <= cluster < volume.stop:
                break
            yield cluster
            cluster = self._next(cluster)
        else:
            self._search.note(f"the chain of clusters of {path} has no end")
        if cluster < (1 << min(volume.bits, 28)) - 9:
            self._search.note(f"the chain of clusters of {path} ends in {cluster}, which there is not")

    def _next(self, cluster: int) -> int:
        bits = self._volume.bits
        if bits == 12:
            pair = int.from_bytes(self._table[cluster * 3 // 2 : cluster * 3 // 2 + 2], "little")
            return pair >> 4 if cluster % 2 else pair & 0xFFF
        step = bits // 8
        found = int.from_bytes(self._table[cluster * step : (cluster + 1) * step], "little")
        return found if bits == 16 or self._volume.is_exfat else found & 0x0FFFFFFF


def _fat_entries(content: bytes) -> Iterator[_Entry]:
    """The files and folders of a directory of FAT, by their long names where they have such."""
    long: dict[int, bytes] = {}
    for at in range(0, len(content) - _ENTRY + 1, _ENTRY):
        raw = content[at : at + _ENTRY]
        first, attributes = raw[0], raw[11]
        if first == _END:
            continue  # a cluster that could not be read looks so, too, and what is behind it counts
        if first == _DELETED:
            long.clear()
            continue
        if attributes & _LONG_NAME == _LONG_NAME:
            if first & _LAST_LONG:
                long.clear()
            long[first & _LONG_ORDER] = raw[1:11] + raw[14:26] + raw[28:32]
            continue
        if not attributes & _VOLUME_LABEL and first != _DOT:
            high, low, size = struct.unpack_from("<H4xHI", raw, 20)
            name = _long_name(long) or _short_name(raw)
            yield _Entry(name, low | high << 16, size, bool(attributes & _DIRECTORY))
        long.clear()


def _long_name(parts: dict[int, bytes]) -> str:
    if sorted(parts) != list(range(1, len(parts) + 1)):
        return ""
    text = b"".join(parts[number] for number in sorted(parts)).decode("utf-16-le", "replace")
    return text.partition("\0")[0]


def _short_name(raw: bytes) -> str:
    start = b"\xe5" + raw[1:8] if raw[0] == _KANJI else raw[:8]
    name, ending = (each.decode("cp437").rstrip(" ") for each in (start, raw[8:11]))
    return f"{name}.{ending}" if ending else name


def _exfat_entries(content: bytes) -> Iterator[_Entry]:
    """The files and folders of a directory of exFAT, and in the root its bitmap and table of letters."""
    is_directory, stream, name = False, b"", ""
    for at in range(0, len(content) - _ENTRY + 1, _ENTRY):
        raw = content[at : at + _ENTRY]
        if raw[0] in {_EXFAT_BITMAP, _EXFAT_CASE}:
            cluster, size = struct.unpack_from("<IQ", raw, 20)
            kind = "<allocation bitmap>" if raw[0] == _EXFAT_BITMAP else "<table of letters>"
            yield _Entry(kind, cluster, size, is_directory=False)
        elif raw[0] == _EXFAT_FILE:
            is_directory, stream, name = bool(raw[4] & _DIRECTORY), b"", ""
        elif raw[0] == _EXFAT_STREAM:
            stream = raw
        elif raw[0] == _EXFAT_NAME and stream:
            name += raw[2:].decode("utf-16-le", "replace")
            if len(name) >= stream[3]:
                cluster, size = struct.unpack_from("<IQ", stream, 20)
                yield _Entry(name[: stream[3]], cluster, size, is_directory, bool(stream[1] & _NO_CHAIN))
                stream, name = b"", ""
