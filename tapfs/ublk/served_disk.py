"""A disk that is a block device: its open image, and the queues that serve it with their threads.

The engine's threads answer most requests. A request that needs a driver (a map, a reservation) or waits for the host's
disk (a flush, a discard) is parked, and threads of `tapfs.serving.parked` serve it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from tapfs.disk.image import Image
from tapfs.kernel.metrics import NONE, Metrics, together
from tapfs.kernel.ublk_server import ParkedRequest, Request, Shape, UblkServer, UblkStatistics
from tapfs.serving.copied_disk import CopiedDisk
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.held_requests import HeldRequests
from tapfs.serving.parked import ParkedThreads, finish_flushes, finish_move, finish_writes

#: Zeros that are written at once, for zeros that take space.
_FILL_STEP = 1 << 20


class ServedDisk(CopiedDisk):
    """An image and the queues of its device, once `connect` has been called. Methods block; one at a time.

    Takes over `image`; `close` must come last. What a write was answered for is in the image, durable after a flush (a
    user's own or any here). What was begun and not answered is kept by the kernel. `held`: the requests that wait for
    space.
    """

    def __init__(self, image: Image, *, limit: RateLimit, paused: bool, held: HeldRequests) -> None:
        super().__init__(image, limit)
        self.held = held
        self.paused = paused
        #: Held by who asks the server for a limit, or lets it go.
        self._limiting = threading.Lock()
        self._server: UblkServer | None = None
        self._parked: ParkedThreads[ParkedRequest] | None = None
        self._past_metrics: Metrics = NONE
        self._past: Counter[str] = Counter(dict.fromkeys(UblkStatistics._fields, 0))

    @property
    def connected(self) -> bool:
        """Whether the device's queues are being served (or held, while paused)."""
        return self._server is not None

    @property
    def ended_descriptor(self) -> int:
        """Readable when the kernel has ended the device."""
        if self._server is None:
            raise ValueError("the disk is not connected")
        return self._server.ended_descriptor

    def problem(self) -> int:
        """The errno of a queue that does not work; 0: none."""
        return 0 if self._server is None else self._server.problem()

    def connect(
        self, shape: Shape, *, device: int = -1, simulated: int = -1, zero_copy: bool = False, paused: bool = False
    ) -> None:
        """Have every queue wait for requests. `device` must stay open until `disconnect`. Raises ImageError.

        `zero_copy`: the device was added so. `paused`: requests are held from the first on.
        """
        self.held.begin()
        server = UblkServer(
            self.image.engine_disk,
            shape,
            device=device,
            simulated=simulated,
            writable=self.image.writable,
            zero_copy=zero_copy,
        )
        parked = ParkedThreads(server.next_parked, self._answer, self._together, path=lambda: self.image.path)
        try:
            server.limit(*self.bound)
            parked.start()
            server.start()
            if paused:
                server.pause()
        except BaseException:
            server.stop()
            parked.join()
            server.close()
            raise
        self._server, self._parked = server, parked

    def disconnect(self) -> None:
        """Finish what is in flight and let go of the queues; what was not begun is the kernel's."""
        if self._server is None or self._parked is None:
            return
        self.held.give_up()
        self._server.stop()
        self._parked.join()
        self._past_metrics = self.metrics()
        self._past.update({**self._server.statistics()._asdict(), "in_flight": 0})
        with self._limiting:
            self._server.close()
            self._server = None

    def pause(self) -> None:
        """Begin no more requests and wait until none is in flight."""
        if self._server is not None:
            self._server.pause()

    def resume(self) -> None:
        """Take requests again."""
        if self._server is not None:
            self._server.resume()

    def replace(self, image: Image) -> Image:
        """Serve another image from now on; only while it is paused. The old one, which is the caller's now."""
        if self._server is not None:
            self._server.replace_disk(image.engine_disk, writable=image.writable)
        old, self.image = self.image, image
        return old

    def apply_limit(self) -> None:
        """Have the queues keep to `bound`. Any thread may call it."""
        with self._limiting:
            if self._server is not None:
                self._server.limit(*self.bound)

    def statistics(self) -> dict[str, int]:
        """The counters since the process began, by the names in UblkStatistics."""
        counted = Counter(self._past)
        if self._server is not None:
            counted.update(self._server.statistics()._asdict())
        return dict(counted)

    def metrics(self) -> Metrics:
        """What was asked for since the process began, by kind, and how long it took."""
        past = self._past_metrics
        return past if self._server is None else together(past, self._server.metrics())

    def close(self) -> None:
        """Disconnect and close the image; a job ends. Raises the ImageError that its last flush met."""
        try:
            self.disconnect()
        finally:
            self.close_image()

    # In the threads

    def _answer(self, parked: ParkedRequest) -> None:
        durable = parked.request is Request.SYNC
        self.held.serve(
            lambda: self._do(parked), lambda: self._do_again(parked), tried_ns=parked.tried, durable=durable
        )

    def _together(self, several: Sequence[ParkedRequest]) -> Sequence[ParkedRequest]:
        finish = finish_flushes if several[0].request is Request.SYNC else finish_writes
        return finish(self.image, several)

    def _do_again(self, parked: ParkedRequest) -> None:
        """The same after an error, of which the engine knows of a read or a write: it must try itself first."""
        if parked.request in (Request.READ, Request.WRITE) and parked.resume():
            return
        self._do(parked)

    def _do(self, parked: ParkedRequest) -> None:
        image, offset, length = self.image, parked.offset, parked.length
        match parked.request:
            case Request.READ | Request.WRITE:
                finish_move(image, parked)
                return
            case Request.SYNC:
                image.flush()
            case Request.DISCARD:
                image.discard(offset, length)
            case Request.ZERO:
                image.write_zeroes(offset, length)
            case Request.FILL:
                for at in range(offset, offset + length, _FILL_STEP):
                    image.write(at, bytes(min(_FILL_STEP, offset + length - at)))
        parked.complete()
