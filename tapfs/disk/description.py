"""Describe an open image as the JSON-able data that `tapfs info` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

from tapfs.disk.chain import Layer
from tapfs.disk.recovery import JOURNAL_WAITS
from tapfs.disk.unopened_parent import ParentState, UnopenedParent

if TYPE_CHECKING:
    from tapfs.partitions.reader import Read
    from tapfs.partitions.table import FileSystem, FileSystemInfo, PartitionTableInfo


class BackingInfo(TypedDict):
    """The parent of an image: as the image names it, and as it was found."""

    name: str
    path: str | None
    format: str | None


class ChainLink(TypedDict):
    """One image of a chain; `state` is that of `tapfs.disk.unopened_parent.ParentState`.

    Of one that is not open `format` is what its child says, `virtual_size` is None, and `message` says why, if there is
    a reason.
    """

    path: str
    format: str | None
    virtual_size: int | None
    state: str
    message: str | None


class ImageInfo(TypedDict):
    """What `tapfs info` knows of an image; docs/json/info.schema.json describes each key. Sizes are bytes.

    `packed` is how the file is packed as a whole: `file_size` is then the length of its contents. `virtual_size` is the
    guest's disk, `file_size` the length of the image file. `allocated_size` is what the image's `files`, the image file
    first, take on the host. `chain` lists every image, the top one first. `details` depend on the format. `file_system`
    and `partitions` are there when the disk could be read, so not for an encrypted image without its password.
    """

    path: str
    format: str
    packed: str | None
    virtual_size: int
    file_size: int
    allocated_size: int
    encrypted: bool
    granule: int
    backing: BackingInfo | None
    files: list[str]
    details: dict[str, object]
    chain: list[ChainLink]
    file_system: NotRequired[FileSystemInfo | None]
    partitions: NotRequired[PartitionTableInfo]


def describe(layers: Sequence[Layer], unopened: UnopenedParent | None = None) -> ImageInfo:
    """The description of a chain's top image, without what is on the disk.

    `unopened` is the parent at which the chain ends early.
    """
    top = layers[0]
    geometry = top.driver.geometry
    backing: BackingInfo | None = None
    if geometry.backing is not None:
        backing = {
            "name": geometry.backing.said,
            "path": layers[1].path if len(layers) > 1 else None,
            "format": layers[1].driver.format_name if len(layers) > 1 else geometry.backing.format,
        }
    return {
        "path": top.path,
        "format": top.driver.format_name,
        "packed": top.file.packing,
        "virtual_size": geometry.virtual_size,
        "file_size": top.file.size(),
        "allocated_size": top.files.allocated_size(),
        "encrypted": geometry.cipher is not None,
        "granule": geometry.granule,
        "backing": backing,
        "files": [file.path for file in top.files],
        "details": _details(top),
        "chain": [*map(_link, layers), *([] if unopened is None else [_missing_link(unopened)])],
    }


def _details(layer: Layer) -> dict[str, object]:
    details = dict(layer.driver.details())
    if layer.files.patched:
        notes = details.get("notes")
        details["notes"] = [*(cast("list[str]", notes) if isinstance(notes, list) else []), JOURNAL_WAITS]
    return details


def _link(layer: Layer) -> ChainLink:
    return {
        "path": layer.path,
        "format": layer.driver.format_name,
        "virtual_size": layer.driver.geometry.virtual_size,
        "state": ParentState.OPEN.value,
        "message": None,
    }


def _missing_link(unopened: UnopenedParent) -> ChainLink:
    return {
        "path": unopened.path,
        "format": None if unopened.reference is None else unopened.reference.format,
        "virtual_size": None,
        "state": unopened.state.value,
        "message": None if unopened.error is None else str(unopened.error),
    }


def identify_others(read: Read, size: int, *, fetched: bool = False) -> Sequence[FileSystem]:
    """The file systems that libblkid knows. It is loaded only for what `tapfs.partitions` does not know."""
    from tapfs.disk import blkid

    return blkid.identify(read, size, fetched=fetched)
