"""The feature bits and the configuration space of a virtio-blk device, made of an image.

The specification is virtio 1.2, 5.2.3 and 5.2.4.
"""

from __future__ import annotations

import struct
from enum import IntFlag
from typing import TYPE_CHECKING

from tapfs.kernel.vhost_device import RANGES_MAX, RINGS_MAX, ZEROES_MAX

if TYPE_CHECKING:
    from tapfs.disk.image import Image

SECTOR = 512

#: Bytes of the configuration space that a front end may ask for; what is not defined reads as zeros.
CONFIGURATION_BYTES = 256

#: Pieces of memory in one request: of a ring of 128 two descriptors are for the header and the status.
_SEGMENTS = 126

#: A block that is read or written without more work than its bytes, as a power of two of sectors.
_PHYSICAL_EXPONENT = 3

#: capacity, size_max, seg_max, geometry, blk_size, physical_block_exp, alignment_offset, min_io_size, opt_io_size,
#: wce, unused, num_queues, and three words each for discards and for zeroes, the last of which is a byte.
_SPACE = struct.Struct("<QIIHBBIBBHIBBHIIIIIB")


class Feature(IntFlag):
    """The features of virtio, of its block device, and of vhost-user that we know."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LOG_ALL = 1 << 26
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


_ALWAYS = (
    Feature.SEG_MAX
    | Feature.BLK_SIZE
    | Feature.FLUSH
    | Feature.TOPOLOGY
    | Feature.MQ
    | Feature.LOG_ALL
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.PROTOCOL_FEATURES
    | Feature.VERSION_1
)


def features_of(image: Image) -> Feature:
    """The features that the disk of an image has."""
    return _ALWAYS | (Feature.DISCARD | Feature.WRITE_ZEROES if image.writable else Feature.RO)


def size_of(image: Image) -> int:
    """The bytes that a guest sees: whole sectors."""
    return image.size // SECTOR * SECTOR


def space_of(image: Image) -> bytes:
    """The configuration space of the disk of an image."""
    granule = max(image.granule // SECTOR, 1)
    most = ZEROES_MAX // SECTOR
    space = _SPACE.pack(
        size_of(image) // SECTOR,
        *(0, _SEGMENTS, 0, 0, 0),
        SECTOR,
        *(_PHYSICAL_EXPONENT, 0, min(1 << _PHYSICAL_EXPONENT, 0xFFFF), granule if granule > 1 else 0),
        *(0, 0, RINGS_MAX),
        *(most, RANGES_MAX, granule),
        *(most, RANGES_MAX, 1),
    )
    return space.ljust(CONFIGURATION_BYTES, b"\0")
