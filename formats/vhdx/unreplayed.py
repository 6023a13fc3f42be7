"""The driver of an image whose log waits to be replayed: it knows the replay, and nothing else of the image.

Before the replay only the headers and the log may be believed. The core asks for `recovery` right after opening, and
then opens the image anew.
"""

from __future__ import annotations

from collections.abc import Mapping

from tapfs.driver import Geometry, HostFile
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent
from tapfs.formats.vhdx.header import Headers
from tapfs.formats.vhdx.recovery import recovery_plan
from tapfs.plan import Plan


class UnreplayedVhdx:
    """An image before the replay of its log: a :class:`tapfs.driver.Recoverable` with a disk of no bytes."""

    format_name = "vhdx"
    geometry = Geometry(virtual_size=0, granule=1, map_unit=1)

    def __init__(self, file: HostFile, headers: Headers, *, writable: bool) -> None:
        self._file = file
        self._headers = headers
        self._writable = writable

    def recovery(self) -> Plan:
        """The replay. Raises ImageError(corrupt, out_of_bounds) for a log that cannot be replayed."""
        return recovery_plan(self._file, self._headers, changes_file=self._writable)

    def map(self, offset: int, length: int) -> list[Extent]:
        """There is no disk yet: raises ImageError(corrupt)."""
        del length
        raise ImageError(
            ErrorKind.CORRUPT, "the log waits to be replayed", path=self._file.path, offset=offset, op="map"
        )

    def details(self) -> Mapping[str, object]:
        """Nothing that can be believed."""
        return {}
