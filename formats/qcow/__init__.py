"""qcow version 1: QEMU's first copy-on-write format, and the dialects of it that blktap wrote.

:data:`FORMAT` is the object that the registry loads. docs/specs/blktap-qcow.md has the facts of the format. The driver
is imported late, because a probe does not need it. So is what only a writer, a check or a creation needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tapfs.driver import Ability, CreateRequest, HostFile, OpenRequest
from tapfs.formats.qcow.signature import MAGIC, VERSION
from tapfs.plan import Plan

if TYPE_CHECKING:
    from tapfs.formats.qcow.driver import QcowDriver


class QcowFormat:
    """qcow version 1 as a :class:`tapfs.driver.CreatableFormat`."""

    name = "qcow"
    abilities = frozenset(Ability) - {Ability.SNAPSHOTS}

    @property
    def create_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        from tapfs.formats.qcow.create import CREATE_OPTIONS

        return CREATE_OPTIONS

    def probe(self, head: bytes, size: int) -> int:
        """100 for the magic with version 1, else 0: versions 2 and 3 are another format, qcow2."""
        del size  # the magic is enough
        return 100 if head[:8] == MAGIC + VERSION.to_bytes(4, "big") else 0

    def open(self, file: HostFile, request: OpenRequest) -> QcowDriver:
        """A driver for this file: an EditableQcowDriver if so requested.

        Raises ImageError(invalid_format, unsupported, out_of_bounds, corrupt) naming the field.
        """
        from tapfs.formats.qcow.driver import QcowDriver

        if not request.writable:
            return QcowDriver(file, request)
        from tapfs.formats.qcow.editable import EditableQcowDriver

        return EditableQcowDriver(file, request)

    def create(self, request: CreateRequest) -> Plan:
        """The plan for a new image. Raises ImageError(unsupported, out_of_bounds)."""
        from tapfs.formats.qcow.create import create

        return create(request)


FORMAT = QcowFormat()
