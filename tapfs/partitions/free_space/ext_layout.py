"""The superblock and the group descriptors of ext2, ext3 and ext4, with the sums that prove them.

The kernel's Documentation/filesystems/ext4 describes every field ("super.rst", "group_descr.rst", "blockgroup.rst").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tapfs.checksums import crc32c
from tapfs.partitions.free_space.refusal import damaged, require_bytes, unknown
from tapfs.partitions.reader import Reader

_SUPERBLOCK_AT, _SUPERBLOCK_BYTES = 1024, 1024
_MAGIC = 0xEF53
_CLEAN, _HAS_ERRORS = 0x1, 0x2
_HAS_JOURNAL, _LAZY_GROUPS, SPARSE_SUPER2 = 0x4, 0x40, 0x200

_RECOVER, META_BG, _WIDE, _MMP, _SUM_SEED = 0x4, 0x10, 0x80, 0x100, 0x2000
#: File types, meta groups, extents, 64 bits, MMP, flexible groups, values in inodes, seed, large directories, data in
#: inodes, encryption, folded case: none of them changes what a block bitmap means.
_KNOWN_INCOMPATIBLE = (
    0x2 | META_BG | 0x40 | _WIDE | _MMP | 0x200 | 0x400 | _SUM_SEED | 0x4000 | 0x8000 | 0x10000 | 0x20000
)
SPARSE_SUPER, _GROUP_SUMS, BIGALLOC, _METADATA_SUMS = 0x1, 0x10, 0x200, 0x400
#: These, and large files, trees, huge files, many links, large inodes, quota, read-only, projects, verity.
_KNOWN_READ_ONLY = (
    SPARSE_SUPER
    | _GROUP_SUMS
    | BIGALLOC
    | _METADATA_SUMS
    | 0x2
    | 0x4
    | 0x8
    | 0x20
    | 0x40
    | 0x100
    | 0x1000
    | 0x2000
    | 0x8000
)
_ORPHANS = 0x10000

_CRC32C = 1
_MMP_MAGIC, _MMP_CLEAN = 0x004D4D50, 0xFF4D4D50
_SUM_AT = 0x3FC

#: Groups of one file system that are looked at: 128 TiB of groups of the usual size.
_MAX_GROUPS = 1 << 20
_DESCRIPTOR_SUM_AT = 30
_BITMAP_UNINITIALISED = 0x2


class Superblock(NamedTuple):
    """The constants of a file system that was unmounted cleanly; blocks are counted from the start of the partition."""

    block_size: int
    blocks: int
    first_block: int
    blocks_in_group: int
    cluster_blocks: int
    inodes_in_group: int
    inode_size: int
    descriptor_size: int
    reserved_descriptor_blocks: int
    first_meta_group: int
    compatible: int
    incompatible: int
    read_only: int
    backup_groups: tuple[int, int]
    uuid: bytes
    sum_prefix: bytes

    @property
    def groups(self) -> int:
        """The number of block groups."""
        return -(-(self.blocks - self.first_block) // self.blocks_in_group)

    @property
    def descriptors_in_block(self) -> int:
        """Group descriptors that one block holds, which is the number of groups in a meta group."""
        return self.block_size // self.descriptor_size

    @property
    def has_group_sums(self) -> bool:
        """Whether descriptors have checksums, and so flags that count."""
        return bool(self.read_only & (_GROUP_SUMS | _METADATA_SUMS))

    @property
    def has_bitmap_sums(self) -> bool:
        """Whether bitmaps have checksums."""
        return bool(self.read_only & _METADATA_SUMS)

    def sum_of(self, data: bytes) -> int:
        """The checksum of metadata: a CRC-32C that starts from the file system's seed and is not inverted."""
        return crc32c(self.sum_prefix + data) ^ 0xFFFFFFFF

    def first_of(self, group: int) -> int:
        """The first block of a group."""
        return self.first_block + group * self.blocks_in_group

    def has_backup(self, group: int) -> bool:
        """Whether a group begins with a superblock, its own or a copy."""
        if group == 0:
            return True
        if self.compatible & SPARSE_SUPER2:
            return group in self.backup_groups
        if not self.read_only & SPARSE_SUPER or group == 1:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def blocks_at_start(self, group: int) -> int:
        """Blocks at the start of a group for the superblock, the descriptors, and more descriptors later."""
        backup = self.has_backup(group)
        small = backup and group == 0 and self.block_size == _SUPERBLOCK_AT and self.first_block == 0
        own = backup + small  # with blocks of 1024 bytes that are counted from 0 the superblock is the second one
        table_blocks = -(-self.groups // self.descriptors_in_block)
        if not self.incompatible & META_BG:
            return own + (table_blocks + self.reserved_descriptor_blocks if backup else 0)
        meta_group, place = divmod(group, self.descriptors_in_block)
        if meta_group < self.first_meta_group:
            return own + (self.first_meta_group + self.reserved_descriptor_blocks if backup else 0)
        return own + (place in {0, 1, self.descriptors_in_block - 1})

    def table_block(self, number: int) -> int:
        """The place of a block of the table of descriptors."""
        if self.incompatible & META_BG and number >= self.first_meta_group:
            group = number * self.descriptors_in_block
            small = group == 0 and self.block_size == _SUPERBLOCK_AT and self.first_block == 0
            return self.first_of(group) + self.has_backup(group) + small
        return (2 if self.block_size == _SUPERBLOCK_AT else 1) + number


class Group(NamedTuple):
    """What a descriptor says; blocks as numbers, `free` in clusters. `bitmap_sum` is a checksum of 16 or 32 bits."""

    bitmap: int
    inode_bitmap: int
    inode_table: int
    free: int
    unwritten: bool
    bitmap_sum: int


def read_superblock(disk: Reader) -> Superblock:
    """The superblock of a file system that can be taken at its word. Raises ImageError, which names why not."""
    raw = require_bytes(disk.read(_SUPERBLOCK_AT, _SUPERBLOCK_BYTES), _SUPERBLOCK_BYTES, "the superblock")
    magic, state = struct.unpack_from("<HH", raw, 56)
    compatible, incompatible, read_only = struct.unpack_from("<III", raw, 92)
    if magic != _MAGIC:
        raise damaged("it has no superblock of ext")
    _require_clean(state, compatible, incompatible, read_only)
    if read_only & _METADATA_SUMS:
        _require_sum(raw)
    found = _parsed(raw, (compatible, incompatible, read_only))
    _require_possible(found, disk.size)
    if incompatible & _MMP:
        _require_nobody(disk, found, raw)
    return found


def parse_superblock(raw: bytes, size: int) -> Superblock:
    """The superblock of a file system that may be in use or damaged, in a partition of `size` bytes.

    Its checksum is not looked at. Raises ImageError where it cannot be one, or where its sizes make no sense.
    """
    if len(raw) < _SUPERBLOCK_BYTES or int.from_bytes(raw[56:58], "little") != _MAGIC:
        raise damaged("it has no superblock of ext")
    found = _parsed(raw, struct.unpack_from("<III", raw, 92))
    _require_possible(found, size)
    return found


def _parsed(raw: bytes, features: tuple[int, int, int]) -> Superblock:
    compatible, incompatible, read_only = features
    (blocks,) = struct.unpack_from("<I", raw, 4)
    first_block, block_shift, cluster_shift, in_group, _, inodes = struct.unpack_from("<6I", raw, 20)
    inode_size = int.from_bytes(raw[88:90], "little") if int.from_bytes(raw[76:80], "little") else 128
    wide = incompatible & _WIDE
    if block_shift > 6 or (read_only & BIGALLOC and not block_shift <= cluster_shift <= 30):
        raise damaged("the superblock has impossible sizes")
    uuid = raw[104:120]
    seed = int.from_bytes(raw[0x270:0x274], "little")
    return Superblock(
        block_size=1024 << block_shift,
        blocks=blocks | (int.from_bytes(raw[0x150:0x154], "little") << 32 if wide else 0),
        first_block=first_block,
        blocks_in_group=in_group,
        cluster_blocks=1 << (cluster_shift - block_shift) if read_only & BIGALLOC else 1,
        inodes_in_group=inodes,
        inode_size=inode_size,
        descriptor_size=int.from_bytes(raw[0xFE:0x100], "little") if wide else 32,
        reserved_descriptor_blocks=int.from_bytes(raw[0xCE:0xD0], "little"),
        first_meta_group=int.from_bytes(raw[0x104:0x108], "little"),
        compatible=compatible,
        incompatible=incompatible,
        read_only=read_only,
        backup_groups=struct.unpack_from("<II", raw, 0x24C),
        uuid=uuid,
        sum_prefix=_prefix_of(seed) if incompatible & _SUM_SEED else uuid,
    )


def _require_clean(state: int, compatible: int, incompatible: int, read_only: int) -> None:
    if incompatible & _RECOVER:
        raise unknown("it was not unmounted cleanly: its journal is to be replayed first (mount it, or run e2fsck)")
    if not state & _CLEAN:
        raise unknown("it was not unmounted cleanly: run e2fsck first")
    if state & _HAS_ERRORS:
        raise unknown("the kernel has met errors in it: run e2fsck first")
    if read_only & _ORPHANS:
        raise unknown("it was not unmounted cleanly: its orphan file is in use (mount it, or run e2fsck)")
    strange = incompatible & ~_KNOWN_INCOMPATIBLE
    strange_too = read_only & ~_KNOWN_READ_ONLY
    if strange or strange_too or compatible & _LAZY_GROUPS:
        raise unknown(
            f"it has features that tapfs does not know (incompatible {strange:#x}, read-only {strange_too:#x})"
        )


def _require_sum(raw: bytes) -> None:
    if raw[0x175] != _CRC32C:
        raise unknown(f"its checksums are of the unknown type {raw[0x175]}")
    if crc32c(raw[:_SUM_AT]) ^ 0xFFFFFFFF != int.from_bytes(raw[_SUM_AT:], "little"):
        raise damaged("the checksum of the superblock is wrong")


def _require_possible(found: Superblock, size: int) -> None:
    bits = 8 * found.block_size
    clusters, rest = divmod(found.blocks_in_group, found.cluster_blocks)
    sizes = (
        found.descriptor_size in {32, 64}
        if not found.incompatible & _WIDE
        else (
            64 <= found.descriptor_size <= found.block_size and found.descriptor_size & (found.descriptor_size - 1) == 0
        )
    )
    inode_bytes = found.inodes_in_group * found.inode_size
    if (
        not sizes
        or rest
        or not 8 <= clusters <= bits
        or clusters % 8
        or not 0 < inode_bytes <= found.blocks_in_group * found.block_size
        or found.first_block not in {0, 1}
        or found.first_block >= found.blocks
    ):
        raise damaged("the superblock has impossible sizes")
    if found.blocks * found.block_size > size:
        raise damaged(f"it claims {found.blocks * found.block_size} bytes of the {size} of its partition")
    if found.groups > _MAX_GROUPS:
        raise unknown(f"it has more than {_MAX_GROUPS} block groups")


def _require_nobody(disk: Reader, found: Superblock, raw: bytes) -> None:
    """Raise ImageError unless the block of multiple mount protection says that the file system is not in use."""
    place = int.from_bytes(raw[0x168:0x170], "little")
    block = require_bytes(disk.read(place * found.block_size, 1024), 1024, "the MMP block")
    magic, sequence = struct.unpack_from("<II", block)
    if magic != _MMP_MAGIC or sequence != _MMP_CLEAN:
        raise unknown("its MMP block says that another host may have it mounted, or fsck is at work")


def read_groups(disk: Reader, found: Superblock) -> Iterator[Group]:
    """The groups in order, each descriptor verified as far as it has a checksum."""
    size = found.descriptor_size
    for number in range(-(-found.groups // found.descriptors_in_block)):
        place = found.table_block(number) * found.block_size
        block = require_bytes(disk.read_once(place, found.block_size), found.block_size, "a table of descriptors")
        first = number * found.descriptors_in_block
        for index in range(min(found.descriptors_in_block, found.groups - first)):
            yield _group(found, first + index, block[index * size : (index + 1) * size])


def _group(found: Superblock, number: int, raw: bytes) -> Group:
    if found.has_group_sums and _descriptor_sum(found, number, raw) != int.from_bytes(raw[30:32], "little"):
        raise damaged(f"the checksum of the descriptor of group {number} is wrong")
    return parse_group(found, raw)


def parse_group(found: Superblock, raw: bytes) -> Group:
    """What a descriptor says, whether its checksum is right or not."""
    bitmap, inode_bitmap, inode_table, free, _, _, flags = struct.unpack_from("<IIIHHHH", raw)
    bitmap_sum = int.from_bytes(raw[24:26], "little")
    if len(raw) > 32:
        high = struct.unpack_from("<IIIH", raw, 32)
        bitmap, inode_bitmap, inode_table, free = (
            low | above << shift
            for low, above, shift in zip((bitmap, inode_bitmap, inode_table, free), high, (32, 32, 32, 16), strict=True)
        )
        bitmap_sum |= int.from_bytes(raw[56:58], "little") << 16
    unwritten = found.has_group_sums and bool(flags & _BITMAP_UNINITIALISED)
    return Group(bitmap, inode_bitmap, inode_table, free, unwritten, bitmap_sum)


def _descriptor_sum(found: Superblock, number: int, raw: bytes) -> int:
    head = number.to_bytes(4, "little") + raw[:_DESCRIPTOR_SUM_AT]
    if found.read_only & _METADATA_SUMS:
        return found.sum_of(head + b"\0\0" + raw[_DESCRIPTOR_SUM_AT + 2 :]) & 0xFFFF
    return _crc16(found.uuid + head + raw[_DESCRIPTOR_SUM_AT + 2 :])


def _crc16_table() -> tuple[int, ...]:
    entries: list[int] = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


_CRC16 = _crc16_table()


def _crc16(data: bytes) -> int:
    register = 0xFFFF
    for byte in data:
        register = register >> 8 ^ _CRC16[(register ^ byte) & 0xFF]
    return register


def _prefix_of(seed: int) -> bytes:
    """The 4 bytes that bring the register of a CRC-32C to the seed: 32 steps backwards."""
    for _ in range(32):
        seed = ((seed ^ 0x82F63B78) << 1 | 1) if seed & 1 << 31 else seed << 1
    return (seed ^ 0xFFFFFFFF).to_bytes(4, "little")


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1
