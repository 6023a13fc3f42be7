"""A guest's disk: its open image, and while the guest uses it the rings that serve it, with their threads.

The engine's threads answer most requests. A request that needs a driver (a map, a reservation) or waits for the host's
disk (a flush, a discard) is parked, and threads of `tapfs.serving.parked` serve it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tapfs.disk.image import Image
from tapfs.kernel.metrics import NONE, Metrics, together
from tapfs.kernel.xen_ring import Grants, ParkedRequest, Request, XenDevice, XenStatistics
from tapfs.serving.copied_disk import CopiedDisk
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.held_requests import HeldRequests
from tapfs.serving.parked import ParkedThreads, finish_move, finish_writes
from tapfs.xen.disk.frontend_keys import FrontendKeys

if TYPE_CHECKING:
    from tapfs.xen.disk.held_export import HeldExport

#: Counters that say what is now, not what there has been.
_PRESENT = ("in_flight",)


class ServedDisk(CopiedDisk):
    """An image and its connection to a frontend, if there is one. Methods block; one at a time.

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
        self._domain = domain
        self.paused = paused
        self._device: XenDevice | None = None
        self._parked: ParkedThreads[ParkedRequest] | None = None
        #: Held by who asks the device for a limit, or lets it go.
        self._limiting = threading.Lock()
        #: Requests that exports which have ended had answered.
        self._exported = 0
        self._past_metrics: Metrics = NONE
        self._past: Counter[str] = Counter(dict.fromkeys(XenStatistics._fields, 0))

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
        """Whether a frontend's rings are being served (or held, while paused)."""
        return self._device is not None

    @property
    def ended_descriptor(self) -> int | None:
        """Readable when a ring has ended by itself, for the frontend broke the protocol; None: not connected."""
        return None if self._device is None else self._device.ended_descriptor

    def problem(self) -> str | None:
        """How the frontend broke the protocol, if it did."""
        return None if self._device is None else self._device.problem()

    def connect(self, frontend: FrontendKeys, *, grants: Grants, journal: int) -> None:
        """Serve a frontend's rings, first what the journal says that a predecessor left undone.

        `journal` is an open file that must stay open until `disconnect`. Raises ImageError: what the guest wrote may
        be senseless; nothing is connected then.
        """
        image = self.image
        self.held.begin()
        device = XenDevice(
            image.engine_disk,
            machine=self._machine,
            domain=self._domain,
            protocol=frontend.protocol,
            grants=grants,
            journal=journal,
            writable=image.writable,
            discard=self.takes_discards,
        )
        parked = ParkedThreads(
            device.next_parked,
            self._answer,
            lambda writes: finish_writes(self.image, writes),
            path=lambda: self.image.path,
        )
        try:
            for ring in frontend.rings:
                device.add_ring(ring.references, ring.port)
            device.limit(*self.bound)
            # First the threads that the host may refuse without harm: nothing has been taken from the rings yet.
            parked.start()
            device.start()
        except BaseException:
            device.stop()
            parked.join()
            device.close()
            raise
        self._device, self._parked = device, parked

    def disconnect(self) -> None:
        """Finish what is in flight and let go of the rings; what was not taken from them stays there."""
        if self._device is None or self._parked is None:
            return
        self.held.give_up()
        self._device.stop()
        self._parked.join()
        self.held.begin()  # for a device model that goes on
        self._count(self._device)
        with self._limiting:
            self._device.close()
            self._device = None

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

    def pause(self) -> None:
        """Take no more requests and wait until none is in flight."""
        if self._device is not None:
            self._device.pause()
        if self._export is not None:
            self._export.pause()

    def resume(self) -> None:
        """Take requests again."""
        if self._device is not None:
            self._device.resume()
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
        if self._device is not None:
            discard = image.writable and self._discard
            self._device.replace_disk(image.engine_disk, writable=image.writable, discard=discard)
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
        with self._limiting:
            if self._device is not None:
                self._device.limit(*self.bound)

    def statistics(self) -> dict[str, int]:
        """The counters since the process began, over all connections, by the names in XenStatistics."""
        counted = Counter(self._past)
        if self._device is not None:
            counted.update(self._device.statistics()._asdict())
        return dict(counted)

    def metrics(self) -> Metrics:
        """What was asked for since the process began, by kind, and how long it took."""
        past = self._past_metrics
        return past if self._device is None else together(past, self._device.metrics())

    def close(self) -> None:
        """Disconnect and close the image; a job ends. Raises the ImageError that its last flush met."""
        try:
            self.disconnect()
            self.end_export()
        finally:
            self.close_image()

    def _count(self, device: XenDevice) -> None:
        self._past_metrics = together(self._past_metrics, device.metrics())
        counted = device.statistics()._asdict()
        self._past.update({name: 0 if name in _PRESENT else value for name, value in counted.items()})

    # In the threads

    def _answer(self, parked: ParkedRequest) -> None:
        self.held.serve(
            lambda: self._do(parked), lambda: self._do_again(parked), durable=parked.request is Request.SYNC
        )

    def _do_again(self, parked: ParkedRequest) -> None:
        """The same after an error, of which the engine knows of a read or a write: it must try itself first."""
        if parked.request in (Request.READ, Request.WRITE) and parked.resume():
            return
        self._do(parked)

    def _do(self, parked: ParkedRequest) -> None:
        match parked.request:
            case Request.READ | Request.WRITE:
                finish_move(self.image, parked)
            case Request.SYNC:
                self.image.flush()
                parked.complete()
            case Request.DISCARD:
                self.image.discard(parked.offset, parked.length)
                parked.complete()
