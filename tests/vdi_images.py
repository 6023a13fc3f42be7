"""VDI images written by hand from docs/specs/vdi.md, with nothing of the driver: every kind that VirtualBox makes."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
MIB = 1 << 20
NULL, CREATION, MODIFICATION = (uuid.UUID(int=number) for number in range(3))

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
