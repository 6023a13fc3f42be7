"""The header of a QED image: fields, limits, parsing (QED Image File Format Specification, "Header")."""

from __future__ import annotations

import struct
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qed.signature import MAGIC

LENGTH = 64
ENTRY_LENGTH = 8

_HAS_BACKING, NEED_CHECK, _RAW_BACKING = 1, 2, 4
_KNOWN_FEATURES = _HAS_BACKING | NEED_CHECK | _RAW_BACKING

_MIN_CLUSTER, _MAX_CLUSTER = 1 << 12, 1 << 26
_MAX_TABLE_CLUSTERS = 16
_MAX_NAME = 1023

_LAYOUT = struct.Struct("<4sIIIQQQQQII")

#: Offsets of fields, for messages.
CLUSTER_SIZE_AT = 4
TABLE_SIZE_AT = 8
FEATURES_AT = 16
L1_OFFSET_AT = 40
IMAGE_SIZE_AT = 48
NAME_OFFSET_AT = 56


class Header(NamedTuple):
    """The fields of the header; `table_clusters` and `header_clusters` count clusters, all else is bytes."""

    magic: bytes
    cluster_size: int
    table_clusters: int
    header_clusters: int
    features: int
    compat_features: int
    autoclear_features: int
    l1_offset: int
    image_size: int
    name_offset: int
    name_length: int

    @property
    def table_bytes(self) -> int:
        """Bytes of the L1 table, and of each L2 table."""
        return self.table_clusters * self.cluster_size

    @property
    def table_entries(self) -> int:
        """Entries of a table."""
        return self.table_bytes // ENTRY_LENGTH

    @property
    def table_span(self) -> int:
        """Bytes of the disk that one L2 table maps."""
        return self.table_entries * self.cluster_size

    @property
    def tables(self) -> int:
        """L1 entries that the disk needs."""
        return -(-self.image_size // self.table_span)

    @property
    def header_end(self) -> int:
        """The host offset of the first cluster behind the header."""
        return max(1, self.header_clusters) * self.cluster_size

    @property
    def has_backing(self) -> bool:
        """Whether the image names a parent."""
        return bool(self.features & _HAS_BACKING)

    @property
    def backing_is_raw(self) -> bool:
        """Whether the image says that its parent is a raw disk."""
        return bool(self.features & _RAW_BACKING)

    @property
    def dirty(self) -> bool:
        """Whether a writer has left the image without closing it."""
        return bool(self.features & NEED_CHECK)


def parse_header(head: bytes, file: HostFile) -> Header:
    """The header in `head`, the first bytes of `file`.

    Raises ImageError naming the field: invalid_format where this is no QED image, unsupported, out_of_bounds or corrupt
    where it is one that cannot be read.
    """
    if len(head) < LENGTH or not head.startswith(MAGIC):
        raise ImageError(ErrorKind.INVALID_FORMAT, "not a QED image: no magic", path=file.path, offset=0, op="open")
    header = Header(*_LAYOUT.unpack_from(head))

    def refuse(kind: ErrorKind, message: str, offset: int) -> ImageError:
        return ImageError(kind, message, path=file.path, offset=offset, op="open")

    cluster = header.cluster_size
    if cluster & (cluster - 1) or not _MIN_CLUSTER <= cluster <= _MAX_CLUSTER:
        message = f"cluster_size is {cluster}, must be a power of two from {_MIN_CLUSTER} to {_MAX_CLUSTER}"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, CLUSTER_SIZE_AT)
    clusters = header.table_clusters
    if clusters & (clusters - 1) or not 1 <= clusters <= _MAX_TABLE_CLUSTERS:
        message = f"table_size is {clusters}, must be a power of two from 1 to {_MAX_TABLE_CLUSTERS}"
        raise refuse(ErrorKind.OUT_OF_BOUNDS, message, TABLE_SIZE_AT)
    unknown = header.features & ~_KNOWN_FEATURES
    if unknown:
        raise refuse(ErrorKind.UNSUPPORTED, f"unknown features {unknown:#x}", FEATURES_AT)
    if header.image_size % 512 or header.tables > header.table_entries:
        message = (
            f"image_size is {header.image_size}, must be whole sectors and at most {header.table_entries} L2 tables"
        )
        raise refuse(ErrorKind.CORRUPT, message, IMAGE_SIZE_AT)
    l1_end = header.l1_offset + header.tables * ENTRY_LENGTH
    if header.l1_offset % cluster or header.l1_offset < LENGTH or l1_end > file.size():
        message = f"the L1 table at {header.l1_offset:#x} is not aligned, or not in the file ({file.size():#x})"
        raise refuse(ErrorKind.CORRUPT, message, L1_OFFSET_AT)
    if header.has_backing and not (0 < header.name_length <= _MAX_NAME and header.name_offset < header.header_end):
        message = f"the name of the parent has {header.name_length} bytes at {header.name_offset:#x}"
        raise refuse(ErrorKind.CORRUPT, message, NAME_OFFSET_AT)
    return header
