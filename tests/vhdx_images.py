"""VHDX images for tests, built byte by byte from MS-VHDX without any code of the driver.

Nothing else on these machines writes differencing images, sectors of 4096 bytes and pending logs. 7-Zip, libvhdi and
dissect read what this module makes (tests/peer/test_vhdx.py), so it is judged by others than the driver.
"""

from __future__ import annotations

import random
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

KIB, MIB = 1 << 10, 1 << 20
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, PRESENT, PARTIAL = 0, 1, 2, 3, 6, 7

BAT_REGION = "2DC27766-F623-4200-9D64-115E9BFD4A08"
METADATA_REGION = "8B7CA206-4790-4B9A-B8FE-575F050F886E"
FILE_PARAMETERS = "CAA16737-FA36-4D43-B3B6-33F0AA44E76B"
DISK_SIZE = "2FA54224-CD1B-4876-B211-5DBED83BF4B8"
DISK_ID = "BECA12AB-B2E6-4523-93EF-C309E000C746"
LOGICAL_SECTOR = "8141BF1D-A96F-4709-BA47-F233A8FAAB5F"
PHYSICAL_SECTOR = "CDA348C7-445D-4471-9CC9-E9885251C556"
PARENT_LOCATOR = "A8D35F2D-B30B-454D-ABF7-D3D84834AB0C"
VHDX_LOCATOR = "B04AEFB7-D19E-4A81-B789-25B8E9445913"

DATA_GUID = "0f0e0d0c-0b0a-0908-0706-050403020100"
PARENT_GUID = "11111111-2222-3333-4444-555555555555"
LOG_GUID = "99999999-8888-7777-6666-555555555555"
NO_GUID = "00000000-0000-0000-0000-000000000000"

#: Where the parts of every image stand, and where the blocks begin.
LOG_AT, LOG_BYTES, METADATA_AT, BAT_AT, BLOCKS_AT = MIB, MIB, 2 * MIB, 3 * MIB, 4 * MIB
HEADERS, REGION_TABLES = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)


@lru_cache(maxsize=64)
def crc32c(data: bytes) -> int:
    """The checksum bit by bit, of a few KiB."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 * (value & 1))
    return value ^ 0xFFFFFFFF


def summed(raw: bytes, length: int, at: int = 4) -> bytes:
    """A structure padded to its length, with its checksum in place."""
    whole = raw.ljust(length, b"\0")
    return whole[:at] + struct.pack("<I", crc32c(whole)) + whole[at + 4 :]


def guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


def header(
    sequence: int,
    *,
    log: str = NO_GUID,
    data: str = DATA_GUID,
    log_at: int = LOG_AT,
    log_bytes: int = LOG_BYTES,
    version: int = 1,
    log_version: int = 0,
) -> bytes:
    fields = struct.pack("<HHIQ", log_version, version, log_bytes, log_at)
    return summed(
        b"head" + bytes(4) + struct.pack("<Q", sequence) + guid(LOG_GUID) + guid(data) + guid(log) + fields, 4096
    )


def region_table(regions: Sequence[tuple[str, int, int, int]]) -> bytes:
    raw = b"regi" + bytes(4) + struct.pack("<II", len(regions), 0)
    return summed(raw + b"".join(guid(name) + struct.pack("<QII", *rest) for name, *rest in regions), 64 * KIB)


def locator(entries: Mapping[str, str]) -> bytes:
    table, strings = b"", b""
    start = 20 + 12 * len(entries)
    for key, value in entries.items():
        stored = key.encode("utf-16-le"), value.encode("utf-16-le")
        at = start + len(strings)
        table += struct.pack("<IIHH", at, at + len(stored[0]), len(stored[0]), len(stored[1]))
        strings += b"".join(stored)
    return guid(VHDX_LOCATOR) + struct.pack("<HH", 0, len(entries)) + table + strings


def metadata(items: Sequence[tuple[str, bytes, int]]) -> bytes:
    table = b"metadata" + struct.pack("<HH20x", 0, len(items))
    content = b""
    for name, data, flags in items:
        table += guid(name) + struct.pack("<IIII", 64 * KIB + len(content), len(data), flags, 0)
        content += data
    return table.ljust(64 * KIB, b"\0") + content


@dataclass
class Image:
    """An image to be built. `blocks`: number to state and bytes; `sectors`: those that a PARTIAL block has itself.

    `parent`: the entries of the parent locator. `places`: the places of blocks in the file, if not one after another.
    """

    size: int
    block: int = MIB
    sector: int = 512
    physical: int = 4096
    blocks: dict[int, tuple[int, bytes]] = field(default_factory=dict[int, tuple[int, bytes]])
    sectors: dict[int, Iterable[int]] = field(default_factory=dict[int, Iterable[int]])
    parent: dict[str, str] | None = None
    places: dict[int, int] = field(default_factory=dict[int, int])
    data: str = DATA_GUID
    flags: int = 0
    further: Sequence[tuple[str, bytes, int]] = ()

    @property
    def chunk(self) -> int:
        """The blocks of a chunk."""
        return (1 << 23) * self.sector // self.block

    def entry_at(self, number: int) -> int:
        """Where the entry of a block stands in the file."""
        return BAT_AT + 8 * (number + number // self.chunk)

    def bitmap_entry_at(self, chunk: int) -> int:
        return BAT_AT + 8 * (chunk * (self.chunk + 1) + self.chunk)

    def build(self) -> bytearray:
        out = bytearray(BLOCKS_AT)

        def put(at: int, raw: bytes) -> None:
            out.extend(bytes(max(0, at + len(raw) - len(out))))
            out[at : at + len(raw)] = raw

        put(0, b"vhdxfile" + "by hand".encode("utf-16-le"))
        for sequence, at in enumerate(HEADERS, 7):
            put(at, header(sequence, data=self.data))
        regions = [(BAT_REGION, BAT_AT, MIB, 1), (METADATA_REGION, METADATA_AT, MIB, 1)]
        for at in REGION_TABLES:
            put(at, region_table(regions))
        put(METADATA_AT, metadata(self.items()))
        end = BLOCKS_AT
        bitmaps: dict[int, int] = {}
        for number, (state, data) in self.blocks.items():
            place = 0
            if state in {PRESENT, PARTIAL}:
                place = self.places.get(number, end)
                put(place, data.ljust(self.block, b"\0"))
                end = max(end, len(out))
            put(self.entry_at(number), struct.pack("<Q", place | state))
            if state == PARTIAL:
                chunk = number // self.chunk
                if chunk not in bitmaps:
                    bitmaps[chunk] = end
                    put(self.bitmap_entry_at(chunk), struct.pack("<Q", end | PRESENT))
                    put(end, bytes(MIB))
                    end += MIB
                first = number % self.chunk * (self.block // self.sector)
                for sector in self.sectors.get(number, ()):
                    out[bitmaps[chunk] + (first + sector) // 8] |= 1 << (first + sector) % 8
        return out

    def items(self) -> list[tuple[str, bytes, int]]:
        """The items of the metadata."""
        flags = self.flags | (2 if self.parent is not None else 0)
        items = [
            (FILE_PARAMETERS, struct.pack("<II", self.block, flags), 4),
            (DISK_SIZE, struct.pack("<Q", self.size), 6),
            (DISK_ID, bytes(range(16)), 6),
            (LOGICAL_SECTOR, struct.pack("<I", self.sector), 6),
            (PHYSICAL_SECTOR, struct.pack("<I", self.physical), 6),
        ]
        if self.parent is not None:
            items.append((PARENT_LOCATOR, locator(self.parent), 4))
        return [*items, *self.further]


def named_parent(name: str, linkage: str = PARENT_GUID) -> dict[str, str]:
    return {"parent_linkage": "{" + linkage + "}", "relative_path": ".\\" + name}


@dataclass
class Entry:
    """An entry of a log: pages ``(offset, 4096 bytes)``, zeros ``(offset, length)``, in the order of the list."""

    sequence: int
    changes: Sequence[tuple[int, bytes | int]] = ()
    tail: int | None = None
    log: str = LOG_GUID
    flushed: int = BLOCKS_AT
    last: int = BLOCKS_AT

    def pack(self, own_place: int) -> bytes:
        sequence = struct.pack("<Q", self.sequence)
        descriptors, sectors = b"", b""
        for at, what in self.changes:
            if isinstance(what, int):
                descriptors += b"zero" + bytes(4) + struct.pack("<QQ", what, at) + sequence
                continue
            descriptors += b"desc" + what[-4:] + what[:8] + struct.pack("<Q", at) + sequence
            sectors += b"data" + sequence[4:] + what[8:-4] + sequence[:4]
        head_bytes = -(-(64 + len(descriptors)) // 4096) * 4096
        length = head_bytes + len(sectors)
        tail = own_place if self.tail is None else self.tail
        head = b"loge" + bytes(4) + struct.pack("<II", length, tail) + sequence
        head += struct.pack("<II", len(self.changes), 0) + guid(self.log) + struct.pack("<QQ", self.flushed, self.last)
        return summed((head + descriptors).ljust(head_bytes, b"\0") + sectors, length)


def put_log(image: bytearray, entries: Sequence[Entry], *, start: int = 0, guid_in_header: str = LOG_GUID) -> list[int]:
    """Put entries one after the other into the ring from `start` on, name the log in both headers; their places."""
    places: list[int] = []
    at = start
    for entry in entries:
        raw = entry.pack(at)
        places.append(at)
        for done in range(0, len(raw), 4096):
            place = LOG_AT + (at + done) % LOG_BYTES
            image[place : place + 4096] = raw[done : done + 4096]
        at = (at + len(raw)) % LOG_BYTES
    for sequence, place in enumerate(HEADERS, 7):
        image[place : place + 4096] = header(sequence, log=guid_in_header)
    return places


#: Kind: the image, and whether it is over a parent.
KINDS = ("dynamic", "fixed", "large sectors", "differencing", "differencing large sectors", "unlogged")


def make(kind: str, size: int, seed: int) -> tuple[bytearray, bytes]:
    """An image of a kind with blocks in every state, and the bytes of its parent's disk, which is shorter."""
    choice = random.Random(seed)
    sector = 4096 if "large" in kind else 512
    size = size // sector * sector
    over_parent = "differencing" in kind
    image = Image(size, sector=sector, parent=named_parent("p.vhdx") if over_parent else None)
    states = [NOT_PRESENT, NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, PRESENT, *([PARTIAL] * 3 if over_parent else [])]
    for number in range(-(-size // MIB)):
        state = PRESENT if kind == "fixed" else choice.choice(states)
        image.blocks[number] = (state, choice.randbytes(MIB) if state in {PRESENT, PARTIAL} else b"")
        per_block = MIB // sector
        first = choice.randrange(per_block)
        image.sectors[number] = range(first, choice.randrange(first, per_block) + 1, choice.choice([1, 3]))
    image.flags = int(kind == "fixed")
    data = image.build()
    if kind == "unlogged":
        for sequence, at in enumerate(HEADERS, 7):
            data[at : at + 4096] = header(sequence, log_bytes=0, log_at=0)
    return data, choice.randbytes(size * 3 // 4) if over_parent else b""
