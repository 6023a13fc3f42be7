"""Create qcow2 images with the options, the defaults and the layout of qemu-img.

The file begins with the header, the refcount table, the refcount blocks and the L1 table. A preallocated image has its
L2 tables and clusters behind them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from tapfs.driver import CreateRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import encode
from tapfs.formats.luks.options import LUKS_OPTIONS
from tapfs.formats.preallocation import FALLOC, FULL, METADATA, preallocation_of, space_stages
from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.backing import format_word
from tapfs.formats.qcow2.counts import Counting
from tapfs.formats.qcow2.entries import BYTE_ORDER, COPIED, TYPECODE
from tapfs.formats.qcow2.header import (
    COMPRESSION_DEFLATE,
    COMPRESSION_TYPE,
    CRYPT_LUKS,
    CRYPT_NONE,
    DATA_FILE,
    EXTENDED_L2,
    LAZY_REFCOUNTS,
    LENGTH_2,
    LENGTH_3,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_NAME_LENGTH,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    RAW_DATA_FILE,
    REFCOUNT_ORDER_2,
    WORD,
    Header,
    l1_entries_for,
)
from tapfs.formats.qcow2.option_values import COMPAT, COMPRESSION, SWITCH
from tapfs.formats.rounding import round_up
from tapfs.plan import Grow, Plan, Step, Write, plan
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from tapfs.formats.luks.create import LuksOptions

CREATE_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "compat": "1.1 (default): version 3; 0.10: version 2, for readers of before 2012",
        "cluster_size": "bytes, a power of two from 512 to 2M (default 64K)",
        "refcount_bits": "bits of a reference count, a power of two from 1 to 64 (default 16)",
        "lazy_refcounts": "on: a writer may leave reference counts for a repair after a crash (default off)",
        "compression_type": "zlib (default) or zstd, for compressed clusters",
        "extended_l2": "on: clusters have 32 subclusters (default off)",
        "data_file": "the file that takes the guest's data; made beside the image",
        "data_file_raw": "on: with data_file, that file alone reads as the disk (default off)",
        "keep_data_file": "on: the data file is there already and stays; what it holds is the disk (default off)",
        "preallocation": "off (default); metadata: every cluster has its place; falloc or full: it has its space, too",
        "encrypt.format": "luks: encrypt the image, as --encrypt does",
        **{f"encrypt.{name}": meaning for name, meaning in LUKS_OPTIONS.items()},
    }
)

_Value = TypeVar("_Value")

_SECTOR = 512
_DEFAULT_CLUSTER_BITS = 16
_ENCRYPT = "encrypt."
#: QEMU takes no longer name of a format.
_MAX_FORMAT_NAME = 15


class Options(NamedTuple):
    """What the `-o` pairs say."""

    version: int
    cluster_bits: int
    refcount_order: int
    lazy_refcounts: bool
    compression: int
    extended_l2: bool
    data_file: str | None
    data_file_raw: bool
    keep_data_file: bool
    preallocation: str
    luks: LuksOptions | None


def create(request: CreateRequest) -> Plan:
    """The plan for a new image. See :meth:`tapfs.driver.CreatableFormat.create`."""
    options = parse_options(request)
    if request.virtual_size < 0:
        raise _out_of_bounds(f"cannot make a qcow2 image of {request.virtual_size} bytes")
    # QEMU rounds a size down when it opens an image: a partial last sector would be lost to it.
    size = round_up(request.virtual_size, _SECTOR)
    header = _header(options, size)
    if header.l1_length > MAX_L1_BYTES:
        most = MAX_L1_BYTES // WORD * header.table_span
        message = f"{size} bytes are too many for qcow2 with these clusters, the limit is {most}"
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS, message, op="create", remedy="choose larger clusters: -o cluster_size=2M"
        )
    name = b"" if request.backing is None else request.backing.name.encode("utf-8", "surrogateescape")
    layout = _Layout(header, options)
    tail = _extensions(request, options, layout.crypto_offset)
    if name:
        if len(name) > MAX_NAME_LENGTH or b"\0" in name:
            raise _out_of_bounds(f"the backing file's name has {len(name)} bytes, the limit is {MAX_NAME_LENGTH}")
        layout.name_backing(header.header_length + len(tail), len(name))
    if header.header_length + len(tail) + len(name) > header.cluster_size:
        raise _out_of_bounds(f"header and names do not fit into a cluster of {header.cluster_size} bytes")
    luks = b""
    if options.luks is not None:
        from tapfs.formats.luks.create import make_header

        luks = make_header(options.luks, *request.secret())
    return layout.plan(tail + name, luks)


def parse_options(request: CreateRequest) -> Options:
    """What the `-o` pairs of a request say. Raises ImageError(unsupported) for what cannot be."""
    given = request.options
    for option in given:
        if option not in CREATE_OPTIONS:
            raise _refused(f"unknown option {option!r} for qcow2", f"the options are {', '.join(CREATE_OPTIONS)}")
    version = _choice(given, "compat", COMPAT, "1.1")
    options = Options(
        version=version,
        cluster_bits=_power(given, "cluster_size", MIN_CLUSTER_BITS, MAX_CLUSTER_BITS, _DEFAULT_CLUSTER_BITS),
        refcount_order=_power(given, "refcount_bits", 0, 6, REFCOUNT_ORDER_2),
        lazy_refcounts=_switch(given, "lazy_refcounts"),
        compression=_choice(given, "compression_type", COMPRESSION, "zlib"),
        extended_l2=_switch(given, "extended_l2"),
        data_file=given.get("data_file"),
        data_file_raw=_switch(given, "data_file_raw"),
        keep_data_file=_switch(given, "keep_data_file"),
        preallocation=preallocation_of(given, METADATA, FALLOC, FULL),
        luks=_luks(given, encrypted=request.encrypted),
    )
    _require_consistent(options, overlay=request.backing is not None)
    return options


def _luks(given: Mapping[str, str], *, encrypted: bool) -> LuksOptions | None:
    chosen = [name for name in given if name.startswith(_ENCRYPT)]
    if not encrypted and not chosen:
        return None
    if not encrypted:
        raise _refused(f"{chosen[0]} needs a password", "give it with {password}")
    if given.get("encrypt.format", "luks") != "luks":
        raise _refused(
            f"encrypt.format={given['encrypt.format']}: must be luks; of the old encryption tapfs reads images"
        )
    from tapfs.formats.luks.create import parse_luks_options  # and digests, which few images need
    from tapfs.formats.luks.version1 import STRIPES

    options = parse_luks_options(given, _ENCRYPT)
    if options.key_bytes * STRIPES % _SECTOR:
        bits = 8 * options.key_bytes
        message = (
            f"{options.cipher_name}-{options.cipher_mode} with keys of {bits} bits: QEMU aborts when it opens that"
        )
        raise _refused(message, "say encrypt.cipher-mode=xts, or take a key of 128 or 256 bits")
    return options


def _require_consistent(options: Options, *, overlay: bool) -> None:
    later = {
        "lazy_refcounts=on": options.lazy_refcounts,
        "extended_l2=on": options.extended_l2,
        "data_file": options.data_file is not None,
        "compression_type=zstd": options.compression != COMPRESSION_DEFLATE,
        "refcount_bits other than 16": options.refcount_order != REFCOUNT_ORDER_2,
    }
    for what, chosen in later.items():
        if chosen and options.version == 2:
            raise _refused(f"{what} needs compat=1.1")
    if options.extended_l2 and options.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise _refused(f"extended_l2=on needs clusters of at least {1 << MIN_EXTENDED_CLUSTER_BITS} bytes")
    if options.data_file_raw and options.data_file is None:
        raise _refused("data_file_raw=on needs data_file")
    if options.data_file_raw and overlay:
        raise _refused("data_file_raw=on does not go with a backing file: the data file alone is to be the disk")
    if options.data_file is not None and (
        not options.data_file or "/" in options.data_file or "\0" in options.data_file
    ):
        raise _refused(
            f"data_file={options.data_file}: the data file lies beside the image", "give a name without a slash"
        )
    if options.keep_data_file:
        _require_keepable(options)
    if options.luks is not None and options.data_file_raw:
        raise _refused("data_file_raw=on does not go with encryption: the data file alone would read as noise")
    if options.luks is not None and options.preallocation != "off":
        raise _refused(
            f"preallocation={options.preallocation} does not go with encryption: the new disk would be noise"
        )
    if options.preallocation != "off" and overlay:
        raise _refused(f"preallocation={options.preallocation} would hide the backing file")


def _require_keepable(options: Options) -> None:
    """Raise ImageError(unsupported) if the data file that is there would be overwritten, or would not be seen."""
    if options.data_file is None:
        raise _refused("keep_data_file=on needs data_file")
    if options.luks is not None:
        raise _refused("keep_data_file=on does not go with encryption: what the file holds is not encrypted")
    if options.preallocation not in ("off", METADATA):
        raise _refused(f"preallocation={options.preallocation} would write to the file that is to be kept")
    if not options.data_file_raw and options.preallocation != METADATA:
        raise _refused(
            "keep_data_file=on alone would make an empty disk over the file that is kept",
            "say data_file_raw=on or preallocation=metadata, too",
        )


def _header(options: Options, size: int) -> Header:
    incompatible = (DATA_FILE if options.data_file is not None else 0) | (EXTENDED_L2 if options.extended_l2 else 0)
    incompatible |= COMPRESSION_TYPE if options.compression != COMPRESSION_DEFLATE else 0
    header = Header(
        version=options.version,
        backing_offset=0,
        backing_size=0,
        cluster_bits=options.cluster_bits,
        size=size,
        crypt_method=CRYPT_NONE if options.luks is None else CRYPT_LUKS,
        l1_entries=0,
        l1_offset=0,
        reftable_offset=0,
        reftable_clusters=0,
        snapshot_count=0,
        snapshots_offset=0,
        incompatible=incompatible,
        compatible=LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        autoclear=RAW_DATA_FILE if options.data_file_raw else 0,
        refcount_order=options.refcount_order,
        header_length=LENGTH_2 if options.version == 2 else LENGTH_3,
        compression_type=options.compression,
    )
    return header._replace(l1_entries=l1_entries_for(size, header))


def _extensions(request: CreateRequest, options: Options, crypto_offset: int) -> bytes:
    found: list[ext.Extension] = []
    if request.backing is not None and request.backing.format is not None:
        name = format_word(request.backing.format).encode()
        if len(name) > _MAX_FORMAT_NAME:
            raise _out_of_bounds(f"the name of the backing format has {len(name)} bytes")
        found.append(ext.Extension(ext.BACKING_FORMAT, name))
    if options.data_file is not None:
        found.append(ext.Extension(ext.DATA_FILE_NAME, options.data_file.encode("utf-8", "surrogateescape")))
    if options.luks is not None:
        place = (crypto_offset, options.luks.payload_offset)
        found.append(ext.Extension(ext.CRYPTO_HEADER, b"".join(each.to_bytes(WORD, "big") for each in place)))
    if options.version > 2 and 1 << options.cluster_bits >= ext.FEATURE_NAMES_NEED:
        found.append(ext.qemu_feature_names())
    return ext.pack_extensions(found)


class _Layout:
    """Where everything of a new image lies, in clusters: header, refcount table, blocks, L1, LUKS, then L2 and data."""

    def __init__(self, header: Header, options: Options) -> None:
        self._options = options
        cluster = header.cluster_size
        allocated = options.preallocation != "off" or options.data_file_raw
        self._data_clusters = -(-header.size // cluster) if allocated else 0
        self._tables = header.l1_entries if allocated else 0
        self._l1_clusters = -(-header.l1_length // cluster)
        self._crypto_clusters = 0 if options.luks is None else -(-options.luks.payload_offset // cluster)
        inside = 0 if options.data_file is not None else self._data_clusters
        fixed = 1 + self._l1_clusters + self._crypto_clusters + self._tables + inside
        # Blocks and table count themselves, so their number is found step by step.
        table = blocks = 1
        while True:
            total = fixed + table + blocks
            needed_blocks = -(-total // header.block_entries)
            needed_table = -(-needed_blocks * WORD // cluster)
            if (needed_blocks, needed_table) == (blocks, table):
                break
            blocks, table = max(blocks, needed_blocks), max(table, needed_table)
        self._total, self._blocks = total, blocks
        self._l1_cluster = 1 + table + blocks
        self._header = header._replace(
            reftable_offset=cluster,
            reftable_clusters=table,
            l1_offset=self._l1_cluster * cluster if header.l1_entries else 0,
        )

    @property
    def crypto_offset(self) -> int:
        """The place of the LUKS header, if there is one."""
        return (self._l1_cluster + self._l1_clusters) * self._header.cluster_size

    def name_backing(self, offset: int, length: int) -> None:
        """The name of the backing file stands there, behind the extensions."""
        self._header = self._header._replace(backing_offset=offset, backing_size=length)

    def plan(self, tail: bytes, luks: bytes) -> Plan:
        """The plan for the image: `tail` follows the header, `luks` is the LUKS header."""
        header, cluster = self._header, self._header.cluster_size
        first_block = 1 + header.reftable_clusters
        places = range(first_block * cluster, (first_block + self._blocks) * cluster, cluster)
        metadata: list[Step] = [
            Write(0, header.reftable_offset, encode(array(TYPECODE, places), BYTE_ORDER)),
            *self._block_steps(first_block),
        ]
        first: list[Step] = [Grow(0, self._total * cluster)]
        first_table = self._l1_cluster + self._l1_clusters + self._crypto_clusters
        if luks:
            metadata.append(Write(0, self.crypto_offset, luks))
        if self._tables:
            tables = range(first_table * cluster | COPIED, (first_table + self._tables) * cluster | COPIED, cluster)
            metadata.append(Write(0, header.l1_offset, encode(array(TYPECODE, tables), BYTE_ORDER)))
            metadata += self._table_steps(first_table)
        if self._options.data_file is not None:
            first.append(Grow(1, header.size))
        space = self._space_stages((first_table + self._tables) * cluster)
        return plan(first, *space, metadata, [Write(0, 0, header.pack() + tail)])

    def _block_steps(self, first_block: int) -> list[Step]:
        header = self._header
        counting = Counting(header.refcount_order)
        steps: list[Step] = []
        for number in range(self._blocks):
            used = min(header.block_entries, self._total - number * header.block_entries)
            block = array("B", bytes(header.cluster_size))
            if used > 0 and not counting.fill(block, 0, used, 0, 1):
                for index in range(used):
                    counting.put(block, index, 1)
            start, stop = counting.byte_range(0, max(1, used))
            content = block[start : round_up(stop, _SECTOR)].tobytes()
            steps.append(Write(0, (first_block + number) * header.cluster_size, content))
        return steps

    def _table_steps(self, first_table: int) -> list[Step]:
        header, cluster = self._header, self._header.cluster_size
        outside = self._options.data_file is not None
        # In a data file each cluster lies where the guest has it.
        start = (0 if outside else (first_table + self._tables) * cluster) | COPIED
        steps: list[Step] = []
        for table in range(self._tables):
            first = table * header.l2_entries
            count = min(header.l2_entries, self._data_clusters - first)
            low = start + first * cluster
            words = array(TYPECODE, range(low, low + count * cluster, cluster))
            if header.extended_l2:
                words = array(TYPECODE, [word for place in words for word in (place, self._subclusters)])
            steps.append(Write(0, (first_table + table) * cluster, encode(words, BYTE_ORDER)))
        return steps

    @property
    def _subclusters(self) -> int:
        """The second word of a preallocated entry: none is allocated where only metadata is new, so zeros show."""
        shown = self._options.data_file_raw or self._options.keep_data_file
        return 0 if self._options.preallocation == METADATA and not shown else (1 << 32) - 1

    def _space_stages(self, data_at: int) -> Iterator[list[Step]]:
        mode = self._options.preallocation
        if self._options.data_file is not None:
            return space_stages(mode, 1, 0, self._header.size)
        return space_stages(mode, 0, data_at, round_up(self._header.size, self._header.cluster_size))


def _choice(options: Mapping[str, str], name: str, values: Mapping[str, _Value], default: str) -> _Value:
    text = options.get(name, default)
    if text not in values:
        raise _refused(f"{name}={text}: must be one of {', '.join(values)}")
    return values[text]


def _switch(options: Mapping[str, str], name: str) -> bool:
    return _choice(options, name, SWITCH, "off")


def _power(options: Mapping[str, str], name: str, least: int, most: int, default: int) -> int:
    """The binary logarithm of an option's number."""
    text = options.get(name)
    if text is None:
        return default
    values = {str(1 << bits): bits for bits in range(least, most + 1)}
    if text not in values:
        raise _refused(f"{name}={text}: must be a power of two from {1 << least} to {1 << most}")
    return values[text]


def _refused(message: str, remedy: str | None = None) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED, message, op="create", remedy=remedy)


def _out_of_bounds(message: str) -> ImageError:
    return ImageError(ErrorKind.OUT_OF_BOUNDS, message, op="create")
