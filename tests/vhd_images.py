"""VHD images made byte by byte from the description of the format, and a second reader of them, for tests.

Nothing here uses the driver. No tool on Debian writes differencing images, locators, batmaps, blocks of other sizes,
footers of 511 bytes or bitmaps with zeros.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

from tapfs.driver import BackingReference, CreateRequest, OpenRequest
from tapfs.formats.vhd import FORMAT
from tapfs.testing.model import MemoryFile, ModelDisk

SECTOR = 512
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
#: UUIDs of images and of their parents.
MINE, PARENTS = bytes(range(16)), bytes(range(100, 116))


def summed(raw: bytes, at: int) -> bytes:
    """A structure with its checksum in the four bytes at an offset."""
    total = sum(raw[:at]) + sum(raw[at + 4 :])
    return raw[:at] + (~total & 0xFFFFFFFF).to_bytes(4, "big") + raw[at + 4 :]


@dataclass(frozen=True)
class Block:
    """A block of an image: its bytes, and for each sector whether the bitmap has it (None: all)."""

    data: bytes
    present: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Vhd:
    """Everything that may be said of an image. `locators` are pairs of code and text bytes."""

    size: int = 5 * 16384 + 1536
    type: int = DYNAMIC
    block_size: int = 16384
    blocks: dict[int, Block] = field(default_factory=dict[int, Block])
    creator: bytes = b"win "
    creator_version: int = 0x000A0000
    geometry: tuple[int, int, int] = (65535, 16, 255)
    uuid: bytes = MINE
    hidden: int = 0
    parent_uuid: bytes = bytes(16)
    parent_name: str = ""
    locators: tuple[tuple[bytes, bytes], ...] = ()
    #: Whether the space of a locator is counted in sectors.
    space_in_sectors: bool = False
    #: Entries of the table that the disk does not need.
    spare_entries: int = 0
    #: The bits of tapdisk's batmap, one for each block; None: there is no batmap.
    batmap: tuple[bool, ...] | None = None
    signed_batmap: bool = False
    #: Bitmaps with the least significant bit first.
    old_bitmaps: bool = False
    #: Bytes between the blocks.
    gap: int = 0
    body: bytes = b""

    def footer(self) -> bytes:
        """The footer with the right checksum."""
        raw = struct.pack(
            ">8sIIQI4sI4sQQHBBII16sBB",
            b"conectix",
            2,
            0x10000,
            0xFFFFFFFFFFFFFFFF if self.type == FIXED else 512,
            700_000_000,
            self.creator,
            self.creator_version,
            b"Wi2k",
            self.size,
            self.size,
            *self.geometry,
            self.type,
            0,
            self.uuid,
            0,
            self.hidden,
        )
        return summed(raw.ljust(512, b"\0"), 64)

    def header(self, locators_at: int) -> bytes:
        """The dynamic header; the locators' texts lie one after the other from an offset on."""
        raw = struct.pack(
            ">8sQQIIII16sI4x512s",
            b"cxsparse",
            0xFFFFFFFFFFFFFFFF,
            1536,
            0x10000,
            self.entries,
            self.block_size,
            0,
            self.parent_uuid,
            700_000_001,
            self.parent_name.encode("utf-16-be"),
        )
        for code, text in self.locators:
            space = -(-len(text) // 512)
            raw += struct.pack(
                ">4sIIIQ", code, space if self.space_in_sectors else space * 512, len(text), 0, locators_at
            )
            locators_at += space * 512
        return summed(raw.ljust(1024, b"\0"), 36)

    @property
    def entries(self) -> int:
        """Entries of the block allocation table."""
        return -(-self.size // self.block_size) + self.spare_entries

    def bitmap(self, block: Block) -> bytes:
        """The bitmap of a block in whole sectors."""
        sectors = self.block_size // SECTOR
        present = block.present or (True,) * sectors
        raw = bytearray(-(-sectors // 8 // 512) * 512 or 512)
        for sector, there in enumerate(present):
            if there:
                raw[sector // 8] |= 1 << sector % 8 if self.old_bitmaps else 0x80 >> sector % 8
        return bytes(raw)

    def content(self) -> bytes:
        """The whole file."""
        if self.type == FIXED:
            return self.body.ljust(self.size, b"\0") + self.footer()
        table_bytes = -(-self.entries * 4 // 512) * 512
        out = bytearray(1536 + table_bytes)
        if self.batmap is not None:
            out += self._batmap(len(out))
        locators_at = len(out)
        for _, text in self.locators:
            out += text.ljust(-(-len(text) // 512) * 512, b"\0")
        out[:1536] = self.footer() + self.header(locators_at)
        out[1536 : 1536 + table_bytes] = b"\xff" * table_bytes
        for index in sorted(self.blocks, key=lambda index: (index * 7) % 5):
            out += bytes(self.gap)
            out[1536 + 4 * index : 1540 + 4 * index] = (len(out) // 512).to_bytes(4, "big")
            out += self.bitmap(self.blocks[index]) + self.blocks[index].data.ljust(self.block_size, b"\0")
        return bytes(out) + self.footer()

    def _batmap(self, at: int) -> bytes:
        bits = bytearray(-(-self.entries // 8 // 512) * 512 or 512)
        for block, full in enumerate(self.batmap or ()):
            bits[block // 8] |= full * (0x80 >> block % 8)
        total = sum(byte - 256 if self.signed_batmap and byte > 127 else byte for byte in bits)
        head = struct.pack(">8sQIIIB", b"tdbatmap", at + 512, len(bits) // 512, 0x10002, ~total & 0xFFFFFFFF, 0)
        return head.ljust(512, b"\0") + bytes(bits)


def differencing(**changes: object) -> Vhd:
    """A differencing image over base.vhd with the UUID `PARENTS`: one full block, one with some sectors, no others."""
    choice = random.Random(3)
    some = tuple(choice.random() < 0.5 for _ in range(32))
    image = Vhd(
        type=DIFFERENCING,
        blocks={1: Block(choice.randbytes(16384)), 3: Block(choice.randbytes(16384), some)},
        parent_uuid=PARENTS,
        parent_name="base.vhd",
        locators=((b"W2ru", ".\\base.vhd".encode("utf-16-le")), (b"W2ku", "C:\\disks\\base.vhd".encode("utf-16-le"))),
    )
    return replace(image, **changes)  # type: ignore[arg-type]


def by_bytes(raw: bytes, parent: bytes = b"") -> bytes:
    """The guest's disk as the description of the format says it is, of an image by its copy of the footer."""
    size, kind = int.from_bytes(raw[48:56], "big"), int.from_bytes(raw[60:64], "big")
    header = int.from_bytes(raw[16:24], "big")
    table = int.from_bytes(raw[header + 16 : header + 24], "big")
    block = int.from_bytes(raw[header + 32 : header + 36], "big")
    out = bytearray((parent if kind == DIFFERENCING else b"")[:size].ljust(size, b"\0"))
    bitmap_bytes = -(-(block // 512 // 8) // 512) * 512
    for at in range(0, size, 512):
        index, sector = at // block, at % block // 512
        place = int.from_bytes(raw[table + 4 * index : table + 4 * index + 4], "big") * 512
        if place != 0xFFFFFFFF * 512 and raw[place + sector // 8] & 0x80 >> sector % 8:
            data = place + bitmap_bytes + sector * 512
            out[at : at + 512] = raw[data : data + 512][: size - at]
    return bytes(out)


def ignoring_bitmaps(raw: bytes) -> bytes:
    """The guest's disk of a dynamic image as QEMU reads it: every sector of a block that is there."""
    data = bytearray(raw)
    header = int.from_bytes(raw[16:24], "big")
    table = int.from_bytes(raw[header + 16 : header + 24], "big")
    block = int.from_bytes(raw[header + 32 : header + 36], "big")
    bitmap_bytes = -(-(block // 512 // 8) // 512) * 512
    for index in range(-(-int.from_bytes(raw[48:56], "big") // block)):
        place = int.from_bytes(raw[table + 4 * index : table + 4 * index + 4], "big") * 512
        if place != 0xFFFFFFFF * 512:
            data[place : place + bitmap_bytes] = b"\xff" * bitmap_bytes
    return by_bytes(bytes(data))


#: Kind: options of create, whether it has a parent.
KINDS: dict[str, tuple[dict[str, str], bool]] = {
    "dynamic": ({}, False),
    "dynamic-small-blocks": ({"block_size": "16384"}, False),
    "dynamic-large-blocks": ({"block_size": "4194304"}, False),
    "dynamic-partial": ({"block_size": "16384"}, False),
    "dynamic-tail": ({"block_size": "16384"}, False),
    "batmap": ({}, False),
    "differencing": ({"block_size": "65536"}, True),
    "differencing-2m": ({}, True),
    "differencing-windows": ({}, True),
}


def make(kind: str, size: int, seed: int) -> tuple[MemoryFile, bytes]:
    """An image of a kind with some data in it, and the bytes of its parent's disk."""
    choice = random.Random(seed)
    options, has_parent = KINDS[kind]
    parent = choice.randbytes(size * 3 // 4 // 512 * 512) if has_parent else b""
    if kind in {"dynamic-partial", "batmap", "differencing-windows"}:
        return MemoryFile(_foreign(kind, size, choice)), parent
    file = MemoryFile()
    reference = BackingReference("base.raw", "raw") if has_parent else None
    file.apply(FORMAT.create(CreateRequest(size, reference, 1_234_567_890, options)))
    disk = ModelDisk(FORMAT.open(file, OpenRequest(writable=True)), file, parent)  # type: ignore[arg-type]
    for _ in range(3):
        disk.write(choice.randrange(size - 9000), choice.randbytes(9000))
    disk.flush()
    if kind == "dynamic-tail":  # what was reserved when the power failed, and no footer
        file.data += choice.randbytes(40_000)
    return MemoryFile(bytes(file.data)), parent


def _foreign(kind: str, size: int, choice: random.Random) -> bytes:
    """An image as other programs leave it: with bits that are 0, with a batmap."""
    block = 16384
    count = -(-size // block)
    blocks: dict[int, Block] = {}
    for index in choice.sample(range(count), min(6, count)):
        present = tuple(choice.random() < 0.7 for _ in range(block // 512)) if choice.random() < 0.6 else None
        data = bytearray(choice.randbytes(block))
        for sector, there in enumerate(present or ()):
            if not there and kind == "dynamic-partial":  # so that readers which ignore bitmaps agree
                data[sector * 512 : sector * 512 + 512] = bytes(512)
        blocks[index] = Block(bytes(data), present)
    image = Vhd(size=size, block_size=block, blocks=blocks, gap=choice.choice([0, 512, 3584]))
    if kind == "batmap":
        full = tuple(index in blocks and blocks[index].present is None for index in range(count))
        image = replace(image, creator=b"tap\0", creator_version=0x10003, batmap=full, spare_entries=300)
    if kind == "differencing-windows":
        image = replace(
            image, type=DIFFERENCING, parent_uuid=PARENTS, locators=((b"W2ru", ".\\base.vhd".encode("utf-16-le")),)
        )
    return image.content()


def write_to(path: Path, image: Vhd) -> Path:
    """The image as a real file."""
    path.write_bytes(image.content())
    return path
