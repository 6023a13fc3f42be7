"""Amend a qcow2 image: version, width and laziness of refcounts, compression type, what it says of its data file.

Each of these stands in the header. An amendment looks whether every entry of every table means the same after it, and
then replaces the head of the first cluster (`head_change.py`). Nothing else of the image changes but, where version 3
needs sizes in the snapshot table that the table lacks, that table: a copy is durable before the head leads to it. The
width of refcounts changes with all of them, beside the old ones (`refcount_width.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import decode
from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.amend_options import OP, Wanted, parse_wanted, refused
from tapfs.formats.qcow2.bitmaps import read_bitmaps
from tapfs.formats.qcow2.edited_image import EditedImage, cluster_run, durable, l1_of, take
from tapfs.formats.qcow2.entries import BYTE_ORDER, COMPRESSED, OFFSET, TYPECODE, ZERO
from tapfs.formats.qcow2.head_change import head_plan
from tapfs.formats.qcow2.header import (
    COMPRESSION_DEFLATE,
    COMPRESSION_TYPE,
    DATA_FILE,
    EXTENDED_L2,
    LAZY_REFCOUNTS,
    LENGTH_2,
    LENGTH_3,
    RAW_DATA_FILE,
    REFCOUNT_ORDER_2,
    Header,
)
from tapfs.formats.qcow2.refcount_width import freed_plan, require_countable, second_refcounts
from tapfs.formats.qcow2.refcounts import ClusterRun
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.qcow2.snapshots import Snapshot, pack_snapshots
from tapfs.plan import Plan, plan

_VERSION_2, _VERSION_3 = VERSIONS
_MOST_OLD_STATE_BYTES = (1 << 32) - 1


class AmendedImage(EditedImage, Protocol):
    """An image open for writing, in which nothing is pending, with the bytes of its first cluster."""

    head: bytes


def drops_zero_clusters(image: AmendedImage, options: Mapping[str, str]) -> bool:
    """Whether the options ask for version 2, whose entries cannot say that a cluster is zeros.

    Raises ImageError(unsupported) for what the image cannot be.
    """
    wanted = parse_wanted(options, image.header, image.file.path)
    if (wanted.version, image.header.version) != (_VERSION_2, _VERSION_3):
        return False
    _require_old_features(image, wanted)
    return True


def amend(image: AmendedImage, options: Mapping[str, str]) -> Iterator[Plan]:
    """See :meth:`tapfs.edit_protocols.Amendable.amend`."""
    header, path = image.header, image.file.path
    wanted = parse_wanted(options, header, path)
    snapshots = image.read_snapshots()
    if wanted.version != header.version:
        if wanted.version == _VERSION_2:
            _require_old_features(image, wanted)
        _require_no_flag(image, snapshots, ZERO, wanted)
    if wanted.compression != header.compression_type:
        _require_no_flag(image, snapshots, COMPRESSED, wanted)
    _head_plan(image, _changed(header, wanted), wanted)  # before anything is changed: it may have no room
    other_width = wanted.refcount_order != header.refcount_order
    if other_width:
        require_countable(image, wanted.refcount_order)
    snapshots_place, old_table = header.snapshots_offset, list[ClusterRun]()
    if wanted.version > header.version and not all(each.has_sizes for each in snapshots):
        snapshots_place, step = take(image, pack_snapshots(snapshots, path))
        old_length = sum(each.length for each in snapshots)
        old_table = [cluster_run(image, header.snapshots_offset, old_length)]
        yield from durable(image)
        yield plan([step])
    second = None
    if other_width:
        second = yield from second_refcounts(image, wanted.refcount_order, old_table)
    # The refcount table may have moved with the table of snapshots.
    changed = _changed(image.header, wanted)._replace(snapshots_offset=snapshots_place)
    if second is not None:
        changed = changed._replace(reftable_offset=second.offset, reftable_clusters=second.clusters)
    yield _head_plan(image, changed, wanted)
    if second is not None:
        yield freed_plan(image, second)
        return
    for run in old_table:
        image.refcounts.lower_counts(*run)
    yield from durable(image)


def _changed(header: Header, wanted: Wanted) -> Header:
    if wanted.version == _VERSION_2:
        return header._replace(
            version=_VERSION_2,
            incompatible=0,
            compatible=0,
            autoclear=0,
            refcount_order=REFCOUNT_ORDER_2,
            header_length=LENGTH_2,
            compression_type=COMPRESSION_DEFLATE,
        )
    compatible = header.compatible & ~LAZY_REFCOUNTS | (LAZY_REFCOUNTS if wanted.lazy_refcounts else 0)
    incompatible = header.incompatible & ~COMPRESSION_TYPE
    incompatible |= 0 if wanted.compression == COMPRESSION_DEFLATE else COMPRESSION_TYPE
    autoclear = header.kept_autoclear & ~(0 if wanted.raw else RAW_DATA_FILE)
    return header._replace(
        version=wanted.version,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=wanted.refcount_order,
        header_length=max(header.header_length, LENGTH_3),
        compression_type=wanted.compression,
    )


def _head_plan(image: AmendedImage, changed: Header, wanted: Wanted) -> Plan:
    """The plan of the head with the header `changed`. Raises ImageError(out_of_bounds)."""
    header, kept = image.header, _extensions(image, changed, wanted)
    name = image.head[header.backing_offset : header.backing_offset + header.backing_size]
    found = head_plan(header, image.head, image.extensions, changed, kept, name if header.has_backing else b"")
    if found is None:
        message = "has no room for this in its first cluster: the names in it are too long"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=image.file.path, op=OP)
    return found


def _extensions(image: AmendedImage, changed: Header, wanted: Wanted) -> list[ext.Extension]:
    kept = list(image.extensions)
    if changed.version == _VERSION_2:
        return [each for each in kept if each.type != ext.FEATURE_NAMES]
    named = any(each.type == ext.FEATURE_NAMES for each in kept)
    if image.header.version == _VERSION_2 and not named and changed.cluster_size >= ext.FEATURE_NAMES_NEED:
        kept.append(ext.qemu_feature_names())
    if wanted.data_file is not None:
        name = ext.Extension(ext.DATA_FILE_NAME, wanted.data_file.encode("utf-8", "surrogateescape"))
        kept = [*(each for each in kept if each.type != ext.DATA_FILE_NAME), name]
    return kept


def _require_old_features(image: AmendedImage, wanted: Wanted) -> None:
    """Raise ImageError(unsupported) for what version 2 does not have, but for zero clusters."""
    header, path = image.header, image.file.path
    later = {
        "a data file": header.incompatible & DATA_FILE,
        "subclusters": header.incompatible & EXTENDED_L2,
        "unknown features": header.compatible & ~LAZY_REFCOUNTS,
        f"reference counts of {header.refcount_bits} bits": wanted.refcount_order != REFCOUNT_ORDER_2,
    }
    for what, there in later.items():
        if there:
            also = "amend refcount_bits=16 with it, or " if what.startswith("reference") else ""
            remedy = f"{also}make a new image: tapfs convert -O qcow2 -o compat=0.10"
            raise refused(f"has {what}, which version 2 does not have", path, remedy)
    if wanted.compression != header.compression_type:
        _require_no_flag(image, image.read_snapshots(), COMPRESSED, wanted)
    if read_bitmaps(image.file, image.extensions):
        raise refused("has bitmaps, which version 2 does not have", path, "remove them first: tapfs bitmap --remove")
    for each in image.read_snapshots():
        if each.disk_size != header.size or each.state_bytes > _MOST_OLD_STATE_BYTES:
            message = f"snapshot {each.name or each.id} has a disk or a state of a size that version 2 cannot say"
            raise refused(message, path, "delete it first: tapfs snapshot -d")


def _require_no_flag(image: AmendedImage, snapshots: Sequence[Snapshot], flag: int, wanted: Wanted) -> None:
    """Raise ImageError if an entry of any table has a flag that would mean something else."""
    disks = [("the disk", image.l1)]
    disks += [(f"snapshot {each.name or each.id}", l1_of(image, each, OP)) for each in snapshots]
    step = image.header.l2_entry_bytes // 8
    seen: set[int] = set()
    for whose, l1 in disks:
        for _, entry in l1.used():
            place = entry & OFFSET
            if place in seen or not place:
                continue
            seen.add(place)
            words = decode(image.file.read(place, image.header.cluster_size), TYPECODE, BYTE_ORDER)[::step]
            if any(word & flag and (flag == COMPRESSED or not word & COMPRESSED) for word in words):
                raise _meant_otherwise(image, whose, place, flag, wanted)


def _meant_otherwise(image: AmendedImage, whose: str, place: int, flag: int, wanted: Wanted) -> ImageError:
    path = image.file.path
    if flag == COMPRESSED:
        option = "compat=0.10" if wanted.version == _VERSION_2 else "compression_type=…"
        remedy = f"make a new image: tapfs convert -c -O qcow2 -o {option}"
        return refused(f"{whose} has compressed clusters, which are of the type that the image says", path, remedy)
    if wanted.version == _VERSION_2:
        remedy = "delete the snapshot first, or make a new image: tapfs convert -O qcow2 -o compat=0.10"
        return refused(f"{whose} has zero clusters, which version 2 does not have", path, remedy)
    message = f"an entry of {whose} has bit 0, which says nothing in version 2 and zeros in version 3"
    return ImageError(ErrorKind.CORRUPT, message, path=path, offset=place, op=OP, remedy="run tapfs check")
