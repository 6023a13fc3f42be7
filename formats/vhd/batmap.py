"""Tapdisk's batmap: one bit for each block of a VHD that is full, whose bitmap need not be read.

docs/specs/vhd.md, "Tapdisk / xapi extensions". Only tapdisk's own images have one, from version 1.1 on. QEMU leaves the
batmap as it is. QEMU fills bitmaps only, so what is full stays full.
"""

from __future__ import annotations

import struct

from tapfs.driver import HostFile
from tapfs.formats.rounding import round_up
from tapfs.formats.vhd.checksum import complement_sum, signed_complement_sum
from tapfs.formats.vhd.dynamic_header import SECTOR, DynamicHeader
from tapfs.formats.vhd.footer import Footer
from tapfs.records import dataclass

COOKIE = b"tdbatmap"
TAPDISK = b"tap\0"
#: Versions of tapdisk as the footer has them: the first number in the high half, the second in the low one.
OLD_BITMAPS, FIRST_BATMAP = 0x00000001, 0x00010001

_LAYOUT = struct.Struct(">8sQIIIB")
_CHECKSUM_AT = 24
_KEY_AT = 29


@dataclass(slots=True)
class Batmap:
    """The batmap of an open image.

    `offset` is that of its header. `valid`: the checksum fits, so the bits count. `keyed`: the header holds the hash of
    a key, so the disk is encrypted.
    """

    offset: int
    map_offset: int
    bits: bytearray
    head: bytes
    valid: bool
    keyed: bool

    @property
    def end(self) -> int:
        """The first byte of the file behind the map."""
        return self.map_offset + len(self.bits)

    def is_full(self, block: int) -> bool:
        """Whether the map says that a block is full."""
        return self.valid and block // 8 < len(self.bits) and bool(self.bits[block // 8] & 0x80 >> block % 8)

    def clear(self, block: int) -> None:
        """Say that a block may lack sectors."""
        if block // 8 < len(self.bits):
            self.bits[block // 8] &= ~(0x80 >> block % 8) & 0xFF

    def sealed_head(self) -> bytes:
        """The header's sector with the checksum of the bits."""
        checksum = complement_sum(bytes(self.bits)).to_bytes(4, "big")
        return self.head[:_CHECKSUM_AT] + checksum + self.head[_CHECKSUM_AT + 4 :]


def batmap_offset(header: DynamicHeader) -> int:
    """The offset of the batmap's header: behind the block allocation table, which is padded to a sector."""
    return round_up(header.table_end, SECTOR)


def read_batmap(file: HostFile, footer: Footer, header: DynamicHeader) -> Batmap | None:
    """The batmap of tapdisk's image; None where there is none in the file."""
    if footer.creator != TAPDISK or footer.creator_version < FIRST_BATMAP:
        return None
    offset = batmap_offset(header)
    head = file.read(offset, SECTOR)
    if len(head) < SECTOR or not head.startswith(COOKIE):
        return None
    _, map_offset, sectors, _, checksum, _ = _LAYOUT.unpack_from(head)
    length = sectors * SECTOR
    needed = -(-header.max_entries // 8)
    if not needed <= length <= round_up(needed, 1 << 20) or map_offset + length > file.size():
        return Batmap(offset, map_offset, bytearray(), head, valid=False, keyed=head[_KEY_AT] != 0)
    raw = file.read(map_offset, length)
    sums = {complement_sum(raw)}
    if footer.creator_version == FIRST_BATMAP:
        sums.add(signed_complement_sum(raw))
    return Batmap(offset, map_offset, bytearray(raw), head, valid=checksum in sums, keyed=head[_KEY_AT] != 0)
