"""The files of ext2, ext3 and ext4 that lie in ranges: inodes by extent trees or block maps, names by directories.

The kernel's Documentation/filesystems/ext4 describes every field ("inodes.rst", "ifork.rst", "directory.rst").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tapfs.errors import ImageError
from tapfs.partitions.free_space.ext_layout import Superblock, parse_group, parse_superblock
from tapfs.partitions.owners.search import MOST_DIRECTORIES, Search, text_of

_SUPERBLOCK_AT, _SUPERBLOCK_BYTES = 1024, 1024
_ROOT = 2
#: Inodes that no directory names.
_SPECIAL = {1: "<bad blocks>", 3: "<user quota>", 4: "<group quota>", 7: "<resize inode>", 8: "<journal>"}

_EXTENTS, _INLINE = 0x80000, 0x10000000
_DIRECTORY, _FILE, _LINK = 0x4000, 0x8000, 0xA000
_EXTENT_MAGIC, _MAX_DEPTH, _UNWRITTEN = 0xF30A, 5, 32768
_FAST_LINK_BYTES = 60
_INODES_UNWRITTEN = 0x1
_DIRECT = 12
_PIECE = 1 << 20


class _Inode(NamedTuple):
    number: int
    mode: int
    flags: int
    size: int
    attributes: int
    places: bytes

    @property
    def kind(self) -> int:
        return self.mode & 0xF000

    @property
    def has_blocks(self) -> bool:
        if self.flags & _INLINE or self.kind not in {_DIRECTORY, _FILE, _LINK}:
            return False
        return bool(self.flags & _EXTENTS) or self.kind != _LINK or self.size >= _FAST_LINK_BYTES


class _Run(NamedTuple):
    """Blocks of a file: the first of the file, the first of the partition, how many; `map`: of its map."""

    logical: int
    block: int
    blocks: int
    is_map: bool = False


def ext_owners(search: Search) -> None:
    """Say to the search which files and metadata lie in its ranges."""
    superblock = _superblock(search)
    if superblock is not None:
        _Ext(search, superblock).run()


def _superblock(search: Search) -> Superblock | None:
    """The superblock, or the first copy of it that makes sense."""
    places = [_SUPERBLOCK_AT, *((8 * size + (size == 1024)) * size for size in (1024, 2048, 4096, 65536))]
    for place in places:
        raw = search.read(place, _SUPERBLOCK_BYTES, "the superblock") if place < search.disk.size else None
        if raw is None:
            continue
        try:
            found = parse_superblock(raw, search.disk.size)
        except ImageError as error:
            if place == _SUPERBLOCK_AT:
                search.note(f"the superblock makes no sense: {error.message}")
            continue
        if place != _SUPERBLOCK_AT:
            search.note(f"the copy of the superblock at byte {place} was taken")
        return found
    search.note("no superblock could be read")
    return None


class _Ext:
    def __init__(self, search: Search, superblock: Superblock) -> None:
        self._search = search
        self._super = superblock
        self._block = superblock.block_size
        #: Where the table of inodes of each group is, None where nobody knows.
        self._tables: list[int | None] = []
        self._directories: dict[int, _Inode] = {}

    def run(self) -> None:
        for group in range(self._super.groups):
            self._look_at_group(group)
        for number, name in _SPECIAL.items():
            self._search.named(number, name)
        if self._search.unnamed:
            self._walk()

    # Inodes

    def _look_at_group(self, number: int) -> None:
        found, block = self._super, self._block
        first = found.first_of(number)
        start = found.blocks_at_start(number)
        if start:
            self._search.metadata_has(f"<superblock and descriptors of group {number}>", first * block, start * block)
        index = number % found.descriptors_in_block
        place = found.table_block(number // found.descriptors_in_block) * block + index * found.descriptor_size
        raw = self._search.read(place, found.descriptor_size, f"the descriptor of group {number}")
        self._tables.append(None)
        if raw is None:
            return
        group = parse_group(found, raw)
        if max(group.inode_table, group.bitmap, group.inode_bitmap) >= found.blocks:
            self._search.note(f"the descriptor of group {number} names a block behind the end")
            return
        self._tables[number] = group.inode_table
        self._search.metadata_has(f"<block bitmap of group {number}>", group.bitmap * block, block)
        self._search.metadata_has(f"<inode bitmap of group {number}>", group.inode_bitmap * block, block)
        flags, unused = struct.unpack_from("<H8xH", raw, 18)
        if found.descriptor_size >= 64:
            unused |= int.from_bytes(raw[50:52], "little") << 16
        count = found.inodes_in_group
        if found.has_group_sums:
            count = 0 if flags & _INODES_UNWRITTEN else max(count - unused, 0)
        self._look_at_table(number, group.inode_table * block, count)

    def _look_at_table(self, group: int, start: int, count: int) -> None:
        size = self._super.inode_size
        whole = self._super.inodes_in_group * size
        self._search.metadata_has(f"<inode table of group {group}>", start, whole)
        per_piece = _PIECE // size
        first = group * self._super.inodes_in_group + 1
        for at in range(0, count, per_piece):
            here = min(per_piece, count - at)
            place = start + at * size
            for hit in self._search.hits(place, here * size):
                for index in range((hit.offset - start) // size, -(-(hit.end - start) // size)):
                    self._search.file_has(first + index, start + index * size, size, "inode")
            for index, raw in self._pieces(place, here, group):
                if any(raw[:2]):
                    self._look_at_inode(_inode(first + at + index, raw))

    def _pieces(self, place: int, count: int, group: int) -> Iterator[tuple[int, bytes]]:
        """The inodes of a part of a table; where that cannot be read as a whole, block by block."""
        size = self._super.inode_size
        what = f"the inode table of group {group}"
        before = len(self._search.notes)
        raw = self._search.read(place, count * size, what)
        if raw is not None:
            yield from ((index, raw[index * size : (index + 1) * size]) for index in range(count))
            return
        del self._search.notes[before:]
        per_block = max(self._block // size, 1)
        for at in range(0, count, per_block):
            here = min(per_block, count - at)
            piece = self._search.read(place + at * size, here * size, f"a block of {what}")
            if piece is not None:
                yield from ((at + index, piece[index * size : (index + 1) * size]) for index in range(here))

    def _look_at_inode(self, inode: _Inode) -> None:
        if inode.kind == _DIRECTORY:
            self._directories[inode.number] = inode
        if inode.attributes:
            self._search.file_has(inode.number, inode.attributes * self._block, self._block, "map")
        if inode.has_blocks:
            data = "directory" if inode.kind == _DIRECTORY else "data"
            for run in self._runs(inode):
                part = "map" if run.is_map else data
                self._search.file_has(inode.number, run.block * self._block, run.blocks * self._block, part)

    # The blocks of a file

    def _runs(self, inode: _Inode) -> Iterator[_Run]:
        if inode.flags & _EXTENTS:
            yield from self._extents(inode, inode.places, _MAX_DEPTH, set())
            return
        places = struct.unpack("<15I", inode.places)
        yield from (
            _Run(index, place, 1) for index, place in enumerate(places[:_DIRECT]) if self._possible(inode, place)
        )
        logical = _DIRECT
        for level, place in enumerate(places[_DIRECT:], 1):
            if self._possible(inode, place):
                yield from self._indirect(inode, place, level, logical)
            logical += (self._block // 4) ** level

    def _extents(self, inode: _Inode, node: bytes, depth: int, seen: set[int]) -> Iterator[_Run]:
        magic, entries, _, own_depth = struct.unpack_from("<4H", node)
        if magic != _EXTENT_MAGIC or own_depth > depth or 12 * (entries + 1) > len(node):
            self._search.note(f"the extent tree of inode {inode.number} is damaged")
            return
        for at in range(12, 12 * (entries + 1), 12):
            if own_depth == 0:
                logical, length, high, low = struct.unpack_from("<IHHI", node, at)
                count = length - _UNWRITTEN if length > _UNWRITTEN else length
                block = low | high << 32
                if count and self._possible(inode, block) and self._possible(inode, block + count - 1):
                    yield _Run(logical, block, count)
                continue
            logical, low, high = struct.unpack_from("<IIH", node, at)
            block = low | high << 32
            if not self._possible(inode, block) or block in seen:
                continue
            seen.add(block)
            yield _Run(logical, block, 1, is_map=True)
            below = self._search.read(block * self._block, self._block, f"a block of the map of inode {inode.number}")
            if below is not None:
                yield from self._extents(inode, below, own_depth - 1, seen)

    def _indirect(self, inode: _Inode, block: int, level: int, logical: int) -> Iterator[_Run]:
        yield _Run(logical, block, 1, is_map=True)
        raw = self._search.read(block * self._block, self._block, f"a block of the map of inode {inode.number}")
        if raw is None:
            return
        span = (self._block // 4) ** (level - 1)
        for index, (place,) in enumerate(struct.iter_unpack("<I", raw)):
            if self._possible(inode, place):
                at = logical + index * span
                if level == 1:
                    yield _Run(at, place, 1)
                else:
                    yield from self._indirect(inode, place, level - 1, at)

    def _possible(self, inode: _Inode, block: int) -> bool:
        if block == 0:
            return False
        if block >= self._super.blocks:
            self._search.note(f"inode {inode.number} names a block behind the end")
            return False
        return True

    # Names

    def _walk(self) -> None:
        """Go through all directories, from the root on, until every file that was hit has a name."""
        waiting = [(_ROOT, "")]
        seen = {_ROOT}
        self._search.named(_ROOT, "/")
        while waiting and len(seen) < MOST_DIRECTORIES:
            number, path = waiting.pop()
            inode = self._directories.get(number)
            if inode is None:
                self._search.note(f"the directory {path or '/'} (inode {number}) cannot be read")
                continue
            for child, name in self._entries(inode):
                below = f"{path}/{text_of(name)}"
                self._search.named(child, below)
                if child in self._directories and child not in seen:
                    seen.add(child)
                    waiting.append((child, below))

    def _entries(self, inode: _Inode) -> Iterator[tuple[int, bytes]]:
        if inode.flags & _INLINE:
            yield from _entries_in(inode.places[4:])
            self._search.note(f"of the directory in inode {inode.number} itself, only its first 56 bytes were read")
            return
        for run in self._runs(inode):
            for index in range(0 if run.is_map else run.blocks):
                place = (run.block + index) * self._block
                raw = self._search.read(place, self._block, f"a block of the directory of inode {inode.number}")
                if raw is not None:
                    yield from _entries_in(raw)


def _inode(number: int, raw: bytes) -> _Inode:
    mode = int.from_bytes(raw[:2], "little")
    links = int.from_bytes(raw[26:28], "little")
    size, flags, acl = (int.from_bytes(raw[at : at + 4], "little") for at in (4, 32, 104))
    acl |= int.from_bytes(raw[118:120], "little") << 32
    if not links and number not in _SPECIAL:  # it was deleted
        mode = acl = 0
    return _Inode(number, mode, flags, size, acl, raw[40:100])


def _entries_in(block: bytes) -> Iterator[tuple[int, bytes]]:
    """The entries of a block of a directory, but for itself and the one above; blocks of its index have none."""
    at = 0
    while at + 8 <= len(block):
        inode, length, name_bytes = struct.unpack_from("<IHB", block, at)
        length = len(block) if length in {0, 0xFFFF} and len(block) >= 1 << 16 else length
        if length < 8 or at + length > len(block):
            return
        name = block[at + 8 : at + 8 + name_bytes]
        if inode and name not in {b"", b".", b".."} and 8 + name_bytes <= length:
            yield inode, name
        at += length
