"""VDI images written by hand from docs/specs/vdi.md, with nothing of the driver: every kind that VirtualBox makes."""

from __future__ import annotations

import random
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tapfs.testing.model import MemoryFile

FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
MIB = 1 << 20
NULL, CREATION, MODIFICATION, CHILD = (uuid.UUID(int=number) for number in range(4))

DYNAMIC, FIXED, UNDO, DIFFERENCING = 1, 2, 3, 4


@dataclass
class VdiImage:
    """An image: `entries` is its map, `slots` are the contents of its slots by their number.

    A slot is `extra` bytes of noise, then the block. `old` makes the header of version 0.2, whose places are fixed.
    """

    size: int
    entries: Sequence[int]
    slots: Mapping[int, bytes] = field(default_factory=dict[int, bytes])
    kind: int = DYNAMIC
    block: int = MIB
    extra: int = 0
    map_at: int = MIB
    data_at: int = 2 * MIB
    header_length: int = 0x190
    old: bool = False
    creation: uuid.UUID = CREATION
    modification: uuid.UUID = MODIFICATION
    link: uuid.UUID = NULL
    parent_modification: uuid.UUID = NULL
    allocated: int | None = None
    comment: bytes = b""

    def content(self) -> bytes:
        """The bytes of the file."""
        used = [entry for entry in self.entries if entry < ZERO]
        allocated = len(used) if self.allocated is None else self.allocated
        table = struct.pack(f"<{len(self.entries)}I", *self.entries)
        head = b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + struct.pack("<I", 0xBEDA107F)
        geometry = struct.pack("<IIII", 0, 0, 0, 512)
        comment = self.comment.ljust(256, b"\0")
        if self.old:
            head += struct.pack("<III", 2, self.kind, 0) + comment + geometry
            head += struct.pack("<QIII", self.size, self.block, len(self.entries), allocated)
            head += b"".join(each.bytes_le for each in (self.creation, self.modification, self.link))
            self.map_at, self.data_at = len(head), len(head) + len(table)
        else:
            head += struct.pack("<IIII", 0x10001, self.header_length, self.kind, 0) + comment
            head += struct.pack("<II", self.map_at, self.data_at) + geometry + struct.pack("<I", 0)
            head += struct.pack("<QIIII", self.size, self.block, self.extra, len(self.entries), allocated)
            uuids = (self.creation, self.modification, self.link, self.parent_modification)
            head += b"".join(each.bytes_le for each in uuids)
            if self.header_length >= 0x190:
                head += geometry
        out = bytearray(head.ljust(self.map_at, b"\0") + table).ljust(self.data_at, b"\0")
        for number in range(max(self.slots, default=-1) + 1):
            out += b"x" * self.extra + self.slots.get(number, b"").ljust(self.block, b"\0")
        return bytes(out)

    def guest(self, backing: bytes = b"") -> bytes:
        """The bytes of the disk, over those of its parent."""
        out = bytearray()
        below = backing.ljust(self.size, b"\0")
        for index in range(-(-self.size // self.block)):
            entry = self.entries[index]
            piece = below[index * self.block : (index + 1) * self.block]
            if entry == ZERO:
                piece = bytes(self.block)
            elif entry != FREE:
                piece = self.slots.get(entry, b"").ljust(self.block, b"\0")
            out += piece
        return bytes(out[: self.size])


SMALL = 128 << 10

#: Kind: the bytes before each block, whether it has a parent, whether its header is the old one, whether it is fixed.
KINDS: dict[str, tuple[int, bool, bool, bool]] = {
    "dynamic": (0, False, False, False),
    "extra": (1024, False, False, False),
    "differencing": (0, True, False, False),
    "differencing-extra": (512, True, False, False),
    "old": (0, False, True, False),
    "fixed": (0, False, False, True),
}


def make(kind: str, size: int, seed: int) -> tuple[MemoryFile, bytes]:
    """An image of a kind with blocks in any order in it, and the bytes of its parent's disk."""
    extra, has_parent, old, fixed = KINDS[kind]
    choice = random.Random(seed)
    count = -(-size // SMALL)
    places = list(range(count if fixed else count // 2))
    if not fixed:
        choice.shuffle(places)
    entries = places + [choice.choice([FREE, FREE, ZERO]) for _ in range(count - len(places))]
    if not fixed:
        choice.shuffle(entries)
    slots = {number: choice.randbytes(SMALL) for number in places}
    type_ = DIFFERENCING if has_parent else FIXED if fixed else DYNAMIC
    link = CREATION if has_parent else NULL
    image = VdiImage(size, entries, slots, type_, SMALL, extra, creation=CHILD, link=link, old=old)
    return MemoryFile(image.content()), choice.randbytes(size * 3 // 4) if has_parent else b""


def by_bytes(data: bytes, backing: bytes = b"") -> bytes:
    """The guest's disk as the header and the map have it, and that the slots are numbered as QEMU counts on.

    Every slot has a number of its own, below the count of the header.
    """
    (version,) = struct.unpack_from("<I", data, 68)
    if version == 2:
        size, block, blocks, allocated = struct.unpack_from("<QIII", data, 352)
        extra, map_at = 0, 420
        data_at = map_at + 4 * blocks
    else:
        map_at, data_at = struct.unpack_from("<II", data, 340)
        size, block, extra, blocks, allocated = struct.unpack_from("<QIIII", data, 368)
    entries = struct.unpack_from(f"<{blocks}I", data, map_at)
    used = [entry for entry in entries if entry < ZERO]
    assert len(set(used)) == len(used)
    assert max(used, default=-1) < allocated
    out = bytearray(backing[:size].ljust(size, b"\0"))
    for index, entry in enumerate(entries):
        at = index * block
        if entry == FREE or at >= size:
            continue
        place = data_at + entry * (extra + block) + extra
        piece = bytes(block) if entry == ZERO else data[place : place + block]
        out[at : at + block] = piece[: min(block, size - at)]
    return bytes(out)
