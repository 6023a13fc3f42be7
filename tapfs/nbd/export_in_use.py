"""An NBD export as a disk in use: what operators ask of a served disk, by the calls of the export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.kernel.nbd_server import Access
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.held_requests import HeldRequests

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.kernel.metrics import Metrics
    from tapfs.nbd.export import Export


class ExportInUse:
    """An export that was started. Methods block, and are for one thread at a time."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self.paused = False
        self.limit = RateLimit()
        #: None of its requests waits for space: clients get the error.
        self.held = HeldRequests("nothing", lambda: None)

    @property
    def image(self) -> Image:
        """What is served."""
        return self._export.image

    @property
    def clients(self) -> int:
        """How many are connected now."""
        return self._export.statistics().connections

    @property
    def connected(self) -> bool:
        """Whether there is one."""
        return self.clients > 0

    def pause(self) -> None:
        """Begin nothing more that clients ask for, and wait until nothing is under way."""
        self._export.pause()

    def resume(self) -> None:
        """Go on with what clients ask for."""
        self._export.resume()

    def replace(self, image: Image) -> Image:
        """Serve another image from now on; only while it is paused. The old one, which is the caller's now."""
        old = self._export.image
        self._export.replace(image, Access.WRITABLE if image.writable else Access.READ_ONLY)
        return old

    def set_limit(self, limit: RateLimit) -> None:
        """Limit the rate from now on, of all clients together."""
        self.limit = limit
        self._export.limit(*limit)

    def statistics(self) -> dict[str, int]:
        """The counters since the server began."""
        return self._export.statistics()._asdict()

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took."""
        return self._export.metrics()
