"""Modes r, w and w!, RAM disks of two guests, guests that mean harm, limits of a process."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs.serving.disk_sandbox import FOLDERS_VARIABLE
from tapfs.serving.processes import process_start
from tapfs.xen.device import State
from tests.xen.disk_device import DONE, FAILED, Devices, DiskDevice, descriptors_of, opened_when_free
from tests.xen.machine import PATIENCE

SIZE = 1 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


async def test_an_image_in_use_is_refused(devices: Devices, raw: Path) -> None:
    await devices.serve(f"tap:aio:{raw}")
    other = await devices.attach(f"tap:aio:{raw}", vdev="xvdb")
    assert await other.ended() == FAILED
    assert "is being used by another process" in (await other.read("tapfs/error") or "")
    assert await other.read("tapfs/error-kind") == "locked"


async def test_two_guests_share_a_ram_disk_which_outlives_both(devices: Devices, ram_name: str) -> None:
    tapfs.create(ram_name, "ram", SIZE)
    one = await devices.serve(f"tap:{ram_name}", domain=1)
    two = await devices.serve(f"tap:{ram_name}", domain=2)
    async with devices.guest(one) as first, devices.guest(two) as second:
        a, b = await first.connect(), await second.connect()
        a.write(0, b"a" * 512)
        b.write(1, b"b" * 512)
        assert a.read(0, 2) == b.read(0, 2) == b"a" * 512 + b"b" * 512
        await first.close()
        await one.detach()
        assert await one.ended() == DONE
        b.write(2, b"c" * 512)
        await two.kill()
    with tapfs.open(ram_name) as opened:
        assert opened.read(0, 1536) == b"a" * 512 + b"b" * 512 + b"c" * 512


async def test_a_snapshot_of_what_another_guest_writes_is_refused(
    devices: Devices, ram_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    tapfs.create(ram_name, "ram", SIZE)
    one = await devices.serve(f"tap:{ram_name}", domain=1)
    two = await devices.serve(f"tap:{ram_name}", domain=2)
    with pytest.raises(tapfs.ImageError, match="is being written by another process"):
        await one.ask("swap", keep_names=True, file=str(tmp_path / "over"))
    assert list(tmp_path.iterdir()) == []
    await two.terminate()
    await one.ask("swap", keep_names=True, file=str(tmp_path / "over"))
    # A successor finds the RAM disk below the overlay, too.
    await one.kill()
    one.start()
    await devices.await_socket(one)
    assert (await one.ask("status"))["size"] == SIZE


async def test_two_writers_of_a_format_with_metadata_are_warned(devices: Devices, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow"
    tapfs.create(str(path), "qcow", SIZE)
    await devices.serve(f"tap:qcow:{path}", "w!")
    other = await devices.serve(f"tap:qcow:{path}", "w!", vdev="xvdb")
    assert "two writers destroy a qcow image" in other.log


# Guests that mean harm


async def refuses(devices: Devices, disk: DiskDevice, **wrong: object) -> None:
    """The backend has nothing to do with such a frontend, and serves the next."""
    async with devices.guest(disk, wrong=wrong) as guest:
        await guest.publish()
        await guest.await_backend(State.CLOSING)
        assert await disk.read("tapfs/error") is not None
        await guest.close()
        for name in wrong:
            await guest.store.remove(f"{disk.device.frontend}/{name}")
    async with devices.guest(disk) as guest:
        await guest.set_state(State.INITIALISING)
        frontend = await guest.connect()
        assert frontend.read(0, 1) == bytes(512)
        assert await disk.read("tapfs/error") is None
        await guest.close()
        await guest.set_state(State.INITIALISING)


async def test_senseless_keys_are_refused_and_the_next_frontend_served(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    for wrong in (
        {"ring-ref": "-1"},
        {"event-channel": None},
        {"ring-ref": "4000000000"},
        {"ring-ref": 0},
        {"event-channel": 4000000},
        {"ring-page-order": "99999999999999999999"},
        {"protocol": "\x1b[2J"},
    ):
        await refuses(devices, disk, **wrong)
    assert disk.process is not None
    assert disk.process.poll() is None
    assert "\x1b" not in disk.log


async def test_nothing_is_left_open_by_frontends_that_come_and_go(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    assert disk.process is not None
    open_then = 0
    for number in range(4):
        async with devices.guest(disk, wrong={"ring-ref": 0} if number % 2 else {}) as guest:
            if number:
                await guest.set_state(State.INITIALISING)
            await guest.publish()
            state = await guest.await_backend(State.CLOSING, State.CONNECTED)
            assert state is (State.CLOSING if number % 2 else State.CONNECTED)
            await guest.close()
        if number == 0:
            open_then = descriptors_of(disk.process.pid)
    assert descriptors_of(disk.process.pid) == open_then


async def test_a_guest_that_breaks_the_ring_loses_it_and_nothing_else(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.ring.req_prod = 1000
        frontend.ring.port.notify()
        await guest.await_backend(State.CLOSING)
        assert "the guest broke the protocol" in (await disk.read("tapfs/error") or "")
        frontend = await guest.reboot()
        frontend.write(0, b"x" * 512)
        assert frontend.read(0, 1) == b"x" * 512


async def test_states_that_mean_nothing(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        state = f"{disk.device.frontend}/state"
        for text in ("", "-1", "99", "four", "٤", "4 ", "8", "7", "2"):
            await guest.store.write(state, text)
        assert (await disk.ask("status"))["connected"] is False
        await guest.set_state(State.INITIALISING)
        frontend = await guest.connect()
        for text in ("7", "8"):
            await guest.store.write(state, text)
        assert frontend.read(0, 1) == bytes(512)
        await guest.set_state(State.CONNECTED)
        assert frontend.read(0, 1) == bytes(512)


# Limits


async def test_a_process_keeps_to_its_limits(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}", nice=7, memory=400 << 20, open_files=100)
    assert disk.process is not None
    pid = disk.process.pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == 7
    limits = Path(f"/proc/{pid}/limits").read_text()
    values = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert values["Max data size"] == [str(400 << 20)] * 2
    assert values["Max open files"] == ["100"] * 2
    assert await disk.read("tapfs/process") == f"{pid}:{process_start(pid)}"
    async with devices.guest(disk) as guest:
        assert (await guest.connect()).read(0, 1) == bytes(512)


async def test_a_guest_may_take_all_that_little_memory_is_offered_for(
    devices: Devices, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    disk = await devices.serve(f"tap:sync,memory={160 << 20}:{raw}", grants="persistent")
    assert [await disk.read(name) for name in ("multi-queue-max-queues", "max-ring-page-order")] == ["2", "3"]
    async with devices.guest(disk, queues=4, ring_pages=16, persistent=True) as guest:
        frontend = await guest.connect()
        for ring in frontend.rings:
            frontend.write(0, bytes(64 << 10), ring=ring)
            assert frontend.read(0, 128, ring=ring) == bytes(64 << 10)


@pytest.mark.parametrize("options", [{"memory": 1 << 20}, {"open_files": 3}, {"nice": "high"}])
async def test_limits_under_which_nothing_could_be_served(
    devices: Devices, raw: Path, options: dict[str, str | int]
) -> None:
    disk = await devices.attach(f"tap:aio:{raw}", **options)
    assert await disk.ended() == FAILED
    assert await disk.read("tapfs/status") == "failed"
    assert len(disk.log.splitlines()) == 1, disk.log


async def test_an_image_that_wants_too_much_memory_harms_only_itself(devices: Devices, tmp_path: Path) -> None:
    """The greatest L1 table there may be: 128 MiB of it are read when the image is opened."""
    path = tmp_path / "greedy.qcow"
    cluster_bits, l2_bits = 9, 6
    size = (128 << 20) // 8 << (cluster_bits + l2_bits)
    header = struct.pack(">4sIQIIQBB2xIQ", b"QFI\xfb", 1, 0, 0, 0, size, cluster_bits, l2_bits, 0, 48)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(48 + (128 << 20))
    disk = await devices.attach(f"tap:qcow:{path}", memory=170 << 20)
    assert await disk.ended() == FAILED
    assert "takes more memory than its process may have" in (await disk.read("tapfs/error") or "")
    assert len(disk.log.splitlines()) == 1, disk.log


async def test_a_dying_predecessors_lock_is_waited_for(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        await disk.kill()
        # Its descriptors can outlive it as long as its I/O does.
        with await opened_when_free(raw, "raw"):
            disk.start()
            await trio.sleep(0.5)
            assert disk.process is not None
            assert disk.process.poll() is None
        assert await trio.to_thread.run_sync(frontend.read, 0, 1) == bytes(512)


async def test_two_disks_of_a_guest_are_two_processes(devices: Devices, raw: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(b"o" * SIZE)
    one = await devices.serve(f"tap:aio:{raw}")
    two = await devices.serve(f"tap:aio:{other}", vdev="xvdb")
    async with devices.guest(one) as first, devices.guest(two) as second:
        a, b = await first.connect(), await second.connect()
        await one.kill()
        with trio.fail_after(PATIENCE):
            assert await trio.to_thread.run_sync(b.read, 0, 1) == b"o" * 512
        one.start()
        assert await trio.to_thread.run_sync(a.read, 0, 1) == bytes(512)
