"""The 512-byte footer of a VHD: fields, checksum, parsing, serialising (docs/specs/vhd.md, "Footer, 512 bytes").

The footer is the last sector of the file. An image that grows has a copy of it at offset 0. Virtual PC before 2004
wrote 511 bytes; the last byte of the footer is reserved.
"""

from __future__ import annotations

import struct

from tapfs.formats.vhd.checksum import checksum_without
from tapfs.records import NamedTuple

COOKIE = b"conectix"
#: The cookie of an image that blktap's owner has disabled.
POISON = b"v_poison"
LENGTH = 512
#: The footer of Virtual PC before 2004.
SHORT_LENGTH = 511

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
SUBFORMATS = {FIXED: "fixed", DYNAMIC: "dynamic", DIFFERENCING: "differencing"}

#: Features: a bit that is always set.
RESERVED_FEATURE = 2
VERSION = 0x00010000
#: The data offset of a fixed image.
NO_OFFSET = (1 << 64) - 1
#: Seconds from 1970 to 2000, where the format's time begins.
EPOCH = 946684800

_LAYOUT = struct.Struct(">8sIIQI4sI4sQQHBBII16sBB")

#: Offsets of fields, for messages.
DATA_OFFSET_AT = 16
CURRENT_SIZE_AT = 48
TYPE_AT = 60
CHECKSUM_AT = 64
_HIDDEN_AT = 85


class Footer(NamedTuple):
    """The fields of a footer, sizes and offsets in bytes, `timestamp` in seconds since 2000."""

    features: int
    version: int
    data_offset: int
    timestamp: int
    creator: bytes
    creator_version: int
    creator_host: bytes
    original_size: int
    current_size: int
    cylinders: int
    heads: int
    sectors_per_track: int
    type: int
    checksum: int
    uuid: bytes
    saved_state: int
    hidden: int
    #: What stands behind the fields, kept as it is.
    reserved: bytes = bytes(LENGTH - _LAYOUT.size)

    @property
    def geometry_size(self) -> int:
        """Bytes of a disk of the geometry in the footer."""
        return self.cylinders * self.heads * self.sectors_per_track * 512

    @property
    def subformat(self) -> str:
        """The type in the words of qemu-img."""
        return SUBFORMATS.get(self.type, f"type {self.type}")

    @property
    def creator_name(self) -> str:
        """The creator in letters, without the blanks and NULs behind them."""
        return self.creator.rstrip(b"\0 ").decode("ascii", "backslashreplace")

    def same_disk(self, other: Footer) -> bool:
        """Whether both describe one disk: two footers of one image differ in what changes over time only."""
        mine = (self.uuid, self.current_size, self.type, self.data_offset)
        return mine == (other.uuid, other.current_size, other.type, other.data_offset)

    def pack(self) -> bytes:
        """The 512 bytes on disk, the checksum as it is in the field."""
        return _LAYOUT.pack(COOKIE, *self[:-1]) + self.reserved

    def sealed(self) -> Footer:
        """The same with the checksum that fits."""
        return self._replace(checksum=checksum_without(self.pack(), CHECKSUM_AT))

    @property
    def fits(self) -> bool:
        """Whether the checksum fits. Tapdisk 0.1 and 1.1 set `hidden` without renewing the checksum."""
        raw = self.pack()
        if checksum_without(raw, CHECKSUM_AT) == self.checksum:
            return True
        unhidden = raw[:_HIDDEN_AT] + b"\0" + raw[_HIDDEN_AT + 1 :]
        return self.hidden == 1 and checksum_without(unhidden, CHECKSUM_AT) == self.checksum


def parse_footer(raw: bytes) -> Footer | None:
    """The footer in 511 or 512 bytes, whatever its checksum; None for bytes that do not begin with its cookie."""
    if len(raw) < SHORT_LENGTH or not raw.startswith(COOKIE):
        return None
    raw = raw[:LENGTH].ljust(LENGTH, b"\0")
    return Footer(*_LAYOUT.unpack_from(raw)[1:])._replace(reserved=raw[_LAYOUT.size :])
