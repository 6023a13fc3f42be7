"""A xenstored for the simulated machine: Xen's wire protocol over a socket, for domain 0 and for each guest.

`python -m tests.xen.xenstored DIR` serves until it is ended and prints "ready" when it can be asked. Domain 0 speaks at
DIR/xenstored.socket. INTRODUCE makes a domain (who speaks at DIR/domain-D.xenstored is it), and RELEASE ends one.
Unlike Xen's it takes the domain's name as second word, and also makes the keys that libxl makes.
"""

from __future__ import annotations

import argparse
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from tapfs.xen.host import MACHINE_SOCKET
from tapfs.xen.xenstore.wire import (
    HEADER,
    PAYLOAD_MAXIMUM,
    Assembler,
    Message,
    Operation,
    ProtocolError,
    join_strings,
    split_strings,
)
from tests.xen.xenstore_tree import PATH, READABLE, Change, RefusedError, Transaction, Tree

OK = b"OK\0"
PART_RESERVED = 32  # for the generation before the names


def guest_socket(directory: Path, domain: int) -> Path:
    """Where a guest speaks to its xenstored."""
    return directory / f"domain-{domain}.xenstored"


class Connection:
    """One connection: a domain's, with its watches and transactions."""

    def __init__(self, store: Xenstored, domain: int, stream: trio.SocketStream) -> None:
        self.store = store
        self.domain = domain
        self.stream = stream
        self.watches: dict[tuple[str, str], str] = {}
        self.transactions: dict[int, Transaction] = {}
        self.last_transaction = 0
        self.send_messages, self.messages = trio.open_memory_channel[bytes](100_000)

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            assembler = Assembler()
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, ProtocolError):
                while piece := await self.stream.receive_some(HEADER.size + PAYLOAD_MAXIMUM):
                    for message in assembler.feed(piece):
                        self._answer(message)
            nursery.cancel_scope.cancel()

    def fire(self, path: str, *, exact: bool) -> None:
        """Send an event to the watches on a path and, unless `exact`, above it."""
        key = self.store.tree.keys.get(path)
        if key is not None and not key.allows(self.domain, READABLE):
            return
        for (watched, token), given in list(self.watches.items()):
            inside = path == watched or (not exact and (watched == "/" or path.startswith(f"{watched}/")))
            if inside:
                relative = path[len(watched) - len(given) :] if given != watched else path
                self._send(Message(Operation.WATCH_EVENT, 0, 0, join_strings(relative, token)))

    async def _write(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for message in self.messages:
                await self.stream.send_all(message)

    def _send(self, message: Message) -> None:
        self.send_messages.send_nowait(message.encode())

    def _answer(self, message: Message) -> None:
        try:
            operation, payload = message.operation, self._reply(message)
            if len(payload) > PAYLOAD_MAXIMUM:
                raise RefusedError("E2BIG")
        except RefusedError as refusal:
            operation, payload = Operation.ERROR, join_strings(refusal.name)
        except ValueError:
            operation, payload = Operation.ERROR, join_strings("EINVAL")
        self._send(Message(operation, message.request, message.transaction, payload))
        if message.operation == Operation.WATCH and operation == Operation.WATCH:
            given, token = split_strings(message.payload)[:2]
            self._send(Message(Operation.WATCH_EVENT, 0, 0, join_strings(given, token)))

    def _reply(self, message: Message) -> bytes:
        transaction = None
        if message.transaction and message.operation != Operation.WATCH:
            transaction = self.transactions.get(message.transaction)
            if transaction is None:
                raise RefusedError("ENOENT")
        tree = transaction.tree if transaction else self.store.tree
        first, _, rest = message.payload.partition(b"\0")
        match message.operation:
            case Operation.READ:
                return tree.read(self.domain, self._path(first, transaction))
            case Operation.DIRECTORY:
                children = tree.directory(self.domain, self._path(first, transaction)).children
                return join_strings(*children)
            case Operation.DIRECTORY_PART:
                return self._part(tree, self._path(first, transaction), int(split_strings(rest)[0]))
            case Operation.GET_PERMISSIONS if first.startswith(b"@"):
                raise RefusedError("EINVAL")  # as the store of C; that of OCaml tells them
            case Operation.GET_PERMISSIONS:
                return join_strings(*tree.permissions(self.domain, self._path(first, transaction)))
            case Operation.WRITE:
                path = self._path(first, transaction)
                self._change(transaction, lambda keys: keys.write(self.domain, path, rest))
            case Operation.MAKE_DIRECTORY:
                path = self._path(first, transaction)
                self._change(transaction, lambda keys: keys.make_directory(self.domain, path))
            case Operation.REMOVE:
                path = self._path(first, transaction)
                self._change(transaction, lambda keys: keys.remove(self.domain, path))
            case Operation.SET_PERMISSIONS:
                path, wanted = self._path(first, transaction), split_strings(rest)
                self._change(transaction, lambda keys: keys.set_permissions(self.domain, path, wanted))
            case Operation.TRANSACTION_START:
                return self._start_transaction(message)
            case Operation.TRANSACTION_END:
                self._end_transaction(message, first)
            case Operation.WATCH | Operation.UNWATCH:
                self._change_watches(message)
            case _:
                return self._about_domains(message.operation, split_strings(message.payload))
        return OK

    def _about_domains(self, operation: int, words: list[str]) -> bytes:
        if operation == Operation.GET_DOMAIN_PATH:
            return join_strings(f"/local/domain/{int(words[0])}")
        if self.domain != 0:
            raise RefusedError("EACCES")
        match operation:
            case Operation.IS_DOMAIN_INTRODUCED:
                return join_strings("T" if int(words[0]) in self.store.domains else "F")
            case Operation.INTRODUCE:
                self.store.introduce(int(words[0]), *words[1:2])
            case Operation.RELEASE:
                self.store.release(int(words[0]))
            case Operation.RESET_WATCHES:
                self.watches.clear()
                self.transactions.clear()
            case _:
                raise RefusedError("ENOSYS")
        return OK

    def _path(self, given: bytes, transaction: Transaction | None) -> str:
        path = self._absolute(given.decode("ascii"))
        if transaction is not None:
            transaction.touch(path)
        return path

    def _absolute(self, path: str) -> str:
        return path if path.startswith(("/", "@")) else f"/local/domain/{self.domain}/{path}"

    def _part(self, tree: Tree, path: str, offset: int) -> bytes:
        key = tree.directory(self.domain, path)
        names = join_strings(*key.children)[offset:]
        part = names[: PAYLOAD_MAXIMUM - PART_RESERVED]
        if len(part) == len(names):
            part += b"\0"
        else:
            part = part[: part.rindex(b"\0") + 1]
        return join_strings(str(key.generation)) + part

    def _change(self, transaction: Transaction | None, apply: object) -> None:
        if transaction is not None:
            apply(transaction.tree)
            transaction.changes.append(apply)
        else:
            self.store.fire([apply(self.store.tree)])

    def _start_transaction(self, message: Message) -> bytes:
        if message.transaction:
            raise RefusedError("EBUSY")
        self.last_transaction += 1
        self.transactions[self.last_transaction] = Transaction(self.store.tree)
        return join_strings(str(self.last_transaction))

    def _end_transaction(self, message: Message, word: bytes) -> None:
        if word not in (b"T", b"F"):
            raise RefusedError("EINVAL")
        transaction = self.transactions.pop(message.transaction, None)
        if transaction is None:
            raise RefusedError("ENOENT")
        if word == b"T":
            self.store.fire(transaction.commit(self.store.tree))

    def _change_watches(self, message: Message) -> None:
        given, token = split_strings(message.payload)[:2]
        watch = (self._absolute(given), token)
        if not given.startswith("@") and not PATH.fullmatch(watch[0]):
            raise RefusedError("EINVAL")
        if message.operation == Operation.WATCH:
            if watch in self.watches:
                raise RefusedError("EEXIST")
            self.watches[watch] = given
        elif self.watches.pop(watch, None) is None:
            raise RefusedError("ENOENT")


class Xenstored:
    """The keys, the domains and the connections."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tree = Tree()
        self.domains: dict[int, trio.CancelScope] = {}
        self.connections: set[Connection] = set()
        self._nursery: trio.Nursery | None = None
        self.write("/local/domain/0/name", "Domain-0")
        self.write("/local/domain/0/domid", "0")

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._listen(0, self.directory / MACHINE_SOCKET)
            task_status.started()
            await trio.sleep_forever()

    def introduce(self, domain: int, name: str | None = None, *, driver_domain: bool = False) -> None:
        """A new guest, with the keys that libxl makes for it."""
        if domain == 0 or domain in self.domains:
            raise RefusedError("EINVAL")
        path = f"/local/domain/{domain}"
        self.fire([self.tree.make_directory(0, path)])
        self.fire([self.tree.set_permissions(0, path, ["n0", f"r{domain}"])])
        self.write(f"{path}/name", name or f"guest-{domain}")
        self.write(f"{path}/domid", str(domain))
        self.fire([self.tree.make_directory(0, f"{path}/device")])
        own = [f"{path}/control/shutdown", *([f"{path}/libxl"] if driver_domain else [])]
        for key in own:
            self.fire([self.tree.make_directory(0, key)])
            self.fire([self.tree.set_permissions(0, key, [f"n{domain}"])])
        self._listen(domain, guest_socket(self.directory, domain))
        self.fire([Change("@introduceDomain")])

    def release(self, domain: int) -> None:
        """The guest ends; its keys stay until the toolstack removes them."""
        if domain not in self.domains:
            raise RefusedError("ENOENT")
        self.domains.pop(domain).cancel()
        guest_socket(self.directory, domain).unlink()
        self.fire([Change("@releaseDomain")])

    def destroy(self, domain: int) -> None:
        """The guest ends and its keys go, as `xl destroy` does it for all but the backends that are not its own."""
        self.release(domain)
        self.fire([self.tree.remove(0, f"/local/domain/{domain}")])

    def write(self, path: str, value: str) -> None:
        """Set a key as domain 0."""
        self.fire([self.tree.write(0, path, value.encode())])

    def read(self, path: str) -> str | None:
        """A key's value, if it is there."""
        key = self.tree.keys.get(path)
        return None if key is None else key.value.decode()

    def fire(self, changes: list[Change | None]) -> None:
        """Tell all watches."""
        for change in filter(None, changes):
            for connection in self.connections:
                for path in change.removed:
                    connection.fire(path, exact=True)
                connection.fire(change.path, exact=False)

    def _listen(self, domain: int, path: Path) -> None:
        path.unlink(missing_ok=True)
        listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        # Binding a path is done at once, but trio's own bind is asynchronous for the sake of host names.
        listener._sock.bind(str(path))
        listener.listen(64)
        scope = trio.CancelScope()
        if domain:
            self.domains[domain] = scope
        assert self._nursery is not None
        self._nursery.start_soon(self._accept, domain, listener, scope)

    async def _accept(self, domain: int, listener: trio.socket.SocketType, scope: trio.CancelScope) -> None:
        with scope:
            await trio.serve_listeners(partial(self._serve, domain), [trio.SocketListener(listener)])

    async def _serve(self, domain: int, stream: trio.SocketStream) -> None:
        connection = Connection(self, domain, stream)
        self.connections.add(connection)
        try:
            async with stream:
                await connection.serve()
        finally:
            self.connections.discard(connection)


async def serve(directory: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(Xenstored(directory).run)
            print("ready", flush=True)  # noqa: T201
            async for _ in signals:
                nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    trio.run(serve, parser.parse_args().directory)
