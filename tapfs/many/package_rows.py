"""The rows of a package in a survey: one for each disk that it lists.

A disk inside of an archive is looked at as an image is. What an .ovf, .vmx or .vbox names is a file beside it, which
has a row of its own with all that was asked. So the row of such a disk says no more than what it is, and its chain.
"""

from __future__ import annotations

from contextlib import closing
from typing import cast

from tapfs.disk.chain import OpenOptions
from tapfs.disk.package import OpenPackage, package_in
from tapfs.disk.packed import contents_of
from tapfs.errors import ImageError
from tapfs.host.copied import Shared
from tapfs.host.file import LocalFile
from tapfs.many.image_row import Row, asked_of, empty_row, fill_row, note_failure, note_file
from tapfs.many.tasks import Task
from tapfs.packages.contents import PackagedDisk
from tapfs.records import replace


def rows_of_package(file: LocalFile, task: Task, options: OpenOptions) -> list[Row] | None:
    """A row for each disk of the package in an open file, which is closed then; None: it is none, and open.

    Raises ImageError for a package that cannot be read.
    """
    found = cast("str", task["path"])
    contents = contents_of(file.again(), None, writable=False)
    try:
        package = package_in(contents)
    except BaseException:
        contents.close()
        raise
    if package is None:
        contents.close()
        return None
    with closing(file), closing(OpenPackage(Shared(contents), package)) as opened:
        return [_row_of_disk(opened, disk, found, file, task, options) for disk in package.disks]


def _row_of_disk(
    opened: OpenPackage, disk: PackagedDisk, path: str, file: LocalFile, task: Task, options: OpenOptions
) -> Row:
    row = empty_row(path, asked_of(task))
    row["package"], row["disk"], row["disks"] = opened.package.kind, disk.number, len(opened.package.disks)
    row["packed"] = opened.file.packing
    try:
        note_file(row, path, file, task)
        options = replace(options, disk=disk.number)
        layer = opened.layer(options)
        row["format"] = layer.driver.format_name
        inside = opened.package.members is not None or disk.chunks is not None
        fill_row(row, layer, options, task, row["asked"] if inside else ())
    except (ImageError, MemoryError) as error:
        note_failure(row, error)
    return row
