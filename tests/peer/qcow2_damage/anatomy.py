"""Every table and entry of a sound qcow2 image in memory, by its place and its sort, for damages to choose from."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tests.qcow2_images import Fields, bitmap_tables

OFFSET = 0x00FFFFFFFFFFFE00
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
CRYPTO, BITMAPS = 0x0537BE77, 0x23852875
SUBCLUSTERS = 0xFFFFFFFF


class Snapshot(NamedTuple):
    """A snapshot: its entry's place, its L1 table and the entries of that."""

    at: int
    l1_at: int
    l1_entries: int


class Anatomy:
    """One image, which `put` changes."""

    def __init__(self, data: bytearray) -> None:
        self.data = data
        fields = Fields(bytes(data))
        self.version, self.cluster, self.bits = fields.version, fields.cluster, fields.bits
        self.extended, self.external = fields.extended, fields.external
        self.l1_at, self.l1_entries = fields.l1_at, fields.l1_entries
        self.reftable_at, self.reftable_clusters = fields.reftable_at, fields.reftable_clusters
        self.refcount_bits = fields.refcount_bits
        self.disk_size = fields.size
        self.entry, self.per_table = fields.entry, fields.per_table
        #: Of the L1 table: the places of the entries that lead to a table.
        self.l1_used = [at for at in self._words(self.l1_at, self.l1_entries) if self.number(at)]
        self.tables = [self.number(at) & OFFSET for at in self.l1_used]
        #: Of the refcount table: the places of the entries that lead to a block.
        reftable = self._words(self.reftable_at, self.reftable_clusters * self.cluster // 8)
        self.reftable_used = [at for at in reftable if self.number(at)]
        self.blocks = [self.number(at) & OFFSET for at in self.reftable_used]
        self.snapshots_at = fields.snapshots_at
        self.snapshots = self._snapshots(fields)
        self.extensions = self._extensions(fields)

    def number(self, at: int, width: int = 8) -> int:
        """The number of `width` bytes at a place."""
        return int.from_bytes(self.data[at : at + width], "big")

    def put(self, at: int, number: int, width: int = 8) -> None:
        """Set that number."""
        self.data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "big")

    @property
    def end(self) -> int:
        """The end of the file, rounded up to a cluster."""
        return -(-len(self.data) // self.cluster) * self.cluster

    def entries(self, sort: str) -> list[int]:
        """The places of the current disk's L2 entries of a sort.

        Sorts are data, zero and empty, both without a place, placed zero, and compressed.
        """
        return [at for at in self._all_entries() if self._sort(at) == sort]

    def l1_of(self, snapshot: Snapshot) -> list[int]:
        """The places of a snapshot's L1 entries that lead to a table."""
        return [at for at in self._words(snapshot.l1_at, snapshot.l1_entries) if self.number(at)]

    def bitmaps(self) -> list[tuple[int, int]]:
        """The directory's entries: the place of each, and of its table."""
        if BITMAPS not in self.extensions:
            return []
        length, at = struct.unpack_from(">QQ", self.data, self.extensions[BITMAPS] + 8)
        found: list[tuple[int, int]] = []
        place: int = at
        for table, _ in bitmap_tables(bytes(self.data), at, length):
            found.append((place, table))
            extra, name = self.number(place + 20, 4), self.number(place + 18, 2)
            place += (24 + extra + name + 7) // 8 * 8
        return found

    def refcount(self, cluster: int) -> int:
        """The refcount of a cluster."""
        at, shift, width = self._counted_at(cluster)
        return self.number(at, max(1, width // 8)) >> shift & ((1 << width) - 1)

    def count(self, cluster: int, number: int) -> bool:
        """Set the refcount of a cluster; False if there is none of it, or it does not change or fit."""
        if not 0 <= number < 1 << self.refcount_bits or cluster // self._per_block >= len(self.blocks):
            return False
        if self.refcount(cluster) == number:
            return False
        at, shift, width = self._counted_at(cluster)
        size = max(1, width // 8)
        rest = self.number(at, size) & ~(((1 << width) - 1) << shift)
        self.put(at, rest | number << shift, size)
        return True

    # -- inside ---------------------------------------------------------------------------------

    @property
    def _per_block(self) -> int:
        return self.cluster * 8 // self.refcount_bits

    def _counted_at(self, cluster: int) -> tuple[int, int, int]:
        index, inside = divmod(cluster, self._per_block)
        width = self.refcount_bits
        at = self.blocks[index] + inside * width // 8
        return at, inside * width % 8 if width < 8 else 0, width

    def _words(self, at: int, count: int) -> range:
        return range(at, at + 8 * count, 8)

    def _all_entries(self) -> list[int]:
        left = -(-self.disk_size // self.cluster)
        span = self.per_table
        found: list[int] = []
        for at in self.l1_used:
            first = (at - self.l1_at) // 8 * span
            table = self.number(at) & OFFSET
            found += [table + self.entry * index for index in range(min(span, left - first))]
        return found

    def _sort(self, at: int) -> str:
        word = self.number(at)
        if word & COMPRESSED:
            return "compressed"
        if self.extended:
            allocated = self.number(at + 8) & SUBCLUSTERS
            return "data" if allocated else "placed zero" if word & OFFSET else "empty"
        if word & ZERO and self.version > 2:
            return "placed zero" if word & OFFSET else "zero"
        return "data" if word & (OFFSET | (COPIED if self.external else 0)) else "empty"

    def _snapshots(self, fields: Fields) -> list[Snapshot]:
        at, found = fields.snapshots_at, list[Snapshot]()
        for _ in range(fields.snapshot_count):
            found.append(Snapshot(at, self.number(at), self.number(at + 8, 4)))
            length = 40 + self.number(at + 36, 4) + self.number(at + 12, 2) + self.number(at + 14, 2)
            at += -(-length // 8) * 8
        return found

    def _extensions(self, fields: Fields) -> dict[int, int]:
        """The place of each extension's data, by its type."""
        at = 72 if self.version == 2 else fields.number(100, 4)
        found: dict[int, int] = {}
        while at + 8 <= (fields.number(8, 8) or self.cluster) and fields.number(at, 4):
            found[fields.number(at, 4)] = at + 8
            at += 8 + -(-fields.number(at + 4, 4) // 8) * 8
        return found
