"""qcow2, versions 2 and 3: QEMU's own image format, which most disks of virtual machines are in.

:data:`FORMAT` is the object that the registry loads. The specification is QEMU's docs/interop/qcow2, and
docs/specs/qcow2.md has what that text does not say. Modules that a probe does not need are imported late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tapfs.driver import Ability, CreateRequest, HostFile, OpenRequest, Salvage, SalvageRequest
from tapfs.formats.qcow2.signature import MAGIC, VERSIONS
from tapfs.plan import Plan

if TYPE_CHECKING:
    from tapfs.formats.qcow2.driver import Qcow2Driver


class Qcow2Format:
    """qcow2 as a :class:`tapfs.driver.KeepingFormat`."""

    name = "qcow2"
    abilities = frozenset(Ability)

    def probe(self, head: bytes, size: int) -> int:
        """100 for the magic with version 2 or 3, else 0: version 1 is another format, qcow."""
        del size  # the magic is enough
        return 100 if head[:4] == MAGIC and int.from_bytes(head[4:8], "big") in VERSIONS else 0

    def open(self, file: HostFile, request: OpenRequest) -> Qcow2Driver:
        """A driver for this file.

        Raises ImageError(invalid_format, unsupported, out_of_bounds, corrupt) naming the field, (not_found) for a
        snapshot that is not there.
        """
        from tapfs.formats.qcow2.driver import Qcow2Driver
        from tapfs.formats.qcow2.header import is_extended

        if not request.writable:
            return Qcow2Driver(file, request)
        if is_extended(file):
            from tapfs.formats.qcow2.editable_extended import EditableExtendedQcow2Driver

            return EditableExtendedQcow2Driver(file, request)
        from tapfs.formats.qcow2.editable import EditableQcow2Driver

        return EditableQcow2Driver(file, request)

    @property
    def create_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        from tapfs.formats.qcow2.create import CREATE_OPTIONS

        return CREATE_OPTIONS

    @property
    def amend_options(self) -> Mapping[str, str]:
        """The `-o` options of `tapfs amend` with a line of help each."""
        from tapfs.formats.qcow2.amend_options import AMEND_OPTIONS

        return AMEND_OPTIONS

    def create(self, request: CreateRequest) -> Plan:
        """The plan for a new image. Raises ImageError(unsupported, out_of_bounds)."""
        from tapfs.formats.qcow2.create import create

        return create(request)

    def salvage(self, file: HostFile, request: SalvageRequest) -> Salvage:
        """Find the tables of a damaged image; see :meth:`tapfs.driver.SalvageableFormat.salvage`."""
        from tapfs.formats.qcow2.salvage import salvage

        return salvage(file, request)

    def further_names(self, request: CreateRequest) -> Sequence[str]:
        """The name of the data file, if there is to be one."""
        from tapfs.formats.qcow2.create import parse_options

        name = parse_options(request).data_file
        return () if name is None else (name,)

    def kept_names(self, request: CreateRequest) -> Sequence[str]:
        """The name of the data file, if it is there already and becomes the disk."""
        from tapfs.formats.qcow2.create import parse_options

        return self.further_names(request) if parse_options(request).keep_data_file else ()


FORMAT = Qcow2Format()
