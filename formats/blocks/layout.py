"""The layout of a table of blocks: one entry for each block of the disk, and what the entry means.

A block of the disk lies in a slot of the host file. The slot may begin with something of the format's own (a sector
bitmap, "block extra"); the block's bytes follow it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.extent import Kind
from tapfs.formats.changed_table import ByteOrder
from tapfs.records import NamedTuple, dataclass

#: Bytes of the table that are read and kept together.
PAGE_BYTES = 4096

#: The largest map unit that the engine takes.
_MAX_MAP_UNIT = 1 << 30


class Run(NamedTuple):
    """`blocks` entries from `first` on that mean the same, or slots that follow one another from `entry` on."""

    first: int
    blocks: int
    kind: Kind
    entry: int = 0

    @property
    def stop(self) -> int:
        """The index after the last block."""
        return self.first + self.blocks

    def each(self, step: int) -> Iterator[Run]:
        """Its entries as runs of their own; places that follow one another are `step` apart."""
        for at in range(self.blocks):
            yield Run(self.first + at, 1, self.kind, self.entry + at * step)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How the table of one image maps its disk; lengths and places are in bytes.

    The entry of a block is `free`, or `zero` (if the format has such an entry), or the slot of the block begins at
    ``origin + entry * scale``. A slot has `slot_bytes`, a multiple of `scale`; the bytes of the block follow its
    first `payload_at`. No slot begins before `least_place`, and none overlaps a range ``(start, end)`` of `reserved`.
    """

    virtual_size: int
    block_bytes: int
    table_offset: int
    entry_bytes: int
    order: ByteOrder
    slot_bytes: int
    scale: int
    free: int
    least_place: int
    zero: int | None = None
    origin: int = 0
    payload_at: int = 0
    reserved: tuple[tuple[int, int], ...] = ()

    @property
    def typecode(self) -> str:
        """The type of the table's array."""
        return "I" if self.entry_bytes == 4 else "Q"

    @property
    def blocks(self) -> int:
        """The blocks of the disk."""
        return -(-self.virtual_size // self.block_bytes)

    @property
    def table_end(self) -> int:
        """The host offset after the entries of the disk's blocks."""
        return self.table_offset + self.blocks * self.entry_bytes

    @property
    def step(self) -> int:
        """What the entries of two slots that follow one another differ by."""
        return self.slot_bytes // self.scale

    @property
    def largest_entry(self) -> int:
        """The largest entry that names a slot."""
        special = {self.free, self.zero}
        entry = (1 << 8 * self.entry_bytes) - 1
        while entry in special:
            entry -= 1
        return entry

    @property
    def contiguous(self) -> bool:
        """Whether blocks in slots that follow one another are one piece of the host file."""
        return self.slot_bytes == self.block_bytes

    @property
    def unit_blocks(self) -> int:
        """The blocks of a map unit: those of a page of the table, as far as a map unit may reach."""
        return max(1, min(PAGE_BYTES // self.entry_bytes, _MAX_MAP_UNIT // self.block_bytes))

    def slot(self, entry: int) -> int:
        """The host offset of the slot that an entry names."""
        return self.origin + entry * self.scale

    def payload(self, entry: int) -> int:
        """The host offset of the bytes of the block in that slot."""
        return self.slot(entry) + self.payload_at

    def entry(self, slot: int) -> int:
        """The entry that names the slot at a host offset."""
        return (slot - self.origin) // self.scale

    def entry_place(self, index: int) -> int:
        """The host offset of the entry of block `index`."""
        return self.table_offset + index * self.entry_bytes

    def consecutive(self, entry: int, blocks: int) -> array[int]:
        """The entries of slots that follow one another."""
        return array(self.typecode, range(entry, entry + blocks * self.step, self.step))

    def same(self, entry: int, blocks: int) -> array[int]:
        """`blocks` times an entry."""
        return array(self.typecode, (entry,)) * blocks

    def kind(self, entry: int) -> Kind:
        """What an entry means."""
        if entry == self.free:
            return Kind.UNALLOCATED
        return Kind.ZERO if entry == self.zero else Kind.DATA

    def runs(self, entries: array[int], first: int) -> Iterator[Run]:
        """The entries of the blocks from `first` on as runs, ascending and as long as possible."""
        at, end = 0, len(entries)
        while at < end:
            entry = entries[at]
            kind = self.kind(entry)
            step = self.step if kind == Kind.DATA else 0
            after = at + 1
            # A whole run is usual (a filled table, an empty one), so it is tried before single entries.
            if after < end and entries[end - 1] == entry + (end - 1 - at) * step:
                whole = self.consecutive(entry, end - at) if step else self.same(entry, end - at)
                if entries[at:end] == whole and not self._special_between(entry, entries[end - 1]):
                    after = end
            expected = entry + step * (after - at)
            while after < end and entries[after] == expected and self.kind(expected) == kind:
                after += 1
                expected += step
            yield Run(first + at, after - at, kind, entry)
            at = after

    def _special_between(self, entry: int, last: int) -> bool:
        """Whether consecutive places go over a value that means something else."""
        return entry < self.free <= last or (self.zero is not None and entry < self.zero <= last)

    def fault(self, run: Run, file_size: int) -> str | None:
        """What makes the place of a run impossible or has cut it, or None."""
        return self.place_fault(run, file_size) or self.cut_fault(run, file_size)

    def place_fault(self, run: Run, file_size: int) -> str | None:
        """What makes the place of a run impossible, or None; see `cut_fault` for one that the file's end cuts."""
        if run.kind != Kind.DATA:
            return None
        start, last = self.slot(run.entry), self.slot(run.entry + (run.blocks - 1) * self.step)
        what = f"block at {start:#x}" if run.blocks == 1 else f"blocks {start:#x} to {last:#x}"
        if last + self.payload_at >= file_size:
            return f"{what} past the end of the file ({file_size:#x})"
        if start < self.least_place or any(
            start < end and begin < last + self.slot_bytes for begin, end in self.reserved
        ):
            return f"{what} inside the metadata"
        return None

    def cut_fault(self, run: Run, file_size: int) -> str | None:
        """How the file was cut in a run, or None.

        What the disk has of a block must be in the file: all of it, but for the last block of the disk.
        """
        if run.kind != Kind.DATA:
            return None
        last = self.payload(run.entry + (run.blocks - 1) * self.step)
        missing = last + min(self.block_bytes, self.virtual_size - (run.stop - 1) * self.block_bytes) - file_size
        return f"the file was cut: it ends {missing} bytes before the block at {last:#x} does" if missing > 0 else None
