"""The bits of a qcow2 bitmap: read from its table as ranges of the disk, and made of ranges again.

Bit `n` stands for the piece `n` of the disk, least significant bit of a byte first. An entry of the table leads to a
cluster of bits, or says that all its bits are 0 or 1 (QEMU's docs/interop/qcow2, "Bitmap table").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tapfs.driver import HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.changed_table import decode
from tapfs.formats.qcow2.bitmaps import EXTRA_DATA_COMPATIBLE, KNOWN_FLAGS, TYPE_DIRTY, Bitmap
from tapfs.formats.qcow2.entries import BYTE_ORDER, OFFSET, TYPECODE
from tapfs.formats.qcow2.header import WORD, Header
from tapfs.patterns import pattern

#: Granularities that QEMU takes, as exponents of 2.
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31
#: QEMU takes no bitmap of more bytes.
MAX_BITMAP_BYTES = 512 << 20
#: The entry of a cluster whose bits are all 1, and the bits that no entry has.
ALL_ONES = 1
_RESERVED = ((1 << 64) - 1) & ~OFFSET & ~ALL_ONES
#: A run of bytes of ones, or a byte that is neither ones nor 0.
_MARKED = pattern(rb"\xff+|[^\0\xff]")


def table_entries(size: int, granularity: int, cluster_size: int) -> int:
    """Entries of the table of a bitmap of a disk of `size` bytes."""
    pieces = -(-size // granularity)
    return -(-pieces // (8 * cluster_size))


def is_possible_table(entries: int, cluster_size: int) -> bool:
    """Whether QEMU takes a bitmap with a table of so many entries: it does not open an image that has another."""
    return 0 < entries * cluster_size <= MAX_BITMAP_BYTES


def usable_entries(file: HostFile, header: Header, bitmap: Bitmap) -> Sequence[int]:
    """The table of a bitmap. Raises ImageError: corrupt where it cannot be true, unsupported for an unknown kind."""

    def wrong(message: str, kind: ErrorKind = ErrorKind.CORRUPT) -> ImageError:
        text = f"bitmap {bitmap.name!r}: {message}"
        return ImageError(kind, text, path=file.path, offset=bitmap.offset, op="read a bitmap")

    if bitmap.type != TYPE_DIRTY or bitmap.flags & ~KNOWN_FLAGS:
        raise wrong(f"its type {bitmap.type} with the flags {bitmap.flags:#x} is unknown", ErrorKind.UNSUPPORTED)
    if bitmap.has_extra and not bitmap.flags & EXTRA_DATA_COMPATIBLE:
        raise wrong("it has extra data that a reader must know", ErrorKind.UNSUPPORTED)
    if not 1 << MIN_GRANULARITY_BITS <= bitmap.granularity <= 1 << MAX_GRANULARITY_BITS:
        raise wrong(f"a granularity of {bitmap.granularity} bytes cannot be")
    wanted = table_entries(header.size, bitmap.granularity, header.cluster_size)
    if bitmap.table_entries != max(1, wanted) and bitmap.table_entries != wanted:
        raise wrong(f"its table has {bitmap.table_entries} entries, the disk needs {wanted}")
    if WORD * wanted > file.size() or wanted * header.cluster_size > MAX_BITMAP_BYTES + header.cluster_size:
        raise wrong("it is too large")
    length = WORD * wanted
    if bitmap.table_offset % header.cluster_size or bitmap.table_offset + length > file.size():
        raise wrong(f"its table at {bitmap.table_offset:#x} cannot be there")
    entries = decode(file.read(bitmap.table_offset, length), TYPECODE, BYTE_ORDER)
    for entry in entries:
        place = entry & OFFSET
        if entry & _RESERVED or (place and entry & ALL_ONES):
            raise wrong(f"an entry of its table, {entry:#x}, has bits that none has")
        if place % header.cluster_size or place >= file.size() or 0 < place < header.cluster_size:
            raise wrong(f"a cluster of its bits at {place:#x} cannot be there")
    return entries


def marked_ranges(file: HostFile, header: Header, bitmap: Bitmap) -> Iterator[Range]:
    """The ranges of the disk that a bitmap marks: ascending, merged, inside the disk. Raises as `usable_entries`."""
    granularity, size = bitmap.granularity, header.size
    start = end = 0
    for first, stop in _runs(file, header, usable_entries(file, header, bitmap)):
        low, high = first * granularity, min(stop * granularity, size)
        if low >= size:
            break
        if low == end:
            end = high
            continue
        if end > start:
            yield Range(start, end - start)
        start, end = low, high
    if end > start:
        yield Range(start, end - start)


def _runs(file: HostFile, header: Header, entries: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of bits that are 1, ascending: the first and the one behind the last. Runs may continue each other."""
    size = header.cluster_size
    for index, entry in enumerate(entries):
        base = index * size * 8
        if entry & ALL_ONES:
            yield base, base + size * 8
        elif entry:
            yield from bit_runs(file.read(entry & OFFSET, size), base)


def bit_runs(content: bytes, base: int) -> Iterator[tuple[int, int]]:
    """The runs of bits that are 1, of which the first has the number `base`; runs may continue each other."""
    for found in _MARKED.finditer(content):
        at, byte = base + found.start() * 8, found[0][0]
        if byte == 0xFF:
            yield at, base + found.end() * 8
        else:
            yield from ((at + first, at + stop) for first, stop in _RUNS_OF_BYTE[byte])


def _runs_of(byte: int) -> tuple[tuple[int, int], ...]:
    starts = [bit for bit in range(8) if byte >> bit & 1 and not (bit and byte >> (bit - 1) & 1)]
    return tuple((start, next(bit for bit in range(start, 9) if not byte >> bit & 1)) for start in starts)


_RUNS_OF_BYTE = tuple(_runs_of(byte) for byte in range(256))


def clusters_of(ranges: Iterable[Range], granularity: int, cluster_size: int) -> Iterator[tuple[int, bytes]]:
    """The clusters of bits that mark these ranges, without those of zeros: index in the table, and bits.

    The ranges ascend and do not overlap. A piece that is touched is marked.
    """
    index = -1
    content = bytearray()
    for offset, length in ranges:
        first, stop = offset // granularity, -(-(offset + length) // granularity)
        while first < stop:
            at, inside = divmod(first, cluster_size * 8)
            if at != index:
                if content:
                    yield index, bytes(content)
                index, content = at, bytearray(cluster_size)
            part = min(stop - first, cluster_size * 8 - inside)
            mark_bits(content, inside, inside + part)
            first += part
    if content:
        yield index, bytes(content)


def mark_bits(content: bytearray, first: int, stop: int) -> None:
    """Set the bits ``[first, stop)``."""
    low, high = first // 8, stop // 8
    if low == high:
        content[low] |= (1 << stop % 8) - (1 << first % 8)
        return
    content[low] |= 0x100 - (1 << first % 8)
    content[low + 1 : high] = b"\xff" * (high - low - 1)
    if stop % 8:
        content[high] |= (1 << stop % 8) - 1
