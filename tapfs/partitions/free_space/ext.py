"""The free blocks of ext2, ext3 and ext4.

A block bitmap counts only if everything that is said of it agrees: its checksum and that of its descriptor where the
file system has these, the count of free clusters in the descriptor, and the bits of the blocks that hold metadata. A
bitmap that was never written (BLOCK_UNINIT) is made of the places of the metadata, as the kernel makes it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator

from tapfs.extent import Range
from tapfs.partitions.free_space.bit_runs import BitRuns, joined
from tapfs.partitions.free_space.ext_layout import Group, Superblock, read_groups, read_superblock
from tapfs.partitions.free_space.refusal import damaged, require_bytes
from tapfs.partitions.reader import Reader


def ext_free_ranges(disk: Reader) -> Iterator[Range]:
    """The free ranges, ascending, in bytes of the partition. Raises ImageError where a record cannot be trusted."""
    superblock = read_superblock(disk)
    return joined(_ranges(disk, superblock, _Metadata(disk, superblock)))


class _Metadata:
    """The places of bitmaps and inode tables of all groups: with flexible groups they lie in others."""

    def __init__(self, disk: Reader, superblock: Superblock) -> None:
        table_blocks = -(-superblock.inodes_in_group * superblock.inode_size // superblock.block_size)
        # A block and, in the lowest bit, whether it begins an inode table.
        marked = array("Q")
        for group in read_groups(disk, superblock):
            places = (group.bitmap << 1, group.inode_bitmap << 1, group.inode_table << 1 | 1)
            if max(places) >> 1 >= superblock.blocks:
                raise damaged("a descriptor names a block behind the end of the file system")
            marked.extend(places)
        self._marked = array("Q", sorted(marked))
        self._table_blocks = table_blocks

    def within(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts ``(start, stop)`` of it that lie in a range of blocks."""
        for at in range(bisect_left(self._marked, (first - self._table_blocks) << 1), len(self._marked)):
            place, is_table = self._marked[at] >> 1, self._marked[at] & 1
            if place >= stop:
                return
            start, end = max(place, first), min(place + (self._table_blocks if is_table else 1), stop)
            if start < end:
                yield start, end


def _ranges(disk: Reader, superblock: Superblock, metadata: _Metadata) -> Iterator[Range]:
    unit = superblock.cluster_blocks * superblock.block_size
    for number, group in enumerate(read_groups(disk, superblock)):
        first = superblock.first_of(number)
        stop = min(first + superblock.blocks_in_group, superblock.blocks)
        clusters = -(-(stop - first) // superblock.cluster_blocks)
        used = [(first, min(first + superblock.blocks_at_start(number), stop)), *metadata.within(first, stop)]
        in_clusters = [
            ((start - first) // superblock.cluster_blocks, -(-(end - first) // superblock.cluster_blocks))
            for start, end in used
        ]
        if group.unwritten:
            bits = BitRuns(_bitmap_of(in_clusters, clusters), clusters)
        else:
            bits = BitRuns(_read_bitmap(disk, superblock, number, group), clusters)
            if any(bits.any_free(start, end) for start, end in in_clusters):
                raise damaged(f"the bitmap of group {number} calls metadata free")
        if bits.free != group.free:
            raise damaged(
                f"group {number} has {bits.free} free clusters in its bitmap and {group.free} in its descriptor"
            )
        base, end = first * superblock.block_size, stop * superblock.block_size
        for start, behind in bits.runs():
            offset = base + start * unit
            yield Range(offset, min(base + behind * unit, end) - offset)


def _read_bitmap(disk: Reader, superblock: Superblock, number: int, group: Group) -> bytes:
    size = superblock.block_size
    found = require_bytes(disk.read_once(group.bitmap * size, size), size, f"the bitmap of group {number}")
    if superblock.has_bitmap_sums:
        summed = superblock.sum_of(found[: superblock.blocks_in_group // superblock.cluster_blocks // 8])
        if superblock.descriptor_size == 32:
            summed &= 0xFFFF
        if summed != group.bitmap_sum:
            raise damaged(f"the checksum of the bitmap of group {number} is wrong")
    return found


def _bitmap_of(used: list[tuple[int, int]], count: int) -> bytes:
    bits = 0
    for start, end in used:
        bits |= (1 << end) - (1 << start)
    return bits.to_bytes(-(-count // 8), "little")
