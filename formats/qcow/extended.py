"""The extended header that blktap put at byte 48 (docs/specs/blktap-qcow.md, "Extended header")."""

from __future__ import annotations

import struct

from tapfs.formats.qcow.header import Header
from tapfs.records import NamedTuple

MAGIC = b"XEN\xfb"
OFFSET = 48
LENGTH = 16
#: Until 2006-12-14 there was no flags word; the backing name stood in its place.
SHORT_LENGTH = 12
CKSUM_AT = 52
MIN_CLUSTER_ALLOC_AT = 56
FLAGS_AT = 60

#: The extended header counts only where the L1 table is aligned so.
L1_ALIGNMENT = 4096

FLAG_SPARSE = 0x01
FLAG_L1_BIG_ENDIAN = 0x02

_LAYOUT = struct.Struct(">4sIII")


class ExtendedHeader(NamedTuple):
    """Its words; `flags` is None in the 12-byte form of 2006."""

    cksum: int
    min_cluster_alloc: int
    flags: int | None

    @property
    def length(self) -> int:
        """Bytes that it takes on disk."""
        return SHORT_LENGTH if self.flags is None else LENGTH

    @property
    def big_endian_flag(self) -> bool:
        """Whether it says that L1 is big endian. Before 2008 the bit meant something else."""
        return bool((self.flags or 0) & FLAG_L1_BIG_ENDIAN)

    def pack(self) -> bytes:
        """The bytes on disk, 12 or 16."""
        return _LAYOUT.pack(MAGIC, self.cksum, self.min_cluster_alloc, self.flags or 0)[: self.length]


def parse_extended(head: bytes, header: Header) -> ExtendedHeader | None:
    """The extended header in `head`, the first bytes of the file, if there is one that counts.

    Its cksum is not verified here: that needs the L1 table.
    """
    if header.l1_table_offset % L1_ALIGNMENT or head[OFFSET : OFFSET + 4] != MAGIC:
        return None
    name_at = header.backing_file_offset if header.has_backing else 0
    if len(head) < OFFSET + LENGTH or 0 < name_at < OFFSET + SHORT_LENGTH:
        return None
    _, cksum, min_cluster_alloc, flags = _LAYOUT.unpack_from(head, OFFSET)
    short = name_at == OFFSET + SHORT_LENGTH
    return ExtendedHeader(cksum, min_cluster_alloc, None if short else flags)


def table_cksum(table: bytes | bytearray | memoryview) -> int:
    """The cksum of an L1 table with these bytes on disk.

    Four digest bytes, loaded as a little-endian word by the hosts of the time.
    """
    import hashlib  # few images have the sum, and loading takes as long as all else of a small driver

    return int.from_bytes(hashlib.md5(table, usedforsecurity=False).digest()[:4], "little")
