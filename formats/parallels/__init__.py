"""Parallels images that grow, of Parallels Desktop and Virtuozzo, in both kinds, and their bundles; they are only read.

:data:`FORMAT` is the object that the registry loads. docs/specs/parallels.md has the facts of the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.driver import Ability, HostFile, OpenRequest
from tapfs.formats.parallels.signature import BUNDLE_SIGN_WITHIN, MAGIC, OLD_MAGIC, is_bundle

if TYPE_CHECKING:
    from tapfs.formats.parallels.bundle_driver import BundleDriver
    from tapfs.formats.parallels.driver import ParallelsDriver


class ParallelsFormat:
    """Parallels images as a :class:`tapfs.driver.Format`."""

    name = "parallels"
    abilities = frozenset({Ability.BACKING, Ability.CHECK})

    def probe(self, head: bytes, size: int) -> int:
        """100 for one of the two magics of 16 bytes, and for the descriptor of a bundle."""
        del size
        return 100 if head.startswith((OLD_MAGIC, MAGIC)) or is_bundle(head) else 0

    def open(self, file: HostFile, request: OpenRequest) -> ParallelsDriver | BundleDriver:
        """A driver for this file. Raises ImageError(invalid_format, unsupported, out_of_bounds, corrupt)."""
        # Few images are of this format.
        from tapfs.formats.parallels.bundle_driver import BundleDriver
        from tapfs.formats.parallels.driver import ParallelsDriver

        if is_bundle(file.read(0, BUNDLE_SIGN_WITHIN)):
            return BundleDriver(file, request)
        return ParallelsDriver(file, request)


FORMAT = ParallelsFormat()
