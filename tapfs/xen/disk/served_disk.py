"""A guest's disk: its open image, and who uses it: the guest's rings, those of its stub domain, and device models.

The engine's threads answer most requests. A request that needs a driver (a map, a reservation) or waits for the host's
disk (a flush, a discard) is parked, and threads of `tapfs.serving.parked` serve it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tapfs.disk.image import Image
from tapfs.kernel.metrics import NONE, Metrics, together
from tapfs.serving.copied_disk import CopiedDisk
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.held_requests import HeldRequests
from tapfs.xen.disk.guest_rings import GuestRings

if TYPE_CHECKING:
    from tapfs.xen.disk.held_export import HeldExport


class ServedDisk(CopiedDisk):
    """An image and who uses it: `rings` are the guest's. Methods block; one at a time.

    Takes over `image`; `close` must come last. `discard`: the guest may discard what it may write. What a guest's write
    was answered for is in the image, durable after a flush (the guest's own or any here). What has been taken from
    the rings and not answered is in the journal. `held`: the requests that wait for space. `opened_anew`: the image
    will be replaced by `replace` before anybody writes it; until then device models wait.
    """

    def __init__(
        self,
        image: Image,
        *,
        machine: str | None,
        domain: int,
        limit: RateLimit,
        paused: bool,
        held: HeldRequests,
        discard: bool = True,
        opened_anew: bool = False,
    ) -> None:
        super().__init__(image, limit)
        self._opened_anew = opened_anew
        self._export: HeldExport | None = None
        self.held = held
        self._discard = discard
        self._machine = machine
        self.paused = paused
        self.rings = GuestRings(self, domain, machine=machine)
        self._stubs: list[GuestRings] = []
        #: Requests that exports which have ended had answered.
        self._exported = 0
        #: What stub domains had that are gone.
        self._past_metrics: Metrics = NONE
        self._past: Counter[str] = Counter()
        #: Whether the image is closed for good.
        self.closed = False

    @property
    def opened_anew(self) -> bool:
        """Whether the image will be replaced before anybody writes it."""
        return self._opened_anew

    @property
    def simulated(self) -> bool:
        """Whether a directory stands for Xen."""
        return self._machine is not None

    @property
    def takes_discards(self) -> bool:
        """Whether the guest may discard: it may write, and the toolstack does not forbid it."""
        return self.image.writable and self._discard

    @property
    def connected(self) -> bool:
        """Whether the guest's rings are being served (or held, while paused)."""
        return self.rings.connected

    def begin_stub(self, domain: int) -> GuestRings:
        """Rings for a stub domain of the guest, until `end_stub` or `close`."""
        rings = GuestRings(self, domain, machine=self._machine)
        self._stubs.append(rings)
        return rings

    def end_stub(self, rings: GuestRings) -> None:
        """The stub domain has the disk no more."""
        rings.disconnect()
        self._stubs.remove(rings)
        self._past.update(rings.statistics())
        self._past_metrics = together(self._past_metrics, rings.metrics())

    def begin_export(self) -> HeldExport:
        """The disk for device models, from now until `end_export` or `close`. Raises ImageError."""
        # Late: few disks have a device model.
        from tapfs.xen.disk.held_export import HeldExport

        export = HeldExport(self.image, self.held, opened_anew=self._opened_anew)
        try:
            export.start()
            if self.paused:
                export.pause()
        except BaseException:
            export.stop()
            raise
        self._export = export
        return export

    def end_export(self) -> None:
        """End it, with the connections of its clients."""
        export, self._export = self._export, None
        if export is not None:
            self._exported += export.answered
            export.stop()
            self._past_metrics = together(self._past_metrics, export.metrics())

    def pause(self) -> None:
        """Take no more requests and wait until none is in flight."""
        for rings in self._all_rings():
            rings.pause()
        if self._export is not None:
            self._export.pause()

    def resume(self) -> None:
        """Take requests again."""
        for rings in self._all_rings():
            rings.resume()
        if self._export is not None:
            self._export.resume()

    @contextmanager
    def device_model_at_rest(self) -> Generator[None]:
        """A device model waits meanwhile, and nothing of it is under way."""
        if self._export is None or self.paused:
            yield
            return
        self._export.pause()
        try:
            yield
        finally:
            self._export.resume()

    def rest(self) -> None:
        """Answer all that was taken, have it durable, and have the image say that nobody writes it; then go on."""
        if not self.paused:
            self.pause()
        try:
            self.image.end_writing()
        finally:
            if not self.paused:
                self.resume()

    @property
    def answered(self) -> int:
        """How many requests have been answered since the process began, in whatever way."""
        counted = self.statistics()
        by_export = self._exported + (0 if self._export is None else self._export.answered)
        return by_export + sum(counted[name] for name in ("reads", "writes", "flushes", "barriers", "discards"))

    def replace(self, image: Image) -> Image:
        """Serve another image from now on; only while it is paused. The old one, which is the caller's now."""
        for rings in self._all_rings():
            rings.replace(image, discard=image.writable and self._discard)
        if self._export is not None:
            self._export.serve(image, opened_anew=self._opened_anew)
        old, self.image = self.image, image
        return old

    def settle(self) -> None:
        """The image is the one to be written, or only read: device models need not wait for another."""
        self._opened_anew = False
        with self.device_model_at_rest():
            if self._export is not None:
                self._export.serve(self.image, opened_anew=False)

    def apply_limit(self) -> None:
        """Have the rings keep to `bound`. Any thread may call it."""
        for rings in self._all_rings():
            rings.limit(self.bound)

    def statistics(self) -> dict[str, int]:
        """The counters since the process began, over all connections, by the names in XenStatistics."""
        counted = Counter(self._past)
        for rings in self._all_rings():
            counted.update(rings.statistics())
        return dict(counted)

    def metrics(self) -> Metrics:
        """What was asked for since the process began, by guest and device model, by kind, and how long it took."""
        counted = self._past_metrics
        for rings in self._all_rings():
            counted = together(counted, rings.metrics())
        return counted if self._export is None else together(counted, self._export.metrics())

    def close(self) -> None:
        """Disconnect and close the image; a job ends. Raises the ImageError that its last flush met."""
        self.closed = True
        try:
            for rings in self._all_rings():
                rings.disconnect()
            self.end_export()
        finally:
            self.close_image()

    def _all_rings(self) -> list[GuestRings]:
        return [self.rings, *self._stubs]
