"""DMG images by bytes: a small writer of docs/specs/dmg.md, for nothing here writes them."""

from __future__ import annotations

import bz2
import lzma
import plistlib
import struct
import zlib
from collections.abc import Callable, Sequence

SECTOR = 512
ZERO, RAW, IGNORED, COMMENT, END = 0, 1, 2, 0x7FFFFFFE, 0xFFFFFFFF
ADC, ZLIB, BZIP2, LZFSE, LZMA = range(0x80000004, 0x80000009)


def adc(data: bytes) -> bytes:
    """ADC: runs of one byte as copies with a distance of 0, the rest literal."""
    out = bytearray()
    at = 0
    while at < len(data):
        run = 1
        while at + run < len(data) and data[at + run] == data[at] and run < 64:
            run += 1
        if run >= 20:
            out += bytes([0x80, data[at]])
            left = run - 1
            if left >= 4:
                out += bytes([0x40 | (left - 4), 0, 0])
            else:
                out += bytes([(left - 3) << 2, 0])
            at += run
            continue
        piece = data[at : at + min(100, len(data) - at)]
        out += bytes([0x80 | (len(piece) - 1)]) + piece
        at += len(piece)
    return bytes(out)


PACK: dict[int, Callable[[bytes], bytes]] = {
    ADC: adc,
    ZLIB: zlib.compress,
    BZIP2: bz2.compress,
    LZMA: lambda data: lzma.compress(data, format=lzma.FORMAT_XZ),
}


def table(first: int, blocks: Sequence[tuple[int, int, int, int, int]], unpacked: bytes) -> bytes:
    """A table of blocks: kind, sector in the partition, sectors, offset and length in the data fork."""
    total = sum(count for kind, _, count, _, _ in blocks if kind not in (COMMENT, END))
    head = struct.pack(">4sIQQQII24x", b"mish", 1, first, total, 0, 0x208, 3) + struct.pack(
        ">III124x", 2, 32, zlib.crc32(unpacked)
    )
    body = b"".join(struct.pack(">IIQQQQ", kind, 0, *rest) for kind, *rest in blocks)
    return head + struct.pack(">I", len(blocks)) + body


def _packed(kind: int, content: bytes) -> bytes:
    return PACK[kind](content) if kind in PACK else content


def image(
    parts: Sequence[tuple[int, Sequence[tuple[int, bytes]]]],
    *,
    pack: Callable[[int, bytes], bytes] | None = None,
    sectors: int | None = None,
    resources: bool = False,
    damage: Callable[[bytearray], None] | None = None,
) -> bytes:
    """An image of partitions: the first sector of each, and its blocks as kinds and contents."""
    packed = pack or _packed
    data = bytearray()
    tables: list[bytes] = []
    last = 0
    for first, blocks in parts:
        at = 0
        rows: list[tuple[int, int, int, int, int]] = [(COMMENT, 0, 0, 0, 0)]
        for kind, content in blocks:
            payload = b"" if kind in (ZERO, IGNORED) else packed(kind, content)
            rows.append((kind, at, len(content) // SECTOR, len(data), len(payload)))
            data += payload
            at += len(content) // SECTOR
        rows.append((END, at, 0, len(data), 0))
        tables.append(table(first, rows, b"".join(content for kind, content in blocks if kind != IGNORED)))
        last = max(last, first + at)
    file = bytearray(data)
    if resources:
        body = b"".join(struct.pack(">I", len(each)) + each for each in (b"junk", *tables))
        fork = struct.pack(">IIII", 256, 256 + len(body), len(body), 0).ljust(256, b"\0") + body
        fork_at, plist_at, plist = len(file), 0, b""
        file += fork
    else:
        blkx = [
            {"Attributes": "0x0050", "Data": each, "ID": str(i), "Name": f"part {i} (Apple_HFS : {i})"}
            for i, each in enumerate(tables)
        ]
        plist = plistlib.dumps({"resource-fork": {"blkx": blkx}})
        fork, fork_at, plist_at = b"", 0, len(file)
        file += plist
    trailer = bytearray(
        struct.pack(
            ">4sIII QQQQQ II 16s III",
            *(b"koly", 4, 512, 1),
            *(0, 0, len(data), fork_at, len(fork), 1, 1, bytes(16)),
            *(2, 32, zlib.crc32(data)),
        ).ljust(512, b"\0")
    )
    struct.pack_into(">QQ", trailer, 216, plist_at, len(plist))
    struct.pack_into(">IQ", trailer, 488, 1, last if sectors is None else sectors)
    if damage is not None:
        damage(trailer)
    return bytes(file + trailer)
