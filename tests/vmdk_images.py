"""VMDK images of every kind for tests, byte by byte from docs/specs/vmdk.md, written independently of the driver.

No tool on these machines writes COWD, seSparse, footers and markers, so these builders are a second, small writer. A
disk is given as a dict of grains: number to bytes, `ZERO` for a grain of zeros.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

SECTOR = 512
GRAIN_SECTORS = 16
TABLE_ENTRIES = 512

#: The content of a grain that an entry says is zeros, as opposed to one that is not there.
ZERO = b""

Grains = Mapping[int, bytes]


def sectors(length: int) -> int:
    return -(-length // SECTOR)


def padded(data: bytes, to: int = SECTOR) -> bytes:
    return data + bytes(-len(data) % to)


def descriptor(
    lines: Sequence[str],
    *,
    cid: int = 0x12345678,
    parent_cid: int = 0xFFFFFFFF,
    hint: str | None = None,
    create_type: str = "monolithicSparse",
    more: str = "",
) -> bytes:
    parent = "" if hint is None else f'parentFileNameHint="{hint}"\n'
    text = (
        f"# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID={parent_cid:08x}\n"
        f'createType="{create_type}"\n{parent}{more}\n# Extent description\n' + "\n".join(lines) + "\n\n"
        '# The Disk Data Base\n#DDB\n\nddb.adapterType = "ide"\nddb.virtualHWVersion = "4"\n'
    )
    return text.encode()


def read_grains(grains: Grains, size: int, grain: int, parent: bytes = b"") -> bytes:
    """The bytes of the disk."""
    disk = bytearray(parent[:size].ljust(size, b"\0"))
    for number, content in grains.items():
        at = number * grain
        disk[at : at + grain] = content.ljust(grain, b"\0")[: size - at]
    return bytes(disk)


def random_grains(choice: random.Random, size: int, grain: int, *, zeros: bool = False) -> dict[int, bytes]:
    """About half of the grains, some of them zeros."""
    found: dict[int, bytes] = {}
    for number in range(-(-size // grain)):
        if choice.random() < 0.5:
            compressible = choice.randbytes(16) * (grain // 16)
            found[number] = (
                ZERO if zeros and choice.random() < 0.2 else choice.choice([choice.randbytes(grain), compressible])
            )
    return found


def hosted(
    grains: Grains,
    size: int,
    text: bytes = b"",
    *,
    grain_sectors: int = GRAIN_SECTORS,
    entries: int = TABLE_ENTRIES,
    redundant: bool = True,
    all_tables: bool = True,
    version: int = 1,
    unclean: int = 0,
    flags: int | None = None,
    reverse: bool = False,
) -> bytes:
    """A hosted sparse extent of `size` bytes, with an embedded descriptor if there is a text."""
    grain = grain_sectors * SECTOR
    zeroed = ZERO in grains.values()
    table_sectors = sectors(4 * entries)
    tables = -(-sectors(size) // (entries * grain_sectors))
    directory_sectors = sectors(4 * tables)
    used = [all_tables or any(number // entries == index for number in grains) for index in range(tables)]
    at = 1 + (20 if text else 0)
    places: list[tuple[int, list[int]]] = []
    for _ in range(2 if redundant else 1):
        directory = at
        at += directory_sectors
        first: list[int] = []
        for index in range(tables):
            first.append(at if used[index] else 0)
            at += table_sectors if used[index] else 0
        places.append((directory, first))
    overhead = -(-at // grain_sectors) * grain_sectors
    at = overhead
    entry: dict[int, int] = {}
    body = b""
    for number in sorted(grains, reverse=reverse):
        if grains[number] == ZERO:
            entry[number] = 1
            continue
        entry[number] = at
        body += grains[number].ljust(grain, b"\0")
        at += grain_sectors
    if flags is None:
        flags = 1 | (2 if redundant else 0) | (4 if zeroed else 0)
    header = struct.pack(
        "<4sIIQQQQIQQQB4sH",
        b"KDMV",
        max(version, 2) if zeroed else version,
        flags,
        sectors(size),
        grain_sectors,
        1 if text else 0,
        20 if text else 0,
        entries,
        places[0][0] if redundant else 0,
        places[-1][0],
        overhead,
        unclean,
        b"\n \r\n",
        0,
    )
    head = padded(header) + (text.ljust(20 * SECTOR, b"\0") if text else b"")
    for _, first in places:
        head += padded(struct.pack(f"<{tables}I", *first))
        for index in range(tables):
            if used[index]:
                words = [entry.get(index * entries + each, 0) for each in range(entries)]
                head += padded(struct.pack(f"<{entries}I", *words))
    return head.ljust(overhead * SECTOR, b"\0") + body


def monolithic(grains: Grains, size: int, name: str = "disk.vmdk", **more: object) -> bytes:
    """A monolithicSparse image."""
    keys = {key: more.pop(key) for key in ("cid", "parent_cid", "hint", "more") if key in more}
    text = descriptor([f'RW {sectors(size)} SPARSE "{name}"'], **keys)  # type: ignore[arg-type]
    return hosted(grains, size, text, **more)  # type: ignore[arg-type]


def stream(
    grains: Grains,
    size: int,
    *,
    grain_sectors: int = 128,
    footer: bool = True,
    markers: bool = True,
    text: bool = True,
    order: Sequence[int] | None = None,
    short_last: bool = False,
) -> bytes:
    """A streamOptimized image as VMware's tools write it, or with the directory in front (`footer` False)."""
    grain = grain_sectors * SECTOR
    tables = -(-sectors(size) // (TABLE_ENTRIES * grain_sectors))
    said = descriptor([f'RW {sectors(size)} SPARSE "other.vmdk"'], create_type="streamOptimized")

    def head(directory: int) -> bytes:
        flags = 1 | 1 << 16 | (1 << 17 if markers else 0)
        return padded(
            struct.pack(
                "<4sIIQQQQIQQQB4sH",
                *(b"KDMV", 3, flags, sectors(size), grain_sectors, 1 if text else 0, 20 if text else 0, TABLE_ENTRIES),
                *(0, directory, 128, 0, b"\n \r\n", 1),
            )
        )

    def marker(count: int, kind: int) -> bytes:
        return padded(struct.pack("<QII", count, 0, kind))

    out = bytearray(128 * SECTOR)
    entry: dict[int, int] = {}
    chosen = sorted(grains) if order is None else order
    for number in chosen:
        data = grains[number].ljust(grain, b"\0")
        if short_last and number == (size - 1) // grain:
            data = data[: size - number * grain]
        packed = zlib.compress(data)
        entry[number] = len(out) // SECTOR
        prefix = struct.pack("<QI", number * grain_sectors, len(packed)) if markers else struct.pack("<I", len(packed))
        out += padded(prefix + packed)
    places: list[int] = []
    for index in range(tables):
        words = [entry.get(index * TABLE_ENTRIES + each, 0) for each in range(TABLE_ENTRIES)]
        if not any(words):
            places.append(0)
            continue
        if markers:
            out += marker(4, 1)
        places.append(len(out) // SECTOR)
        out += struct.pack(f"<{TABLE_ENTRIES}I", *words)
    directory = padded(struct.pack(f"<{tables}I", *places))
    if footer:
        out += marker(len(directory) // SECTOR, 2)
    place = len(out) // SECTOR
    out += directory
    if footer:
        out += marker(1, 3) + head(place) + marker(0, 0)
    out[:SECTOR] = head((1 << 64) - 1 if footer else place)
    if text:
        out[SECTOR : SECTOR + len(said)] = said
    return bytes(out)


def cowd(grains: Grains, size: int, *, grain_sectors: int = 1, unclean: int = 0, all_tables: bool = False) -> bytes:
    """A sparse extent of ESX."""
    tables = -(-sectors(size) // (4096 * grain_sectors))
    at = 4 + sectors(4 * tables)
    directory: list[int] = []
    body = bytearray()
    entry: dict[int, int] = {}
    used = [all_tables or any(number // 4096 == index for number in grains) for index in range(tables)]
    for index in range(tables):
        directory.append(at if used[index] else 0)
        at += 32 if used[index] else 0
    for number in sorted(grains):
        entry[number] = at + len(body) // SECTOR
        body += grains[number].ljust(grain_sectors * SECTOR, b"\0")
    free = at + len(body) // SECTOR
    head = bytearray(4 * SECTOR)
    head[:32] = struct.pack("<4s7I", b"COWD", 1, 3, sectors(size), grain_sectors, 4, tables, free)
    head[1648:1652] = unclean.to_bytes(4, "little")
    out = bytes(head) + padded(struct.pack(f"<{tables}I", *directory))
    for index in range(tables):
        if used[index]:
            out += struct.pack("<4096I", *(entry.get(index * 4096 + each, 0) for each in range(4096)))
    return out + bytes(body)


def sesparse(grains: Grains, size: int, *, unmapped: Sequence[int] = (), replay: int = 0) -> bytes:
    """A seSparse extent; the grains have 4 KiB."""
    tables = -(-sectors(size) // (4096 * 8))
    lengths = [1, 2, 16, sectors(8 * tables), 64 * tables, 8, 8]
    starts = [1]
    for length in lengths:
        starts.append(starts[-1] + length)
    starts[-1] = -(-starts[-1] // 8) * 8
    lengths.append(-(-sectors(size) // 8) * 8)
    pairs = [word for pair in zip(starts, lengths, strict=True) for word in pair]
    head = struct.pack("<26Q", 0xCAFEBABE, 0x200000001, sectors(size), 8, 64, 0, 0, 0, 0, 0, *pairs)
    out = bytearray(starts[-1] * SECTOR)
    out[: len(head)] = head
    out[starts[0] * SECTOR : starts[0] * SECTOR + 32] = struct.pack("<4Q", 0xCAFECAFE, tables, 1, replay)
    body = bytearray()
    entry = dict.fromkeys(unmapped, 1 << 60)
    for count, number in enumerate(sorted(grains)):
        if grains[number] == ZERO:
            entry[number] = 2 << 60
            continue
        place = len(body) // 4096
        entry[number] = 3 << 60 | (place & 0xFFF) << 48 | place >> 12
        body += grains[number].ljust(4096, b"\0")
        del count
    slot = 0
    for index in range(tables):
        words = [entry.get(index * 4096 + each, 0) for each in range(4096)]
        if any(words):
            directory = starts[3] * SECTOR + 8 * index
            out[directory : directory + 8] = struct.pack("<Q", 1 << 60 | slot)
            at = (starts[4] + 64 * slot) * SECTOR
            out[at : at + 32768] = struct.pack("<4096Q", *words)
            slot += 1
    return bytes(out + body)


def write_list(folder: Path, files: Sequence[tuple[str, str, bytes]], **keys: object) -> Path:
    """A descriptor `disk.vmdk` in the folder over files: type, name and content; the size is that of `sizes`."""
    sizes = keys.pop("sizes")
    lines = [f'RW {sectors(size)} {kind} "{name}"' for (kind, name, _), size in zip(files, sizes, strict=True)]  # type: ignore[call-overload]
    for _, name, content in files:
        (folder / name).write_bytes(content)
    path = folder / "disk.vmdk"
    path.write_bytes(descriptor(lines, **keys))  # type: ignore[arg-type]
    return path
