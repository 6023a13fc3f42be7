"""Give a VHDX image over a parent another one: its parent locator, in the metadata region."""

from __future__ import annotations

from collections.abc import Mapping

from tapfs.driver import BackingReference, Driver, Identified
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.rounding import round_down, round_up
from tapfs.formats.vhdx.guids import NO_GUID, guid_text, parse_guid
from tapfs.formats.vhdx.locator import LINKAGE, linkage_of, pack_locator, parent_entries, parent_reference
from tapfs.formats.vhdx.metadata import LocatorPlace, locator_place
from tapfs.formats.vhdx.reader import VhdxReader
from tapfs.formats.vhdx.units import PAGE


def changed_pages(image: VhdxReader, backing: BackingReference | None, parent: Driver | None) -> Mapping[int, bytes]:
    """The pages of metadata that change, by their host offsets, where the image names another parent.

    Where the parent is not open its identity stays what it was. Raises ImageError: unsupported for no parent, for one
    that is no VHDX and for an image without one; out_of_bounds for a name that is too long.
    """
    path = image.file.path
    place = locator_place(image.file, image.regions.metadata)
    if backing is None or not image.metadata.has_parent or place is None:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "blocks of a VHDX over a parent are others than of one without: it cannot become the one or the other",
            path=path,
            op="rebase",
            remedy="make a new image with tapfs convert",
        )
    entries = _entries(image, backing, _linkage(image, parent))
    try:
        packed = pack_locator(entries)
    except ValueError as error:
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, str(error), path=path, op="rebase") from error
    at = _room_for(len(packed), place, image.regions.metadata, path)
    pages: dict[int, bytearray] = {}
    field = (at - image.regions.metadata.offset).to_bytes(4, "little") + len(packed).to_bytes(4, "little")
    for start, data in ((at, packed), (place.field_at, field)):
        for page_at in range(round_down(start, PAGE), start + len(data), PAGE):
            page = pages.get(page_at)
            if page is None:
                page = pages[page_at] = bytearray(image.pages.read(page_at, PAGE))
            first, last = max(start, page_at), min(start + len(data), page_at + PAGE)
            page[first - page_at : last - page_at] = data[first - start : last - start]
    return {page_at: bytes(page) for page_at, page in pages.items()}


def _entries(image: VhdxReader, backing: BackingReference, linkage: bytes) -> dict[str, str]:
    """The locator: all names stay where the image has this one already."""
    now = parent_reference(image.locator_entries)
    if now is not None and now.name == backing.name:
        return {**image.locator_entries, LINKAGE: "{" + guid_text(linkage) + "}"}
    if not backing.name or "\0" in backing.name or "\\" in backing.name:
        message = "the name of the parent is empty or has a character that a parent locator cannot hold"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=image.file.path, op="rebase")
    return parent_entries(backing.name, linkage)


def _linkage(image: VhdxReader, parent: Driver | None) -> bytes:
    if parent is None:
        return parse_guid(image.locator_entries.get(LINKAGE, "")) or NO_GUID
    if not isinstance(parent, Identified) or parent.format_name != "vhdx":
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"the parent of a VHDX image must be a VHDX image, too, and not a {parent.format_name} image",
            path=image.file.path,
            op="rebase",
            remedy="convert the parent, or this image to another format",
        )
    found = (linkage_of(name) for name in sorted(parent.identities))
    return next((each for each in found if each is not None), NO_GUID)


def _room_for(length: int, place: LocatorPlace, region: Range, path: str) -> int:
    """The host offset for a locator: behind all items, or where the old one is, if it is no longer than that."""
    behind = round_up(place.items_end, 8)
    if behind + length <= region.end:
        return behind
    if length <= place.item.length:
        return place.item.offset
    message = f"the metadata have no room for a parent locator of {length} bytes"
    raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="rebase", remedy="give a shorter name")
