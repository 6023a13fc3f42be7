"""The refcount table of an open qcow2 image and its blocks, as they are in memory: read when they are asked for.

A block that has changes stays, of the others as many as `_CACHE_BYTES` allows. `refcounts.py` makes the changes.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import ChangedTable, decode
from tapfs.formats.qcow2.counts import Counting
from tapfs.formats.qcow2.entries import BYTE_ORDER, TYPECODE
from tapfs.formats.qcow2.header import WORD, Header

#: Bytes of unchanged blocks that are kept.
_CACHE_BYTES = 4 << 20
#: Bits 0 to 8 of a table entry are reserved.
PLACE = ((1 << 64) - 1) & ~0x1FF


class RefcountBlocks:
    """The table and the blocks of one image. `place`: the table's offset, which changes in memory first."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header
        self.counting = Counting(header.refcount_order)
        self.per_block = header.block_entries
        self.place = header.reftable_offset
        raw = file.read(header.reftable_offset, header.reftable_length).ljust(header.reftable_length, b"\0")
        self._table = ChangedTable(decode(raw, TYPECODE, BYTE_ORDER), BYTE_ORDER)
        self._clean: OrderedDict[int, array[int]] = OrderedDict()
        #: Blocks that differ from the disk, or of which the disk will differ: they stay in memory.
        self._changed: dict[int, ChangedTable] = {}

    def get(self, cluster: int) -> int:
        """The count of a cluster, with what is raised and without what is to be lowered."""
        index, inside = divmod(cluster, self.per_block)
        block = self.block(index)
        return 0 if block is None else self.counting.get(block, inside)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """``(index, host offset)`` of each block."""
        for index, entry in enumerate(self._table.entries):
            if entry:
                yield index, entry & PLACE

    @property
    def block_count(self) -> int:
        """Entries of the table, used or not."""
        return len(self._table.entries)

    @property
    def table_length(self) -> int:
        """Bytes of the table."""
        return len(self._table.entries) * WORD

    def block(self, index: int) -> array[int] | None:
        """The bytes of a block, None where there is none; not to be changed. Raises ImageError(corrupt)."""
        changed = self._changed.get(index)
        if changed is not None:
            return changed.entries
        clean = self._clean.get(index)
        if clean is not None:
            self._clean.move_to_end(index)
            return clean
        place = self._block_place(index)
        if place == 0:
            return None
        size = self._header.cluster_size
        raw = self._file.read(place, size)
        if len(raw) < size:  # what is missing would say that its clusters are free
            raise self._damaged(index, f"at {place:#x} lies past the end of the file")
        clean = array("B", raw)
        self._keep(index, clean)
        return clean

    def counted_end(self) -> int:
        """The number behind the last cluster that has a count."""
        for index, _ in reversed(list(self.blocks())):
            block = self.block(index)
            used = b"" if block is None else self.counting.used(block.tobytes()).rstrip(b"\0")
            if used:
                return index * self.per_block + len(used)
        return 0

    # -- inside ---------------------------------------------------------------------------------

    def _block_place(self, index: int) -> int:
        """The host offset of a block, 0 for none. Raises ImageError(corrupt) for one that cannot be."""
        entry = self._table.entries[index] if index < len(self._table.entries) else 0
        place = entry & PLACE
        if entry and (place % self._header.cluster_size or place < self._header.cluster_size):
            raise self._damaged(index, f"at {place:#x} is not on a cluster behind the header")
        return place

    def _damaged(self, index: int, what: str) -> ImageError:
        return ImageError(
            ErrorKind.CORRUPT,
            f"refcount block {index} {what}",
            path=self._file.path,
            offset=self.place + WORD * index,
            op="read the refcounts",
            remedy="run tapfs repair",
        )

    def _keep(self, index: int, block: array[int]) -> None:
        while self._clean and len(self._clean) * self._header.cluster_size >= _CACHE_BYTES:
            self._clean.popitem(last=False)
        self._clean[index] = block
