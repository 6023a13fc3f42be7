"""Finds what of a qcow2 image's bitmaps cannot be true: the header extension, the directory, and the tables of bits.

QEMU's docs/interop/qcow2, "Bitmaps extension". QEMU opens no image whose bitmaps break one of these rules.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.errors import ImageError
from tapfs.formats.changed_table import decode
from tapfs.formats.qcow2.bitmap_bits import is_possible_table, table_entries
from tapfs.formats.qcow2.bitmaps import (
    EXTENSION_BYTES,
    KNOWN_FLAGS,
    MAX_NAME_BYTES,
    TYPE_DIRTY,
    Bitmap,
    directory_of,
    read_bitmaps,
    reserved_of_extension,
)
from tapfs.formats.qcow2.entries import BYTE_ORDER, OFFSET, TYPECODE
from tapfs.formats.qcow2.extensions import BITMAPS, data_of
from tapfs.formats.qcow2.header import BITMAPS as KEPT
from tapfs.formats.qcow2.header import WORD
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.rounding import round_up

#: A message, and the place of what is wrong in the file.
Fault = tuple[str, int]
MIN_GRANULARITY, MAX_GRANULARITY = 1 << 9, 1 << 31
_ALL_ONES = 1
#: Bits of a table's entry that mean something.
_KNOWN_BITS = OFFSET | _ALL_ONES


def faults_of_bitmaps(image: Qcow2Reader) -> Iterator[Fault]:
    """What is wrong with the extension, the directory and its entries.

    Nothing, where the image says that bitmaps are not kept.
    """
    if data_of(image.extensions, BITMAPS) is None or not image.header.autoclear & KEPT:
        return
    yield from faults_of_directory(image)
    try:
        listed = read_bitmaps(image.file, image.extensions)
    except ImageError:  # whoever follows the directory says so
        return
    for each in listed:
        wrong = _wrong(each, image)
        if wrong is not None:
            yield f"bitmap {each.name} {wrong}", each.offset


def faults_of_directory(image: Qcow2Reader) -> Iterator[Fault]:
    """What is wrong with the extension and the directory, besides the bitmaps that it lists."""
    data = data_of(image.extensions, BITMAPS)
    if data is None:
        return
    place = next(each.offset for each in reversed(image.extensions) if each.type == BITMAPS)
    directory = directory_of(image.extensions)
    if directory is None or len(data) != EXTENSION_BYTES:
        yield f"the header extension of bitmaps has {len(data)} bytes, not {EXTENSION_BYTES}", place
        return
    if reserved_of_extension(data):
        yield "the header extension of bitmaps has bits that are reserved", place
    if not directory.bitmaps:
        yield "the header extension of bitmaps lists none", place
    if directory.offset % image.header.cluster_size or not directory.offset:
        yield f"the directory of bitmaps at {directory.offset:#x} is not on a cluster behind the header", place
    try:
        listed = read_bitmaps(image.file, image.extensions)
    except ImageError:  # whoever follows the directory says so
        return
    last = max((each.offset + len(each.raw) for each in listed), default=directory.offset)
    if listed and directory.offset + directory.length != round_up(last, WORD):
        yield f"the directory of bitmaps has {directory.length} bytes, and its entries end elsewhere", place


def fault_of_bitmap(image: Qcow2Reader, bitmap: Bitmap) -> str | None:
    """The first thing of a bitmap, of its entry or its table, that cannot be true."""
    wrong = _wrong(bitmap, image)
    if wrong is not None:
        return wrong
    end = bitmap.table_offset + WORD * bitmap.table_entries
    if bitmap.table_offset % image.header.cluster_size or end > image.file.size():
        return "has a table that cannot be there"
    return next((fault for _, fault in faults_of_table(image, bitmap) if fault is not None), None)


def faults_of_table(image: Qcow2Reader, bitmap: Bitmap) -> Iterator[tuple[int, str | None]]:
    """Each entry of a bitmap's table that is not empty, and what makes it impossible."""
    cluster = image.header.cluster_size
    raw = image.file.read(bitmap.table_offset, WORD * bitmap.table_entries)
    for entry in decode(raw[: len(raw) // WORD * WORD], TYPECODE, BYTE_ORDER):
        place = entry & OFFSET
        if not entry:
            continue
        if entry & ~_KNOWN_BITS or (place and entry & _ALL_ONES):
            yield entry, f"has bits that are reserved ({entry:#x})"
        elif place % cluster:
            yield entry, f"leads to {place:#x}, not on a cluster"
        elif place >= image.file.size():
            yield entry, f"leads past the end of the file ({place:#x})"
        else:
            yield entry, None


def _wrong(bitmap: Bitmap, image: Qcow2Reader) -> str | None:
    """What of an entry of the directory cannot be true."""
    if bitmap.flags & ~KNOWN_FLAGS:
        return f"has flags that are reserved ({bitmap.flags:#x})"
    if bitmap.type != TYPE_DIRTY:
        return f"is of type {bitmap.type}, which is reserved"
    if not MIN_GRANULARITY <= bitmap.granularity <= MAX_GRANULARITY:
        return f"has pieces of {bitmap.granularity} bytes"
    if not 0 < len(bitmap.name.encode("utf-8", "surrogateescape")) <= MAX_NAME_BYTES:
        return "has a name of a length that none may have"
    needed = table_entries(image.header.size, bitmap.granularity, image.header.cluster_size)
    if not is_possible_table(bitmap.table_entries, image.header.cluster_size):
        return f"has a table of {bitmap.table_entries} entries, which none may have"
    if bitmap.consistent and bitmap.table_entries != needed:
        return f"has a table of {bitmap.table_entries} entries, and {needed} are needed"
    return None
