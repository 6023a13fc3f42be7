"""The disk of a guest: an image, the native threads that answer its virtqueues, and the threads for what they park."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from tapfs.errors import ImageError
from tapfs.kernel.vhost_device import ParkedRequest, Region, Request, Ring, VhostDevice
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.held_requests import HeldRequests
from tapfs.serving.parked import ParkedThreads, finish_move, finish_writes
from tapfs.vhost.configuration import size_of

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.kernel.metrics import Metrics

#: Bytes that are zeroed by one write, where zeros are to take space.
_FILL_STEP = 1 << 20


class GuestDisk:
    """An image that a guest uses through its rings, one front end at a time.

    The image stays the caller's; `stop` must come before it is closed. `identifier` is a name that the guest may ask
    for. Methods block, and are for one thread at a time. Those that a front end's words lead to raise OSError.
    """

    def __init__(self, image: Image, identifier: bytes, wait_on: str = "nothing") -> None:
        """`wait_on`: the errors that the guest is not told of (`tapfs.serving.held_requests`)."""
        self.image = image
        self._device = VhostDevice(image.engine_disk, size_of(image), writable=image.writable, identifier=identifier)
        #: Rings that are served, or (while nothing is begun) are to be: `base` is where they go on then.
        self._rings: dict[int, Ring] = {}
        self._resting = False
        #: Whether an operator has paused it.
        self.paused = False
        self.limit = RateLimit()
        self.held = HeldRequests(wait_on, lambda: None)
        self._last_counted: tuple[dict[str, int], Metrics] | None = None
        self._parked = ParkedThreads(
            self._device.next_parked, self._answer, self._answer_together, path=lambda: self.image.path
        )

    def start(self) -> None:
        """Be ready for a guest. Raises ImageError(io); only `stop` may follow then."""
        self._parked.start()

    @property
    def problem_descriptor(self) -> int:
        """An eventfd that becomes readable when a ring has met a problem."""
        return self._device.problem_descriptor

    def problems(self) -> list[tuple[int, str]]:
        """The rings that take no more requests, and how the guest broke the protocol."""
        found = [(index, self._device.problem(index)) for index in list(self._rings)]
        return [(index, problem) for index, problem in found if problem is not None]

    def statistics(self) -> dict[str, int]:
        """What was counted, by the names in VhostStatistics; also after `stop`."""
        return self._device.statistics()._asdict() if self._last_counted is None else self._last_counted[0]

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took; also after `stop`."""
        return self._device.metrics() if self._last_counted is None else self._last_counted[1]

    @property
    def connected(self) -> bool:
        """Whether a guest has rings that are served."""
        return bool(self._rings)

    @property
    def clients(self) -> int:
        """How many guests that is."""
        return int(self.connected)

    def is_started(self, index: int) -> bool:
        """Whether a ring is served."""
        return index in self._rings

    def start_ring(self, index: int, ring: Ring) -> None:
        """Serve a ring, once nothing keeps the disk at rest. Raises OSError."""
        if not self._resting:
            self._device.start_ring(index, ring)
        self._rings[index] = ring

    def set_call(self, index: int, descriptor: int) -> None:
        """Signal another eventfd of a ring, whether it is started or not. Raises OSError."""
        self._device.set_call(index, descriptor)
        if index in self._rings:
            self._rings[index] = self._rings[index]._replace(call=descriptor)

    def stop_ring(self, index: int, *, drains: bool = False) -> int:
        """Answer what was taken from a ring. The index from which requests are to be taken again.

        With `drains` what waits for space fails: the guest goes on elsewhere, without the in-flight region.
        """
        ring = self._rings.pop(index)
        return ring.base if self._resting else self._stopped(index, drains=drains)

    def _stopped(self, index: int, *, drains: bool = False) -> int:
        """Stop a ring of the device; what waits for space is let go of."""
        self.held.give_up()
        try:
            return self._device.stop_ring(index, drains=drains)
        finally:
            self.held.begin()

    def add_regions(self, regions: Sequence[tuple[Region, int]], *, instead: bool) -> None:
        """Map memory of the guest, with its descriptors, `instead` of what there is. Raises OSError."""
        with self._at_rest():
            if instead:
                self._device.remove_regions()
            for region, descriptor in regions:
                self._device.add_region(region, descriptor)

    def remove_region(self, region: Region) -> None:
        """Unmap a region. Raises OSError."""
        with self._at_rest():
            self._device.remove_region(region)

    def track_in(self, descriptor: int, offset: int, size: int, rings: int, entries: int) -> None:
        """Note in a part of a file which requests are taken. Raises OSError."""
        with self._at_rest():
            self._device.track_in(descriptor, offset, size, rings, entries)

    def log_in(self, descriptor: int, offset: int, size: int) -> None:
        """Note in a part of a file which pages of the guest are written by rings that log. Raises OSError."""
        with self._at_rest():
            self._device.log_in(descriptor, offset, size)

    def pause(self) -> None:
        """Begin no more requests and wait until none is in flight. Rings that are started now wait."""
        for index, ring in self._rings.items():
            self._rings[index] = ring._replace(base=self._stopped(index))
        self._resting = True

    def resume(self) -> None:
        """Take requests again. Raises OSError if a ring cannot go on."""
        self._resting = False
        for index, ring in self._rings.items():
            self._device.start_ring(index, ring)

    def replace(self, image: Image) -> Image:
        """Serve another image from now on; only between `pause` and `resume`. The old one, the caller's now."""
        self._device.replace_disk(image.engine_disk, size_of(image), writable=image.writable)
        old, self.image = self.image, image
        return old

    def set_limit(self, limit: RateLimit) -> None:
        """Limit the rate from now on."""
        self.limit = limit
        self._device.limit(*limit)

    def forget_guest(self) -> None:
        """Answer what was taken, then let go of rings and memory."""
        for index in list(self._rings):
            self.stop_ring(index)
        self._device.track_nowhere()
        self._device.log_nowhere()
        self._device.remove_regions()

    def stop(self) -> None:
        """Let go of the guest, and end all threads."""
        self.forget_guest()
        self._device.stop()
        self._parked.join()
        self._last_counted = self.statistics(), self.metrics()
        self._device.close()

    @contextmanager
    def _at_rest(self) -> Generator[None]:
        """Nothing is in flight meanwhile; afterwards each ring goes on. Raises OSError if one cannot."""
        if self._resting:
            yield
            return
        self.pause()
        try:
            yield
        finally:
            self.resume()

    # In the threads

    def _answer(self, parked: ParkedRequest) -> None:
        attempt, durable = partial(self._do, parked), parked.request is Request.SYNC
        while True:
            try:
                again = partial(self._do_again, parked)
                self.held.serve(attempt, again, tried_ns=parked.tried, durable=durable)
            except ImageError as error:
                if not self.held.is_waited_for(error, durable=durable):
                    raise
                # Only who is in a ring that is being stopped is let go of; another one goes on to wait. The ring for
                # which both were woken may have stopped long ago.
                if parked.leave():
                    return
                self.held.await_begin()
            else:
                return

    def _do_again(self, parked: ParkedRequest) -> None:
        """The same after an error, of which the engine knows of a read or a write: it must try itself first."""
        if parked.request in (Request.READ, Request.WRITE):
            try:
                parked.outcome()
            except ImageError:
                parked.resume()
                return
        self._do(parked)

    def _do(self, parked: ParkedRequest) -> None:
        image = self.image
        match parked.request:
            case Request.READ | Request.WRITE:
                finish_move(image, parked)
                return
            case Request.SYNC:
                image.flush()
            case Request.ZERO:
                image.write_zeroes(parked.offset, parked.length)
            case Request.FILL:
                end = parked.offset + parked.length
                for offset in range(parked.offset, end, _FILL_STEP):
                    image.write(offset, bytes(min(_FILL_STEP, end - offset)))
            case Request.DISCARD:
                image.discard(parked.offset, parked.length)
        parked.complete()

    def _answer_together(self, several: Sequence[ParkedRequest]) -> Sequence[ParkedRequest]:
        """Answer several writes by one, or several flushes; those that must be tried alone, in their order."""
        if several[0].request is not Request.SYNC:
            return finish_writes(self.image, several)
        try:
            self.image.flush()
        except Exception:  # noqa: BLE001  each meets its own error when it is tried alone
            return several
        for parked in several:
            parked.complete()
        return ()
