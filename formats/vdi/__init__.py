"""VDI, the disk image of VirtualBox: dynamic, fixed and differencing.

:data:`FORMAT` is the object that the registry loads. docs/specs/vdi.md has the facts of the format. Modules are
imported late: a probe needs only the signature, and most openings only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tapfs.driver import Ability, CreateRequest, HostFile, OpenRequest, Salvage, SalvageRequest
from tapfs.formats.vdi.signature import SIGNATURE, SIGNATURE_AT
from tapfs.plan import Plan

if TYPE_CHECKING:
    from tapfs.formats.vdi.driver import VdiDriver


class VdiFormat:
    """VDI as a :class:`tapfs.driver.CreatableFormat`."""

    name = "vdi"
    abilities = frozenset({Ability.WRITE, Ability.BACKING, Ability.CHECK, Ability.REPAIR, Ability.RESIZE})

    @property
    def create_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        from tapfs.formats.vdi.create import CREATE_OPTIONS

        return CREATE_OPTIONS

    def probe(self, head: bytes, size: int) -> int:
        """100 for the signature; the text before it is free."""
        del size
        return 100 if head[SIGNATURE_AT : SIGNATURE_AT + len(SIGNATURE)] == SIGNATURE else 0

    def open(self, file: HostFile, request: OpenRequest) -> VdiDriver:
        """A driver for this file: an EditableVdiDriver if so requested.

        Raises ImageError(invalid_format, unsupported, out_of_bounds, corrupt) naming the field.
        """
        if not request.writable:
            from tapfs.formats.vdi.driver import VdiDriver

            return VdiDriver(file, request)
        from tapfs.formats.vdi.editable import EditableVdiDriver

        return EditableVdiDriver(file, request)

    def create(self, request: CreateRequest) -> Plan:
        """The plan for a new image. Raises ImageError(unsupported, out_of_bounds)."""
        from tapfs.formats.vdi.create import create

        return create(request)

    def salvage(self, file: HostFile, request: SalvageRequest) -> Salvage:
        """Make a lost header anew; see :meth:`tapfs.driver.SalvageableFormat.salvage`."""
        from tapfs.formats.vdi.salvage import salvage

        return salvage(file, request)


FORMAT = VdiFormat()
