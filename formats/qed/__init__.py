"""QED, QEMU's format of 2010 between qcow2's versions 2 and 3; images are only read.

:data:`FORMAT` is the object that the registry loads. docs/specs/qed.md has the facts of the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.driver import Ability, HostFile, OpenRequest
from tapfs.formats.qed.signature import MAGIC

if TYPE_CHECKING:
    from tapfs.formats.qed.driver import QedDriver


class QedFormat:
    """QED as a :class:`tapfs.driver.Format`."""

    name = "qed"
    abilities = frozenset({Ability.BACKING, Ability.CHECK})

    def probe(self, head: bytes, size: int) -> int:
        """100 for the magic."""
        del size
        return 100 if head.startswith(MAGIC) else 0

    def open(self, file: HostFile, request: OpenRequest) -> QedDriver:
        """A driver for this file. Raises ImageError(invalid_format, unsupported, out_of_bounds, corrupt)."""
        from tapfs.formats.qed.driver import QedDriver  # few images are of this format

        return QedDriver(file, request)


FORMAT = QedFormat()
