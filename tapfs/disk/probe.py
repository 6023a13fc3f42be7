"""The formats there are, and which of them a file is.

Formats are loaded when they are asked for. Others' drivers come in by the entry-point group
``tapfs.formats``: the entry's name is the format's, its target a `tapfs.driver.Format`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from typing import cast

from tapfs.disk import foreign
from tapfs.driver import Format, HostFile
from tapfs.errors import ErrorKind, ImageError

ENTRY_POINT_GROUP = "tapfs.formats"

#: Every format of tapfs itself: the module, whose FORMAT is the format.
_MODULES = {
    "raw": "tapfs.formats.raw",
    "qcow": "tapfs.formats.qcow",
    "ram": "tapfs.formats.ram",
}

#: How much of a file's start probing looks at, in bytes.
HEAD_BYTES = 4096


@cache
def format_named(name: str) -> Format:
    """The format called `name`; raises ImageError(unsupported) naming those there are."""
    module = _MODULES.get(name)
    if module is not None:
        return cast("Format", importlib.import_module(module).FORMAT)
    found = _others().get(name)
    if found is None:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"unknown format {name!r}",
            op="open",
            remedy=f"known are: {', '.join(format_names())}",
        )
    return found


def format_names() -> tuple[str, ...]:
    """The names that `-f` takes."""
    return (*_MODULES, *_others())


def detect(file: HostFile) -> Format | foreign.ForeignFormat:
    """The format of a file: raw where no driver claims it and `tapfs.disk.foreign` does not know it either.

    Reads a few sectors at the start and at the end. Raises ImageError(io).
    """
    head, size = file.read(0, HEAD_BYTES), file.size()
    own = [format_named(name) for name in _MODULES if name not in ("raw", "ram")]
    claimed = _most_confident(own, head, size) or _most_confident(_others().values(), head, size)
    if claimed is not None:
        return claimed
    tail = file.read(max(0, size - foreign.TAIL_BYTES), foreign.TAIL_BYTES)
    return foreign.recognise(head, tail) or format_named("raw")


def _most_confident(formats: Iterable[Format], head: bytes, size: int) -> Format | None:
    """The format that claims the file most confidently, if any does."""
    scored = [(found.probe(head, size), found) for found in formats]
    confidence, best = max(scored, key=lambda pair: pair[0], default=(0, None))
    return best if confidence > 0 else None


@cache
def _others() -> dict[str, Format]:
    """Formats of other packages. Looking for them costs, so only when ours do not fit."""
    from importlib.metadata import entry_points  # 20 ms that most runs do without

    return {entry.name: cast("Format", entry.load()) for entry in entry_points(group=ENTRY_POINT_GROUP)}
