"""The free blocks of XFS ("XFS Algorithms & Data Structures", "AG Free Space Management").

Each allocation group has its free extents in two B+trees, one in the order of places and one in that of sizes. They
count only if both have the same records, if these amount to what the header of the group says, and if every block of
them is where its own fields, its neighbours and, in version 5, its checksum say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tapfs.checksums import crc32c
from tapfs.extent import Range
from tapfs.partitions.free_space.bit_runs import joined
from tapfs.partitions.free_space.refusal import damaged, require_bytes, unknown
from tapfs.partitions.reader import Reader
from tapfs.partitions.xfs_log import xfs_log_is_dirty

_SUPERBLOCK_BYTES, _SUPERBLOCK_SUM_AT = 512, 224
_MAX_GROUPS = 1 << 20

#: Features of version 5: file types, sparse inodes, metadata UUID, big times, many extents, exchanged ranges, parents.
_KNOWN_INCOMPATIBLE, _META_UUID, _NEEDS_REPAIR = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80, 0x4, 0x10
#: Free inodes, reverse maps, shared blocks, counts of inode trees.
_KNOWN_READ_ONLY = 0xF

_GROUP_MAGIC, _GROUP_SUM_AT = b"XAGF", 216
_GROUP = struct.Struct(">4x5I4xII4x3x1B4x4x4xI")
_NULL_BLOCK = 0xFFFFFFFF
_MAX_LEVELS = 16
#: Blocks of a group that are never free: the superblock, the headers of free space and inodes, the free list.
_HEADER_SECTORS = 4


class _Superblock(NamedTuple):
    block_size: int
    sector_size: int
    blocks: int
    group_blocks: int
    groups: int
    has_sums: bool
    uuid: bytes
    log: Range

    def blocks_of(self, group: int) -> int:
        return min(self.group_blocks, self.blocks - group * self.group_blocks)


class _Tree(NamedTuple):
    """One of the two trees of a group: its magic number, and whether its records ascend by place."""

    name: str
    magic: bytes
    root: int
    levels: int
    by_place: bool


def xfs_free_ranges(disk: Reader) -> Iterator[Range]:
    """The free ranges, ascending, in bytes of the partition. Raises ImageError where a record cannot be trusted."""
    superblock = _read_superblock(disk)
    if xfs_log_is_dirty(disk):
        raise unknown("it was not unmounted cleanly: its log is to be replayed first (mount it)")
    return joined(each for group in range(superblock.groups) for each in _group_ranges(disk, superblock, group))


def _read_superblock(disk: Reader) -> _Superblock:
    raw = require_bytes(disk.read(0, _SUPERBLOCK_BYTES), _SUPERBLOCK_BYTES, "the superblock")
    if not raw.startswith(b"XFSB"):
        raise damaged("it has no superblock of XFS")
    block_size, blocks = struct.unpack_from(">IQ", raw, 4)
    (log_start,) = struct.unpack_from(">Q", raw, 48)
    group_blocks, groups, _, log_blocks = struct.unpack_from(">IIII", raw, 84)
    version, sector_size = struct.unpack_from(">HH", raw, 100)
    group_shift = raw[124]
    version &= 0xF
    if version not in {4, 5}:
        raise unknown(f"it is XFS of version {version}")
    uuid = raw[32:48]
    if version == 5:
        uuid = _require_known(disk, raw, sector_size) or uuid
    if raw[126]:
        raise damaged("mkfs has not finished it")
    if (
        block_size not in {1 << shift for shift in range(9, 17)}
        or sector_size not in {1 << shift for shift in range(9, 16)}
        or sector_size > block_size
        or not 0 < group_blocks < 1 << 31
        or not 0 < groups <= _MAX_GROUPS
        or not (groups - 1) * group_blocks < blocks <= groups * group_blocks
        or group_shift > 31
        or not group_blocks <= 1 << group_shift
    ):
        raise damaged("the superblock has impossible sizes")
    if blocks * block_size > disk.size:
        raise damaged(f"it claims {blocks * block_size} bytes of the {disk.size} of its partition")
    if log_start == 0:
        raise unknown("its log is on another device, so nothing says that it was unmounted cleanly")
    log = (log_start >> group_shift) * group_blocks + (log_start & ((1 << group_shift) - 1))
    if log + log_blocks > blocks:
        raise damaged("its log lies behind its end")
    return _Superblock(
        block_size, sector_size, blocks, group_blocks, groups, version == 5, uuid, Range(log, log_blocks)
    )


def _require_known(disk: Reader, raw: bytes, sector_size: int) -> bytes | None:
    """Refuse a superblock of version 5 that is damaged or not understood; the UUID in metadata if it is another."""
    _, read_only, incompatible, log_incompatible = struct.unpack_from(">IIII", raw, 208)
    sector = disk.read(0, sector_size)
    if _sum_fault(sector, _SUPERBLOCK_SUM_AT):
        raise damaged("the checksum of the superblock is wrong")
    if incompatible & _NEEDS_REPAIR:
        raise unknown("it says that it needs xfs_repair")
    strange = incompatible & ~_KNOWN_INCOMPATIBLE
    strange_too = read_only & ~_KNOWN_READ_ONLY
    if strange or strange_too or log_incompatible:
        raise unknown(
            f"it has features that tapfs does not know (incompatible {strange:#x}, read-only {strange_too:#x},"
            f" log {log_incompatible:#x})"
        )
    return raw[248:264] if incompatible & _META_UUID else None


def _group_ranges(disk: Reader, superblock: _Superblock, group: int) -> Iterator[Range]:
    base = group * superblock.group_blocks
    size = superblock.sector_size
    where = f"allocation group {group}"
    raw = require_bytes(disk.read_once(base * superblock.block_size + size, size), size, f"the header of {where}")
    version, number, length, by_place, by_size = struct.unpack_from(">5I", raw, 4)
    place_levels, size_levels = struct.unpack_from(">II", raw, 28)
    (free,) = struct.unpack_from(">I", raw, 52)
    if raw[:4] != _GROUP_MAGIC or version != 1 or number != group or length != superblock.blocks_of(group):
        raise damaged(f"the header of {where} is not its own")
    if superblock.has_sums and (_sum_fault(raw, _GROUP_SUM_AT) or raw[64:80] != superblock.uuid):
        raise damaged(f"the checksum of the header of {where} is wrong")
    sums = superblock.has_sums
    places = _Tree("tree of places", b"AB3B" if sums else b"ABTB", by_place, place_levels, by_place=True)
    sizes = _Tree("tree of sizes", b"AB3C" if sums else b"ABTC", by_size, size_levels, by_place=False)
    if _fingerprint(disk, superblock, group, sizes) != _fingerprint(disk, superblock, group, places):
        raise damaged(f"the two trees of free extents of {where} differ")
    total = 0
    for start, count in _records(disk, superblock, group, places):
        total += count
        yield Range((base + start) * superblock.block_size, count * superblock.block_size)
    if total != free:
        raise damaged(f"{where} has {total} free blocks in its trees and {free} in its header")


def _fingerprint(disk: Reader, superblock: _Superblock, group: int, tree: _Tree) -> tuple[int, int]:
    """A number of records, and a number that other records would hardly have, in whatever order they come."""
    count = mixed = 0
    for record in _records(disk, superblock, group, tree):
        count += 1
        mixed += hash(record)
    return count, mixed


def _records(disk: Reader, superblock: _Superblock, group: int, tree: _Tree) -> Iterator[tuple[int, int]]:
    """The free extents of a group as start and length, each proved to lie where blocks can be free."""
    log = superblock.log
    headers = -(-_HEADER_SECTORS * superblock.sector_size // superblock.block_size)
    base, blocks = group * superblock.group_blocks, superblock.blocks_of(group)
    last: tuple[int, ...] = (-1, -1)
    for start, count in _Walk(disk, superblock, group, tree).records():
        order = (start, 0) if tree.by_place else (count, start)
        inside = headers <= start < start + count <= blocks
        in_log = base + start < log.end and log.offset < base + start + count
        if not count or not inside or in_log or order <= last:
            raise damaged(f"the {tree.name} of allocation group {group} has the impossible record {start}+{count}")
        # What comes next lies behind this one, or is as long and lies behind it, or is longer.
        last = (start + count, -1) if tree.by_place else order
        yield start, count


class _Walk:
    """The way through a tree from its root to each leaf in turn."""

    def __init__(self, disk: Reader, superblock: _Superblock, group: int, tree: _Tree) -> None:
        self._disk = disk
        self._superblock = superblock
        self._group = group
        self._tree = tree
        self._header = 56 if superblock.has_sums else 16
        self._left = superblock.blocks_of(group)  # a tree has no more blocks than its group
        self._neighbours: dict[int, tuple[int, int]] = {}

    def records(self) -> Iterator[tuple[int, int]]:
        if not 0 < self._tree.levels <= _MAX_LEVELS:
            raise self._fault("has an impossible height")
        yield from self._below(self._tree.root, self._tree.levels - 1)
        if any(right != _NULL_BLOCK for _, right in self._neighbours.values()):
            raise self._fault("goes on where it should end")

    def _below(self, block: int, level: int) -> Iterator[tuple[int, int]]:
        raw, count = self._read(block, level)
        at = self._header
        if level == 0:
            yield from struct.iter_unpack(">II", raw[at : at + 8 * count])
            return
        most = (len(raw) - at) // 12  # a key of two numbers and a pointer each
        for (child,) in struct.iter_unpack(">I", raw[at + 8 * most : at + 8 * most + 4 * count]):
            yield from self._below(child, level - 1)

    def _read(self, block: int, level: int) -> tuple[bytes, int]:
        superblock = self._superblock
        if not 0 < block < superblock.blocks_of(self._group) or not self._left:
            raise self._fault("names an impossible block")
        self._left -= 1
        place = (self._group * superblock.group_blocks + block) * superblock.block_size
        raw = require_bytes(self._disk.read_once(place, superblock.block_size), superblock.block_size, "a tree")
        own_level, count, left, right = struct.unpack_from(">HHII", raw, 4)
        most = (len(raw) - self._header) // (12 if level else 8)
        if raw[:4] != self._tree.magic or own_level != level or count > most or (level and not count):
            raise self._fault(f"has the wrong block {block}")
        before = self._neighbours.get(level, (_NULL_BLOCK, block))
        if before != (left, block):
            raise self._fault(f"has the block {block} beside the wrong one")
        self._neighbours[level] = (block, right)
        if superblock.has_sums:
            own, uuid, owner = struct.unpack_from(">Q8x16sI", raw, 16)
            # A place on the disk counts sectors of 512 bytes.
            if own * 512 != place or uuid != superblock.uuid or owner != self._group or _sum_fault(raw, 52):
                raise self._fault(f"has the block {block} with a wrong checksum")
        return raw, count

    def _fault(self, what: str) -> Exception:
        return damaged(f"the {self._tree.name} of allocation group {self._group} {what}")


def _sum_fault(raw: bytes, at: int) -> bool:
    return crc32c(raw[:at] + bytes(4) + raw[at + 4 :]) != int.from_bytes(raw[at : at + 4], "little")
