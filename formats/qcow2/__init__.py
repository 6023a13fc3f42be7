"""qcow2, versions 2 and 3: QEMU's own image format, which most disks of virtual machines are in.

:data:`FORMAT` is the object that the registry loads. The specification is QEMU's docs/interop/qcow2, and
docs/specs/qcow2.md has what that text does not say. Modules that only a writer, a check or a creation needs are
imported late.
"""

from __future__ import annotations

from tapfs.driver import Ability, HostFile, OpenRequest
from tapfs.formats.qcow2.header import MAGIC, VERSIONS
from tapfs.formats.qcow2.reader import Qcow2Driver


class Qcow2Format:
    """qcow2 as a :class:`tapfs.driver.Format`."""

    name = "qcow2"
    abilities = frozenset({Ability.BACKING, Ability.SNAPSHOTS})

    def probe(self, head: bytes, size: int) -> int:
        """100 for the magic with version 2 or 3, else 0: version 1 is another format, qcow."""
        del size  # the magic is enough
        return 100 if head[:4] == MAGIC and int.from_bytes(head[4:8], "big") in VERSIONS else 0

    def open(self, file: HostFile, request: OpenRequest) -> Qcow2Driver:
        """A driver for this file.

        Raises ImageError(invalid_format, unsupported, out_of_bounds, corrupt) naming the field, (not_found) for a
        snapshot that is not there.
        """
        return Qcow2Driver(file, request)


FORMAT = Qcow2Format()
