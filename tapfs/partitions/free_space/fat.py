"""The free clusters of FAT12, FAT16 and FAT32 (Microsoft's FAT specification, 1.03), from the file allocation table.

A table has no checksum. So it counts only if all its copies are alike, if the volume is not marked as in use, if no
chain leads into a free cluster or out of the table, and if no entry of a directory begins in a free cluster. FSInfo is
never asked.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator

from tapfs.extent import Range
from tapfs.partitions.fat import boot_sector, fat_is_dirty, fat_parameters
from tapfs.partitions.free_space.refusal import damaged, require_bytes, unknown
from tapfs.partitions.reader import Reader

_FIRST_FAT16, _FIRST_FAT32 = 4085, 65525
_MAX_CLUSTERS = 1 << 26
_FIRST = 2
#: The table in use of a FAT32 that keeps one only (offset 40 of the boot sector).
_ACTIVE_AT, _ONE_ACTIVE, _ACTIVE_MASK = 40, 0x80, 0x0F
_VERSION_AT = 42
#: The sector with the copy of the boot sector, in FAT32; the fields of sizes in it begin at 11 and end here.
_COPY_AT, _SIZES_END = 50, 48
_PIECE = 64 << 10

_ENTRY = 32
_END, _DELETED, _DOT = 0x00, 0xE5, 0x2E
_VOLUME_LABEL, _DIRECTORY = 0x08, 0x10
#: A directory has at most so many bytes (6.5).
_MAX_DIRECTORY_BYTES = 65536 * _ENTRY
_MAX_DIRECTORIES = 1 << 20


def fat_free_ranges(disk: Reader) -> Iterator[Range]:
    """The free ranges, ascending, in bytes of the partition. Raises ImageError where the table cannot be trusted."""
    volume = _Volume(disk)
    volume.require_chains()
    volume.require_directories()
    return volume.free_ranges()


class _Volume:
    """A volume that is not in use, and its table in memory."""

    def __init__(self, disk: Reader) -> None:
        sector = boot_sector(disk)
        parameters = None if sector is None else fat_parameters(sector)
        if sector is None or parameters is None:
            raise damaged("it has no boot sector of FAT")
        if fat_is_dirty(disk):
            raise unknown("it was not unmounted cleanly: have it checked first (fsck.vfat, chkdsk)")
        self._disk = disk
        self._parameters = parameters
        self._clusters = parameters.clusters
        sectors = parameters.sectors16 or parameters.sectors32
        if sectors * parameters.sector_size > disk.size:
            claimed = sectors * parameters.sector_size
            raise damaged(f"it claims {claimed} bytes of the {disk.size} of its partition")
        if not 0 < self._clusters <= _MAX_CLUSTERS:
            raise unknown(f"it has {self._clusters} clusters")
        # By the size of a table, as Linux has it: small volumes are FAT32, too, if somebody has wanted that.
        self._bits = 32 if not parameters.fat_sectors16 else 12 if self._clusters < _FIRST_FAT16 else 16
        if self._bits == 16 and self._clusters >= _FIRST_FAT32:
            raise damaged("it has more clusters than a FAT16 can")
        if self._bits == 32:
            self._require_fat32(sector)
        self._table = self._read_table(self._active(sector))
        self._first_invalid = self._clusters + _FIRST
        mask = (1 << min(self._bits, 28)) - 1
        self._bad = mask - 8  # what is above marks the end of a chain
        if self._table[0] & 0xFF != parameters.media or self._table[0] | 0xFF != mask:
            raise damaged("its table does not begin as it should")

    def _require_fat32(self, sector: bytes) -> None:
        """Raise ImageError for a version that nobody knows, or if the copy of the boot sector has other sizes."""
        if any(sector[_VERSION_AT : _VERSION_AT + 2]):
            raise unknown("it is FAT32 of an unknown version")
        (place,) = struct.unpack_from("<H", sector, _COPY_AT)
        if 0 < place < self._parameters.reserved:
            copy = self._disk.read(place * self._parameters.sector_size, len(sector))
            if copy[11:_SIZES_END] != sector[11:_SIZES_END]:
                raise damaged("its boot sector and the copy of that differ: have it checked first (fsck.vfat)")

    def _active(self, sector: bytes) -> list[int]:
        """The numbers of the tables that are to be alike."""
        flags = sector[_ACTIVE_AT] if self._bits == 32 else 0
        if not flags & _ONE_ACTIVE:
            return list(range(self._parameters.fats))
        if flags & _ACTIVE_MASK >= self._parameters.fats:
            raise damaged("the table in use is none that it has")
        return [flags & _ACTIVE_MASK]

    def _read_table(self, copies: list[int]) -> array[int]:
        """The entries of 12, 16 or 28 bits, of the clusters and the two before them."""
        parameters = self._parameters
        size = parameters.fat_sectors * parameters.sector_size
        needed = -(-(self._clusters + _FIRST) * self._bits // 8)
        if needed > size:
            raise damaged("its table is too short for its clusters")
        raw = bytearray()
        while len(raw) < needed:
            count = min(_PIECE, needed - len(raw))
            pieces = [self._table_bytes(copy * size + len(raw), count) for copy in copies]
            if any(piece != pieces[0] for piece in pieces):
                raise damaged("its copies of the file allocation table differ: have it checked first (fsck.vfat)")
            raw += pieces[0]
        if self._bits == 12:
            return array("I", _of_twelve_bits(raw, self._clusters + _FIRST))
        table = array("H" if self._bits == 16 else "I", bytes(raw))
        if sys.byteorder == "big":
            table.byteswap()
        return table if self._bits == 16 else array("I", (entry & 0x0FFFFFFF for entry in table))

    def _table_bytes(self, at: int, count: int) -> bytes:
        start = self._parameters.reserved * self._parameters.sector_size
        return require_bytes(self._disk.read_once(start + at, count), count, "the file allocation table")

    def require_chains(self) -> None:
        """Raise ImageError if a chain leads where no cluster in use is, or two lead to one."""
        reached = bytearray(self._first_invalid)
        table = self._table
        for cluster in range(_FIRST, self._first_invalid):
            following = table[cluster]
            if following == 0 or following >= self._bad:
                continue  # free; or bad, or the end of its chain
            if not _FIRST <= following < self._first_invalid or not table[following]:
                raise damaged(f"the chain of clusters at {cluster} leads to {following}, which is not in use")
            if reached[following]:
                raise damaged(f"two chains of clusters lead to {following}")
            reached[following] = 1

    def require_directories(self) -> None:
        """Raise ImageError if an entry of a directory begins in a cluster that is not in use."""
        parameters = self._parameters
        root = parameters.root_entries * _ENTRY
        waiting = self._first_clusters(self._root_bytes(root) if root else self._directory(parameters.root_cluster))
        seen: set[int] = set()
        while waiting:
            cluster, is_directory, size = waiting.pop()
            if not _FIRST <= cluster < self._first_invalid or not self._table[cluster]:
                raise damaged(f"a directory names the cluster {cluster}, which is not in use")
            if not is_directory:
                self._require_length(cluster, -(-size // self._size))
            elif cluster not in seen:
                seen.add(cluster)
                if len(seen) > _MAX_DIRECTORIES:
                    raise unknown(f"it has more than {_MAX_DIRECTORIES} directories")
                waiting += self._first_clusters(self._directory(cluster))

    def _require_length(self, cluster: int, clusters: int) -> None:
        """Raise ImageError unless the chain of a file has as many clusters as its bytes need."""
        first, found = cluster, 0
        while _FIRST <= cluster < self._first_invalid and found <= clusters:
            found += 1
            cluster = self._table[cluster]
        if found != max(clusters, 1):
            raise damaged(f"the chain of clusters at {first} does not fit the length of its file")

    def _first_clusters(self, entries: bytes) -> list[tuple[int, bool, int]]:
        """The first cluster that each entry has, whether it is a directory's, and the bytes of a file."""
        found: list[tuple[int, bool, int]] = []
        for at in range(0, len(entries) - _ENTRY + 1, _ENTRY):
            first, attributes = entries[at], entries[at + 11]
            if first == _END:
                break
            if first in {_DELETED, _DOT} or attributes & _VOLUME_LABEL:
                continue  # long names have this bit, too
            high, low, size = struct.unpack_from("<H4xHI", entries, at + 20)
            cluster = low | (high << 16 if self._bits == 32 else 0)
            if cluster or size or attributes & _DIRECTORY:
                found.append((cluster, bool(attributes & _DIRECTORY), size))
        return found

    def _root_bytes(self, length: int) -> bytes:
        parameters = self._parameters
        start = (parameters.reserved + parameters.fats * parameters.fat_sectors) * parameters.sector_size
        return require_bytes(self._disk.read_once(start, length), length, "the root directory")

    def _directory(self, cluster: int) -> bytes:
        """The bytes of a directory, as far as its chain of clusters goes."""
        raw = bytearray()
        while _FIRST <= cluster < self._first_invalid:
            if len(raw) > _MAX_DIRECTORY_BYTES:
                raise damaged("a directory is too long")
            raw += require_bytes(self._disk.read_once(self._place(cluster), self._size), self._size, "a directory")
            cluster = self._table[cluster]
        if cluster < self._bad + 1:
            raise damaged(f"a directory goes on in the cluster {cluster}, which there is not")
        return bytes(raw)

    @property
    def _size(self) -> int:
        return self._parameters.sectors_per_cluster * self._parameters.sector_size

    def _place(self, cluster: int) -> int:
        return self._parameters.data_start + (cluster - _FIRST) * self._size

    def free_ranges(self) -> Iterator[Range]:
        """The runs of clusters whose entries are 0."""
        table, cluster = self._table, _FIRST
        while cluster < self._first_invalid:
            if table[cluster]:
                cluster += 1
                continue
            start = cluster
            while cluster < self._first_invalid and not table[cluster]:
                cluster += 1
            yield Range(self._place(start), (cluster - start) * self._size)


def _of_twelve_bits(raw: bytes | bytearray, count: int) -> Iterator[int]:
    for number in range(count):
        pair = int.from_bytes(raw[number * 3 // 2 : number * 3 // 2 + 2], "little")
        yield pair >> 4 if number % 2 else pair & 0xFFF
