"""Images for tests of reports: an overlay with a fault that has a place on the disk, and a disk with hostile names."""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from pathlib import Path

import tapfs

MIB = 1 << 20

#: A name that would end a script, begin an element, and turn the direction of writing.
HOSTILE = "</script><img src=x onerror=alert()>"

_LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


def overlay_with_faults(path: Path, base: Path) -> Path:
    """A qcow2 overlay of 64 MiB over a raw disk with data; two entries of it lead to one cluster."""
    with base.open("wb") as file:
        file.truncate(64 * MIB)
        file.seek(20 * MIB)
        file.write(b"base" * MIB)
    tapfs.create(str(path), "qcow2", backing=base.name, backing_format="raw")
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"over" * (MIB // 2))
        disk.write(40 * MIB, os.urandom(2 * MIB))
        disk.write_zeroes(50 * MIB, 4 * MIB)
    with path.open("r+b") as file:
        header = file.read(48)
        (l1,) = struct.unpack_from(">Q", header, 40)
        file.seek(l1)
        l2 = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
        file.seek(l2 + 8 * (40 * MIB >> 16))
        entry = file.read(8)
        file.seek(l2 + 8 * ((40 * MIB >> 16) + 5))
        file.write(entry)
    return path


def hostile_image(path: Path) -> Path:
    """A raw disk of 8 MiB with a GPT whose one partition has a hostile name."""
    disk = bytearray(8 * MIB)
    disk[446:462] = struct.pack("<BBBBBBBBII", 0, 0, 2, 0, 0xEE, 255, 255, 255, 1, 8 * MIB // 512 - 1)
    disk[510:512] = b"\x55\xaa"
    name = HOSTILE.encode("utf-16-le")
    entries = struct.pack("<16s16sQQQ72s", _LINUX.bytes_le, bytes(range(16)), 2048, 8191, 0, name).ljust(
        128 * 128, b"\0"
    )
    disk[1024 : 1024 + len(entries)] = entries
    fields = (1, 8 * MIB // 512 - 1, 34, 8 * MIB // 512 - 34, bytes(range(16)), 2, 128, 128, zlib.crc32(entries))
    header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *fields)
    disk[512:604] = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    path.write_bytes(disk)
    return path
