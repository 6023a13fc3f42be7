"""EWF, the Expert Witness Compression Format of forensic images: EnCase's .E01 and SMART's .s01 files, read only.

:data:`FORMAT` is the object that the registry loads. docs/specs/ewf.md has the facts of the format.
"""

from __future__ import annotations

from tapfs.driver import Ability, Driver, HostFile, OpenRequest

#: The first bytes of a segment file of a disk. Logical evidence (LVF) and version 2 (EVF2) are other formats.
SIGNATURE = b"EVF\x09\x0d\x0a\xff\x00"


class EwfFormat:
    """EWF as a :class:`tapfs.driver.Format`."""

    name = "ewf"
    abilities = frozenset({Ability.CHECK})

    def probe(self, head: bytes, size: int) -> int:
        """100 for the signature."""
        del size  # the signature is enough
        return 100 if head.startswith(SIGNATURE) else 0

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        """A driver for the image whose first segment is this file. Raises ImageError naming the segment and field."""
        from tapfs.formats.ewf.driver import EwfDriver  # few images are of this format

        return EwfDriver(file, request)


FORMAT = EwfFormat()
