"""Partition tables that tapfs does not read, known by their signatures so that a user hears of them."""

from __future__ import annotations

import struct
from collections.abc import Callable

from tapfs.partitions.reader import Reader

_SECTOR = 512


def other_label(disk: Reader) -> str | None:
    """The name of the table on a disk or in a partition, if it is one of these; None else."""
    return next((name for name, is_there in _LABELS.items() if is_there(disk)), None)


def _sun(disk: Reader) -> bool:
    """A Sun disk label: big-endian dabe at byte 508, and all words of the sector together make 0 (XOR)."""
    sector = disk.read(0, _SECTOR)
    if len(sector) < _SECTOR or sector[508:510] != b"\xda\xbe":
        return False
    total = 0
    for at in range(0, _SECTOR, 2):
        total ^= int.from_bytes(sector[at : at + 2], "big")
    return total == 0


def _sgi(disk: Reader) -> bool:
    """An SGI volume header: its magic number first, and all words of the sector together make 0 (sum)."""
    sector = disk.read(0, _SECTOR)
    if len(sector) < _SECTOR or not sector.startswith(b"\x0b\xe5\xa9\x41"):
        return False
    return _sum(sector) == 0


def _bsd(disk: Reader) -> bool:
    """A BSD disklabel: its magic number twice, at 0 and 132, in the second sector or at byte 64 of the first."""
    magic = b"\x57\x45\x56\x82"
    places = (_SECTOR, 64)
    return any(disk.read(at, 4) == magic and disk.read(at + 132, 4) in {magic, magic[::-1]} for at in places)


def _mac(disk: Reader) -> bool:
    """An Apple partition map: a driver descriptor ("ER"), then a map entry ("PM") in the next block."""
    descriptor = disk.read(0, 4)
    block_size = int.from_bytes(descriptor[2:4], "big")
    return descriptor[:2] == b"ER" and block_size >= _SECTOR and disk.read(block_size, 2) == b"PM"


def _amiga(disk: Reader) -> bool:
    """An Amiga rigid disk block: in one of the first 16 sectors, and its words together make 0 (sum)."""
    for number in range(16):
        block = disk.read(number * _SECTOR, _SECTOR)
        if block.startswith(b"RDSK") and len(block) == _SECTOR:
            words = int.from_bytes(block[4:8], "big")
            return _sum(block[: 4 * min(words, _SECTOR // 4)]) == 0
    return False


def _sum(field: bytes) -> int:
    """The sum of its big-endian words of 32 bits, modulo 2^32."""
    return sum(int(word) for (word,) in struct.iter_unpack(">I", field)) & 0xFFFF_FFFF


_LABELS: dict[str, Callable[[Reader], bool]] = {
    "a Sun disk label": _sun,
    "an SGI volume header": _sgi,
    "a BSD disklabel": _bsd,
    "an Apple partition map": _mac,
    "an Amiga rigid disk block": _amiga,
}
