"""Sources: what a place elsewhere can do, whatever its protocol. Only the process that fetches has one."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.remote.address import NBD_SCHEMES, OBJECT_SCHEMES, Address
from tapfs.host.remote.options import RemoteOptions


class Facts(NamedTuple):
    """What a source says of itself. `identity` changes with the bytes; None: the source has nothing of the kind.

    `size` in bytes, `modified` in seconds since 1970 (0: it does not say), `writable`: whether it takes writes.
    """

    size: int
    identity: str | None
    modified: int
    writable: bool


class Source(Protocol):
    """A place elsewhere that is open. Several threads may use it at once.

    An ImageError(io) that it raises may be gone at the next try; one of another kind will not be.
    """

    @property
    def facts(self) -> Facts:
        """What it said when it was opened."""
        ...

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly so many bytes, of the same object as when it was opened. Raises ImageError."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


def open_source(address: Address, options: RemoteOptions) -> Source:
    """Open what lies at an address. Raises ImageError."""
    if address.scheme in OBJECT_SCHEMES:
        from tapfs.host.remote.objects import ObjectSource  # only those who need it load the library

        return ObjectSource(address, timeout_seconds=options.timeout_seconds)
    if address.scheme in NBD_SCHEMES:
        from tapfs.host.remote.nbd import NbdSource

        return NbdSource(address, timeout_seconds=options.timeout_seconds)
    raise ImageError(ErrorKind.UNSUPPORTED, "tapfs does not read from Ceph yet", path=str(address), op="open")
