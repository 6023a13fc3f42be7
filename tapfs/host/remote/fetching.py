"""The serving process's side of fetching: start the process that fetches, send it requests, take its answers.

The library that fetches has threads, and a process with threads cannot be forked, as a mount is. So a process of its
own fetches (`tapfs.host.remote.fetcher`), and writes what it gets into the file that the engine reads. The two share
that file and a socket, which a fork passes on. When nobody has the socket any more, that process ends.

If it is killed another one takes its place at the same sockets, and says so at both. It knows nothing, so it is told
the address and what has no answer. What was sent before that, and nobody had read, it leaves out. It may be told twice,
by who reads at one socket and who reads at the other.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.interruption import refuse_to_wait
from tapfs.host.presence import Ended
from tapfs.host.remote import messages
from tapfs.host.remote.address import Address
from tapfs.host.remote.kept_copy import KeptList
from tapfs.host.remote.options import RemoteOptions
from tapfs.host.remote.source import Facts

#: Answers that are taken at once.
_MOST_ANSWERS = 256
#: A thread that waits for an answer looks so often whether a signal has ended the command.
_LOOK_MS = 200


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


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
        self._process: messages.Started | None = None
        #: Held for what is sent, and for the next two.
        self._sending = threading.Lock()
        self._opening: dict[str, Any] = {"op": "open", "address": address.text, "options": asdict(options)}
        #: Fetches that have no answer, by their numbers.
        self._unanswered: dict[int, dict[str, Any]] = {}
        #: Held for a question about holes and its answer.
        self._asking = threading.Lock()
        self._questions = 0
        self._socket, theirs = _pair()
        self._holes, their_holes = _pair()
        try:
            with theirs, their_holes:
                given = (theirs.fileno(), copy, their_holes.fileno())
                self._process = messages.start_outside(messages.FETCHER, self._name, given)
            self._send(self._opening)
            answer = self._received()
            error = messages.error_of(answer)
            if error is not None:
                raise error
            #: What the source says of itself.
            self.facts = Facts(**answer["facts"])
            #: Whether it may know which of its ranges read as zeros.
            self.tells_holes: bool = answer["tells_holes"]
            self._opening["facts"] = answer["facts"]
        except BaseException:
            self.close()
            raise

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The ranges inside the request that may hold other than zeros. Raises ImageError."""
        end = offset + length
        while offset < end:
            answer = self._asked({"offset": offset, "length": end - offset})
            if (met := messages.error_of(answer)) is not None:
                raise met
            yield from map(tuple, answer["ranges"])
            offset = answer["until"]

    def _asked(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to a question about holes. Raises ImageError."""
        with self._asking:
            self._questions += 1
            question = {"number": self._questions, **question}
            try:
                messages.send(self._holes, question)
                while (answer := self._next(self._holes)).get("number") != self._questions:
                    if not answer:
                        raise self._gone()
                    if "restarted" in answer:
                        self._tell_again()  # nobody may wait for a fetch, and so see the same at the other socket
                        messages.send(self._holes, question)
            except OSError as error:
                raise self._gone() from error
            return answer

    def begin(self, offset: int, length: int) -> int:
        """See `tapfs.host.presence.Carrier.begin`."""
        return self._send({"op": "fetch", "offset": offset, "length": length})

    def ended(self) -> list[Ended]:
        """See `tapfs.host.presence.Carrier.ended`."""
        answers = list[dict[str, Any]]()
        while not answers:
            self._note(self._received(), answers)
        # What else has come is taken along, as long as nothing has to be waited for.
        while len(answers) < _MOST_ANSWERS and (more := self._received(wait=False)):
            self._note(more, answers)
        return [Ended(each["number"], messages.error_of(each)) for each in answers]

    def _note(self, answer: dict[str, Any], answers: list[dict[str, Any]]) -> None:
        """Add an answer, unless there was one before: a process that is told twice what to do answers twice."""
        with self._sending:
            if self._unanswered.pop(answer["number"], None) is not None:
                answers.append(answer)

    def give_up(self, offset: int, length: int) -> None:
        """See `tapfs.host.presence.Carrier.give_up`."""
        # Messages are taken in order, so what is fetched again later is not freed by this.
        self._send({"op": "give_up", "offset": offset, "length": length})

    def keep(self, kept: KeptList, block_bytes: int) -> None:
        """Have the copy, and its list of blocks, kept when the process ends. Nothing was fetched yet."""
        words = {"path": kept.path, "head": kept.head.decode(), "block_bytes": block_bytes}
        keeping = {**words, "count": -(-self.facts.size // block_bytes)}
        self._send({"op": "keep", **keeping})
        self._opening["keeping"] = keeping

    def close(self) -> None:
        """Let go of the socket. The process ends once nobody has it. Closing twice is allowed.

        One that keeps its copy is waited for, unless another process may have the socket, too.
        """
        self._socket.close()
        self._holes.close()
        process, self._process = self._process, None
        messages.let_go(process, wait="keeping" in self._opening)

    def _send(self, message: dict[str, Any]) -> int:
        with self._sending:
            self._number += 1
            numbered = {"number": self._number, **message}
            if message["op"] == "fetch":
                self._unanswered[self._number] = numbered
            self._send_numbered(numbered)
            return self._number

    def _send_numbered(self, message: dict[str, Any]) -> None:
        try:
            messages.send(self._socket, message)
        except OSError as error:
            raise self._gone() from error

    def _received(self, *, wait: bool = True) -> dict[str, Any]:
        """One answer; empty if there is none and it is not to be waited for."""
        while True:
            try:
                answer = self._next(self._socket) if wait else messages.receive(self._socket, wait=False)
            except OSError as error:
                raise self._gone() from error
            if "restarted" not in answer:
                break
            self._tell_again()
        if wait and not answer:
            raise self._gone()
        return answer

    def _next(self, connection: socket.socket) -> dict[str, Any]:
        """Wait for a message; empty at the end. Raises EndedBySignalError, and OSError."""
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        while not poll.poll(_LOOK_MS):
            refuse_to_wait(self._name, "fetch")
        return messages.receive(connection)

    def _tell_again(self) -> None:
        """Tell a process that has just taken the place of a killed one what there is to do."""
        with self._sending:
            # The first opening has an answer that is waited for, and a later one has none.
            again = {"number": self._number, **self._opening}
            for message in (again, *self._unanswered.values()):
                self._send_numbered(message)

    def _gone(self) -> ImageError:
        message = "the process that fetches it has ended"
        return ImageError(ErrorKind.IO, message, path=self._name, op="fetch", remedy="open the image again")
