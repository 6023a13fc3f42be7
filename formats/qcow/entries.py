"""L2 entries: decode the words of a table into extents, and encode them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tapfs.extent import Extent, Kind
from tapfs.formats.changed_table import ByteOrder, decode, encode
from tapfs.formats.qcow.header import ENTRY_LENGTH, LENGTH, Header
from tapfs.records import NamedTuple

#: L2 tables are big-endian always.
BYTE_ORDER: ByteOrder = "big"

#: The alignment that every plain cluster has.
SECTOR = 512

COMPRESSED = 1 << 63

#: The first word of an L2 table over which blktap of 2008 to 2010 wrote a header in host order.
STRAY_HEADER_WORD = int.from_bytes(b"\xfbIFQ\x01\x00\x00\x00", "big")


def new_table(count: int) -> array[int]:
    """A table of `count` zero entries."""
    return array("Q", bytes(ENTRY_LENGTH * count))


def decode_table(raw: bytes) -> array[int]:
    """The entries of a table on disk."""
    return decode(raw, "Q", BYTE_ORDER)


def encode_entries(entries: array[int]) -> bytes:
    """Entries as they stand on disk."""
    return encode(entries, BYTE_ORDER)


def consecutive(start: int, count: int, step: int) -> array[int]:
    """The entries of `count` plain clusters that follow one another from host offset `start`."""
    return array("Q", range(start, start + count * step, step))


def compressed_entry(host_offset: int, host_length: int, cluster_bits: int) -> int:
    """The entry of a compressed cluster; `host_length` must be below the cluster size."""
    return COMPRESSED | host_length << (63 - cluster_bits) | host_offset


def compressed_place(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Host offset and length in bytes of a compressed cluster's payload."""
    shift = 63 - cluster_bits
    return entry & ((1 << shift) - 1), (entry >> shift) & ((1 << cluster_bits) - 1)


class Run(NamedTuple):
    """`clusters` table entries from `first` on that are one extent.

    They are unallocated (`host_offset` 0), or plain and consecutive, or one compressed cluster.
    """

    first: int
    clusters: int
    kind: Kind
    host_offset: int = 0
    host_length: int = 0


def runs(table: array[int], cluster_bits: int, start: int = 0, stop: int | None = None) -> Iterator[Run]:
    """The entries ``[start, stop)`` of a table as runs, ascending and as long as possible."""
    step = 1 << cluster_bits
    end = len(table) if stop is None else stop
    index = start
    while index < end:
        entry = table[index]
        if entry & COMPRESSED:
            host_offset, host_length = compressed_place(entry, cluster_bits)
            yield Run(index, 1, Kind.COMPRESSED, host_offset, host_length)
            index += 1
            continue
        advance = step if entry else 0
        after = index + 1
        expected = entry + advance
        # A whole run is usual (a filled, an empty table), so try that before stepping through.
        if after < end and table[end - 1] == entry + (end - 1 - index) * advance:
            whole = consecutive(entry, end - index, step) if advance else new_table(end - index)
            if table[index:end] == whole:
                after = end
        while after < end and table[after] == expected:
            after += 1
            expected += advance
        yield Run(index, after - index, Kind.DATA if entry else Kind.UNALLOCATED, entry)
        index = after


def fault(run: Run, header: Header, file_size: int) -> str | None:
    """What makes the place of a run impossible, or None.

    A plain cluster may end past the end of the file, but not start there.
    """
    if run.kind == Kind.UNALLOCATED:
        return None
    if run.kind == Kind.COMPRESSED:
        if run.host_length == 0:
            return f"compressed cluster at {run.host_offset:#x} is empty"
        last, length = run.host_offset + run.host_length - 1, run.host_length
        what = f"compressed cluster [{run.host_offset:#x}, {last + 1:#x})"
    else:
        last, length = run.host_offset + (run.clusters - 1) * header.cluster_size, run.clusters * header.cluster_size
        what = (
            f"cluster at {run.host_offset:#x}" if run.clusters == 1 else f"clusters {run.host_offset:#x} to {last:#x}"
        )
        if run.host_offset % SECTOR:
            return f"{what} not aligned to {SECTOR} bytes"
    if last >= file_size:
        return f"{what} past the end of the file ({file_size:#x})"
    if run.host_offset < LENGTH:
        return f"{what} inside the header"
    if run.host_offset < header.l1_end and header.l1_table_offset < run.host_offset + length:
        return f"{what} inside the L1 table"
    return None


def extent_of(run: Run, unit_offset: int, cluster_bits: int, *, writable: bool) -> Extent:
    """A run of the table whose first entry maps guest offset `unit_offset`, as an extent."""
    return Extent(
        offset=unit_offset + (run.first << cluster_bits),
        length=run.clusters << cluster_bits,
        kind=run.kind,
        host_offset=run.host_offset,
        host_length=run.host_length,
        in_place=writable and run.kind == Kind.DATA,
    )
