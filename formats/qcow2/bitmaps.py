"""The directory of a qcow2 image's persistent bitmaps: which blocks of the disk have changed since when.

QEMU's docs/interop/qcow2, "Bitmaps extension"; docs/specs/qcow2.md, "Persistent bitmaps".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2.extensions import BITMAPS, Extension, data_of
from tapfs.formats.rounding import round_up
from tapfs.plan import Step, Write

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_ALIGNMENT = 8
MAX_BITMAPS = 65535
_MAX_DIRECTORY_BYTES = 1024 * MAX_BITMAPS

#: Flags of an entry. IN_USE: the bitmap was not stored since the disk changed, so what it says is not to be relied on.
IN_USE, AUTO, EXTRA_DATA_COMPATIBLE = 1, 2, 4
#: Of the word with the flags, from the start of an entry.
_FLAGS_AT = 12


class Bitmap(NamedTuple):
    """One bitmap of the directory. `offset` is that of its entry in the file; `granularity` in bytes of the disk.

    Its table has `table_entries` words at `table_offset`.
    """

    name: str
    granularity: int
    flags: int
    table_offset: int
    table_entries: int
    offset: int

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
        return Write(0, self.offset + _FLAGS_AT, (self.flags | IN_USE).to_bytes(4, "big"))


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


def read_bitmaps(file: HostFile, extensions: Sequence[Extension]) -> list[Bitmap]:
    """The bitmaps of the directory. Raises ImageError(corrupt) for a directory that cannot be."""
    directory = directory_of(extensions)
    if directory is None:
        return []
    if directory.length > _MAX_DIRECTORY_BYTES or directory.bitmaps > MAX_BITMAPS:
        raise _error(file, directory.offset, f"{directory.bitmaps} bitmaps in {directory.length} bytes are too many")
    if directory.offset + directory.length > file.size():
        raise _error(file, directory.offset, "the directory of bitmaps lies past the end of the file")
    raw = file.read(directory.offset, directory.length)
    found: list[Bitmap] = []
    at = 0
    for _ in range(directory.bitmaps):
        if at + _ENTRY.size > len(raw):
            raise _error(file, directory.offset + at, "the directory of bitmaps ends inside an entry")
        table, entries, flags, _, granularity_bits, name_length, extra = _ENTRY.unpack_from(raw, at)
        start = at + _ENTRY.size + extra
        end = start + name_length
        if end > len(raw) or granularity_bits > 63:
            raise _error(file, directory.offset + at, "an entry of the directory of bitmaps cannot be true")
        name = raw[start:end].decode("utf-8", "surrogateescape")
        found.append(Bitmap(name, 1 << granularity_bits, flags, table, entries, directory.offset + at))
        at = round_up(end, _ALIGNMENT)
    return found


def _error(file: HostFile, offset: int, message: str) -> ImageError:
    return ImageError(ErrorKind.CORRUPT, message, path=file.path, offset=offset, op="read the bitmaps")
