"""The rings by which one domain uses a disk, with the threads that serve its requests.

A disk has the rings of its guest, and those of a stub domain that runs the guest's device model. All are on one image:
a write that one of them was answered is what the others read, and a flush by any makes the writes of all durable.
Requests of two domains that are under way at one moment have no order, as those of two queues have none.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from tapfs.kernel.metrics import NONE, Metrics, together
from tapfs.kernel.xen_ring import Grants, ParkedRequest, Request, XenDevice, XenStatistics
from tapfs.serving.parked import ParkedThreads, finish_move, finish_writes

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.serving.disk_operations import RateLimit
    from tapfs.xen.disk.frontend_keys import FrontendKeys
    from tapfs.xen.disk.served_disk import ServedDisk

#: Counters that say what is now, not what there has been.
_PRESENT = ("in_flight",)


class GuestRings:
    """A domain's connection to a disk, if there is one. Methods block; one at a time.

    What has been taken from the rings and not answered is in the journal.
    """

    def __init__(self, disk: ServedDisk, domain: int, *, machine: str | None) -> None:
        self._disk = disk
        self._domain = domain
        self._machine = machine
        self._device: XenDevice | None = None
        self._parked: ParkedThreads[ParkedRequest] | None = None
        #: Whoever asks the device to limit its rate may be any thread.
        self._limiting = threading.Lock()
        self._past_metrics: Metrics = NONE
        self._past: Counter[str] = Counter(dict.fromkeys(XenStatistics._fields, 0))

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
        disk = self._disk
        disk.held.begin(self)
        device = XenDevice(
            disk.image.engine_disk,
            machine=self._machine,
            domain=self._domain,
            protocol=frontend.protocol,
            grants=grants,
            journal=journal,
            writable=disk.image.writable,
            discard=disk.takes_discards,
        )
        parked = ParkedThreads(
            device.next_parked,
            self._answer,
            lambda writes: finish_writes(disk.image, writes),
            path=lambda: disk.image.path,
        )
        try:
            for ring in frontend.rings:
                device.add_ring(ring.references, ring.port)
            device.limit(*disk.bound)
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
        self._disk.held.give_up(self)
        self._device.stop()
        self._parked.join()
        self._count(self._device)
        with self._limiting:
            self._device.close()
            self._device = None

    def pause(self) -> None:
        """Take no more requests and wait until none is in flight."""
        if self._device is not None:
            self._device.pause()

    def resume(self) -> None:
        """Take requests again."""
        if self._device is not None:
            self._device.resume()

    def replace(self, image: Image, *, discard: bool) -> None:
        """Serve another image from now on; only while paused."""
        if self._device is not None:
            self._device.replace_disk(image.engine_disk, writable=image.writable, discard=discard)

    def limit(self, bound: RateLimit) -> None:
        """Limit the rate from now on. Any thread may call it."""
        with self._limiting:
            if self._device is not None:
                self._device.limit(*bound)

    def statistics(self) -> Counter[str]:
        """The counters over all connections, by the names in XenStatistics."""
        counted = Counter(self._past)
        if self._device is not None:
            counted.update(self._device.statistics()._asdict())
        return counted

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took."""
        past = self._past_metrics
        return past if self._device is None else together(past, self._device.metrics())

    def _count(self, device: XenDevice) -> None:
        self._past_metrics = together(self._past_metrics, device.metrics())
        counted = device.statistics()._asdict()
        self._past.update({name: 0 if name in _PRESENT else value for name, value in counted.items()})

    # In the threads

    def _answer(self, parked: ParkedRequest) -> None:
        durable = parked.request is Request.SYNC
        self._disk.held.serve(
            lambda: self._do(parked),
            lambda: self._do_again(parked),
            tried_ns=parked.tried,
            durable=durable,
            owner=self,
        )

    def _do_again(self, parked: ParkedRequest) -> None:
        """The same after an error, of which the engine knows of a read or a write: it must try itself first."""
        if parked.request in (Request.READ, Request.WRITE) and parked.resume():
            return
        self._do(parked)

    def _do(self, parked: ParkedRequest) -> None:
        image = self._disk.image
        match parked.request:
            case Request.READ | Request.WRITE:
                finish_move(image, parked)
            case Request.SYNC:
                image.flush()
                parked.complete()
            case Request.DISCARD:
                image.discard(parked.offset, parked.length)
                parked.complete()
