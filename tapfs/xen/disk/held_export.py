"""The NBD export of a guest's disk: as any export, but its requests wait for space as those of the rings do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.kernel.nbd_server import Access, ParkedRequest, Request
from tapfs.nbd.export import Export

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.serving.held_requests import HeldRequests

#: A device model asks one thing after the other.
_THREADS = 1


class HeldExport(Export):
    """An image for device models. `opened_anew`: requests wait until `serve` has brought another image."""

    def __init__(self, image: Image, held: HeldRequests, *, opened_anew: bool) -> None:
        super().__init__(image, "", access=_access(image, opened_anew=opened_anew), threads=_THREADS)
        self._held = held

    def serve(self, image: Image, *, opened_anew: bool) -> None:
        """While paused: serve this image. The old one is not used any more."""
        self.replace(image, _access(image, opened_anew=opened_anew))

    @property
    def answered(self) -> int:
        """How many reads and writes have been answered."""
        counted = self.statistics()
        return counted.reads + counted.writes

    def answer(self, parked: ParkedRequest) -> None:
        """Serve a parked request; one that fails for want of space waits."""
        attempt = super().answer
        durable = parked.request is Request.SYNC
        self._held.serve(lambda: attempt(parked), lambda: self._again(parked), tried_ns=parked.tried, durable=durable)

    def _again(self, parked: ParkedRequest) -> None:
        """The same after an error, of which the engine knows of a read or a write: it must try itself first."""
        if parked.request not in (Request.READ, Request.WRITE) or not parked.resume():
            super().answer(parked)


def _access(image: Image, *, opened_anew: bool) -> Access:
    if opened_anew:
        return Access.LATER
    return Access.WRITABLE if image.writable else Access.READ_ONLY
