"""A client of xenstore for trio: keys, transactions and watches, from any number of tasks at once.

Every error is an ImageError that names the key as its path. A missing key is no error: it reads as None, has an empty
list, and can be removed. A value that a guest wrote may be any text, so the caller must check it.
"""

from __future__ import annotations

import builtins
import errno
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.xen.host import Host
from tapfs.xen.xenstore.connection import Connection, RefusedError
from tapfs.xen.xenstore.wire import PATH_MAXIMUM, Operation, join_strings, split_strings, to_bytes, to_text

_Result = TypeVar("_Result")

#: Seconds, times the tries so far, that a transaction which was overtaken waits before it is tried again.
_CONFLICT_PAUSE = 0.002
_CONFLICT_PAUSE_LIMIT = 0.1


class Store:
    """The keys, as all see them or as a transaction does."""

    def __init__(self, connection: Connection, transaction: int = 0) -> None:
        self._connection = connection
        self._transaction = transaction

    async def read(self, path: str) -> str | None:
        """The value of a key; None if it is not there."""
        try:
            return to_text(await self._call(Operation.READ, path, "read the key"))
        except _MissingError:
            return None

    async def read_if_shown(self, path: str) -> str | None:
        """The same, and None, too, where the key is another domain's and not for this one to see."""
        try:
            return await self.read(path)
        except ImageError as error:
            if error.kind is not ErrorKind.DENIED:
                raise
            return None

    async def own_domain(self) -> int:
        """The number of the domain that this process runs in."""
        if self._connection.domain is None:
            text = await self.read("domid") or ""
            self._connection.domain = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else 0
        return self._connection.domain

    async def list(self, path: str) -> list[str]:
        """The names directly below a key; empty if there is nothing."""
        try:
            try:
                return split_strings(await self._call(Operation.DIRECTORY, path, "list the key"))
            except _TooLongError:
                return await self._list_in_parts(path)
        except _MissingError:
            return []

    async def write(self, path: str, value: str | int) -> None:
        """Set a key; what is missing above it is made."""
        await self._change(Operation.WRITE, path, "write the key", to_bytes(str(value)))

    async def make_directory(self, path: str) -> None:
        """Make a key without a value, unless it is there already."""
        await self._change(Operation.MAKE_DIRECTORY, path, "make the key")

    async def remove(self, path: str) -> None:
        """Remove a key and all below it, if it is there."""
        try:
            await self._call(Operation.REMOVE, path, "remove the key")
        except _MissingError:
            return

    async def permissions(self, path: str) -> builtins.list[str]:
        """Who may use a key, as `set_permissions` has it; empty if it is not there."""
        try:
            return split_strings(await self._call(Operation.GET_PERMISSIONS, path, "read the permissions of the key"))
        except _MissingError:
            return []

    async def set_permissions(self, path: str, permissions: Sequence[str]) -> None:
        """Say who may use a key: "n0" names its owner and the right of all others (n, r, w, b), "r3" domain 3's."""
        await self._change(
            Operation.SET_PERMISSIONS, path, "set the permissions of the key", join_strings(*permissions)
        )

    async def _change(self, operation: Operation, path: str, doing: str, payload: bytes = b"") -> None:
        try:
            await self._call(operation, path, doing, payload)
        except _MissingError as error:
            raise ImageError(ErrorKind.NOT_FOUND, f"cannot {doing}: it is not there", path=path, op=doing) from error

    async def _call(self, operation: Operation, path: str, doing: str, payload: bytes = b"") -> bytes:
        _check_path(path)
        try:
            return await self._connection.call(operation, join_strings(path) + payload, self._transaction)
        except RefusedError as refusal:
            raise _error_of(refusal.number, path, doing) from refusal
        except ImageError as error:
            if error.path is None:
                error.path = path
            raise

    async def _list_in_parts(self, path: str) -> builtins.list[str]:
        """A list that is too long for one message, read until it did not change meanwhile."""
        generation, names = None, b""
        while True:
            offset = str(len(names))
            part = await self._call(Operation.DIRECTORY_PART, path, "list the key", join_strings(offset))
            current, _, more = part.partition(b"\0")
            if generation is not None and current != generation:
                generation, names = None, b""
                continue
            generation = current
            names += more
            # An empty name ends the list.
            if more in (b"", b"\0") or more.endswith(b"\0\0"):
                return [name for name in split_strings(names) if name]


class Watch:
    """Yields the paths that fired; a path that fires again before it was taken is yielded once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._fired: dict[str, None] = {}
        self._news = trio.Event()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        await trio.lowlevel.checkpoint()
        while not self._fired:
            self._connection.check()
            self._news = trio.Event()
            await self._news.wait()
        path = next(iter(self._fired))
        del self._fired[path]
        return path

    def fire(self, path: str) -> None:
        """Note an event."""
        self._fired[path] = None
        self._news.set()

    def wake(self) -> None:
        """Have the waiting task look whether the connection is lost."""
        self._news.set()


class XenStore(Store):
    """A connection's keys, transactions and watches."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._watches: dict[str, Watch] = {}
        self._last_token = 0
        connection.on_event(self._fire, self._lose)

    @property
    def lost(self) -> bool:
        """Whether the connection is lost: nothing is answered any more."""
        return self._connection.lost

    async def transact(self, change: Callable[[Store], Awaitable[_Result]]) -> _Result:
        """The result of `change`, which sees and makes all its changes at one moment.

        It is called again when others changed meanwhile what it read or wrote. If it raises, nothing is changed.
        Cancelled in the end, it may have happened or not.
        """
        tries = 0
        while True:
            transaction = await self._start_transaction()
            ended = False
            try:
                result = await change(Store(self._connection, transaction))
                ended = True
                await self._connection.call(Operation.TRANSACTION_END, join_strings("T"), transaction)
            except RefusedError as refusal:
                if refusal.number != errno.EAGAIN:
                    raise _error_of(refusal.number, None, "end the transaction") from refusal
            else:
                return result
            finally:
                if not ended:
                    self._abort(transaction)
            tries += 1
            await trio.sleep(min(tries * _CONFLICT_PAUSE, _CONFLICT_PAUSE_LIMIT))

    @asynccontextmanager
    async def watch(self, *paths: str) -> AsyncGenerator[AsyncIterator[str]]:
        """What happens at these keys and below them. Each path is yielded once at first."""
        self._last_token += 1
        token = f"tapfs-{self._last_token}"
        watch = self._watches[token] = Watch(self._connection)
        set_up: list[str] = []
        try:
            for path in dict.fromkeys(paths):
                _check_path(path)
                set_up.append(path)
                try:
                    await self._connection.call(Operation.WATCH, join_strings(path, token))
                except RefusedError as refusal:
                    set_up.pop()
                    raise _error_of(refusal.number, path, "watch the key") from refusal
            yield watch
        finally:
            del self._watches[token]
            for path in set_up:
                self._connection.dismiss(Operation.UNWATCH, join_strings(path, token))

    async def _start_transaction(self) -> int:
        try:
            reply = await self._connection.call(Operation.TRANSACTION_START, b"\0", late=self._abort_unused)
        except RefusedError as refusal:
            raise _error_of(refusal.number, None, "start a transaction") from refusal
        number = _number(reply)
        if number is None:
            raise ImageError(ErrorKind.IO, "xenstored gave a transaction no number", op="start a transaction")
        return number

    def _abort_unused(self, reply: bytes) -> None:
        number = _number(reply)
        if number is not None:
            self._abort(number)

    def _abort(self, transaction: int) -> None:
        self._connection.dismiss(Operation.TRANSACTION_END, join_strings("F"), transaction)

    def _fire(self, path: str, token: str) -> None:
        watch = self._watches.get(token)
        if watch is not None:
            watch.fire(path)

    def _lose(self) -> None:
        for watch in self._watches.values():
            watch.wake()


@asynccontextmanager
async def connect(host: Host) -> AsyncGenerator[XenStore]:
    """A connection to the host's xenstored, for as long as the context lasts.

    Raises ImageError(unsupported, denied, io). If xenstored goes away, every call and watch raises ImageError(io).
    """
    connection = Connection(host.xenstore)
    try:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(connection.run_reader)
            tasks.start_soon(connection.run_writer)
            yield XenStore(connection)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:  # the caller's, wrapped by the nursery
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise
    finally:
        connection.close()


class _MissingError(ImageError):
    """The key is not there."""


class _TooLongError(ImageError):
    """The answer does not fit into a message."""


def _check_path(path: str) -> None:
    # A NUL would be read as the end of it.
    if not path or "\0" in path or len(to_bytes(path)) > PATH_MAXIMUM:
        raise ImageError(ErrorKind.INVALID_FORMAT, "is no path of a key", path=path[:64], op="use xenstore")


def _number(reply: bytes) -> int | None:
    """The number of a transaction; 0 would be none."""
    text = to_text(reply.partition(b"\0")[0])
    return int(text) or None if text.isascii() and text.isdigit() and len(text) <= 10 else None


def _error_of(number: int, path: str | None, doing: str) -> ImageError:
    if number == errno.ENOENT:
        return _MissingError(ErrorKind.NOT_FOUND, f"cannot {doing}", path=path, op=doing)
    if number == errno.E2BIG:
        return _TooLongError(ErrorKind.OUT_OF_BOUNDS, f"cannot {doing}: it is too long", path=path, op=doing)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return ImageError(ErrorKind.NO_SPACE, f"cannot {doing}: xenstore's quota is used up", path=path, op=doing)
    return from_os_error(OSError(number, ""), path=path, op=doing)
