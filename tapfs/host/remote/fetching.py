"""The serving process's side of fetching: start the process that fetches, send it requests, take its answers.

The library that fetches has threads, and a process with threads cannot be forked, as a mount is. So a process of its
own fetches (`tapfs.host.remote.fetcher`), and writes what it gets into the file that the engine reads. The two share
that file and a socket, which a fork passes on. When nobody has the socket any more, that process ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.presence import Ended
from tapfs.host.remote.address import Address
from tapfs.host.remote.options import RemoteOptions
from tapfs.host.remote.source import Facts

#: No message between the two is longer.
MESSAGE_BYTES = 16 << 10

#: The descriptors that the fetching process has the socket and the file under.
SOCKET, COPY = 3, 4

#: Fetching processes that have not been seen to end.
_left: set[int] = set()


def error_words(error: ImageError) -> dict[str, Any]:
    """An error as the fields of a message."""
    return {
        "kind": error.kind.value,
        "message": error.message,
        "path": error.path,
        "offset": error.offset,
        "op": error.op,
        "remedy": error.neutral_remedy,
    }


def _error(fields: dict[str, Any]) -> ImageError:
    kind, message = ErrorKind(fields.pop("kind")), fields.pop("message")
    return ImageError(kind, message, **fields)


class Fetching:
    """A process that fetches one file into an open local one: a `tapfs.host.presence.Carrier`.

    `begin` may be called by one thread while another is in `ended`; two calls of the same must not meet.
    """

    def __init__(self, address: Address, copy: int, options: RemoteOptions) -> None:
        """Start it and have it open the address; `copy` is a descriptor of the file, open for writing.

        Raises ImageError.
        """
        self._name = str(address)
        self._number = 0
        self._sending = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            with theirs:
                self._process = _started(theirs.fileno(), copy, self._name)
            self._send({"op": "open", "address": address.text, "options": asdict(options)})
            #: What the source says of itself.
            self.facts = Facts(**self._received()["facts"])
        except BaseException:
            self.close()
            raise

    def begin(self, offset: int, length: int) -> int:
        """See `tapfs.host.presence.Carrier.begin`."""
        return self._send({"op": "fetch", "offset": offset, "length": length})

    def ended(self) -> list[Ended]:
        """See `tapfs.host.presence.Carrier.ended`."""
        answers = [self._received(raising=False)]
        # What else has come is taken along, as long as nothing has to be waited for.
        while (more := self._received(raising=False, wait=False)) and len(answers) < 256:
            answers.append(more)
        return [Ended(each["number"], _error(each["error"]) if "error" in each else None) for each in answers]

    def give_up(self, offset: int, length: int) -> None:
        """See `tapfs.host.presence.Carrier.give_up`."""
        # Messages are taken in order, so what is fetched again later is not freed by this.
        self._send({"op": "give_up", "offset": offset, "length": length})

    def close(self) -> None:
        """Let go of the socket. The process ends once nobody has it. Closing twice is allowed."""
        self._socket.close()
        for each in tuple(_left):
            with suppress(ChildProcessError):
                if os.waitpid(each, os.WNOHANG)[0] == 0:
                    continue
            _left.discard(each)

    def _send(self, message: dict[str, Any]) -> int:
        with self._sending:
            self._number += 1
            try:
                self._socket.send(json.dumps({"number": self._number, **message}).encode())
            except OSError as error:
                raise self._gone() from error
            return self._number

    def _received(self, *, raising: bool = True, wait: bool = True) -> dict[str, Any]:
        """One answer; empty if there is none and it is not to be waited for."""
        try:
            message = self._socket.recv(MESSAGE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return {}
        except OSError as error:
            raise self._gone() from error
        if not message:
            if not wait:
                return {}
            raise self._gone()
        answer: dict[str, Any] = json.loads(message)
        if raising and "error" in answer:
            raise _error(answer["error"])
        return answer

    def _gone(self) -> ImageError:
        message = "the process that fetches it has ended"
        return ImageError(ErrorKind.IO, message, path=self._name, op="fetch", remedy="open the image again")


def _started(theirs: int, copy: int, name: str) -> int:
    """Start the process that fetches, apart from the terminal's signals; its number."""
    from tapfs.host.remote import fetcher

    # Above the numbers that they are to have, so that neither is in the way of the other.
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in (theirs, copy)]
    words = [sys.executable, "-P", "-m", fetcher.__name__]
    # Whoever waits for the end of our output is not to wait for this process.
    actions = [
        *((os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(3)),
        *((os.POSIX_SPAWN_DUP2, found, wanted) for found, wanted in zip(high, (SOCKET, COPY), strict=True)),
    ]
    try:
        process = os.posix_spawn(sys.executable, words, os.environ, file_actions=actions, setsid=True, setsigmask=())
    except OSError as error:
        raise from_os_error(error, path=name, op="start the process that fetches") from error
    finally:
        for each in high:
            os.close(each)
    _left.add(process)
    return process
