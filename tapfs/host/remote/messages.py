"""Messages between the process that serves an image and those that fetch or write what lies elsewhere.

A message is one JSON object in one packet of a socket. Every message has a number, and its answer has the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from tapfs.errors import ErrorKind, ImageError, from_os_error

#: No message is longer.
MESSAGE_BYTES = 16 << 10

#: The descriptors that a process has its socket, the local copy, and the socket of questions about holes under.
SOCKET, COPY, HOLES = 3, 4, 5

#: The modules of processes that fetch and that write, and how many descriptors each is given.
FETCHER, WRITER = "tapfs.host.remote.fetcher", "tapfs.host.remote.writer"
GIVEN = {FETCHER: 3, WRITER: 1}

#: Signals that a process which starts others may ignore, and those do not.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

#: In the environment of a process: the addresses that it may reach, as JSON. Everybody sees the words of a process, and
#: an address may have a password in it.
ALLOWED = "TAPFS_MAY_FETCH"

#: Longer messages of servers are cut.
_MOST_SAID = 1000

#: Processes that have not been seen to end.
_left: set[int] = set()

_Result = TypeVar("_Result")


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message. Raises OSError where nobody is there any more."""
    connection.send(json.dumps(message).encode())


def receive(connection: socket.socket, *, wait: bool = True) -> dict[str, Any]:
    """The next message; empty at the end, or if there is none and it is not to be waited for. Raises OSError."""
    try:
        message = connection.recv(MESSAGE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
    except BlockingIOError:
        return {}
    except ConnectionResetError:
        return {}
    answer: dict[str, Any] = json.loads(message) if message else {}
    return answer


def receive_with_descriptor(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """The next message, and the descriptor that came with it; empty at the end. Raises OSError."""
    line, found, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 1)
    for descriptor in found:
        os.set_inheritable(descriptor, False)
    answer: dict[str, Any] = json.loads(line) if line else {}
    return answer, found[0] if found else None


def answer_of(asked: dict[str, Any], work: Callable[[], _Result]) -> tuple[dict[str, Any], _Result | None]:
    """The answer to a message, and what the work gave; whatever it raises is in the answer."""
    try:
        return {"number": asked["number"]}, work()
    except Exception as error:  # noqa: BLE001  whoever waits is told
        return {"number": asked["number"], "error": _words(error)}, None


def error_of(answer: dict[str, Any]) -> ImageError | None:
    """The error that an answer tells of."""
    fields: dict[str, Any] | None = answer.get("error")
    if fields is None:
        return None
    return ImageError(ErrorKind(fields.pop("kind")), fields.pop("message"), **fields)


def _words(error: Exception) -> dict[str, Any]:
    """An error, whatever its class, as the fields of a message."""
    if isinstance(error, ImageError):
        told = error
    elif isinstance(error, OSError):
        told = from_os_error(error, path=error.filename, op="keep what was fetched")
    else:
        told = ImageError(ErrorKind.IO, f"cannot be fetched: {error or type(error).__name__}", op="fetch")
    return {
        "kind": told.kind.value,
        "message": told.message[:_MOST_SAID],
        "path": told.path,
        "offset": told.offset,
        "op": told.op,
        "remedy": told.neutral_remedy,
    }


def failed(error: Exception) -> dict[str, Any]:
    """A message that tells of an error."""
    return {"error": _words(error)}


class Started(NamedTuple):
    """A process that was started, and how often this process had been forked by then.

    `descriptor`: of a process that another one has started (pidfd).
    """

    number: int
    forks: int
    descriptor: int | None = None


#: The starters of a process that is in a sandbox (`tapfs.host.remote.starter`), by the module that each starts.
_starters: dict[str, socket.socket] = {}


def use_starter(module: str, channel: socket.socket) -> None:
    """Have processes of the module be started by who is at the other end from now on."""
    _starters[module] = channel


def start_outside(module: str, name: str, given: Sequence[int]) -> Started:
    """Start a process of the module; where this one is in a sandbox its starter does it. Raises ImageError."""
    if module in _starters:
        return _asked_for(_starters[module], name, given)
    return start(module, name, given)


def start(module: str, name: str, given: Sequence[int], *, allowed: Sequence[str] = ()) -> Started:
    """Start the process of a module, apart from the terminal's signals, with the socket and maybe more descriptors.

    `allowed`: it reaches these addresses, or what lies below them, and no other. Raises ImageError.
    """
    let_go()
    # Above the numbers that they are to have, so that none is in the way of another.
    high = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in given]
    # Whoever waits for the end of our output is not to wait for this process.
    actions = [
        *((os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(3)),
        *((os.POSIX_SPAWN_DUP2, found, wanted) for found, wanted in zip(high, (SOCKET, COPY, HOLES), strict=False)),
    ]
    words = [sys.executable, "-P", "-m", module]
    environment = {**os.environ, ALLOWED: json.dumps(list(allowed))} if allowed else os.environ
    try:
        process = os.posix_spawn(
            *(sys.executable, words, environment),
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=ENDING_SIGNALS,
        )
    except OSError as error:
        raise from_os_error(error, path=name, op="start the process that reaches it") from error
    finally:
        for each in high:
            os.close(each)
    _left.add(process)
    return Started(process, _forks.count)


def allowed() -> list[str]:
    """The addresses that this process may reach, or below which; none: there is no bound."""
    found: list[str] = json.loads(os.environ.pop(ALLOWED, "[]"))
    return found


def _asked_for(channel: socket.socket, name: str, given: Sequence[int]) -> Started:
    """Have a starter start a process. Raises ImageError."""
    answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with answers:
        with theirs:
            try:
                socket.send_fds(channel, [name[:_MOST_SAID].encode()], [*given, theirs.fileno()])
            except OSError as error:
                raise from_os_error(error, path=name, op="start the process that reaches it") from error
        line, found, _, _ = socket.recv_fds(answers, MESSAGE_BYTES, 1)
    answer: dict[str, Any] = json.loads(line) if line else {"error": None}
    if (met := error_of(answer)) is not None:
        raise met
    if not found:
        raise ImageError(
            ErrorKind.IO, "the process that starts those which reach other places has ended", path=name, op="open"
        )
    return Started(0, _forks.count, found[0])


def let_go(process: Started | None = None, *, wait: bool = False) -> None:
    """Let go of a process and of those that have ended; to `wait` for it nobody may have forked this one since."""
    waits = wait and process is not None and process.forks == _forks.count
    if process is not None and process.descriptor is not None:
        if waits:
            ended = select.poll()
            ended.register(process.descriptor, select.POLLIN)
            ended.poll()
        os.close(process.descriptor)
    for each in tuple(_left):
        is_awaited = waits and process is not None and each == process.number
        with suppress(ChildProcessError):
            if os.waitpid(each, 0 if is_awaited else os.WNOHANG)[0] == 0:
                continue
        _left.discard(each)


class _Forks:
    """How often this process, or one that it was forked from, has been forked."""

    count = 0

    def one_more(self) -> None:
        """Count one."""
        self.count += 1


_forks = _Forks()
os.register_at_fork(after_in_parent=_forks.one_more, after_in_child=_forks.one_more)
