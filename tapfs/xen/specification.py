"""Parse the disk strings of VM configurations: `tap:qcow:FILE,xvda,w` and its older and newer forms.

    [tap:|tap2:][tapdisk:|ioemu:][TYPE[,OPTION=VALUE]...:]FILE[,DEV[:cdrom],MODE]
    FILE,[FORMAT],DEV,MODE

TYPE is `aio` (raw, past the page cache), `sync` and `file` (raw), `phy` (a block device), `ram` (a RAM disk; FILE is
its name) or a format. After `tap:` any word is a type, and an unknown one is refused when the image is opened.
After a comma it may have options of `tapfs attach`, for toolstacks that have no other place for them:
`tap:qcow,key-file=/k,nice=5:FILE`. A value has neither comma nor colon.
Without `tap:` only known types count, so that a file may be called `a:b`. A FILE may hold commas. A device and a mode
at its end are no part of it, nor is a format before them, as xl's configurations have it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tapfs.disk.probe import format_names
from tapfs.errors import ErrorKind, ImageError
from tapfs.host import ram
from tapfs.host.location import file_name, locate
from tapfs.xen.device import parse_vdev

_MODES = {"r": "r", "ro": "r", "w": "w", "rw": "w", "w!": "w!"}
_TYPE = re.compile(r"([a-z][a-z0-9_-]*):(.*)", re.DOTALL)
_TYPE_WITH_OPTIONS = re.compile(r"([a-z][a-z0-9_-]*)((?:,[a-z-]+=[^,:]+)+):(.*)", re.DOTALL)
#: The options of a disk string: keys below `tapfs/` of the device.
OPTIONS = (
    *("backing-formats", "cache", "grants", "key-file", "limit-bytes", "limit-requests"),
    *("memory", "nice", "open-files", "wait-on", "write-base"),
)
#: Bytes of memory that a process may take unless `tapfs/memory` says otherwise: far more than a sound image needs.
DEFAULT_MEMORY = 1 << 30
_FAMILIES = ("tap", "tap2")
_LIBXL_TYPES = ("aio", "vhd")
#: Words that told the toolstack which program was to serve the disk.
_PROGRAMS = ("tapdisk", "ioemu")
_RAW = "raw"
_RAM = ram.FORMAT
#: Types of raw images; `file` and `phy` are those of Xen's other backends.
_RAW_TYPES = ("aio", "sync", "file", "phy")
#: Formats of Xen's configurations, whether tapfs reads them or not: none of these is the start of a file's name.
_XEN_FORMATS = ("qcow", "qcow2", "vhd", "vhdx", "vmdk", "vdi", "qed")
_CDROM, _DISK = "cdrom", "disk"


class DiskSpecification(NamedTuple):
    """What a disk string says.

    `path` is an image as every command takes it, `ram:NAME` included; `format` None: its contents decide.
    `direct`: past the page cache. `vdev` (the number), `mode` ("r", "w", "w!") and `options` where the string has them.
    """

    path: str
    format: str | None = None
    direct: bool = False
    vdev: int | None = None
    mode: str | None = None
    options: tuple[tuple[str, str], ...] = ()

    def absolute(self) -> DiskSpecification:
        """The same from any folder, because the process that serves the disk runs in another one."""
        return self._replace(path=locate(self.path).absolute().name)

    @property
    def params(self) -> str:
        """The string for xenstore's `params`: it means the same path, format and directness."""
        kind = "aio" if self.direct else self.format
        if self.options:
            kind = ",".join((kind or "", *(f"{name}={value}" for name, value in self.options)))
        text = self.path if kind is None else f"tap:{kind}:{self.path}"
        # A file that ends like a device and a mode needs these behind it to be told from them.
        return f"{text},xvda,r" if _ends_with_device(self.path) else text


def parse_specification(text: str) -> DiskSpecification:
    """What a disk string means; nothing is opened. Raises ImageError(invalid_argument)."""
    rest, vdev, mode = text, None, None
    if found := _ends_with_device(text):
        rest, vdev, mode = found
    family, after = _take_type(rest)
    if family in _LIBXL_TYPES and _take_type(after)[0] in _FAMILIES:
        # libxl puts its format before the target of a disk with `backendtype=tap`.
        rest = after
        family, after = _take_type(rest)
    with_family = family in _FAMILIES
    if with_family:
        rest = after
        while (found_program := _take_type(rest))[0] in _PROGRAMS:
            rest = found_program[1]
    options, rest = _take_options(rest) if with_family else ((), rest)
    kind, after = _take_type(rest)
    path, image_format = rest, None
    if kind is not None and (with_family or _is_type(kind)):
        path, image_format = after, _RAW if kind in _RAW_TYPES else kind
        if kind == "phy" and path and not path.startswith("/"):
            path = f"/dev/{path}"
    elif vdev is not None and (positional := _ends_with_format(path)) is not None:
        path, image_format = positional
    if not path or "\0" in path:
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            f"{text!r} names no file",
            op="parse",
            remedy="write tap:FORMAT:FILE or just FILE",
        )
    if image_format == _RAM:
        return DiskSpecification(ram.PREFIX + path, None, False, vdev, mode, options)
    direct = kind == "aio" and image_format is not None
    return DiskSpecification(file_name(path), image_format, direct, vdev, mode, options)


def _take_options(text: str) -> tuple[tuple[tuple[str, str], ...], str]:
    """The options behind the type, and the text without them. Raises ImageError(invalid_argument)."""
    match = _TYPE_WITH_OPTIONS.fullmatch(text)
    if match is None:
        return (), text
    options = tuple((name, value) for name, _, value in (each.partition("=") for each in match[2][1:].split(",")))
    for name, _ in options:
        if name not in OPTIONS:
            raise ImageError(
                ErrorKind.INVALID_ARGUMENT,
                f"a disk has no option {name!r}",
                op="parse",
                remedy=f"there are {', '.join(OPTIONS)}",
            )
    return options, f"{match[1]}:{match[3]}"


def parse_mode(text: str) -> str:
    """A mode as xenstore's `mode` holds it: "r", "w" or "w!". Raises ImageError(invalid_argument)."""
    mode = _MODES.get(text)
    if mode is None:
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT, f"{text!r} is no mode of a disk", op="parse", remedy="use r, w or w!"
        )
    return mode


def _is_type(word: str) -> bool:
    return word in _RAW_TYPES or word in _XEN_FORMATS or word in format_names()


def _ends_with_format(text: str) -> tuple[str, str | None] | None:
    """What stands before `,FORMAT`, and the format, None if it is left empty; None where the text ends otherwise."""
    before, comma, word = text.rpartition(",")
    if not comma or not (word in ("", _RAW) or word in _XEN_FORMATS or word in format_names()):
        return None
    return before, word or None


def _take_type(text: str) -> tuple[str | None, str]:
    match = _TYPE.fullmatch(text)
    return (match[1], match[2]) if match else (None, text)


def _ends_with_device(text: str) -> tuple[str, int, str] | None:
    """What stands before `,DEV,MODE`, the number of DEV, and MODE; None where the text ends otherwise.

    A CD-ROM (`DEV:cdrom`) is read-only whatever MODE says.
    """
    before, first, mode = text.rpartition(",")
    before, second, vdev = before.rpartition(",")
    if not (first and second and mode in _MODES):
        return None
    name, _, kind = vdev.partition(":")
    if kind not in ("", _CDROM, _DISK):
        return None
    try:
        return before, parse_vdev(name), "r" if kind == _CDROM else _MODES[mode]
    except ImageError:
        return None
