"""The process that fetches one file from elsewhere into an open local file, for the process that serves it.

It has a socket and that file (`tapfs.host.remote.fetching`), takes one message at a time, and answers each of them. It
ends when nobody has the other end of the socket any more. Several requests are on their way at once. A request that
failed by the network is tried again, after a pause that doubles.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.remote.address import Address
from tapfs.host.remote.fetching import COPY, MESSAGE_BYTES, SOCKET, error_words
from tapfs.host.remote.options import USUAL, RemoteOptions
from tapfs.host.remote.source import Source, open_source

#: Requests that are on their way at once.
_THREADS = 8

#: A source is tried to be opened at most so many times.
_OPENING_TRIES = 3

#: Longer messages of servers are cut.
_MOST_SAID = 1000

_PUNCH_HOLE_KEEP_SIZE = 3


_Result = TypeVar("_Result")


class _Fetch(NamedTuple):
    number: int
    offset: int
    length: int


class Fetcher:
    """Serves the messages of one socket until its other end is closed."""

    def __init__(self, connection: socket.socket, copy: int) -> None:
        self._connection = connection
        self._copy = copy
        self._options = USUAL
        self._source: Source | None = None
        self._fetches: queue.SimpleQueue[_Fetch] = queue.SimpleQueue()
        self._punch = ctypes.CDLL(None, use_errno=True).fallocate
        self._punch.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def serve(self) -> None:
        """Take messages until there are no more, and let go of the source."""
        while message := self._connection.recv(MESSAGE_BYTES):
            asked: dict[str, Any] = json.loads(message)
            number: int = asked["number"]
            match asked["op"]:
                case "fetch":
                    self._fetches.put(_Fetch(number, asked["offset"], asked["length"]))
                case "give_up":
                    # Where the host frees nothing the bytes stay, and they are right.
                    self._punch(self._copy, _PUNCH_HOLE_KEEP_SIZE, asked["offset"], asked["length"])
                case _:
                    self._options = RemoteOptions(**asked["options"])
                    self._open(number, Address.parse(asked["address"]))

        if self._source is not None:
            self._source.close()

    def _open(self, number: int, address: Address | None) -> None:
        if address is None:
            raise AssertionError("what is to be fetched has no address")
        try:
            # Who has mistaken the address wants to know it soon.
            options = replace(self._options, tries=min(self._options.tries, _OPENING_TRIES))
            source = _retried(lambda: open_source(address, options), options)
        except Exception as error:  # noqa: BLE001  whoever waits is told
            self._answer(number, error=_told(error, str(address)))
            return
        self._source = source
        for _ in range(_THREADS):
            threading.Thread(target=self._work, args=(source, str(address)), daemon=True).start()
        self._answer(number, facts=source.facts._asdict())

    def _work(self, source: Source, name: str) -> None:
        while True:
            fetch = self._fetches.get()
            try:
                data = _retried(partial(source.read, fetch.offset, fetch.length), self._options)
                _write(self._copy, data, fetch.offset)
            except Exception as error:  # noqa: BLE001  whoever waits is told
                self._answer(fetch.number, error=_told(error, name))
            else:
                self._answer(fetch.number)

    def _answer(self, number: int, **fields: object) -> None:
        try:
            self._connection.send(json.dumps({"number": number, **fields}).encode())
        except OSError:
            os._exit(0)  # nobody is there any more


def _retried(attempt: Callable[[], _Result], options: RemoteOptions) -> _Result:
    """What `attempt` gives, once it succeeds. Raises its error where trying again is of no use, or was of none."""
    pause = options.pause_seconds
    for last in (*(False,) * (options.tries - 1), True):
        try:
            return attempt()
        except ImageError as error:
            if last or error.kind is not ErrorKind.IO:
                raise
        # Not all at the same moment, which might be what the server failed by.
        time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
        pause *= 2
    raise AssertionError("the last try neither succeeded nor failed")


def _write(copy: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(copy, data, offset)
        data, offset = data[written:], offset + written


def _told(error: Exception, name: str) -> dict[str, Any]:
    """The fields of a message that tells of an error, whatever its class."""
    if not isinstance(error, ImageError):
        said = str(error) or type(error).__name__
        kind = ErrorKind.NO_SPACE if isinstance(error, OSError) and error.errno in _FULL else ErrorKind.IO
        error = ImageError(kind, f"cannot keep what was fetched: {said}", path=name, op="fetch")
    words = error_words(error)
    words["message"] = words["message"][:_MOST_SAID]
    return words


_FULL = (28, 122)


def main() -> None:
    """Serve the socket and the file that this process was started with."""
    os.closerange(COPY + 1, os.sysconf("SC_OPEN_MAX"))
    with socket.socket(fileno=SOCKET) as connection:
        Fetcher(connection, COPY).serve()
    os._exit(0)  # no thread is waited for


if __name__ == "__main__":
    main()
