"""The registry of formats, and the probe of a file's contents by all of them.

A format is loaded when it is asked for, and none is asked behind one that is sure. Formats of other packages
(`tapfs.disk.plugins`) are looked for only when none of tapfs's own fits.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import TYPE_CHECKING, cast

from tapfs.disk import foreign
from tapfs.driver import Format, HostFile, Trailed, Trait, has_trait
from tapfs.errors import ErrorKind, ImageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tapfs.disk.plugins import Plugin

#: Every format of tapfs itself: the module, whose FORMAT is the format.
_MODULES = {
    "raw": "tapfs.formats.raw",
    "qcow": "tapfs.formats.qcow",
    "qcow2": "tapfs.formats.qcow2",
    "vmdk": "tapfs.formats.vmdk",
    "vhd": "tapfs.formats.vhd",
    "vhdx": "tapfs.formats.vhdx",
    "vdi": "tapfs.formats.vdi",
    "qed": "tapfs.formats.qed",
    "parallels": "tapfs.formats.parallels",
    "dmg": "tapfs.formats.dmg",
    "ewf": "tapfs.formats.ewf",
    "luks": "tapfs.formats.luks",
    "ram": "tapfs.formats.ram",
}

#: Other names of formats, which `-f` and `-O` take as well: qemu-img's.
_ALIASES: dict[str, str] = {"vpc": "vhd"}

#: Bytes of a file's start, and of its end, that probing looks at.
HEAD_BYTES = TAIL_BYTES = 4096

#: The highest confidence of a probe.
_SURE = 100


@cache
def format_named(name: str) -> Format:
    """The format called `name`; raises ImageError(unsupported) naming those there are."""
    module = _MODULES.get(_ALIASES.get(name, name))
    if module is not None:
        return cast("Format", importlib.import_module(module).FORMAT)
    others = _others()
    found = others.get(name) or next((others[other] for other in others if other.lower() == name.lower()), None)
    if found is None:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"unknown format {name!r}",
            op="open",
            remedy=f"known are: {', '.join(format_names())}",
        )
    return found.format


def load_all() -> None:
    """Load every module of tapfs's own formats, for a process that is forked and then opens any of them."""
    import pkgutil  # few processes do

    folder = importlib.import_module("tapfs.formats").__path__
    for module in pkgutil.walk_packages(folder, "tapfs.formats."):
        importlib.import_module(module.name)


def plugin_of(found: Format) -> Plugin | None:
    """The plug-in that a format comes from; None for tapfs's own."""
    return next((each for each in _others().values() if each.format is found), None)


def own_format_names() -> tuple[str, ...]:
    """The names of the formats of tapfs itself."""
    return tuple(_MODULES)


def aliases_of(name: str) -> tuple[str, ...]:
    """The other names of a format of tapfs itself."""
    return tuple(alias for alias, meant in _ALIASES.items() if meant == name)


def summary_of(name: str) -> str:
    """A sentence or two about a format of tapfs itself: the first paragraph of its module."""
    import inspect  # the manual alone asks

    return (inspect.getdoc(importlib.import_module(_MODULES[name])) or "").partition("\n\n")[0]


def format_names() -> tuple[str, ...]:
    """The names that `-f` takes."""
    return (*_MODULES, *_others())


def detect(file: HostFile) -> Format | foreign.ForeignFormat:
    """The format of a file: raw where no driver claims it and `tapfs.disk.foreign` does not know it either.

    Reads a few sectors at the start and at the end. Raises ImageError(io).
    """
    head, size = file.read(0, HEAD_BYTES), file.size()
    claimed = _most_confident((each.probe(head, size), each) for each in map(format_named, _MODULES))
    claimed = claimed or _claimed_by_others(file.path, head, size)
    if claimed is not None:
        return claimed
    tail = file.read(max(0, size - TAIL_BYTES), TAIL_BYTES)
    claimed = _most_confident((each.probe_tail(tail, size), each) for each in _trailed_formats())
    if claimed is not None:
        return claimed
    return foreign.recognise(head, tail) or _guessed_format()


def is_own(found: Format) -> bool:
    """Whether a format is one of tapfs's own. No other package is looked for."""
    return getattr(sys.modules.get(_MODULES.get(found.name, "")), "FORMAT", None) is found


def _claimed_by_others(path: str, head: bytes, size: int) -> Format | None:
    if not _others():
        return None
    from tapfs.disk.plugins import confidence
    from tapfs.host.sandbox.confinement import before_code_of_others

    before_code_of_others(path)

    return _most_confident([(confidence(each, head, size), each.format) for each in _others().values()])


def _most_confident(claims: Iterable[tuple[int, Format]]) -> Format | None:
    """The format with the highest confidence above 0. Whoever comes after one that is sure is not asked, nor loaded."""
    highest, best = 0, None
    for confidence, found in claims:
        if confidence > highest:
            highest, best = confidence, found
            if confidence >= _SURE:
                break
    return best


@cache
def _trailed_formats() -> tuple[Trailed, ...]:
    """Those of tapfs whose images show at their end what they are."""
    return tuple(found for found in map(format_named, _MODULES) if isinstance(found, Trailed))


@cache
def _guessed_format() -> Format:
    """The format of a file that shows none."""
    return next(found for found in map(format_named, _MODULES) if has_trait(found, Trait.GUESSED))


@cache
def _others() -> dict[str, Plugin]:
    from tapfs.disk.plugins import find_plugins  # 20 ms that most runs do without

    return find_plugins(_MODULES)
