"""Small formats, each with the tables of a real one: a layout for the engine, and a map that is read in Python.

Sizes are small, so that few bytes make many maps: a block of 4 KiB instead of 2 MiB, and so on. Every `runs` is
written from the format's description, not from the layout, and raises `WrongError` for what cannot be true.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tapfs.driver import Codec, Geometry, Packing
from tapfs.extent import Extent, Kind, merge
from tapfs.tables import Bitmap, Rule, TableLayout, Where

SECTOR = 512
ALL = (1 << 64) - 1


class WrongError(Exception):
    """An entry cannot be true."""


def require(condition: object) -> None:
    """Raise WrongError unless it holds."""
    if not condition:
        raise WrongError


class Block(NamedTuple):
    """A block of the disk: its number, its entry, and how many of its bytes are in the disk."""

    number: int
    entry: int
    used: int


@dataclass
class Synthetic(ABC):
    """An image of one of the shapes: its file, the entries of its table, and where they are."""

    content: bytes
    blocks: int
    #: Bytes of the disk that its last block lacks, at most the block but one granule.
    short: int = 0
    table_at: int = 4096
    data_size: int = 0

    block = 4096
    granule = 4096
    unit_blocks = 4
    entry_bytes = 4
    order = "little"

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.size, self.granule, self.unit_blocks * self.block)

    @property
    def size(self) -> int:
        return self.blocks * self.block - self.short

    @property
    def end(self) -> int:
        return len(self.content)

    @property
    def places(self) -> array[int]:
        return array("Q", [self.entry_at(unit) for unit in range(0, self.blocks, self.unit_blocks)])

    def entry_at(self, index: int) -> int:
        return self.table_at + index * self.entry_bytes

    def word(self, at: int, length: int = 0) -> int:
        length = length or self.entry_bytes
        require(at + length <= self.end)
        return int.from_bytes(self.content[at : at + length], "big" if self.order == "big" else "little")

    def entry(self, index: int) -> int:
        return self.word(self.entry_at(index))

    def unit(self, number: int) -> list[Extent]:
        """The merged map of a unit, as far as the disk goes."""
        stop = min((number + 1) * self.unit_blocks, self.blocks)
        found = [self.of_block(index) for index in range(number * self.unit_blocks, stop)]
        return list(merge(extent for extents in found for extent in extents if extent.offset < self.size))

    def of_block(self, index: int) -> list[Extent]:
        start = index * self.block
        block = Block(index, self.entry(index), min(self.block, self.size - start))
        return [extent._replace(offset=start + extent.offset) for extent in self.runs(block)]

    @abstractmethod
    def runs(self, block: Block) -> Iterator[Extent]:
        """The extents of a block, as if the disk began with it."""

    @property
    @abstractmethod
    def layout(self) -> TableLayout:
        """What the engine is told."""


class Vhd(Synthetic):
    """VHD: big-endian sectors; a bitmap, most significant bit first, in the block before its data."""

    granule, order, unit_blocks = SECTOR, "big", 2
    clear = Kind.UNALLOCATED

    def runs(self, block: Block) -> Iterator[Extent]:
        if block.entry == 0xFFFFFFFF:
            yield Extent(0, self.block, Kind.UNALLOCATED, 0, 0)
            return
        data = (block.entry + 1) * SECTOR
        require(data - SECTOR >= 8192)
        require(data + block.used <= self.end)
        for sector in range(self.block // SECTOR):
            here = self.content[data - SECTOR] >> (7 - sector) & 1
            yield Extent(
                sector * SECTOR, SECTOR, Kind.DATA if here else self.clear, 0, data + sector * SECTOR if here else 0
            )

    @property
    def layout(self) -> TableLayout:
        return TableLayout(
            4,
            big_endian=True,
            host_size=self.end,
            rules=(Rule(0xFFFFFFFF, 0xFFFFFFFF, Kind.UNALLOCATED),),
            place_mask=0xFFFFFFFF,
            place_shift=9,
            place_add=SECTOR,
            data_whole=True,
            entry_granules=8,
            bitmap=Bitmap(Where.IN_BLOCK, most_significant_first=True, clear_kind=self.clear, block_bytes=SECTOR),
            tables_reserved=True,
            least_place=8192,
        )


class VhdZeros(Vhd):
    """The same in an image without a parent: what the bitmap does not name is zeros."""

    clear = Kind.ZERO


class Vhdx(Synthetic):
    """VHDX: states, and the bits of four blocks, least significant first, where each fifth word says."""

    granule, entry_bytes, unit_blocks, ratio = SECTOR, 8, 2, 4

    def entry_at(self, index: int) -> int:
        return self.table_at + (index + index // self.ratio) * 8

    def runs(self, block: Block) -> Iterator[Extent]:
        state, place = block.entry & 7, block.entry & ~0xFFF
        if state in {0, 1, 2, 3}:
            yield Extent(0, self.block, Kind.ZERO if state else Kind.UNALLOCATED, 0, 0)
            return
        require(state in {6, 7})
        require(block.entry & 0xFF8 == 0 and block.entry < 1 << 63)
        require(place >= 8192 and place < self.end)
        if state == 6:
            yield Extent(0, self.block, Kind.DATA, 0, place)
            return
        word = self.word(self.table_at + (block.number // self.ratio * (self.ratio + 1) + self.ratio) * 8)
        require(word & 0xFFF == 6 and word < 1 << 63)
        bits = word - 6
        require(bits >= 8192 and bits + self.ratio <= self.end)
        for sector in range(8):
            here = self.content[bits + block.number % self.ratio] >> sector & 1
            at = sector * SECTOR
            yield Extent(at, SECTOR, Kind.DATA if here else Kind.UNALLOCATED, 0, place + at if here else 0)

    @property
    def layout(self) -> TableLayout:
        return TableLayout(
            8,
            big_endian=False,
            host_size=self.end,
            rules=(
                Rule(7, 0, Kind.UNALLOCATED),
                Rule(7, 1, Kind.ZERO),
                Rule(6, 2, Kind.ZERO),
                Rule(6, 4, None),
            ),
            place_mask=((1 << 63) - 1) & ~0xFFF,
            zero_mask=0xFF8 | 1 << 63,
            entry_granules=8,
            bitmap=Bitmap(
                Where.IN_TABLE,
                entry_mask=7,
                entry_value=7,
                word_place=self.table_at + self.ratio * 8,
                word_stride=(self.ratio + 1) * 8,
                word_units=self.ratio // self.unit_blocks,
                word_mask=7,
                word_value=6,
            ),
            tables_reserved=True,
            reserved=((0, 100), (self.table_at, 8192)),
        )


class ExtendedL2(Synthetic):
    """qcow2 with subclusters and compressed clusters: entries of two words."""

    block, granule, entry_bytes, order = 16384, SECTOR, 16, "big"
    compressed = 1 << 62
    bits = 62 - (14 - 8)

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            self.size, self.granule, self.unit_blocks * self.block, packing=Packing(Codec.ZSTD, unit=self.block)
        )

    def runs(self, block: Block) -> Iterator[Extent]:
        word, subs = block.entry >> 64, block.entry & ALL
        if word & self.compressed:
            place = word & ((1 << self.bits) - 1)
            length = ((word >> self.bits & 0x3F) + 1) * 512 - place % 512
            require(subs == 0 and place >= 8192 and place + length <= self.end)
            yield Extent(0, self.block, Kind.COMPRESSED, 0, place)
            return
        place = word & 0x00FFFFFFFFFFFE00
        require(word & 1 == 0 and subs & subs >> 32 & 0xFFFFFFFF == 0)
        if subs & 0xFFFFFFFF:
            require(place % 4096 == 0 and place >= 8192 and place < self.end)
        for sub in range(32):
            data, zero = subs >> sub & 1, subs >> (32 + sub) & 1
            kind = Kind.DATA if data else Kind.ZERO if zero else Kind.UNALLOCATED
            yield Extent(sub * SECTOR, SECTOR, kind, 0, place + sub * SECTOR if data else 0)

    @property
    def layout(self) -> TableLayout:
        return TableLayout(
            8,
            big_endian=True,
            host_size=self.end,
            rules=(Rule(self.compressed, self.compressed, Kind.COMPRESSED),),
            place_mask=0x00FFFFFFFFFFFE00,
            place_alignment=4096,
            zero_mask=1,
            packed_place_mask=(1 << self.bits) - 1,
            packed_length_shift=self.bits,
            packed_length_mask=0x3F,
            packed_sector_bytes=512,
            entry_granules=32,
            bitmap=Bitmap(Where.IN_ENTRY),
            tables_reserved=True,
            least_place=8192,
        )


class Vdi(Synthetic):
    """VDI: numbers of blocks that have something before their data; free and zero are numbers, too."""

    extra = SECTOR
    data_at = 8192

    def runs(self, block: Block) -> Iterator[Extent]:
        if block.entry >= 0xFFFFFFFE:
            yield Extent(0, self.block, Kind.ZERO if block.entry == 0xFFFFFFFE else Kind.UNALLOCATED, 0, 0)
            return
        place = self.data_at + block.entry * (self.block + self.extra) + self.extra
        require(place + block.used <= self.end)
        yield Extent(0, self.block, Kind.DATA, 0, place)

    @property
    def layout(self) -> TableLayout:
        return TableLayout(
            4,
            big_endian=False,
            host_size=self.end,
            rules=(Rule(0xFFFFFFFF, 0xFFFFFFFF, Kind.UNALLOCATED), Rule(0xFFFFFFFF, 0xFFFFFFFE, Kind.ZERO)),
            place_mask=0xFFFFFFFF,
            place_multiplier=self.block + self.extra,
            place_add=self.data_at + self.extra,
            data_whole=True,
            tables_reserved=True,
            least_place=self.data_at,
        )


class Grains(Synthetic):
    """VMDK, compressed: sectors of markers whose header has the length; 1 is zeros."""

    bound = 4096 + 1024

    @property
    def geometry(self) -> Geometry:
        packing = Packing(Codec.ZLIB, header_bytes=12, length_at=8, length_bytes=4)
        return Geometry(self.size, self.granule, self.unit_blocks * self.block, packing=packing)

    def runs(self, block: Block) -> Iterator[Extent]:
        if block.entry <= 1:
            yield Extent(0, self.block, Kind.ZERO if block.entry else Kind.UNALLOCATED, 0, 0)
            return
        require(8192 <= block.entry * SECTOR < self.end)
        yield Extent(0, self.block, Kind.COMPRESSED, 0, block.entry * SECTOR)

    @property
    def layout(self) -> TableLayout:
        return TableLayout(
            4,
            big_endian=False,
            host_size=self.end,
            rules=(
                Rule(0xFFFFFFFF, 0, Kind.UNALLOCATED),
                Rule(0xFFFFFFFF, 1, Kind.ZERO),
                Rule(0, 0, Kind.COMPRESSED),
            ),
            place_mask=0,
            packed_place_mask=0xFFFFFFFF,
            packed_place_shift=9,
            packed_bound=self.bound,
            tables_reserved=True,
            least_place=8192,
        )


class SeSparse(Synthetic):
    """VMDK of VMFS 6: the kind in the top nibble, the number of the grain turned round a 12-bit field."""

    entry_bytes = 8
    grains_at = 8192

    def runs(self, block: Block) -> Iterator[Extent]:
        nibble = block.entry >> 60
        if block.entry == 0 or nibble in {1, 2}:
            yield Extent(0, self.block, Kind.ZERO if block.entry else Kind.UNALLOCATED, 0, 0)
            return
        require(nibble == 3)
        number = (block.entry >> 48 & 0xFFF) | (block.entry & ((1 << 48) - 1)) << 12
        require(self.grains_at + number * 4096 < self.end)
        yield Extent(0, self.block, Kind.DATA, 0, self.grains_at + number * 4096)

    @property
    def layout(self) -> TableLayout:
        kinds = ((1, Kind.ZERO), (2, Kind.ZERO), (3, Kind.DATA))
        return TableLayout(
            8,
            big_endian=False,
            host_size=self.end,
            rules=(
                Rule(ALL, 0, Kind.UNALLOCATED),
                *(Rule(0xF << 60, nibble << 60, kind) for nibble, kind in kinds),
                Rule(0, 0, None),
            ),
            place_mask=(1 << 38) - 1,
            place_shift=24,
            place_low_mask=0xFFF << 48,
            place_low_shift=36,
            zero_mask=((1 << 48) - 1) & ~((1 << 38) - 1),
            place_add=self.grains_at,
            tables_reserved=True,
            least_place=self.grains_at,
        )


class ExternalData(Synthetic):
    """qcow2 with a data file: place 0 is one, and metadata of the other file does not matter."""

    entry_bytes, order = 8, "big"
    used = 1 << 63

    def runs(self, block: Block) -> Iterator[Extent]:
        place = block.entry & 0x00FFFFFFFFFFF000
        if not block.entry & self.used and not place:
            yield Extent(0, self.block, Kind.ZERO if block.entry & 1 else Kind.UNALLOCATED, 0, 0)
            return
        require(block.entry & 0xFFF == 0 and place < self.data_size)
        yield Extent(0, self.block, Kind.DATA, 1, place)

    @property
    def layout(self) -> TableLayout:
        none = self.used | 0x00FFFFFFFFFFF000
        return TableLayout(
            8,
            big_endian=True,
            host_size=self.end,
            rules=(Rule(none | 1, 0, Kind.UNALLOCATED), Rule(none | 1, 1, Kind.ZERO)),
            place_mask=0x00FFFFFFFFFFF000,
            zero_mask=0xFFF,
            data_file=1,
            data_size=self.data_size,
            least_place=4096,
            reserved=((8192, ALL),),
        )


def packed_words(order: str, width: int, words: list[int]) -> bytes:
    """Words of 4, 8 or 16 bytes as they are in a table."""
    if width == 16:
        return b"".join(struct.pack(">QQ", word >> 64, word & ALL) for word in words)
    return struct.pack(f"{'>' if order == 'big' else '<'}{len(words)}{'I' if width == 4 else 'Q'}", *words)
