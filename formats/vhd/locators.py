"""The names of a differencing VHD's parent: read from its locators, and written for a new image.

Each locator has the name for one system (docs/specs/vhd.md, "Differencing"). The names come from other machines, so
backslashes become slashes, drive letters go, and only what may be a file's name on this host is left. The gate of the
core judges the names (`tapfs.host.gate`). A name in the image's own folder comes before one that may lead anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tapfs.driver import HostFile
from tapfs.formats.vhd.dynamic_header import SECTOR, DynamicHeader, Locator
from tapfs.patterns import pattern
from tapfs.records import NamedTuple

RELATIVE, ABSOLUTE, FILE_URL = b"W2ru", b"W2ku", b"MacX"
_OLD_RELATIVE, _OLD_ABSOLUTE = b"Wi2r", b"Wi2k"

#: Locators in the order in which their names are tried.
_ORDER = (RELATIVE, FILE_URL, _OLD_RELATIVE, ABSOLUTE, _OLD_ABSOLUTE)

#: More bytes than this are no name of a file on any system.
MAX_NAME_BYTES = 64 << 10
#: UTF-16 units that the header's own field for the name holds, with a zero at the end.
MAX_HEADER_NAME = 255

_DRIVE = pattern(r"(?:[/\\]{2}\?[/\\])?[A-Za-z]:")
_URL = pattern(r"file:(?://[^/]*)?(?=/)", re.IGNORECASE)


class Name(NamedTuple):
    """A locator's name as the image has it."""

    code: str
    text: str


def written_names(file: HostFile, header: DynamicHeader) -> list[Name]:
    """The names in the locators, as far as they lie in the file and are text, and the name in the header."""
    names = [
        Name(locator.code.decode("latin-1"), text)
        for code in _ORDER
        for locator in header.locators
        if locator.code == code and (text := _text(file, locator))
    ]
    text = header.parent_name.decode("utf-16-be", "replace").split("\0", 1)[0]
    return [*names, Name("name", text)] if text else names


def candidates(names: Sequence[Name]) -> list[str]:
    """The names to try for the parent, in this order, each once; a relative one starts at the image."""
    found = [local_name(name.text) for name in names]
    relative = [name for name in found if not name.startswith("/")]
    beside = [name.rpartition("/")[2] for name in found]
    absolute = [name for name in found if name.startswith("/")]
    return [name for name in dict.fromkeys([*relative, *beside, *absolute]) if name.strip("./")]


def local_name(text: str) -> str:
    """The name as this host writes it."""
    if url := _URL.match(text):
        from urllib.parse import unquote  # few images name their parent so

        return unquote(text[url.end() :])
    text = _DRIVE.sub("", text, count=1) if _DRIVE.match(text) else text
    name = text.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _text(file: HostFile, locator: Locator) -> str:
    if not 0 < locator.data_length <= MAX_NAME_BYTES:
        return ""
    raw = file.read(locator.offset, locator.data_length)
    if len(raw) < locator.data_length:
        return ""
    if locator.code in {RELATIVE, ABSOLUTE}:
        text = raw[: len(raw) & ~1].decode("utf-16-le", "replace")
    else:
        text = raw.decode("utf-8", "surrogateescape")
    return text.split("\0", 1)[0]


class NewLocators(NamedTuple):
    """The locators of a new image, and the bytes to be written from the offset on that they were made for."""

    locators: tuple[Locator, ...]
    data: bytes


def new_locators(name: str, offset: int) -> NewLocators:
    """The locators for a parent that the user calls `name`, their texts from `offset` on."""
    locators: list[Locator] = []
    data = b""
    for code, text in _texts(name):
        padded = -(-len(text) // SECTOR) * SECTOR
        locators.append(Locator(code, padded, len(text), 0, offset + len(data)))
        data += text.ljust(padded, b"\0")
    unused = Locator(bytes(4), 0, 0, 0, 0)
    return NewLocators(tuple(locators) + (unused,) * (8 - len(locators)), data)


def _texts(name: str) -> Iterator[tuple[bytes, bytes]]:
    windows = name.replace("/", "\\")
    if name.startswith("/"):
        yield ABSOLUTE, windows.encode("utf-16-le", "surrogatepass")
        from urllib.parse import quote

        yield FILE_URL, b"file://" + quote(name.encode("utf-8", "surrogateescape")).encode()
    else:
        yield RELATIVE, f".\\{windows.removeprefix('.' + chr(92))}".encode("utf-16-le", "surrogatepass")
        from urllib.parse import quote

        yield FILE_URL, f"./{name.removeprefix('./')}".encode("utf-8", "surrogateescape")
