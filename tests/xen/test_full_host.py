"""A full host: the guest waits, the operator is told, and the guest sees no error whatever happens meanwhile."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs.xen.device import State
from tapfs.xen.toolstack.attached_disks import attached_disks
from tests.xen import supervising
from tests.xen.blkif import OKAY, Operation, Request
from tests.xen.disk_device import DISK_BYTES, DONE, STOPPED, Devices, DiskDevice
from tests.xen.frontend import RequestError, Ring
from tests.xen.machine import PATIENCE

DATA = bytes(range(256)) * 256  # 64 KiB


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with 2 MiB of room."""
    place = tmp_path / "host"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def fill(folder: Path) -> Path:
    """A file that takes the room that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        left = os.statvfs(folder)
        file.write(bytes(left.f_bavail * left.f_bsize))
    return filler


async def waiting(devices: Devices, disk: DiskDevice) -> str:
    """What `tapfs list` says that the guest waits for, once it does."""
    await devices.await_socket(disk)
    with trio.fail_after(PATIENCE):
        while (await disk.ask("status"))["waiting"] is None:
            await trio.sleep(0.01)
        while True:
            (listed,) = await attached_disks(disk.store, disk.device)
            if listed.waiting is not None:
                assert listed.summary == f"waiting: {listed.waiting}"
                return listed.waiting
            await trio.sleep(0.01)


@pytest.mark.parametrize("format_name", ["raw", "qcow"])
async def test_a_guest_waits_for_space(devices: Devices, folder: Path, format_name: str) -> None:
    """Of a raw image the engine's thread meets the error, of a qcow the driver's. Its process ends meanwhile."""
    path = folder / "disk"
    tapfs.create(str(path), format_name, DISK_BYTES)
    disk = await devices.serve(f"tap:{format_name}:{path}")
    async with devices.guest(disk, queues=2) as guest:
        frontend = await guest.connect()
        frontend.write(0, DATA[:4096])
        filler = fill(folder)

        async def write(ring: Ring, sector: int) -> None:
            await trio.to_thread.run_sync(lambda: frontend.write(sector, DATA, ring=ring))
            written.append(sector)

        written: list[int] = []
        with trio.fail_after(2 * PATIENCE):
            async with trio.open_nursery() as nursery:
                for ring, sector in zip(frontend.rings, (1024, 7168), strict=True):
                    nursery.start_soon(write, ring, sector)
                assert str(path) in await waiting(devices, disk)
                with pytest.raises(tapfs.ImageError, match="the guest waits"):
                    await disk.ask("pause")
                await disk.ask("resume")  # in vain
                if format_name == "raw":
                    await disk.kill()
                else:
                    assert await disk.terminate() == STOPPED
                lines = disk.log.count("the guest waits: ")
                disk.start()
                # Of the qcow it cannot even be opened: what its process had not flushed finds no space.
                await supervising.eventually(lambda: disk.log.count("the guest waits: ") > lines)
                assert written == []
                filler.unlink()
                if format_name == "raw":
                    await disk.ask("resume")
        assert sorted(written) == [1024, 7168]
        await disk.await_key("tapfs/waiting", None)
        for sector in written:
            assert frontend.read(sector, len(DATA) // 512) == DATA
        await guest.close()
    await disk.detach()
    assert await disk.ended() == DONE
    with tapfs.open(path, format=format_name) as image:
        assert image.read(7168 * 512, len(DATA)) == DATA
    assert tapfs.check(path, format=format_name).corruptions == 0 if format_name == "qcow" else True


async def test_a_guest_may_want_to_know(devices: Devices, folder: Path) -> None:
    path = folder / "disk"
    tapfs.create(str(path), "qcow", DISK_BYTES)
    disk = await devices.serve(f"tap:qcow,wait-on=nothing:{path}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        fill(folder)
        with pytest.raises(RequestError):
            frontend.write(1024, DATA)
        await guest.close()
    await disk.detach()


async def test_a_disk_that_waits_can_be_detached(devices: Devices, folder: Path) -> None:
    path = folder / "disk"
    tapfs.create(str(path), "raw", DISK_BYTES)
    disk = await devices.serve(f"tap:raw:{path}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        fill(folder)
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                with pytest.raises(RequestError):
                    await trio.to_thread.run_sync(lambda: frontend.write(1024, DATA))

            nursery.start_soon(write)
            await waiting(devices, disk)
            await disk.remove()
            assert await disk.ended() == DONE


async def test_a_guest_that_closes_is_answered_what_was_in_flight(devices: Devices, folder: Path) -> None:
    """The write waits and the read behind it was answered: only the journal knows what the next process has to do."""
    path = folder / "disk"
    tapfs.create(str(path), "raw", DISK_BYTES)
    disk = await devices.serve(f"tap:raw:{path}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        ring = frontend.ring
        filler = fill(folder)
        buffers = frontend.buffer(1), frontend.buffer(1)
        buffers[0].write(DATA[:4096])
        write = Request(Operation.WRITE, 1024, buffers[0].segments(8))
        ring.submit(write)
        await waiting(devices, disk)
        ring.submit(Request(Operation.READ, 0, buffers[1].segments(8)))
        (read,) = await trio.to_thread.run_sync(ring.await_more)
        assert read.id != write.id
        await guest.set_state(State.CLOSING)
        await guest.await_backend(State.CLOSING)
        await disk.kill()
        filler.unlink()
        disk.start()
        (written,) = await trio.to_thread.run_sync(ring.await_more)
        assert (written.id, written.status) == (write.id, OKAY)
        assert path.read_bytes()[1024 * 512 :][:4096] == DATA[:4096]
