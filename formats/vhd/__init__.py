"""VHD, Microsoft's Virtual Hard Disk, which QEMU calls vpc: fixed, dynamic and differencing.

:data:`FORMAT` is the object that the registry loads. docs/specs/vhd.md has the facts of the format. Modules that only a
writer, a check or a creation needs are imported late, because most openings only read.
"""

from __future__ import annotations

from collections.abc import Mapping

from tapfs.driver import Ability, CreateRequest, Driver, HostFile, OpenRequest, Salvage, SalvageRequest
from tapfs.formats.vhd.footer import FIXED, LENGTH, POISON, SHORT_LENGTH, Footer, parse_footer
from tapfs.plan import Plan

#: Confidence in a footer with the right checksum, and in one without.
_SURE, _LIKELY = 100, 60


class VhdFormat:
    """VHD as a :class:`tapfs.driver.CreatableFormat`."""

    name = "vhd"
    abilities = frozenset({Ability.WRITE, Ability.BACKING, Ability.CHECK, Ability.REPAIR, Ability.RESIZE})

    @property
    def create_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        from tapfs.formats.vhd.create import CREATE_OPTIONS

        return CREATE_OPTIONS

    def probe(self, head: bytes, size: int) -> int:
        """The copy of the footer with which an image begins that grows; a fixed one begins with the disk."""
        del size
        if head.startswith(POISON):
            return _LIKELY
        footer = parse_footer(head[:LENGTH])
        return 0 if footer is None or footer.type == FIXED else _confidence(footer)

    def probe_tail(self, tail: bytes, size: int) -> int:
        """The footer at the end, of 512 bytes or of 511."""
        del size
        footer = parse_footer(tail[-LENGTH:]) or parse_footer(tail[-SHORT_LENGTH:])
        return 0 if footer is None else _confidence(footer)

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        """A driver for this file.

        Raises ImageError(invalid_format, unsupported, out_of_bounds, corrupt) naming the field, and (read_only) for
        damaged metadata where the image is to be written.
        """
        from tapfs.formats.vhd.opening import open_driver

        return open_driver(file, request)

    def create(self, request: CreateRequest) -> Plan:
        """The plan for a new image. Raises ImageError(unsupported, out_of_bounds)."""
        from tapfs.formats.vhd.create import create

        return create(request)

    def salvage(self, file: HostFile, request: SalvageRequest) -> Salvage:
        """Make a lost header anew; see :meth:`tapfs.driver.SalvageableFormat.salvage`."""
        from tapfs.formats.vhd.salvage import salvage

        return salvage(file, request)


def _confidence(footer: Footer) -> int:
    return _SURE if footer.fits else _LIKELY


FORMAT = VhdFormat()
