"""qcow images of every kind for tests, and blktap's own reading of them, written independently."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib
from pathlib import Path

from tapfs.driver import BackingReference, CreateRequest, OpenRequest
from tapfs.formats.qcow import FORMAT
from tapfs.testing.model import MemoryFile, ModelDisk

#: Kind: options of create, whether it has a backing file, whether it is encrypted.
KINDS: dict[str, tuple[dict[str, str], bool, bool]] = {
    "qemu": ({}, False, False),
    "qemu-encrypted": ({}, False, True),
    "qemu-compressed": ({"cluster_size": "8192"}, False, False),
    "overlay": ({}, True, False),
    "overlay-encrypted": ({}, True, True),
    "overlay-compressed": ({"cluster_size": "4096"}, True, False),
    "blktap": ({"blktap": "on"}, False, False),
    "blktap-little": ({"blktap": "on"}, False, False),
    "blktap-reserve": ({"blktap": "on", "reserve": "on"}, False, False),
    "blktap-stale": ({"blktap": "on"}, False, False),
    "blktap-stray": ({"blktap": "on"}, False, False),
    "blktap-live-encrypted": ({"blktap": "on"}, False, True),
    "overlay-blktap": ({"blktap": "on"}, True, False),
    "overlay-12byte": ({"blktap": "on"}, True, False),
    "overlay-12byte-little": ({"blktap": "on"}, True, False),
}


def created(
    size: int, options: dict[str, str] | None = None, backing: str | None = None, *, encrypted: bool = False
) -> MemoryFile:
    """A new image."""
    file = MemoryFile()
    reference = None if backing is None else BackingReference(backing)
    file.apply(FORMAT.create(CreateRequest(size, reference, 1234567890, options or {}, encrypted)))
    return file


def opened(file: MemoryFile, backing: bytes = b"") -> ModelDisk:
    """The image, to be written."""
    driver = FORMAT.open(file, OpenRequest(writable=True))
    return ModelDisk(driver, file, backing)  # type: ignore[arg-type]


def make(kind: str, size: int, seed: int) -> tuple[MemoryFile, bytes]:
    """An image of a kind with some data in it, and the bytes of its backing disk."""
    options, has_backing, encrypted = KINDS[kind]
    choice = random.Random(seed)
    backing = choice.randbytes(size * 3 // 4) if has_backing else b""
    cipher_later = kind == "blktap-live-encrypted"
    file = created(size, options, "/images/base.raw" if has_backing else None, encrypted=encrypted and not cipher_later)
    if "12byte" in kind:
        to_12_byte_header(file)
    disk = opened(file, backing)
    rounded = disk.driver.geometry.virtual_size
    if kind.endswith("compressed"):
        fill_compressed(disk, choice)
    for _ in range(3):
        at = choice.randrange(rounded - 9000)
        disk.write(at, choice.randbytes(9000))
    disk.flush()
    if kind.endswith("little"):
        to_little_endian(file)
    if kind in {"blktap-stale", "blktap-stray"}:
        file.data[52:56] = b"\xde\xad\xbe\xef"
    if kind == "blktap-stray":
        put_stray_header(file)
    if cipher_later:
        file.data[36:40] = (1).to_bytes(4, "big")
    return MemoryFile(bytes(file.data)), backing


def fill_compressed(disk: ModelDisk, choice: random.Random) -> None:
    """Put compressed and plain clusters into a new image as a stream."""
    writer = disk.driver.stream()  # type: ignore[attr-defined]
    geometry = disk.driver.geometry
    for offset in range(0, geometry.virtual_size, geometry.granule * choice.choice([1, 3])):
        plain = choice.choice([choice.randbytes(geometry.granule), b"%016d" % offset * (geometry.granule // 16)])
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        packed = packer.compress(plain) + packer.flush()
        compressed = len(packed) < geometry.granule
        payload = packed if compressed else plain
        host_offset = writer.append(offset, len(payload), compressed=compressed)
        disk.file.data.extend(bytes(max(0, host_offset - len(disk.file.data))))
        disk.file.data[host_offset : host_offset + len(payload)] = payload
    disk.file.apply(writer.finish())
    disk.driver.flushed(disk.driver.flush())


def l1_range(data: bytes | bytearray) -> tuple[int, int]:
    """Where the L1 table of an image lies."""
    (size,) = struct.unpack_from(">Q", data, 24)
    (start,) = struct.unpack_from(">Q", data, 40)
    unit = 1 << (data[32] + data[33])
    return start, start + 8 * ((size + unit - 1) // unit)


def cksum(table: bytes) -> bytes:
    """The cksum of an L1 table as it stands in the header."""
    return hashlib.md5(table, usedforsecurity=False).digest()[3::-1]


def to_little_endian(file: MemoryFile) -> None:
    """Turn the L1 table round, as the tools of 2006 to 2008 had it; the cksum fits if it did before."""
    start, end = l1_range(file.data)
    table = bytes(file.data[start:end])
    turned = b"".join(table[at : at + 8][::-1] for at in range(0, len(table), 8))
    if file.data[52:56] == cksum(table):
        file.data[52:56] = cksum(turned)
    file.data[start:end] = turned
    if struct.unpack_from(">Q", file.data, 8)[0] != 60:
        file.data[60:64] = (1).to_bytes(4, "big")


def to_12_byte_header(file: MemoryFile) -> None:
    """Move the name to byte 60, over the flags, as in 2006."""
    (length,) = struct.unpack_from(">I", file.data, 16)
    name = bytes(file.data[64 : 64 + length])
    file.data[60 : 60 + length + 4] = name + bytes(4)
    file.data[8:16] = (60).to_bytes(8, "big")


def put_stray_header(file: MemoryFile) -> None:
    """Put what the tools of 2008 to 2010 left over the first L2 table."""
    start, end = l1_range(file.data)
    for at in range(start, end, 8):
        table = int.from_bytes(file.data[at : at + 8], "big")
        if table:
            file.data[table : table + 512] = (b"\xfbIFQ\x01\0\0\0" + bytes(range(1, 9))).ljust(512, b"\0")
            return
    raise AssertionError("no L2 table to damage")


def by_blktap(data: bytes, backing: bytes = b"") -> bytes:
    """The guest's disk as blktap reads it: from L1 alone where the cksum and the allocation unit say so."""
    name_at, _, _, size = struct.unpack_from(">QIIQ", data, 8)
    cluster, entries = 1 << data[32], 1 << data[33]
    start, end = l1_range(data)
    table = data[start:end]
    magic, minimum = data[48:52], int.from_bytes(data[56:60], "big")
    valid = start % 4096 == 0 and magic == b"XEN\xfb" and data[52:56] == cksum(table)
    from_l1_alone = valid and minimum == entries and not name_at
    out = bytearray(backing[:size].ljust(size, b"\0"))
    for index in range(len(table) // 8):
        word = table[8 * index : 8 * index + 8]
        l2 = max((n for n in (int.from_bytes(word, "big"), int.from_bytes(word, "little")) if n < len(data)), default=0)
        for entry in range(entries) if l2 else ():
            host = l2 + 8 * entries + entry * cluster
            if not from_l1_alone:
                host = int.from_bytes(data[l2 + 8 * entry : l2 + 8 * entry + 8], "big")
            at = (index * entries + entry) * cluster
            if host and at < size:
                piece = data[host : host + min(cluster, size - at)]
                out[at : at + len(piece)] = piece
    return bytes(out)


def write_to(file: MemoryFile, path: Path) -> Path:
    """The image as a real file."""
    path.write_bytes(bytes(file.data))
    return path
