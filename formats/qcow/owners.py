"""Refuse to write a qcow image whose tables and clusters do not lie apart.

A write to a cluster that two entries refer to would change both of their places in the disk, and one that replaces a
compressed cluster would leave a hole in what another entry refers to.

All L2 tables are read for that, whatever the image's size, and a bit for each cluster says that something has it. Two
payloads of compressed clusters may lie in one cluster, so these are sorted by their places. What is out of the ordinary
otherwise is looked at only in an image of few tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind
from tapfs.formats.apart import REMEDY, require_apart
from tapfs.formats.qcow.entries import COMPRESSED, STRAY_HEADER_WORD, fault
from tapfs.formats.qcow.header import ENTRY_LENGTH
from tapfs.formats.qcow.reader import QcowReader
from tapfs.formats.qcow.survey import Survey
from tapfs.references import EntryCounter, EntryLayout, OwnedClusters, TableKind, entry_counter

#: The clusters of a window of bits, as a power of two: two times 16 MiB, of which those that are set take memory.
OWNED_BITS = 27
#: So much of an image whose clusters are not all plain and whole: its entries are looked at one by one.
MAX_ODD_TABLE_BYTES = 512 << 10
#: No place of a longer file is a number of `tapfs.formats.apart`, which counts the bytes of compressed clusters.
_MAX_FILE_BYTES = 1 << 44


def require_owners(image: QcowReader) -> None:
    """Raise ImageError(read_only) if a table or cluster overlaps another one, with the place of the second.

    An entry that cannot be true is refused where it is used.
    """
    path, length = image.file.path, image.header.l2_length
    named = image.tables.file_size < _MAX_FILE_BYTES
    if image.fast_path:  # L1 alone gives every cluster
        if named:
            extents = ((entry, length + image.header.unit) for _, entry in image.l1.used())
            require_apart(extents, 1, path, what="tables with their clusters")
        return
    if _all_plain(image) or not named:
        return
    most = MAX_ODD_TABLE_BYTES // length
    if sum(1 for _ in islice(image.l1.used(), most + 1)) <= most:
        require_apart(_places(image), 1, path, what="clusters or tables")
    elif (counter := entry_counter(_layout(image))) is not None:
        place = counter.overlapping_payload(lambda: _tables(image))
        if place is not None:
            raise _overlap(image, place)


def _all_plain(image: QcowReader) -> bool:
    """Whether everything is plain and lies apart. An error where what is plain overlaps."""
    size = image.header.cluster_size
    counter = entry_counter(_layout(image))
    if image.follows_formula or image.header.l2_length % size:
        return False
    if counter is None:
        return Survey(image, image.tables.file_size, None).complete
    waiting, done, plain = {0}, set[int](), True
    while waiting:
        number = waiting.pop()
        done.add(number)
        owners = OwnedClusters(number, OWNED_BITS, -(-image.tables.file_size // size))
        plain &= _mark(image, counter, owners)
        waiting |= owners.others - done
    return plain


def _mark(image: QcowReader, counter: EntryCounter, owners: OwnedClusters) -> bool:
    """Mark the clusters of a window, tables first; whether all that is there is plain."""
    header = image.header
    size, plain = header.cluster_size, True
    for _, entry in _used(image):
        if entry % size:
            plain = False
        elif not owners.add(entry // size, header.l2_length // size, owned=True):
            raise _overlap(image, entry)
    for raw, stop in _tables(image):
        at = 0
        while at < stop:
            at = counter.mark_owners(raw, at, stop, TableKind.SOLE, owners)
            if at < stop:
                if owners.doubled:
                    raise _overlap(image, _place(raw, at, header.cluster_bits))
                plain = False
                at += 1
    return plain and not owners.shared


def _used(image: QcowReader) -> Iterator[tuple[int, int]]:
    """The L1 entries whose tables can be where they are said to be, with their indexes."""
    return ((index, entry) for index, entry in image.l1.used() if image.tables.table_fault(entry) is None)


def _tables(image: QcowReader) -> Iterator[tuple[bytes, int]]:
    """Each L2 table, and the number of its entries: those of the last one past the end of the disk are nobody's."""
    header = image.header
    last_entries = -(-(header.size - (len(image.l1) - 1) * header.unit) // header.cluster_size)
    for index, entry in _used(image):
        raw = image.file.read(entry, header.l2_length).ljust(header.l2_length, b"\0")
        yield raw, last_entries if index == len(image.l1) - 1 else header.l2_entries


def _layout(image: QcowReader) -> EntryLayout:
    bits = image.header.cluster_bits
    return EntryLayout(
        cluster_bits=bits,
        # The last cluster of a file may be cut.
        file_size=-(-image.tables.file_size >> bits) << bits,
        place_mask=COMPRESSED - 1,
        owned_mask=0,
        packed_mask=COMPRESSED,
        packed_place_mask=(1 << 63 - bits) - 1,
        packed_length_shift=63 - bits,
        packed_length_mask=(1 << bits) - 1,
        packed_bytes=True,
    )


def _place(raw: bytes, at: int, cluster_bits: int) -> int:
    word = int.from_bytes(raw[ENTRY_LENGTH * at : ENTRY_LENGTH * (at + 1)], "big")
    return word & (1 << 63 - cluster_bits) - 1 if word & COMPRESSED else word


def _overlap(image: QcowReader, place: int) -> ImageError:
    message = f"two clusters or tables overlap, at {place:#x}: the image can only be read"
    return ImageError(ErrorKind.READ_ONLY, message, path=image.file.path, offset=place, op="open", remedy=REMEDY)


def _places(image: QcowReader) -> Iterator[tuple[int, int]]:
    """The tables and clusters of the disk that can be where they are said to be."""
    header, tables = image.header, image.tables
    for index, entry in image.l1.used():
        if tables.table_fault(entry) is not None:
            continue
        yield entry, header.l2_length
        table = tables.read_from_disk(entry)
        if image.follows_formula and table[0] == STRAY_HEADER_WORD:
            table = tables.computed(entry)
        for run in image.table_runs(index, table):
            if run.kind is not Kind.UNALLOCATED and fault(run, header, tables.file_size) is None:
                yield run.host_offset, run.host_length or run.clusters << header.cluster_bits
