"""UDF: ECMA-167 (the volume structure) as OSTA's Universal Disk Format uses it.

A disc may have the descriptors of ISO 9660 beside those of UDF (a "bridge" disc). Then UDF is what
it is: the ISO 9660 side of many such discs holds one text file only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tapfs.partitions.reader import Reader
from tapfs.partitions.table import FileSystem

#: Sizes of a block. The first two are those of optical discs and of hard disks.
_BLOCK_SIZES = (2048, 512, 1024, 4096, 8192, 16384, 32768)

#: The volume recognition sequence starts here. Its structures have 2048 bytes, or a block if that is more.
_RECOGNITION_AT = 32768
_MIN_STRUCTURE = 2048
#: So many structures are looked at. ISO 9660 may have put a few of its own before those of UDF.
_MAX_STRUCTURES = 64
_ISO9660 = b"CD001"
_RECOGNITION = {b"BEA01", b"BOOT2", b"CDW02", b"TEA01", _ISO9660}
_UDF = {b"NSR02", b"NSR03"}

#: A tag: identifier, version, checksum, serial number, CRC, length of the CRC, own block.
_TAG = struct.Struct("<HHBxHHHI")
_TAG_CHECKSUM = 4
_PRIMARY, _ANCHOR, _POINTER, _LOGICAL, _TERMINATOR = 1, 2, 3, 6, 8
#: So many volume descriptors are looked at.
_MAX_DESCRIPTORS = 64


def udf(disk: Reader) -> FileSystem | None:
    """UDF in any block size; the label is that of the logical volume, else of the primary descriptor."""
    if not _announced(disk):
        return None
    for block_size in _BLOCK_SIZES:
        last = disk.size // block_size - 1
        for block in (256, last - 256, last, 512):
            anchor = _descriptor(disk, block, block_size)
            if anchor is not None and _tag(anchor) == _ANCHOR:
                return _named(disk, anchor, block_size)
    return None


def _announced(disk: Reader) -> bool:
    """Whether the volume recognition sequence says UDF."""
    for step in (_MIN_STRUCTURE, *(size for size in _BLOCK_SIZES if size > _MIN_STRUCTURE)):
        for index in range(_MAX_STRUCTURES):
            name = disk.read(_RECOGNITION_AT + index * step + 1, 5)
            if name in _UDF:
                return True
            if name not in _RECOGNITION:
                break
    return False


def _named(disk: Reader, anchor: bytes, block_size: int) -> FileSystem:
    """The label and UUID from the main sequence of volume descriptors, else from the reserve sequence."""
    for extent in (anchor[16:24], anchor[24:32]):
        labels: dict[int, str | None] = {}
        uuid = None
        for descriptor in _sequence(disk, extent, block_size):
            kind = _tag(descriptor)
            if kind == _LOGICAL:
                labels.setdefault(kind, _text(descriptor[84:212]))
            elif kind == _PRIMARY:
                labels.setdefault(kind, _text(descriptor[24:56]))
                uuid = uuid or _uuid(_text(descriptor[72:200]))
        if labels:
            return FileSystem("udf", labels.get(_LOGICAL) or labels.get(_PRIMARY), uuid)
    return FileSystem("udf")


def _sequence(disk: Reader, extent: bytes, block_size: int) -> Iterator[bytes]:
    """The descriptors of a sequence, which may go on in other extents."""
    length, start = struct.unpack("<II", extent)
    block = 0
    for _ in range(_MAX_DESCRIPTORS):
        if (block + 1) * block_size > length:
            return
        descriptor = _descriptor(disk, start + block, block_size)
        block += 1
        if descriptor is None or _tag(descriptor) == _TERMINATOR:
            return
        if _tag(descriptor) == _POINTER:
            length, start = struct.unpack_from("<II", descriptor, 20)
            block = 0
        yield descriptor


def _descriptor(disk: Reader, block: int, block_size: int) -> bytes | None:
    """The 512 bytes of the descriptor in a block, if its tag is whole and names that block."""
    found = disk.read(block * block_size, 512)
    if len(found) < 512:
        return None
    _, _, checksum, _, _, _, own = _TAG.unpack_from(found)
    total = sum(found[: _TAG.size]) - found[_TAG_CHECKSUM]
    return found if total & 0xFF == checksum and own == block else None


def _tag(descriptor: bytes) -> int:
    return int.from_bytes(descriptor[:2], "little")


def _text(field: bytes) -> str | None:
    """A dstring (OSTA, 2.1.3): how the text is packed, the text, and in the last byte how many bytes it takes."""
    packing, text = field[0], field[1 : min(field[-1], len(field) - 1)]
    if packing in {8, 254}:
        return text.decode("latin-1").rstrip("\0 ") or None
    if packing in {16, 255}:
        return text[: len(text) // 2 * 2].decode("utf-16-be", "replace").rstrip("\0 ") or None
    return None


def _uuid(volume_set: str | None) -> str | None:
    """16 hexadecimal digits made of the name of the volume set, as udflabel(8) defines them.

    They are the first 16 characters of the name if all of these are such digits. A name with 8 such
    digits at its start gives these and its next 4 bytes; any other name gives its first 8 bytes.
    """
    text = (volume_set or "").encode()
    if len(text) < 8:
        return None
    digits = b"0123456789abcdefABCDEF"
    alike = len(text) - len(text.lstrip(digits))
    if alike >= 16:
        return text[:16].decode().lower()
    if alike >= 8:
        return (text[:8].decode() + text[8:12].hex()).lower()
    return text[:8].hex()
