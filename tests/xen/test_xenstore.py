"""The client of xenstore, against a xenstored that speaks the real protocol; what Xen's own would do, too."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.device import find_domain, our_devices
from tapfs.xen.host import Host
from tapfs.xen.xenstore import connection
from tapfs.xen.xenstore.client import Store, XenStore, connect
from tapfs.xen.xenstore.wire import HEADER, Assembler, Message, Operation, ProtocolError, errno_of, join_strings
from tests.conftest import REPOSITORY
from tests.xen.machine import Machine
from tests.xen.xenstored import Xenstored, guest_socket

PATIENCE = 30.0


@pytest.fixture
async def store(xenstored: Xenstored, host: Host) -> AsyncIterator[XenStore]:
    async with connect(host) as connected:
        yield connected


@pytest.fixture
async def other(xenstored: Xenstored, host: Host) -> AsyncIterator[XenStore]:
    """Another connection."""
    async with connect(host) as connected:
        yield connected


# -- keys


async def test_keys_are_written_and_read(store: Store) -> None:
    await store.write("/tool/tapfs/a", "some words\nand more")
    await store.write("/tool/tapfs/b", 17)
    assert await store.read("/tool/tapfs/a") == "some words\nand more"
    assert await store.read("/tool/tapfs/b") == "17"
    assert await store.read("/tool/tapfs") == ""
    assert sorted(await store.list("/tool/tapfs")) == ["a", "b"]
    await store.remove("/tool/tapfs/a")
    assert await store.list("/tool/tapfs") == ["b"]


async def test_what_is_not_there_is_none(store: Store) -> None:
    assert await store.read("/tool/nothing") is None
    assert await store.list("/tool/nothing") == []
    await store.remove("/tool/nothing")
    await store.remove("/nor/what/it/would/be/in")
    await store.make_directory("/tool/empty")
    await store.make_directory("/tool/empty")
    assert await store.read("/tool/empty") == ""
    assert await store.list("/tool/empty") == []
    with pytest.raises(ImageError, match=r"^/tool/nothing: cannot set the permissions of the key: it is not there$"):
        await store.set_permissions("/tool/nothing", ["n0"])


async def test_any_file_name_is_a_value(store: Store) -> None:
    name = os.fsdecode(b"/images/\xff\xfe\xc3\xa4.qcow")
    await store.write("/tool/tapfs/name", name)
    assert await store.read("/tool/tapfs/name") == name


async def test_a_list_longer_than_a_message(store: Store) -> None:
    names = [f"{number}-{'x' * (number % 40)}" for number in range(400)]
    async with trio.open_nursery() as writers:
        for name in names:
            writers.start_soon(store.write, f"/tool/tapfs/{name}", "")
    assert sorted(await store.list("/tool/tapfs")) == sorted(names)


async def test_a_list_that_changes_while_it_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(500):
        await store.write(f"/tool/tapfs/{number:>011}", "")
    real, parts = store._call, []

    async def call(operation: Operation, path: str, doing: str, payload: bytes = b"") -> bytes:
        reply = await real(operation, path, doing, payload)
        if operation is Operation.DIRECTORY_PART:
            parts.append(payload)
            if len(parts) == 1:
                await store.remove("/tool/tapfs/00000000000")
        return reply

    monkeypatch.setattr(store, "_call", call)
    assert len(await store.list("/tool/tapfs")) == 499
    assert parts.count(b"0\0") == 2


async def test_permissions_are_written(store: Store) -> None:
    await store.write("/tool/tapfs/a", "")
    await store.set_permissions("/tool/tapfs/a", ["n0", "r3", "b4"])
    permissions = await store._connection.call(Operation.GET_PERMISSIONS, join_strings("/tool/tapfs/a"))
    assert permissions == b"n0\0r3\0b4\0"


@pytest.mark.parametrize("path", ["", "/a\0b", "/" + "a" * 3073])
async def test_no_path(store: Store, path: str) -> None:
    with pytest.raises(ImageError, match="is no path of a key") as raised:
        await store.read(path)
    assert raised.value.kind is ErrorKind.INVALID_FORMAT


async def test_errors_name_the_key(store: Store) -> None:
    with pytest.raises(ImageError, match=r"^/tool//x: cannot write the key: Invalid argument$") as raised:
        await store.write("/tool//x", "")
    assert raised.value.path == "/tool//x"
    with pytest.raises(ImageError, match=r"^/tool/x: 5030 bytes do not fit into a message$") as raised:
        await store.write("/tool/x", "v" * 5006)
    assert raised.value.kind is ErrorKind.OUT_OF_BOUNDS
    assert await store.read("/tool/x") is None


async def test_the_longest_message_is_taken(store: Store) -> None:
    value = "v" * (4096 - HEADER.size - len("/tool/x") - 1)
    await store.write("/tool/x", value)
    assert await store.read("/tool/x") == value
    with pytest.raises(ImageError, match="4097 bytes do not fit"):
        await store.write("/tool/x", value + "v")


async def test_many_tasks_get_their_own_replies(store: Store) -> None:
    async def ask(number: int) -> None:
        await store.write(f"/tool/tapfs/{number}", number)
        for _ in range(5):
            assert await store.read(f"/tool/tapfs/{number}") == str(number)
            assert await store.read(f"/tool/tapfs/{number}/none") is None

    async with trio.open_nursery() as askers:
        for number in range(50):
            askers.start_soon(ask, number)


# -- cancellation


async def test_a_cancelled_call_is_made_whole_and_its_reply_dropped(store: Store) -> None:
    with trio.move_on_after(0):
        await store.write("/tool/tapfs/a", "v" * 3000)
    with trio.move_on_after(0):
        await store.read("/tool/tapfs/a")
    assert await store.read("/tool/tapfs/a") == "v" * 3000


async def test_a_message_is_never_left_half_sent(store: Store) -> None:
    """More than the socket takes at once, cancelled while it is being written."""
    with trio.move_on_after(0):
        async with trio.open_nursery() as writers:
            for number in range(500):
                writers.start_soon(store.write, f"/tool/tapfs/{number}", "v" * 3000)
    await store.write("/tool/tapfs/end", "reached")
    assert await store.read("/tool/tapfs/end") == "reached"
    assert len(await store.list("/tool/tapfs")) == 501


async def test_a_socket_that_takes_little_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    await store.write("/tool/tapfs/a", "some words")
    assert await store.read("/tool/tapfs/a") == "some words"


async def test_a_cancelled_transaction_changes_nothing(store: XenStore, other: XenStore) -> None:
    await store.write("/tool/tapfs/a", 1)

    async def change(keys: Store) -> None:
        await keys.write("/tool/tapfs/a", 2)
        await trio.sleep_forever()

    with trio.move_on_after(0.05):
        await store.transact(change)
    assert await other.read("/tool/tapfs/a") == "1"


async def test_cancelled_transactions_are_not_left_open(store: XenStore, xenstored: Xenstored) -> None:
    async def change(keys: Store) -> None:
        await keys.read("/tool")

    for ticks in range(40):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as tasks:
                tasks.start_soon(store.transact, change)
                for _ in range(ticks):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
    # More of them than xenstored lets anyone have at once.
    await store.transact(change)
    assert not any(connection.transactions for connection in xenstored.connections)


async def test_a_reply_that_comes_with_the_cancellation(machine: object, host: Host) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(host.xenstore)
        listener.listen()
        async with connect(host) as store, trio.open_nursery() as tasks:
            theirs, _ = listener.accept()
            with theirs:
                tasks.start_soon(store.transact, lambda keys: keys.read("/tool"))
                await trio.testing.wait_all_tasks_blocked()
                (start,) = Assembler().feed(theirs.recv(1000))
                tasks.cancel_scope.cancel()
                store._connection._dispatch(start._replace(payload=b"17\0"))
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked()
                (end,) = Assembler().feed(theirs.recv(1000))
                assert end == Message(Operation.TRANSACTION_END, end.request, 17, b"F\0")


# -- transactions


async def test_a_transaction_is_seen_as_one(store: XenStore, other: XenStore) -> None:
    async def change(keys: Store) -> str:
        await keys.write("/tool/tapfs/a", 1)
        assert await keys.read("/tool/tapfs/a") == "1"
        assert await other.read("/tool/tapfs/a") is None
        await keys.write("/tool/tapfs/b", 2)
        await keys.set_permissions("/tool/tapfs", ["n0", "r3"])
        return "result"

    assert await store.transact(change) == "result"
    assert [await other.read(f"/tool/tapfs/{name}") for name in "ab"] == ["1", "2"]


async def test_an_overtaken_transaction_is_made_again(store: XenStore, other: XenStore) -> None:
    await store.write("/tool/tapfs/count", 0)
    tries = []

    async def add_one(keys: Store) -> None:
        count = int(await keys.read("/tool/tapfs/count") or 0)
        tries.append(count)
        if len(tries) < 3:
            await other.write("/tool/tapfs/count", 10 * len(tries))
        await keys.write("/tool/tapfs/count", count + 1)

    await store.transact(add_one)
    assert tries == [0, 10, 20]
    assert await store.read("/tool/tapfs/count") == "21"


async def test_counting_together(store: XenStore, other: XenStore) -> None:
    async def add_one(keys: Store) -> None:
        await keys.write("/tool/tapfs/count", int(await keys.read("/tool/tapfs/count") or 0) + 1)

    async def count(who: XenStore) -> None:
        for _ in range(5):
            await who.transact(add_one)

    async with trio.open_nursery() as counters:
        for who in (store, other, store):
            counters.start_soon(count, who)
    assert await store.read("/tool/tapfs/count") == "15"


async def test_a_transaction_that_raises_changes_nothing(store: XenStore) -> None:
    async def change(keys: Store) -> None:
        await keys.write("/tool/tapfs/a", 1)
        raise ImageError(ErrorKind.EXISTS, "it is there already")

    with pytest.raises(ImageError, match="it is there already"):
        await store.transact(change)
    assert await store.read("/tool/tapfs/a") is None


# -- watches


async def test_watches_fire_at_first_and_for_what_is_below(store: XenStore, other: XenStore) -> None:
    async with store.watch("/tool/tapfs", "/tool/other") as events:
        assert {await anext(events), await anext(events)} == {"/tool/tapfs", "/tool/other"}
        for change in ("/tool/tapfs/a/b", "/tool/other", "/tool/tapfs"):
            await other.write(change, "")
            assert await anext(events) == change
        await other.write("/tool/third", "")
        await other.remove("/tool/tapfs/a/b")
        assert await anext(events) == "/tool/tapfs/a/b"


async def test_a_watch_hears_that_what_it_is_in_was_removed(store: XenStore) -> None:
    await store.write("/tool/tapfs/a/b", "")
    async with store.watch("/tool/tapfs/a/b") as events:
        await anext(events)
        await store.remove("/tool/tapfs")
        assert await anext(events) == "/tool/tapfs/a/b"


async def test_events_that_wait_are_merged(store: XenStore) -> None:
    async with store.watch("/tool/tapfs") as events:
        await anext(events)
        for number in range(20):
            await store.write("/tool/tapfs/a", number)
        await store.write("/tool/tapfs/b", "")
        assert [await anext(events), await anext(events)] == ["/tool/tapfs/a", "/tool/tapfs/b"]
        with trio.move_on_after(0.02) as waiting:
            await anext(events)
        assert waiting.cancelled_caught


async def test_watches_do_not_mix(store: XenStore) -> None:
    async with store.watch("/tool/tapfs") as one, store.watch("/tool/tapfs/a") as two:
        await anext(one)
        await anext(two)
        await store.write("/tool/tapfs/b", "")
        await store.write("/tool/tapfs/a", "")
        assert [await anext(one), await anext(one)] == ["/tool/tapfs/b", "/tool/tapfs/a"]
        assert await anext(two) == "/tool/tapfs/a"
    async with store.watch("/tool/tapfs") as again:
        assert await anext(again) == "/tool/tapfs"


async def test_a_watch_is_taken_back(store: XenStore, xenstored: Xenstored) -> None:
    async with store.watch("/tool/tapfs", "/tool/tapfs"):
        assert sum(len(connection.watches) for connection in xenstored.connections) == 1
    await store.read("/tool")
    assert not any(connection.watches for connection in xenstored.connections)


async def test_a_watch_that_is_refused(store: XenStore) -> None:
    with pytest.raises(ImageError, match=r"^/tool//x: cannot watch the key: Invalid argument$"):
        async with store.watch("/tool", "/tool//x"):
            pass


async def test_a_transaction_fires_when_it_is_done(store: XenStore, other: XenStore) -> None:
    async with other.watch("/tool/tapfs/a") as events:
        await anext(events)

        async def change(keys: Store) -> None:
            await keys.write("/tool/tapfs/a", 1)
            with trio.move_on_after(0.02) as waiting:
                await anext(events)
            assert waiting.cancelled_caught

        await store.transact(change)
        assert await anext(events) == "/tool/tapfs/a"


# -- losing the connection


async def test_a_lost_connection_raises_everywhere(machine: object, host: Host) -> None:
    """A xenstored that answers nothing and then goes."""
    caught: list[ImageError] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(host.xenstore)
        listener.listen()

        async def ask(store: XenStore) -> None:
            with pytest.raises(ImageError) as raised:
                await store.read("/tool")
            caught.append(raised.value)

        async def watch(store: XenStore) -> None:
            with pytest.raises(ImageError) as raised:
                async with store.watch("/tool"):
                    pass
            caught.append(raised.value)

        async with connect(host) as store, trio.open_nursery() as askers:
            theirs, _ = listener.accept()
            for _ in range(3):
                askers.start_soon(ask, store)
            askers.start_soon(watch, store)
            await trio.testing.wait_all_tasks_blocked()
            theirs.close()
        assert len(caught) == 4
        for error in caught:
            assert error.kind is ErrorKind.IO
            assert str(error) == f"{host.xenstore}: xenstored is gone: it has closed the connection"


async def test_a_watch_ends_with_the_connection(machine: object, host: Host, nursery: trio.Nursery) -> None:
    server = await nursery.start(_run_until_cancelled, Path(host.xenstore).parent)
    async with connect(host) as store, store.watch("/tool") as events:
        await anext(events)
        await store.write("/tool/a", "")
        server.cancel()
        with pytest.raises(ImageError, match="xenstored is gone"):
            async for _ in events:
                pass
        with pytest.raises(ImageError, match="xenstored is gone"):
            await store.write("/tool", "")
        with pytest.raises(ImageError, match="xenstored is gone"):
            await store.transact(lambda keys: keys.read("/tool"))


async def _run_until_cancelled(
    directory: Path, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as tasks:
            await tasks.start(Xenstored(directory).run)
            task_status.started(scope)


async def test_who_speaks_another_protocol_is_left(machine: object, host: Host) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(host.xenstore)
        listener.listen()
        async with connect(host) as store:
            theirs, _ = listener.accept()
            with theirs:
                theirs.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                with pytest.raises(ImageError, match="it does not speak xenstore's protocol"):
                    await store.read("/tool")


async def test_a_transaction_without_a_number_is_none(machine: object, host: Host, nursery: trio.Nursery) -> None:
    """As transaction 0 its changes would be made one by one."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(host.xenstore)
        listener.listen()
        async with connect(host) as store:
            theirs = trio.SocketStream(trio.socket.from_stdlib_socket(listener.accept()[0]))
            nursery.start_soon(_answer_as_the_kernel, theirs)
            with pytest.raises(ImageError, match="xenstored gave a transaction no number"):
                await store.transact(lambda keys: keys.write("/tool", ""))


async def test_no_xenstored(host: Host) -> None:
    with pytest.raises(ImageError, match="no xenstored runs; start Xen's services") as raised:
        async with connect(host):
            pass
    assert raised.value.path == host.xenstore


async def test_the_caller_s_errors_come_out_as_they_are(xenstored: Xenstored, host: Host) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with connect(host):
            raise KeyError("mine")
    with trio.move_on_after(0.01) as scope:
        async with connect(host):
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_the_kernel_s_replies_to_watches(machine: object, host: Host, nursery: trio.Nursery) -> None:
    """/dev/xen/xenbus answers WATCH and UNWATCH without saying which."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(host.xenstore)
        listener.listen()
        async with connect(host) as store:
            theirs = trio.SocketStream(trio.socket.from_stdlib_socket(listener.accept()[0]))
            nursery.start_soon(_answer_as_the_kernel, theirs)
            async with store.watch("/tool/a", "/tool/b") as events, store.watch("/tool/c") as others:
                assert [await anext(events), await anext(events)] == ["/tool/a", "/tool/b"]
                assert await anext(others) == "/tool/c"
            assert await store.read("/tool") == "value"


async def _answer_as_the_kernel(stream: trio.SocketStream) -> None:
    assembler = Assembler()
    async with stream:
        while piece := await stream.receive_some(1000):
            for message in assembler.feed(piece):
                if message.operation in (Operation.WATCH, Operation.UNWATCH):
                    await stream.send_all(Message(message.operation, 0, 0, b"OK\0").encode())
                else:
                    await stream.send_all(message._replace(payload=b"value").encode())
                if message.operation == Operation.WATCH:
                    await stream.send_all(Message(Operation.WATCH_EVENT, 0, 0, message.payload).encode())


async def test_the_kernel_is_asked_one_thing_at_a_time(
    host: Host, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux would send a message with the words of the next one, and at a watch it would stop for ever."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    monkeypatch.setattr(connection, "open_connection", lambda _path: (ours.detach(), True))
    heard: list[tuple[int, int]] = []
    nursery.start_soon(_answer_late, trio.SocketStream(trio.socket.from_stdlib_socket(theirs)), heard)

    async def watch(store: XenStore, path: str) -> None:
        async with store.watch(path) as events:
            await anext(events)

    async with connect(host) as store:
        async with trio.open_nursery() as tasks:
            for name in "abc":
                tasks.start_soon(store.read, f"/tool/{name}")
                tasks.start_soon(watch, store, f"/tool/{name}")
                tasks.start_soon(store.read, f"/tool/{name}/below")
        await store.read("/tool")  # it is sent after all else
    asked = [operation for operation, _ in heard]
    assert asked.count(Operation.WATCH) == asked.count(Operation.UNWATCH) == 3
    assert asked.count(Operation.READ) == 7
    assert [unanswered for _, unanswered in heard] == [0] * 13


async def _answer_late(stream: trio.SocketStream, heard: list[tuple[int, int]]) -> None:
    """Note each operation, and how many other requests have no reply then. Replies come when nothing more does."""
    assembler, waiting = Assembler(), list[Message]()
    async with stream:
        while True:
            piece = b""
            with trio.move_on_after(0.05):
                piece = await stream.receive_some(1000)
                if not piece:
                    return
            for message in assembler.feed(piece):
                heard.append((message.operation, len(waiting)))
                if message.operation == Operation.READ:
                    waiting.append(message._replace(payload=b"value"))
                    continue
                await stream.send_all(Message(message.operation, 0, 0, b"OK\0").encode())
                if message.operation == Operation.WATCH:
                    await stream.send_all(Message(Operation.WATCH_EVENT, 0, 0, message.payload).encode())
            if not piece:
                for reply in waiting:
                    await stream.send_all(reply.encode())
                waiting.clear()


# -- the wire


def test_messages_are_as_the_header_says() -> None:
    message = Message(Operation.WRITE, 7, 9, join_strings("/a") + b"value")
    raw = message.encode()
    assert raw == bytes.fromhex("0b000000 07000000 09000000 08000000") + b"/a\0value"
    for cut in range(len(raw)):
        assembler = Assembler()
        assert [*assembler.feed(raw[:cut]), *assembler.feed(raw[cut:] + raw)] == [message, message]
    with pytest.raises(ProtocolError):
        list(Assembler().feed(HEADER.pack(2, 1, 0, 4097)))


def test_errors_are_names() -> None:
    assert [
        os.strerror(errno_of(name)) for name in (b"EACCES\0", b"ENOENT", b"EQUOTA\0", b"EWHAT\0", b"name", b"")
    ] == [
        "Permission denied",
        "No such file or directory",
        "Disk quota exceeded",
        *["Input/output error"] * 3,
    ]


# -- domains and their disks


async def test_domains_are_found(store: Store, xenstored: Xenstored) -> None:
    xenstored.introduce(3, "mail")
    xenstored.introduce(12, "4")
    assert [await find_domain(store, text) for text in ("3", "mail", "12", "4", "0", "Domain-0")] == [
        3,
        3,
        12,
        12,
        0,
        0,
    ]
    for text in ("5", "web", "", "-1", "99999999999"):
        with pytest.raises(ImageError, match="there is no domain") as raised:
            await find_domain(store, text)
        assert raised.value.kind is ErrorKind.NOT_FOUND


async def test_our_disks_are_told_from_others(store: Store) -> None:
    backend = "/local/domain/0/backend"
    for key, value in {
        "tap/3/51712/state": "1",
        "tap/3/junk/state": "1",
        "vbd/3/51728/script": "/etc/xen/scripts/block-tapfs",
        "vbd/4/51712/script": "block-tapfs",
        "vbd/4/51728/script": "/etc/xen/scripts/block",
        "vbd/4/51744/params": "/dev/block-tapfs",
        "qdisk/4/51760/script": "block-tapfs",
    }.items():
        await store.write(f"{backend}/{key}", value)
    assert [device.backend for device in await our_devices(store)] == [
        f"{backend}/tap/3/51712",
        f"{backend}/vbd/3/51728",
        f"{backend}/vbd/4/51712",
    ]


async def test_xenstored_as_a_process(machine: Machine, host: Host, nursery: trio.Nursery) -> None:
    command = [sys.executable, "-m", "tests.xen.xenstored", str(machine.directory)]
    process = await nursery.start(partial(trio.run_process, command, stdout=subprocess.PIPE, cwd=REPOSITORY))
    assert (await process.stdout.receive_some(100)).strip() == b"ready"
    async with connect(host) as store:
        await store._connection.call(Operation.INTRODUCE, join_strings("3", "mail"))
        assert await find_domain(store, "mail") == 3
        process.terminate()
        with trio.fail_after(PATIENCE):
            assert await process.wait() == 0
            with pytest.raises(ImageError, match="xenstored is gone"):
                await store.read("/tool")


async def test_guests_see_domain_events_and_their_own_keys(store: XenStore, xenstored: Xenstored, host: Host) -> None:
    async with store.watch("@introduceDomain", "@releaseDomain") as events:
        assert {await anext(events), await anext(events)} == {"@introduceDomain", "@releaseDomain"}
        xenstored.introduce(3)
        assert await anext(events) == "@introduceDomain"
        await store.write("/local/domain/3/memory", 128)
        await store.write("/local/domain/0/secret", 1)
        async with connect(Host(str(guest_socket(xenstored.directory, 3)))) as guest:
            assert await guest.read("memory") == "128"
            for path in ("/local/domain/0/secret", "/local/domain/0/none", "/local/domain/0"):
                with pytest.raises(ImageError, match="cannot read the key: Permission denied") as raised:
                    await guest.read(path)
                assert raised.value.kind is ErrorKind.DENIED
            with pytest.raises(ImageError, match="cannot write the key: Permission denied"):
                await guest.write("memory", 256)
        xenstored.destroy(3)
        assert await anext(events) == "@releaseDomain"
        assert await store.read("/local/domain/3") is None
