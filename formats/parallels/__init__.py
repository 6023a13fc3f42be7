"""Parallels images that grow, of Parallels Desktop and Virtuozzo, in both kinds; they are only read.

:data:`FORMAT` is the object that the registry loads. docs/specs/parallels.md has the facts of the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.driver import Ability, HostFile, OpenRequest
from tapfs.formats.parallels.signature import MAGIC, OLD_MAGIC

if TYPE_CHECKING:
    from tapfs.formats.parallels.driver import ParallelsDriver


class ParallelsFormat:
    """Parallels images as a :class:`tapfs.driver.Format`."""

    name = "parallels"
    abilities = frozenset({Ability.CHECK})

    def probe(self, head: bytes, size: int) -> int:
        """100 for one of the two magics of 16 bytes."""
        del size
        return 100 if head.startswith((OLD_MAGIC, MAGIC)) else 0

    def open(self, file: HostFile, request: OpenRequest) -> ParallelsDriver:
        """A driver for this file. Raises ImageError(invalid_format, unsupported, out_of_bounds, corrupt)."""
        from tapfs.formats.parallels.driver import ParallelsDriver  # few images are of this format

        return ParallelsDriver(file, request)


FORMAT = ParallelsFormat()
