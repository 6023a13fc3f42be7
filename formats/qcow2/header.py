"""The qcow2 header, versions 2 and 3: its fields, their limits, parsing (QEMU's docs/interop/qcow2, "Header")."""

from __future__ import annotations

import struct

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2.signature import MAGIC, VERSIONS
from tapfs.records import NamedTuple

#: Bytes of the header of version 2, the least of version 3, and what QEMU writes for version 3.
LENGTH_2, LEAST_LENGTH_3, LENGTH_3 = 72, 104, 112

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_REFCOUNT_ORDER = 6
#: The width of refcounts of version 2, as the exponent of 2.
REFCOUNT_ORDER_2 = 4
MAX_NAME_LENGTH = 1023
MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
#: The specification has no limit; QEMU opens images of up to so many snapshots.
MAX_SNAPSHOTS = 65536
MAX_VIRTUAL_SIZE = (1 << 63) - 1
#: Bits 0 to 55 of an entry can be a place.
MAX_HOST_SIZE = 1 << 56

CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2
COMPRESSION_DEFLATE, COMPRESSION_ZSTD = 0, 1

#: Incompatible features: a reader must know them.
DIRTY, CORRUPT, DATA_FILE, COMPRESSION_TYPE, EXTENDED_L2 = (1 << bit for bit in range(5))
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2
#: Compatible features: a writer may ignore them.
LAZY_REFCOUNTS = 1
#: Autoclear features: a writer that does not keep them true clears them.
BITMAPS, RAW_DATA_FILE = 1, 2

WORD = 8
#: Subclusters of a cluster with extended L2 entries, and the least cluster that has them.
SUBCLUSTERS = 32
MIN_EXTENDED_CLUSTER_BITS = 14
#: Bytes of the part of an L2 table that is read, cached and written at once.
SLICE_BYTES = 4096

_COMMON = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")

#: Offsets of the fields, for messages and for partial rewrites.
VERSION_AT = 4
BACKING_OFFSET_AT, BACKING_SIZE_AT = 8, 16
CLUSTER_BITS_AT = 20
SIZE_AT = 24
CRYPT_METHOD_AT = 32
L1_ENTRIES_AT, L1_OFFSET_AT = 36, 40
REFTABLE_OFFSET_AT, REFTABLE_CLUSTERS_AT = 48, 56
SNAPSHOT_COUNT_AT, SNAPSHOTS_OFFSET_AT = 60, 64
INCOMPATIBLE_AT, COMPATIBLE_AT, AUTOCLEAR_AT = 72, 80, 88
REFCOUNT_ORDER_AT, HEADER_LENGTH_AT = 96, 100
COMPRESSION_TYPE_AT = 104


class Header(NamedTuple):
    """The fields of the header and what follows from them. Lengths and offsets in bytes."""

    version: int
    backing_offset: int
    backing_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_entries: int
    l1_offset: int
    reftable_offset: int
    reftable_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = REFCOUNT_ORDER_2
    header_length: int = LENGTH_2
    compression_type: int = COMPRESSION_DEFLATE

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """Whether an L2 entry has a second word, for its subclusters."""
        return self.incompatible & EXTENDED_L2 != 0

    @property
    def granule(self) -> int:
        """Bytes of the smallest piece that is mapped on its own: a cluster, or a subcluster."""
        return self.cluster_size // SUBCLUSTERS if self.extended_l2 else self.cluster_size

    @property
    def l2_entry_bytes(self) -> int:
        """Bytes of an L2 entry."""
        return 2 * WORD if self.extended_l2 else WORD

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table, which is a cluster."""
        return self.cluster_size // self.l2_entry_bytes

    @property
    def table_span(self) -> int:
        """Bytes of the virtual disk that one L2 table maps."""
        return self.l2_entries * self.cluster_size

    @property
    def slice_bytes(self) -> int:
        """Bytes of a slice of an L2 table."""
        return min(SLICE_BYTES, self.cluster_size)

    @property
    def slice_entries(self) -> int:
        """L2 entries of a slice."""
        return self.slice_bytes // self.l2_entry_bytes

    @property
    def slices(self) -> int:
        """Slices of one L2 table."""
        return self.cluster_size // self.slice_bytes

    @property
    def unit(self) -> int:
        """Bytes of the virtual disk that a slice maps: the map unit."""
        return self.slice_entries * self.cluster_size

    @property
    def l1_length(self) -> int:
        """Bytes of the L1 table."""
        return WORD * self.l1_entries

    @property
    def reftable_length(self) -> int:
        """Bytes of the refcount table."""
        return self.reftable_clusters << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """Bits of one refcount."""
        return 1 << self.refcount_order

    @property
    def block_entries(self) -> int:
        """Refcounts in one refcount block, which is a cluster."""
        return self.cluster_size * 8 >> self.refcount_order

    @property
    def has_backing(self) -> bool:
        """Whether the header names a parent."""
        return self.backing_offset != 0

    @property
    def has_data_file(self) -> bool:
        """Whether guest data is in a file of its own."""
        return self.incompatible & DATA_FILE != 0

    @property
    def has_raw_data_file(self) -> bool:
        """Whether the data file is a raw disk by itself. The bit means nothing in an image without a data file."""
        return self.has_data_file and self.autoclear & RAW_DATA_FILE != 0

    @property
    def lacks_raw_data_file(self) -> bool:
        """Whether the image says that its data file is raw, and has none: QEMU does not open it."""
        return not self.has_data_file and self.autoclear & RAW_DATA_FILE != 0

    @property
    def kept_autoclear(self) -> int:
        """The autoclear features that a writer keeps; the first change of the image clears every other one."""
        return self.autoclear & (BITMAPS | RAW_DATA_FILE if self.has_data_file else BITMAPS)

    def pack(self) -> bytes:
        """The header as QEMU writes it: 72 bytes of version 2, 112 of version 3."""
        fields = (self.backing_offset, self.backing_size, self.cluster_bits, self.size, self.crypt_method)
        tables = (self.l1_entries, self.l1_offset, self.reftable_offset, self.reftable_clusters)
        snapshots = (self.snapshot_count, self.snapshots_offset)
        packed = _COMMON.pack(MAGIC, self.version, *fields, *tables, *snapshots)
        if self.version == VERSIONS[0]:
            return packed
        bits = (self.incompatible, self.compatible, self.autoclear)
        packed += _VERSION_3.pack(*bits, self.refcount_order, self.header_length)
        return (packed + bytes([self.compression_type])).ljust(self.header_length, b"\0")


def l1_entries_for(size: int, header: Header) -> int:
    """Entries of the L1 table of a disk of `size` bytes."""
    return -(-size // header.table_span)


def parse_header(head: bytes, file: HostFile) -> Header:
    """The header in `head`, the first bytes of `file`.

    Raises ImageError, always with field, value and byte offset: invalid_format where this is no qcow2 image or a field
    has a value that none may have, unsupported, out_of_bounds or corrupt where it is beyond our limits.
    """
    if len(head) < LENGTH_2 or not head.startswith(MAGIC):
        cut = head[:4] == MAGIC[: len(head)]
        what = f"the file ends inside the header ({len(head)} bytes)" if cut else "no qcow2 magic"
        raise ImageError(ErrorKind.INVALID_FORMAT, f"not a qcow2 image: {what}", path=file.path, offset=0, op="open")
    fields: tuple[int, ...] = _COMMON.unpack_from(head)[1:]
    version = fields[0]
    if version not in VERSIONS:
        message = f"qcow version {version}, not 2 or 3"
        raise ImageError(ErrorKind.INVALID_FORMAT, message, path=file.path, offset=VERSION_AT, op="open")
    if version > VERSIONS[0]:
        if len(head) < LEAST_LENGTH_3:
            message = f"the file ends inside the header ({len(head)} bytes)"
            raise ImageError(ErrorKind.INVALID_FORMAT, message, path=file.path, offset=0, op="open")
        fields += _fields_of_version_3(head)
    header = Header(*fields)
    for kind, message, offset in _faults(header):
        raise ImageError(kind, message, path=file.path, offset=offset, op="open")
    return header


def _fields_of_version_3(head: bytes) -> tuple[int, ...]:
    """The fields behind those of version 2, in the order of `Header`."""
    fields: tuple[int, ...] = _VERSION_3.unpack_from(head, LENGTH_2)
    # A header of the least length has no compression type: it is deflate then.
    if fields[-1] > COMPRESSION_TYPE_AT and len(head) > COMPRESSION_TYPE_AT:
        return (*fields, head[COMPRESSION_TYPE_AT])
    return fields


def _faults(header: Header) -> list[tuple[ErrorKind, str, int]]:
    """What of the header cannot be, the worst first; features are not looked at here."""
    found: list[tuple[ErrorKind, str, int]] = []
    bits = header.cluster_bits
    if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:  # nothing else can be computed
        return [
            (
                ErrorKind.INVALID_FORMAT,
                f"cluster_bits is {bits}, must be {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}",
                CLUSTER_BITS_AT,
            )
        ]
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        message = f"refcount_order is {header.refcount_order}, the limit is {MAX_REFCOUNT_ORDER}"
        return [(ErrorKind.INVALID_FORMAT, message, REFCOUNT_ORDER_AT)]
    cluster_size, entries, length = header.cluster_size, header.l1_entries, header.header_length
    if header.version > VERSIONS[0] and not LEAST_LENGTH_3 <= length <= cluster_size:
        message = f"header_length is {length}, must be {LEAST_LENGTH_3} to {cluster_size}"
        found.append((ErrorKind.INVALID_FORMAT, message, HEADER_LENGTH_AT))
    if header.crypt_method > CRYPT_LUKS:
        found.append((ErrorKind.UNSUPPORTED, f"crypt_method is {header.crypt_method}: unknown", CRYPT_METHOD_AT))
    if header.size > MAX_VIRTUAL_SIZE:
        found.append((ErrorKind.OUT_OF_BOUNDS, f"size is {header.size:#x}, must be below 2^63", SIZE_AT))
    if header.l1_length > MAX_L1_BYTES:
        message = f"an L1 table of {entries} entries has {header.l1_length} bytes, the limit is {MAX_L1_BYTES}"
        found.append((ErrorKind.OUT_OF_BOUNDS, message, L1_ENTRIES_AT))
    if entries < (needed := l1_entries_for(header.size, header)):
        message = f"an L1 table of {entries} entries is too small for the disk, which needs {needed}"
        found.append((ErrorKind.INVALID_FORMAT, message, L1_ENTRIES_AT))
    if entries and header.l1_offset % cluster_size:
        found.append((ErrorKind.CORRUPT, f"l1_table_offset is {header.l1_offset:#x}, not on a cluster", L1_OFFSET_AT))
    if header.reftable_length > MAX_REFTABLE_BYTES:
        message = f"a refcount table of {header.reftable_length} bytes, the limit is {MAX_REFTABLE_BYTES}"
        found.append((ErrorKind.OUT_OF_BOUNDS, message, REFTABLE_CLUSTERS_AT))
    if header.has_backing:
        found += _faults_of_name(header)
    if header.snapshot_count > MAX_SNAPSHOTS:
        message = f"{header.snapshot_count} snapshots, the limit is {MAX_SNAPSHOTS}"
        found.append((ErrorKind.OUT_OF_BOUNDS, message, SNAPSHOT_COUNT_AT))
    if header.extended_l2 and bits < MIN_EXTENDED_CLUSTER_BITS:
        least = 1 << MIN_EXTENDED_CLUSTER_BITS
        message = f"extended L2 entries with clusters of {cluster_size} bytes, the least are {least}"
        found.append((ErrorKind.INVALID_FORMAT, message, CLUSTER_BITS_AT))
    kind = header.compression_type
    if (header.incompatible & COMPRESSION_TYPE != 0) != (kind != COMPRESSION_DEFLATE):
        message = f"compression type {kind} and the feature bit of compression types disagree"
        found.append((ErrorKind.INVALID_FORMAT, message, COMPRESSION_TYPE_AT))
    if kind not in (COMPRESSION_DEFLATE, COMPRESSION_ZSTD):
        found.append((ErrorKind.UNSUPPORTED, f"compression type {kind} is unknown", COMPRESSION_TYPE_AT))
    return found


def _faults_of_name(header: Header) -> list[tuple[ErrorKind, str, int]]:
    """What of the backing file's name cannot be."""
    found: list[tuple[ErrorKind, str, int]] = []
    start, end = header.backing_offset, header.backing_offset + header.backing_size
    if header.backing_size > MAX_NAME_LENGTH:
        message = f"backing_file_size is {header.backing_size}, the limit is {MAX_NAME_LENGTH}"
        found.append((ErrorKind.INVALID_FORMAT, message, BACKING_SIZE_AT))
    if start < header.header_length or end > header.cluster_size:
        message = f"the backing file's name [{start:#x}, {end:#x}) is not in the first cluster"
        found.append((ErrorKind.INVALID_FORMAT, message, BACKING_OFFSET_AT))
    return found


def is_extended(file: HostFile) -> bool:
    """Whether a file says that it has extended L2 entries; nothing else of the header is looked at."""
    head = file.read(0, LEAST_LENGTH_3)
    later = int.from_bytes(head[VERSION_AT:BACKING_OFFSET_AT], "big") > VERSIONS[0]
    return later and int.from_bytes(head[INCOMPATIBLE_AT:COMPATIBLE_AT], "big") & EXTENDED_L2 != 0
