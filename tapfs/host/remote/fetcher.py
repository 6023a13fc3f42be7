"""The process that fetches one file from elsewhere into an open local file, for the process that serves it.

It has a socket and that file (`tapfs.host.remote.fetching`), takes one message at a time, and answers each of them. It
ends when nobody has the other end of the socket any more. Several requests are on their way at once. A request that
failed by the network is tried again, after a pause that doubles.
"""

from __future__ import annotations

import ctypes
import os
import queue
import socket
import threading
from contextlib import suppress
from functools import partial
from typing import Any

from tapfs.host.remote import messages
from tapfs.host.remote.address import Address
from tapfs.host.remote.kept_copy import KeptList
from tapfs.host.remote.messages import COPY, HOLES, SOCKET
from tapfs.host.remote.options import USUAL, RemoteOptions
from tapfs.host.remote.retries import retried
from tapfs.host.remote.source import Mapped, Source, open_source

#: Requests that are on their way at once.
_THREADS = 8

#: One message tells of at most so many ranges.
_MOST_RANGES = 256

_PUNCH_HOLE_KEEP_SIZE = 3


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


class Fetcher:
    """Serves the messages of one socket until its other end is closed."""

    def __init__(self, connection: socket.socket, copy: int, holes: socket.socket) -> None:
        self._connection = connection
        self._holes = holes
        self._copy = copy
        self._options = USUAL
        self._source: Source | None = None
        self._keeping: _Keeping | None = None
        self._fetches: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._punch = ctypes.CDLL(None, use_errno=True).fallocate
        self._punch.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def serve(self) -> None:
        """Take messages until there are no more, and let go of the source."""
        while asked := messages.receive(self._connection):
            match asked["op"]:
                case "fetch":
                    self._fetches.put(asked)
                case "keep":
                    self._keeping = _Keeping(asked)
                case "give_up":
                    if self._keeping is not None:
                        self._keeping.gone(asked["offset"], asked["length"])
                    # Where the host frees nothing the bytes stay, and they are right.
                    self._punch(self._copy, _PUNCH_HOLE_KEEP_SIZE, asked["offset"], asked["length"])
                case _:
                    self._open(asked)
        if self._keeping is not None:
            self._keeping.save(self._copy)
        if self._source is not None:
            self._source.close()

    def _open(self, asked: dict[str, Any]) -> None:
        self._options = RemoteOptions(**asked["options"])
        address = Address.known(asked["address"])
        answer, source = messages.answer_of(asked, partial(open_source, address, self._options))
        if source is not None:
            self._source = source
            answer["facts"] = source.facts._asdict()
            answer["tells_holes"] = isinstance(source, Mapped)
            if isinstance(source, Mapped):
                threading.Thread(target=self._tell_holes, args=(source,), daemon=True).start()
            for _ in range(_THREADS):
                threading.Thread(target=self._work, args=(source,), daemon=True).start()
        self._answer(answer)

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
    with socket.socket(fileno=SOCKET) as connection:
        Fetcher(connection, COPY, socket.socket(fileno=HOLES)).serve()
    os._exit(0)  # no thread is waited for


if __name__ == "__main__":
    main()
