"""Pause, resume, swap, resize, limit: under load, over a crash, and when they fail."""

from __future__ import annotations

import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.xen.device import State
from tapfs.xen.xenstore.wire import Message, Operation
from tests.xen import xenstored as xenstored_server
from tests.xen.disk_device import DISK_BYTES, DONE, STOPPED, Devices, DiskDevice
from tests.xen.frontend import Frontend, Ring
from tests.xen.machine import PATIENCE
from tests.xen.xenbus_frontend import XenbusFrontend

SIZE = DISK_BYTES
SECTORS = SIZE // 512


class Load:
    """A guest that writes sectors and reads them again, one after the other; each holds the number of its write."""

    def __init__(self, frontend: Frontend, ring: Ring) -> None:
        self._frontend, self._ring = frontend, ring
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error: BaseException | None = None
        #: What was acknowledged, by sector.
        self.written: dict[int, bytes] = {}
        self.count = 0

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                sector = self.count * 37 % SECTORS
                data = (self.count + 1).to_bytes(8, "little") * 64
                self._frontend.write(sector, data, ring=self._ring)
                self.written[sector] = data
                assert self._frontend.read(sector, 1, ring=self._ring) == data
                self.count += 1
        except BaseException as error:  # noqa: BLE001  shown by the test's own thread
            self.error = error

    async def progress(self, count: int = 20) -> None:
        """Wait until it has done so many more."""
        end = self.count + count
        with trio.fail_after(PATIENCE):
            while self.count < end and self.error is None:
                await trio.sleep(0.002)
        if self.error is not None:
            raise self.error

    async def stop(self) -> dict[int, bytes]:
        """End it; what it has written."""
        self._ending.set()
        await trio.to_thread.run_sync(self._thread.join)
        if self.error is not None:
            raise self.error
        return self.written

    def abandon(self) -> None:
        self._ending.set()

    def start(self) -> None:
        self._thread.start()


@contextmanager
def load_on(guest: XenbusFrontend) -> Iterator[Load]:
    """A guest at work on the last of its rings."""
    load = Load(guest.frontend, guest.frontend.rings[-1])
    load.start()
    try:
        yield load
    finally:
        load.abandon()


def check_written(path: Path, written: dict[int, bytes], **options: object) -> None:
    assert written
    with tapfs.open(path, **options) as opened:  # type: ignore[arg-type]
        for sector, data in written.items():
            assert opened.read(sector * 512, 512) == data, sector


async def test_pause_brings_the_image_to_rest(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest:
        await guest.connect()
        with load_on(guest) as load:
            await load.progress()
            await disk.ask("pause")
            await disk.ask("pause")  # once more is no error
            assert await disk.read("tapfs/paused") == "1"
            assert (await disk.ask("status"))["paused"] is True
            copied = tmp_path / "copied.qcow"
            shutil.copy(qcow, copied)
            seen = dict(load.written)
            await trio.sleep(0.05)
            assert qcow.read_bytes() == copied.read_bytes()
            assert load.count <= len(seen) + 1
            await disk.ask("resume")
            assert await disk.read("tapfs/paused") is None
            await load.progress()
            written = await load.stop()
        await guest.close()
    await disk.detach()
    check_written(qcow, written)
    # At rest means whole: a copy made meanwhile is an image with all that was acknowledged.
    assert tapfs.check(copied).corruptions == 0
    check_written(copied, {sector: data for sector, data in seen.items() if written[sector] == data})


async def test_a_pause_outlives_the_process(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        await disk.ask("pause")
        await disk.ask("limit", bytes=1 << 30)
        await disk.kill()
        disk.start()
        with load_on(guest) as load:
            await disk.await_log("paused")
            await devices.await_socket(disk)
            assert (await disk.ask("status"))["paused"] is True
            assert (await disk.ask("status"))["limit_bytes"] == 1 << 30
            assert load.count == 0
            await disk.ask("resume")
            await load.progress()
            await load.stop()
        assert frontend.read(0, 1) != bytes(512)


async def test_a_paused_disk_can_be_detached(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        await guest.connect()
        await disk.ask("pause")
        await guest.close()
        await disk.detach()
    assert await disk.ended() == DONE


async def test_a_paused_disk_is_not_connected_before_it_is_resumed(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}", paused=1)
    async with devices.guest(disk) as guest:
        frontend = await guest.publish()
        await trio.sleep(0.1)
        assert (await disk.ask("status"))["connected"] is False
        assert await disk.state() is State.INIT_WAIT
        await disk.ask("resume")
        await guest.await_backend(State.CONNECTED)
        await guest.set_state(State.CONNECTED)
        assert frontend.read(0, 1) == bytes(512)


async def test_a_live_snapshot(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "over.qcow"
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk, queues=2) as guest:
        await guest.connect()
        with load_on(guest) as load:
            await load.progress()
            seen = dict(load.written)
            await disk.ask("swap", keep_names=True, file=str(overlay))
            before = qcow.read_bytes()
            await load.progress()
            assert qcow.read_bytes() == before
            assert await disk.read("tapfs/spec") == f"tap:qcow:{overlay}"
            assert await disk.read("tapfs/backing-formats") == "qcow"
            status = await disk.ask("status")
            assert status["path"] == str(overlay)
            assert status["parents"] == [str(qcow)]
            # Others may read what is below, but not write it.
            with tapfs.open(qcow) as opened:
                assert opened.size == SIZE
            with pytest.raises(ImageError) as raised:
                tapfs.open(qcow, writable=True)
            assert raised.value.kind is ErrorKind.LOCKED
            written = await load.stop()
        await guest.close()
    await disk.detach()
    check_written(overlay, written)
    check_written(qcow, {sector: data for sector, data in seen.items() if written[sector] == data})
    assert tapfs.check(overlay).corruptions == 0


async def test_snapshots_on_snapshots_survive_a_kill(devices: Devices, raw: Path, tmp_path: Path) -> None:
    """The disk below is raw and looks like a qcow image with a backing file: a guest can write that."""
    disk = await devices.serve(f"tap:aio:{raw}")
    forged = tmp_path / "forged.qcow"
    tapfs.create(str(forged), "qcow", SIZE, backing="/etc/passwd", backing_format="raw")
    header = forged.read_bytes()[:4096].ljust(4096, b"\0")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, header)
        for number in range(3):
            await disk.ask("swap", keep_names=True, file=str(tmp_path / f"over-{number}"))
            frontend.write(8 + number, bytes([number]) * 512)
        assert await disk.read("tapfs/backing-formats") == "qcow,qcow,raw"
        frontend.flush()
        await disk.kill()
        disk.start()
        data = await trio.to_thread.run_sync(frontend.read, 0, 11)
        assert data == header + b"".join(bytes([number]) * 512 for number in range(3))
        assert (await disk.ask("status"))["path"] == str(tmp_path / "over-2")
        with load_on(guest) as load:
            await load.progress()
            await load.stop()


async def test_a_snapshot_of_a_paused_disk(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, b"a" * 512)
        await disk.ask("pause")
        await disk.ask("swap", keep_names=True, file=str(tmp_path / "over"))
        assert (await disk.ask("status"))["paused"] is True
        await disk.ask("resume")
        assert frontend.read(0, 1) == b"a" * 512


async def test_a_larger_overlay_is_a_larger_disk(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest, trio.open_nursery() as nursery:
        frontend = await guest.connect()
        frontend.write(0, b"a" * 512)
        nursery.start_soon(guest.await_sectors, 2 * SECTORS)
        await disk.ask("swap", keep_names=True, file=str(tmp_path / "over"), size=2 * SIZE)
        frontend.write(2 * SECTORS - 1, b"b" * 512)
        assert frontend.read(2 * SECTORS - 2, 2) == bytes(512) + b"b" * 512
        assert frontend.read(0, 1) == b"a" * 512


async def test_an_empty_overlay_that_is_there_is_taken_up(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "over"
    tapfs.create(str(overlay), "qcow", backing=str(qcow), backing_format="qcow")
    disk = await devices.serve(f"tap:qcow:{qcow}", write_base=1)
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, b"a" * 512)
        await disk.ask("swap", keep_names=True, file=str(overlay))
        frontend.write(1, b"b" * 512)
        assert frontend.read(0, 2) == b"a" * 512 + b"b" * 512


async def test_an_overlay_with_something_in_it_is_refused(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    """Last week's clusters would appear below the file system that the guest has mounted."""
    overlay = tmp_path / "over"
    tapfs.create(str(overlay), "qcow", backing=str(qcow), backing_format="qcow")
    with tapfs.open(overlay, writable=True) as opened:
        opened.write(0, b"from before")
    disk = await devices.serve(f"tap:qcow:{qcow}", write_base=1)
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, b"a" * 512)
        assert (await refused(disk, "swap", keep_names=True, file=str(overlay))).kind is ErrorKind.EXISTS
        assert frontend.read(0, 1) == b"a" * 512
    with tapfs.open(overlay, shared=True) as opened:
        assert opened.read(0, 11) == b"from before"


async def refused(disk: DiskDevice, command: str, **arguments: object) -> ImageError:
    with pytest.raises(ImageError) as raised:
        await disk.ask(command, **arguments)
    assert "\n" not in str(raised.value)
    return raised.value


async def test_a_swap_that_fails_keeps_the_disk(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    other, plain, small = tmp_path / "other", tmp_path / "plain", tmp_path / "small"
    plain.write_bytes(b"precious")
    tapfs.create(str(other), "qcow", SIZE)
    tapfs.create(str(small), "qcow", SIZE // 2, backing=str(qcow), backing_format="qcow")
    disk = await devices.serve(f"tap:qcow:{qcow}", write_base=1)
    async with devices.guest(disk) as guest:
        await guest.connect()
        with load_on(guest) as load:
            await load.progress()
            assert (await refused(disk, "swap", keep_names=True, file=str(plain))).kind is ErrorKind.INVALID_FORMAT
            assert (await refused(disk, "swap", keep_names=True, file=str(other))).kind is ErrorKind.EXISTS
            assert (await refused(disk, "swap", keep_names=True, file=str(qcow))).kind is ErrorKind.EXISTS
            assert (await refused(disk, "swap", keep_names=True, file=str(small))).kind is ErrorKind.OUT_OF_BOUNDS
            assert (await refused(disk, "swap", keep_names=True, file="/nowhere/over")).kind is ErrorKind.NOT_FOUND
            assert (await refused(disk, "swap", keep_names=True, file="relative")).kind is ErrorKind.INVALID_FORMAT
            too_small = await refused(disk, "swap", keep_names=True, file=str(tmp_path / "new"), size=SIZE // 2)
            assert too_small.kind is ErrorKind.OUT_OF_BOUNDS
            await load.progress()
            written = await load.stop()
        assert await disk.read("tapfs/spec") is None
        assert plain.read_bytes() == b"precious"
        await guest.close()
    await disk.detach()
    check_written(qcow, written)


async def test_no_room_for_an_overlay(devices: Devices, raw: Path, tmp_path: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    overlay = tmp_path / "over"
    async with devices.guest(disk) as guest:
        await guest.connect()
        with load_on(guest) as load:
            await load.progress()
            assert disk.process is not None
            # A limit of the process stands for a full host: the tables of so large an overlay are larger than the disk.
            resource.prlimit(disk.process.pid, resource.RLIMIT_FSIZE, (SIZE, resource.RLIM_INFINITY))
            assert (
                await refused(disk, "swap", keep_names=True, file=str(overlay), size=1 << 40)
            ).kind is ErrorKind.NO_SPACE
            assert [path.name for path in tmp_path.iterdir()] == [raw.name]
            await load.progress()
            written = await load.stop()
        await guest.close()
    await disk.detach()
    check_written(raw, written, format="raw")


async def test_a_swap_that_fails_late_keeps_the_disk(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "over"
    tapfs.create(str(overlay), "qcow", backing=str(qcow), backing_format="qcow")
    disk = await devices.serve(f"tap:qcow:{qcow}", write_base=1)
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, b"a" * 512)
        # While the guest waits: what would be served cannot be noted for a successor.
        devices.refuse_connections()
        await devices.lose_xenstored()
        error = await refused(disk, "swap", keep_names=True, file=str(overlay))
        assert error.kind is ErrorKind.IO
        devices.refuse_connections(refuse=False)
        frontend.write(1, b"b" * 512)
        assert frontend.read(0, 2) == b"a" * 512 + b"b" * 512
        assert (await disk.ask("status"))["path"] == str(qcow)
        with tapfs.open(overlay, shared=True) as opened:
            assert opened.statistics().bytes_written == 0
        await guest.close()
        await disk.detach()
    check_written(qcow, {0: b"a" * 512, 1: b"b" * 512})


@pytest.mark.parametrize("kind", ["raw", "ram"])
async def test_resize(devices: Devices, raw: Path, ram_name: str, kind: str) -> None:
    params = f"tap:aio:{raw}"
    if kind == "ram":
        tapfs.create(ram_name, "ram", SIZE)
        params = f"tap:{ram_name}"
    disk = await devices.serve(params)
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        with load_on(guest) as load, trio.move_on_after(PATIENCE):
            await load.progress()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.await_sectors, 2 * SECTORS)
                await disk.ask("resize", size=2 * SIZE)
            await load.progress()
            await load.stop()
        frontend.write(2 * SECTORS - 1, b"z" * 512)
        assert frontend.read(2 * SECTORS - 2, 2) == bytes(512) + b"z" * 512
        shrinking = await refused(disk, "resize", size=SIZE)
        assert shrinking.kind is ErrorKind.OUT_OF_BOUNDS
        assert "force=True" in str(shrinking)
        assert (await disk.ask("status"))["size"] == 2 * SIZE
        await disk.ask("resize", size=SIZE, force=True)
        await guest.await_sectors(SECTORS)
        with pytest.raises(OSError, match="error"):
            frontend.read(SECTORS, 1)
        assert (await refused(disk, "resize", size=SIZE + 100)).kind is ErrorKind.OUT_OF_BOUNDS
        assert (await refused(disk, "resize", size=0, force=True)).kind is ErrorKind.OUT_OF_BOUNDS
        # Grown by others.
        if kind == "raw":
            with raw.open("ab") as file:
                file.truncate(3 * SIZE)
            await disk.ask("resize")
            await guest.await_sectors(3 * SECTORS)
            assert frontend.read(3 * SECTORS - 1, 1) == bytes(512)


async def test_what_cannot_be_resized_says_what_can_be_done(devices: Devices, qcow: Path, raw: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    error = await refused(disk, "resize", size=2 * SIZE)
    assert error.kind is ErrorKind.UNSUPPORTED
    assert error.remedy is not None
    assert "swap --size" in error.remedy
    reader = await devices.serve(f"tap:aio:{raw}", "r", vdev="xvdb")
    assert (await refused(reader, "resize", size=2 * SIZE)).kind is ErrorKind.READ_ONLY
    assert raw.stat().st_size == SIZE


async def test_commands_that_make_no_sense(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    for command, arguments in [
        ("explode", {}),
        ("resize", {"size": "large"}),
        ("resize", {"size": -1}),
        ("resize", {"size": True}),
        ("swap", {}),
        ("swap", {"file": 5}),
        ("limit", {"bytes": 1.5}),
    ]:
        assert (await refused(disk, command, **arguments)).kind in (ErrorKind.UNSUPPORTED, ErrorKind.INVALID_FORMAT)
    assert await disk.terminate() == STOPPED
    assert (await refused(disk, "status")).kind is ErrorKind.NOT_FOUND


async def test_a_limit_holds_requests_back(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}", limit_requests=50)
    async with devices.guest(disk) as guest:
        await guest.connect()
        with load_on(guest) as load:
            await load.progress()
            assert (await disk.ask("statistics"))["throttled_ns"] != 0
            await disk.ask("limit", requests=0)
            assert await disk.read("tapfs/limit-requests") == "0"
            await load.progress(5)
            held = (await disk.ask("statistics"))["throttled_ns"]
            await load.progress(200)
            assert (await disk.ask("statistics"))["throttled_ns"] == held
            await disk.ask("limit", bytes=1 << 20)
            assert (await disk.ask("status"))["limit_bytes"] == 1 << 20
            assert (await disk.ask("status"))["limit_requests"] == 0
            await load.progress(5)
            await load.stop()


async def test_a_process_that_ends_before_it_has_answered(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    assert disk.process is not None
    disk.process.send_signal(signal.SIGSTOP)
    found: list[ImageError] = []

    async def ask() -> None:
        found.append(await refused(disk, "status"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await disk.kill()
    assert found[0].kind is ErrorKind.IO
    assert "ended before it had answered" in str(found[0])


async def test_a_signal_does_not_cut_an_operation_in_two(
    devices: Devices, qcow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs xenstore to its end; a process that ends meanwhile neither hangs nor leaves half of it."""
    disk = await devices.serve(f"tap:qcow:{qcow}")
    answer = xenstored_server.Connection._answer
    signalled = False

    def slow_answer(connection: xenstored_server.Connection, message: Message) -> object:
        nonlocal signalled
        if message.operation == Operation.WRITE and b"tapfs/paused" in message.payload and not signalled:
            signalled = True
            disk.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        return answer(connection, message)

    monkeypatch.setattr(xenstored_server.Connection, "_answer", slow_answer)
    async with devices.guest(disk) as guest:
        await guest.connect()
        await disk.ask("pause")
        assert signalled
        assert await disk.ended() == STOPPED


async def test_a_swap_that_was_noted_holds_though_the_answer_is_lost(
    devices: Devices, qcow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To go on with the image below would leave a successor, which is told of the overlay, without its plan."""
    overlay = tmp_path / "over"
    disk = await devices.serve(f"tap:qcow:{qcow}")
    answer = xenstored_server.Connection._answer
    noting: list[int] = []

    def lost_answer(connection: xenstored_server.Connection, message: Message) -> None:
        if message.operation == Operation.WRITE and b"tapfs/spec" in message.payload:
            noting.append(message.transaction)
        answer(connection, message)
        if message.operation == Operation.TRANSACTION_END and message.transaction in noting:
            noting[:] = [-1]
            connection.stream.socket.shutdown(socket.SHUT_RDWR)

    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        monkeypatch.setattr(xenstored_server.Connection, "_answer", lost_answer)
        await disk.ask("swap", keep_names=True, file=str(overlay), size=None)
        assert noting == [-1]
        assert (await disk.ask("status"))["path"] == str(overlay)
        await trio.to_thread.run_sync(frontend.write, 0, b"a" * 512)
        await disk.kill()
        disk.start()
        await disk.await_log("connected again")
        assert await trio.to_thread.run_sync(frontend.read, 0, 1) == b"a" * 512
