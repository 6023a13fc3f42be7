"""Give a qcow disk another size (docs/specs/blktap-qcow.md, "Header").

The header has no length of the L1 table: it follows from the size. A longer table is made at the end of the file, with
zeros behind its entries, before the size says that they count. The place of the table, the size and blktap's cksum
stand in the first sector of the file, so each change of them is one write.

A smaller size is told first. Then the entries behind it are cleared and their clusters are given back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind
from tapfs.formats.qcow.entries import Run, encode_entries, fault, new_table, runs
from tapfs.formats.qcow.extended import CKSUM_AT, L1_ALIGNMENT, table_cksum
from tapfs.formats.qcow.header import (
    ENTRY_LENGTH,
    L1_TABLE_OFFSET_AT,
    MAX_L1_BYTES,
    MAX_VIRTUAL_SIZE,
    SIZE_AT,
    Header,
)
from tapfs.formats.qcow.writer import WritableQcowDriver
from tapfs.formats.rounding import round_down, round_up
from tapfs.plan import Discard, Grow, Plan, Step, Write, plan

_SECTOR = 512


def make_room(image: WritableQcowDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.make_room`."""
    return _roomy(image, _wanted(image, size))


def resize(image: WritableQcowDriver, size: int) -> Iterator[Plan]:
    """See :meth:`tapfs.driver.Resizable.resize`."""
    return _resized(image, _wanted(image, size))


def _wanted(image: WritableQcowDriver, size: int) -> Header:
    """The header of the size that the disk is to have. Raises ImageError(out_of_bounds)."""
    header = image.header._replace(size=round_up(size, _SECTOR))
    if size < 1 or header.size > MAX_VIRTUAL_SIZE or header.l1_length > MAX_L1_BYTES:
        most = min(MAX_VIRTUAL_SIZE, MAX_L1_BYTES // ENTRY_LENGTH * header.unit)
        message = f"a disk of qcow with these clusters has 1 to {most} bytes, not {size}"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=image.file.path, op="resize")
    return header


def _roomy(image: WritableQcowDriver, wanted: Header) -> Iterator[Plan]:
    header = image.header
    if wanted.l1_entries == header.l1_entries:
        return
    # Payloads lie at any byte, so nothing says that the space right behind the table is free.
    alignment = max(header.cluster_size, L1_ALIGNMENT)
    place = round_up(image.file.size(), alignment)
    table = bytes(image.l1.raw).ljust(wanted.l1_length, b"\0")
    yield plan(
        [Grow(0, place + round_up(wanted.l1_length, alignment))],
        [Write(0, place, table)],
        [Write(0, L1_TABLE_OFFSET_AT, place.to_bytes(8, "big"))],
        [Discard(0, header.l1_table_offset, header.l1_length)],
    )


def _resized(image: WritableQcowDriver, wanted: Header) -> Iterator[Plan]:
    table = bytes(image.file.read(wanted.l1_table_offset, wanted.l1_length)).ljust(wanted.l1_length, b"\0")
    if wanted.size < image.header.size:
        table = bytes(image.l1.raw[: wanted.l1_length])
    yield plan([Write(0, SIZE_AT, _fields(image, wanted, table))])
    if wanted.size < image.header.size:
        yield from _cut(image, wanted)


def _fields(image: WritableQcowDriver, wanted: Header, table: bytes) -> bytes:
    """The first sector from the size to the cksum; that of an image which has none is not changed."""
    fields = bytearray(image.file.read(SIZE_AT, CKSUM_AT + 4 - SIZE_AT))
    fields[:8] = wanted.size.to_bytes(8, "big")
    extended = image.extended
    if extended is not None:
        # Where L2 counts for everybody the cksum may become right again, if the flags say the order of L1.
        follows = extended.min_cluster_alloc == 1 and extended.big_endian_flag == (image.l1.order == "big")
        if image.cksum_valid or follows:
            fields[-4:] = table_cksum(table).to_bytes(4, "big")
    return bytes(fields)


def _cut(image: WritableQcowDriver, wanted: Header) -> Iterator[Plan]:
    """Clear the entries behind the end, and give back what they referred to."""
    header, unit = image.header, image.header.unit
    first = wanted.l1_entries
    inside = -(-(wanted.size - (first - 1) * unit) // header.cluster_size)
    if inside < header.l2_entries and image.l1[first - 1]:
        yield from _cut_table(image, first - 1, inside)
    freed: list[Step] = []
    for index in range(first, header.l1_entries):
        table_offset = image.l1[index]
        if table_offset and image.tables.table_fault(table_offset) is None:
            freed += [Discard(0, start, length) for start, length in _held(image, index, 0)]
            freed.append(Discard(0, table_offset, header.l2_length))
    behind = header.l1_length - wanted.l1_length
    cleared: list[Step] = [Write(0, wanted.l1_end, bytes(behind))] if behind else []
    if cleared or freed:
        yield plan(cleared, freed)


def _cut_table(image: WritableQcowDriver, index: int, first: int) -> Iterator[Plan]:
    held = list(_held(image, index, first))
    steps: list[Step] = []
    entries = image.tables.load(index)
    # In an image of blktap L1 gives every cluster, and the entries must go on to say the same.
    if entries is not None and not image.follows_formula:
        changed = entries[:]
        changed[first:] = new_table(len(entries) - first)
        at = round_down(first * ENTRY_LENGTH, _SECTOR)
        steps.append(Write(0, image.l1[index] + at, encode_entries(changed[at // ENTRY_LENGTH :])))
    yield plan(steps, [Discard(0, start, length) for start, length in held])


def _held(image: WritableQcowDriver, index: int, first: int) -> Iterator[tuple[int, int]]:
    """The host ranges that the entries of a table from `first` on refer to."""
    entries = image.tables.load(index)
    if entries is None:
        return
    found: list[Run] = list(runs(entries, image.header.cluster_bits, first, len(entries)))
    for run in found:
        if run.kind is Kind.UNALLOCATED or fault(run, image.header, image.tables.file_size) is not None:
            continue
        packed = run.kind is Kind.COMPRESSED
        yield run.host_offset, run.host_length if packed else run.clusters * image.header.cluster_size
