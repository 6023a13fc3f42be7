"""VMDK: the disks of VMware's products, of one file or of many, hosted ones and those of ESX.

:data:`FORMAT` is the object that the registry loads. docs/specs/vmdk.md has the facts of the format. Modules that
a probe does not need are imported late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tapfs.driver import Ability, CreateRequest, HostFile, OpenRequest, Salvage, SalvageRequest
from tapfs.formats.vmdk.signature import COWD, SESPARSE, SPARSE, UNFINISHED_SPARSE, is_descriptor
from tapfs.plan import Plan

if TYPE_CHECKING:
    from tapfs.formats.vmdk.driver import VmdkDriver


class VmdkFormat:
    """VMDK as a :class:`tapfs.driver.MultiFileFormat`."""

    name = "vmdk"
    abilities = frozenset(
        {Ability.WRITE, Ability.BACKING, Ability.COMPRESS, Ability.CHECK, Ability.REPAIR, Ability.RESIZE}
    )

    def probe(self, head: bytes, size: int) -> int:
        """100 for the magic of an extent or the first line of a descriptor, else 0."""
        del size  # the magic is enough
        return 100 if head.startswith((SPARSE, UNFINISHED_SPARSE, COWD, SESPARSE)) or is_descriptor(head) else 0

    def open(self, file: HostFile, request: OpenRequest) -> VmdkDriver:
        """A driver for the disk of this file: an EditableVmdkDriver if so requested.

        Raises ImageError naming the field or the missing file; read_only for a disk that cannot be written.
        """
        if not request.writable:
            from tapfs.formats.vmdk.driver import VmdkDriver

            return VmdkDriver(file, request)
        if request.created and _is_packed(file):
            from tapfs.formats.vmdk.stream import NewVmdkStream

            return NewVmdkStream(file, request)
        from tapfs.formats.vmdk.editable import EditableVmdkDriver

        return EditableVmdkDriver(file, request)

    @property
    def create_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        from tapfs.formats.vmdk.create import CREATE_OPTIONS

        return CREATE_OPTIONS

    def salvage(self, file: HostFile, request: SalvageRequest) -> Salvage:
        """Find the grains or the tables of a damaged image; see :meth:`tapfs.driver.SalvageableFormat.salvage`."""
        from tapfs.formats.vmdk.salvage import salvage

        return salvage(file, request)

    def further_names(self, request: CreateRequest) -> Sequence[str]:
        """The names of the extents beside the descriptor. Raises ImageError as `create` does."""
        from tapfs.formats.vmdk.create import further_names

        return further_names(request)

    def create(self, request: CreateRequest) -> Plan:
        """The plan for a new disk. Raises ImageError(unsupported, out_of_bounds)."""
        from tapfs.formats.vmdk.create import create

        return create(request)


def _is_packed(file: HostFile) -> bool:
    from tapfs.formats.vmdk.sectors import SECTOR
    from tapfs.formats.vmdk.sparse_header import parse_sparse_header

    head = file.read(0, SECTOR)
    return head.startswith(SPARSE) and parse_sparse_header(head, file.path).is_compressed


FORMAT = VmdkFormat()
