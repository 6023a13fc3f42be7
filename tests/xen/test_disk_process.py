"""A disk process on the simulated machine: handshake, data, every way to end, another beginning."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs import ErrorKind
from tapfs.xen.device import State
from tapfs.xen.xenstore.client import Store
from tapfs.xen.xenstore.wire import Message, Operation
from tests.xen import disk_device
from tests.xen import xenstored as xenstored_server
from tests.xen.disk_device import DISK_BYTES, DONE, FAILED, STOPPED, Devices
from tests.xen.machine import PATIENCE
from tests.xen.xenstored import Xenstored

SIZE = DISK_BYTES
DATA = bytes(range(256)) * 32  # 8 KiB


async def test_the_handshake_tells_the_guest_what_the_disk_is(devices: Devices, qcow: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    assert await disk.state() is State.INIT_WAIT
    async with devices.guest(disk, ring_pages=2) as guest:
        await guest.connect()
        assert guest.sectors == SIZE // 512
        assert guest.info == 0
        assert await disk.read("feature-discard") == "1"
        assert await disk.read("discard-granularity") == "4096"
        assert await disk.read("physical-sector-size") == "4096"
    status = await disk.ask("status")
    assert status["connected"] is True
    assert status["paused"] is False
    assert status["format"] == "qcow"
    assert status["size"] == SIZE
    await disk.await_log("domain 1 xvda (guest-1): connected: 1 ring(s) of 2 page(s)")


@pytest.mark.parametrize(
    ("wanted", "keeps", "used"),
    [
        (None, True, "copy"),
        ("map", True, "map"),
        ("persistent", True, "persistent"),
        ("persistent", False, "map"),
    ],
)
@pytest.mark.parametrize("kind", ["tap", "vbd"])
async def test_how_data_comes_from_the_guest(
    devices: Devices, raw: Path, wanted: str | None, used: str, kind: str, *, keeps: bool
) -> None:
    """As was asked for, by `tapfs attach` or in xl's target; persistent only where the guest keeps its pages."""
    if kind == "tap":
        disk = await devices.serve(f"tap:sync:{raw}", **({} if wanted is None else {"grants": wanted}))
    else:
        disk = await devices.serve(f"tap:sync{'' if wanted is None else f',grants={wanted}'}:{raw}", kind=kind)
    async with devices.guest(disk, persistent=keeps) as guest:
        frontend = await guest.connect()
        await disk.await_log(f"grants: {used}\n")
        frontend.write(0, DATA)
        assert frontend.read(0, len(DATA) // 512) == DATA


async def test_pages_that_a_guest_was_not_asked_to_keep_are_not_kept(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:sync:{raw}", grants="persistent")
    await devices.store.write(f"{disk.device.backend}/feature-persistent", 0)
    async with devices.guest(disk, persistent=True) as guest:
        await guest.connect()
        await disk.await_log("grants: map\n")


async def test_what_libxl_says_of_the_drive_reaches_the_guest(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:sync:{raw}", "r", kind="vbd", removable=1, device_type="cdrom")
    async with devices.guest(disk) as guest:
        await guest.connect()
        assert guest.info == 1 | 2 | 4
    other = await devices.serve(f"tap:sync:{raw}", "r", vdev="xvdb", kind="vbd")
    async with devices.guest(other) as guest:
        await guest.connect()
        assert guest.info == 4


async def test_xentop_finds_the_counters_of_the_kind_vbd3(devices: Devices, raw: Path) -> None:
    """By the key and the file that libxenstat looks for."""
    disk = await devices.serve(f"tap:sync:{raw}", kind="vbd3")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, bytes(4096))
        frontend.read(0, 16)
        await disk.await_log("connected")

        async def counted() -> tuple[int, ...]:
            pid = await disk.read("kthread-pid")
            name = f"vbd-{disk.device.domain}-{disk.device.number}"
            file = disk.machine.directory / f"td3-{pid}" / name
            return struct.unpack("=II11Q", file.read_bytes()) if file.exists() else ()

        with trio.fail_after(PATIENCE):
            while True:
                found = await counted()
                if found[3:6] == (1, 1, 16) and found[7:10] == (1, 1, 8):
                    break
                await trio.sleep(0.05)
        assert found[:3] == (1, 0, 0)
        await guest.close()


async def test_what_nobody_flushes_is_flushed_in_the_background(devices: Devices, qcow: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        sectors = itertools.count(0, 8)

        def written(sector: int) -> bool:
            """Whether a write to a cluster of its own waits in the process at first."""
            frontend.write(sector, DATA[:4096])
            return not on_disk(sector)

        def on_disk(sector: int) -> bool:
            with tapfs.open(qcow, shared=True) as image:
                return image.read(sector * 512, 4096) == DATA[:4096]

        with trio.fail_after(PATIENCE):
            # On a busy machine the flush may come between the write and the look.
            last = next(sector for sector in sectors if written(sector))
            while not on_disk(last):
                await trio.sleep(0.5)


async def test_a_disk_with_sectors_of_4096_bytes_is_offered_as_one(devices: Devices, tmp_path: Path) -> None:
    """Only the alignment of requests is 4096: sectors are counted in 512 bytes all the same."""
    path = tmp_path / "a.vhdx"
    tapfs.create(path, "vhdx", SIZE, options={"logical_sector_size": "4096"})
    disk = await devices.serve(f"tap:vhdx:{path}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        assert (guest.sectors, guest.sector_size) == (SIZE // 512, 4096)
        assert await disk.read("physical-sector-size") == "4096"
        frontend.write(SIZE // 512 - 16, DATA)
        assert frontend.read(SIZE // 512 - 16, 16) == DATA
        await guest.close()
    await disk.detach()
    assert await disk.ended() == DONE
    with tapfs.open(path) as image:
        assert image.sector_size == 4096
        assert image.read(SIZE - len(DATA), len(DATA)) == DATA


@pytest.mark.parametrize("format_name", ["raw", "qcow"])
async def test_what_a_guest_writes_is_in_the_image(
    devices: Devices, raw: Path, qcow: Path, tmp_path: Path, format_name: str
) -> None:
    image = raw if format_name == "raw" else qcow
    disk = await devices.serve(f"tap:{format_name}:{image}")
    async with devices.guest(disk, queues=2) as guest:
        frontend = await guest.connect()
        frontend.write(3, DATA)
        frontend.write(1000, b"\1" * 512, ring=frontend.rings[-1])
        frontend.flush()
        assert frontend.read(3, 16) == DATA
        assert frontend.read(1000, 2) == b"\1" * 512 + bytes(512)
        frontend.discard(8, 8)
        copied = tmp_path / "copy.raw"
        # It is durable, so another's eyes see it, too.
        subprocess.run(["qemu-img", "convert", "-U", "-f", format_name, "-O", "raw", image, copied], check=True)
        assert copied.read_bytes()[3 * 512 : 3 * 512 + 5 * 512] == DATA[: 5 * 512]
        await guest.close()
    await disk.detach()
    assert await disk.ended() == DONE
    with tapfs.open(image, format=format_name) as opened:
        assert opened.read(1000 * 512, 512) == b"\1" * 512
        assert opened.read(16 * 512, 3 * 512) == DATA[13 * 512 :]
    assert tapfs.check(image, format=format_name).corruptions == 0 if format_name == "qcow" else True


async def test_a_detach_closes_the_image_before_it_is_closed(devices: Devices, qcow: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest, trio.open_nursery() as nursery:
        frontend = await guest.connect()
        frontend.write(0, DATA)
        nursery.start_soon(guest.close_when_told)
        with trio.fail_after(PATIENCE):
            await disk.detach()
        # Whoever comes next may write at once.
        with tapfs.open(qcow, writable=True) as opened:
            assert opened.read(0, len(DATA)) == DATA
    assert await disk.ended() == DONE
    assert await disk.state() is State.UNKNOWN
    run = devices.runtime_directory
    assert [path.name for path in run.iterdir() if path.suffix != ".lock"] == []


async def test_detached_before_any_guest_used_it(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")

    async def detached(keys: Store) -> None:
        await keys.write(f"{disk.device.backend}/online", 0)
        await keys.write(f"{disk.device.backend}/state", 5)

    # At one moment, as libxl does it: after state 6 the process is done, and a later state 5 is the supervisor's.
    await disk.store.transact(detached)
    assert await disk.ended() == DONE
    assert await disk.state() is State.CLOSED


@pytest.mark.parametrize(("state", "online"), [(5, "0"), (4, "0"), (1, "1")])
async def test_a_state_written_while_the_process_closes_for_good_is_not_the_last(
    devices: Devices, raw: Path, xenstored: Xenstored, monkeypatch: pytest.MonkeyPatch, *, state: int, online: str
) -> None:
    """The toolstack writes between the look that saw that the device goes and the word that it is closed."""
    disk = await devices.serve(f"tap:aio:{raw}")
    answer = xenstored_server.Connection._answer
    told: list[int] = []

    def answer_late(connection: xenstored_server.Connection, message: Message) -> None:
        ours = connection in devices.connections
        if message.operation == Operation.TRANSACTION_START and connection.domain == 0 and not ours and not told:
            told.append(state)
            xenstored.write(f"{disk.device.backend}/online", online)
            xenstored.write(f"{disk.device.backend}/state", str(state))
        answer(connection, message)

    monkeypatch.setattr(xenstored_server.Connection, "_answer", answer_late)
    await disk.store.write(f"{disk.device.backend}/online", 0)
    assert await disk.ended() == DONE
    assert told
    assert await disk.state() is State.CLOSED


@pytest.mark.parametrize("abrupt", [False, True])
async def test_a_guest_that_reboots_connects_again(devices: Devices, raw: Path, *, abrupt: bool) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, DATA)
        frontend = await guest.reboot(abrupt=abrupt)
        assert frontend.read(0, 16) == DATA
        statistics = await disk.ask("statistics")
        assert statistics["writes"] == 1
        assert statistics["reads"] == 1


async def test_a_guest_that_closes_without_a_word_before(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        await guest.connect()
        await guest.set_state(State.CLOSED)
        await guest.await_backend(State.CLOSED)
        await guest.await_backend(State.INIT_WAIT)  # a little later: it may be used again
        guest._forget_rings()
        await guest.set_state(State.INITIALISING)
        frontend = await guest.connect()
        assert frontend.read(0, 1) == bytes(512)


async def test_all_is_flushed_when_the_backend_says_closed(devices: Devices, qcow: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest:
        (await guest.connect()).write(0, DATA)
        await guest.close()
        with tapfs.open(qcow, shared=True) as opened:
            assert opened.read(0, len(DATA)) == DATA


async def test_the_frontends_directory_goes_first(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        (await guest.connect()).write(0, DATA)
        await disk.store.remove(disk.device.frontend)
        await guest.await_backend(State.CLOSED)
        await disk.remove()
        assert await disk.ended() == DONE
    assert raw.read_bytes()[: len(DATA)] == DATA


async def test_the_backends_directory_goes_at_once(devices: Devices, qcow: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest:
        (await guest.connect()).write(0, DATA)
        await disk.remove()
        assert await disk.ended() == DONE
    with tapfs.open(qcow) as opened:
        assert opened.read(0, len(DATA)) == DATA
    # Nothing of it came back.
    assert await disk.store.list("/local/domain/0/backend") == []


async def test_another_device_of_the_number_takes_the_place(devices: Devices, raw: Path) -> None:
    """Between two looks the toolstack has removed the directory and made another: that is not ours to touch."""
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        await guest.connect()
        backend = disk.device.backend

        async def remade(keys: Store) -> None:
            await keys.remove(backend)
            await keys.write(f"{backend}/state", 1)
            await keys.write(f"{backend}/params", "another")

        await disk.store.transact(remade)
        assert await disk.ended() == DONE
        assert sorted(await disk.store.list(backend)) == ["params", "state"]
        assert await disk.state() is State.INITIALISING


async def test_a_guest_in_state_five_may_still_write(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        await guest.set_state(State.CLOSING)
        await guest.await_backend(State.CLOSING)
        frontend.write(0, DATA)
        # The requests that were in flight are the successor's, as in state 4.
        await disk.kill()
        disk.start()
        await disk.await_log("connected again")
        frontend.write(len(DATA) // 512, DATA)
        await guest.set_state(State.CLOSED)
        await guest.await_backend(State.CLOSED)
    assert raw.read_bytes()[: 2 * len(DATA)] == 2 * DATA


async def test_sigterm_leaves_the_rings_for_a_successor(devices: Devices, qcow: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, DATA)
        assert await disk.terminate() == STOPPED
        assert await disk.state() is State.CONNECTED
        # What was acknowledged is in the image, closed as it is.
        with tapfs.open(qcow) as opened:
            assert opened.read(0, len(DATA)) == DATA
        disk.start()
        assert await trio.to_thread.run_sync(frontend.read, 0, 16) == DATA
        await disk.await_log("connected again")


async def test_read_only(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}", "r")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        assert guest.info == 4
        assert await disk.read("feature-discard") == "0"
        with pytest.raises(OSError, match="error"):
            frontend.write(0, DATA)
        assert frontend.read(0, 16) == bytes(len(DATA))
    with pytest.raises(tapfs.ImageError) as raised:
        await disk.ask("swap", keep_names=True, file=str(raw) + ".over")
    assert raised.value.kind is ErrorKind.READ_ONLY


@pytest.mark.parametrize(
    ("params", "kind", "says"),
    [
        ("{raw}", "read_only", "attach tap:aio:{raw}, or say -f raw, if it is one"),
        ("tap:vmdk:{raw}", "invalid_format", "not a VMDK descriptor"),
    ],
)
async def test_an_image_that_cannot_be_opened(devices: Devices, raw: Path, params: str, kind: str, says: str) -> None:
    disk = await devices.attach(params.format(raw=raw))
    assert await disk.await_key("tapfs/status", "ready", "failed") == "failed"
    assert await disk.ended() == FAILED
    error = await disk.read("tapfs/error")
    assert error is not None
    assert says.format(raw=raw) in error
    assert "\n" not in error
    assert await disk.read("tapfs/error-kind") == kind
    assert len(disk.log.splitlines()) == 1
    assert disk.log.startswith("tapfs: domain 1 xvda (guest-1): ")


async def test_the_format_may_be_said_apart(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(str(raw), format="raw")
    async with devices.guest(disk) as guest:
        (await guest.connect()).write(0, DATA)
    assert raw.read_bytes()[: len(DATA)] == DATA


async def test_an_encrypted_image(devices: Devices, tmp_path: Path) -> None:
    path, key = tmp_path / "secret.qcow", tmp_path / "key"
    tapfs.create(str(path), "qcow", SIZE, password=b"word")
    key.write_text("word\n")
    refused = await devices.attach(f"tap:qcow:{path}", vdev="xvdb")
    assert await refused.ended() == FAILED
    assert await refused.read("tapfs/error-kind") == "denied"
    disk = await devices.serve(f"tap:qcow:{path}", key_file=str(key))
    async with devices.guest(disk) as guest:
        (await guest.connect()).write(0, DATA)
        await disk.ask("swap", keep_names=True, file=str(tmp_path / "over.qcow"))
        guest.frontend.write(8, DATA)
        await guest.close()
    await disk.detach()
    with tapfs.open(tmp_path / "over.qcow", password=b"word") as opened:
        assert opened.read(0, 8192 + 4096) == DATA[:4096] + DATA


async def test_xenstored_may_go_and_come_back(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        await devices.lose_xenstored()
        frontend.write(0, DATA)
        assert frontend.read(0, 16) == DATA
        await guest.close()
        await disk.detach()
    assert await disk.ended() == DONE
    assert raw.read_bytes()[: len(DATA)] == DATA


async def test_xenstored_may_go_between_the_rings_and_the_word_that_they_are_served(
    devices: Devices, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = await devices.serve(f"tap:sync:{raw}")
    answer = xenstored_server.Connection._answer
    lost: list[bytes] = []

    def lose(connection: xenstored_server.Connection, message: Message) -> None:
        connected = f"{disk.device.backend}/state\0004".encode()
        if message.operation == Operation.WRITE and message.payload == connected and not lost:
            lost.append(connected)
            raise trio.BrokenResourceError
        answer(connection, message)

    monkeypatch.setattr(xenstored_server.Connection, "_answer", lose)
    async with devices.guest(disk) as guest:
        with trio.fail_after(PATIENCE):
            frontend = await guest.connect()
        assert lost
        await trio.to_thread.run_sync(frontend.write, 0, DATA)
        await guest.close()


async def test_xenstored_may_go_while_a_successor_reads_what_the_guest_asks_for(
    devices: Devices, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is not the guest's fault: its rings are taken up where they were left, once the keys can be read."""
    disk = await devices.serve(f"tap:sync:{raw}")
    answer = xenstored_server.Connection._answer
    lost: list[Message] = []

    def lose(connection: xenstored_server.Connection, message: Message) -> None:
        port = f"{disk.device.frontend}/event-channel\0".encode()
        if message.operation == Operation.READ and message.payload == port and not lost:
            lost.append(message)
            raise trio.BrokenResourceError
        answer(connection, message)

    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        await disk.kill()
        monkeypatch.setattr(xenstored_server.Connection, "_answer", lose)
        disk.start()
        await trio.to_thread.run_sync(frontend.write, 0, DATA)
        assert lost
        await disk.await_log("connected again: ")
        await guest.close()


async def test_an_error_with_a_long_path_reaches_the_guest(devices: Devices, tmp_path: Path) -> None:
    """The path of an image may be longer than xenstore's messages have room for beside a key."""
    folder = tmp_path
    while len(str(folder)) < 3700:
        folder /= "d" * 240
    folder.mkdir(parents=True)
    image = folder / ("x" * (3990 - len(str(folder)) - 1))
    image.write_bytes(bytes(SIZE))
    disk = await devices.serve(f"tap:sync:{image}", kind="vbd")
    image.unlink()
    async with devices.guest(disk) as guest:
        await guest.publish()
        await guest.await_backend(State.CLOSING)
    assert (await disk.read("tapfs/error") or "").startswith(str(tmp_path))


#: The process of a disk that flushes often and keeps no idle thread; once a file exists, it gets no new thread.
_WITHOUT_THREADS = """
import os, sys, threading
import trio._core._thread_cache
from tapfs.serving import periodic_flush
limit, *words = sys.argv[1:]
trio._core._thread_cache.IDLE_TIMEOUT = 0.001
periodic_flush._FLUSH_SECONDS = 0.05
start = threading.Thread.start
def limited(self):
    if os.path.exists(limit):
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = limited
from tapfs.xen.disk.process import main
sys.exit(main(words))
"""


async def test_a_disk_needs_no_new_thread(
    devices: Devices, qcow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is flushed in the background, paused and detached, and its process asked, whatever the host refuses."""
    limit = tmp_path / "limit"
    monkeypatch.setattr(disk_device, "COMMAND", [sys.executable, "-c", _WITHOUT_THREADS, str(limit)])
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        limit.touch()
        frontend.write(3, DATA)

        def in_image() -> bytes:
            with tapfs.open(qcow, format="qcow", shared=True) as opened:
                return opened.read(3 * 512, len(DATA))

        with trio.fail_after(PATIENCE):
            while in_image() != DATA:
                assert disk.process is not None
                assert disk.process.poll() is None, disk.log
                await trio.sleep(0.01)
        await disk.ask("pause")
        await disk.ask("resume")
        frontend.write(100, DATA)
        assert frontend.read(100, 16) == DATA
        await guest.close()
    await disk.detach()
    assert await disk.ended() == DONE
    with tapfs.open(qcow, format="qcow") as opened:
        assert opened.read(100 * 512, len(DATA)) == DATA


async def test_too_few_threads_for_the_rings(
    devices: Devices, qcow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest is refused with an error that names the limit, and can try again when there are threads."""
    limit = tmp_path / "limit"
    monkeypatch.setattr(disk_device, "COMMAND", [sys.executable, "-c", _WITHOUT_THREADS, str(limit)])
    disk = await devices.serve(f"tap:qcow:{qcow}")
    limit.touch()
    async with devices.guest(disk) as guest:
        await guest.publish()
        await disk.await_key("state", str(int(State.CLOSING)))
        assert "no more threads can be started" in (await disk.read("tapfs/error") or "")
    await disk.ask("status")
    assert await disk.terminate() == STOPPED


async def test_no_discard_of_xl_is_obeyed(devices: Devices, raw: Path) -> None:
    disk = await devices.attach(f"tap:aio:{raw}")
    await disk.store.write(f"{disk.device.backend}/discard-enable", "0")
    await disk.await_ready()
    await disk.kill()
    disk.start()
    await disk.await_ready()
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, DATA)
        assert await disk.read("feature-discard") == "0"
        with pytest.raises(OSError, match="error"):
            frontend.discard(0, 8)
        assert frontend.read(0, 16) == DATA
    assert raw.stat().st_blocks > 0
