"""VHDX: the format of Hyper-V, with a log of metadata, blocks of 1 to 256 MiB, and sectors of 512 or 4096 bytes.

:data:`FORMAT` is the object that the registry loads. docs/specs/vhdx.md has the facts that the published specification
(MS-VHDX) has not. Modules that a probe does not need are imported late.
"""

from __future__ import annotations

from collections.abc import Mapping

from tapfs.driver import Ability, CreateRequest, Driver, HostFile, OpenRequest, Salvage, SalvageRequest
from tapfs.formats.vhdx.signature import IDENTIFIER
from tapfs.plan import Plan


class VhdxFormat:
    """VHDX as a :class:`tapfs.driver.CreatableFormat`."""

    name = "vhdx"
    abilities = frozenset({Ability.WRITE, Ability.BACKING, Ability.CHECK, Ability.REPAIR, Ability.RESIZE})

    @property
    def create_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        from tapfs.formats.vhdx.create import CREATE_OPTIONS

        return CREATE_OPTIONS

    def probe(self, head: bytes, size: int) -> int:
        """100 for the file identifier."""
        del size
        return 100 if head.startswith(IDENTIFIER) else 0

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        """A driver for this file: one that only knows the replay where the log waits for it.

        Raises ImageError(invalid_format, unsupported, out_of_bounds, corrupt) naming the field.
        """
        from tapfs.formats.vhdx.driver import VhdxDriver
        from tapfs.formats.vhdx.guids import NO_GUID
        from tapfs.formats.vhdx.header import read_headers

        headers = read_headers(file)
        if headers.current.log != NO_GUID:
            from tapfs.formats.vhdx.unreplayed import UnreplayedVhdx

            return UnreplayedVhdx(file, headers, writable=request.writable)
        if not request.writable:
            return VhdxDriver(file, request, headers)
        from tapfs.formats.vhdx.editable import EditableVhdxDriver

        return EditableVhdxDriver(file, request, headers)

    def create(self, request: CreateRequest) -> Plan:
        """The plan for a new image. Raises ImageError(unsupported, out_of_bounds)."""
        from tapfs.formats.vhdx.create import create

        return create(request)

    def salvage(self, file: HostFile, request: SalvageRequest) -> Salvage:
        """Make a lost header anew; see :meth:`tapfs.driver.SalvageableFormat.salvage`."""
        from tapfs.formats.vhdx.salvage import salvage

        return salvage(file, request)


FORMAT = VhdxFormat()
