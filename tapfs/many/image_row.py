"""The row of one image in a survey: what it is, what it is made of, whether it is well, and what lies on it.

Nothing is mounted or written, no password is asked for, and an image that another process uses is read all the same.
A package of disks has a row for each of them (`tapfs.many.package_rows`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, TypedDict, cast

from tapfs.disk.chain import (
    Layer,
    OpenOptions,
    is_encrypted,
    layer_of_file,
    layer_of_files,
)
from tapfs.disk.foreign import ForeignFormat
from tapfs.disk.password import LayerPasswords, given_password
from tapfs.disk.probe import detect
from tapfs.disk.unopened_parent import ParentState, UnopenedParent, open_what_is_there
from tapfs.driver import Format, Trait, has_trait
from tapfs.errors import ImageError
from tapfs.host.file import LocalFile
from tapfs.host.files import LocalFiles
from tapfs.host.gate import Gate
from tapfs.host.location import locate
from tapfs.host.lock import Sharing, is_written
from tapfs.many.tasks import Task, error_data
from tapfs.packages.signs import HEAD_BYTES, descriptor_kind, starts_with_descriptor

if TYPE_CHECKING:
    from tapfs.partitions.table import ContentsInfo

#: A file and its state: device, inode, bytes, times of change in ns; of an object its bytes and its ETag.
Identity = list[int | str | None]

#: Parts of the names of archives with disks.
_ARCHIVES = (".ova", ".xva", ".box")

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
    package: str | None
    disk: int | None
    disks: int | None
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


def rows_of(task: Task) -> list[Row]:
    """The row of the image at a path; of a package one for each of its disks, of what is no image none.

    The task has `path`, and may have `asked` (of `PARTS`), `all` (whatever is no image is a raw one), `identity` (of an
    address), `roots` (see `Gate`) and `keys` (see `given_password`). What fails is a part of the row.
    """
    path = cast("str", task["path"])
    roots = cast("list[str] | None", task.get("roots"))
    row = empty_row(path, asked_of(task))
    try:
        file = locate(path).open(sharing=Sharing.UNCHECKED)
        try:
            found = _recognised(file, row, whatever=bool(task.get("all")))
            if _may_be_package(file, found):
                from tapfs.many.package_rows import rows_of_package  # few files are packages

                rows = rows_of_package(file, task, _options(None, None if roots is None else tuple(roots)))
                if rows is not None:
                    return rows
        except BaseException:
            file.close()
            raise
        if found is None or (isinstance(found, ForeignFormat) and found.archive):
            file.close()
            return []
        row["format"] = found.name
        note_file(row, path, file, task)
        if isinstance(found, ForeignFormat):
            file.close()
            raise found.error(path, "say {format=raw}")
        options = _options(found.name, None if roots is None else tuple(roots))
        if row["packed"] is None:  # of a file that is known not to be packed nobody has to ask that again
            layer = layer_of_files(path, LocalFiles(file, gate=options.gate, sharing=Sharing.UNCHECKED), options)
        else:
            layer = layer_of_file(path, file, options)
        fill_row(row, layer, options, task, row["asked"])
    except (ImageError, MemoryError) as error:
        note_failure(row, error)
    return [row]


def asked_of(task: Task) -> list[str]:
    """The parts of a row that were asked for."""
    return cast("list[str]", task.get("asked") or [])


@cache
def _options(format_name: str | None, roots: tuple[str, ...] | None) -> OpenOptions:
    gate = Gate() if roots is None else Gate(roots)
    return OpenOptions(format=format_name, sharing=Sharing.UNCHECKED, gate=gate)


def empty_row(path: str, asked: list[str]) -> Row:
    """The row of an image of which nothing is known yet."""
    return {
        "path": path,
        "package": None,
        "disk": None,
        "disks": None,
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
    row = empty_row(path, asked)
    row["health"], row["error"] = "unreadable", error
    return row


def note_failure(row: Row, error: ImageError | MemoryError) -> None:
    """Note why an image could not be looked at as was asked. A wrong password says nothing of its health."""
    row["error"] = error_data(error)
    if not (isinstance(error, ImageError) and error.op == "unlock"):
        row["health"] = "unreadable"


def _recognised(file: LocalFile, row: Row, *, whatever: bool) -> Format | ForeignFormat | None:
    """The format of a file if it is an image, or an archive; notes in the row by what it is packed."""
    found = detect(file)
    if isinstance(found, ForeignFormat):
        return _packed(file, row, found) if found.packed else found
    if has_trait(found, Trait.GUESSED) and not whatever and not _looks_like_disk(file):
        return None
    return found


def _packed(file: LocalFile, row: Row, found: ForeignFormat) -> Format | ForeignFormat | None:
    """The format of the image, or archive, that a packed file begins with; None if it begins like none."""
    from tapfs.host.packed.head import PACKED_BYTES, unpacked_head

    head = unpacked_head(found.name, file.read(0, PACKED_BYTES))
    inner = detect(_Head(head, file.path)) if head else found
    if isinstance(inner, ForeignFormat):
        return inner if inner.archive else None
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


def _may_be_package(file: LocalFile, found: Format | ForeignFormat | None) -> bool:
    """Whether a file may be a package. An archive is one by its name, or by the first file in it."""
    if not isinstance(found, ForeignFormat) or not found.archive:
        return False
    name, head = os.path.basename(file.path).lower(), file.read(0, HEAD_BYTES)
    return any(end in name for end in _ARCHIVES) or starts_with_descriptor(head) or descriptor_kind(head) is not None


def _looks_like_disk(file: LocalFile | _Head) -> bool:
    """Whether bytes that show no format have a partition table, or a file system that tapfs knows."""
    from tapfs.partitions.contents import disk_contents  # most images show what they are

    contents = disk_contents(file.read, file.size())
    return contents.file_system is not None or contents.table.scheme is not None


def note_file(row: Row, path: str, file: LocalFile, task: Task) -> None:
    """Note the file that was found: its sizes, whether it is being written, and its state."""
    row["in_use"] = is_written(file.descriptor)
    row["files"] = [path]
    if file.presence is None and not file.is_block_device:
        status = os.fstat(file.descriptor)
        row["file_size"], row["allocated_size"] = status.st_size, status.st_blocks * 512
        row["identities"].append({"path": path, "state": identity_of(status)})
        return
    row["file_size"], row["allocated_size"] = file.size(), file.allocated_size()
    _note_state(row, path, file, task)


def _note_state(row: Row, path: str, file: LocalFile, task: Task) -> None:
    """Note which file the row is of, and in which state. A member of an archive has the archive's state."""
    if file.window is not None or any(each["path"] == path for each in row["identities"]):
        return
    if file.presence is not None:  # it lies elsewhere
        if task.get("identity") is not None and path == task["path"]:
            row["identities"].append({"path": path, "state": cast("Identity", task["identity"])})
        return
    with suppress(OSError):  # what a packed file holds has a descriptor of another file
        status = os.fstat(file.descriptor) if file.packing is None else os.stat(path)
        if stat.S_ISREG(status.st_mode):
            row["identities"].append({"path": path, "state": identity_of(status)})


def fill_row(row: Row, layer: Layer, options: OpenOptions, task: Task, asked: Collection[str]) -> None:
    """Tell what was asked (of `PARTS`) of an open image, which is closed then. Raises ImageError."""
    layers = [layer]
    try:
        unopened = open_what_is_there(layers, options)
        row["virtual_size"] = layer.driver.geometry.virtual_size
        row["encrypted"] = layer.driver.geometry.cipher is not None
        row["chain"] = _chain(layers, unopened)
        if row["package"] is None:
            row["files"] = [file.path for file in layer.files]
            if len(row["files"]) > 1 or row["packed"] is not None:
                row["allocated_size"] = layer.files.allocated_size()
        for each in layers:
            for file in each.files:
                if file.path != row["path"]:
                    _note_state(row, file.path, file, task)
        others = layers[1:] if row["package"] is None else layers
        row["in_use"] = row["in_use"] or any(is_written(each.file.descriptor) for each in others)
        if unopened is not None and unopened.state is not ParentState.NOT_LOOKED_AT:
            row["health"] = "broken chain"
        if "check" in asked:
            _check(row, options)
        if unopened is None and {"content", "hash"} & set(asked):
            password = _password(layers, task)
            if password is not None or not is_encrypted(layers):
                _read(row, layers, options, password)
    finally:
        for each in layers:
            each.close()


def _password(layers: list[Layer], task: Task) -> bytes | None:
    """The password of a chain, None: it needs none, or there is none for it. Raises ImageError."""
    if not is_encrypted(layers):
        return None
    password = given_password(cast("list[str] | None", task.get("keys")))
    if isinstance(password, LayerPasswords) and not password:
        paths = [each.path for each in layers if each.driver.geometry.cipher is not None]
        return password if all(password.of(paths[at:]) for at in range(len(paths))) else None
    return password


def _read(row: Row, layers: list[Layer], options: OpenOptions, password: bytes | None) -> None:
    """What the bytes of the disk say; the layers are closed then."""
    from tapfs.disk.image import Image  # most surveys only look

    with Image(layers, writable=False, password=password, cache_bytes=options.cache_bytes) as image:
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
