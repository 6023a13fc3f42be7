"""The driver of an open VMDK that is only read: its map and its details."""

from __future__ import annotations

from collections.abc import Mapping

from tapfs.formats.vmdk.details import details
from tapfs.formats.vmdk.reader import VmdkReader


class VmdkDriver(VmdkReader):
    """An open disk, read-only: a :class:`tapfs.driver.Driver`."""

    @property
    def plain_details(self) -> frozenset[str]:
        """What an operator may have chosen, and what the disks over this one know it by."""
        return frozenset({"create_type", "cid"})

    def details(self) -> Mapping[str, object]:
        """The descriptor's own words, and one entry for each extent."""
        return details(self)
