"""The header extensions of qcow2: typed pieces between the header and the backing name (docs/specs/qcow2.md).

An unknown one is kept byte for byte, for it survives every rewrite of the header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2.header import LENGTH_2, Header
from tapfs.formats.rounding import round_up
from tapfs.records import NamedTuple

END = 0
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875
CRYPTO_HEADER = 0x0537BE77
DATA_FILE_NAME = 0x44415441

#: QEMU writes the names of features only into clusters of at least so many bytes, which have room for them.
FEATURE_NAMES_NEED = 4096

_PREFIX = struct.Struct(">II")
_ALIGNMENT = 8
_FEATURE = struct.Struct(">BB46s")

#: The sorts of features in a table of their names.
INCOMPATIBLE_FEATURE, COMPATIBLE_FEATURE, AUTOCLEAR_FEATURE = range(3)

#: The names that QEMU writes.
_QEMU_FEATURES = (
    (INCOMPATIBLE_FEATURE, 0, b"dirty bit"),
    (INCOMPATIBLE_FEATURE, 1, b"corrupt bit"),
    (INCOMPATIBLE_FEATURE, 2, b"external data file"),
    (INCOMPATIBLE_FEATURE, 3, b"compression type"),
    (INCOMPATIBLE_FEATURE, 4, b"extended L2 entries"),
    (COMPATIBLE_FEATURE, 0, b"lazy refcounts"),
    (AUTOCLEAR_FEATURE, 0, b"bitmaps"),
    (AUTOCLEAR_FEATURE, 1, b"raw external data"),
)


class Extension(NamedTuple):
    """One extension: its type, its data without the padding, and the offset of the data in the file."""

    type: int
    data: bytes
    offset: int = 0

    def pack(self) -> bytes:
        """The extension as it stands in the file."""
        return _PREFIX.pack(self.type, len(self.data)) + self.data.ljust(round_up(len(self.data), _ALIGNMENT), b"\0")


def parse_extensions(head: bytes, header: Header, path: str) -> list[Extension]:
    """The extensions in the first cluster, in their order. Raises ImageError(corrupt) for one that does not fit.

    The mark of the end is optional: the list ends at the backing name or with the cluster, too.
    """
    end = min(header.backing_offset or header.cluster_size, header.cluster_size, len(head))
    return list(_parse(head, header.header_length or LENGTH_2, end, path))


def are_whole(head: bytes, header: Header) -> bool:
    """Whether the start of a file, which may be shorter than a cluster, has the whole list and the backing name."""
    if header.backing_offset:
        return header.backing_offset + header.backing_size <= len(head)
    at = header.header_length or LENGTH_2
    while at + _PREFIX.size <= len(head):
        kind, length = _PREFIX.unpack_from(head, at)
        if kind == END:
            return True
        at += _PREFIX.size + round_up(length, _ALIGNMENT)
    return False


def _parse(head: bytes, at: int, end: int, path: str) -> Iterator[Extension]:
    while at + _PREFIX.size <= end:
        kind, length = _PREFIX.unpack_from(head, at)
        if kind == END:
            return
        start = at + _PREFIX.size
        if length > end - start:
            message = f"header extension {kind:#010x} of {length} bytes does not fit before {end:#x}"
            raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=at, op="open")
        yield Extension(kind, head[start : start + length], start)
        at = start + round_up(length, _ALIGNMENT)


def text_of(extensions: Sequence[Extension], kind: int) -> str | None:
    """The text of the last extension of a type, which is the one that counts; None where there is none."""
    data = data_of(extensions, kind)
    if data is None:
        return None
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape") or None


def data_of(extensions: Sequence[Extension], kind: int) -> bytes | None:
    """The data of the last extension of a type; None where there is none."""
    return next((each.data for each in reversed(extensions) if each.type == kind), None)


def feature_name(extensions: Sequence[Extension], sort: int, bit: int) -> str:
    """The name of a feature: as the image says it, or else its number."""
    table = data_of(extensions, FEATURE_NAMES) or b""
    for at in range(0, len(table) - _FEATURE.size + 1, _FEATURE.size):
        found_sort, found_bit, name = _FEATURE.unpack_from(table, at)
        if (found_sort, found_bit) == (sort, bit):
            text = bytes(name).split(b"\0", 1)[0].decode("utf-8", "replace").strip()
            if text:
                return text
    return f"bit {bit}"


def qemu_feature_names() -> Extension:
    """The table of names that QEMU writes into images of version 3."""
    return Extension(FEATURE_NAMES, b"".join(_FEATURE.pack(*each) for each in _QEMU_FEATURES))


def pack_extensions(extensions: Sequence[Extension]) -> bytes:
    """The extensions as they stand in the file, with the mark of the end."""
    return b"".join(each.pack() for each in extensions) + _PREFIX.pack(END, 0)
