"""The details of a qcow2 image, for `tapfs info`: the header in words, the snapshots and the bitmaps."""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.driver import HostFile
from tapfs.errors import ImageError
from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.bitmaps import read_bitmaps
from tapfs.formats.qcow2.encryption import Encryption
from tapfs.formats.qcow2.header import (
    BITMAPS,
    COMPRESSION_ZSTD,
    CORRUPT,
    DIRTY,
    LAZY_REFCOUNTS,
    Header,
)
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.qcow2.snapshots import read_snapshots

#: qemu-img's names of the versions.
_COMPAT = {2: "0.10", 3: "1.1"}


def describe(
    file: HostFile, header: Header, extensions: Sequence[ext.Extension], encryption: Encryption | None
) -> dict[str, object]:
    """JSON-able; a part that cannot be read is left out, and says in its place why."""
    later = header.version > VERSIONS[0]
    return {
        "cluster_size": header.cluster_size,
        "compat": _COMPAT[header.version],
        "refcount_bits": header.refcount_bits,
        "lazy_refcounts": header.compatible & LAZY_REFCOUNTS != 0 if later else None,
        "compression": "zstd" if header.compression_type == COMPRESSION_ZSTD else "zlib",
        "extended_l2": header.extended_l2 if later else None,
        "data_file": ext.text_of(extensions, ext.DATA_FILE_NAME) if header.has_data_file else None,
        "data_file_raw": header.has_raw_data_file if header.has_data_file else None,
        "backing_format": ext.text_of(extensions, ext.BACKING_FORMAT),
        "encryption": None if encryption is None else encryption.name,
        "luks": None if encryption is None else encryption.details,
        "dirty": True if header.incompatible & DIRTY else None,
        "corrupt": True if header.incompatible & CORRUPT else None,
        "snapshots": _snapshots(file, header),
        "bitmaps": _bitmaps(file, header, extensions),
        "l1_entries": header.l1_entries,
        "l1_table_offset": header.l1_offset,
        "l2_entries": header.l2_entries,
        "refcount_table_offset": header.reftable_offset,
        "refcount_table_clusters": header.reftable_clusters,
        "header_length": header.header_length,
    }


def _snapshots(file: HostFile, header: Header) -> list[dict[str, object]] | str | None:
    try:
        found = read_snapshots(file, header)
    except ImageError as error:
        return str(error)
    listed: list[dict[str, object]] = [
        {
            "id": each.id,
            "name": each.name,
            "seconds": each.seconds,
            "virtual_size": each.disk_size,
            "state_bytes": each.state_bytes,
        }
        for each in found
    ]
    return listed or None


def _bitmaps(
    file: HostFile, header: Header, extensions: Sequence[ext.Extension]
) -> list[dict[str, object]] | str | None:
    try:
        found = read_bitmaps(file, extensions)
    except ImageError as error:
        return str(error)
    # Whoever wrote the image without knowing bitmaps has cleared the bit: none of them follows the disk then.
    followed = header.autoclear & BITMAPS != 0
    listed: list[dict[str, object]] = [
        {
            "name": each.name,
            "granularity": each.granularity,
            "enabled": each.enabled,
            "consistent": each.consistent and followed,
        }
        for each in found
    ]
    return listed or None
