"""VMDK: the disks of VMware's products, of one file or of many, hosted ones and those of ESX.

:data:`FORMAT` is the object that the registry loads. docs/specs/vmdk.md has the facts of the format. Modules that only
a writer, a check or a creation needs are imported late, because most openings only read.
"""

from __future__ import annotations

from tapfs.driver import Ability, HostFile, OpenRequest
from tapfs.formats.vmdk import cowd_header, sesparse_header, sparse_header
from tapfs.formats.vmdk.descriptor import is_descriptor
from tapfs.formats.vmdk.driver import VmdkDriver

_MAGICS = (sparse_header.MAGIC, sparse_header.UNFINISHED_MAGIC, cowd_header.MAGIC, sesparse_header.MAGIC_BYTES)


class VmdkFormat:
    """VMDK as a :class:`tapfs.driver.Format`."""

    name = "vmdk"
    abilities = frozenset({Ability.BACKING})

    def probe(self, head: bytes, size: int) -> int:
        """100 for the magic of an extent or the first line of a descriptor, else 0."""
        del size  # the magic is enough
        return 100 if head.startswith(_MAGICS) or is_descriptor(head) else 0

    def open(self, file: HostFile, request: OpenRequest) -> VmdkDriver:
        """A driver for the disk of this file. Raises ImageError naming the field or the missing file."""
        return VmdkDriver(file, request)


FORMAT = VmdkFormat()
