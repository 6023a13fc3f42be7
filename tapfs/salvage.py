"""A salvage: metadata that a scan of a damaged image has found or made anew, to be laid over the image's file.

A driver that can (`SalvageableFormat`) reads the file, and answers with writes that nobody executes. The core lays
them over the file (`tapfs.host.patched`), and the driver opens the image through them. The file is only read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from tapfs.extent import Range
from tapfs.format import Format
from tapfs.geometry import BackingReference
from tapfs.host_files import HostFile
from tapfs.plan import Plan
from tapfs.records import NamedTuple


class SalvageRequest(NamedTuple):
    """What the user knows of a damaged image. None: the scan is to find out.

    `cluster_bytes`: the unit in which the format gives space (cluster, grain, block). `backing`: the parent, for an
    image whose own name of it is lost. `in_order`: tables that nothing names are put where one is missing, in the
    order of their places in the file, which is a guess. `progress` is told bytes scanned and bytes in all.
    """

    virtual_size: int | None = None
    cluster_bytes: int | None = None
    backing: BackingReference | None = None
    in_order: bool = False
    progress: Callable[[int, int], None] | None = None


class Salvage(NamedTuple):
    """What a scan has found.

    `patch` has the writes of file 0 that the driver is to see. `rebuilt` says what they mend, and from what each was
    taken. `doubts` says what could not be found, or was guessed. `unplaced` are ranges of the file that may hold data
    of the guest and that no table names; ascending. `size_guessed`: nothing said how large the disk is, so that it
    ends with the last data that was found.
    """

    patch: Plan = Plan()
    rebuilt: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    unplaced: tuple[Range, ...] = ()
    size_guessed: bool = False

    @property
    def unplaced_bytes(self) -> int:
        """Bytes of the unplaced ranges."""
        return sum(each.length for each in self.unplaced)


@runtime_checkable
class SalvageableFormat(Format, Protocol):
    """A format of whose damaged images a scan finds what the metadata has lost."""

    def salvage(self, file: HostFile, request: SalvageRequest) -> Salvage:
        """Scan a whole file. What is in good order stays as it is.

        Raises ImageError: invalid_format where nothing of an image of this format was found, out_of_bounds and
        unsupported for what the request says and no image can have, io.
        """
        ...
