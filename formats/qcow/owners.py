"""Refuse to write a qcow image whose tables and clusters do not lie apart.

A write to a cluster that two entries refer to would change both of their places in the disk, and one that replaces a
compressed cluster would leave a hole in what another entry refers to.

All L2 tables are read for that. An image with more of them, or with more that is out of the ordinary, is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tapfs.extent import Kind
from tapfs.formats.apart import require_apart
from tapfs.formats.qcow.entries import STRAY_HEADER_WORD, fault
from tapfs.formats.qcow.reader import QcowReader
from tapfs.formats.qcow.survey import Survey

#: Bytes of the L2 tables of an image that is looked at: two million entries.
MAX_TABLE_BYTES = 16 << 20
#: So much of an image whose clusters are not all plain and whole: its entries are looked at one by one.
MAX_ODD_TABLE_BYTES = 512 << 10
#: Clusters of the file of an image that is looked at; each takes a byte meanwhile.
_MAX_CLUSTERS = 1 << 23
#: No place of a longer file is a number of `tapfs.formats.apart`, which counts the bytes of compressed clusters.
_MAX_FILE_BYTES = 1 << 44


def require_owners(image: QcowReader) -> None:
    """Raise ImageError(read_only) if a table or cluster overlaps another one, with the place of the second.

    An entry that cannot be true is refused where it is used.
    """
    if image.tables.file_size >= _MAX_FILE_BYTES:
        return
    path, length = image.file.path, image.header.l2_length
    if image.fast_path:  # L1 alone gives every cluster
        extents = ((entry, length + image.header.unit) for _, entry in image.l1.used())
        require_apart(extents, 1, path, what="tables with their clusters")
        return
    most = MAX_TABLE_BYTES // length
    tables = sum(1 for _ in islice(image.l1.used(), most + 1))
    clusters = image.tables.file_size >> image.header.cluster_bits
    if not 0 < tables <= most or clusters > _MAX_CLUSTERS:
        return
    survey = Survey(image, image.tables.file_size, None)
    if survey.doubled or (not survey.complete and tables * length <= MAX_ODD_TABLE_BYTES):
        require_apart(_places(image), 1, path, what="clusters or tables")


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
