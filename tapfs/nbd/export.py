"""One disk that is offered to NBD clients: its name, what clients may do with it, and who answers their requests.

Native threads answer reads and writes (`tapfs.kernel.nbd_server`). What they park is answered here, by calls of the
image: maps, reservations, flushes, zeros, discards, block status.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from tapfs.kernel.nbd_server import Access, NativeServer, NbdStatistics, ParkedRequest, Request, Style
from tapfs.nbd.block_status import contexts_of, first_states
from tapfs.nbd.messages import Transmission
from tapfs.serving.parked import ParkedThreads, finish_flushes, finish_move, finish_writes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tapfs.disk.image import Image
    from tapfs.kernel.metrics import Metrics

#: One native thread per processor, within these bounds.
_MIN_THREADS, _MAX_THREADS = 1, 4

#: The longest read or write, by what most clients take for the rule.
_REQUEST_MAX = 32 << 20

#: Bounds of the alignment that clients are told to prefer, in bytes.
_LEAST_PREFERRED, _MOST_PREFERRED = 4096, 1 << 20

#: Bytes of a long request that are done before the next look whether somebody waits for it.
_ZERO_STEP, _FILL_STEP = 1 << 30, 1 << 20

_READS = Transmission.HAS_FLAGS | Transmission.SEND_DF | Transmission.CAN_MULTI_CONN | Transmission.SEND_CACHE
_WRITES = (
    Transmission.SEND_FLUSH
    | Transmission.SEND_FUA
    | Transmission.SEND_TRIM
    | Transmission.SEND_WRITE_ZEROES
    | Transmission.SEND_FAST_ZERO
)


class Export:
    """An open image under a name. The image stays the caller's; `stop` must come before it is closed.

    `access`: None for what the image allows. `threads`: native ones, None for one per processor. `pause`, `replace`,
    `resume` and `stop` are for one thread at a time.
    """

    def __init__(self, image: Image, name: str, *, access: Access | None = None, threads: int | None = None) -> None:
        self.image = image
        self.name = name
        self._access = _allowed(image) if access is None else access
        self._native_threads = _thread_per_processor() if threads is None else threads
        self._states = contexts_of(image)
        self.contexts: Sequence[str] = tuple(self._states)
        self._server = NativeServer(image.engine_disk, image.size, self._access)
        self._last_counted: tuple[NbdStatistics, Metrics] | None = None
        self._parked = ParkedThreads(
            self._server.next_parked,
            self.answer,
            self._answer_together,
            path=lambda: self.image.path,
        )

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.image.size

    @property
    def description(self) -> str:
        """A line for people."""
        return f"{self.image.format_name}, {self.image.size} bytes"

    @property
    def flags(self) -> Transmission:
        """What a client may do with it."""
        read_only = Transmission.READ_ONLY | Transmission.SEND_FLUSH
        return _READS | (read_only if self._access is Access.READ_ONLY else _WRITES)

    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """The least, the preferred and the greatest length of a request, in bytes."""
        granule = self.image.granule
        preferred = granule if granule & (granule - 1) == 0 else 0
        return 1, max(_LEAST_PREFERRED, min(preferred, _MOST_PREFERRED)), _REQUEST_MAX

    def start(self) -> None:
        """Be ready for clients. Raises ImageError(io); only `stop` may follow then."""
        self._parked.start()
        self._server.start(self._native_threads)

    def add(self, descriptor: int, style: Style, contexts: int) -> None:
        """Serve a client whose negotiation is over. Takes over its socket, unless it raises OSError."""
        self._server.add(descriptor, style, contexts)

    @property
    def ended_descriptor(self) -> int:
        """An eventfd that becomes readable when a client has gone, and when a request waits (`Access.LATER`)."""
        return self._server.ended_descriptor

    @property
    def waits(self) -> bool:
        """Whether a request waits for the image, or has waited (`Access.LATER`)."""
        return self._server.waits

    def pause(self) -> None:
        """Begin nothing more that clients ask for, and wait until nothing is under way. Their connections stay."""
        self._server.pause()

    def replace(self, image: Image, access: Access) -> None:
        """While paused: serve another image. The old one is not used any more."""
        self._server.replace_disk(image.engine_disk, image.size, access)
        self.image, self._access, self._states = image, access, contexts_of(image)

    def resume(self) -> None:
        """Go on with what clients ask for."""
        self._server.resume()

    def limit(self, bytes_per_second: int, requests_per_second: int) -> None:
        """Bound what all clients together may ask for, from now on; 0: no bound."""
        self._server.limit(bytes_per_second, requests_per_second)

    def statistics(self) -> NbdStatistics:
        """What was counted; also after `stop`."""
        return self._server.statistics() if self._last_counted is None else self._last_counted[0]

    def metrics(self) -> Metrics:
        """What was asked for, by kind, and how long it took; also after `stop`."""
        return self._server.metrics() if self._last_counted is None else self._last_counted[1]

    def stop(self) -> None:
        """Answer what clients have asked for, then end their connections and all threads."""
        self._server.stop()
        self._parked.join()
        self._last_counted = self._server.statistics(), self._server.metrics()
        self._server.close()

    # In the threads

    def answer(self, parked: ParkedRequest) -> None:
        """Serve and answer a parked request. What it raises becomes the answer."""
        image = self.image
        match parked.request:
            case Request.READ | Request.WRITE:
                finish_move(image, parked)
            case Request.SYNC:
                image.flush()
                parked.complete()
            case Request.ZERO:
                self._in_steps(parked, _ZERO_STEP, image.write_zeroes)
            case Request.FAST_ZERO:
                # Zeros under a cipher are bytes that are written like others.
                if image.layers[0].driver.geometry.cipher is None:
                    self._in_steps(parked, _ZERO_STEP, image.write_zeroes)
                else:
                    parked.fail(errno.EOPNOTSUPP)
            case Request.FILL:
                self._in_steps(parked, _FILL_STEP, lambda offset, length: image.write(offset, bytes(length)))
            case Request.DISCARD:
                self._in_steps(parked, _ZERO_STEP, image.discard)
            case Request.CACHE:
                buffer = memoryview(bytearray(min(parked.length, _FILL_STEP)))
                self._in_steps(parked, _FILL_STEP, lambda offset, length: image.read_into(offset, buffer[:length]))
            case Request.STATUS:
                self._answer_status(parked)

    def _answer_together(self, several: Sequence[ParkedRequest]) -> Sequence[ParkedRequest]:
        """Answer several writes by one, or several flushes; those that must be tried alone, in their order."""
        finish = finish_flushes if several[0].request is Request.SYNC else finish_writes
        return finish(self.image, several)

    def _in_steps(self, parked: ParkedRequest, step: int, work: Callable[[int, int], None]) -> None:
        """Do a long request piece by piece, as long as somebody waits for it."""
        end = parked.offset + parked.length
        for offset in range(parked.offset, end, step):
            if parked.given_up:
                parked.fail(errno.ESHUTDOWN)
                return
            work(offset, min(step, end - offset))
        parked.complete()

    def _answer_status(self, parked: ParkedRequest) -> None:
        wanted, single = parked.wanted()
        for context in wanted:
            states = self._states.get(self.contexts[context])
            if states is None:  # a bitmap of another image, which was served before
                parked.fail(errno.EINVAL)
                return
            parked.add_states(context, first_states(states(parked.offset, parked.length), single=single))
        parked.complete()


def _allowed(image: Image) -> Access:
    return Access.WRITABLE if image.writable else Access.READ_ONLY


def _thread_per_processor() -> int:
    return max(_MIN_THREADS, min(len(os.sched_getaffinity(0)), _MAX_THREADS))
