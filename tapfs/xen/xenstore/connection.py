"""One connection to xenstored, shared by all tasks of a process.

A task that asks puts its whole message into a queue and waits for the reply. One task sends the queue, and one reads
replies and watch events. So a cancelled call leaves no message half sent, and its reply is dropped when it comes.

Linux's device is asked one thing at a time: it keeps one message of a descriptor, and a thread of the kernel sends it
later, so that a second message would overwrite what the first one asks. And a watch that is asked for while a reply is
due stops both for ever, with all of the host that speaks to xenstored (docs/specs/xen.md, "The kernel's device").
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections import deque
from collections.abc import Callable
from functools import partial

import trio

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.serving.threads import in_thread
from tapfs.xen.xenstore.wire import (
    MESSAGE_MAXIMUM,
    Assembler,
    Message,
    Operation,
    ProtocolError,
    errno_of,
    split_strings,
)

_READ_BYTES = 64 << 10
_REQUESTS = 1 << 32
_CLOSED = "it has closed the connection"


class RefusedError(Exception):
    """xenstored answered with an error; `number` is its errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Question:
    """A message that waits for its reply. `late` takes the reply that nobody waits for any more."""

    def __init__(self, operation: Operation, late: Callable[[bytes], None] | None) -> None:
        self.operation = operation
        self.late = late
        self.answered = trio.Event()
        self.abandoned = False
        self.reply: Message | None = None


class Connection:
    """The socket or device at `path`. `run_reader` and `run_writer` must run while it is used.

    Raises ImageError(unsupported, denied, io) if it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        #: The domain that it is of, once somebody has asked.
        self.domain: int | None = None
        self._descriptor, self._device = open_connection(path)
        self._questions: dict[int, _Question] = {}
        self._outgoing: deque[Message] = deque()
        self._more = trio.Event()
        #: Requests that were sent and have no reply yet.
        self._sent: set[int] = set()
        self._none_sent = trio.Event()
        self._last_request = 0
        self._on_event: Callable[[str, str], None] | None = None
        self._on_loss: Callable[[], None] | None = None
        self._lost: str | None = None

    def on_event(self, fired: Callable[[str, str], None], lost: Callable[[], None]) -> None:
        """Say who takes watch events (path, token), and who hears that there will be no more."""
        self._on_event, self._on_loss = fired, lost

    def close(self) -> None:
        """Close it. xenstored forgets the watches and transactions with it."""
        os.close(self._descriptor)

    @property
    def lost(self) -> bool:
        """Whether no reply will come any more."""
        return self._lost is not None

    def check(self) -> None:
        """Raise ImageError(io) if the connection is lost."""
        if self._lost is not None:
            raise ImageError(ErrorKind.IO, f"xenstored is gone: {self._lost}", path=self.path, op="talk to xenstored")

    def dismiss(self, operation: Operation, payload: bytes, transaction: int = 0) -> None:
        """Send a message whose reply nobody needs; nothing happens where the connection is lost."""
        if self._lost is None:
            self._post(operation, payload, transaction).abandoned = True

    async def call(
        self, operation: Operation, payload: bytes, transaction: int = 0, late: Callable[[bytes], None] | None = None
    ) -> bytes:
        """Send a message and wait for the reply's payload; `late` gets that of a success if this was cancelled.

        Raises RefusedError, and ImageError(io) if no reply will come.
        """
        return await self._reply_to(self._post(operation, payload, transaction, late))

    async def run_writer(self) -> None:
        """Write what is queued, until cancelled or the connection is lost."""
        while self._lost is None:
            if not self._outgoing:
                self._more = trio.Event()
                await self._more.wait()
                continue
            message = self._outgoing[0]
            if self._device and self._sent:
                self._none_sent = trio.Event()
                await self._none_sent.wait()
                continue
            self._sent.add(message.request)
            try:
                await self._write(message.encode())
            except OSError as error:
                self._lose(_reason(error))
                return
            self._outgoing.popleft()

    async def run_reader(self) -> None:
        """Take replies and events, until cancelled or the connection is lost."""
        try:
            await self._read_messages()
        finally:
            # Whoever still waits for a reply (shielded, to put something away) must not wait for ever.
            if self._lost is None:
                self._lose("this process is closing the connection")

    async def _read_messages(self) -> None:
        assembler = Assembler()
        while self._lost is None:
            try:
                piece = os.read(self._descriptor, _READ_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._descriptor)
                continue
            except OSError as error:
                self._lose(_reason(error))
                return
            if not piece:
                self._lose(_CLOSED)
                return
            try:
                for message in assembler.feed(piece):
                    self._dispatch(message)
            except ProtocolError as error:
                self._lose(f"it does not speak xenstore's protocol ({error})")
            await trio.lowlevel.checkpoint()

    def _post(
        self, operation: Operation, payload: bytes, transaction: int = 0, late: Callable[[bytes], None] | None = None
    ) -> _Question:
        self.check()
        self._last_request = request = self._last_request % (_REQUESTS - 1) + 1
        message = Message(operation, request, transaction, payload)
        length = len(message.encode())
        if length > MESSAGE_MAXIMUM:
            raise ImageError(
                ErrorKind.OUT_OF_BOUNDS, f"{length} bytes do not fit into a message", op="write to xenstore"
            )
        self._questions[request] = question = _Question(operation, late)
        self._outgoing.append(message)
        self._more.set()
        return question

    async def _reply_to(self, question: _Question) -> bytes:
        try:
            await question.answered.wait()
        except BaseException:  # cancelled, or a KeyboardInterrupt
            question.abandoned = True
            if question.reply is not None:  # it came after the cancellation, but before this task ran again
                self._take_late(question)
            raise
        reply = question.reply
        if reply is None:
            self.check()
            raise AssertionError("a question without a reply was answered")
        if reply.operation == Operation.ERROR:
            raise RefusedError(errno_of(reply.payload))
        return reply.payload

    async def _write(self, message: bytes) -> None:
        if self._device:
            # The kernel takes a message in one piece, and waits for xenstored where it adds a watch.
            await in_thread(partial(os.write, self._descriptor, message))
            return
        rest = memoryview(message)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._descriptor)

    def _dispatch(self, message: Message) -> None:
        if message.operation == Operation.WATCH_EVENT:
            strings = split_strings(message.payload)
            if len(strings) >= 2 and self._on_event is not None:
                self._on_event(strings[0], strings[1])
            return
        request = self._request_of(message)
        self._sent.discard(request)
        if not self._sent:
            self._none_sent.set()
        question = self._questions.pop(request, None)
        if question is None:
            return
        question.reply = message
        if question.abandoned:
            self._take_late(question)
        question.answered.set()

    def _request_of(self, message: Message) -> int:
        """The request that a message replies to; the kernel's own replies to WATCH and UNWATCH do not say."""
        if message.request == 0:
            for request, question in self._questions.items():
                if question.operation == message.operation:
                    return request
        return message.request

    @staticmethod
    def _take_late(question: _Question) -> None:
        if question.late is not None and question.reply is not None and question.reply.operation != Operation.ERROR:
            question.late(question.reply.payload)

    def _lose(self, reason: str) -> None:
        self._lost = reason
        questions = list(self._questions.values())
        self._questions.clear()
        for question in questions:
            question.answered.set()
        self._more.set()
        self._none_sent.set()
        if self._on_loss is not None:
            self._on_loss()


def _reason(error: OSError) -> str:
    return _CLOSED if isinstance(error, ConnectionError) else os.strerror(error.errno or errno.EIO)


def open_connection(path: str) -> tuple[int, bool]:
    """A descriptor that does not block, and whether it is the kernel's device. Raises as `Connection`."""
    try:
        if stat.S_ISCHR(os.stat(path).st_mode):
            return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC), True
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(path)
            connection.setblocking(False)
            return connection.detach(), False
    except FileNotFoundError as error:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "no xenstored runs",
            path=path,
            op="connect",
            remedy="start Xen's services (xencommons)",
        ) from error
    except PermissionError as error:
        raise ImageError(
            ErrorKind.DENIED, "cannot connect to xenstored", path=path, op="connect", remedy="run it as root"
        ) from error
    except OSError as error:
        raise from_os_error(error, path=path, op="connect to xenstored") from error
