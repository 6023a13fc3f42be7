"""DMG, Apple's disk images as hdiutil distributes them (UDIF): packed by zlib, bzip2, LZFSE, LZMA or ADC, read only.

:data:`FORMAT` is the object that the registry loads. docs/specs/dmg.md has the facts of the format.
"""

from __future__ import annotations

from tapfs.driver import Ability, Driver, HostFile, OpenRequest

#: The trailer begins so, and has this length.
MAGIC = b"koly"
TRAILER_BYTES = 512

#: The trailer's magic, version and length.
_BEGINNING = MAGIC + b"\0\0\0\4\0\0\2\0"


def trailer_from_end(tail: bytes) -> int | None:
    """How many bytes before the end of a file that ends with `tail` its trailer begins; None if it has none.

    A file that was padded to whole sectors has up to 511 bytes behind its trailer.
    """
    last = tail[-(2 * TRAILER_BYTES - 1) :]
    at = last.rfind(_BEGINNING, 0, max(0, len(last) - TRAILER_BYTES + len(_BEGINNING)))
    return None if at < 0 else len(last) - at


class DmgFormat:
    """DMG as a :class:`tapfs.driver.Format` that shows at its end what it is."""

    name = "dmg"
    abilities = frozenset({Ability.CHECK})

    def probe(self, head: bytes, size: int) -> int:
        """0: the start of a DMG is packed data, or the disk itself."""
        del head, size
        return 0

    def probe_tail(self, tail: bytes, size: int) -> int:
        """100 for a trailer at the end."""
        del size  # the trailer is enough
        return 100 if trailer_from_end(tail) is not None else 0

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        """A driver for this file. Raises ImageError(invalid_format, unsupported, corrupt) naming the field."""
        from tapfs.formats.dmg.driver import DmgDriver  # few images are of this format

        del request
        return DmgDriver(file)


FORMAT = DmgFormat()
