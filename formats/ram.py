"""RAM disks: a raw image in a named piece of shared memory, for all who open that name.

What is special about one is where it lives and how it is shared (`tapfs.shared_ram`); mapped
it is like a raw image. It lasts until it is removed or the host restarts.
"""

from __future__ import annotations

from collections.abc import Mapping

from tapfs.driver import CreateRequest, Driver, HostFile, OpenRequest
from tapfs.formats.raw import IdentityDriver, create_identity
from tapfs.plan import Plan


class _RamFormat:
    name = "ram"
    create_options: Mapping[str, str] = {}

    def probe(self, head: bytes, size: int) -> int:  # noqa: ARG002 - the protocol's signature
        """0: a RAM disk is known by its name, never by its contents."""
        return 0

    def open(self, file: HostFile, request: OpenRequest) -> Driver:  # noqa: ARG002 - likewise
        """The whole piece of shared memory."""
        return IdentityDriver(file, self.name)

    def create(self, request: CreateRequest) -> Plan:
        """Zeroed memory, taken from the host as it is written."""
        return create_identity(request, self.name)


FORMAT = _RamFormat()
