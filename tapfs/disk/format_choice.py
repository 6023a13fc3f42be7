"""The format of a host file: the one that somebody has said, or the one that its contents show where that will do."""

from __future__ import annotations

import contextlib

from tapfs.disk.foreign import ForeignFormat
from tapfs.disk.probe import detect, format_named, is_own, plugin_of
from tapfs.driver import Driver, Format, HostFile, OpenRequest, Trait, has_trait
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.file import LocalFile
from tapfs.host.location import locate
from tapfs.host.lock import Sharing

#: The words by which the user says that the image itself is raw.
SAY_RAW = "say {format=raw}"


def named_format(name: str, path: str) -> Format:
    """The format `name`, which somebody has said of the image `path`. Raises ImageError(unsupported)."""
    try:
        return format_named(name)
    except ImageError as error:
        error.path = path
        raise


def guessed_format(file: LocalFile, *, writable: bool, say_raw: str = SAY_RAW) -> Format:
    """The format that the contents show, where that is enough for what is wanted.

    `say_raw` is how the user would say that the image is raw. Raises ImageError: unsupported for a format that tapfs
    does not read, read_only where a guess is not enough.
    """
    found = detect(file)
    if isinstance(found, ForeignFormat):
        raise found.error(file.path, say_raw)
    if writable and has_trait(found, Trait.NAMED_TO_WRITE):
        raise ImageError(
            ErrorKind.READ_ONLY,
            f"looks like a {found.name} image, and a guess is not enough to write to it",
            path=file.path,
            op="guess the format",
            remedy=f"{say_raw.replace('=raw}', f'={found.name}}}')} if it is one",
        )
    return found


def require_raw(path: str) -> None:
    """See that a file shows no image format and no archive, before it is opened as raw by a tool that asks nobody.

    The file is opened for this alone, and nothing that it names. Raises ImageError(unsupported).
    """
    with contextlib.closing(locate(path).open(sharing=Sharing.UNCHECKED)) as file:
        found = guessed_format(file, writable=False)
    if not has_trait(found, Trait.GUESSED):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"is a {found.name} image, not a raw disk",
            path=path,
            op="recognise the format",
            remedy=f"{SAY_RAW} to take its bytes as they are",
        )


def driver_of(found: Format, file: HostFile, request: OpenRequest) -> Driver:
    """The driver for an open file; what that of another package raises is an ImageError that names the package."""
    if not is_own(found):
        from tapfs.host.sandbox.confinement import before_code_of_others

        before_code_of_others(file.path)
    try:
        return found.open(file, request)
    except ImageError:
        raise
    except Exception as error:
        plugin = plugin_of(found)
        if plugin is None:
            raise
        from tapfs.disk.plugins import failure

        raise failure(plugin, file.path, error) from error
