"""Open the descriptor of a Parallels bundle: a layer without data, whose parent is the newest file of the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tapfs.driver import CheckReport, Geometry, HostFile, OpenRequest, ProgressCallback
from tapfs.extent import Extent, Kind
from tapfs.formats.parallels.bundle import read_bundle
from tapfs.plan import Plan

_GRANULE = 1 << 20
_MAP_UNIT = 1 << 30


class BundleDriver:
    """An open descriptor, read-only: a :class:`tapfs.driver.Driver`."""

    format_name = "parallels"
    plain_details = frozenset({"states"})

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        del request
        self.file = file
        self.bundle = bundle = read_bundle(file)
        self.geometry = Geometry(
            virtual_size=bundle.size, granule=_GRANULE, map_unit=_MAP_UNIT, backing=bundle.newest.reference
        )

    def map(self, offset: int, length: int) -> list[Extent]:
        """Nothing lies in the descriptor itself."""
        first = offset - offset % _GRANULE
        return [Extent(first, -(-(offset + length) // _GRANULE) * _GRANULE - first, Kind.UNALLOCATED)]

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """All of it."""
        return Extent(offset, end - offset, Kind.UNALLOCATED)

    def details(self) -> Mapping[str, object]:
        """The states of the disk."""
        return {"kind": "bundle", "states": len(self.bundle.files)}

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Nothing besides what opening has looked at: the files are images of their own."""
        del progress
        return CheckReport()

    def repair(self) -> Sequence[Plan]:
        """Nothing: Parallels images are only read."""
        return ()
