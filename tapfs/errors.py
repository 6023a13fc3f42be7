"""The one error type of tapfs, and the one table from its kinds to errno and exit code.

Every failure that a user can cause or meet is an :class:`ImageError`. Its message names
the file, the place in it and, where there is one, the remedy; the kind says which of the
documented exit codes (command line) or errno values (file system) it becomes.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from functools import partial
from typing import Self, cast

from tapfs.patterns import pattern
from tapfs.records import NamedTuple


class ErrorKind(StrEnum):
    """What went wrong, coarse enough to act on."""

    IO = "io"
    INVALID_FORMAT = "invalid_format"
    UNSUPPORTED = "unsupported"
    CORRUPT = "corrupt"
    OUT_OF_BOUNDS = "out_of_bounds"
    NO_SPACE = "no_space"
    LOCKED = "locked"
    READ_ONLY = "read_only"
    NOT_FOUND = "not_found"
    EXISTS = "exists"
    DENIED = "denied"
    INVALID_ARGUMENT = "invalid_argument"


class Codes(NamedTuple):
    """What an error kind becomes outside Python."""

    errno: int
    exit_code: int


#: The exit code of a wrong command line.
EXIT_USAGE = 64

#: Exit codes 0 to 3 belong to the commands (check: 2 corrupt, 3 leaks; compare: 1 different),
#: so `corrupt` is 2 wherever it is met and every other kind has a code of its own, from 10 up.
CODES: dict[ErrorKind, Codes] = {
    ErrorKind.CORRUPT: Codes(errno.EUCLEAN, 2),
    ErrorKind.IO: Codes(errno.EIO, 10),
    ErrorKind.INVALID_FORMAT: Codes(errno.EINVAL, 11),
    ErrorKind.UNSUPPORTED: Codes(errno.EOPNOTSUPP, 12),
    ErrorKind.OUT_OF_BOUNDS: Codes(errno.ERANGE, 13),
    ErrorKind.NO_SPACE: Codes(errno.ENOSPC, 14),
    ErrorKind.LOCKED: Codes(errno.EBUSY, 15),
    ErrorKind.READ_ONLY: Codes(errno.EROFS, 16),
    ErrorKind.NOT_FOUND: Codes(errno.ENOENT, 17),
    ErrorKind.EXISTS: Codes(errno.EEXIST, 18),
    ErrorKind.DENIED: Codes(errno.EACCES, 19),
    # What was asked for is not possible in these words, or leaves a choice open: as a wrong command line.
    ErrorKind.INVALID_ARGUMENT: Codes(errno.EINVAL, EXIT_USAGE),
}

#: Exit codes that no error kind has. 63 is qemu-img's, too.
EXIT_NOT_CHECKED = 63
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

_KIND_OF_ERRNO: dict[int, ErrorKind] = {
    errno.ENOSPC: ErrorKind.NO_SPACE,
    errno.EDQUOT: ErrorKind.NO_SPACE,
    errno.EFBIG: ErrorKind.NO_SPACE,
    errno.EBUSY: ErrorKind.LOCKED,
    errno.EAGAIN: ErrorKind.LOCKED,
    errno.EROFS: ErrorKind.READ_ONLY,
    errno.ENOENT: ErrorKind.NOT_FOUND,
    errno.ENOTDIR: ErrorKind.NOT_FOUND,
    errno.EEXIST: ErrorKind.EXISTS,
    errno.EACCES: ErrorKind.DENIED,
    errno.EPERM: ErrorKind.DENIED,
    errno.EOPNOTSUPP: ErrorKind.UNSUPPORTED,
}


class Spelling(NamedTuple):
    """How the options that remedies name are written where their reader writes options.

    Each field of an entry of `OPTIONS` is one of these ways; "{}" stands for the value.
    """

    command_line: str
    mount_option: str
    python: str


#: The options that remedies name. In a remedy they are written as ``{name}`` or ``{name=value}``.
OPTIONS: dict[str, Spelling] = {
    "any_parent": Spelling("--any-parent", "any_parent", "any_parent=True"),
    "backing": Spelling("--backing {}", "backing={}", "backing={}"),
    "backing_format": Spelling("--backing-format {}", "backing_format={}", "backing_formats=['{}']"),
    "backing_root": Spelling("--backing-root {}", "backing_root={}", "backing_root={}"),
    "disk": Spelling("--disk {}", "disk={}", "disk={}"),
    "files": Spelling("--files", "files", "files=True"),
    "force": Spelling("--force", "force", "force=True"),
    "force_share": Spelling("--force-share", "force_share", "shared=True"),
    "format": Spelling("-f {}", "format={}", "format='{}'"),
    "keep": Spelling("-d", "keep", "keep=True"),
    "no_sandbox": Spelling("--no-sandbox", "no_sandbox", "TAPFS_SANDBOX=off in the environment"),
    "keep_names": Spelling("--keep-names", "keep_names", "keep_names=True"),
    "overlay": Spelling("--overlay {}", "overlay={}", "overlay={}"),
    "parent_format": Spelling("-F {}", "backing_format={}", "backing_format='{}'"),
    "parent_folder": Spelling("--parent-folder {}", "parent_folder={}", "parent_folders=['{}']"),
    "partition": Spelling("--partition {}", "partition={}", "partition={}"),
    "password": Spelling("--key-file FILE or in TAPFS_PASSWORD", "key_file=FILE", "password=..."),
    "resume": Spelling("--resume", "resume", "resume=True"),
    "rw": Spelling("--rw", "rw", "writable=True"),
    "sector_size": Spelling("--sector-size {}", "sector_size={}", "sector_size={}"),
    "shrink": Spelling("--shrink", "shrink", "shrink=True"),
    "target_format": Spelling("-O {}", "format={}", "format='{}'"),
    "skip_broken_bitmaps": Spelling("--skip-broken-bitmaps", "skip_broken_bitmaps", "skip_broken_bitmaps=True"),
    "spool_limit": Spelling("--spool-limit", "spool_limit", "spool_limit"),
    "snapshot": Spelling("--snapshot {}", "snapshot={}", "snapshot={}"),
    "unsafe": Spelling("-u", "unsafe", "unsafe=True"),
    "write_base": Spelling("--write-base", "write_base", "write_base=True"),
    "temp": Spelling("--temp", "temp", "temporary=True"),
}

_OPTION = pattern(r"\{([a-z_]+)(?:=([^{}]*))?\}")

#: The way that this program names options by. A front end sets it for all its errors.
_way: ContextVar[str] = ContextVar("_way", default="python")


@contextmanager
def options_as(way: str) -> Generator[None]:
    """Have errors name options as on a "command_line" or as a "mount_option"; without this it is as in "python"."""
    token = _way.set(way)
    try:
        yield
    finally:
        _way.reset(token)


def spelled(text: str) -> str:
    """A text with its ``{name=value}`` written as this program's user writes options; other braces stay."""

    def written(option: re.Match[str]) -> str:
        name, value = option.groups()
        if name not in OPTIONS:
            return option[0]
        way: str = getattr(OPTIONS[name], _way.get())
        return way.replace("{}", value or "")

    return _OPTION.sub(written, text) if "{" in text else text


class ImageError(OSError):
    """A failure with its kind and its place.

    ``path`` is the host file, ``offset`` the byte offset in it (or in the virtual disk where
    the message says so), ``op`` what was being done, ``remedy`` what the user can do about it.
    A remedy is given with options as ``{name=value}`` (see `OPTIONS`) and read as `spelled` writes it.

    It is an OSError: ``errno`` is the number that a file system answers with for the kind,
    ``filename`` is ``path``, ``strerror`` is the message. An error of the kind `not_found`, `exists` or
    `denied` is also a FileNotFoundError, a FileExistsError or a PermissionError.
    """

    errno: int  # pyright: ignore[reportIncompatibleVariableOverride]  never None here

    def __new__(cls, kind: ErrorKind, message: str, *, path: str | None = None, **_place: object) -> Self:
        """Make an error of the class that fits the kind."""
        fitting = cast("type[Self]", _CLASSES.get(kind, cls)) if cls is ImageError else cls
        return super().__new__(fitting, CODES[kind].errno, message, path)

    def __init__(  # pyright: ignore[reportInconsistentConstructor]  __new__ leaves the rest of the place to it
        self,
        kind: ErrorKind,
        message: str,
        *,
        path: str | None = None,
        offset: int | None = None,
        op: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__()  # nothing is left to do: OSError took its arguments in __new__
        self.kind = kind
        self.message = message
        self.path = path
        self.offset = offset
        self.op = op
        self.neutral_remedy = remedy

    @property
    def remedy(self) -> str | None:
        """What the user can do about it, in the words of this program."""
        return None if self.neutral_remedy is None else spelled(self.neutral_remedy)

    @remedy.setter
    def remedy(self, text: str | None) -> None:
        self.neutral_remedy = text

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy by the arguments, all of them, and what was added (notes)."""
        place = {"path": self.path, "offset": self.offset, "op": self.op, "remedy": self.neutral_remedy}
        return partial(type(self), self.kind, self.message, **place), (), self.__dict__  # type: ignore[arg-type]  # by name

    @property
    def exit_code(self) -> int:
        """The exit status of a command that ends with this error."""
        return CODES[self.kind].exit_code

    def __str__(self) -> str:
        parts: list[str] = []
        if self.path is not None:
            parts.append(f"{printable(self.path)}: ")
        parts.append(_line(self.message))
        if self.offset is not None:
            parts.append(f" (at byte {self.offset:#x})")
        if self.remedy is not None:
            parts.append(f"; {_line(self.remedy)}")
        return "".join(parts)

    def __repr__(self) -> str:
        fields = (("path", self.path), ("offset", self.offset), ("op", self.op), ("remedy", self.remedy))
        said = "".join(f", {name}={value!r}" for name, value in fields if value is not None)
        return f"ImageError({self.kind.value!r}, {self.message!r}{said})"


class ImageNotFoundError(ImageError, FileNotFoundError):  # pyright: ignore[reportIncompatibleVariableOverride]  errno, as above
    """An ImageError of the kind `not_found`."""


class ImageExistsError(ImageError, FileExistsError):  # pyright: ignore[reportIncompatibleVariableOverride]  errno, as above
    """An ImageError of the kind `exists`."""


class ImageDeniedError(ImageError, PermissionError):  # pyright: ignore[reportIncompatibleVariableOverride]  errno, as above
    """An ImageError of the kind `denied`."""


_CLASSES: dict[ErrorKind, type[ImageError]] = {
    ErrorKind.NOT_FOUND: ImageNotFoundError,
    ErrorKind.EXISTS: ImageExistsError,
    ErrorKind.DENIED: ImageDeniedError,
}


def from_os_error(error: OSError, *, path: str | None, op: str, offset: int | None = None) -> ImageError:
    """The ImageError for an error of the operating system met while doing `op`.

    An ImageError is an OSError: one that is given here comes back as it is, for it knows its place best.
    """
    if isinstance(error, ImageError):
        return error
    number = error.errno or errno.EIO
    kind = _KIND_OF_ERRNO.get(number, ErrorKind.IO)
    remedy = "raise the limit of open files (ulimit -n)" if number == errno.EMFILE else None
    return ImageError(kind, f"cannot {op}: {os.strerror(number)}", path=path, offset=offset, op=op, remedy=remedy)


def truncated(path: str | None, *, offset: int | None = None) -> ImageError:
    """The error for an open file that somebody has made shorter: bytes that it had are gone."""
    return ImageError(
        ErrorKind.IO,
        "has become shorter while it was open: somebody has truncated it, and what it held there is lost",
        path=path,
        offset=offset,
        op="read",
    )


def limit_reached(what: str, *, path: str | None, op: str) -> ImageError:
    """The error for doing `op` where the host gives no more of `what`: "threads" or "processes"."""
    return ImageError(
        ErrorKind.IO,
        f"cannot {op}: no more {what} can be started",
        path=path,
        op=op,
        remedy="raise the limit of processes and threads (ulimit -u, pids.max of the cgroup, threads-max)",
    )


def printable(text: str) -> str:
    """The text as a piece of one line for a terminal or a log.

    Names of files, labels and whatever else others have chosen may hold line breaks, terminal escapes and characters
    that turn the direction of writing. These are written as Python escapes, a byte that is no UTF-8 by its value.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    byte = ord(character) - 0xDC00  # what os.fsdecode makes of bytes that are no UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode("ascii")


def _line(text: str) -> str:
    return printable(" ".join(text.splitlines()))
