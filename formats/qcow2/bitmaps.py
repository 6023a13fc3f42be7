"""The directory of a qcow2 image's persistent bitmaps: which blocks of the disk have changed since when.

QEMU's docs/interop/qcow2, "Bitmaps extension"; docs/specs/qcow2.md, "Persistent bitmaps".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2.entries import OFFSET
from tapfs.formats.qcow2.extensions import BITMAPS, Extension, data_of
from tapfs.formats.qcow2.header import WORD
from tapfs.formats.rounding import round_up
from tapfs.plan import Step, Write
from tapfs.records import NamedTuple

_EXTENSION = struct.Struct(">IIQQ")
EXTENSION_BYTES = _EXTENSION.size
_ENTRY = struct.Struct(">QIIBBHI")
_ALIGNMENT = 8
MAX_BITMAPS = 65535
MAX_DIRECTORY_BYTES = 1024 * MAX_BITMAPS

#: Flags of an entry. IN_USE: the bitmap was not stored since the disk changed, so what it says is not to be relied on.
IN_USE, AUTO, EXTRA_DATA_COMPATIBLE = 1, 2, 4
KNOWN_FLAGS = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE
#: The one type that there is: what has changed.
TYPE_DIRTY = 1
#: Of a name, in bytes.
MAX_NAME_BYTES = 1023
#: Of the word with the flags, from the start of an entry.
_FLAGS_AT = 12


class Bitmap(NamedTuple):
    """One bitmap of the directory. `offset` is that of its entry in the file; `granularity` in bytes of the disk.

    Its table has `table_entries` words at `table_offset`. `raw` is the entry as it stands in the file, without padding.
    """

    name: str
    granularity: int
    flags: int
    table_offset: int
    table_entries: int
    offset: int
    type: int = TYPE_DIRTY
    has_extra: bool = False
    raw: bytes = b""

    @property
    def consistent(self) -> bool:
        """Whether it says the truth."""
        return not self.flags & IN_USE

    @property
    def enabled(self) -> bool:
        """Whether it notes what is written from now on."""
        return self.flags & AUTO != 0

    @property
    def must_be_marked(self) -> bool:
        """Whether a change of the disk makes it untrue, and it does not say so yet."""
        return self.enabled and self.consistent

    def mark_in_use(self) -> Step:
        """The step that says in the image that the bitmap does not follow the disk any more."""
        return self.flagged(self.flags | IN_USE)

    def flagged(self, flags: int) -> Step:
        """The step that gives it other flags in its place."""
        return Write(0, self.offset + _FLAGS_AT, flags.to_bytes(4, "big"))


def new_entry(name: str, granularity: int, flags: int, table_offset: int, table_entries: int) -> bytes:
    """The entry of a new bitmap, without padding."""
    text = name.encode("utf-8", "surrogateescape")
    bits = granularity.bit_length() - 1
    return _ENTRY.pack(table_offset, table_entries, flags, TYPE_DIRTY, bits, len(text), 0) + text


def entry_with_flags(raw: bytes, flags: int) -> bytes:
    """An entry with other flags."""
    return raw[:_FLAGS_AT] + flags.to_bytes(4, "big") + raw[_FLAGS_AT + 4 :]


def pack_directory(entries: Sequence[bytes]) -> bytes:
    """The directory of these entries."""
    return b"".join(raw.ljust(round_up(len(raw), _ALIGNMENT), b"\0") for raw in entries)


def pack_extension(count: int, length: int, offset: int) -> bytes:
    """The data of the header extension that leads to a directory."""
    return _EXTENSION.pack(count, 0, length, offset)


class Directory(NamedTuple):
    """Where the directory lies, in bytes of the file, and how many bitmaps it lists."""

    offset: int
    length: int
    bitmaps: int


def directory_of(extensions: Sequence[Extension]) -> Directory | None:
    """Where the directory is, None where the image has none or the extension is cut."""
    data = data_of(extensions, BITMAPS)
    if data is None or len(data) < _EXTENSION.size:
        return None
    count, _, length, offset = _EXTENSION.unpack_from(data)
    return Directory(offset, length, count)


def reserved_of_extension(data: bytes) -> int:
    """The field of the header extension that must be zero."""
    reserved: int = _EXTENSION.unpack_from(data)[1]
    return reserved


def read_bitmaps(file: HostFile, extensions: Sequence[Extension]) -> list[Bitmap]:
    """The bitmaps of the directory. Raises ImageError(corrupt) for a directory that cannot be."""
    directory = directory_of(extensions)
    if directory is None:
        return []
    if directory.length > MAX_DIRECTORY_BYTES or directory.bitmaps > MAX_BITMAPS:
        raise _error(file, directory.offset, f"{directory.bitmaps} bitmaps in {directory.length} bytes are too many")
    if directory.offset + directory.length > file.size():
        raise _error(file, directory.offset, "the directory of bitmaps lies past the end of the file")
    raw = file.read(directory.offset, directory.length)
    found: list[Bitmap] = []
    at = 0
    for _ in range(directory.bitmaps):
        if at + _ENTRY.size > len(raw):
            raise _error(file, directory.offset + at, "the directory of bitmaps ends inside an entry")
        table, entries, flags, kind, granularity_bits, name_length, extra = _ENTRY.unpack_from(raw, at)
        start = at + _ENTRY.size + extra
        end = start + name_length
        if end > len(raw) or granularity_bits > 63:
            raise _error(file, directory.offset + at, "an entry of the directory of bitmaps cannot be true")
        name = raw[start:end].decode("utf-8", "surrogateescape")
        place = directory.offset + at
        kept = raw[at:end]
        found.append(Bitmap(name, 1 << granularity_bits, flags, table, entries, place, kind, extra > 0, kept))
        at = round_up(end, _ALIGNMENT)
    return found


def bitmap_named(listed: Sequence[Bitmap], name: str, path: str) -> Bitmap:
    """The bitmap of that name. Raises ImageError(not_found)."""
    for each in listed:
        if each.name == name:
            return each
    known = ", ".join(each.name for each in listed)
    remedy = f"there are: {known}" if known else None
    raise ImageError(ErrorKind.NOT_FOUND, f"has no bitmap {name!r}", path=path, op="find a bitmap", remedy=remedy)


def clusters_of_bitmaps(file: HostFile, extensions: Sequence[Extension], cluster_size: int) -> Iterator[int]:
    """The host offsets of the clusters that tables of bitmaps and their bits lie in, as far as they can be true."""
    for each in read_bitmaps(file, extensions):
        length = WORD * each.table_entries
        if each.table_offset % cluster_size or each.table_offset + length > file.size():
            continue
        yield from range(each.table_offset, each.table_offset + length, cluster_size)
        table = file.read(each.table_offset, length)
        for at in range(0, length, WORD):
            place = int.from_bytes(table[at : at + WORD], "big") & OFFSET
            if place:
                yield place


def _error(file: HostFile, offset: int, message: str) -> ImageError:
    return ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=offset, op="read the bitmaps")
