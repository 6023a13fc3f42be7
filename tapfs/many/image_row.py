"""The row of one image in a survey: what it is, what it is made of, whether it is well, and what lies on it.

Nothing is mounted or written, no password is asked for, and an image that another process uses is read all the same.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from typing import TypedDict, cast

from tapfs.disk.chain import (
    Layer,
    OpenOptions,
    ParentState,
    UnopenedParent,
    is_encrypted,
    layer_of_file,
    layer_of_files,
)
from tapfs.disk.foreign import ForeignFormat
from tapfs.disk.image import Image
from tapfs.disk.inspection import open_what_is_there
from tapfs.disk.probe import detect
from tapfs.driver import Format, Trait, has_trait
from tapfs.errors import ImageError
from tapfs.host.file import LocalFile
from tapfs.host.files import LocalFiles
from tapfs.host.gate import Gate
from tapfs.host.location import locate
from tapfs.host.lock import Sharing, is_written
from tapfs.many.tasks import Task, error_data
from tapfs.partitions.contents import disk_contents
from tapfs.partitions.table import ContentsInfo

#: A file and its state: device, inode, bytes, times of change in ns; of an object its bytes and its ETag.
Identity = list[int | str | None]

#: Parts of a row that cost more than a look, by the option that asks for each.
PARTS = ("hash", "check", "content")


class ChainPart(TypedDict):
    """One image of a chain, as `tapfs info` has it."""

    path: str
    format: str | None
    virtual_size: int | None
    state: str
    message: str | None


class Row(TypedDict):
    """What a survey says of one image; docs/json/survey.schema.json describes each key. Sizes are bytes."""

    path: str
    format: str
    packed: str | None
    virtual_size: int | None
    file_size: int | None
    allocated_size: int | None
    encrypted: bool | None
    in_use: bool | None
    files: list[str]
    chain: list[ChainPart]
    used_by: list[str]
    health: str
    corruptions: int | None
    leaks: int | None
    leaked_bytes: int | None
    hash: str | None
    contents: ContentsInfo | None
    error: dict[str, object] | None
    asked: list[str]
    identities: list[FileState]


class FileState(TypedDict):
    """A file that a row is made of, and the state that it was in."""

    path: str
    state: Identity


def identity_of(status: os.stat_result) -> Identity:
    """What tells a file and its state."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def unchanged(identities: Sequence[FileState]) -> bool:
    """Whether each file is the one that it was, in the state that it was in."""
    try:
        return all(identity_of(os.stat(each["path"])) == each["state"] for each in identities)
    except OSError:
        return False


def row_of(task: Task) -> Row | None:
    """The row of the image at a path, None for what is no image.

    The task has `path`, `asked` (of `PARTS`), `all` (whatever is no image is a raw one), `identity` (of an address) and
    `roots` (see `Gate`; None: the usual one). What fails is a part of the row.
    """
    path = cast("str", task["path"])
    roots = cast("list[str] | None", task["roots"])
    gate = Gate() if roots is None else Gate(tuple(roots))
    row = _empty(path, cast("list[str]", task["asked"]))
    try:
        file = locate(path).open(sharing=Sharing.UNCHECKED)
        try:
            found = _recognised(file, row, whatever=bool(task["all"]))
        except BaseException:
            file.close()
            raise
        if found is None:
            file.close()
            return None
        row["format"] = found.name
        row["file_size"], row["allocated_size"] = file.size(), file.allocated_size()
        row["in_use"] = is_written(file.descriptor)
        row["files"] = [path]
        _note(row, path, file, task)
        if isinstance(found, ForeignFormat):
            file.close()
            raise found.error(path, "say {format=raw}")
        options = OpenOptions(format=found.name, sharing=Sharing.UNCHECKED, gate=gate)
        if row["packed"] is None:  # of a file that is known not to be packed nobody has to ask that again
            layer = layer_of_files(path, LocalFiles(file, gate=gate, sharing=Sharing.UNCHECKED), options)
        else:
            layer = layer_of_file(path, file, options)
        _fill(row, layer, options, task)
    except (ImageError, MemoryError) as error:
        row["health"], row["error"] = "unreadable", error_data(error)
    return row


def _empty(path: str, asked: list[str]) -> Row:
    return {
        "path": path,
        "format": "unknown",
        "packed": None,
        "virtual_size": None,
        "file_size": None,
        "allocated_size": None,
        "encrypted": None,
        "in_use": None,
        "files": [],
        "chain": [],
        "used_by": [],
        "health": "not checked",
        "corruptions": None,
        "leaks": None,
        "leaked_bytes": None,
        "hash": None,
        "contents": None,
        "error": None,
        "asked": asked,
        "identities": [],
    }


def failed_row(path: str, asked: list[str], error: dict[str, object]) -> Row:
    """The row of an image of which nothing could be told."""
    row = _empty(path, asked)
    row["health"], row["error"] = "unreadable", error
    return row


def _recognised(file: LocalFile, row: Row, *, whatever: bool) -> Format | ForeignFormat | None:
    """The format of a file if it is an image; notes in the row by what it is packed."""
    if file.size() == 0 and not whatever:
        return None
    found = detect(file)
    if isinstance(found, ForeignFormat):
        if found.packed:
            return _packed(file, row, found)
        return None if found.archive else found
    if has_trait(found, Trait.GUESSED) and not whatever and not _looks_like_disk(file):
        return None
    return found


def _packed(file: LocalFile, row: Row, found: ForeignFormat) -> Format | None:
    """The format of the image that a packed file begins with; None if it begins like none."""
    from tapfs.host.packed.head import PACKED_BYTES, unpacked_head

    head = unpacked_head(found.name, file.read(0, PACKED_BYTES))
    inner = detect(_Head(head, file.path)) if head else found
    if isinstance(inner, ForeignFormat):
        return None
    if has_trait(inner, Trait.GUESSED) and not _looks_like_disk(_Head(head, file.path)):
        return None
    row["packed"] = found.name
    return inner


class _Head:
    """The first bytes of a file: a `tapfs.driver.HostFile`."""

    def __init__(self, data: bytes, path: str) -> None:
        self.path = path
        self._data = data

    def read(self, offset: int, length: int) -> bytes:
        """The bytes that are there."""
        return self._data[offset : offset + length]

    def size(self) -> int:
        """The length."""
        return len(self._data)

    def modified_seconds(self) -> int:
        """Unknown."""
        return 0

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """All of it."""
        yield offset, length


def _looks_like_disk(file: LocalFile | _Head) -> bool:
    """Whether bytes that show no format have a partition table, or a file system that tapfs knows."""
    contents = disk_contents(file.read, file.size())
    return contents.file_system is not None or contents.table.scheme is not None


def _note(row: Row, path: str, file: LocalFile, task: Task) -> None:
    """Note which file the row is of, and in which state."""
    if any(each["path"] == path for each in row["identities"]):
        return
    if file.presence is not None:  # it lies elsewhere
        if task.get("identity") is not None and path == task["path"]:
            row["identities"].append({"path": path, "state": cast("Identity", task["identity"])})
    elif stat.S_ISREG((status := os.fstat(file.descriptor)).st_mode):
        row["identities"].append({"path": path, "state": identity_of(status)})


def _fill(row: Row, layer: Layer, options: OpenOptions, task: Task) -> None:
    asked = row["asked"]
    layers = [layer]
    try:
        unopened = open_what_is_there(layers, options)
        row["virtual_size"] = layer.driver.geometry.virtual_size
        row["encrypted"] = layer.driver.geometry.cipher is not None
        row["files"] = [file.path for file in layer.files]
        if len(row["files"]) > 1 or row["packed"] is not None:
            row["allocated_size"] = layer.files.allocated_size()
        row["chain"] = _chain(layers, unopened)
        for each in layers:
            for file in each.files:
                if row["packed"] is None:
                    _note(row, file.path, file, task)
        row["in_use"] = row["in_use"] or any(is_written(each.file.descriptor) for each in layers[1:])
        if unopened is not None and unopened.state is not ParentState.NOT_LOOKED_AT:
            row["health"] = "broken chain"
        if "check" in asked:
            _check(row, options)
        if unopened is None and not is_encrypted(layers) and {"content", "hash"} & set(asked):
            _read(row, layers, options)
    finally:
        for each in layers:
            each.close()


def _read(row: Row, layers: list[Layer], options: OpenOptions) -> None:
    """What the bytes of the disk say; the layers are closed then."""
    with Image(layers, writable=False, password=None, cache_bytes=options.cache_bytes) as image:
        if "content" in row["asked"]:
            row["contents"] = image.contents().description()
        if "hash" in row["asked"]:
            from tapfs.jobs.block_hash import block_hash

            row["hash"] = block_hash(image)


def _chain(layers: list[Layer], missing: UnopenedParent | None) -> list[ChainPart]:
    parts: list[ChainPart] = [
        {
            "path": layer.path,
            "format": layer.driver.format_name,
            "virtual_size": layer.driver.geometry.virtual_size,
            "state": ParentState.OPEN.value,
            "message": None,
        }
        for layer in layers
    ]
    if missing is not None:
        parts.append(
            {
                "path": missing.path,
                "format": None if missing.reference is None else missing.reference.format,
                "virtual_size": None,
                "state": missing.state.value,
                "message": None if missing.error is None else str(missing.error),
            }
        )
    return parts


def _check(row: Row, options: OpenOptions) -> None:
    """Check the image's own metadata. One that is being written is not: it is never whole for long."""
    if row["health"] != "not checked":
        return
    if row["in_use"]:
        row["health"] = "in use"
        return
    from tapfs.jobs.check import check_image

    report = check_image(row["path"], options)
    if not report.checked:
        row["health"] = "no check"
        return
    row["corruptions"], row["leaks"], row["leaked_bytes"] = report.corruptions, report.leaks, report.leaked_bytes
    row["health"] = "corrupt" if report.corruptions else "leaks" if report.leaks else "clean"
