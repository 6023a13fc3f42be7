"""The target of a new image that is an address: what is there already, and keeps its length as a block device does."""

from __future__ import annotations

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.file import LocalFile
from tapfs.host.location import Location
from tapfs.host.remote.address import OBJECT_SCHEMES, Address
from tapfs.host.target import Target


class RemoteTarget(Target):
    """An address that is to be an image; it is opened when it is asked for."""

    def __init__(self, location: Location, address: Address) -> None:
        """Nothing is looked at yet. Raises ImageError(read_only) for a scheme by which nothing is written."""
        if address.scheme in OBJECT_SCHEMES:
            raise ImageError(
                ErrorKind.READ_ONLY,
                f"tapfs makes no images at {address.scheme} addresses",
                path=str(address),
                op="create",
                remedy="make it on this host, then upload it",
            )
        self.location = location
        self._address = address

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    @property
    def name(self) -> str:
        """The address."""
        return self.path

    @property
    def is_there(self) -> bool:
        """Nothing is made elsewhere, so it has to be there."""
        return True

    def identity(self) -> tuple[int, int]:
        """The pair that the address has."""
        return self._address.identity

    def open(self, *, direct: bool = False) -> LocalFile:
        """The file elsewhere, open for writing. Raises ImageError."""
        del direct
        return self.location.open(writable=True)

    def beside(self, name: str) -> Target:
        """Raise ImageError(unsupported): an image of several files is not made elsewhere."""
        message = f"an image of several files is not made at an address: {name}"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=self.path, op="create")


def target_at(location: Location) -> Target:
    """The target that a location is. Raises ImageError as `Target` does."""
    return Target(location) if location.address is None else RemoteTarget(location, location.address)
