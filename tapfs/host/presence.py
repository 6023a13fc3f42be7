"""Presence: which blocks of a host file have come, for a file that is a copy of something elsewhere.

The engine knows descriptors and never calls back. So a file that lies elsewhere is a sparse file of this host, and one
byte for each of its blocks says whether the block is here. A read that meets an absent block ends with FETCH; its
owner has the block fetched, which makes it present, and the read goes on.

Several requests are on their way at once. Who reads on where an earlier read ended has what follows fetched ahead of
time, twice as much at each time. Half of what has come early is shown to the engine only when the other half is used
up, so that the owner is asked again before there is nothing left.

A copy may be bounded. Then the blocks that came first are given up: they are absent first, then every reader that may
have seen them present ends, then their space is freed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Condition
from typing import Protocol

from tapfs.errors import ImageError
from tapfs.records import NamedTuple

#: At least and at most so many bytes are fetched ahead.
_FIRST_AHEAD_BYTES = 128 << 10
_MOST_AHEAD_BYTES = 32 << 20

#: One request fetches at most so many bytes; what is longer is fetched by several at once.
_REQUEST_BYTES = 2 << 20

#: So many small reads may follow each other by chance, as those of tables and of what they name.
_CHANCE = 2

#: A reader still reads on where it leaves out so many times as much as it wants.
_NEAR = 2

#: So many readers that read on are told apart.
_MAX_STREAMS = 8


class Ended(NamedTuple):
    """A request that has ended, well or with an error."""

    number: int
    error: ImageError | None


class Carrier(Protocol):
    """What brings bytes from elsewhere into the file."""

    def begin(self, offset: int, length: int) -> int:
        """Begin to bring a range of whole blocks, which may end with the file; the request's number.

        Raises ImageError.
        """
        ...

    def ended(self) -> list[Ended]:
        """Wait until a request has ended; all that have, each once. Raises ImageError where none will end any more."""
        ...

    def give_up(self, offset: int, length: int) -> None:
        """Free the space of a range of whole blocks, which nobody reads, before what is begun later is written."""
        ...


class _Request:
    """A run of blocks ``[first, stop)`` on its way."""

    __slots__ = ("early", "error", "first", "stop")

    def __init__(self, first: int, stop: int, *, early: bool) -> None:
        self.first, self.stop, self.early = first, stop, early
        self.error: ImageError | None = None


class _Stream:
    """A reader that reads on: the block after the last one that it wanted, and how far was fetched for it.

    `shown` is where it will ask next: the block after the last one that the engine was shown for it.
    """

    __slots__ = ("ahead", "end", "reads", "shown", "window")

    def __init__(self, end: int) -> None:
        self.end = self.ahead = self.shown = end
        self.window = self.reads = 0


class Presence:
    """The blocks of one file that is only read. `size` in bytes; any thread may call.

    `limit_bytes` bounds what is here at once (None: nothing does). `ahead`: whether to fetch early.
    """

    def __init__(
        self, block_bytes: int, size: int, carrier: Carrier, *, limit_bytes: int | None = None, ahead: bool = True
    ) -> None:
        self.block_bytes = block_bytes
        #: One byte a block, which the engine reads: 0 absent, 1 here.
        self.blocks = bytearray(-(-size // block_bytes))
        #: What waits until no request reads any more that has begun before; added and removed by engines' owners.
        self.quiesce: list[Callable[[], None]] = []
        self._size = size
        self._carrier = carrier
        self._limit = None if limit_bytes is None else max(limit_bytes // block_bytes, 4)
        self._most_ahead = _MOST_AHEAD_BYTES // block_bytes if ahead else 0
        if self._limit is not None:
            self._most_ahead = min(self._most_ahead, self._limit // 4)
        self._request_blocks = max(1, _REQUEST_BYTES // block_bytes)
        self._changed = Condition()
        self._receiving = False
        self._pins = 0
        self._requests: dict[int, _Request] = {}
        #: The request that brings a block.
        self._coming: dict[int, _Request] = {}
        #: Blocks that have come early and are not shown to the engine yet.
        self._early: set[int] = set()
        #: Runs of blocks that have come, the oldest first, and how many blocks they are.
        self._come: deque[tuple[int, int]] = deque()
        self._count = 0
        self._streams: list[_Stream] = []

    def here_already(self, blocks: bytes) -> None:
        """Have the blocks count as present whose byte is 1, before anybody reads."""
        self.blocks[:] = blocks
        first = self.blocks.find(1)
        while first >= 0:
            stop = self.blocks.find(0, first)
            stop = len(self.blocks) if stop < 0 else stop
            # In runs as requests would have brought them: so many are given up at once.
            runs = range(first, stop, self._request_blocks)
            self._come.extend((start, min(start + self._request_blocks, stop)) for start in runs)
            self._count += stop - first
            first = self.blocks.find(1, stop)

    def require(self, offset: int, length: int) -> None:
        """Have every block of the range here, as far as the file goes. Raises what the carrier met."""
        with self._changed:
            self._require(offset, length)

    @contextmanager
    def kept(self, offset: int, length: int) -> Generator[None]:
        """Have every block of the range here, and none of the file given up until the end of the block."""
        with self._changed:
            self._require(offset, length)
            self._pins += 1
        try:
            yield
        finally:
            with self._changed:
                self._pins -= 1

    def _require(self, offset: int, length: int) -> None:
        first, stop = offset // self.block_bytes, min(-(-(offset + length) // self.block_bytes), len(self.blocks))
        if self.blocks.find(0, first, stop) < 0:
            return
        read_ahead = self._jumps(first, stop)
        own: set[_Request] = set()
        while True:
            self._show(first, stop)
            # A failure of what another has begun, maybe long ago, is not ours: it is tried again.
            own |= self._begin(first, stop, early=False)
            if not read_ahead:
                self._read_on(first, stop)
                read_ahead = True
            if self.blocks.find(0, first, stop) < 0:
                return
            self._await(own)

    def _begin(self, first: int, stop: int, *, early: bool, needed: tuple[int, int] | None = None) -> set[_Request]:
        """Request what of the blocks is absent and not on its way, without giving up a block of them or of `needed`."""
        found: set[_Request] = set()
        block = first
        while block < stop:
            if self.blocks[block] or block in self._early:
                block += 1
                continue
            request = self._coming.get(block)
            if request is None:
                end = block + 1
                limit = min(stop, block + self._request_blocks)
                while end < limit and not (self.blocks[end] or end in self._early or end in self._coming):
                    end += 1
                request = self._sent(block, end, needed or (first, stop), early=early)
                found.add(request)
            block = request.stop
        return found

    def _sent(self, first: int, stop: int, needed: tuple[int, int], *, early: bool) -> _Request:
        self._make_room(stop - first, needed)
        start = first * self.block_bytes
        request = _Request(first, stop, early=early)
        number = self._carrier.begin(start, min(stop * self.block_bytes, self._size) - start)
        self._requests[number] = request
        for block in range(first, stop):
            self._coming[block] = request
        self._count += stop - first
        return request

    def _await(self, own: set[_Request]) -> None:
        """Wait until a request has ended; one thread of those that wait receives for all.

        Raises what the requests `own` have met.
        """
        if self._receiving:
            self._changed.wait()
        else:
            self._receiving = True
            self._changed.release()
            ended: list[Ended] = []
            try:
                ended = self._carrier.ended()
            finally:
                self._changed.acquire()
                self._receiving = False
                for each in ended:
                    self._finish(each)
                self._changed.notify_all()
        for request in own:
            if request.error is not None:
                raise request.error

    def _finish(self, ended: Ended) -> None:
        request = self._requests.pop(ended.number)
        request.error = ended.error
        run = range(request.first, request.stop)
        for block in run:
            del self._coming[block]
        if ended.error is not None:
            self._count -= len(run)
            return
        self._come.append((request.first, request.stop))
        if request.early:
            self._early.update(run)
        else:
            # Only now: the engine reads the file as soon as a block is said to be here.
            self.blocks[request.first : request.stop] = b"\1" * len(run)

    def _show(self, first: int, stop: int) -> None:
        """Show the engine what has come early of a range, and half of what has come behind it."""
        if not self._early:
            return
        stream = self._stream_at(first, stop)
        end = stop
        if stream is not None and first <= stream.shown:
            end = stream.shown = max(stop, stream.ahead - stream.window // 2, stream.shown)
        for block in range(first, end):
            if block in self._early:
                self._early.discard(block)
                self.blocks[block] = 1

    def _stream_at(self, first: int, stop: int) -> _Stream | None:
        """The reader that reads on there. Threads of one may come in another order; a jump is no reading on."""
        near = _NEAR * (stop - first)
        return next((each for each in self._streams if each.end <= first <= min(each.ahead, each.shown + near)), None)

    def _jumps(self, first: int, stop: int) -> bool:
        """Whether a reader that reads on has left something out. Nothing more is fetched ahead for it then."""
        stream = self._stream_at(first, stop)
        return stream is not None and first > stream.shown

    def _read_on(self, first: int, stop: int) -> None:
        """Fetch ahead for a reader that reads on where it was."""
        if not self._most_ahead:
            return
        stream = self._stream_at(first, stop)
        if stream is None:
            self._streams.append(_Stream(stop))
            del self._streams[:-_MAX_STREAMS]
            return
        least = max(1, _FIRST_AHEAD_BYTES // self.block_bytes)
        stream.end = stop
        stream.shown, stream.ahead = max(stream.shown, stop), max(stream.ahead, stop)
        stream.reads += 1
        if stream.reads <= _CHANCE and stop - first < least:
            return
        stream.window = min(max(2 * stream.window, least), self._most_ahead)
        end = min(stop + stream.window, len(self.blocks))
        if end > stream.ahead:
            self._begin(stream.ahead, end, early=True, needed=(first, end))
            stream.ahead = end
        self._streams.remove(stream)
        self._streams.append(stream)

    def _make_room(self, blocks: int, needed: tuple[int, int]) -> None:
        """Give up the oldest blocks, where the bound would be passed by so many more; never those of `needed`."""
        if self._limit is None or self._count + blocks <= self._limit or self._pins:
            return
        # Some more at once, for each time waits for readers.
        surplus = self._count + blocks - self._limit + self._limit // 16
        given_up: list[tuple[int, int]] = []
        kept: list[tuple[int, int]] = []
        while self._come and surplus > 0:
            first, stop = self._come.popleft()
            if first < needed[1] and needed[0] < stop:
                kept.append((first, stop))
                continue
            self.blocks[first:stop] = bytes(stop - first)
            self._early.difference_update(range(first, stop))
            given_up.append((first, stop))
            surplus -= stop - first
        self._come.extendleft(reversed(kept))
        for wait in tuple(self.quiesce):
            wait()
        for first, stop in given_up:
            self._count -= stop - first
            start = first * self.block_bytes
            self._carrier.give_up(start, min(stop * self.block_bytes, self._size) - start)
