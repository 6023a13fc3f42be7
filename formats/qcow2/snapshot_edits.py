"""Create, apply and delete the snapshots of a qcow2 image: generators of plans (`tapfs.edit_protocols`).

The order of each, whose stages are durable one after the other:

* *create*: the counts of all that the current disk refers to are raised; a copy of its L1 table and a new snapshot
  table are written; its entries say no more that they own anything alone; one write of the header leads to the new
  snapshot table; the old one is freed.
* *apply*: the counts of all that the snapshot refers to are raised; a copy of its L1 table is written; one write of
  the header makes that the current L1 table, with the size of its disk; what the disk was before is let go.
* *delete*: a snapshot table without it is written; one write of the header leads there; what the snapshot referred to
  is let go; the entries of the current disk say again what they own alone.

Counts that are too high are leaks. A count that does not fit the bit of an entry is neither a leak nor a danger, but a
check calls it an error. So version 3 is marked as dirty while such entries may be there, and a repair mends both.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2.bitmaps import read_bitmaps
from tapfs.formats.qcow2.disk_tables import DiskTables
from tapfs.formats.qcow2.edited_image import (
    EditedImage,
    changed_sectors,
    durable,
    in_plans,
    l1_of,
    marked,
    refused,
    release,
    require_sound,
    take,
)
from tapfs.formats.qcow2.header import (
    DIRTY,
    INCOMPATIBLE_AT,
    LENGTH_2,
    SIZE_AT,
    SNAPSHOT_COUNT_AT,
    WORD,
    l1_entries_for,
)
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.qcow2.snapshots import Snapshot, new_id, pack_snapshots, snapshot_to_change
from tapfs.plan import Plan, Step, Write, plan

#: Of refcount blocks so many bytes are lowered by one plan.
_LOWERED_BYTES = 8 << 20
#: QEMU cuts a longer name when it lists the snapshots.
MAX_NAME_BYTES = 255


def create_snapshot(image: EditedImage, name: str, seconds: int) -> Iterator[Plan]:
    """See :meth:`tapfs.edit_protocols.SnapshotKeeper.create_snapshot`.

    Raises ImageError(out_of_bounds) where the counts of the image are too narrow for one reference more.
    """
    op = "create a snapshot"
    _refuse_data_file(image, op)
    kept = image.read_snapshots()
    _require_name(image, name, kept)
    require_sound(image, op)
    current = DiskTables(image, image.l1)
    shared = bool(current.places())
    _share(image, current)
    l1 = current.l1_without_bits()
    place, l1_step = take(image, bytes(l1.raw)) if len(l1) else (0, None)
    header = image.header
    new = Snapshot(new_id(kept), name, place, len(l1), header.size, seconds, 0)
    table_place, table_step = take(image, pack_snapshots([*kept, new], image.file.path))
    yield from marked(image, dirty=shared)
    yield from durable(image)
    yield plan([step for step in (l1_step, table_step) if step is not None])
    yield from in_plans(current.clear_bits())
    yield from in_plans(changed_sectors(image.l1_offset, bytes(image.l1.raw), l1.raw))
    yield _switched(image, len(kept) + 1, table_place, dirty=False)
    _release_table(image, kept)
    yield from durable(image)


def apply_snapshot(image: EditedImage, name: str) -> Iterator[Plan]:
    """See :meth:`tapfs.edit_protocols.SnapshotKeeper.apply_snapshot`.

    The disk gets the size that it had then. Raises ImageError(unsupported) for an image with bitmaps: they would not
    follow.
    """
    op = "apply a snapshot"
    _refuse_data_file(image, op)
    kept = image.read_snapshots()
    wanted = snapshot_to_change(kept, name, image.file.path)
    bitmaps = read_bitmaps(image.file, image.extensions)
    if bitmaps:
        named = ", ".join(each.name for each in bitmaps)
        raise refused(image, f"has bitmaps, which would say nothing true any more: {named}", op, "remove them first")
    if image.header.version == VERSIONS[0] and wanted.disk_size != image.header.size:
        message = f"the snapshot has a disk of {wanted.disk_size} bytes, and version 2 cannot change the size"
        raise refused(image, message, op)
    require_sound(image, op)
    l1 = l1_of(image, wanted, op)
    _require_length(image, wanted, op)
    tables = DiskTables(image, l1)
    _share(image, tables)
    left = DiskTables(image, image.l1)
    left_place, left_length = image.l1_offset, image.header.l1_length
    place, l1_step = take(image, bytes(tables.l1_without_bits().raw)) if len(l1) else (0, None)
    count, table_place = image.header.snapshot_count, image.header.snapshots_offset
    table_step: Step | None = None
    if wanted.disk_size != image.header.size:  # an entry without a size means that of the current disk
        table_place, table_step = take(image, pack_snapshots(kept, image.file.path))
    yield from marked(image)
    yield from durable(image)
    yield from in_plans(tables.clear_bits())
    steps = [step for step in (l1_step, table_step) if step is not None]
    if steps:
        yield plan(steps)
    fields = {"size": wanted.disk_size, "l1_entries": len(l1), "l1_offset": place}
    image.header = image.header._replace(**fields, snapshot_count=count, snapshots_offset=table_place)
    yield plan([Write(0, SIZE_AT, image.header.pack()[SIZE_AT:LENGTH_2])])
    release(image, left_place, left_length)
    if table_step is not None:
        _release_table(image, kept)
    yield from _let_go(image, left)


def delete_snapshot(image: EditedImage, name: str) -> Iterator[Plan]:
    """See :meth:`tapfs.edit_protocols.SnapshotKeeper.delete_snapshot`."""
    op = "delete a snapshot"
    _refuse_data_file(image, op)
    listed = image.read_snapshots()
    unwanted = snapshot_to_change(listed, name, image.file.path)
    require_sound(image, op)
    left = DiskTables(image, l1_of(image, unwanted, op))
    kept = [each for each in listed if each is not unwanted]
    table_place, step = take(image, pack_snapshots(kept, image.file.path)) if kept else (0, None)
    yield from marked(image)
    yield from durable(image)
    if step is not None:
        yield plan([step])
    yield _switched(image, len(kept), table_place, dirty=bool(left.places()))
    release(image, unwanted.l1_offset, unwanted.l1_length)
    _release_table(image, listed)
    yield from _let_go(image, left)
    current = DiskTables(image, image.l1)
    for number in current.window_numbers():
        yield from in_plans(current.set_bits(number))
    yield from in_plans(changed_sectors(image.l1_offset, bytes(image.l1.raw), current.l1_with_bits().raw))
    yield from marked(image)


def _share(image: EditedImage, tables: DiskTables) -> None:
    """Raise the counts of the tables, and of all that they refer to."""
    for window in tables.windows():
        for block in window.blocks(image.refcounts.per_block):
            image.refcounts.share_counted(block)
    for place in tables.places():
        image.refcounts.share(place >> image.header.cluster_bits, 1)


def _let_go(image: EditedImage, tables: DiskTables) -> Iterator[Plan]:
    """Lower the counts of all that tables refer to which nothing leads to any more.

    The tables themselves come last: their clusters may be used again, or punched, as soon as that is durable.
    """
    at_once = max(1, _LOWERED_BYTES // image.header.cluster_size)
    for window in tables.windows():
        for number, block in enumerate(window.blocks(image.refcounts.per_block), 1):
            image.refcounts.lower_counted(block)
            if number % at_once == 0:
                yield from durable(image)
    for place in tables.places():
        image.refcounts.lower_counts(place >> image.header.cluster_bits, 1)
    yield from durable(image)


def _switched(image: EditedImage, count: int, place: int, *, dirty: bool) -> Plan:
    """The one write that leads to another snapshot table; in version 3 the mark of a change comes or goes with it."""
    header = image.header._replace(snapshot_count=count, snapshots_offset=place)
    end = INCOMPATIBLE_AT
    if header.version > VERSIONS[0]:
        header = header._replace(incompatible=header.incompatible | DIRTY if dirty else header.incompatible & ~DIRTY)
        end += WORD
    image.header = header
    return plan([Write(0, SNAPSHOT_COUNT_AT, header.pack()[SNAPSHOT_COUNT_AT:end])])


def _release_table(image: EditedImage, listed: list[Snapshot]) -> None:
    """Free a snapshot table that lists these."""
    if listed:
        release(image, listed[0].offset, listed[-1].offset + listed[-1].length - listed[0].offset)


def _refuse_data_file(image: EditedImage, op: str) -> None:
    if image.header.has_data_file:
        raise refused(image, "its data is in another file, which can have no snapshots", op)


def _require_name(image: EditedImage, name: str, kept: list[Snapshot]) -> None:
    op, path = "create a snapshot", image.file.path
    if not name or "\0" in name or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        message = f"a snapshot's name has 1 to {MAX_NAME_BYTES} bytes"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=path, op=op)
    if any(name in (each.name, each.id) for each in kept):
        remedy = "choose another name, or delete that one"
        raise ImageError(ErrorKind.EXISTS, f"has a snapshot {name!r}", path=path, op=op, remedy=remedy)


def _require_length(image: EditedImage, snapshot: Snapshot, op: str) -> None:
    needed = l1_entries_for(snapshot.disk_size, image.header)
    if snapshot.l1_entries < needed:
        message = f"the L1 table of the snapshot has {snapshot.l1_entries} entries, its disk needs {needed}"
        raise ImageError(ErrorKind.CORRUPT, message, path=image.file.path, offset=snapshot.offset, op=op)
