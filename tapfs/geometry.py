"""The constants of an open image: its size, its units, its parent, its codec and its cipher."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Codec(IntEnum):
    """How a COMPRESSED extent is packed. The engine's C enum has the same values."""

    NONE = 0
    RAW_DEFLATE = 1


class Cipher(IntEnum):
    """The image-level transform of DATA extents. The engine's C enum has the same values."""

    NONE = 0
    #: AES-128-CBC per 512-byte sector, IV = little-endian guest sector number (QEMU's "aes").
    AES_128_CBC_SECTOR = 1


class BackingReference(NamedTuple):
    """The parent that an image names. `format` is None where the header is silent."""

    name: str
    format: str | None = None


#: The largest disk, in bytes: no map unit that begins in it ends past the largest offset of a host file.
MAX_DISK_BYTES = (1 << 63) - 1 - (1 << 30)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The constants of an open image, all lengths in bytes.

    `virtual_size`: at most `MAX_DISK_BYTES`; an image of a larger disk is refused when it is opened.
    `granule`: the smallest piece mapped on its own; reservations are aligned to it (the last
    one may reach past `virtual_size`). `map_unit`: a multiple of `granule` whose map `map`
    answers whole, and which the engine caches whole (one L2 table, one grain table); at most
    1 GiB. `identity`: every byte is at the same offset of file 0, writable in place for a
    writable image; the engine then asks for no map at all. A COMPRESSED extent is one granule.
    """

    virtual_size: int
    granule: int
    map_unit: int
    identity: bool = False
    backing: BackingReference | None = None
    codec: Codec = Codec.NONE
    cipher: Cipher = Cipher.NONE
