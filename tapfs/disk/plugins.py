"""Format drivers of other packages, which come in by the entry-point group ``tapfs.formats``.

The entry's name is the format's, its target a `tapfs.driver.Format`. A driver that is broken is left out with one
warning (RuntimeWarning) that names its package; tapfs and the other drivers go on without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from tapfs.driver import Format
from tapfs.errors import ErrorKind, ImageError
from tapfs.records import NamedTuple

ENTRY_POINT_GROUP = "tapfs.formats"


class Plugin(NamedTuple):
    """A driver of another package; `origin` names the driver and the package for messages."""

    format: Format
    origin: str


def find_plugins(taken: Collection[str]) -> dict[str, Plugin]:
    """The drivers of other packages that can be loaded, by the name of the format; names in `taken` are tapfs's own."""
    found: dict[str, Plugin] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        origin = _origin(entry)
        if entry.name in taken:
            leave_out(origin, f"tapfs has a format {entry.name!r} of its own")
        elif entry.name in found:
            leave_out(origin, f"{found[entry.name].origin} has the same name")
        elif (loaded := _loaded(entry, origin)) is not None:
            found[entry.name] = Plugin(loaded, origin)
    return found


def confidence(plugin: Plugin, head: bytes, size: int) -> int:
    """What the driver answers to `probe`; 0 from one that fails."""
    try:
        answer = cast("object", plugin.format.probe(head, size))
    except Exception as error:  # noqa: BLE001  whatever the code of another package raises
        leave_out(plugin.origin, f"probe failed: {_said(error)}")
        return 0
    if not isinstance(answer, int):
        leave_out(plugin.origin, f"probe answered {answer!r}, not a number")
        return 0
    return answer


def failure(plugin: Plugin, path: str, error: Exception) -> ImageError:
    """The error for an image that a driver of another package failed to open."""
    return ImageError(
        ErrorKind.UNSUPPORTED,
        f"{plugin.origin} failed: {_said(error)}",
        path=path,
        op="open",
        remedy="report it to that package, or say {format=FMT} if the image is something else",
    )


@cache
def leave_out(origin: str, problem: str) -> None:
    """Warn, once, that a driver is not used."""
    warnings.warn(f"{origin} is left out: {problem}", RuntimeWarning, stacklevel=2)


def _origin(entry: EntryPoint) -> str:
    package = "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
    return f"the driver of the format {entry.name!r} of {package}"


def _loaded(entry: EntryPoint, origin: str) -> Format | None:
    try:
        target: object = entry.load()
        if not isinstance(target, Format):
            leave_out(origin, f"{entry.value} is no tapfs.driver.Format: it lacks name, probe or open")
        elif target.name != entry.name:
            leave_out(origin, f"{entry.value} calls itself {target.name!r}")
        else:
            return target
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the code of another package raises
        leave_out(origin, f"it cannot be loaded: {_said(error)}")
    return None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
