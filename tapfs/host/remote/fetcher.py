"""The process that fetches one file from elsewhere into an open local file, for the process that serves it.

It has a socket and that file (`tapfs.host.remote.fetching`), takes one message at a time, and answers each of them. It
ends when nobody has the other end of the socket any more. Several requests are on their way at once. A request that
failed by the network is tried again, after a pause that doubles.

The process forks the one that does the work before there is a thread, and only waits for it. One that was killed, as
the kernel does where memory is short, is followed by another one. Whoever is served may be in a sandbox, and could
start none.
"""

from __future__ import annotations

import ctypes
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.remote import messages
from tapfs.host.remote.address import Address
from tapfs.host.remote.kept_copy import KeptList
from tapfs.host.remote.messages import COPY, HOLES, SOCKET
from tapfs.host.remote.options import USUAL, RemoteOptions
from tapfs.host.remote.retries import retried
from tapfs.host.remote.source import Facts, Mapped, Source, has_changed, open_source

#: Requests that are on their way at once.
_THREADS = 8

#: One message tells of at most so many ranges.
_MOST_RANGES = 256

_PUNCH_HOLE_KEEP_SIZE = 3

#: So many processes that were killed within so many seconds are followed by no other: something kills each of them.
_MOST_KILLED, _KILLED_SECONDS = 5, 30.0


class _Keeping:
    """The list of what is in a copy that is kept, as this process changes the copy."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._list = KeptList(asked["path"], asked["head"].encode())
        self._block_bytes: int = asked["block_bytes"]
        self._lock = threading.Lock()
        loaded = self._list.load(asked["count"])
        #: Whether there is a list that names blocks.
        self._listed = loaded is not None
        self._blocks = bytearray(asked["count"]) if loaded is None else loaded

    def come(self, offset: int, length: int) -> None:
        """A range of whole blocks is in the copy."""
        self._mark(offset, length, b"\1")

    def gone(self, offset: int, length: int) -> None:
        """A range of whole blocks is about to be given up, and no list may name it then. Raises OSError."""
        if self._listed:
            self._list.remove()
            self._listed = False
        self._mark(offset, length, b"\0")

    def save(self, copy: int) -> None:
        """Keep the list. Where that fails there is an older one, or none, and the bytes are fetched again."""
        with suppress(OSError), self._lock:
            self._list.save(copy, bytes(self._blocks))

    def _mark(self, offset: int, length: int, state: bytes) -> None:
        first, stop = offset // self._block_bytes, -(-(offset + length) // self._block_bytes)
        with self._lock:
            self._blocks[first:stop] = state * (stop - first)


class _Reopened:
    """A `Source` that a killed process had open, opened again when it is first read: the same object, or an error."""

    def __init__(self, address: Address, options: RemoteOptions, facts: Facts) -> None:
        self.facts = facts
        self._address = address
        self._options = options
        self._opened: Source | None = None
        self._lock = threading.Lock()

    def _source(self) -> Source:
        with self._lock:
            if self._opened is None:
                source = open_source(self._address, self._options)
                if source.facts != self.facts:
                    source.close()
                    raise has_changed(str(self._address))
                self._opened = source
            return self._opened

    def read(self, offset: int, length: int) -> memoryview:
        """See `Source.read`."""
        return self._source().read(offset, length)

    def data_ranges(self, offset: int, length: int) -> tuple[list[tuple[int, int]], int]:
        """See `Mapped.data_ranges`."""
        source = self._source()
        if not isinstance(source, Mapped):
            return [(offset, length)], offset + length
        return source.data_ranges(offset, length)

    def close(self) -> None:
        """See `Source.close`."""
        if self._opened is not None:
            self._opened.close()


class Fetcher:
    """Serves the messages of one socket until its other end is closed; `again`: in the place of a killed process."""

    def __init__(
        self,
        connection: socket.socket,
        copy: int,
        holes: socket.socket,
        *,
        again: bool = False,
        allowed: Sequence[str] = (),
    ) -> None:
        self._allowed = [Address.known(each) for each in allowed]
        self._connection = connection
        self._holes = holes
        self._copy = copy
        self._again = again
        self._options = USUAL
        self._source: Source | None = None
        self._keeping: _Keeping | None = None
        self._fetches: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._punch = ctypes.CDLL(None, use_errno=True).fallocate
        self._punch.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def serve(self) -> None:
        """Take messages until there are no more, and let go of the source."""
        given_up = self._told_again() if self._again else []
        for each in given_up:
            self._give_up(each)
        while asked := messages.receive(self._connection):
            match asked["op"]:
                case "fetch":
                    self._fetches.put(asked)
                case "keep":
                    self._keeping = _Keeping(asked)
                case "give_up":
                    self._give_up(asked)
                case _:
                    self._open(asked)
        if self._keeping is not None:
            self._keeping.save(self._copy)
        if self._source is not None:
            self._source.close()

    def _told_again(self) -> list[dict[str, Any]]:
        """Say that a killed process has a successor, and take up what that is told; what was to be given up meanwhile.

        What is asked for before has no answer, so it is asked for again.
        """
        given_up: list[dict[str, Any]] = []
        for each in (self._connection, self._holes):
            messages.send(each, {"number": 0, "restarted": True})
        while asked := messages.receive(self._connection):
            match asked["op"]:
                case "open":
                    if keeping := asked.get("keeping"):
                        self._keeping = _Keeping(keeping)
                    self._open(asked)
                    break
                case "give_up":
                    given_up.append(asked)
                case _:
                    pass
        return given_up

    def _give_up(self, asked: dict[str, Any]) -> None:
        if self._keeping is not None:
            self._keeping.gone(asked["offset"], asked["length"])
        # Where the host frees nothing the bytes stay, and they are right.
        self._punch(self._copy, _PUNCH_HOLE_KEEP_SIZE, asked["offset"], asked["length"])

    def _open(self, asked: dict[str, Any]) -> None:
        if self._source is not None:
            return  # who has seen twice that this process is new says it twice
        self._options = RemoteOptions(**asked["options"])
        address = Address.known(asked["address"])
        if not self._may_reach(address):
            refused = ImageError(ErrorKind.DENIED, "is no place that the user has named", path=str(address), op="fetch")
            self._answer({"number": asked["number"], **messages.failed(refused)})
            return
        if "facts" in asked:
            self._start(_Reopened(address, self._options, Facts(**asked["facts"])))
            return
        answer, source = messages.answer_of(asked, partial(open_source, address, self._options))
        if source is not None:
            answer["facts"] = source.facts._asdict()
            answer["tells_holes"] = isinstance(source, Mapped)
            self._start(source)
        self._answer(answer)

    def _may_reach(self, address: Address) -> bool:
        """Whether the address is, or lies below, one of those that are allowed; whether there is no such bound."""
        return not self._allowed or any(address.lies_below(each) for each in self._allowed)

    def _start(self, source: Source) -> None:
        self._source = source
        if isinstance(source, Mapped):
            threading.Thread(target=self._tell_holes, args=(source,), daemon=True).start()
        for _ in range(_THREADS):
            threading.Thread(target=self._work, args=(source,), daemon=True).start()

    def _tell_holes(self, source: Mapped) -> None:
        """Answer what is asked about holes, one question after the other."""
        while asked := messages.receive(self._holes):
            look = partial(source.data_ranges, asked["offset"], asked["length"])
            answer, found = messages.answer_of(asked, partial(retried, look, self._options))
            if found is not None:
                ranges, until = found
                if len(ranges) > _MOST_RANGES:
                    ranges, until = ranges[:_MOST_RANGES], ranges[_MOST_RANGES][0]
                answer |= {"ranges": ranges, "until": until}
            messages.send(self._holes, answer)

    def _work(self, source: Source) -> None:
        while True:
            asked = self._fetches.get()
            answer, _ = messages.answer_of(asked, partial(self._fetch, source, asked["offset"], asked["length"]))
            self._answer(answer)

    def _fetch(self, source: Source, offset: int, length: int) -> None:
        data = retried(partial(source.read, offset, length), self._options)
        start = offset
        while data:
            written = os.pwrite(self._copy, data, offset)
            data, offset = data[written:], offset + written
        if self._keeping is not None:
            self._keeping.come(start, length)

    def _answer(self, answer: dict[str, Any]) -> None:
        try:
            messages.send(self._connection, answer)
        except OSError:
            os._exit(0)  # nobody is there any more


def main() -> None:
    """Serve the socket and the file that this process was started with."""
    os.closerange(HOLES + 1, os.sysconf("SC_OPEN_MAX"))
    again = _await_killed()
    with socket.socket(fileno=SOCKET) as connection:
        holes = socket.socket(fileno=HOLES)
        allowed = messages.allowed()
        Fetcher(connection, COPY, holes, again=again, allowed=allowed).serve()
    os._exit(0)  # no thread is waited for


def _await_killed() -> bool:
    """Fork the process that is to work, and return in it; whether another one was killed before.

    The first process returns never: it ends with the one that works.
    """
    killed: deque[float] = deque(maxlen=_MOST_KILLED)
    while True:
        working = os.fork()
        if not working:
            return bool(killed)
        status = os.waitpid(working, 0)[1]
        if not os.WIFSIGNALED(status):
            os._exit(0)
        killed.append(time.monotonic())
        if len(killed) == _MOST_KILLED and killed[-1] - killed[0] < _KILLED_SECONDS:
            os._exit(1)


if __name__ == "__main__":
    main()
