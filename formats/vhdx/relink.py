"""Give a VHDX image another parent, its first one, or none: the parent locator, and the mark that there is a parent.

One entry of the log has all of the metadata that changes, so after a crash the image has the old parent or the new one.

An image over a parent has sector bitmaps, and entries for them in its block table. Without a parent no block may be
partly there. So before the first parent is named the table gets these entries. Before the parent goes, each block that
is partly there becomes one that is wholly there: first its unused sectors become zeros in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tapfs.driver import BackingReference, Driver, Identified, Renewing
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.rounding import round_down
from tapfs.formats.vhdx.bitmaps import sector_runs
from tapfs.formats.vhdx.blocks import PLACE_MASK, STATE_MASK, BlockTable, State, make_entry
from tapfs.formats.vhdx.driver import VhdxDriver
from tapfs.formats.vhdx.guids import NO_GUID, guid_text, parse_guid
from tapfs.formats.vhdx.locator import (
    LINKAGE,
    SECOND_LINKAGE,
    linkage_of,
    pack_locator,
    parent_entries,
    parent_reference,
)
from tapfs.formats.vhdx.parent_items import Changes, with_locator, without_locator
from tapfs.formats.vhdx.resize import flushed, longer_table
from tapfs.formats.vhdx.units import PAGE
from tapfs.formats.zero_steps import zero_steps, zeroing_plans
from tapfs.plan import Plan, Write

if TYPE_CHECKING:
    from tapfs.formats.vhdx.writer import WritableVhdxDriver


def relink_plans(image: WritableVhdxDriver, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
    """The plans that have the image name another parent, or none.

    Where the parent is not open its identity stays what it was. Raises ImageError: unsupported for a parent that is not
    VHDX or has other sectors, for a first parent that is not open, and for a fixed image; out_of_bounds for a name that
    is too long.
    """
    region = image.regions.metadata
    if backing is None:
        if image.metadata.has_parent:
            changes = without_locator(image.file, region)
            yield image.log_named()
            yield from _whole_blocks(image)
            yield from _logged(image, changes)
        return
    if not image.metadata.has_parent:
        _require_may_have_parent(image, parent)
    linkage = _linkage(image, parent)
    disk_id = parent.metadata.disk_id if isinstance(parent, VhdxDriver) else image.metadata.disk_id
    changes = with_locator(image.file, region, _packed(image, _entries(image, backing, linkage)), disk_id)
    yield image.log_named()
    if not image.metadata.has_parent:
        yield from _bitmap_entries(image)
    yield from _logged(image, changes)


def expecting_plans(image: WritableVhdxDriver, parent: Renewing | None) -> Iterator[Plan]:
    """The plans that have the image name two identities of its parent: that of now, and the next one; None: none."""
    entries = {key: value for key, value in image.locator_entries.items() if key not in {LINKAGE, SECOND_LINKAGE}}
    if parent is not None:
        entries[LINKAGE] = _braced(_linkage(image, parent))
        following = (linkage_of(name) for name in parent.next_identities)
        second = next((linkage for linkage in following if linkage is not None), None)
        if second is not None:
            entries[SECOND_LINKAGE] = _braced(second)
    changes = with_locator(image.file, image.regions.metadata, _packed(image, entries), image.metadata.disk_id)
    yield image.log_named()
    yield from _logged(image, changes)


def _logged(image: WritableVhdxDriver, changes: Changes) -> Iterator[Plan]:
    """The plans for changes of the metadata region, after which the headers name no log any more."""
    for start, data in changes:
        for page_at in range(round_down(start, PAGE), start + len(data), PAGE):
            first, last = max(start, page_at), min(start + len(data), page_at + PAGE)
            image.pages.change(page_at)[first - page_at : last - page_at] = data[first - start : last - start]
    yield from flushed(image)
    yield image.end()


# -- the first parent, and none -----------------------------------------------------------------


def _require_may_have_parent(image: WritableVhdxDriver, parent: Driver | None) -> None:
    if image.metadata.leave_allocated:
        message = "a fixed image has no parent"
    elif parent is None:
        message = "a VHDX image names its parent by a GUID as well, so the parent must be there"
    else:
        return
    raise ImageError(ErrorKind.UNSUPPORTED, message, path=image.file.path, op="rebase")


def _bitmap_entries(image: WritableVhdxDriver) -> Iterator[Plan]:
    """A block table with zeros in the entries of the sector bitmaps, up to that of the last chunk."""
    table = image.table
    for first, _ in image.chunks():
        at = table.entry_offset(table.bitmap_index(table.chunk_of(first)))
        if at < table.place.end and image.pages.word(at):
            image.pages.set_word(at, 0)
    yield from flushed(image)
    wanted = BlockTable.of(image.metadata._replace(has_parent=True), table.host_offset)
    yield from longer_table(image, wanted)


def _whole_blocks(image: WritableVhdxDriver) -> Iterator[Plan]:
    """Have no block partly there, and no sector bitmap."""
    table = image.table
    for first, entries in image.chunks():
        partial = [(block, entry) for block, entry in enumerate(entries, first) if entry & STATE_MASK == State.PARTIAL]
        for block, entry in partial:
            image.require_possible(block, entry)
        unused = (step for block, entry in partial for step in _unused_sectors(image, block, entry & PLACE_MASK))
        yield from zeroing_plans(unused)
        for block, entry in partial:
            image.pages.set_word(table.entry_offset(table.index(block)), make_entry(State.PRESENT, entry & PLACE_MASK))
        yield from flushed(image)
        image.space.forget_bitmap(table.chunk_of(first))
        yield from flushed(image)


def _unused_sectors(image: WritableVhdxDriver, block: int, place: int) -> Iterator[Write]:
    """Zeros in the file where a block has sectors that are not in it."""
    sector = image.metadata.logical_sector
    bitmap = image.pages.read(image.bitmap_place(block), image.table.bitmap_bytes)
    for run in sector_runs(bitmap, 0, image.table.needed(block) // sector):
        if not run.present:
            yield from zero_steps(image.file, place + run.first * sector, place + run.stop * sector)


# -- the parent locator -------------------------------------------------------------------------


def _entries(image: WritableVhdxDriver, backing: BackingReference, linkage: bytes) -> dict[str, str]:
    """The locator: all names stay where the image has this one already."""
    now = parent_reference(image.locator_entries)
    if now is not None and now.name == backing.name:
        kept = {key: value for key, value in image.locator_entries.items() if key != SECOND_LINKAGE}
        return {**kept, LINKAGE: _braced(linkage)}
    if not backing.name or "\0" in backing.name or "\\" in backing.name:
        message = "the name of the parent is empty or has a character that a parent locator cannot hold"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=image.file.path, op="rebase")
    return parent_entries(backing.name, linkage)


def _packed(image: WritableVhdxDriver, entries: dict[str, str]) -> bytes:
    try:
        return pack_locator(entries)
    except ValueError as error:
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, str(error), path=image.file.path, op="rebase") from error


def _braced(linkage: bytes) -> str:
    return "{" + guid_text(linkage) + "}"


def _linkage(image: WritableVhdxDriver, parent: Driver | None) -> bytes:
    if parent is None:
        return parse_guid(image.locator_entries.get(LINKAGE, "")) or NO_GUID
    if not isinstance(parent, Identified) or parent.format_name != "vhdx":
        raise _unfit(
            image, f"the parent of a VHDX image must be a VHDX image, too, and not a {parent.format_name} image"
        )
    sector = parent.geometry.sector_size
    if sector not in {None, image.metadata.logical_sector}:
        raise _unfit(
            image, f"the sectors of the parent have {sector} bytes, those of the image {image.metadata.logical_sector}"
        )
    found = (linkage_of(name) for name in sorted(parent.identities))
    return next((each for each in found if each is not None), NO_GUID)


def _unfit(image: WritableVhdxDriver, message: str) -> ImageError:
    return ImageError(
        ErrorKind.UNSUPPORTED,
        message,
        path=image.file.path,
        op="rebase",
        remedy="convert the parent, or this image to another format",
    )
