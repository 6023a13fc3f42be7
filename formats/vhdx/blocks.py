"""The entries of the block table (BAT): their states and their order (docs/specs/vhdx.md, "BAT").

After the entries of each chunk of blocks stands one for the chunk's sector bitmap.
"""

from __future__ import annotations

from enum import IntEnum

from tapfs.extent import Range
from tapfs.formats.vhdx.metadata import Metadata
from tapfs.formats.vhdx.units import MAX_FILE_BYTES, MIB
from tapfs.records import dataclass

ENTRY_BYTES = 8
#: The bits of an entry that give its state, and those that give its place: a multiple of 1 MiB.
STATE_MASK = 7
PLACE_MASK = (1 << 64) - MIB
#: Bits of an entry that are always zero.
RESERVED_MASK = (MIB - 1) & ~STATE_MASK

#: The bytes of a sector bitmap: one bit for each sector of a chunk, the lowest bit of a byte first.
BITMAP_BYTES = MIB
_CHUNK_SECTORS = 8 * BITMAP_BYTES


class State(IntEnum):
    """The states of a block. Of a sector bitmap only NOT_PRESENT and PRESENT are used."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    PRESENT = 6
    PARTIAL = 7


#: States of a block whose bytes are zeros, whatever a parent has.
ZEROS = frozenset({State.UNDEFINED, State.ZERO, State.UNMAPPED})
#: States of a block that may keep a place that it once had.
ANCHORED = frozenset({State.UNDEFINED, State.UNMAPPED})
_KNOWN = frozenset(State)


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The shape of a block table. `host_offset` is that of its region, `blocks` the number of blocks of the disk.

    `chunk_blocks`: so many blocks share a sector bitmap. `bitmap_bytes`: a block's part of that bitmap.
    """

    host_offset: int
    block_size: int
    chunk_blocks: int
    blocks: int
    bitmap_bytes: int
    has_parent: bool
    disk_bytes: int

    @classmethod
    def of(cls, metadata: Metadata, host_offset: int) -> BlockTable:
        """The table of a disk."""
        block_size, sector = metadata.block_size, metadata.logical_sector
        return cls(
            host_offset,
            block_size,
            _CHUNK_SECTORS * sector // block_size,
            -(-metadata.size // block_size),
            block_size // sector // 8,
            metadata.has_parent,
            metadata.size,
        )

    @property
    def entries(self) -> int:
        """The number of entries that are in use."""
        if self.has_parent:
            return self.bitmap_index(self.chunk_of(self.blocks - 1)) + 1
        return self.index(self.blocks - 1) + 1

    @property
    def place(self) -> Range:
        """The range of the file that the entries in use take."""
        return Range(self.host_offset, self.entries * ENTRY_BYTES)

    def needed(self, block: int) -> int:
        """The bytes that the disk has in a block: fewer than a block has only where the disk ends in it."""
        return min(self.block_size, self.disk_bytes - block * self.block_size)

    def index(self, block: int) -> int:
        """The index of a block's entry."""
        return block + block // self.chunk_blocks

    def chunk_of(self, block: int) -> int:
        """The chunk that a block is in."""
        return block // self.chunk_blocks

    def bitmap_index(self, chunk: int) -> int:
        """The index of the entry of a chunk's sector bitmap."""
        return chunk * (self.chunk_blocks + 1) + self.chunk_blocks

    def entry_offset(self, index: int) -> int:
        """The host offset of an entry."""
        return self.host_offset + index * ENTRY_BYTES

    def bitmap_offset(self, block: int) -> int:
        """The offset of a block's part inside its chunk's sector bitmap."""
        return block % self.chunk_blocks * self.bitmap_bytes


def make_entry(state: State, host_offset: int = 0) -> int:
    """An entry."""
    return host_offset | state


def block_fault(
    block: int, entry: int, table: BlockTable, reserved: tuple[Range, ...], host_size: int, *, cut: bool = False
) -> str | None:
    """What is impossible about a block's entry, None if nothing is.

    `reserved` are the places of metadata, `host_size` is the length of the file. The last block may be cut short behind
    the end of the disk: QEMU once left it so. Only an entry that has a place can be wrong about it. `cut`: a block that
    the end of the file cuts is possible.
    """
    state = entry & STATE_MASK
    if state not in _KNOWN:
        return f"state {state} is unknown"
    if state < State.PRESENT:
        return None
    if state == State.PARTIAL and not table.has_parent:
        return "a block is partly in the parent, and there is no parent"
    wrong = place_fault(entry, table.block_size, reserved, host_size)
    return wrong or (None if cut else cut_fault(block, entry, table, host_size))


def cut_fault(block: int, entry: int, table: BlockTable, host_size: int) -> str | None:
    """How the file was cut in a block that has a place, None if what the disk has of the block is there."""
    missing = (entry & PLACE_MASK) + table.needed(block) - host_size
    return f"the file was cut: it ends {missing} bytes before the block's end ({host_size:#x})" if missing > 0 else None


def place_fault(entry: int, length: int, reserved: tuple[Range, ...], host_size: int) -> str | None:
    """What is impossible about the place of an entry for `length` bytes, None if nothing is."""
    start = entry & PLACE_MASK
    if entry & RESERVED_MASK:
        return f"reserved bits are set ({entry & RESERVED_MASK:#x})"
    if start >= min(host_size, MAX_FILE_BYTES):
        return f"a place at {start:#x}, past the end of the file ({host_size:#x})"
    if start < MIB:
        return f"a place at {start:#x}, inside the header section"
    for place in reserved:
        if start < place.end and place.offset < start + length:
            return f"a place at {start:#x}, which overlaps metadata at {place.offset:#x}"
    return None


def bitmap_fault(entry: int, reserved: tuple[Range, ...], host_size: int, needed: int) -> str | None:
    """What is impossible about the entry of a sector bitmap whose first `needed` bytes count, None if nothing is."""
    if entry & STATE_MASK != State.PRESENT:
        return f"blocks are partly in the parent, and their sector bitmap is in state {entry & STATE_MASK}"
    wrong = place_fault(entry, BITMAP_BYTES, reserved, host_size)
    missing = (entry & PLACE_MASK) + needed - host_size
    return wrong or (f"the file was cut: it lacks {missing} bytes of the bitmap" if missing > 0 else None)
