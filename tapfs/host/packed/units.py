"""Units: the parts of a packed file that can be unpacked alone, where all but the last unpack to one length.

The index of an xz file names its blocks (The .xz File Format 1.2.1, 4); `xz -T` and pixz write blocks of one length.
The seek table of a Zstandard file names its frames (Zstandard Seekable Format 0.1.0).
"""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError
from tapfs.records import NamedTuple, dataclass

if TYPE_CHECKING:
    import zstandard

#: Reads the packed file: an offset and a length in bytes.
Read = Callable[[int, int], bytes]

#: Larger units are not held in memory whole.
_MOST_UNIT_BYTES = 256 << 20
_MOST_INDEX_BYTES = 64 << 20
#: More units are not held in memory, and no more zeros are looked through behind an xz stream.
_MOST_UNITS = 4 << 20
_MOST_PADDING_BYTES = 1 << 20

_XZ_MAGIC = b"\xfd7zXZ\0"
_XZ_END = b"YZ"
_XZ_HEADER_BYTES = 12
_SEEKABLE_MAGIC = 0x8F92EAB1
_SEEK_TABLE_MAGIC = 0x184D2A5E
_SEEK_FOOTER = struct.Struct("<IBI")
_SKIPPABLE = struct.Struct("<II")


class Unit(NamedTuple):
    """A part of the packed file, and how many bytes it holds.

    Of xz: `unpadded` is its length as the index says it, `head` the header of its stream.
    """

    offset: int
    length: int
    unpacked: int
    unpadded: int = 0
    head: bytes = b""


@dataclass(frozen=True, slots=True)
class Index:
    """All units of a packed file in order, and where its streams lie: their starts and ends."""

    units: Sequence[Unit]
    streams: Sequence[tuple[int, int]] = ()

    @property
    def size(self) -> int:
        """Bytes of all that the file holds."""
        return sum(unit.unpacked for unit in self.units)

    @property
    def unit_bytes(self) -> int | None:
        """The length to which all units but the last unpack; None if there is none that pays."""
        if len(self.units) < 2:
            return None
        lengths = {unit.unpacked for unit in self.units[:-1]}
        length = self.units[0].unpacked
        alike = len(lengths) == 1 and 0 < self.units[-1].unpacked <= length <= _MOST_UNIT_BYTES
        return length if alike else None


def xz_index(read: Read, size: int, path: str) -> Index:
    """The index of an xz file, found from its end on. Raises ImageError: corrupt, unsupported."""
    units: list[list[Unit]] = []
    streams: list[tuple[int, int]] = []
    end, count = size, 0
    while end > 0:
        end = _before_padding(read, end, path)
        found, start = _xz_stream(read, end, path)
        units.append(found)
        count += len(found) + 1
        _bounded(count, path)
        streams.append((start, end))
        end = start
    return Index([unit for found in reversed(units) for unit in found], streams[::-1])


def _before_padding(read: Read, end: int, path: str) -> int:
    """The end of the stream before `end`: zeros may stand behind it, four by four."""
    if end < 4 or any(read(end - 4, 4)):
        return end
    behind = read(max(end - _MOST_PADDING_BYTES, 0), min(end, _MOST_PADDING_BYTES))
    zeros = len(behind) - len(behind.rstrip(b"\0"))
    if zeros == len(behind):
        raise _damaged(path, f"{zeros} zeros or more stand behind an xz stream", end - zeros)
    return end - zeros // 4 * 4


def _bounded(count: int, path: str) -> None:
    """Refuse a file of so many units. Raises ImageError(unsupported)."""
    if count > _MOST_UNITS:
        message = f"has {count} blocks, frames or streams, and no more than {_MOST_UNITS} are read"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="unpack", remedy="unpack it first")


def _xz_stream(read: Read, end: int, path: str) -> tuple[list[Unit], int]:
    """The blocks of the stream that ends at `end`, and where it starts."""
    footer = read(end - _XZ_HEADER_BYTES, _XZ_HEADER_BYTES) if end >= 2 * _XZ_HEADER_BYTES else b""
    if footer[10:] != _XZ_END or zlib.crc32(footer[4:10]) != int.from_bytes(footer[:4], "little"):
        raise _damaged(path, "the end of an xz stream is missing", end)
    length = (int.from_bytes(footer[4:8], "little") + 1) * 4
    index = end - _XZ_HEADER_BYTES - length
    if index < _XZ_HEADER_BYTES or length > _MOST_INDEX_BYTES:
        raise _damaged(path, "the index of an xz stream has an impossible length", end)
    content = read(index, length)
    if content[:1] != b"\0" or zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise _damaged(path, "the index of an xz stream is damaged", index)
    lengths: list[tuple[int, int]] = []
    try:
        count, at = _variable(content, 1)
        _bounded(count, path)
        while len(lengths) < count:
            unpadded, at = _variable(content, at)
            unpacked, at = _variable(content, at)
            lengths.append((unpadded, unpacked))
    except IndexError:
        raise _damaged(path, "the index of an xz stream ends too early", index) from None
    start = index - sum(_padded(unpadded) for unpadded, _ in lengths) - _XZ_HEADER_BYTES
    head = read(start, _XZ_HEADER_BYTES) if start >= 0 else b""
    if head[:6] != _XZ_MAGIC or head[6:8] != footer[8:10]:
        raise _damaged(path, "an xz stream does not begin where its index says", max(start, 0))
    units: list[Unit] = []
    place = start + _XZ_HEADER_BYTES
    for unpadded, unpacked in lengths:
        units.append(Unit(place, _padded(unpadded), unpacked, unpadded, head))
        place += _padded(unpadded)
    return units, start


def _padded(length: int) -> int:
    return -(-length // 4) * 4


def unpack_xz_unit(unit: Unit, packed: bytes) -> bytes:
    """What a block of an xz file holds, its checksum compared. Raises lzma.LZMAError, EOFError."""
    records = _number(1) + _number(unit.unpadded) + _number(unit.unpacked)
    own = b"\0" + records
    own += bytes(-len(own) % 4)
    own += zlib.crc32(own).to_bytes(4, "little")
    backward = (len(own) // 4 - 1).to_bytes(4, "little") + unit.head[6:8]
    footer = zlib.crc32(backward).to_bytes(4, "little") + backward + _XZ_END
    stream = unit.head + packed + own + footer
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    # A byte of room behind the contents: the library goes on to the checksums, and a block that holds more is told.
    content = decompressor.decompress(stream, unit.unpacked + 1)
    if not decompressor.eof:
        raise EOFError("a block holds other lengths than the index says")
    return content


def unpack_zstd_unit(decompressor: zstandard.ZstdDecompressor, unit: Unit, packed: bytes) -> bytes:
    """What a frame of a Zstandard file holds. Raises the library's error, ValueError."""
    from zstandard import frame_content_size  # whoever has the decompressor has the library

    # The library would take as much memory as the frame says, whatever is allowed.
    if frame_content_size(packed) > unit.unpacked:
        raise ValueError("a frame holds more than the seek table says")
    return decompressor.decompress(packed, max_output_size=unit.unpacked)


def zstd_index(read: Read, size: int, path: str) -> Index | None:
    """The seek table of a Zstandard file; None if it has none. Raises ImageError: corrupt, unsupported."""
    if size < _SKIPPABLE.size + _SEEK_FOOTER.size:
        return None
    count, descriptor, magic = _SEEK_FOOTER.unpack(read(size - _SEEK_FOOTER.size, _SEEK_FOOTER.size))
    if magic != _SEEKABLE_MAGIC:
        return None
    entry = struct.Struct("<III" if descriptor & 0x80 else "<II")
    _bounded(count, path)
    length = entry.size * count + _SEEK_FOOTER.size
    start = size - length - _SKIPPABLE.size
    if start < 0 or length > _MOST_INDEX_BYTES:
        raise _damaged(path, "the seek table of the Zstandard file has an impossible length", size)
    table = read(start, _SKIPPABLE.size + length)
    if _SKIPPABLE.unpack_from(table) != (_SEEK_TABLE_MAGIC, length):
        raise _damaged(path, "the seek table of the Zstandard file is damaged", start)
    units: list[Unit] = []
    place = 0
    for fields in entry.iter_unpack(table[_SKIPPABLE.size : -_SEEK_FOOTER.size]):
        units.append(Unit(place, fields[0], fields[1]))
        place += fields[0]
    if place != start:
        raise _damaged(path, "the seek table does not name all frames of the Zstandard file", start)
    return Index([unit for unit in units if unit.unpacked])


def _variable(content: bytes, at: int) -> tuple[int, int]:
    """A multibyte integer (1.2) at a place of the index, and the place behind it."""
    value = 0
    for shift in range(0, 63, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            break
    return value, at


def _number(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _damaged(path: str, message: str, offset: int) -> ImageError:
    return ImageError(ErrorKind.CORRUPT, message, path=path, offset=offset, op="unpack")
