"""The file of a page: it has its name when it is complete, and replaces only an older page or an empty file."""

from __future__ import annotations

import os

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.file import LocalFile
from tapfs.host.location import locate
from tapfs.host.target import Target
from tapfs.jobs.output_file import file_in_place_of
from tapfs.report.page import BEGINNING

_OPERATION = "write the page"


def write_page(path: str, text: str) -> None:
    """Write the page. Raises ImageError: exists for a file that is no page of tapfs, no_space, not_found, …."""
    page = text.encode("utf-8", "backslashreplace")
    with Target(locate(path)) as target:
        held = _replaced(target) if target.is_there else None
        with file_in_place_of(held, target, overwrite=False, op=_OPERATION) as file:
            try:
                done = 0
                while done < len(page):
                    done += os.write(file.descriptor, page[done:])
            except OSError as error:
                raise from_os_error(error, path=path, op=_OPERATION) from error


def require_writable(path: str) -> None:
    """Raise ImageError if the page could not be written to that name, before the images are looked at."""
    with Target(locate(path)) as target:
        if target.is_there:
            _replaced(target).close()
        obstacle = target.why_not_replaceable()
        if obstacle is not None:
            raise obstacle


def _replaced(target: Target) -> LocalFile:
    """The file that is to be replaced, open and locked."""
    try:
        held = target.open()
    except ImageError as error:
        if error.kind is ErrorKind.INVALID_FORMAT:
            error.message, error.remedy = "is no regular file", "name a file that ends in .html"
        raise
    beginning = BEGINNING.encode()
    if not held.is_block_device and held.size() == 0:
        return held
    if not held.is_block_device and held.read(0, min(held.size(), len(beginning))) == beginning:
        return held
    held.close()
    raise ImageError(
        ErrorKind.EXISTS,
        "exists already and is no page that tapfs has made",
        path=target.path,
        op=_OPERATION,
        remedy="choose another name, or remove it",
    )
