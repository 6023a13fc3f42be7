"""The files of XFS that lie in ranges: inodes by the trees of each group, runs by their forks, names by directories.

"XFS Algorithms & Data Structures" describes every field ("Inode B+trees", "Data Extents", "Directories").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tapfs.partitions.owners.search import MOST_DIRECTORIES, Search, text_of

_SUPERBLOCK_BYTES = 512
_MAX_GROUPS = 1 << 20
_VERSION, _FILE_TYPES, _OLD_FILE_TYPES = 0xF, 0x1, 0x200

_INODE_MAGIC, _AGI_MAGIC = b"IN", b"XAGI"
_INODE_TREES, _MAP_TREES = {b"IABT": 16, b"IAB3": 56}, {b"BMAP": 24, b"BMA3": 72}
_MAX_LEVELS = 9
_IN_CHUNK = 64
_NULL = 0xFFFFFFFF

_LOCAL, _EXTENTS, _TREE = 1, 2, 3
_DIRECTORY = 0x4000
_MANY_EXTENTS = 1 << 4
_UNUSED_TAG = 0xFFFF
_DATA_BLOCKS = {b"XD2B": 16, b"XD2D": 16, b"XDB3": 64, b"XDD3": 64}
_SINGLE = {b"XD2B", b"XDB3"}
#: Behind so many bytes of a directory lies its index.
_INDEX_AT = 1 << 35


class _Super(NamedTuple):
    block: int
    blocks: int
    group_blocks: int
    groups: int
    sector: int
    inode: int
    inodes_shift: int
    group_shift: int
    directory_block: int
    root: int
    version: int
    file_types: bool
    log_start: int
    log_blocks: int


class _Run(NamedTuple):
    """Blocks of a file: the first of the file, the byte of the partition, how many; `is_map`: of its map."""

    logical: int
    place: int
    blocks: int
    is_map: bool = False


def xfs_owners(search: Search) -> None:
    """Say to the search which files and metadata lie in its ranges."""
    raw = search.read(0, _SUPERBLOCK_BYTES, "the superblock")
    found = None if raw is None else _superblock(raw, search)
    if found is not None:
        _Xfs(search, found).run()


def _superblock(raw: bytes, search: Search) -> _Super | None:
    block, blocks = struct.unpack_from(">IQ", raw, 4)
    log_start, root = struct.unpack_from(">QQ", raw, 48)
    group_blocks, groups, _, log_blocks, version, sector, inode = struct.unpack_from(">IIIIHHH", raw, 84)
    inodes_shift, group_shift, directory_shift = raw[123], raw[124], raw[192]
    if (
        not raw.startswith(b"XFSB")
        or block not in {1 << shift for shift in range(9, 17)}
        or sector not in {512, 1024, 2048, 4096}
        or inode not in {256, 512, 1024, 2048}
        or block != inode << inodes_shift
        or not 0 < groups <= _MAX_GROUPS
        or not 0 < group_blocks <= 1 << group_shift <= 1 << 31
        or directory_shift > 8
    ):
        search.note("the superblock makes no sense")
        return None
    newest = version & _VERSION == 5
    types = struct.unpack_from(">I", raw, 216)[0] & _FILE_TYPES if newest else 0
    types |= struct.unpack_from(">I", raw, 200)[0] & _OLD_FILE_TYPES
    return _Super(
        block,
        blocks,
        group_blocks,
        groups,
        sector,
        inode,
        inodes_shift,
        group_shift,
        block << directory_shift,
        root,
        version & _VERSION,
        bool(types),
        log_start,
        log_blocks,
    )


class _Xfs:
    def __init__(self, search: Search, found: _Super) -> None:
        self._search = search
        self._super = found
        self._directories: dict[int, bytes] = {}

    def run(self) -> None:
        found = self._super
        if found.log_start:
            place = self._place(found.log_start)
            if place is not None:
                self._search.metadata_has("<log>", place, found.log_blocks * found.block)
        for group in range(found.groups):
            start = group * found.group_blocks * found.block
            self._search.metadata_has(f"<headers of group {group}>", start, 4 * found.sector)
            header = self._search.read(start + 2 * found.sector, 512, f"the header of the inodes of group {group}")
            if header is None:
                continue
            if not header.startswith(_AGI_MAGIC):
                self._search.note(f"the header of the inodes of group {group} is damaged")
                continue
            root, levels = struct.unpack_from(">II", header, 20)
            self._inode_tree(group, root, min(levels, _MAX_LEVELS), set())
        if self._search.unnamed:
            self._walk()

    # Inodes

    def _inode_tree(self, group: int, block: int, levels: int, seen: set[int]) -> None:
        found = self._super
        if block in seen or block >= found.group_blocks or levels <= 0:
            return
        seen.add(block)
        place = (group * found.group_blocks + block) * found.block
        name = f"<inode tree of group {group}>"
        self._search.metadata_has(name, place, found.block)
        raw = self._search.read(place, found.block, f"a block of the inode tree of group {group}")
        if raw is None:
            return
        header = _INODE_TREES.get(raw[:4])
        level, count = struct.unpack_from(">HH", raw, 4)
        if header is None or level != levels - 1:
            self._search.note(f"a block of the inode tree of group {group} is damaged")
            return
        if level == 0:
            for at in range(header, min(header + 16 * count, len(raw) - 15), 16):
                first, holes, _, free = struct.unpack_from(">IHHQ", raw, at)
                sparse = holes if found.version == 5 else 0
                self._chunk(group, first, free, sparse)
            return
        most = (found.block - header) // 8
        for (child,) in struct.iter_unpack(">I", raw[header + 4 * most : header + 4 * most + 4 * min(count, most)]):
            self._inode_tree(group, child, level, seen)

    def _chunk(self, group: int, first: int, free: int, holes: int) -> None:
        """64 inodes that lie together; those that are free, or in a hole, are none."""
        found = self._super
        start = (group * found.group_blocks + (first >> found.inodes_shift)) * found.block
        start += (first & ((1 << found.inodes_shift) - 1)) * found.inode
        for index in range(_IN_CHUNK):
            if holes >> index // 4 & 1 or free >> index & 1:
                continue
            number = group << found.group_shift + found.inodes_shift | first + index
            place = start + index * found.inode
            self._search.file_has(number, place, found.inode, "inode")
            raw = self._search.read(place, found.inode, f"inode {number}")
            if raw is None:
                continue
            if not raw.startswith(_INODE_MAGIC):
                self._search.note(f"inode {number} is damaged")
                continue
            is_directory = struct.unpack_from(">H", raw, 2)[0] & 0xF000 == _DIRECTORY
            if is_directory:
                self._directories[number] = raw
            data = "directory" if is_directory else "data"
            for run in self._runs(number, raw):
                self._search.file_has(number, run.place, run.blocks * found.block, "map" if run.is_map else data)
            if raw[82]:
                for run in self._runs(number, raw, of_attributes=True):
                    self._search.file_has(number, run.place, run.blocks * found.block, "map")

    def _fork(self, raw: bytes, *, of_attributes: bool) -> tuple[int, int, bytes]:
        """The format of a fork, its number of extents, its bytes."""
        core = 176 if raw[4] == 3 else 100
        middle = core + raw[82] * 8 if raw[82] else len(raw)
        many = raw[4] == 3 and struct.unpack_from(">Q", raw, 120)[0] & _MANY_EXTENTS
        if of_attributes:
            (count,) = struct.unpack_from(">I", raw, 76) if many else struct.unpack_from(">H", raw, 80)
            return raw[83], count, raw[middle:]
        (count,) = struct.unpack_from(">Q", raw, 24) if many else struct.unpack_from(">I", raw, 76)
        return raw[5], count, raw[core:middle]

    def _runs(self, number: int, raw: bytes, *, of_attributes: bool = False) -> Iterator[_Run]:
        kind, count, fork = self._fork(raw, of_attributes=of_attributes)
        if kind == _EXTENTS:
            yield from self._extents(number, fork[: 16 * min(count, len(fork) // 16)])
        elif kind == _TREE:
            level, entries = struct.unpack_from(">HH", fork)
            most = (len(fork) - 4) // 16
            pointers = fork[4 + 8 * most : 4 + 8 * most + 8 * min(entries, most)]
            for (block,) in struct.iter_unpack(">Q", pointers):
                yield from self._map_tree(number, block, min(level, _MAX_LEVELS), set())

    def _map_tree(self, number: int, block: int, levels: int, seen: set[int]) -> Iterator[_Run]:
        place = self._place(block)
        if place is None or block in seen or levels <= 0:
            self._search.note(f"the map of inode {number} is damaged")
            return
        seen.add(block)
        yield _Run(0, place, 1, is_map=True)
        raw = self._search.read(place, self._super.block, f"a block of the map of inode {number}")
        if raw is None:
            return
        header = _MAP_TREES.get(raw[:4])
        level, count = struct.unpack_from(">HH", raw, 4)
        if header is None or level != levels - 1:
            self._search.note(f"the map of inode {number} is damaged")
            return
        most = (len(raw) - header) // 16
        if level == 0:
            yield from self._extents(number, raw[header : header + 16 * min(count, most)])
            return
        for (child,) in struct.iter_unpack(">Q", raw[header + 8 * most : header + 8 * most + 8 * min(count, most)]):
            yield from self._map_tree(number, child, level, seen)

    def _extents(self, number: int, records: bytes) -> Iterator[_Run]:
        for high, low in struct.iter_unpack(">QQ", records):
            packed = high << 64 | low
            logical, block, count = packed >> 73 & (1 << 54) - 1, packed >> 21 & (1 << 52) - 1, packed & (1 << 21) - 1
            place = self._place(block)
            if place is None or not count:
                self._search.note(f"inode {number} names a block that there is not")
                continue
            yield _Run(logical, place, count)

    def _place(self, block: int) -> int | None:
        """The byte of the partition at which a block lies, whose number has that of its group on top."""
        found = self._super
        group, inside = block >> found.group_shift, block & (1 << found.group_shift) - 1
        if group >= found.groups or inside >= found.group_blocks:
            return None
        return (group * found.group_blocks + inside) * found.block

    # Names

    def _walk(self) -> None:
        """Go through all directories, from the root on."""
        root = self._super.root
        waiting = [(root, "")]
        seen = {root}
        self._search.named(root, "/")
        while waiting and len(seen) < MOST_DIRECTORIES:
            number, path = waiting.pop()
            raw = self._directories.get(number)
            if raw is None:
                self._search.note(f"the directory {path or '/'} (inode {number}) cannot be read")
                continue
            for child, name in self._entries(number, raw):
                below = f"{path}/{text_of(name)}"
                self._search.named(child, below)
                if child in self._directories and child not in seen:
                    seen.add(child)
                    waiting.append((child, below))

    def _entries(self, number: int, raw: bytes) -> Iterator[tuple[int, bytes]]:
        kind, _, fork = self._fork(raw, of_attributes=False)
        if kind == _LOCAL:
            yield from self._short_entries(fork)
            return
        size = self._super.directory_block
        step = size // self._super.block
        for run in self._runs(number, raw):
            if run.is_map or run.logical * self._super.block >= _INDEX_AT:
                continue
            for at in range(0, run.blocks - step + 1, step):
                place = run.place + at * self._super.block
                block = self._search.read(place, size, f"a block of the directory of inode {number}")
                if block is not None:
                    yield from self._block_entries(number, block)

    def _short_entries(self, fork: bytes) -> Iterator[tuple[int, bytes]]:
        """Those of a directory that lies in its inode."""
        if len(fork) < 6:
            return
        width = 8 if fork[1] else 4
        at = 2 + width
        for _ in range(fork[1] or fork[0]):
            if at + 3 > len(fork):
                return
            end = at + 3 + fork[at]
            behind = end + self._super.file_types
            yield int.from_bytes(fork[behind : behind + width], "big"), fork[at + 3 : end]
            at = behind + width

    def _block_entries(self, number: int, block: bytes) -> Iterator[tuple[int, bytes]]:
        header = _DATA_BLOCKS.get(block[:4])
        if header is None:
            self._search.note(f"a block of the directory of inode {number} is damaged")
            return
        end = len(block)
        if block[:4] in _SINGLE:
            (count,) = struct.unpack_from(">I", block, end - 8)
            end -= 8 + 8 * count
        at = header
        while at + 12 <= end:
            tag, length = struct.unpack_from(">HH", block, at)
            if tag == _UNUSED_TAG:
                if length < 8:
                    return
                at += length
                continue
            (child,) = struct.unpack_from(">Q", block, at)
            name = block[at + 9 : at + 9 + block[at + 8]]
            if name not in {b".", b".."}:
                yield child, name
            at += -(-(9 + len(name) + self._super.file_types + 2) // 8) * 8
