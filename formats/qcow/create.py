"""Create images: QEMU's layout, or blktap's byte for byte (docs/specs/blktap-qcow.md, "Extended header")."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tapfs.driver import CreateRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow.extended import FLAG_L1_BIG_ENDIAN, FLAG_SPARSE, L1_ALIGNMENT, ExtendedHeader, table_cksum
from tapfs.formats.qcow.extended import LENGTH as EXTENDED_LENGTH
from tapfs.formats.qcow.header import (
    CRYPT_AES,
    CRYPT_NONE,
    LENGTH,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_NAME_LENGTH,
    MAX_VIRTUAL_SIZE,
    MIN_CLUSTER_BITS,
    Header,
)
from tapfs.formats.rounding import round_up
from tapfs.plan import Grow, Plan, Write, plan

CREATE_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "blktap": "on: the layout and extended header of Xen's blktap tools (default off: QEMU's layout)",
        "reserve": "on: with blktap=on, the file has its full length from the start, as qcow-create -r",
        "cluster_size": "bytes, a power of two from 512 to 65536 (default 4096, with a backing file 512)",
    }
)

#: cluster_bits and l2_bits that both QEMU and blktap take.
_STANDALONE_BITS = (12, 9)
_OVERLAY_BITS = (9, 12)

_SECTOR = 512
_BLOCK = 4096


def create(request: CreateRequest) -> Plan:
    """The plan for a new image. See :meth:`tapfs.driver.CreatableFormat.create`."""
    for option in request.options:
        if option not in CREATE_OPTIONS:
            known = ", ".join(CREATE_OPTIONS)
            raise _refused(f"unknown option {option!r} for qcow", remedy=f"the options are {known}")
    blktap = _switch(request.options, "blktap")
    reserve = _switch(request.options, "reserve")
    if request.virtual_size < 1:
        raise _out_of_bounds(f"cannot make a qcow image of {request.virtual_size} bytes")
    # QEMU rounds a size down when it opens an image: a partial last sector would be lost to it.
    size = round_up(request.virtual_size, _SECTOR)
    name = b"" if request.backing is None else request.backing.name.encode("utf-8", "surrogateescape")
    if len(name) > MAX_NAME_LENGTH:
        raise _out_of_bounds(f"the backing file's name has {len(name)} bytes, the limit is {MAX_NAME_LENGTH}")
    if b"\0" in name or (request.backing is not None and not name):
        raise _refused("the backing file's name is empty or holds a NUL byte")
    cluster_bits, l2_bits = _bits(request)
    before_l1 = (EXTENDED_LENGTH + LENGTH if blktap else LENGTH) + len(name)
    header = Header(
        backing_file_offset=before_l1 - len(name) if name else 0,
        backing_file_size=len(name),
        mtime=request.backing_mtime & 0xFFFFFFFF if blktap and name else 0,
        size=size,
        cluster_bits=cluster_bits,
        l2_bits=l2_bits,
        crypt_method=CRYPT_AES if request.encrypted else CRYPT_NONE,
        l1_table_offset=round_up(before_l1, L1_ALIGNMENT if blktap else 8),
    )
    if size > MAX_VIRTUAL_SIZE or header.l1_length > MAX_L1_BYTES:
        most = min(MAX_VIRTUAL_SIZE, MAX_L1_BYTES // 8 * header.unit)
        raise _out_of_bounds(f"{size} bytes are too many for qcow with these clusters, the limit is {most}")
    if blktap:
        return _blktap_plan(request, header, name, reserve=reserve)
    if reserve:
        raise _refused("reserve=on goes with blktap=on only")
    # QEMU writes L1 in whole sectors.
    length = header.l1_table_offset + round_up(header.l1_length, _SECTOR)
    return plan([Grow(0, length)], [Write(0, 0, header.pack() + name)])


def _blktap_plan(request: CreateRequest, header: Header, name: bytes, *, reserve: bool) -> Plan:
    if request.encrypted:
        raise _refused("blktap=on does not go with encryption: blktap never had a key")
    if "cluster_size" in request.options:
        raise _refused("blktap=on has cluster sizes of its own")
    if name and not name.startswith(b"/"):
        raise _refused("blktap=on needs the absolute path of the backing file", remedy="give a name that starts with /")
    extended = ExtendedHeader(
        cksum=table_cksum(bytes(header.l1_length)),
        min_cluster_alloc=1 if name else header.l2_entries,
        flags=FLAG_L1_BIG_ENDIAN | (0 if reserve else FLAG_SPARSE),
    )
    length = round_up(header.l1_end, _BLOCK)
    if reserve:
        length += header.l1_entries * _SECTOR + header.size
    return plan([Grow(0, length)], [Write(0, 0, header.pack() + extended.pack() + name)])


def _bits(request: CreateRequest) -> tuple[int, int]:
    text = request.options.get("cluster_size")
    if text is None:
        return _STANDALONE_BITS if request.backing is None else _OVERLAY_BITS
    least, most = 1 << MIN_CLUSTER_BITS, 1 << MAX_CLUSTER_BITS
    if not (text.isascii() and text.isdigit()) or not least <= int(text[:6]) <= most or len(text) > 6:
        raise _refused(f"cluster_size={text}: must be a power of two from {least} to {most}")
    value = int(text)
    if value & (value - 1):
        raise _refused(f"cluster_size={text}: must be a power of two from {least} to {most}")
    bits = value.bit_length() - 1
    # As QEMU sizes it: one table is one cluster.
    return bits, bits - 3


def _switch(options: Mapping[str, str], name: str) -> bool:
    value = options.get(name, "off")
    if value not in {"on", "off"}:
        raise _refused(f"{name}={value}: must be on or off")
    return value == "on"


def _refused(message: str, *, remedy: str | None = None) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED, message, op="create", remedy=remedy)


def _out_of_bounds(message: str) -> ImageError:
    return ImageError(ErrorKind.OUT_OF_BOUNDS, message, op="create")
