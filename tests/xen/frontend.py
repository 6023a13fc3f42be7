"""A guest's block device driver in Python, over a simulated machine: right, or wrong on purpose.

`Ring` is one shared ring: its indices and slots raw, or messages in and responses out. `Frontend` is a device of one or
more rings that reads and writes. `tests/xen/xenbus_frontend.py` has the handshake over xenstore.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from tests.xen.blkif import (
    OKAY,
    PAGE,
    REQ_EVENT,
    REQ_PROD,
    RING_HEADER,
    RSP_EVENT,
    RSP_PROD,
    SECTOR,
    SECTORS_PER_PAGE,
    SEGMENTS_MAX,
    SEGMENTS_PER_PAGE,
    WORD,
    Abi,
    Discard,
    Indirect,
    Message,
    Operation,
    Request,
    Response,
    Segment,
    cut,
    decode_response,
    pack_segments,
    slot_bytes,
    slots,
)
from tests.xen.machine import PATIENCE, Domain

_full_barrier = threading.Lock()


def _barrier() -> None:
    """What was stored before is seen before what is loaded after: taking a lock orders both."""
    with _full_barrier:
        pass


class ProtocolError(AssertionError):
    """The backend broke the protocol."""


class RequestError(OSError):
    """The backend answered a request with an error."""

    def __init__(self, response: Response) -> None:
        super().__init__(f"{response} is an error")
        self.response = response


def _index(place: int) -> property:
    def read(ring: Ring) -> int:
        return ring.domain.words[ring.word + place]

    def write(ring: Ring, value: int) -> None:
        ring.domain.words[ring.word + place] = value % WORD

    return property(read, write, doc="One of the four shared indices, read and written at once.")


class Ring:
    """One ring and its event channel.

    `produced` counts the requests put in, `consumed` the responses taken, as the guest keeps them for itself. The
    indices begin at `start`, which may be any, as where a ring goes on.
    """

    req_prod = _index(REQ_PROD)
    req_event = _index(REQ_EVENT)
    rsp_prod = _index(RSP_PROD)
    rsp_event = _index(RSP_EVENT)

    def __init__(self, domain: Domain, abi: Abi = Abi.NATIVE, pages: int = 1, start: int = 0) -> None:
        self.domain, self.abi = domain, abi
        self.pages = domain.allocate(pages)
        self.word = self.pages[0] * PAGE // 4
        self.references = [domain.grant(page) for page in self.pages]
        self.port = domain.port()
        self.entries = slots(abi, pages)
        #: Messages on their way, by id.
        self.waiting: dict[int, Message] = {}
        self._ids = itertools.count(1)
        self.req_prod = self.rsp_prod = self.produced = self.consumed = start
        self.req_event = self.rsp_event = start + 1

    # ---- raw

    def _bytes(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(page, offset in it, length) of the pieces of a range of the ring."""
        while length:
            offset = start % PAGE
            piece = min(length, PAGE - offset)
            yield self.pages[start // PAGE], offset, piece
            start, length = start + piece, length - piece

    def _slot(self, index: int) -> int:
        return RING_HEADER + index % self.entries * slot_bytes(self.abi)

    def write_slot(self, index: int, raw: bytes) -> None:
        """Write bytes to the slot of an index, at most a slot of them."""
        for page, offset, length in self._bytes(self._slot(index), min(len(raw), slot_bytes(self.abi))):
            self.domain.write_page(page, raw[:length], offset)
            raw = raw[length:]

    def read_slot(self, index: int) -> bytes:
        pieces = self._bytes(self._slot(index), slot_bytes(self.abi))
        return b"".join(self.domain.read_page(page, offset, length) for page, offset, length in pieces)

    # ---- requests

    @property
    def room(self) -> int:
        """How many requests may be put in now."""
        return self.entries - (self.produced - self.consumed)

    def put_raw(self, raw: bytes) -> None:
        """Any bytes as the next request; seen by the backend after `push`."""
        self.write_slot(self.produced, raw)
        self.produced += 1

    def put(self, message: Message) -> int:
        """The next request, with an id of its own unless it has one; the id."""
        if not message.id:
            message.id = next(self._ids)
        self.waiting[message.id] = message
        self.put_raw(message.encode(self.abi))
        return message.id

    def push(self, *, always: bool = False) -> bool:
        """Publish what was put in; notify if the backend waits for it, and whether it did."""
        before, after = self.req_prod, self.produced % WORD
        self.req_prod = after
        _barrier()
        wanted = (after - self.req_event) % WORD < (after - before) % WORD
        if wanted or always:
            self.port.notify()
        return wanted

    def submit(self, *messages: Message) -> list[int]:
        """Put all in, for which there must be room, and publish them together; their ids."""
        ids = [self.put(message) for message in messages]
        self.push()
        return ids

    # ---- responses

    def responses(self) -> list[Response]:
        """The responses that are there, without waiting. ProtocolError if one answers nothing that was asked."""
        produced = self.rsp_prod
        if (produced - self.consumed) % WORD > (self.produced - self.consumed) % WORD:
            raise ProtocolError(f"{produced=} responses to {self.produced} requests, {self.consumed} taken before")
        found = []
        while self.consumed % WORD != produced:
            response = decode_response(self.abi, self.read_slot(self.consumed))
            self.consumed += 1
            message = self.waiting.pop(response.id, None)
            if message is None:
                raise ProtocolError(f"{response} to no request")
            if response.operation != message.answered_as:
                raise ProtocolError(f"{response} to {message}")
            found.append(response)
        return found

    def await_more(self, seconds: float = PATIENCE) -> list[Response]:
        """Wait for a response at least: TimeoutError if none comes, or if one comes without a notification."""
        while True:
            self.rsp_event = self.consumed + 1
            _barrier()
            if found := self.responses():
                return found
            if not self.port.wait(seconds):
                raise TimeoutError(f"no response in {seconds} s: {self}")

    def wait(self, count: int, seconds: float = PATIENCE) -> list[Response]:
        """Wait until `count` responses have come, which may have come before; more if they came together."""
        found = self.responses()
        while len(found) < count:
            found += self.await_more(seconds)
        return found

    def call(self, message: Message) -> Response:
        """Submit one message and wait for its response. Nothing else may be on its way."""
        self.submit(message)
        (response,) = self.wait(1)
        return response

    def __str__(self) -> str:
        shared = f"req_prod={self.req_prod} req_event={self.req_event} rsp_prod={self.rsp_prod}"
        return f"{shared} rsp_event={self.rsp_event} produced={self.produced} consumed={self.consumed}"

    def close(self) -> None:
        self.domain.revoke(*self.references)
        self.domain.free(self.pages)
        self.domain.close_port(self.port)


class Buffer:
    """Pages of the guest with their grants, for the data of a request."""

    def __init__(self, domain: Domain, count: int, *, readonly: bool = False) -> None:
        self.domain = domain
        self.pages = domain.allocate(count)
        self.references = [domain.grant(page, readonly=readonly) for page in self.pages]

    def segments(self, sectors: int, first: int = 0) -> list[Segment]:
        """So many sectors one after the other, from the `first` sector of the first page on."""
        found = []
        for page, reference in enumerate(self.references):
            start, end = max(first - page * SECTORS_PER_PAGE, 0), first + sectors - page * SECTORS_PER_PAGE
            if start < min(end, SECTORS_PER_PAGE):
                found.append(Segment(reference, start, min(end, SECTORS_PER_PAGE) - 1))
        return found

    def read(self) -> bytes:
        return b"".join(self.domain.read_page(page) for page in self.pages)

    def write(self, data: bytes, offset: int = 0) -> None:
        for number, page in enumerate(self.pages):
            start = number * PAGE - offset
            piece = data[max(start, 0) : max(start + PAGE, 0)]
            if piece:
                self.domain.write_page(page, piece, max(-start, 0))

    def close(self) -> None:
        self.domain.revoke(*self.references)
        self.domain.free(self.pages)


class Frontend:
    """A block device with one or more rings, which takes calls as a disk does.

    `indirect_segments`: the most segments in a request, above 11 by indirect requests. With `persistent` the pages of
    data stay granted and are used again. Thread-safe if every thread uses a ring of its own.
    """

    def __init__(
        self,
        domain: Domain,
        *,
        abi: Abi = Abi.NATIVE,
        ring_pages: int = 1,
        queues: int = 1,
        indirect_segments: int = 0,
        persistent: bool = False,
    ) -> None:
        self.domain, self.abi = domain, abi
        self.segments_max = max(indirect_segments, SEGMENTS_MAX)
        self.persistent = persistent
        self.rings = [Ring(domain, abi, ring_pages) for _ in range(queues)]
        self._idle: dict[int, list[Buffer]] = {}

    @property
    def ring(self) -> Ring:
        """The first ring."""
        return self.rings[0]

    def buffer(self, count: int, *, readonly: bool = False) -> Buffer:
        """Pages for data; with `persistent` some that were used before if there are any."""
        if self.persistent:
            with contextlib.suppress(KeyError, IndexError):
                return self._idle[count].pop()
        return Buffer(self.domain, count, readonly=readonly and not self.persistent)

    def put_back(self, buffer: Buffer) -> None:
        if self.persistent:
            self._idle.setdefault(len(buffer.pages), []).append(buffer)
        else:
            buffer.close()

    def read(self, sector: int, count: int, *, ring: Ring | None = None) -> bytes:
        """`count` sectors; RequestError if the backend says so."""
        pieces: dict[int, bytes] = {}
        self._transfer(Operation.READ, sector, count, ring or self.ring, None, pieces.__setitem__)
        return b"".join(data for _, data in sorted(pieces.items()))

    def write(self, sector: int, data: bytes, *, ring: Ring | None = None, barrier: bool = False) -> None:
        """Write whole sectors; with `barrier` as requests that are durable, and all before them, when answered."""
        operation = Operation.BARRIER if barrier else Operation.WRITE
        self._transfer(operation, sector, len(data) // SECTOR, ring or self.ring, data, lambda *_: None)

    def flush(self, *, ring: Ring | None = None) -> None:
        self.check((ring or self.ring).call(Request(Operation.FLUSH)))

    def barrier(self, *, ring: Ring | None = None) -> None:
        """A barrier without data."""
        self.check((ring or self.ring).call(Request(Operation.BARRIER)))

    def discard(self, sector: int, count: int, *, ring: Ring | None = None) -> None:
        self.check((ring or self.ring).call(Discard(sector, count)))

    @staticmethod
    def check(response: Response) -> Response:
        """The response; RequestError unless it says that all went well."""
        if response.status != OKAY:
            raise RequestError(response)
        return response

    def message(self, operation: int, sector: int, segments: Sequence[Segment]) -> tuple[Message, Buffer | None]:
        """A request for these segments, an indirect one if there are many, and the pages that hold them then."""
        if len(segments) <= SEGMENTS_MAX:
            return Request(operation, sector, segments), None
        buffer = self.buffer(-(-len(segments) // SEGMENTS_PER_PAGE), readonly=True)
        buffer.write(pack_segments(segments))
        return Indirect(operation, sector, len(segments), buffer.references), buffer

    def _transfer(
        self,
        operation: int,
        first_sector: int,
        sectors: int,
        ring: Ring,
        data: bytes | None,
        done: Callable[[int, bytes], None],
    ) -> None:
        """Do it in requests as large as may be, as many at once as the ring holds."""
        under_way: dict[int, tuple[int, int, Buffer, Buffer | None]] = {}
        failed: list[Response] = []

        def finish(responses: Sequence[Response]) -> None:
            for response in responses:
                sector, count, buffer, list_pages = under_way.pop(response.id)
                if response.status != OKAY:
                    failed.append(response)
                elif data is None:
                    done(sector, buffer.read()[: count * SECTOR])
                for pages in filter(None, (buffer, list_pages)):
                    self.put_back(pages)

        for sector, count in cut(first_sector, sectors, self.segments_max * SECTORS_PER_PAGE):
            if not ring.room:
                ring.push()
                finish(ring.await_more())
            buffer = self.buffer(-(-count // SECTORS_PER_PAGE), readonly=data is not None)
            if data is not None:
                start = (sector - first_sector) * SECTOR
                buffer.write(data[start : start + count * SECTOR])
            message, list_pages = self.message(operation, sector, buffer.segments(count))
            under_way[ring.put(message)] = sector, count, buffer, list_pages
        ring.push()
        while under_way:
            finish(ring.await_more())
        if failed:
            raise RequestError(failed[0])

    def close(self) -> None:
        """Take everything back; the backend must have let go of it."""
        for buffers in self._idle.values():
            for buffer in buffers:
                buffer.close()
        self._idle.clear()
        for ring in self.rings:
            ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
